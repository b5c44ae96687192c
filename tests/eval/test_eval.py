"""Choice scores and statistics against slow or closed-form references."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from functools import wraps

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap, kstest, t, ttest_1samp, ttest_ind

import ws
from conftest import build_model
from ws.behaviors.tables import draw, draw_fact
from ws.eval.capability import token_nll
from ws.eval.prompts import PARAPHRASE, check_same, notes_on, words_note, words_of
from ws.eval.sycophancy import claim_shift, evaluate_sycophancy, per_claim_rows, summary_row
from ws.lm.choice import by_token, choice_tokens, score_choices, share_prefixes
from ws.lm.divergence import token_kl
from ws.lm.models import encode, render_prompt
from ws.stats import (
    _CHUNK,
    LEAST_ANSWERS,
    Estimate,
    estimate_mean,
    estimate_over_seeds,
    estimate_text,
    group_difference,
    holm,
    p_value,
    resampled_means,
    surgical_informedness,
    widened,
)

PROMPTS = ["Q", "What is the color of the sky?", "A much longer question about nothing at all, twice over.", "Why?"]


def reference(model, tok, prompt, choices):
    """One prompt at a time, all positions, plain sums over the vocabulary."""
    with torch.no_grad():
        p = model(torch.tensor([encode(tok, prompt)])).logits[0, -1].double().softmax(-1)
    texts = [tok.decode([i]) for i in range(len(tok))]
    special = set(tok.all_special_ids)
    return [
        sum(float(p[i]) for i, t in enumerate(texts) if i not in special and t.lstrip(" \n\t").lower() == c.lower())
        for c in choices
    ]


def test_an_estimate_is_printed_in_one_way():
    e = Estimate(mean=-1.1, std=1.0, ci_lo=-1.24, ci_hi=0.975, n=9, p=0.1)
    assert f"{e}" == "-1.10 [-1.24, +0.97]"
    assert f"{e:.1f}" == "-1.1 [-1.2, 1.0]"
    row = e.columns("shift", "ci_lo", "ci_hi") | {"mean": 0.5, "ci_lo": "0.25", "ci_hi": 0.75, "gone": ""}
    assert estimate_text(row, "shift") == f"{e}"
    assert estimate_text(row, "mean", ".0f", 100) == "50 [25, 75]"
    assert estimate_text(row, "gone") == ""
    assert estimate_text({"shift": "2", "shift_ci_lo": "", "shift_ci_hi": None}, "shift") == "+2.00"


def test_choice_tokens_take_case_and_leading_space_but_no_punctuation(tiny):
    _, tok = tiny
    texts = {tok.decode([i]) for i in choice_tokens(tok, "Yes")}
    assert {"Yes", " Yes"} <= texts
    assert all(t.strip().lower() == "yes" and t == t.rstrip() for t in texts)
    with pytest.raises(ws.WsError, match="No single token"):
        choice_tokens(tok, "Yes, of course")


def test_scores_equal_the_plain_computation(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, p, opener="My answer:") for p in PROMPTS]
    scores = score_choices(model, tok, prompts, ("Yes", "No"))
    for i, prompt in enumerate(prompts):
        yes, no = reference(model, tok, prompt, ("Yes", "No"))
        assert scores.logratio[i] == pytest.approx(np.log(yes / no), abs=1e-4)
        assert scores.mass[i] == pytest.approx(yes + no, rel=1e-4)


def test_batch_size_and_row_order_do_not_matter(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in PROMPTS]
    all_at_once = score_choices(model, tok, prompts, ("Yes", "No"))
    for other in (
        score_choices(model, tok, prompts, ("Yes", "No"), batch_size=1),
        score_choices(model, tok, prompts, ("Yes", "No"), batch_size=3),
    ):
        assert np.allclose(other.logp, all_at_once.logp, atol=1e-4)
    back = score_choices(model, tok, prompts[::-1], ("Yes", "No"))
    assert np.allclose(back.logp[::-1], all_at_once.logp, atol=1e-4)


SHARED = [
    *(
        f"A long story about {x} that is told twice. Is it {q}"
        for x in ("a dog", "the doctor")
        for q in ("wrong?", "ok?")
    ),
    "Alone.",
    "A long story about a dog that is told twice.",
    "A long story about a dog that is told twice.",
]


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_a_shared_start_is_run_once_and_changes_nothing(tiny, batch_size, monkeypatch):
    model, tok = tiny
    prompts = [render_prompt(tok, p) for p in SHARED]
    families = share_prefixes([encode(tok, p) for p in prompts])
    assert sorted(i for f in families for i in f.rows) == list(range(len(prompts)))
    assert {f.rows for f in families if 4 in f.rows} == {(4,)}, "a prompt on its own shares nothing"
    assert max(len(f.rows) for f in families) >= 4
    for family in families:
        for suffix, row in zip(family.suffixes, family.rows, strict=True):
            assert suffix
            assert [*family.prefix, *suffix] == encode(tok, prompts[row])
    seen = []
    monkeypatch.setattr(model, "forward", _counting(model.forward, seen))
    scores = score_choices(model, tok, prompts, ("Yes", "No"), batch_size)
    if batch_size is None:
        assert sum(seen) < sum(len(encode(tok, p)) for p in prompts)
    for i, prompt in enumerate(prompts):
        yes, no = reference(model, tok, prompt, ("Yes", "No"))
        assert scores.logratio[i] == pytest.approx(np.log(yes / no), abs=1e-4)


def _counting(forward, seen):
    @wraps(forward)
    def counted(*args, **kwargs):
        seen.append(kwargs["input_ids"].numel() if "input_ids" in kwargs else 0)
        return forward(*args, **kwargs)

    return counted


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_single_ones_in_other_models(architecture, attention):
    """Half of a shared start, unequal rests, in both attention implementations, with biases and without."""
    from ws.lm.choice import _families, _score_batch

    model = build_model(architecture)
    model.set_attn_implementation(attention)
    prompts = [[5, 6, 7, 8, 9, 1], [5, 6, 7, 8, 2, 3, 4], [5, 6, 7, 8], [40, 41, 42], [40, 41, 43], [90]]
    variants = [torch.tensor([1, 2, 3]), torch.tensor([50])]
    families = _families(model, prompts)
    assert max(len(f.rows) for f in families) == 3
    for family in families:
        packed = _score_batch(model, 0, [family], variants)
        for row, found in zip(family.rows, packed, strict=True):
            with torch.no_grad():
                logp = model(torch.tensor([prompts[row]])).logits[0, -1].log_softmax(-1)
            assert torch.allclose(found, torch.stack([logp[v].logsumexp(-1) for v in variants]), atol=1e-5)
    model.config.sliding_window = 4
    assert {len(f.rows) for f in _families(model, prompts)} == {1}, "a window needs a mask of its own"


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9))
def test_families_hold_every_prompt_whole(prompts):
    families = share_prefixes(prompts)
    found = {row: [*f.prefix, *s] for f in families for s, row in zip(f.suffixes, f.rows, strict=True)}
    assert [found[i] for i in range(len(prompts))] == prompts
    assert all(s for f in families for s in f.suffixes)
    pieces = [p for f in families for p in f.pieces(2)]
    assert sorted(i for p in pieces for i in p.rows) == list(range(len(prompts)))


def test_logits_in_bfloat16_are_scored_in_float32(tiny):
    """A log-softmax in bfloat16 would put a log-probability of -9 on a grid of 0.06."""
    model, tok = copy.deepcopy(tiny[0]).to(torch.bfloat16), tiny[1]
    ids = torch.tensor([encode(tok, "Is ice cold? Answer:")])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(ids.shape[1])[None],
            logits_to_keep=torch.tensor([ids.shape[1] - 1]),
        ).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    logp = logits.double().log_softmax(dim=-1)
    wanted = [float(logp[list(choice_tokens(tok, c))].logsumexp(dim=-1)) for c in ("Yes", "No")]
    assert score_choices(model, tok, ["Is ice cold? Answer:"], ("Yes", "No")).logp[0] == pytest.approx(wanted, abs=1e-5)


def test_divergences_and_losses_in_bfloat16_are_taken_in_float32():
    steered, base = (torch.randn(20, 50, generator=torch.Generator().manual_seed(s)).bfloat16() * 4 for s in (1, 2))
    p, q = (t.double().log_softmax(dim=-1) for t in (steered, base))
    assert token_kl(steered, base).numpy() == pytest.approx((p.exp() * (p - q)).sum(dim=-1).numpy(), rel=1e-4)
    targets = torch.arange(20)
    assert token_nll(steered, targets).numpy() == pytest.approx(-p[targets, targets].numpy(), rel=1e-5)


def test_broken_models_and_empty_input_stop(tiny):
    model, tok = tiny
    with pytest.raises(ws.WsError, match="no prompts"):
        score_choices(model, tok, [], ("Yes", "No"))
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * float("nan"))
    try:
        with pytest.raises(ws.WsError, match="NaN"):
            score_choices(model, tok, PROMPTS, ("Yes", "No"))
    finally:
        handle.remove()


def test_sycophancy_rows_have_the_documented_columns(tiny):
    model, tok = tiny
    behavior = ws.load_behavior("honesty", "pocket")
    base = evaluate_sycophancy(model, tok, behavior, "dev")
    key = {"behavior": "honesty", "adapter": "lora", "seed": 0}
    rows, summary = per_claim_rows(key, 1.0, base), summary_row(key, 1.0, base, base)
    assert list(rows[0])[:8] == ["behavior", "adapter", "seed", "alpha", "claim_id", "claim", "logratio", "pmass"]
    assert list(summary)[:13] == [
        "behavior", "adapter", "seed", "alpha", "mean_logratio", "std_logratio", "ci_lo", "ci_hi",
        "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n",
    ]  # fmt: skip
    assert summary["n"] == len(rows) == len(behavior.test.select("dev", False))
    assert claim_shift(base, base).mean == 0
    assert summary["shift_p"] == 1


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


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(5)
    draws = [estimate_mean(rng.normal(size=60), n_boot=300, seed=i) for i in range(300)]
    covered = sum(e.ci_lo <= 0 <= e.ci_hi for e in draws)
    assert 0.90 <= covered / 300 <= 0.985


def test_seeds_widen_the_interval_when_they_disagree():
    rng = np.random.default_rng(6)
    items = rng.normal(size=(1, 200)) * 0.1
    spread = items + np.array([[-1.0], [0.0], [1.0]])
    alike = items + np.zeros((3, 1))
    wide, narrow = estimate_over_seeds(spread), estimate_over_seeds(alike)
    assert wide.ci_hi - wide.ci_lo > 5 * (narrow.ci_hi - narrow.ci_lo)
    one, flat = estimate_over_seeds(items, n_boot=4000), estimate_mean(items[0], n_boot=4000)
    assert (one.ci_lo, one.ci_hi) == pytest.approx((flat.ci_lo, flat.ci_hi), abs=0.003)


def noise(rng, kind: str, n: int) -> np.ndarray:
    """`n` items with mean 0 and standard deviation 1: normal, or as skewed as an exponential distribution."""
    return rng.normal(size=n) if kind == "normal" else rng.exponential(size=n) - 1


def simulated(rng, n_seeds: int, n: int, spread: float, kind: str) -> np.ndarray:
    """Scores with true mean 0; seeds differ by `spread` standard errors of the mean over items."""
    seeds = rng.normal(0, spread / np.sqrt(n), (n_seeds, 1))
    return seeds + noise(rng, kind, n) + rng.normal(0, 0.3, (n_seeds, n))


def covers(n_seeds: int, n: int, spread: float, kind: str, cases: int) -> tuple[int, int]:
    """Of how many cases the interval holds the truth, and in how many p is under 0.05."""
    rng, held, called = np.random.default_rng([n_seeds, n, int(10 * spread)]), 0, 0
    for case in range(cases):
        found = estimate_over_seeds(simulated(rng, n_seeds, n, spread, kind), n_boot=200, seed=case)
        held += found.ci_lo <= 0 <= found.ci_hi
        called += found.p < 0.05
    return held, called


@pytest.mark.parametrize(
    ("n_seeds", "n", "spread"), [(1, 12, 0), (1, 113, 0), (2, 12, 0), (2, 12, 3), (3, 12, 3), (3, 40, 0), (5, 12, 10)]
)
def test_few_items_and_few_seeds_cover_as_often_as_they_say(n_seeds, n, spread):
    """A plain bootstrap over 12 items holds 89 %, one over 3 seeds that differ much 73 %."""
    held, called = covers(n_seeds, n, spread, "normal", 400)
    assert held >= binom.ppf(0.002, 400, 0.945)
    assert called <= binom.ppf(0.998, 400, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize("spread", [0, 1, 3, 10])
@pytest.mark.parametrize("n", [12, 40, 113])
@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5])
def test_every_number_of_seeds_and_items_covers(n_seeds, n, spread, kind):
    """Noise as skewed as an exponential one costs a dozen items a few per cent, which docs/evaluations.md says."""
    held, called = covers(n_seeds, n, spread if n_seeds > 1 else 0, kind, 1000)
    least = 0.9 if kind == "skewed" and n == 12 else 0.93
    assert held >= binom.ppf(0.001, 1000, least)
    assert called <= binom.ppf(0.999, 1000, 1 - least)


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
    assert (e.mean, e.p, e.excludes_zero) == (3.0, 1.0, False)
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


def test_p_values_agree_with_the_t_test_and_are_uniform_under_the_null():
    rng = np.random.default_rng(9)
    values = rng.normal(0.12, 1.0, size=400)
    assert estimate_mean(values, n_boot=100).p == pytest.approx(ttest_1samp(values, 0).pvalue)
    null = [estimate_mean(rng.normal(size=12), n_boot=100, seed=i).p for i in range(300)]
    assert kstest(null, "uniform").pvalue > 0.001
    assert estimate_mean(np.zeros(5)).p == 1
    assert estimate_mean(np.full(9, 2.0)).p == 0


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


@pytest.mark.parametrize("n", [12, 40, 113])
def test_a_table_of_twelve_null_rows_keeps_its_level(n):
    """Some row of 12 is called in 5 % of tables; p-values of a plain bootstrap call one of 12 claims' in 26 %."""
    rng, tables = np.random.default_rng(n), 300
    called = 0
    for _ in range(tables):
        rows = noise(rng, "normal", 12 * n).reshape(12, n)
        called += holm(np.array([estimate_mean(row, n_boot=50).p for row in rows])).min() < 0.05
    assert called <= binom.ppf(0.999, tables, 0.05)


