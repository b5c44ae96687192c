"""The profile: planted shifts are named with their size, a Yes vector is exposed, and vectors that do nothing are not
said to move anything."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm, t, ttest_ind

import ws
from support.statements import folder, rows
from ws.analysis.profile import main, profile
from ws.analysis.profile_tables import (
    Shot,
    balanced,
    examples,
    headlines,
    is_agreement,
    moderated,
    plot,
    profile_rows,
    random_scale,
    render,
    selectivity,
    spread,
    standardised,
)
from ws.delta import LinearDelta
from ws.eval.boards import Board, Part, open_board
from ws.eval.context import EvalContext
from ws.eval.evaluation import HeadlineScore
from ws.eval.readable import Readability
from ws.files.plots import save_svg
from ws.lm.models import fingerprint
from ws.options.measure import ProfileOptions
from ws.options.shared import EvalOptions
from ws.stats import widened

N_TRAITS, N_ITEMS, N_BOOT = 15, 20, 200
YES = np.tile([1.0, 0.0], N_ITEMS // 2)


@dataclass(frozen=True)
class Stub:
    """An evaluation of which nothing is asked."""

    brief: dict


def board(targets: tuple[str, ...] = ("t0",), floor: float = 0.2) -> Board:
    names = [f"t{i}" for i in range(N_TRAITS)]
    labels = tuple(name for name in names for _ in range(N_ITEMS))
    yes = tuple(bool(y) for _ in names for y in YES)
    texts = tuple(f"statement {i}" for i in range(len(labels)))
    part = Part(
        Stub({"eval": "statements"}), HeadlineScore("statements", "statements", floor=floor), labels, texts, yes
    )
    return Board("made", (part,), {name: "first" if i < 3 else "second" for i, name in enumerate(names)}, targets)


def board_of(sizes: dict[str, tuple[int, int]]) -> Board:
    """Of every trait so many statements that Yes matches, then so many that No does."""
    labels = tuple(name for name, (yes, no) in sizes.items() for _ in range(yes + no))
    sides = tuple(side for yes, no in sizes.values() for side in (True,) * yes + (False,) * no)
    score = HeadlineScore("statements", "statements", floor=0.2)
    part = Part(Stub({"eval": "statements"}), score, labels, labels, sides)
    return Board("made", (part,), dict.fromkeys(sizes, ""), tuple(sizes)[:1])


def answered(mass: float, **other: float) -> dict[str, Readability]:
    """Every trait with one answer mass, some with another."""
    return {f"t{i}": Readability(other.get(f"t{i}", mass)) for i in range(N_TRAITS)}


def shot(rng, moved=None, agreement=0.0, n_seeds=1, draws=5, noise=0.05, drift=0.1, nulls=None, name="+1u") -> Shot:
    """Items that move by `moved` of their trait and by `agreement` towards Yes, with noise of their own; a random
    vector moves every trait by a drift of its own."""
    n = N_TRAITS * N_ITEMS

    def drawn() -> np.ndarray:
        return np.repeat(rng.normal(scale=drift, size=N_TRAITS), N_ITEMS) + rng.normal(scale=noise, size=(n_seeds, n))

    shift = drawn() + agreement * np.tile(np.where(YES == 1, 1.0, -1.0), N_TRAITS)
    for trait, by in (moved or {}).items():
        shift[:, int(trait[1:]) * N_ITEMS : (int(trait[1:]) + 1) * N_ITEMS] += by
    made = {null: drawn() + by for null, by in (nulls or {}).items()}
    random = [drawn() for _ in range(draws)]
    seeds = tuple(range(n_seeds))
    return Shot("lora", seeds, "weight", name, 1.0, shift, [answered(0.99) for _ in seeds], made, random)


def base_of(rng) -> np.ndarray:
    """Scores of the base: a spread of one within the halves, and a liking for Yes of two nats."""
    return rng.normal(size=N_TRAITS * N_ITEMS) + np.tile(np.where(YES == 1, 2.0, -2.0), N_TRAITS)


def read(shots, of=None, base=None, mass=0.99, seed=0):
    of, base = of or board(), base_of(np.random.default_rng(seed)) if base is None else base
    return profile_rows({"behavior": "made"}, of, base, answered(mass), shots, N_BOOT)


# ---- one trait ------------------------------------------------------------------------------------------------------


def test_a_liking_for_yes_is_in_neither_the_shift_nor_its_spread():
    rng = np.random.default_rng(0)
    values, liking = rng.normal(size=(2, N_ITEMS)), np.where(YES == 1, 3.0, -3.0)
    plain, moved = balanced(values, YES, is_alone=False), balanced(values + liking, YES, is_alone=False)
    assert np.allclose(plain, moved)
    halves = [values[:, side == YES] for side in (1, 0)]
    assert np.allclose(moved.mean(axis=1), (halves[0].mean(axis=1) + halves[1].mean(axis=1)) / 2)
    # The variance of the mean of two halves: a quarter of the sum of theirs, from the spread within them.
    within = sum(((h - h.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) for h in halves) / (N_ITEMS - 2)
    assert np.allclose(moved.var(axis=1, ddof=1), within)


def test_uneven_halves_weigh_alike():
    yes, values = np.array([1, 1, 1, 1, 1, 1, 0, 0]), np.array([[1.0] * 6 + [-1.0] * 2])
    assert balanced(values, yes).mean() == pytest.approx(0.0)
    assert values.mean() == pytest.approx(0.5)
    unmatched = np.full(8, np.nan)
    assert np.array_equal(balanced(values, unmatched), values)


@pytest.mark.parametrize("sizes", [(10, 10), (4, 16), (2, 38), (1, 19)])
def test_a_small_half_is_as_uncertain_as_it_is(sizes):
    yes = np.repeat([1.0, 0.0], sizes)
    values = np.random.default_rng(13).normal(size=(1, sum(sizes))) + np.where(yes == 1, 3.0, -2.5)
    (moved,) = balanced(values, yes, is_alone=False)
    plain = ttest_ind(values[0, yes == 1], -values[0, yes == 0])  # is the sum of both means zero?
    assert moved.mean() / np.sqrt(moved.var(ddof=1) / len(moved)) == pytest.approx(plain.statistic)
    assert spread(values[0], yes) == pytest.approx(spread(values[0] + 5 * yes, yes)), "and the sizes are not its spread"
    squares = sum(((h - h.mean()) ** 2).sum() for h in (values[0, yes == 1], values[0, yes == 0]))
    assert spread(values[0], yes) == pytest.approx(np.sqrt(squares / (sum(sizes) - 2)))


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (6, 2), (20, 20)])
def test_two_means_are_fitted_and_two_degrees_of_freedom_lost(sizes):
    """The p-value is that of the t test of both means, and the ends of the interval lie as far apart as it says."""
    n, yes = sum(sizes), np.repeat([1.0, 0.0], sizes)
    values = np.random.default_rng(16).normal(size=n) + np.where(yes == 1, 3.0, -2.5)
    of = board_of({"t": sizes})
    one = Shot("lora", (0,), "weight", "+1u", 1.0, values[None], [{"t": Readability(0.99)}])
    (row,), _ = profile_rows({}, of, np.random.default_rng(0).normal(size=n), {"t": Readability(0.99)}, [one], 2)
    assert row["p_items"] == pytest.approx(ttest_ind(values[yes == 1], -values[yes == 0]).pvalue)
    error = np.sqrt(sum(((h - h.mean()) ** 2).sum() for h in (values[yes == 1], values[yes == 0])) / (n - 2))
    error *= np.sqrt(sum(1 / size for size in sizes)) / 2
    (moved,) = widened(balanced(values[None], yes))
    assert norm.ppf(0.975) * moved.std() / np.sqrt(n) == pytest.approx(t.ppf(0.975, n - 2) * error)
    alone = balanced(values[None], np.full(n, np.nan))
    assert np.array_equal(alone, values[None]), "without halves one mean is fitted, as ever"


def test_four_statements_that_nothing_moves_are_as_rarely_significant_as_they_say():
    """2,000 traits with a liking for Yes and no shift; with one degree of freedom too many 8.6 and 2.8 % would be."""
    rng, yes, n = np.random.default_rng(17), np.tile([1.0, 0.0], 2), 2000
    of = board_of(dict.fromkeys((f"t{i}" for i in range(n)), (2, 2)))
    fine = dict.fromkeys(of.traits, Readability(0.99))
    shift = rng.normal(size=(1, 4 * n)) + np.tile(np.where(np.sort(yes)[::-1] == 1, 1.0, -1.0), n)
    table, _ = profile_rows(
        {}, of, rng.normal(size=4 * n), fine, [Shot("lora", (0,), "weight", "+1u", 1.0, shift, [fine])], 2
    )
    for level in (0.05, 0.01):
        found = sum(r["p_items"] < level for r in table)
        assert binom.ppf(0.001, n, level) <= found <= binom.ppf(0.999, n, level)


def test_the_spread_is_that_within_the_halves():
    base = np.where(YES == 1, 5.0, -5.0) + np.tile([0.0, 0.0, 1.0, 1.0], 5)
    assert spread(base, YES) == pytest.approx(np.sqrt(5 / 18), rel=1e-6)
    assert np.isnan(spread(np.where(YES == 1, 5.0, -5.0), YES))


def test_random_vectors_give_the_scale_and_few_of_them_say_little():
    rng = np.random.default_rng(1)
    one, base = shot(rng, draws=8, drift=0.3, noise=0.0), base_of(rng)
    z = [balanced(r[:, i], YES).mean() / spread(base[i], YES) for r in one.random for i in board().items_of.values()]
    scale = random_scale(one, board(), base)
    assert scale.overall == pytest.approx(np.sqrt(np.mean(np.square(z))))
    assert random_scale(replace(one, random=()), board(), base) is None
    assert scale.p("t3", 0.0) == pytest.approx(1.0)
    assert scale.p("t3", 1.2) < scale.p("t3", 1.0)
    assert scale.p("no trait", 1.0) is None


def test_scales_are_the_traits_own_as_far_as_the_draws_can_tell():
    rng, true = np.random.default_rng(2), np.repeat([0.1, 0.4, 1.6], 40)
    alike, freedom = moderated(rng.normal(size=(5, 120)))
    raw = np.sqrt((rng.normal(size=(5, 120)) ** 2).mean(axis=0))
    assert alike.std() < 0.6 * raw.std(), "drawn towards one another where the traits have one scale"
    assert freedom == 15.0
    found, freedom = moderated(true * rng.normal(size=(5, 120)))
    assert 5 < freedom < 10
    assert np.corrcoef(np.log(found), np.log(true))[0, 1] > 0.9
    many, freedom = moderated(true * rng.normal(size=(500, 120)))
    assert many == pytest.approx(true, rel=0.2)
    assert freedom > 500
    one_draw, freedom = moderated(rng.normal(size=(1, 13)))
    assert np.isfinite(one_draw).all()
    assert freedom <= 11


# ---- what is said of a vector ---------------------------------------------------------------------------------------


def test_two_planted_traits_are_named_and_no_other():
    rng = np.random.default_rng(2)
    table, (summary,) = read([shot(rng, {"t0": 1.5, "t7": -1.2})])
    moved = {r["trait"]: r for r in table if r["moved"]}
    assert set(moved) == {"t0", "t7"}
    assert [r["trait"] for r in table[:2]] == ["t0", "t7"], "by size"
    assert moved["t0"]["shift_ci_lo"] < 1.5 < moved["t0"]["shift_ci_hi"] or abs(moved["t0"]["shift"] - 1.5) < 0.3
    assert (moved["t0"]["role"], moved["t7"]["role"]) == ("target", "")
    assert {r["trait"] for r in table if r["role"] == "neighbour"} == {"t1", "t2"}
    assert (summary["n_moved"], summary["target_moved"], summary["largest"]) == (1, True, "t7")
    assert summary["selectivity"] > 3
    assert summary["selectivity_ci_lo"] <= summary["selectivity"] <= summary["selectivity_ci_hi"]
    assert not is_agreement(summary)


def test_a_yes_vector_moves_no_trait_and_is_exposed():
    table, (summary,) = read([shot(np.random.default_rng(3), agreement=2.0, drift=0.02)])
    assert not any(r["moved"] for r in table)
    assert summary["agreement"] == pytest.approx(2.0, abs=0.05)
    assert is_agreement(summary)
    assert any("The answer Yes itself moves by +2.0" in line for line in headlines(summary))
    assert all(r["shift_yes"] > 1 > -1 > r["shift_no"] for r in table)


@pytest.mark.parametrize("sizes", [(36, 4), (4, 36), (40, 0), (20, 20)])
def test_a_shift_of_a_trait_is_no_agreement_whatever_its_halves(sizes):
    """Every other trait has even halves and moves by a liking for Yes alone; one moves, on both of its sides alike."""
    rng, of = np.random.default_rng(18), board_of({"a": sizes, "b": (20, 20), "c": (20, 20)})
    sign = np.where(of.yes == 1, 1.0, -1.0)
    shift = (4.0 * (np.arange(120) < 40) + 0.5 * sign + rng.normal(scale=0.1, size=120))[None]
    fine = dict.fromkeys("abc", Readability(0.99))
    fine |= {} if all(sizes) else {"a": Readability(0.99, flag="40 of 40 statements are matched by Yes")}
    base = rng.normal(size=120)
    _, (row,) = profile_rows({}, of, base, fine, [Shot("lora", (0,), "weight", "+1u", 1.0, shift, [fine])], N_BOOT)
    assert row["agreement"] == pytest.approx(0.5, abs=0.05)
    assert row["agreement_ci_lo"] < 0.5 < row["agreement_ci_hi"]
    assert is_agreement(row) is not all(sizes), "0.5 nats are further than the traits where the one cannot be read"
    if sizes == (20, 20):
        assert row["agreement"] == pytest.approx((shift[0, of.yes == 1].mean() - shift[0, of.yes == 0].mean()) / 2)
    unread = dict.fromkeys("abc", Readability(0.5))
    _, (row,) = profile_rows({}, of, base, unread, [Shot("lora", (0,), "weight", "+1u", 1.0, shift, [unread])], 2)
    assert row["agreement"] is None


def test_agreement_of_unequal_halves_is_as_uncertain_as_they_are():
    """Of halves of 18 and 2 the small ones decide; nothing but noise moves, and 95 % of intervals hold zero."""
    rng, of, holds = np.random.default_rng(19), board_of({"a": (18, 2), "b": (2, 18)}), 0
    fine = dict.fromkeys("ab", Readability(0.99))
    for _ in range(200):
        one = Shot("lora", (0,), "weight", "+1u", 1.0, rng.normal(size=(1, 40)), [fine])
        _, (row,) = profile_rows({}, of, rng.normal(size=40), fine, [one], N_BOOT)
        holds += row["agreement_ci_lo"] <= 0 <= row["agreement_ci_hi"]
    assert binom.ppf(0.001, 200, 0.95) <= holds


@pytest.mark.parametrize("draws", [3, 5, 20])
@pytest.mark.parametrize("drift", ["one for all", "their own"])
def test_vectors_that_are_one_more_random_draw_move_nothing(draws, drift):
    """200 boards, no floor: some trait is said to have moved on at most 5 % of them, also where random vectors move
    some traits many times as far as others."""
    rng, alarms, flat = np.random.default_rng(4), 0, board(floor=0.0)
    own = np.exp(np.random.default_rng(5).normal(scale=1.0, size=N_TRAITS))
    for i in range(200):
        table, _ = read([shot(rng, draws=draws, drift=0.1 * (own if drift == "their own" else 1.0))], flat, seed=i)
        alarms += any(r["moved"] for r in table)
    assert alarms <= binom.ppf(0.999, 200, 0.05)


def test_a_sure_shift_that_random_vectors_have_too_is_not_one():
    rng = np.random.default_rng(5)
    table, _ = read([shot(rng, {"t4": 0.6}, noise=0.01, drift=0.5)])
    (row,) = (r for r in table if r["trait"] == "t4")
    assert row["p_items"] < 1e-6
    assert row["moved"] is False


def test_seeds_must_agree_in_sign_and_their_spread_is_in_the_interval_alone():
    rng = np.random.default_rng(12)
    one = shot(rng, n_seeds=3, draws=5)
    sizes = {"t4": (0.8, 1.6, 2.4), "t5": (-1.0, 2.5, 2.5)}
    for trait, by in sizes.items():
        items = slice(int(trait[1:]) * N_ITEMS, (int(trait[1:]) + 1) * N_ITEMS)
        one.shift[:, items] += np.array(by)[:, None]
    table, _ = read([one])
    known = {r["trait"]: r for r in table}
    assert (known["t4"]["moved"], known["t5"]["moved"]) == (True, False)
    assert known["t4"]["shift_ci_lo"] < 0.2, "three seeds that differ say little of a fourth"


def test_a_trained_null_that_does_the_same_takes_the_star_away():
    rng = np.random.default_rng(6)
    alone, beside = (read([shot(rng, {"t4": 1.5}, nulls=nulls)])[0] for nulls in ({}, {"shuffled": 1.6}))
    moved = [next(r for r in table if r["trait"] == "t4") for table in (alone, beside)]
    assert [r["moved"] for r in moved] == [True, False]
    assert [r["beyond_trained"] for r in moved] == [None, False]
    assert moved[1]["z_shuffled"] == pytest.approx(1.6, abs=0.6)


def test_without_random_vectors_and_without_answers_nothing_counts_as_moved():
    rng = np.random.default_rng(7)
    table, (summary,) = read([shot(rng, {"t4": 3.0}, draws=0)])
    assert all(r["moved"] is None and r["p_random"] is None for r in table)
    assert any("no trait counts as moved" in line for line in headlines(summary))
    table, (summary,) = read([shot(rng, {"t4": 3.0})], mass=0.6)
    assert not any(r["moved"] for r in table)
    assert (summary["n_unreadable"], summary["mass"]) == (N_TRAITS, pytest.approx(0.6))
    assert "supports no conclusion" in render(table, [summary], {})
    assert summary["selectivity"] is None, "nothing can be read"


def test_one_seed_that_does_not_answer_is_enough_to_take_the_star_away():
    """Three seeds of masses whose mean is over 0.9, in one trait; the worst of them counts."""
    one = shot(np.random.default_rng(7), {"t4": 3.0, "t5": 3.0}, n_seeds=3)
    broken = replace(one, readable=[answered(0.98), answered(0.98), answered(0.98, t4=0.8)])
    table, (summary,) = read([broken])
    known = {r["trait"]: r for r in table}
    assert (known["t4"]["unreadable"], known["t4"]["mass"]) == ("answer mass 0.800", 0.8)
    assert (known["t4"]["moved"], known["t5"]["moved"], summary["n_unreadable"]) == (None, True, 1)


def test_a_trained_null_that_does_not_answer_is_none():
    """In that trait alone; where it answers nothing anywhere, no sentence names it."""
    one = shot(np.random.default_rng(6), {"t4": 1.5, "t5": 1.5}, nulls={"shuffled": 2.5})
    partly = replace(one, null_readable={"shuffled": [answered(0.99, t4=0.5)]})
    table, (summary,) = read([partly])
    known = {r["trait"]: r for r in table}
    assert [known[t]["beyond_trained"] for t in ("t4", "t5")] == [None, False]
    assert [known[t]["z_shuffled"] is None for t in ("t4", "t5")] == [True, False]
    assert "the shuffled null" in " ".join(headlines(summary))
    _, (summary,) = read([replace(one, null_readable={"shuffled": [answered(0.5)]})])
    assert "the shuffled null" not in " ".join(headlines(summary))


def test_a_sign_at_which_a_trait_is_not_answered_is_left_out():
    base = base_of(np.random.default_rng(14))
    by_sign = {0: base, 1: base + 1.0, -1: base - 1.0}
    readable = {0: answered(0.99, t3=0.5), 1: answered(0.99), -1: answered(0.99, t4=0.5)}
    found = standardised(board(), by_sign, readable)
    assert "t3" not in found, "of the base"
    assert [set(found[t]) for t in ("t4", "t5")] == [{0, 1}, {-1, 0, 1}]
    assert found["t5"][1].mean() == pytest.approx(-found["t5"][-1].mean())


def test_selectivity_is_one_for_what_moves_everything_alike_and_its_interval_holds_it():
    rng, holds = np.random.default_rng(8), 0
    for _ in range(100):
        z = {f"t{i}": 1.0 + rng.normal(scale=1.0, size=(1, 40)) for i in range(15)}
        ratio = selectivity(z, ["t0"], [f"t{i}" for i in range(1, 15)], 400)
        holds += ratio.ci_lo <= 1.0 <= ratio.ci_hi
    assert holds >= binom.ppf(0.001, 100, 0.95)
    assert selectivity(z, [], ["t1"], N_BOOT) is None


def test_selectivity_does_not_pair_the_items_of_traits():
    """Of traits with as many items each the same item was drawn, and their noise did not average out."""
    rng, holds, n = np.random.default_rng(18), 0, 200
    for _ in range(n):
        names = [f"t{i}" for i in range(33)]
        z = {t: (2.0 if i < 3 else 1.0) + rng.normal(scale=2.0, size=(1, 8)) for i, t in enumerate(names)}
        noise = 4.0 / 8
        ratio = selectivity(z, names[:3], names[3:], 400)
        holds += ratio.ci_lo <= np.sqrt((4 + noise) / (1 + noise)) <= ratio.ci_hi
    assert holds >= binom.ppf(0.001, n, 0.95)
    turned = {t: np.roll(values, i, axis=1) for i, (t, values) in enumerate(z.items())}
    widths = [(e := selectivity(of, names[:3], names[3:], 4000)).ci_hi - e.ci_lo for of in (z, turned)]
    assert widths[0] == pytest.approx(widths[1], rel=0.1), "the order of a trait's items says nothing"


def test_seeds_that_disagree_widen_the_interval_of_selectivity():
    rng = np.random.default_rng(9)
    others = {f"t{i}": 0.5 + rng.normal(scale=0.2, size=(3, 40)) for i in range(1, 12)}
    steady, split = (
        others | {"t0": 2.0 + by + rng.normal(scale=0.2, size=(3, 40))}
        for by in (np.zeros((3, 1)), np.array([[-1.5], [0.0], [1.5]]))
    )
    widths = [(e := selectivity(z, ["t0"], list(others), 1000)).ci_hi - e.ci_lo for z in (steady, split)]
    assert widths[1] > 3 * widths[0]


def test_pictures_and_examples(tmp_path):
    rng = np.random.default_rng(10)
    shots = [shot(rng, {"t0": by}, name=name) for name, by in (("-1u", -1.0), ("+1u", 1.0))]
    table, summary = read(shots)
    texts = examples(board(), shots)
    moved = shots[1].shift[0, :N_ITEMS]
    assert texts["t0 ('lora', 'weight', '+1u')"].startswith(f"“statement {moved.argmax()}”")
    assert "t0 (target)" in render(table, summary, texts)
    picture = save_svg(plot(table, "lora", "weight"), tmp_path / "p.svg").read_text()
    assert "t14" in picture


# ---- boards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(pocket, tmp_path):
    model, tok = pocket
    return EvalContext.of_base(EvalOptions(behavior="honesty", out=tmp_path), model, tok)


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


def opened(context, **given) -> Board:
    return open_board(context, ProfileOptions(**given))


def test_the_bundled_board_has_traits_that_the_pocket_model_answers(context, pocket):
    known = opened(context)
    assert known.name == "pocket"
    assert len(known.traits) == 14, "and the behaviour's own claims, since none of them is its target"
    assert known.targets == ("honesty",)
    statements = known.parts[0]
    scores = statements.evaluation.ask(*pocket)
    assert min(known.mass for known in statements.readable(scores).values()) > 0.99
    assert (statements.values(scores) > 0).mean() > 0.98
    for items in list(known.items_of.values())[:-1]:
        assert known.yes[items].mean() == pytest.approx(0.5)


def test_targets_are_named_by_the_command_or_the_behaviour(context):
    known = opened(context, traits=("common-knowledge",))
    assert (known.targets, known.role("common-knowledge"), len(known.traits)) == (("common-knowledge",), "target", 13)
    with pytest.raises(ws.WsError, match="common-knowlege.*Did you mean 'common-knowledge'"):
        opened(context, traits=("common-knowlege",))
    with pytest.raises(ws.WsError, match="antropic.*Did you mean 'anthropic'"):
        opened(context, board="antropic")


def test_a_behaviours_own_questions_are_its_target_where_no_trait_is(context, pocket):
    known = opened(replace(context, options=replace(context.options, behavior="tone")))
    assert known.targets == ("tone",)
    own = known.parts[1]
    values = own.values(own.evaluation.ask(*pocket))
    assert len(values) == len(own.traits) == len(own.texts) == len(set(own.texts))
    assert known.groups["tone"] == "the behaviour itself"
    assert own.readable(own.evaluation.ask(*pocket)) == {"tone": Readability(None)}, "given answers have no mass"


def test_a_trait_that_is_called_as_the_behaviour_is_its_target(context, tmp_path):
    """The behaviour's own questions were joined with its statements, which are read in another unit."""
    place = folder(tmp_path / "mine", tone=rows("tone"), rain=rows("rain"))
    known = opened(replace(context, options=replace(context.options, behavior="tone")), board=str(place))
    assert (known.targets, len(known.parts), known.traits) == (("tone",), 1, ["rain", "tone"])
    assert opened(context, board=str(place), traits=("rain",)).targets == ("rain",)


