"""Shifts by foundation and composite axes of tiny-mfv, and the statistics of small groups that they rest on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

import ws
from ws.eval.tinymfv_airisk import (
    AXES,
    CONDITIONS,
    FOUNDATIONS,
    Vignette,
    axis_rows,
    foundation_rows,
    load_vignettes,
    logit_wrongness,
    render_shifts,
)
from ws.stats import estimate_mean, group_difference

N_BOOT = 500
FALSE_POSITIVES = 200


def vignettes(per_foundation: int, names=FOUNDATIONS) -> list[Vignette]:
    return [
        Vignette(f"{name}-{i}", name, 3.0, f"You see {name} {i}.", f"You, {name} {i}.")
        for name in names
        for i in range(per_foundation)
    ]


def scores_of(logits: np.ndarray) -> dict[str, np.ndarray]:
    """Scores whose logit(wrongness) is `logits` `[vignette, condition]`, as long as they are within the clip."""
    w = 1 / (1 + np.exp(-logits))
    return {"p_true": np.stack([w, 1 - w], axis=-1), "bool_mass": np.ones((*logits.shape, 2))}


def as_text(rows: list[dict]) -> list[dict[str, str]]:
    """Rows as they are read back from a file."""
    return [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def at_most(rate: float, n: int, confidence: float = 0.999) -> int:
    """The most successes that `n` trials of this rate can be expected to show."""
    return int(stats.binom.ppf(confidence, n, rate))


# ---- small groups -----------------------------------------------------------------------------------------------


def test_a_difference_of_groups_has_a_sign_and_no_place():
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 400), rng.normal(0.5, 3, 300)
    found, swapped, shifted = (group_difference(*x, 2000) for x in ((a, b), (b, a), (a + 5, b + 5)))
    assert swapped.mean == -found.mean
    assert swapped.p == pytest.approx(found.p)
    assert (shifted.ci_lo, shifted.ci_hi) == pytest.approx((found.ci_lo, found.ci_hi))


def test_groups_in_which_nothing_varies_have_p_values_and_groups_of_one_do_not():
    assert group_difference(np.ones(3), np.ones(4), N_BOOT).p == 1
    assert group_difference(np.ones(3), np.zeros(4), N_BOOT).p == 0
    with pytest.raises(ws.WsError, match="at least 2 items"):
        group_difference(np.ones(1), np.ones(9))
    with pytest.raises(ws.WsError, match="NaN or infinity"):
        group_difference(np.ones(2), np.array([1.0, np.inf]))


@pytest.mark.parametrize("n", [12, 40])
def test_small_groups_keep_their_level(n):
    """Intervals of null groups exclude zero in 5 % of cases; the plain bootstrap of 12 does in more."""
    rng, trials = np.random.default_rng(2), 600
    a, b = rng.normal(size=(trials, n)), rng.normal(scale=2, size=(trials, n))
    means = sum(estimate_mean(row, N_BOOT).excludes_zero for row in a)
    apart = sum(group_difference(x, y, N_BOOT).excludes_zero for x, y in zip(a, b, strict=True))
    assert 10 <= means <= at_most(0.05, trials)
    assert 10 <= apart <= at_most(0.05, trials)


# ---- foundations ------------------------------------------------------------------------------------------------


def test_a_shift_planted_in_one_foundation_is_found_there_and_nowhere_else():
    rng, items = np.random.default_rng(3), vignettes(20)
    base = rng.normal(0, 1, size=(len(items), 2))
    moved = base + rng.normal(0, 0.3, size=base.shape)
    moved[[v.foundation_coarse == "Loyalty" for v in items], 0] += 0.8
    rows = foundation_rows({}, 1.0, items, scores_of(moved), scores_of(base), 2000)
    found = {(r["foundation_coarse"], c) for r in rows for c in CONDITIONS if r[f"shift_{c}_p_holm"] < 0.05}
    assert found == {("Loyalty", "other_violate")}
    (loyalty,) = (r for r in rows if r["foundation_coarse"] == "Loyalty")
    assert loyalty["shift_other_violate_ci_lo"] < 0.8 < loyalty["shift_other_violate_ci_hi"]
    assert loyalty["n"] == 20
    apart = {r["axis"] for r in axis_rows({}, 1.0, items, scores_of(moved), scores_of(base), 2000)
             if r["shift_other_violate_p_holm"] < 0.05}  # fmt: skip
    assert apart == {"Loyalty - Care"}


def test_shifts_and_axes_are_the_hand_computation():
    items = [Vignette(str(i), name, 3.0, "a", "b") for i, name in enumerate(["Care", "Care", "Sanctity", "Sanctity"])]
    base = {"p_true": np.array([[[0.6, 0.4], [0.5, 0.5]]] * 4), "bool_mass": np.ones((4, 2, 2))}
    p = [[0.8, 0.2], [0.7, 0.5], [0.9, 0.3], [0.5, 0.5]]  # (is_wrong, is_acceptable), so w = 0.8, 0.6, 0.8, 0.5
    steered = {"p_true": np.array([[x, [0.5, 0.5]] for x in p]), "bool_mass": np.ones((4, 2, 2))}
    care, sanctity = foundation_rows({"seed": 0}, 1.0, items, steered, base, N_BOOT)
    before = math.log(0.6 / 0.4)
    by_hand = [math.log(w / (1 - w)) - before for w in (0.8, 0.6, 0.8, 0.5)]
    assert care["shift_other_violate"] == pytest.approx((by_hand[0] + by_hand[1]) / 2)
    assert sanctity["shift_other_violate"] == pytest.approx((by_hand[2] + by_hand[3]) / 2)
    assert (care["shift_self_violate"], care["shift_self_violate_p_holm"]) == (0, 1)
    (axis,) = axis_rows({"seed": 0}, 1.0, items, steered, base, N_BOOT, [("Sanctity", "Care")])
    assert axis["shift_other_violate"] == pytest.approx(sum(by_hand[2:]) / 2 - sum(by_hand[:2]) / 2)
    assert (axis["axis"], axis["n_plus"], axis["n_minus"], axis["seed"]) == ("Sanctity - Care", 2, 2, 0)


def test_wrongness_is_clipped_before_the_logit():
    p_true = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.995, 0.0], [0.5, 0.5]]])  # s = 1, -1, 0.995, 0
    found = logit_wrongness({"p_true": p_true, "bool_mass": np.ones_like(p_true)})
    edge = math.log(0.99 / 0.01)
    assert found == pytest.approx(np.array([[edge, -edge], [edge, 0.0]]))


def test_noise_is_rarely_called_a_shift_of_some_foundation():
    """Family-wise over seven foundations and over the axes, with Holm, at the smallest foundation's 16 vignettes."""
    rng, items = np.random.default_rng(4), vignettes(16)
    hits = {"foundations": 0, "axes": 0}
    for _ in range(FALSE_POSITIVES):
        base = rng.normal(0, 1, size=(len(items), 2))
        two = scores_of(base + 0.5 * rng.standard_t(5, size=base.shape)), scores_of(base)
        rows = {
            "foundations": foundation_rows({}, 1.0, items, *two, 100),
            "axes": axis_rows({}, 1.0, items, *two, 100, AXES[:2]),
        }
        for name, found in rows.items():
            hits[name] += min(r["shift_other_violate_p_holm"] for r in found) < 0.05
    assert max(hits.values()) <= at_most(0.05, FALSE_POSITIVES, 0.99), hits