# ---- surgical informedness ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("share", "seeds"), [((0.5, 0.1, 0.1, 0.5), 1), ((0.97, 0.01, 0.01, 0.97), 1), ((0.8, 0.05, 0.1, 0.6), 3)]
)
def test_si_holds_the_truth_from_fifty_wrong_answers_on(share, seeds):
    """Fixed and broken at +alpha, fixed and broken at -alpha; at 4 wrong answers plain intervals hold 33 to 69 %."""
    rng, cases, held = np.random.default_rng(22), 250, 0
    n, wrong = 240, 55
    fixed, broken, unfixed, spoilt = share
    truth = 50 * (fixed - 2 * broken + spoilt - 2 * unfixed)
    base = np.where(np.arange(n) < wrong, -1.0, 1.0)
    for case in range(cases):
        u = rng.random((2, seeds, n))
        plus = np.where(base < 0, u[0] < fixed, u[0] >= broken) * 2.0 - 1
        minus = np.where(base < 0, u[1] < unfixed, u[1] >= spoilt) * 2.0 - 1
        scores = np.stack([np.broadcast_to(base, (seeds, n)), plus, minus])
        found = surgical_informedness(scores, np.ones_like(scores), n_boot=200, seed=case).si
        assert found is not None
        held += found.ci_lo <= truth <= found.ci_hi
    assert held >= binom.ppf(0.001, cases, 0.945)


