"""Statistics against slow references and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, mannwhitneyu, norm, spearmanr, t, ttest_1samp, ttest_ind

import ws
from ws.stats import (
    _CHUNK,
    LEAST_ANSWERS,
    N_BOOTSTRAP,
    Estimate,
    area_under_roc,
    columns_of,
    estimate_mean,
    estimate_over_seeds,
    estimate_text,
    group_difference,
    holm,
    is_right,
    p_value,
    rank_correlation,
    resampled_means,
    surgical_informedness,
    widened,
)


def test_an_estimate_is_printed_in_one_way():
    e = Estimate(mean=-1.1, std=1.0, ci_lo=-1.24, ci_hi=0.975, n=9, p=0.1)
    assert f"{e}" == "-1.10 [-1.24, +0.97]"
    assert f"{e:.1f}" == "-1.1 [-1.2, 1.0]"
    row = e.columns("shift", "ci_lo", "ci_hi") | {"mean": 0.5, "ci_lo": "0.25", "ci_hi": 0.75, "gone": ""}
    assert estimate_text(row, "shift") == f"{e}"
    assert estimate_text(row, "mean", ".0f", 100, ends="") == "50 [25, 75]"
    assert estimate_text(row, "gone") == ""
    assert estimate_text({"shift": "2", "shift_ci_lo": "", "shift_ci_hi": None}, "shift") == "+2.00"


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=80)
    ours = estimate_mean(values, n_boot=20_000)
    apart = values.mean() + np.sqrt(80 / 79) * 1.990450 / 1.959964 * (values - values.mean())  # Student's t with 79
    theirs = bootstrap((apart,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.std == pytest.approx(values.std(ddof=1))
    assert ours.ci_lo == pytest.approx(theirs.low, abs=0.01)
    assert ours.ci_hi == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_agrees_with_the_normal_interval_for_many_items():
    values = np.random.default_rng(4).normal(2.0, 3.0, size=4000)
    ours = estimate_mean(values, n_boot=4000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert (ours.ci_hi - ours.ci_lo) / 2 == pytest.approx(half, rel=0.06)
    assert ours.excludes_zero


def test_seeds_widen_the_interval_when_they_disagree():
    rng = np.random.default_rng(6)
    items = rng.normal(size=(1, 200)) * 0.1
    spread = items + np.array([[-1.0], [0.0], [1.0]])
    alike = items + np.zeros((3, 1))
    wide, narrow = estimate_over_seeds(spread), estimate_over_seeds(alike)
    assert wide.ci_hi - wide.ci_lo > 5 * (narrow.ci_hi - narrow.ci_lo)
    one, flat = estimate_over_seeds(items, n_boot=4000), estimate_mean(items[0], n_boot=4000)
    assert (one.ci_lo, one.ci_hi) == pytest.approx((flat.ci_lo, flat.ci_hi), abs=0.003)


def test_the_width_is_smooth_in_the_number_of_items():
    """Of the same spread, in standard errors: no jump anywhere, and that of the normal distribution in the end."""
    widths = []
    for n in [*range(2, 40), 113, 1000]:
        values = np.resize([-1.0, 1.0], n) + np.linspace(-0.1, 0.1, n)
        moved = widened(values[None])[0]
        error = values.std(ddof=1) / np.sqrt(n)
        widths.append(1.959964 * moved.std(ddof=0) / np.sqrt(n) / error)
        assert widths[-1] == pytest.approx(t.ppf(0.975, n - 1), rel=1e-6), "half of Student's interval"
    assert (np.diff(widths) < 0).all()
    assert widths[-1] == pytest.approx(1.96, rel=2e-3)


def test_widening_moves_seeds_and_items_apart_and_nothing_else():
    values = np.random.default_rng(12).normal(size=(2, 3, 40))
    wide = widened(values)
    assert np.allclose(wide.mean(axis=(1, 2)), values.mean(axis=(1, 2)))
    for axis, factor in ((2, np.sqrt(3 / 2) * 4.302653 / 1.959964), (1, np.sqrt(40 / 39) * 2.022691 / 1.959964)):
        before, after = (v.mean(axis=axis) - v.mean(axis=(1, 2))[:, None] for v in (values, wide))
        assert np.allclose(after, factor * before)
    rest = [v - v.mean(axis=2, keepdims=True) - v.mean(axis=1, keepdims=True) for v in (values, wide)]
    centred = [r - r.mean(axis=(1, 2), keepdims=True) for r in rest]
    assert np.allclose(*centred), "what a seed and an item have to themselves stays"
    assert np.array_equal(widened(values[:, :1, :1]), values[:, :1, :1])
    assert np.abs(widened(values, 0.99) - values).mean() > np.abs(wide - values).mean()


def test_a_p_value_is_where_the_interval_would_touch_zero():
    """With one part of variance Student's t; with several the root of `mean^2 = sum t_i^2 V_i`, between the two."""
    values = np.random.default_rng(13).normal(0.5, 1, size=12)
    assert p_value(values.mean(), [(values.var(ddof=1) / 12, 11)]) == pytest.approx(ttest_1samp(values, 0).pvalue)
    parts = [(0.04, 2), (0.09, 11)]
    for mean in (0.3, 1.0, 2.5, 40.0):
        p = p_value(mean, parts)
        assert sum(v * t.isf(p / 2, df) ** 2 for v, df in parts) == pytest.approx(mean**2, rel=1e-6)
        alone = [2 * t.sf(mean / np.sqrt(0.13), df) for df in (11, 2)]
        assert alone[0] < p < alone[1]
    assert p_value(1.0, [(0.0, 2), (0.25, 11)]) == pytest.approx(2 * t.sf(2, 11)), "seeds that do not differ"
    assert p_value(0.0, parts) == pytest.approx(1)
    for n_seeds in (2, 3):
        seeds = np.random.default_rng(n_seeds).normal(0.4, 0.3, size=(n_seeds, 12))
        found = estimate_over_seeds(seeds, n_boot=20_000)
        at_p = estimate_over_seeds(seeds, n_boot=20_000, level=1 - found.p)
        nearest = min(abs(at_p.ci_lo), abs(at_p.ci_hi))
        assert nearest < 0.35 * abs(found.mean), "the bootstrap interval at that level ends near zero"


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 100))
def test_estimates_are_ordered_and_reproducible(values, seed):
    e = estimate_mean(np.array(values), n_boot=200, seed=seed)
    slack, apart = 1e-6 * (1 + abs(e.mean)), widened(np.array([values], dtype=float))
    assert apart.min() - slack <= e.ci_lo <= e.ci_hi <= apart.max() + slack
    assert e == estimate_mean(np.array(values), n_boot=200, seed=seed)
    assert 0 <= e.p <= 1