def test_the_moral_board_is_read_at_the_revision_that_is_asked_for(context):
    with pytest.raises(ws.WsError, match="`revision` is of a data set on the hub, and pocket is none"):
        opened(context, board="moral", revision="main")


def test_the_moral_board_is_one_of_foundations(context):
    known = opened(context, board="moral")
    assert {"Care", "Fairness"} <= set(known.traits)
    assert len(known.texts) == len(known.parts[0].traits) + len(known.parts[1].traits)


def test_a_foundation_is_read_by_its_own_masses_and_frames(context):
    part = opened(context, board="moral").parts[0]
    of = np.array(part.traits)
    sure = np.broadcast_to([0.9, 0.1], (len(of), 2, 2))  # wrong and not acceptable, from both sides
    scores = {"p_true": sure.copy(), "bool_mass": np.full((len(of), 2, 2), 0.99)}
    scores["bool_mass"][of == "Care", 0] = 0.5
    scores["p_true"][of == "Fairness", 0] = 0.9  # wrong and acceptable
    scores["bool_mass"][of == "Liberty", 1] = 0.5  # of acts of its own, which the board does not look at
    problems = {trait: known.problem for trait, known in part.readable(scores).items() if known.problem}
    assert problems == {"Care": "answer mass 0.500", "Fairness": "frames agree on 0% of the texts"}


