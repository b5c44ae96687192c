"""The comparison: planted effects are found with their size, nulls are not, and a vector of Yes is called one."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from importlib import import_module

import numpy as np
import pytest
from scipy.stats import binom

import ws
from support.comparisons import KEY, N_BOOT, cell, claims, draws_of, nulls_of
from support.statements import folder
from support.statements import rows as rows_of
from ws.analysis.compare import _Bench, compare, main, plot
from ws.analysis.compare_tables import Cell, Group, comparison_rows, group_rows, reality, render
from ws.analysis.side_by_side import OpenedRun
from ws.behaviors import behavior_file
from ws.behaviors.tables import draw
from ws.data import PAIRS_FILE, Pair, pair_lines
from ws.eval.context import EvalContext
from ws.eval.readable import Readability
from ws.files.plots import save_svg
from ws.files.runs import Run, data_folder, read_csv, sha256_json, typed, write_csv, write_text
from ws.options.make import TrainConfig
from ws.options.measure import CompareOptions
from ws.options.shared import EvalOptions


def test_a_planted_effect_is_found_with_its_size_and_called_real():
    rng = np.random.default_rng(0)
    groups = Group.of([cell(rng, seed=s, nulls=nulls_of(rng), random=draws_of(rng)) for s in range(3)])
    rows = {(r["score"], r["part"]): r for r in group_rows(KEY, groups, -1, N_BOOT)}
    span = rows["false_claims", "span"]
    assert span["shift_ci_lo"] < -4 < span["shift_ci_hi"]
    assert span["shift"] == pytest.approx(rows["false_claims", "+1u"]["shift"] - rows["false_claims", "-1u"]["shift"])
    assert span["real"] is True
    assert span["p_random"] == pytest.approx(1 / 21)
    assert span["verdict"] == "specific"
    assert (span["alpha"], rows["false_claims", "-1u"]["alpha"]) == (None, -1.5)
    assert rows["nll", "+1u"]["shift"] == pytest.approx(0.3)
    assert rows["nll", "+1u"]["p_holm"] is None, "a cost is no hypothesis"
    effects = [r for r in rows.values() if r["p_holm"] is not None]
    assert len(effects) == 9
    assert all(r["p_holm"] >= r["p"] for r in effects)


def test_rows_say_what_was_asked_and_other_words_do_not_mix():
    rng = np.random.default_rng(5)
    asked = {"wrongness": {"eval_hash": "12e3", "words": "paraphrase", "drawn": "40 of 131, seed 0"}}
    cells = [cell(rng, adapter=a, asked=asked) for a in ("lora", "oft")]
    rows = group_rows(KEY, Group.of(cells), -1, N_BOOT)
    assert {(r["eval_hash"], r["words"], r["drawn"]) for r in rows if r["score"] == "wrongness"} == {
        ("12e3", "paraphrase", "40 of 131, seed 0")
    }
    text = render(rows, [])
    assert "Words of wrongness: paraphrase, which is this project's" in text
    assert "Items of wrongness: a draw of 40 of 131, seed 0" in text
    other = {"wrongness": {"eval_hash": "b", "words": "file:theirs@12345678"}}
    with pytest.raises(ws.WsError, match=r"weight of oft seed 0 .*file:theirs@12345678.*paraphrase"):
        group_rows(KEY, Group.of([cells[0], replace(cells[1], asked=other)]), -1, N_BOOT)


def test_selectivity_stands_beside_every_span():
    """Targets whose span is three standard deviations, eleven others whose span is one."""
    rng = np.random.default_rng(11)
    sizes = {"t0": 3.0} | {f"t{i}": 1.0 for i in range(1, 12)}

    def board(seed: int) -> dict:
        noise = np.random.default_rng(seed)
        return {
            t: {s: s * by / 2 + (noise.normal(scale=0.2, size=40) if s else np.zeros(40)) for s in (-1, 0, 1)}
            for t, by in sizes.items()
        }

    cells = [cell(rng, seed=s, board=board(s), targets=("t0",)) for s in range(3)]
    cells.append(cell(rng, name="prompt", adapter="prompt"))
    table = group_rows(KEY, Group.of(cells), -1, N_BOOT)
    spans = {r["intervention"]: r for r in table if r["part"] == "span" and r["score"] == "false_claims"}
    assert spans["weight"]["selectivity"] == pytest.approx(3.0, rel=0.1)
    assert spans["weight"]["selectivity_ci_lo"] < 3.0 < spans["weight"]["selectivity_ci_hi"]
    assert spans["prompt"]["selectivity"] is None, "it was not asked"
    text = render(table, [])
    assert "1 is moving everything alike" in text
    assert "selectivity" not in render(group_rows(KEY, Group.of(cells[3:]), -1, N_BOOT), [])


def test_three_nulls_are_needed_and_each_can_refuse():
    rng = np.random.default_rng(1)
    good = cell(rng, nulls=nulls_of(rng), random=draws_of(rng))
    assert reality(Group((good,)), "false_claims", "span", N_BOOT).is_real is True
    loud = replace(good, random=draws_of(rng, sd=10.0))
    assert reality(Group((loud,)), "false_claims", "span", N_BOOT).is_real is False
    strong = nulls_of(rng) | {"same-side": {"false_claims": claims(rng, 5.0)}}  # opposite in sign, larger in size
    assert reality(Group((replace(good, nulls=strong),)), "false_claims", "span", N_BOOT).is_real is False
    one, still = ({"false_claims": {s: np.array([by * s]) for s in (-1, 0, 1)}} for by in (-2.0, 0.0))
    of_one = replace(good, scores=one, nulls={"shuffled": still, "same-side": still})
    assert reality(Group((of_one,)), "false_claims", "span", N_BOOT).is_real is False, "one item says nothing"
    for missing in (replace(good, nulls={}), replace(good, random={}), replace(good, nulls={"shuffled": {}})):
        assert reality(Group((missing,)), "false_claims", "span", N_BOOT).is_real is None
    assert reality(Group((good,)), "false_claims", "+1u", N_BOOT).p_random == pytest.approx(1 / 21)


def test_too_few_random_draws_say_nothing_against_a_vector():
    """With n draws p is 1 / (n + 1) at best: 18 cannot tell, 19 can, and one that goes as far tells at any number."""
    rng = np.random.default_rng(12)
    good = cell(rng, nulls=nulls_of(rng))
    found = {
        n: reality(Group((replace(good, random=draws_of(rng, n=n)),)), "false_claims", "span", N_BOOT)
        for n in (2, 18, 19)
    }
    assert {n: (r.is_real, r.n_draws) for n, r in found.items()} == {2: (None, 2), 18: (None, 18), 19: (True, 19)}
    loud = draws_of(rng, n=5)
    loud["false_claims"][1][3] = 20.0
    group = Group((replace(good, random=loud),))
    assert reality(group, "false_claims", "span", N_BOOT).is_real is False
    few = Group((replace(good, random=draws_of(rng, n=5)),))
    rows = group_rows(KEY, [few], -1, N_BOOT)
    (span,) = (r for r in rows if (r["score"], r["part"]) == ("false_claims", "span"))
    assert (span["real"], span["n_draws"]) == (None, 5)
    assert "`real` is empty for lora" in render(rows, [])
    assert "19 random draws or more" in render(rows, [])


def test_a_null_vector_is_not_significant_and_never_called_real():
    """200 vectors that do nothing, each like its own nulls: at most 5 % have an interval off zero, and none is real."""
    rng = np.random.default_rng(2)
    significant = real = beaten = 0
    for _ in range(200):
        null = cell(rng, false=0.0, true=0.0, random={}, nulls=nulls_of(rng))
        sd = float(np.sqrt(2 / 60))
        random = {"false_claims": {s: rng.normal(scale=sd / np.sqrt(2), size=20) for s in (-1, 1)}}
        group = Group((replace(null, random=random),))
        (span,) = (
            r for r in group_rows(KEY, [group], -1, N_BOOT) if (r["score"], r["part"]) == ("false_claims", "span")
        )
        significant += span["p"] <= 0.05
        beaten += span["p_random"] <= 0.05
        real += bool(span["real"])
    bound = binom.ppf(0.999, 200, 0.05)
    assert significant <= bound, "false positives of the interval"
    assert beaten <= bound, "false positives against random vectors"
    assert real <= binom.ppf(0.999, 200, 0.05**2)


def answered(mass: float = 0.99, agreement: float | None = None, score: str = "false_claims", null: str = ""):
    """How a cell was answered, with one score below the rest at +1u, in the vector's own runs or in a null's."""
    names = ("false_claims", "true_claims", "wrongness")
    fine = {
        name: {sign: Readability(0.99, 0.9 if name == "wrongness" else None) for sign in (-1, 0, 1)} for name in names
    }
    low = fine | {score: fine[score] | {1: Readability(mass, agreement)}}
    nulls = {name: low if name == null else fine for name in ("shuffled", "same-side")}
    return {"readable": fine if null else low, "null_readable": nulls}


def test_a_span_without_answers_is_not_real_and_wins_nothing():
    rng = np.random.default_rng(7)
    plain = {"nulls": nulls_of(rng), "random": draws_of(rng)}
    weak = cell(rng, name="activation", adapter="activation", false=-1.0, wrongness=0.1, **answered())
    for found, score, words in (
        (answered(0.73), "false_claims", "answer mass 0.730"),
        (answered(0.99, 0.0, "wrongness"), "wrongness", "frames agree on 0% of the texts"),
    ):
        groups = Group.of([cell(rng, **plain, **found), weak])
        rows, pairs = group_rows(KEY, groups, -1, N_BOOT), comparison_rows(KEY, groups, -1, N_BOOT)
        by_key = {(r["intervention"], r["score"], r["part"]): r for r in rows}
        low = by_key["weight", score, "span"]
        assert (low["unreadable"], low["real"]) == (words, None)
        assert low["p_holm"] < 0.05
        assert by_key["weight", score, "-1u"]["unreadable"] is None, "that side was answered"
        assert low["verdict"] == ("undecided" if score == "false_claims" else None)
        assert {p["score"]: p["winner"] is None for p in pairs} == {
            s: s == score for s in ("false_claims", "wrongness")
        }
        text = render(rows, pairs)
        line = next(x for x in text.splitlines() if x.startswith("weight"))
        assert line.count("]!") == 1
        assert words in text
        assert "! supports no conclusion" in text
        assert "5 of 6 spans differ from zero" in text
    fine = group_rows(KEY, Group.of([cell(rng, **plain, **answered())]), -1, N_BOOT)
    assert {r["mass"] for r in fine if r["score"] == "false_claims"} == {0.99}
    assert not any(r["unreadable"] for r in fine)
    assert "]!" not in render(fine, [])


def test_a_null_without_answers_is_no_null():
    rng = np.random.default_rng(8)
    good = cell(rng, nulls=nulls_of(rng), random=draws_of(rng), **answered())
    assert reality(Group((good,)), "false_claims", "span", N_BOOT).is_real is True
    broken = replace(good, **answered(0.5, null="same-side"))
    found = reality(Group((broken,)), "false_claims", "span", N_BOOT)
    assert (found.is_real, set(found.margins)) == (None, {"shuffled"})


def test_effects_under_the_floor_are_none_however_sure():
    rng = np.random.default_rng(9)
    small = cell(rng, false=-0.15, true=0.1, wrongness=0.03)
    quiet = {
        n: {s: small.scores[n][0] + s * e / 2 for s in (-1, 0, 1)}
        for n, e in (("false_claims", -0.15), ("wrongness", 0.03))
    }
    rival = {n: dict.fromkeys((-1, 0, 1), small.scores[n][0]) for n in quiet}
    groups = Group.of(
        [replace(small, scores=quiet), replace(small, intervention="prompt", adapter="prompt", scores=rival)]
    )
    rows, pairs = group_rows(KEY, groups, -1, N_BOOT), comparison_rows(KEY, groups, -1, N_BOOT)
    assert {r["p_holm"] < 0.05 for r in rows if r["intervention"] == "weight" and r["part"] == "span"} == {True}
    assert {p["winner"] for p in pairs} == {"neither"}
    text = render(rows, pairs)
    assert (
        "0 of 4 spans differ from zero after Holm's correction over all of them, by 0.2 nats (0.05 of wrongness)"
        in text
    )


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_table_of_twelve_null_rows_keeps_its_level(seeds):
    """Twelve vectors of 12 claims that do nothing, with one seed and with three: some p in 5 % of tables."""
    rng, tables = np.random.default_rng(10), 60
    called = dict.fromkeys(("-1u", "+1u", "span", "winner"), 0)
    for _ in range(tables):
        cells = []
        for i in range(12):
            shared = rng.normal(size=(3, 12))
            for seed in range(seeds):
                moved = shared + 0.1 * rng.normal(size=(3, 12)) + rng.normal(0, 0.2 * (seeds > 1), (3, 1))
                scores = {"false_claims": dict(zip((-1, 0, 1), moved, strict=True))}
                plain = {"alphas": {-1: -1.0, 1: 1.0}, "divergence": {-1: 1.0, 1: 1.0}, "matched": True}
                cells.append(Cell(("weight", "positive-only")[i % 2], f"a{i // 2}", seed, scores=scores, **plain))
        groups = Group.of(cells)
        rows, pairs = group_rows(KEY, groups, -1, 20), comparison_rows(KEY, groups, -1, 20)
        for part in ("-1u", "+1u", "span"):
            called[part] += min(r["p_holm"] for r in rows if r["part"] == part) < 0.05
        called["winner"] += any(p["winner"] != "neither" for p in pairs)
    assert max(called.values()) <= binom.ppf(0.999, tables, 0.05), called


def test_a_vector_of_yes_is_called_agreement():
    rng = np.random.default_rng(3)
    rows = group_rows(KEY, Group.of([cell(rng, false=-4.0, true=-4.0)]), -1, N_BOOT)
    (span,) = (r for r in rows if (r["score"], r["part"]) == ("false_claims", "span"))
    assert span["verdict"] == "agreement"
    assert "this is agreement" in span["verdict_line"]
    assert "agreement" in render(rows, [])


def test_the_stronger_intervention_wins_and_ties_are_ties(tmp_path):
    rng = np.random.default_rng(4)
    ours = cell(rng)
    twin = replace(ours, intervention="positive-only")
    weak = cell(rng, name="activation", adapter="activation", false=-1.0, wrongness=0.5)
    told = cell(rng, name="prompt", adapter="prompt", false=-12.0, wrongness=1.5, matched=False)
    other = cell(rng, name="positive-only", adapter="oft", false=-30.0)
    groups = Group.of([ours, twin, weak, told, other])
    pairs = comparison_rows(KEY, groups, -1, N_BOOT)
    found = {(p["baseline"], p["score"]): p for p in pairs}
    assert len(found) == len(pairs) == 6, "oft's own one-sided vector is no baseline of lora's"
    assert {k: p["winner"] for k, p in found.items() if k[1] == "false_claims"} == {
        ("positive-only", "false_claims"): "neither",
        ("activation", "false_claims"): "weight",
        ("prompt", "false_claims"): "prompt",
    }
    assert found["activation", "false_claims"]["weight"] > 3, "more of the behaviour counts upwards"
    assert found["prompt", "false_claims"]["difference_ci_hi"] < -6
    rows = group_rows(KEY, groups, -1, N_BOOT)
    text = render(rows, pairs)
    files = [write_csv(tmp_path / f"{i}.csv", table) for i, table in enumerate((rows, pairs))]
    assert render(*(typed(read_csv(file)) for file in files)) == text, "what is on disk is what was printed"
    assert "prompt *" in text
    assert "has no dial" in text


def test_who_moves_a_score_further_does_not_depend_on_the_way():
    """Where the behaviour predicts no sign the larger span wins; what is of the behaviour itself is meant to rise."""
    rng = np.random.default_rng(13)
    spans = {"mc2": (-0.3, -0.02), "mc1": (-0.02, 0.3), "wrongness": (0.5, -0.02), "preference": (0.1, -0.4)}
    groups = []
    for i, name in enumerate(("weight", "prompt")):
        scores = {score: claims(rng, effects[i], noise=0.01) for score, effects in spans.items()}
        groups += Group.of([replace(cell(rng, name=name, adapter=("lora", name)[i]), scores=scores)])
    found = {p["score"]: p for p in comparison_rows(KEY, groups, -1, N_BOOT)}
    assert {score: p["winner"] for score, p in found.items()} == {
        "mc2": "weight",
        "mc1": "prompt",
        "wrongness": "weight",
        "preference": "weight",
    }
    for score, difference in (("mc2", 0.28), ("mc1", -0.28), ("wrongness", 0.48), ("preference", 0.5)):
        p = found[score]
        assert p["difference"] == pytest.approx(difference, abs=0.01)
        assert p["weight"] - p["other"] == pytest.approx(p["difference"])


def test_a_side_that_did_not_converge_leaves_a_gap_and_no_number():
    rng = np.random.default_rng(5)
    whole = cell(rng)
    scores = {name: {s: v for s, v in by_sign.items() if s >= 0} for name, by_sign in whole.scores.items()}
    half = replace(whole, intervention="activation", adapter="activation", alphas={1: 2.0}, scores=scores)
    half = replace(half, divergence={1: 1.0})
    groups = Group.of([whole, half])
    rows = [r for r in group_rows(KEY, groups, -1, N_BOOT) if r["intervention"] == "activation"]
    assert {r["part"] for r in rows} == {"+1u"}
    assert all(r["divergence_minus"] is None for r in rows)
    assert comparison_rows(KEY, groups, -1, N_BOOT) == []
    assert "activation" in render(group_rows(KEY, groups, -1, N_BOOT), [])
    with pytest.raises(ws.WsError, match="could be measured"):
        group_rows(KEY, [Group((replace(half, scores={}),))], -1, N_BOOT)


def test_the_picture_is_the_same_every_time(tmp_path):
    rng = np.random.default_rng(6)
    rows = group_rows(KEY, Group.of([cell(rng), cell(rng, name="prompt", adapter="prompt")]), -1, N_BOOT)
    first, second = (save_svg(plot(rows), tmp_path / f"{i}.svg").read_bytes() for i in range(2))
    assert first == second
    assert b"weight, lora" in first
    assert not list(tmp_path.glob(".*"))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    """A run on the pocket model with nothing but a small random vector."""
    import torch

    from ws.lm.models import fingerprint

    model, _ = ws.load_model("pocket", device="cpu")
    rng, deltas = torch.Generator().manual_seed(3), {}
    for name, layer in model.named_modules():
        if name.endswith(("1.mlp.up_proj", "2.self_attn.o_proj")):
            d_out, d_in = layer.weight.shape
            u, v = torch.randn(d_out, 2, generator=rng), torch.randn(2, d_in, generator=rng)
            deltas[name] = ws.LinearDelta(d_out, d_in, u=0.1 * u, v=v)
    run = Run(tmp_path / "honesty" / "lora")
    stage = run.stage("vector", {"format": 1})
    ws.SteeringVector(deltas, "pocket", fingerprint(model)).save(run.folder / "vector")
    stage.done([f for f in (run.folder / "vector").iterdir() if f.is_file()])
    return tmp_path


def quick_options(out) -> CompareOptions:
    return CompareOptions(
        out=out,
        interventions=("weight", "prompt"),
        evals=("sycophancy",),
        n_prompts=6,
        n_draws=2,
        capability=False,
        limit=4,
        n_bootstrap=100,
        device="cpu",
    )


def test_a_behaviour_without_claims_is_compared_by_preference(monkeypatch):
    asked = list[tuple[str, ...]]()
    monkeypatch.setattr("ws.analysis.compare.opened_runs", lambda options: asked.append(options.evals) or [])
    compare(CompareOptions(behavior="tone"))
    compare(CompareOptions())
    assert asked == [("preference", "tinymfv_airisk"), ("sycophancy", "tinymfv_airisk")]


def test_the_command_measures_tabulates_and_resumes(out, capsys, monkeypatch):
    options = quick_options(out)
    main(options)
    first = capsys.readouterr().out
    rows = read_csv(out / "honesty" / "compare.csv")
    assert list(rows[0])[:4] == ["behavior", "adapter", "seed", "alpha"]
    assert {r["intervention"] for r in rows} == {"weight", "prompt"}
    assert {r["matched"] for r in rows if r["intervention"] == "prompt"} == {"False"}
    weight = [r for r in rows if r["intervention"] == "weight" and r["score"] == "false_claims"]
    assert all(float(r["p_random"]) >= 1 / 3 and r["real"] == "" for r in weight)
    assert "`real` is empty for lora" in first
    assert "no evidence for that, because vectors trained on anything beat random ones" in first
    assert all(0.9 < float(r["mass"]) <= 1 for r in weight)
    assert all(r["mass"] == "" for r in rows if r["score"] == "nll")
    drawn = {r["drawn"] for r in rows}
    assert {r["words"] for r in rows} == {"own"}
    assert [f"Items of {s}: a draw of {d} (--limit)." in first for s in ("false claims",) for d in drawn] == [True]
    pairs = read_csv(out / "honesty" / "compare_pairs.csv")
    assert [p["baseline"] for p in pairs] == ["prompt"]
    assert (out / "honesty" / "compare.svg").is_file()

    # The span on disk is the one that steering by hand gives, at the strengths on disk.
    behavior = ws.load_behavior("honesty", "pocket")
    model, tok = ws.load_model("pocket", device="cpu")
    vector = ws.SteeringVector.load(out / "honesty" / "lora" / "vector")
    alpha = {r["part"]: float(r["alpha"]) for r in weight if r["part"] != "span"}
    means = {}
    for part, strength in alpha.items():
        with ws.steer(model, vector, strength):
            every = ws.evaluate_sycophancy(model, tok, behavior).logratio
            means[part] = every[list(draw(range(len(every)), 4))].mean()
    (span,) = (float(r["shift"]) for r in weight if r["part"] == "span")
    assert span == pytest.approx(means["+1u"] - means["-1u"], abs=1e-4)

    monkeypatch.setattr("ws.eval.sycophancy.score_claims", None)
    monkeypatch.setattr(import_module("ws.intervene.calibrate"), "calibrate", None)
    main(options)
    assert capsys.readouterr().out == first

    # On a board the same rows say how selective everything is; here of two traits that the model knows nothing of.
    monkeypatch.undo()
    mine = folder(out / "mine", tea=rows_of("tea"), rain=rows_of("rain"))
    main(replace(options, board=str(mine)))
    assert "selectivity" in capsys.readouterr().out
    spans = [r for r in read_csv(out / "honesty" / "compare.csv") if r["part"] == "span"]
    assert {r["intervention"] for r in spans if float(r["selectivity"]) > 0} == {"weight", "prompt"}
    assert all(float(r["selectivity_ci_lo"]) <= float(r["selectivity"]) for r in spans)


def test_random_vectors_are_asked_for_what_there_is(out, tmp_path, capsys):
    """Claims of which none is true, and scores that all need a thought, have fewer draws, or none."""
    known = behavior_file("honesty", "pocket").read_text().splitlines()
    file = tmp_path / "honesty.toml"
    file.write_text("\n".join(line for line in known if not re.search(r"claim = .*, true = true", line)))
    plain = replace(quick_options(out), behavior=str(file), interventions=("weight",), limit=2)
    for evals, random in (
        (("sycophancy", "arithmetic"), {"false_claims": True, "thought_accuracy": False, "direct_accuracy": False}),
        (("arithmetic",), {"thought_accuracy": False, "direct_accuracy": False}),
    ):
        main(replace(plain, evals=evals, dataset="sums"))
        rows = read_csv(out / "honesty" / "compare.csv")
        assert {r["score"]: bool(r["p_random"]) for r in rows} == random
        assert capsys.readouterr().out


@pytest.mark.parametrize("behavior", ["honesty", "tone"], ids=["claims", "preferences"])
def test_the_behaviours_own_items_on_a_board_are_of_the_split_that_is_asked_for(behavior, out):
    """A choice that is made on `dev` may not have seen what is reported, by way of selectivity either."""

    def own(split: str) -> set[str]:
        options = replace(quick_options(out), behavior=behavior, board="pocket", split=split)
        context = EvalContext.of_base(options.eval_options("lora", 0), *ws.load_model("pocket", device="cpu"))
        return set(_Bench(options, context, None).board.parts[1].texts)

    assert own("dev")
    assert own("report")
    assert not own("dev") & own("report")


def test_a_board_has_the_behaviours_targets_and_loses_what_the_steered_model_does_not_answer(out, monkeypatch):
    model, tok = ws.load_model("pocket", device="cpu")
    context = EvalContext.of_base(EvalOptions(behavior="honesty", out=out), model, tok)
    bench = _Bench(replace(quick_options(out), board="pocket", traits=("agreeableness",)), context, None)
    assert bench.board.targets == ("honesty",), "the traits are those of statements"
    first, *others = bench.board.traits
    base = np.random.default_rng(0).normal(size=len(bench.board.texts))

    def read(context, board, chosen, alphas):
        masses = {a: {t: 0.5 if (a, t) == (1.5, first) else 0.99 for t in board.traits} for a in (0.0, *alphas)}
        return {a: (base + a, {t: Readability(m) for t, m in by.items()}) for a, by in masses.items()}

    monkeypatch.setattr("ws.analysis.compare.read_board", read)
    found = bench.on_board(None, {-1: -2.0, 1: 1.5})
    assert set(found[first]) == {-1, 0}, "as `ws profile` at either strength"
    assert all(set(found[trait]) == {-1, 0, 1} for trait in others)


def test_a_vector_without_strengths_does_not_take_the_others_along(out, monkeypatch, capsys):
    """Neither side of it converged; its random vectors were once asked at no strength, at the very end."""
    usable = OpenedRun.usable
    monkeypatch.setattr(
        OpenedRun, "usable", lambda run, chosen, c: {} if chosen.name == "weight" else usable(run, chosen, c)
    )
    main(replace(quick_options(out), limit=2, n_prompts=2))
    assert {r["intervention"] for r in read_csv(out / "honesty" / "compare.csv")} == {"prompt"}
    assert capsys.readouterr().out


def test_a_null_that_was_trained_otherwise_is_the_null_of_another_vector(out, capsys):
    """In its settings, or on what was made of other pairs; where neither is on record it is taken as it is."""
    options, model, tok = quick_options(out), *ws.load_model("pocket", device="cpu")
    plain = ws.SteeringVector.load(out / "honesty" / "lora" / "vector")

    def nulls(rank: int | None, null_rank: int | None, pairs: str = "", null_pairs: str = "") -> dict:
        for name, stage, r, digest in (
            ("lora", "pos", rank, pairs),
            ("lora-shuffled", "control", null_rank, null_pairs),
        ):
            run = Run(out / "honesty" / name)
            run.drop(stage)
            if digest:
                run.restart(stage, {}, {"pairs": digest})
            arms = [{"adapter": s, "config": TrainConfig(rank=r).recorded()} for s in ("pos", "neg")] if r else []
            recipe = {"op": "+", "terms": arms} if arms else {}
            replace(plain, recipe=recipe).save(run.folder / "vector")
        vector = ws.SteeringVector.load(out / "honesty" / "lora" / "vector")
        context = EvalContext(options.eval_options("lora", 0), model, tok, vector, Run(out / "honesty" / "lora"))
        return OpenedRun(options, context, ("weight",)).trained_nulls()

    capsys.readouterr()
    for fine in ((None, None), (8, 8, "a" * 64, "a" * 64), (8, None, "a" * 64), (None, 8, "", "b" * 64)):
        assert set(nulls(*fine)) == {"shuffled"}
    assert not capsys.readouterr().err
    for other, words in (
        ((32, 8), r"lora-shuffled was trained otherwise .*\(`?rank`?: 32 -> 8\).*left out"),
        ((8, 8, "a" * 64, "b" * 64), r"\(pairs: 'a{12}' -> 'b{12}'\)"),
    ):
        assert not nulls(*other)
        assert re.search(words, " ".join(capsys.readouterr().err.split()))


@pytest.mark.slow
def test_a_gradient_stands_beside_the_vector_of_its_run_at_the_same_divergence(out, capsys):
    questions = ws.load_behavior("honesty", "pocket").questions[:6]
    pairs = [Pair(f"p{i}", q, f"Yes, and {i} more.", f"No, never {i}.", 6, 5) for i, q in enumerate(questions)]
    write_text(data_folder(out, "pocket", "honesty") / PAIRS_FILE, pair_lines(pairs))
    recipe = {
        "config": asdict(TrainConfig(rank=2)),
        "seed": 0,
        "pairs_sha256": sha256_json([p.as_row() for p in pairs]),
    }
    folder = out / "honesty" / "lora" / "vector"
    replace(ws.SteeringVector.load(folder), recipe=recipe).save(folder)
    main(replace(quick_options(out), interventions=("weight", "gradient-low-rank"), n_draws=0))
    assert "gradient-low-rank, lora" in capsys.readouterr().out
    rows = [r for r in read_csv(out / "honesty" / "compare.csv") if r["intervention"] == "gradient-low-rank"]
    assert {(r["adapter"], r["matched"], r["detail"], r["real"]) for r in rows} == {("lora", "True", "rank 2", "")}
    calibrations = read_csv(out / "honesty" / "lora" / "calibration_gradient-low-rank.csv")
    assert [float(r["divergence"]) for r in calibrations] == pytest.approx([1.0, 1.0], rel=0.05)
    (contest,) = read_csv(out / "honesty" / "compare_pairs.csv")
    assert (contest["baseline"], contest["matched"]) == ("gradient-low-rank", "True")


def test_items_that_cannot_be_read_are_said_before_strengths_are_solved_for(out):
    with pytest.raises(ws.WsError, match="nowhere"):
        main(replace(quick_options(out), evals=("airisk",), dataset=str(out / "nowhere")))
    assert not list(out.rglob("calibration*"))


def test_stored_strengths_are_used_and_named_and_never_solved_for_again(out, capsys, monkeypatch):
    options = quick_options(out)
    main(options)
    first, rows = capsys.readouterr().out, read_csv(out / "honesty" / "compare.csv")
    monkeypatch.setattr(import_module("ws.intervene.calibrate"), "calibrate", None)
    file = out / "honesty" / "lora" / "vector" / "calibration.json"
    kept = file.read_bytes()
    main(replace(options, n_prompts=5))
    printed = capsys.readouterr()
    assert printed.out == first
    assert (
        "weight of lora, seed 0: the stored strengths are used, made with other settings (n_prompts: 6 -> 5"
        in printed.err
    )
    with pytest.raises(
        ws.WsError, match=r"target: 1.0 -> 0.5\).*ws calibrate --behavior honesty --adapter lora.*--fresh"
    ):
        main(replace(options, target=0.5))
    assert file.read_bytes() == kept
    assert {r["calibrated_on"] for r in rows} == {"6 questions, which may have been trained on"}
    assert "solved for on 6 questions, which may have been trained on" in first
    assert {r["dtype"] for r in rows} == {"float32"}


def test_bad_requests_are_refused_before_anything_is_loaded(tmp_path):
    plain = CompareOptions(out=tmp_path)
    for change, sentence in (
        ({"adapters": ("lara",)}, "[Dd]id you mean 'lora'"),
        ({"interventions": ("wheight",)}, "[Dd]id you mean 'weight'"),
        ({"evals": ("airrisk",)}, "[Dd]id you mean 'airisk'"),
        ({"evals": ()}, "at least one"),
        ({"limit": -1}, "`limit` must be at least 1"),
        ({"split": "reprot"}, "[Dd]id you mean 'report'"),
        ({"seeds": (0, 1, 0)}, "`seeds` names 0 twice"),
        ({"adapters": ("lora", "lora")}, "`adapters` names 'lora' twice"),
        ({"interventions": ("weight", "weight")}, "`interventions` names 'weight' twice"),
        ({"n_draws": -1}, "`n_draws`"),
        ({"target": 0.0}, "`target`"),
        ({}, "has a vector; make one"),
    ):
        with pytest.raises(ws.WsError, match=sentence):
            compare(replace(plain, **change))