def test_a_single_item_says_nothing():
    e = estimate_mean(np.array([3.0]))
    assert (e.mean, e.std, e.p, e.excludes_zero) == (3.0, 0.0, 1.0, False)
    pair = estimate_over_seeds(np.array([[3.0], [3.1]]))
    assert (pair.p, pair.excludes_zero) == (1.0, False)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0]]])
def test_nan_and_nothing_are_never_averaged(values):
    with pytest.raises(ws.WsError):
        estimate_mean(np.array(values))


def test_a_batch_of_quantities_is_resampled_together():
    """One draw of items serves every quantity: a difference of means is the mean of the differences, draw by draw."""
    a, b = np.random.default_rng(7).normal(size=(2, 50))
    draws = resampled_means(np.stack([a, b, a - b])[:, None], 500, seed=3)
    assert np.allclose(draws[0] - draws[1], draws[2])
    assert np.array_equal(draws, resampled_means(np.stack([a, b, a - b])[:, None], 500, seed=3))
    drawn = np.random.default_rng(3).integers(0, 50, (500, 50))
    assert np.allclose(draws[0], a[drawn].mean(axis=1)), "of one seed, which is not drawn, the ordinary bootstrap"


def test_the_hierarchical_bootstrap_equals_a_plain_loop():
    """Seeds first, then items shared by the drawn seeds: the same law as the loop that says so."""
    values = np.random.default_rng(8).normal(size=(4, 30)) + np.arange(4)[:, None]
    ours = resampled_means(values[None], 20_000, seed=0)[0]
    rng = np.random.default_rng(1)
    loop = [values[np.ix_(rng.integers(0, 4, 4), rng.integers(0, 30, 30))].mean() for _ in range(20_000)]
    assert ours.mean() == pytest.approx(np.mean(loop), abs=0.02)
    assert ours.std() == pytest.approx(np.std(loop), rel=0.03)
    assert np.quantile(ours, [0.025, 0.5, 0.975]) == pytest.approx(np.quantile(loop, [0.025, 0.5, 0.975]), abs=0.05)