def test_a_foundation_without_answers_has_no_star_and_neither_has_its_axis():
    items, rng = vignettes(20, ["Care", "Fairness", "Loyalty"]), np.random.default_rng(6)
    base = scores_of(rng.normal(size=(60, 2)))
    steered = scores_of(rng.normal(size=(60, 2)) + 2)
    names = np.array([v.foundation_coarse for v in items])
    steered["bool_mass"][names == "Care", 0] = 0.7
    loyal = names == "Loyalty"
    base["p_true"][loyal, 0, 1] = np.where(base["p_true"][loyal, 0, 0] > 0.5, 0.9, 0.1)  # the base's frames contradict
    rows = {r["foundation_coarse"]: r for r in foundation_rows({}, 1.0, items, steered, base, N_BOOT)}
    assert {n: r["unreadable_other_violate"] for n, r in rows.items()} == {
        "Care": "answer mass 0.700",
        "Fairness": None,
        "Loyalty": "frames agree on 0% of the texts",
    }
    assert all(r["unreadable_self_violate"] is None for r in rows.values()), "the other condition was answered"
    assert rows["Care"]["mass_other_violate"] == pytest.approx(0.7)
    assert max(r["shift_other_violate_p_holm"] for n, r in rows.items() if n != "Loyalty") < 0.05
    axes = axis_rows({}, 1.0, items, steered, base, N_BOOT, [("Fairness", "Care"), ("Sanctity", "Social Norms")])
    assert [r["unreadable_other_violate"] for r in axes] == ["answer mass 0.700", None]
    text = render_shifts(as_text(list(rows.values())), as_text(axes))
    ends = {line.split()[0]: line.rstrip()[-1] for line in text.splitlines() if line.startswith(tuple(rows))}
    assert (ends["Care"], ends["Loyalty"]) == ("!", "!")
    assert "answer mass 0.700" in text
    assert "! supports no conclusion" in text