def test_a_trait_that_one_answer_matches_everywhere_cannot_be_told_from_that_answer(context, tmp_path):
    """Of unequal halves both means weigh alike; of one there is nothing to take a liking for Yes out with."""
    sides = rows("rain")
    uneven, one_sided = [*sides[:5], sides[6]], sides[1::2]
    place = folder(tmp_path / "mine", tea=rows("tea"), rain=uneven, snow=one_sided)
    part = opened(context, board=str(place), traits=("tea",)).parts[0]
    scores = {"logratio": np.zeros(len(part.traits)), "pmass": np.full(len(part.traits), 0.99)}
    problems = {trait: known.problem for trait, known in part.readable(scores).items() if known.problem}
    assert set(problems) == {"snow"}
    assert "4 of 4 statements are matched by Yes" in problems["snow"]


def test_a_board_of_ones_own_has_the_groups_of_its_file(context, tmp_path):
    place = folder(tmp_path / "mine", tea=rows("tea"), rain=rows("rain"), snow=rows("snow"))
    (place / "groups.toml").write_text('weather = ["rain", "snow"]\n')
    known = opened(context, board=str(place), traits=("rain",), n_items=6)
    assert (known.name, known.traits) == ("mine", ["rain", "snow", "tea"])
    assert [known.role(t) for t in known.traits] == ["target", "neighbour", ""]
    assert len(known.items_of["tea"]) == 6
    whole = sum(len((place / f"{trait}.jsonl").read_text().splitlines()) for trait in known.traits)
    assert {b["drawn"] for b in known.briefs.values()} == {f"18 of {whole}, seed 0"}
    every = opened(context, board=str(place), traits=("rain",), n_items=whole)
    assert {b["drawn"] for b in every.briefs.values()} == {"all"}
    (place / "groups.toml").write_text('weather = ["rain", "hail"]\n')
    with pytest.raises(ws.WsError, match="no file of the trait 'hail'"):
        opened(context, board=str(place))
    (place / "groups.toml").write_text('weather = "rain"\n')
    with pytest.raises(ws.WsError, match=r"groups.toml must hold a list"):
        opened(context, board=str(place))
    (place / "groups.toml").write_text('weather = ["rain"]\nwater = ["rain"]\n')
    with pytest.raises(ws.WsError, match="'rain' into two groups"):
        opened(context, board=str(place))