def test_seeds_are_drawn_anew_for_every_chunk_of_resamples():
    """Of values in which only seeds differ the means tell which seeds were drawn, however many items there are."""
    values, draws = np.array([0.0, 1.0, 3.0])[None, :, None], 2000
    many, few = np.repeat(values, _CHUNK // draws + 60, axis=2), np.repeat(values, 5, axis=2)
    assert draws * many.shape[2] > _CHUNK >= draws * few.shape[2], "in several chunks, and in one"
    means = resampled_means(many, draws, seed=0)
    assert means == pytest.approx(resampled_means(few, draws, seed=0), abs=1e-12)
    assert means.var() == pytest.approx(values.var() / 3, rel=0.1)


def test_sets_of_items_share_the_drawn_seeds_and_nothing_else():
    rng = np.random.default_rng(21)
    of_seeds = np.repeat(np.array([0.0, 1.0, 3.0])[None, :, None], 30, axis=2)
    assert np.array_equal(*(resampled_means(of_seeds, 500, 0, items) for items in (0, 1)))
    of_items = np.repeat(rng.normal(size=(1, 1, 30)), 3, axis=1)
    one, again, other = (resampled_means(of_items, 2000, 0, items)[0] for items in (0, 0, 1))
    assert np.array_equal(one, again)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
    assert np.corrcoef(*(resampled_means(of_items, 2000, 0)[0] for _ in range(2)))[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 2 / 3, 0.7])
def test_rounding_puts_no_end_of_an_interval_beside_the_mean(value):
    for n in range(2, 61):
        for e in (estimate_over_seeds(np.full((3, n), value)), group_difference(np.full(n, value), np.full(3, -value))):
            assert e.ci_lo <= e.mean <= e.ci_hi


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.5])) == pytest.approx([0.5])
    assert holm(np.array([0.9, 0.8])).max() == 1


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_plain_and_the_bonferroni_p(values):
    p = np.array(values)
    adjusted = holm(p)
    assert (adjusted >= p - 1e-12).all()
    assert (adjusted <= np.minimum(1, p * len(p)) + 1e-12).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= -1e-12).all(), "the order of the p-values is kept"


def test_surgical_informedness_by_hand():
    """10 dilemmas, 4 wrong. +alpha mends 3 and spoils 1; -alpha spoils 4 and mends 1. Masses 1, 0.9, 1; k = 2."""
    base = np.array([-1.0] * 4 + [1.0] * 6)
    plus = np.array([1, 1, 1, -1, -1, 1, 1, 1, 1, 1.0])
    minus = np.array([1, -1, -1, -1, -1, -1, -1, -1, 1, 1.0])
    scores = np.tile(np.stack([base, plus, minus]), 13)[:, None]  # 52 wrong and 78 right
    mass = np.ones_like(scores) * np.array([1, 0.9, 1])[:, None, None]
    found = surgical_informedness(scores, mass, n_boot=500)
    forward, reverse = 3 / 4 - 2 * 1 / 6, 4 / 6 - 2 * 1 / 4
    assert (found.forward, found.reverse) == pytest.approx((forward, reverse))
    assert found.si is not None
    assert found.si.mean == pytest.approx(100 * (forward + reverse) / 2 * 0.81)
    assert found.si.ci_lo < found.si.mean < found.si.ci_hi
    assert found.si.n == 130
    counts = (found.wrong, found.right, found.fixed_plus, found.broken_plus, found.fixed_minus, found.broken_minus)
    assert counts == tuple(13 * x for x in (4, 6, 3, 1, 1, 4))
    seeds = surgical_informedness(np.repeat(scores, 3, axis=1), np.repeat(mass, 3, axis=1), n_boot=500)
    assert seeds.si is not None
    assert seeds.si.mean == pytest.approx(found.si.mean), "three equal seeds are one"
    assert (seeds.si.ci_lo, seeds.si.ci_hi) == pytest.approx((found.si.ci_lo, found.si.ci_hi), abs=2)