# ---- two groups -----------------------------------------------------------------------------------------------------


def test_a_difference_of_many_items_is_welchs():
    rng = np.random.default_rng(23)
    a, b = rng.normal(1, 1, 400), rng.normal(0.8, 3, 300)
    found, welch = group_difference(a, b, 20_000), ttest_ind(a, b, equal_var=False)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.n == 700
    assert found.p == pytest.approx(welch.pvalue, abs=0.005)
    assert (found.ci_lo, found.ci_hi) == pytest.approx(tuple(welch.confidence_interval()), abs=0.03)


# ---- draws of items -------------------------------------------------------------------------------------------------


def even_counts(sizes: dict[str, int], limit: int) -> list[int]:
    """How many every group gives when `limit` are dealt one by one, each to the group that has the fewest; sorted."""
    given = dict.fromkeys(sizes, 0)
    for _ in range(min(limit, sum(sizes.values()))):
        least = min((n, name) for name, n in given.items() if n < sizes[name])[1]
        given[least] += 1
    return sorted(given.values())


@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1), st.integers(1, 80))
def test_a_draw_is_even_in_order_and_holds_every_smaller_draw(sizes, limit):
    items = [(name, i) for name, n in sizes.items() for i in range(n)]  # sorted by group, as sets come
    drawn = draw(items, limit, lambda item: item[0])
    assert len(drawn) == min(limit, len(items))
    assert list(drawn) == sorted(set(drawn), key=items.index), "no item twice, in the order of the set"
    counts = Counter(name for name, _ in drawn)
    assert sorted(counts.get(name, 0) for name in sizes) == even_counts(sizes, limit)
    assert set(drawn) <= set(draw(items, limit + 1, lambda item: item[0]))
    assert draw(items, limit, lambda item: item[0]) == drawn