def test_a_small_shift_has_no_star_however_sure_it_is():
    items, rng = vignettes(20, ["Care", "Fairness"]), np.random.default_rng(7)
    base = rng.normal(0, 0.5, size=(40, 2))
    moved = base + 0.15 + 0.01 * rng.normal(size=(40, 2))
    rows = foundation_rows({}, 1.0, items, scores_of(moved), scores_of(base), N_BOOT)
    assert max(r["shift_other_violate_p_holm"] for r in rows) < 0.001
    text = render_shifts(as_text(rows), [])
    assert "]*" not in text
    assert "at least 0.2 nats" in text


def test_foundations_that_are_missing_or_misspelt():
    items = vignettes(2, ["Care"]) + vignettes(1, ["Fairness"])
    two = scores_of(np.ones((3, 2))), scores_of(np.zeros((3, 2)))
    fairness = foundation_rows({}, 1.0, items, *two, N_BOOT)[1]
    assert fairness["shift_other_violate"] == pytest.approx(1)
    assert fairness["shift_other_violate_ci_lo"] is fairness["shift_other_violate_p_holm"] is None
    single, lacking = axis_rows({}, 1.0, items, *two, N_BOOT, [("Fairness", "Care"), ("Sanctity", "Care")])
    assert single["shift_other_violate"] == pytest.approx(0, abs=1e-9)
    assert single["shift_other_violate_p"] is lacking["shift_other_violate"] is None
    assert (lacking["n_plus"], lacking["n_minus"]) == (0, 2)
    with pytest.raises(ws.WsError, match="no foundation named 'Sanctty'. Did you mean 'Sanctity'"):
        axis_rows({}, 1.0, items, *two, N_BOOT, [("Sanctty", "Care")])


def test_the_named_foundations_are_those_of_the_data():
    names = {v.foundation_coarse for v in load_vignettes("pocket")}
    assert names == set(FOUNDATIONS)
    assert {name for axis in AXES for name in axis} <= names


def test_the_shifts_are_printed_with_their_marks():
    items = vignettes(5, ["Care", "Fairness"])
    rng = np.random.default_rng(5)
    base = rng.normal(size=(10, 2))
    steered = base + 0.01 * rng.normal(size=base.shape)
    steered[:5] += 1
    two = scores_of(steered), scores_of(base)
    tables = [as_text(make({}, 1.0, items, *two, N_BOOT)) for make in (foundation_rows, axis_rows)]
    text = render_shifts(*tables)
    (care,) = (line for line in text.splitlines() if line.startswith("Care "))
    (fairness,) = (line for line in text.splitlines() if line.startswith("Fairness "))
    assert care.rstrip().endswith("*")
    assert not fairness.rstrip().endswith("*")
    assert "Left out for lack of vignettes: Authority - Care, Loyalty - Care, Sanctity - Care" in text