def test_the_standard_error_of_si_is_that_of_a_plain_bootstrap():
    """The linearisation against resampled ratios, with a mass that varies, too."""
    rng, n = np.random.default_rng(21), 400
    scores = rng.normal(0.6, 1, size=(3, 1, n))
    mass = 1 - 0.2 * rng.random((3, 1, n))
    found = surgical_informedness(scores, mass, n_boot=2000)
    right, plus, minus = scores[:, 0] > 0
    draws = []
    for _ in range(2000):
        i = rng.integers(0, n, n)
        r, p, m = right[i], plus[i], minus[i]
        wrong = (~r).sum()
        forward = (~r & p).sum() / wrong - 2 * (r & ~p).sum() / r.sum()
        reverse = (r & ~m).sum() / r.sum() - 2 * (~r & m).sum() / wrong
        draws.append(50 * (forward + reverse) * mass[:, 0, i].mean(axis=1).min() ** 2)
    assert found.si is not None
    assert found.si.std == pytest.approx(np.std(draws), rel=0.1)
    assert (found.si.ci_lo, found.si.ci_hi) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=3)


@pytest.mark.parametrize(("wrong", "right"), [(0, 20), (4, 236), (49, 200), (200, 49)])
def test_there_is_no_si_where_the_base_is_hardly_ever_wrong_or_right(wrong, right):
    scores = np.ones((3, 1, wrong + right))
    scores[0, 0, :wrong] = -1
    found = surgical_informedness(scores, np.ones_like(scores))
    assert (found.si, found.forward, found.reverse) == (None, None, None)
    assert (found.wrong, found.right, found.fixed_plus) == (wrong, right, wrong)
    assert LEAST_ANSWERS == 50


def test_a_difference_of_many_items_is_welchs():
    rng = np.random.default_rng(23)
    a, b = rng.normal(1, 1, 400), rng.normal(0.8, 3, 300)
    found, welch = group_difference(a, b, 20_000), ttest_ind(a, b, equal_var=False)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.n == 700
    assert found.p == pytest.approx(welch.pvalue, abs=0.005)
    assert (found.ci_lo, found.ci_hi) == pytest.approx(tuple(welch.confidence_interval()), abs=0.03)


# ---- in numbers -----------------------------------------------------------------------------------------------------