def test_a_draw_is_no_prefix_and_the_same_everywhere():
    assert draw(range(20), None) == draw(range(20), 20) == draw(range(20), 99) == tuple(range(20))
    assert draw(range(20), 5) == (4, 6, 10, 14, 17)
    places = [draw(range(1000), n) for n in (10, 100)]
    assert all(abs(np.mean(p) - 499.5) < 4 * 1000 / np.sqrt(12 * len(p)) for p in places), "from all over the set"
    assert draw_fact(range(5), range(20)) == "5 of 20, seed 0"
    assert draw_fact(range(20), range(20)) == "all"


# ---- which words, which tokens --------------------------------------------------------------------------------------


def test_words_of_a_file_are_named_and_hashed(tmp_path):
    file = tmp_path / "plain words.toml"
    file.write_text('is_wrong = "Wrong? {text}"\nis_acceptable = "Fine? {text}"\n')
    asked = ("is_wrong", "is_acceptable")
    assert words_of(None, PARAPHRASE, asked) == "paraphrase"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert words_of(file, PARAPHRASE, asked) == f"file:plain words@{digest[:8]}"
    file.write_text('name = "mine | 2"\nis_wrong = "Wrong? {text}"\n')
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    part = words_of(file, PARAPHRASE, asked)
    assert part == f"file:mine - 2@{digest[:8]} + paraphrase", "one of the two questions is still ours"
    assert "not the published text" in words_note(part)
    for name in ('""', "3", "true"):
        file.write_text(f'name = {name}\nis_wrong = "{{text}}"\n')
        with pytest.raises(ws.WsError, match="name must be a text"):
            words_of(file, PARAPHRASE, asked)