# ---- the command ----------------------------------------------------------------------------------------------------


def weak_vector(model) -> ws.SteeringVector:
    """A random low-rank change of two modules."""
    generator, deltas = torch.Generator().manual_seed(0), {}
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        out, into = model.get_submodule(name).weight.shape
        u, v = (0.1 * torch.randn(*shape, generator=generator) for shape in ((out, 2), (2, into)))
        deltas[name] = LinearDelta(out, into, u=u, v=v)
    return ws.SteeringVector(deltas, "pocket", fingerprint(model))


@pytest.fixture
def options(context, pocket, tmp_path) -> ProfileOptions:
    vector = weak_vector(pocket[0])
    for name in ("lora", "lora-shuffled"):
        vector.save(tmp_path / "honesty" / name / "vector")
    return ProfileOptions(out=tmp_path, alphas=(-1.0, 2.0), n_items=4, n_draws=2, device="cpu", n_bootstrap=100)


def test_the_command_writes_its_tables_and_asks_nothing_twice(options, tmp_path, capsys, monkeypatch):
    main(options)
    text = capsys.readouterr().out
    assert "weight, lora at -1 (alpha -1), pocket" in text
    assert "Selectivity" in text
    there = tmp_path / "honesty"
    table = list(csv.DictReader((there / "profile.csv").open()))
    assert {(r["strength"], r["alpha"]) for r in table} == {("-1", "-1.0"), ("+2", "2.0")}
    assert len(table) == 2 * 14
    assert all(float(r["z_shuffled"]) == pytest.approx(float(r["z"]), abs=1e-4) for r in table), "the same vector"
    assert all(r["moved"] in ("False", "") for r in table), "no further than its null"
    assert {r["n_draws"] for r in table} == {"2"}
    assert (there / "profile_pocket_lora_weight.svg").is_file()
    # Everything is on record; another board is added, and the first stays.
    monkeypatch.setattr("ws.eval.statements.evaluate_statements", None)
    before = (there / "profile.csv").read_bytes()
    main(options)
    assert (there / "profile.csv").read_bytes() == before
    mine = folder(tmp_path / "mine", tea=rows("tea"), rain=rows("rain"))
    monkeypatch.undo()
    main(replace(options, board=str(mine), traits=("tea",), n_draws=0))
    both = list(csv.DictReader((there / "profile.csv").open()))
    assert {r["board"] for r in both} == {"pocket", "mine"}
    assert [r for r in both if r["board"] == "pocket"] == [
        {**r} | {c: "" for c in both[0] if c not in r} for r in table
    ]