def redrawn(values: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    """Means over resamples of the seeds and items of `values [seeds, items]`, one draw after the other."""
    rng, (n_seeds, n) = np.random.default_rng(seed), values.shape
    rows = rng.integers(0, n_seeds, (n_boot, n_seeds)) if n_seeds > 1 else np.zeros((n_boot, 1), int)
    return np.array([values[np.ix_(s, i)].mean() for s, i in zip(rows, rng.integers(0, n, (n_boot, n)), strict=True)])


def apart(values: np.ndarray, level: float) -> np.ndarray:
    """`values [seeds, items]` with the distances of seeds and of items from the mean of all times their factors."""
    factors = [
        np.sqrt(k / (k - 1)) * t.ppf((1 + level) / 2, k - 1) / norm.ppf((1 + level) / 2) - 1 if k > 1 else 0.0
        for k in values.shape
    ]
    by_seed, by_item = (values.mean(axis=a, keepdims=True) - values.mean() for a in (1, 0))
    return values + factors[0] * by_seed + factors[1] * by_item


@pytest.mark.parametrize("shape", [(1, 2), (1, 7), (2, 2), (3, 5)])
@pytest.mark.parametrize("level", [0.95, 0.6])
def test_an_estimate_is_that_of_plain_draws_of_values_that_were_moved_apart(shape, level):
    values = np.random.default_rng(31).normal(0.4, 1, shape)
    found = estimate_over_seeds(values, 500, 3, level)
    ends = np.quantile(redrawn(apart(values, level), 500, 3), [(1 - level) / 2, (1 + level) / 2])
    assert (found.ci_lo, found.ci_hi) == pytest.approx(tuple(ends), abs=1e-12)
    assert (found.mean, found.n) == (pytest.approx(values.mean()), shape[1])
    assert found.std == pytest.approx(values.mean(axis=0).std(ddof=1))
    parts = [(values.mean(axis=a).var(ddof=1) / k, k - 1) for a, k in ((1, shape[0]), (0, shape[1])) if k > 1]
    assert found.p == pytest.approx(p_value(values.mean(), parts), rel=1e-9)
    if shape[0] == 1:
        assert found == estimate_mean(values[0], 500, 3, level)


def test_the_interval_of_two_seeds_that_differ_ends_at_the_larger_one():
    """It cannot reach the half width of the t interval, so it covers `2 atan(9.17) / pi`, 93 %; see `widened`."""
    seeds = np.array([[1.0], [3.0]]) + np.zeros((2, 5))
    e, factor = estimate_over_seeds(seeds), np.sqrt(2) * 12.706 / 1.95996
    assert (e.ci_lo, e.ci_hi) == pytest.approx((2 - factor, 2 + factor), rel=1e-4)
    assert 2 * np.arctan(factor) / np.pi == pytest.approx(0.93, abs=0.005)
    assert e.p == pytest.approx(2 * t.sf(2.0, 1)), "of the t test, whose half width is 12.7"


def test_what_is_not_said_is_two_thousand_draws_of_seed_zero_and_95_per_cent():
    values = np.random.default_rng(32).normal(size=(3, 9))
    assert N_BOOTSTRAP == 2000
    assert estimate_over_seeds(values) == estimate_over_seeds(values, 2000, 0, 0.95)
    assert estimate_mean(values[0]) == estimate_mean(values[0], 2000, 0, 0.95)
    assert group_difference(values[0], values[1]) == group_difference(values[0], values[1], 2000, 0)
    assert np.array_equal(widened(values), widened(values, 0.95))
    assert area_under_roc(values[0], values[1]) == area_under_roc(values[0], values[1], 0.95)
    assert rank_correlation(values[0], values[1]) == rank_correlation(values[0], values[1], 0.95)
    signs = np.sign(np.random.default_rng(33).normal(size=(3, 1, 200)))
    assert surgical_informedness(signs, np.ones_like(signs)) == surgical_informedness(
        signs, np.ones_like(signs), 2.0, 2000, 0
    )


@pytest.mark.parametrize(
    ("n", "low", "high", "sure"),
    [
        *[
            (2, 0.1, 0.2, True),
            (2, -0.2, -0.1, True),
            (2, -0.1, 0.2, False),
            (2, 0.0, 1.0, False),
            (2, -1.0, 0.0, False),
        ],
        *[(1, 0.1, 0.2, False), (1, -0.2, -0.1, False)],
    ],
)
def test_an_interval_excludes_zero_when_it_lies_on_one_side_of_it(n, low, high, sure):
    assert Estimate(mean=0.0, std=1.0, ci_lo=low, ci_hi=high, n=n, p=0.5).excludes_zero is sure


def test_the_columns_of_no_estimate_are_empty():
    e = Estimate(mean=1.5, std=1.0, ci_lo=1.0, ci_hi=2.0, n=9, p=0.1)
    assert columns_of(e, "si", "std", "p") == e.columns("si", "std", "p") == {"si": 1.5, "si_std": 1.0, "si_p": 0.1}
    assert columns_of(None, "si", "std", "p") == {"si": None, "si_std": None, "si_p": None}


def test_a_number_of_a_table_is_its_own_times_the_scale_with_a_sign():
    row = {"x": "0.5", "y": None, "z": 2, "z_ci_lo": 1, "z_ci_hi": "", "ci_lo": -1, "ci_hi": 1}
    assert estimate_text(row, "x", ends="") == "+0.50 [-1.00, +1.00]"
    assert estimate_text(row, "x", scale=100, ends="") == "+50.00 [-100.00, +100.00]"
    assert estimate_text(row, "y") == ""
    assert estimate_text(row, "z") == "+2.00 [+1.00]"
    with pytest.raises(KeyError):
        estimate_text(row, "x")  # the interval of the number that the table is about is not that of any other


def test_where_nothing_varies_there_is_no_t():
    """Beyond rounding, which is a trillionth of the mean and never less than a trillionth."""
    for mean, error, p in (
        (0.0, 0.0, 1.0),
        (1e-12, 1e-12, 1.0),
        (2e-12, 1e-12, 0.0),
        (1e6, 1e-6, 0.0),
        (1.0, 1e-13, 0.0),
    ):
        assert p_value(mean, [(error**2, 5)]) == p
        assert p_value(-mean, [(error**2 / 2, 5), (error**2 / 2, 3)]) == p
    assert p_value(1e6, [(4e-12, 5)]) == pytest.approx(2 * t.sf(1e6 / 2e-6, 5), rel=1e-6), "2e-6 of a million is more"
    assert p_value(3e-12, [(4e-24, 5)]) == pytest.approx(2 * t.sf(1.5, 5))
    assert p_value(0.5, [(0.25, 2), (0.25, 2)]) == pytest.approx(2 * t.sf(0.5 / np.sqrt(0.5), 2)), "one freedom, one t"
    assert p_value(1e5, [(0.2, 400), (0.1, 500)]) == 0
    beyond = p_value(100.0, [(1.0, 5000), (0.5, 4)])
    assert beyond == pytest.approx(2 * t.sf(100 / np.sqrt(1.5), 4)), "where one of them is 0 in floats, the larger one"


def test_a_difference_of_two_groups_in_numbers():
    """Each group has draws of its own, of values that were moved apart."""
    a, b = np.random.default_rng(34).normal(1, 1, 6), np.random.default_rng(35).normal(0, 2, 4)
    found = group_difference(a, b, 700, 5)
    draws = [redrawn(apart(x[None], 0.95), 700, seed) for x, seed in ((a, 10), (b, 11))]
    assert (found.ci_lo, found.ci_hi) == pytest.approx(tuple(np.quantile(draws[0] - draws[1], [0.025, 0.975])))
    parts = [(a.var(ddof=1) / 6, 5), (b.var(ddof=1) / 4, 3)]
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.std == pytest.approx(np.sqrt(parts[0][0] + parts[1][0]))
    assert found.p == pytest.approx(p_value(a.mean() - b.mean(), parts))
    assert found.n == 10
    assert group_difference(a[:2], b[:2]).n == 4
    for few in ((a[:1], b), (a, b[:1])):
        with pytest.raises(ws.WsError, match=f"at least 2 .* {len(few[0])} and {len(few[1])}"):
            group_difference(*few)


def test_values_that_are_no_sample_are_named():
    with pytest.raises(ws.WsError, match=r"1 dimensions.*\(2, 3\)"):
        estimate_mean(np.zeros((2, 3)))
    with pytest.raises(ws.WsError, match=r"2 dimensions.*\(0, 3\)"):
        estimate_over_seeds(np.zeros((0, 3)))
    with pytest.raises(ws.WsError, match="NaN or infinity"):
        estimate_mean(np.array([1.0, np.inf]))
    assert estimate_mean([1, 2, 4]).mean == pytest.approx(7 / 3), "whole numbers in a list are a sample"
    half = estimate_mean(np.array([1.0, 1.001, 1.002, 1.5], dtype=np.float16))
    assert half.mean == pytest.approx(np.array([1.0, 1.001, 1.002, 1.5]).astype(np.float16).astype(float).mean(), 1e-9)


# ---- ranks ----------------------------------------------------------------------------------------------------------


def variance_of_area(area: float, m: int, n: int) -> float:
    """Hanley and McNeil's: of one pair, of two that share the one, and of two that share the other."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    return (area * (1 - area) + (m - 1) * (q1 - area**2) + (n - 1) * (q2 - area**2)) / (m * n)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (5, 9), (30, 12)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_an_area_and_its_interval_are_newcombes(m, n, level):
    """At the ends the area that was found is z standard errors away, each taken at its own end."""
    rng = np.random.default_rng([m, n])
    positive, negative = rng.normal(0.4, 1, m).round(1), rng.normal(0, 1, n).round(1)
    found = area_under_roc(positive, negative, level)
    pairs = positive[:, None] - negative
    assert found.mean == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())
    assert found.std == pytest.approx(np.sqrt(variance_of_area(found.mean, m, n)))
    assert found.p == pytest.approx(mannwhitneyu(positive, negative).pvalue)
    assert found.n == m + n
    z = norm.ppf((1 + level) / 2)
    for end, side in ((found.ci_lo, 1), (found.ci_hi, -1)):
        assert side * (found.mean - end) == pytest.approx(z * np.sqrt(variance_of_area(end, m, n)), abs=1e-6)


def test_groups_that_do_not_overlap_have_an_interval_up_to_one():
    apart_ = area_under_roc(np.arange(10.0) + 10, np.arange(10.0))
    assert (apart_.mean, apart_.std, apart_.ci_hi) == (1.0, 0.0, 1.0)
    assert 1 - apart_.ci_lo == pytest.approx(1.959964 * np.sqrt(variance_of_area(apart_.ci_lo, 10, 10)), abs=1e-6)
    other = area_under_roc(np.arange(10.0), np.arange(10.0) + 10)
    assert (other.mean, other.std, other.ci_lo) == (0.0, 0.0, 0.0)
    assert other.ci_hi == pytest.approx(1.959964 * np.sqrt(variance_of_area(other.ci_hi, 10, 10)), abs=1e-6)
    for few in ((np.zeros(1), np.zeros(3)), (np.zeros(3), np.zeros(1))):
        with pytest.raises(ws.WsError, match=f"at least 2 .* {len(few[0])} and {len(few[1])}"):
            area_under_roc(*few)


@pytest.mark.parametrize("n", [4, 25])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_a_rank_correlation_and_its_interval_are_bonett_and_wrights(n, level):
    rng = np.random.default_rng(3)
    a = rng.normal(size=n)
    b = a + rng.normal(size=n)
    found, r = rank_correlation(a, b, level), spearmanr(a, b).statistic
    assert abs(r) < 1
    assert found.mean == pytest.approx(r)
    assert found.std == pytest.approx(np.sqrt((1 + r**2 / 2) / (n - 3)))
    half = norm.ppf((1 + level) / 2) * found.std
    assert (found.ci_lo, found.ci_hi) == pytest.approx((np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)))
    assert (found.n, found.p) == (n, pytest.approx(spearmanr(a, b).pvalue))


def test_ranks_that_agree_wholly_or_do_not_vary():
    x = np.arange(30.0)
    same, swapped = rank_correlation(x, x**3), rank_correlation(x, -x)
    assert (same.mean, same.ci_hi) == (1.0, 1.0)
    assert 0.99 < same.ci_lo < 1
    assert (swapped.mean, swapped.ci_lo) == (-1.0, -1.0)
    assert -1 < swapped.ci_hi < -0.99
    assert rank_correlation(x[:3], x[:3]) is None
    for flat in (np.ones(30), np.where(x < 15, 0.0, 1e-12)):
        assert rank_correlation(x, flat) is None
        assert rank_correlation(flat, x) is None
    assert rank_correlation(x, x * 1e-3) is not None


# ---- surgical informedness, answer by answer ------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "least"), [(2.0, 1), (0.5, 0), (1.0, 2)])
def test_surgical_informedness_over_seeds_in_numbers(k, least):
    """Seeds that answer differently, masses of which the least counts, four imagined answers in the interval alone."""
    rng, n = np.random.default_rng(36), 130
    scores, mass = rng.normal(0.2, 1, (3, 2, n)), 1 - 0.3 * rng.random((3, 2, n))
    mass[least] -= 0.3
    found = surgical_informedness(scores, mass, k, n_boot=400, seed=2)
    base, plus, minus = scores > 0
    wrong, right = (~base).mean(), base.mean()
    counts = [(~base & plus).mean(), (base & ~plus).mean(), (~base & minus).mean(), (base & ~minus).mean()]
    names = ("wrong", "right", "fixed_plus", "broken_plus", "fixed_minus", "broken_minus")
    assert [getattr(found, name) for name in names] == pytest.approx([n * x for x in (wrong, right, *counts)])
    forward, reverse = counts[0] / wrong - k * counts[1] / right, counts[3] / right - k * counts[2] / wrong
    assert (found.forward, found.reverse) == pytest.approx((forward, reverse))
    assert found.si.mean == pytest.approx(50 * (forward + reverse) * mass[least].mean() ** 2)
    assert found.si.n == n
    linear = linearised(base, plus, minus, mass, k)
    wanted = estimate_over_seeds(linear, 400, 2)
    assert (found.si.ci_lo, found.si.ci_hi, found.si.p) == pytest.approx((wanted.ci_lo, wanted.ci_hi, wanted.p))
    parts = [linear.mean(axis=a).var(ddof=1) / linear.shape[1 - a] for a in (1, 0)]
    assert found.si.std == pytest.approx(np.sqrt(sum(parts)))


def linearised(base, plus, minus, mass, k: float) -> np.ndarray:
    """SI of the answers and of four imagined ones, and how it moves with the weight of each, by finite differences."""
    seeds = len(base)
    more = {"base": [0, 0, 1, 1], "plus": [1, 0, 0, 1], "minus": [0, 1, 1, 0]}
    base, plus, minus = (
        np.concatenate([x, np.tile(np.array(m, bool), (seeds, 1))], axis=1)
        for x, m in zip((base, plus, minus), more.values(), strict=True)
    )
    mass = np.concatenate([mass, np.repeat(mass.mean(axis=2, keepdims=True), 4, axis=2)], axis=2)

    def si(weights: np.ndarray) -> float:
        def share(what, of):
            return (weights * (what & of)).sum() / (weights * of).sum()

        forward = share(plus, ~base) - k * share(~plus, base)
        reverse = share(~minus, base) - k * share(minus, ~base)
        least = min((weights * m).sum() / weights.sum() for m in mass)
        return 50 * (forward + reverse) * least**2

    plain, step = np.ones(base.shape), 1e-5
    moves = np.empty(base.shape)
    for place in np.ndindex(*base.shape):
        up, down = plain.copy(), plain.copy()
        up[place], down[place] = 1 + step, 1 - step
        moves[place] = (si(up) - si(down)) / (2 * step)
    return si(plain) + moves * moves.size


def test_fifty_answers_of_either_kind_are_enough():
    scores = np.ones((3, 1, 100))
    scores[0, 0, :50] = -1
    assert surgical_informedness(scores, np.ones_like(scores)).si is not None
    assert list(is_right(np.array([-1.0, 0.0, 1e-9]))) == [False, False, True]
    for bad in (np.ones((3, 100)), np.full((3, 1, 100), np.nan)):
        with pytest.raises(ws.WsError):
            surgical_informedness(bad, np.ones_like(scores))
        with pytest.raises(ws.WsError):
            surgical_informedness(scores, bad)