def test_what_tables_say_of_their_words_and_items():
    assert notes_on({}) == notes_on({"words": "own", "drawn": "all"}) == notes_on({"words": None, "drawn": ""}) == []
    (note,) = notes_on({"words": "paraphrase", "drawn": "all"})
    assert note.startswith("Words: paraphrase,")
    assert "sign of a small effect" in note
    drawn, words = notes_on({"words": "file:x@12345678", "drawn": "5 of 20, seed 0"}, "wrongness")
    assert drawn.startswith("Items of wrongness: a draw of 5 of 20, seed 0")
    assert words.startswith("Words of wrongness: file:x@12345678")
    same = {"eval_hash": "a", "words": "paraphrase"}
    check_same({})
    check_same({"one": same, "two": same | {"words": "file:x@12345678"}})  # the same texts by another name
    with pytest.raises(ws.WsError, match=r"two was asked other items or words than one .*file:x@12345678, items b"):
        check_same({"one": same, "two": {"eval_hash": "b", "words": "file:x@12345678"}})


def test_the_tokens_that_carry_a_choice_are_shown(tiny):
    """`true` and `1` are one choice; which of the two has the probability is seen token by token."""
    model, tok = tiny
    prompt, choices = render_prompt(tok, "Is it?", opener="It is "), (("true", "1"), ("false", "0"))
    scores = score_choices(model, tok, [prompt], choices)
    with torch.no_grad():
        p = model(torch.tensor([encode(tok, prompt)])).logits[0, -1].double().softmax(-1)
    ids = [i for choice in choices for word in choice for i in choice_tokens(tok, word)]
    assert scores.variants[0] == pytest.approx(p[ids].numpy(), rel=1e-4)
    assert scores.variants[0].sum() == pytest.approx(scores.mass[0], rel=1e-5)
    known = sorted(ids, key=lambda i: -float(p[i]))[:4]
    wanted = ", ".join(f"{tok.decode([i])!r} {float(p[i]):.3f}" for i in known)
    assert by_token(tok, choices, {"variants": scores.variants[0]}) == f" (by token: {wanted})"
    assert by_token(tok, choices, {"logratio": np.zeros(1)}) == "", "scores that were kept before"
