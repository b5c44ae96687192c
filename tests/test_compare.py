"""The comparison: planted effects are found with their size, nulls are not, and a vector of Yes is called one."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from scipy.stats import binom

import ws
from ws.compare import CompareOptions, compare, main
from ws.compare_tables import Cell, Group, comparison_rows, group_rows, plot, reality, render
from ws.plots import save_svg
from ws.runs import Run, read_csv, typed, write_csv

KEY = {"behavior": "honesty"}
N_BOOT = 400


def claims(rng, effect, n=60, noise=1.0, shared=0.0):
    """Scores by sign of `n` items whose expected span is `effect`, from -1u to +1u."""
    base = rng.normal(size=n)
    lean = shared * rng.normal(size=n)
    return {s: base + s * effect / 2 + abs(s) * lean + (noise if s else 0.0) * rng.normal(size=n) for s in (-1, 0, 1)}


def cell(rng, name="weight", adapter="lora", seed=0, false=-4.0, true=3.0, wrongness=0.5, **more):
    """A cell with planted spans."""
    scores = {
        "false_claims": claims(rng, false),
        "true_claims": claims(rng, true, n=30),
        "wrongness": claims(rng, wrongness, noise=0.05),
        "nll": {-1: np.full(8, 2.1), 0: np.full(8, 2.0), 1: np.full(8, 2.3)},
    }
    plain = {"alphas": {-1: -1.5, 1: 2.0}, "divergence": {-1: 0.9, 1: 1.1}, "matched": True}
    return Cell(name, adapter, seed, scores=scores, **(plain | more))


def nulls_of(rng, size=0.0):
    sizes = {"false_claims": 60, "true_claims": 30}
    return {null: {s: claims(rng, size, n) for s, n in sizes.items()} for null in ("shuffled", "same-side")}


def draws_of(rng, sd=0.1, n=20):
    return {s: {sign: rng.normal(scale=sd, size=n) for sign in (-1, 1)} for s in ("false_claims", "true_claims")}


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


def test_three_nulls_are_needed_and_each_can_refuse():
    rng = np.random.default_rng(1)
    good = cell(rng, nulls=nulls_of(rng), random=draws_of(rng))
    assert reality(Group((good,)), "false_claims", "span", N_BOOT).is_real is True
    loud = replace(good, random=draws_of(rng, sd=10.0))
    assert reality(Group((loud,)), "false_claims", "span", N_BOOT).is_real is False
    strong = nulls_of(rng) | {"same-side": {"false_claims": claims(rng, 5.0)}}  # opposite in sign, larger in size
    assert reality(Group((replace(good, nulls=strong),)), "false_claims", "span", N_BOOT).is_real is False
    for missing in (replace(good, nulls={}), replace(good, random={}), replace(good, nulls={"shuffled": {}})):
        assert reality(Group((missing,)), "false_claims", "span", N_BOOT).is_real is None
    assert reality(Group((good,)), "false_claims", "+1u", N_BOOT).p_random == pytest.approx(1 / 21)


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

    from ws.models import fingerprint

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


def test_the_command_measures_tabulates_and_resumes(out, capsys, monkeypatch):
    options = CompareOptions(
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
    main(options)
    first = capsys.readouterr().out
    rows = read_csv(out / "honesty" / "compare.csv")
    assert list(rows[0])[:4] == ["behavior", "adapter", "seed", "alpha"]
    assert {r["intervention"] for r in rows} == {"weight", "prompt"}
    assert {r["matched"] for r in rows if r["intervention"] == "prompt"} == {"False"}
    weight = [r for r in rows if r["intervention"] == "weight" and r["score"] == "false_claims"]
    assert all(float(r["p_random"]) >= 1 / 3 and r["real"] == "" for r in weight)
    assert "`real` is empty for lora" in first
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
            means[part] = ws.evaluate_sycophancy(model, tok, behavior).logratio[:4].mean()
    (span,) = (float(r["shift"]) for r in weight if r["part"] == "span")
    assert span == pytest.approx(means["+1u"] - means["-1u"], abs=1e-4)

    monkeypatch.setattr("ws.eval.sycophancy.score_claims", None)
    monkeypatch.setattr(import_module("ws.calibrate"), "calibrate", None)
    main(options)
    assert capsys.readouterr().out == first


def test_bad_requests_are_refused_before_anything_is_loaded(tmp_path):
    plain = CompareOptions(out=tmp_path)
    for change, sentence in (
        ({"adapters": ("lara",)}, "[Dd]id you mean 'lora'"),
        ({"interventions": ("wheight",)}, "[Dd]id you mean 'weight'"),
        ({"evals": ("airrisk",)}, "[Dd]id you mean 'airisk'"),
        ({"evals": ()}, "at least one"),
        ({"n_draws": -1}, "--n-draws"),
        ({"target": 0.0}, "--target"),
        ({}, "has a vector; make one"),
    ):
        with pytest.raises(ws.WsError, match=sentence):
            compare(replace(plain, **change))