def test_a_board_whose_items_the_base_scores_alike_has_tables_and_no_picture(options, tmp_path, capsys):
    """Two statements a trait leave no degree of freedom, so nothing has a z; it once ended in a traceback."""
    mine = folder(tmp_path / "mine", tea=rows("tea")[:2], rain=rows("rain")[:2])
    main(replace(options, board=str(mine), traits=("tea",), alphas=(1.0,)))
    text = capsys.readouterr().out
    assert "the base scores all items alike" in text
    assert "No random vectors" not in text, "they were asked for"
    table = list(csv.DictReader((tmp_path / "honesty" / "profile.csv").open()))
    assert {(r["z"], r["moved"]) for r in table} == {("", "")}
    assert not list((tmp_path / "honesty").glob("*.svg"))


def test_random_vectors_are_read_at_the_largest_strength(options):
    known = profile(replace(options, n_draws=1))
    names = sorted(p.name for p in (options.out / "honesty" / "lora" / "scores").iterdir())
    draws = {n.rsplit("-", 1)[1] for n in names if n.startswith("statements")}
    assert draws == {"-1.0.json", "1.0.json", "2.0.json"} or draws == {"1.0.json", "2.0.json"}
    assert [len(s.random) for s in known.shots] == [1, 1]
    assert known.shots[0].random[0] is known.shots[1].random[0] or np.array_equal(*(s.random[0] for s in known.shots))


def test_what_makes_no_sense_is_said_before_anything_is_loaded(options):
    for given, words in (
        ({"alphas": (0.0,)}, "strength other than 0"),
        ({"n_items": 2}, "n_items"),
        ({"n_draws": -1}, "n_draws|--n-draws"),
        ({"adapters": ("lroa",)}, "Did you mean 'lora'"),
        ({"adapters": ("lora", "oft")}, "There is no vector in .*oft"),
        ({"interventions": ("prompts",)}, "Did you mean 'prompt'"),
    ):
        with pytest.raises(ws.WsError, match=words):
            profile(replace(options, **given))


def test_a_prompt_has_no_dial_and_no_nulls(options):
    known = profile(replace(options, interventions=("weight", "prompt"), alphas=(1.0,)))
    assert [(s.intervention, s.strength, len(s.random)) for s in known.shots] == [
        ("weight", "+1", 2),
        ("prompt", "+1", 0),
    ]
    table, summary = profile_rows({}, known.board, known.base, known.base_readable, known.shots, 100)
    assert json.dumps(summary[1]["selectivity"]) != "null"
    assert all(r["moved"] is None for r in table if r["intervention"] == "prompt")
