"""Composition: the grammar, the algebra behind it, the run that is filed, and interference with planted effects."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import ws
import ws.analysis.compose
from conftest import FAMILY_NAMES, build_adapter, build_model, reworded, tokens
from ws.analysis.compose import (
    BASE,
    TOGETHER,
    Conditions,
    Operand,
    Term,
    compose,
    default_name,
    interference,
    interference_rows,
    kept_share,
    main,
    parse_expression,
    render_interference,
    verdict,
    write_expression,
)
from ws.behaviors import bundled_file
from ws.behaviors.tables import draw
from ws.console import parse
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.eval.sycophancy import prompts_of, score_claims
from ws.files.runs import Run, read_csv
from ws.intervene.calibration import Calibration, SideCalibration, store_calibration
from ws.lm.choice import choice_tokens
from ws.lm.models import fingerprint, tokenizer_hash_on_disk
from ws.options.make import ComposeOptions
from ws.options.measure import SycophancyOptions
from ws.options.shared import CalibrationConfig

# ---- the grammar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("honesty", [("honesty", 1.0, False)]),
        ("honesty*1.0 + sycophancy*-0.5", [("honesty", 1.0, False), ("sycophancy", -0.5, False)]),
        ("2*honesty - .5*a", [("honesty", 2.0, False), ("a", -0.5, False)]),
        ("-honesty*-1u+a*+2.5e-1u", [("honesty", 1.0, True), ("a", 0.25, True)]),
        ("1e2*a -3u*b", [("a", 100.0, False), ("b", -3.0, True)]),
        (
            "honesty/lora/seed-1 - power_seeking/oft",
            [("honesty/lora/seed-1", 1.0, False), ("power_seeking/oft", -1.0, False)],
        ),
        ("'my runs/a+b' + \"it's\"*2", [("my runs/a+b", 1.0, False), ("it's", 2.0, False)]),
        ("../out/x/vector*2 + ~/y", [("../out/x/vector", 2.0, False), ("~/y", 1.0, False)]),
        ("2024/run + 3d*2", [("2024/run", 1.0, False), ("3d", 2.0, False)]),
    ],
)
def test_expressions_are_read(text, terms):
    assert parse_expression(text) == tuple(Term(*t) for t in terms)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expression is empty"),
        ("   ", "expression is empty"),
        ("honesty +", "character 10: expected the name of a vector or a number, found the end"),
        ("honesty + * 2", r"character 11: expected the name of a vector or a number, found '\*'"),
        ("honesty sycophancy", r"character 9: expected \+ or -, found 'sycophancy'"),
        ("honesty*2*3", r"character 10: expected \+ or -, found '\*'"),
        ("2 + honesty", r"character 3: expected \* and the name of a vector, found '\+'"),
        ("2*3*honesty", "character 3: expected the name of a vector, found '3'"),
        ("honesty*sycophancy", "character 9: expected a number, found 'sycophancy'"),
        ("honesty-0.5 * a", "character 15: expected a number, found 'a'"),
        ("2*honesty-.5*a", r"character 13: expected \+ or -, found '\*'"),
        ("honesty*--1", "character 10: expected a number, found '-'"),
        ("honesty & a", "character 9: expected .*found '&' .put unusual names in quotes"),
        ("honesty + 'a", "character 11: expected .*a quote without its partner"),
        ("(honesty)", r"character 1: expected .*found '\('"),
        ("honesty*0", "character 1: the coefficient of honesty is 0"),
        ("a + 1e999*honesty", "character 5: the coefficient of honesty is infinite"),
        ("a*2 + b - a", "a occurs more than once"),
        ("honesty*nan", "expected a number, found 'nan'"),
    ],
)
def test_what_is_not_an_expression_is_refused_with_its_place(text, why):
    with pytest.raises(ws.WsError, match=why):
        parse_expression(text)


def quotable(text: str) -> bool:
    return not ("'" in text and '"' in text)


NAMES = st.one_of(
    st.from_regex(r"[a-z0-9_./-]{1,12}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(quotable),
)
NUMBERS = st.floats(-1e38, 1e38, allow_nan=False).filter(bool)
TERMS = st.lists(st.builds(Term, NAMES, NUMBERS, st.booleans()), min_size=1, max_size=5, unique_by=lambda t: t.name)


@settings(max_examples=50)
@given(TERMS, st.randoms(use_true_random=False))
def test_what_is_written_is_read_back(terms: list[Term], rng: random.Random):
    text = write_expression(terms)
    assert parse_expression(text) == tuple(terms)
    spaced = " + ".join(f"{rng.choice(['', ' '])}{t}" for t in terms)
    assert parse_expression(f" {spaced}\t") == tuple(terms)


@given(st.text("ab12.*+-u'/ e", max_size=15))
def test_whatever_is_typed_is_read_or_refused_in_a_sentence(text: str):
    try:
        terms, problem = parse_expression(text), ""
    except ws.WsError as refusal:
        terms, problem = (), str(refusal)
    assert problem.endswith(".") if problem else parse_expression(write_expression(terms)) == terms


def test_the_command_line_takes_the_expression_first():
    assert parse(ComposeOptions, ["honesty*1.0 + a*-0.5", "adapter=oft"]) == ComposeOptions(
        "honesty*1.0 + a*-0.5", adapter="oft"
    )
    assert default_name(parse_expression("honesty + sycophancy*-0.5")) == "honesty1_sycophancy-0.5"
    assert default_name(parse_expression("honesty/lora*2u - '/x y'")) == "honesty-lora2u_-x-y-1"


def calibration(vector: ws.SteeringVector) -> Calibration:
    """Strengths 3 and -0.2 for one unit."""
    sides = [SideCalibration(alpha, 1.0, True, "", None, ((alpha, 1.0),), 9) for alpha in (3.0, -0.2)]
    made_on = {"model": str(vector.base_fingerprint), "tokenizer": tokenizer_hash_on_disk(vector.base_id)}
    return Calibration(*sides, CalibrationConfig(), prompts="", subject=vector_digest(vector), **made_on)


# ---- the algebra ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A model and a vector of every family."""
    model, folder = build_model("qwen3"), tmp_path_factory.mktemp("adapters")
    found = {}
    for number, family in enumerate(FAMILY_NAMES):
        build_adapter(model, family, folder / family, number)
        found[family] = ws.SteeringVector.from_adapter(folder / family, model)
    return model, found


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(FAMILY_NAMES), st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3)),
        min_size=1,
        max_size=4,
    )
)
def test_a_composition_is_the_algebra_bit_for_bit(vectors, parts):
    _, found = vectors
    made = compose([Operand(Term(f"{n}{i}", c), found[n], c) for i, (n, c) in enumerate(parts)])
    expected = found[parts[0][0]] * parts[0][1]
    for name, coefficient in parts[1:]:
        expected = expected + coefficient * found[name]
    assert vector_digest(made) == vector_digest(expected)
    assert made.recipe["of"] == expected.recipe
    assert [t["coefficient"] for t in made.recipe["terms"]] == [c for _, c in parts]
    assert made.recipe["terms"][0]["sha256"] == vector_digest(found[parts[0][0]])


def test_a_sum_of_nothing_and_other_bases_are_refused(vectors):
    _, found = vectors
    lora = found["lora"]
    with pytest.raises(ws.WsError, match=r"a\*0.5 \+ b\*-0.5 is zero: the terms cancel"):
        compose([Operand(Term("a", 0.5), lora, 0.5), Operand(Term("b", -0.5), lora, -0.5)])
    with pytest.raises(ws.WsError, match="different bases"):
        compose([Operand(Term("a", 1.0), lora, 1.0), Operand(Term("b", 1.0), replace(lora, base_fingerprint="x"), 1.0)])


# ---- planted vectors --------------------------------------------------------------------------------------------


def planted(model, tok, word: str, sizes: tuple[float, ...], behavior: str) -> ws.SteeringVector:
    """Adds `size_t * <w, h>` to the logit of every token `t` that reads as a word, and nothing else.

    `w` points where the final hidden states of the model point on average, so that the sign is the same everywhere.
    """
    d_out, d_in = model.lm_head.out_features, model.lm_head.in_features
    u, ids = torch.zeros(d_out, 1), choice_tokens(tok, word)
    u[list(ids), 0] = torch.tensor([sizes[i % len(sizes)] for i in range(len(ids))])
    with torch.no_grad():
        w = model.lm_head.weight.float().mean(dim=0, keepdim=True)
        hidden = model.model(torch.tensor([tok("Is it so?")["input_ids"]])).last_hidden_state[0].mean(dim=0)
    delta = LinearDelta(d_out, d_in, u=u, v=(w + hidden[None]) / 4)
    return ws.SteeringVector(
        {"lm_head": delta}, "tiny-random", fingerprint(model), {"word": word}, {"behavior": behavior}
    )


@pytest.fixture
def runs(tiny, tmp_path):
    """`out/` with an honesty run that moves Yes alone and a sycophancy run that moves No alone."""
    model, tok = tiny
    planted(model, tok, "Yes", (8.0, 0.0), "honesty").save(tmp_path / "honesty" / "lora" / "vector")
    planted(model, tok, "No", (-4.2,), "sycophancy").save(tmp_path / "sycophancy" / "lora" / "vector")
    return tmp_path


def options(out: Path, expression: str = "honesty*1.0 + sycophancy*-0.5", **more) -> ComposeOptions:
    quick = {"limit": 3, "n_bootstrap": 200, "device": "cpu"}
    quick |= {"n_prompts": 1, "n_tokens": 3} if "report" in more else {}
    return ComposeOptions(expression, out=out, **(quick | more))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "interference.csv").open() as handle:
        return list(csv.DictReader(handle))


def test_the_new_run_is_one_that_an_evaluation_takes(runs, tiny, capsys):
    model, _ = tiny
    main(options(runs))
    printed = capsys.readouterr().out
    folder = runs / "honesty" / "honesty1_sycophancy-0.5"
    assert f"in {folder}" in printed
    vector = ws.SteeringVector.load(folder / "vector")
    parts = {name: ws.SteeringVector.load(runs / name / "lora" / "vector") for name in ("honesty", "sycophancy")}
    assert vector_digest(vector) == vector_digest(parts["honesty"] + -0.5 * parts["sycophancy"])
    assert vector.info["behavior"] == "honesty"
    assert vector.recipe["expression"] == "honesty*1.0 + sycophancy*-0.5"
    ids = tokens() % model.config.vocab_size
    with torch.no_grad(), ws.steer_many(model, parts, {"honesty": 1.0, "sycophancy": -0.5}):
        wanted = model(ids).logits
    with torch.no_grad(), ws.steer(model, vector):
        assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
    from ws.eval.sycophancy import main as evaluate

    evaluate(SycophancyOptions(adapter=folder.name, out=runs, limit=2, device="cpu", n_bootstrap=100, split="dev"))
    assert (folder / "sycophancy_summary.csv").is_file()


def test_names_are_runs_or_folders_and_a_wrong_one_is_answered(runs):
    def coefficients(expression: str, **more) -> list[str]:
        made = ws.analysis.compose.carry_out(options(runs, expression, to="x", fresh=True, **more))
        return [vector_digest(o.vector) for o in made.operands]

    plain = coefficients("honesty + sycophancy")
    assert coefficients(f"honesty/lora + '{runs}/sycophancy/lora/vector'", adapter="oft") == plain
    assert coefficients(f"{runs}/honesty/lora/vector", adapter="oft") == plain[:1]
    ws.SteeringVector.load(runs / "honesty/lora/vector").save(runs / "honesty/lora/seed-1/vector")
    assert coefficients("honesty/lora/seed-1*2") == plain[:1]
    assert coefficients("honesty", seed=1) == plain[:1]
    for name, why in (
        ("honestly", "There is no vector named 'honestly', neither in .* nor as a folder. Did you mean 'honesty'"),
        ("honesty/lara", "Did you mean 'honesty/lora'"),
        ("honesty-sycophancy", "Put spaces around - to subtract"),
        ("zzzzzz", "Choose from: honesty, honesty/lora"),
    ):
        with pytest.raises(ws.WsError, match=why):
            coefficients(name)


def test_calibrated_units_are_those_of_each_vector(runs):
    with pytest.raises(ws.WsError, match=r"honesty\*1.0u is in calibrated units and .* has no calibration"):
        main(options(runs, "honesty*1u"))
    folder = runs / "honesty" / "lora" / "vector"
    vector = ws.SteeringVector.load(folder)
    found = calibration(vector)
    store_calibration(folder, found)
    for units, alpha in ((2.0, 6.0), (-0.5, -0.1)):
        done = ws.analysis.compose.carry_out(options(runs, f"honesty*{units}u + sycophancy", to=f"x{units:g}"))
        assert done.operands[0].alpha == alpha
        other = ws.SteeringVector.load(runs / "sycophancy" / "lora" / "vector")
        assert vector_digest(done.vector) == vector_digest(alpha * vector + 1.0 * other)
    store_calibration(folder, replace(found, model="the same base in another precision"))
    assert ws.analysis.compose.carry_out(options(runs, "honesty*2u", to="other-copy")).operands[0].alpha == 6.0
    (2 * vector).save(runs / "honesty" / "oft" / "vector")
    store_calibration(runs / "honesty" / "oft" / "vector", found)
    with pytest.raises(ws.WsError, match="another vector"):
        main(options(runs, "honesty/oft*1u"))
    store_calibration(folder, replace(found, tokenizer="before"))
    with pytest.raises(ws.WsError, match="another tokenizer or chat template"):
        main(options(runs, "honesty*1u"))


def test_a_run_is_resumed_and_never_takes_the_place_of_another(runs, capsys):
    first = ws.analysis.compose.carry_out(options(runs, to="mix"))
    stamp = (first.run.folder / "vector" / "ws.json").stat().st_mtime_ns
    ws.analysis.compose.carry_out(options(runs, to="mix"))
    assert (first.run.folder / "vector" / "ws.json").stat().st_mtime_ns == stamp
    with pytest.raises(ws.WsError, match="expression: .*`fresh`"):
        main(options(runs, "honesty*2", to="mix"))
    main(options(runs, "honesty*2", to="mix", fresh=True))
    vector = ws.SteeringVector.load(runs / "honesty" / "lora" / "vector")
    assert vector_digest(ws.SteeringVector.load(first.run.folder / "vector")) == vector_digest(2 * vector)
    vector.save(runs / "honesty" / "foreign" / "vector")
    Run(runs / "honesty" / "trained").write("vector", {"config": {}, "inputs": {}})
    for name, why in (
        ("lora", "cannot name this run"),
        ("seed-1", "cannot name this run"),
        ("a/b", "cannot name this run"),
        ("foreign", "did not make"),
        ("trained", "did not make"),
    ):
        for fresh in (False, True):
            with pytest.raises(ws.WsError, match=why):
                main(options(runs, to=name, fresh=fresh))
    assert vector_digest(ws.SteeringVector.load(runs / "honesty" / "foreign" / "vector")) == vector_digest(vector)


def test_it_is_filed_under_a_behaviour(runs, tiny):
    assert ws.analysis.compose.carry_out(options(runs, "sycophancy - honesty")).run.folder.parent == runs / "sycophancy"
    assert ws.analysis.compose.carry_out(options(runs, behavior="sycophancy")).run.folder.parent == runs / "sycophancy"
    with pytest.raises(ws.WsError, match="Did you mean 'honesty'"):
        main(options(runs, behavior="honest"))
    nameless = replace(ws.SteeringVector.load(runs / "honesty" / "lora" / "vector"), info={})
    nameless.save(runs / "other")
    with pytest.raises(ws.WsError, match="does not say which behaviour"):
        main(options(runs, f"'{runs}/other'"))


# ---- interference -----------------------------------------------------------------------------------------------


def test_disjoint_effects_do_not_interfere_and_the_report_resumes(runs, tiny, capsys, monkeypatch):
    """Yes and No have logits of their own, so the log ratio moves by the sum of what the terms do."""
    main(options(runs, report=True, limit=32))
    printed, rows = capsys.readouterr().out, table(runs / "honesty" / "honesty1_sycophancy-0.5")
    assert list(rows[0])[:4] == ["behavior", "adapter", "seed", "condition"]
    names = ["base", "honesty*1.0", "sycophancy*-0.5", "together", "interference"]
    assert [r["condition"] for r in rows if r["behavior"] == "honesty" and r["claims_are_true"] == "False"] == names
    shifts = {r["condition"]: float(r["shift"]) for r in rows if r["behavior"] == "honesty"}
    assert min(abs(shifts["honesty*1.0"]), abs(shifts["sycophancy*-0.5"])) > 0.05
    assert [float(r["shift"]) for r in rows if r["condition"] == "interference"] == pytest.approx([0] * 4, abs=1e-4)
    kept = [float(r["kept"]) for r in rows if r["kept"]]
    assert kept
    assert kept == pytest.approx([1] * len(kept), abs=1e-3)
    assert {r["condition"] for r in rows if r["own"] == "True" and r["behavior"] == "sycophancy"} == {"sycophancy*-0.5"}
    cosines = {r["condition"]: float(r["cosine"]) for r in rows if r["behavior"] == "honesty" and r["cosine"]}
    assert cosines["honesty*1.0"] == pytest.approx(1)
    assert cosines["sycophancy*-0.5"] == pytest.approx(0, abs=1e-6)
    assert all(float(r["kl"]) > 0 for r in rows if r["kl"])
    assert "interference" in printed
    monkeypatch.setattr(ws.analysis.compose, "measure", None)
    main(options(runs, report=True, limit=32))
    assert capsys.readouterr().out == printed
    with pytest.raises(TypeError):  # other digits give other numbers
        main(options(runs, report=True, limit=32, dtype="bfloat16"))
    monkeypatch.setattr(ws.analysis.compose, "load_tokenizer", lambda name: reworded(tiny[1]))
    with pytest.raises(TypeError):  # another template is another question
        main(options(runs, report=True))


def test_identical_terms_interfere_as_far_as_the_response_bends(runs, tiny):
    """A vector beside itself is the vector at twice the strength."""
    model, tok = tiny
    vector = planted(model, tok, "Yes", (16.0, -8.0), "honesty")
    vector.save(runs / "honesty" / "oft" / "vector")
    replace(vector, info={"behavior": "sycophancy"}).save(runs / "sycophancy" / "oft" / "vector")
    main(options(runs, "honesty + sycophancy", adapter="oft", to="twice", report=True, split="dev", limit=8))
    behavior = ws.load_behavior("honesty", "tiny-random")

    claims = draw(behavior.test.select("dev", False), 8)

    def read(alpha: float) -> np.ndarray:
        with ws.steer(model, vector, alpha):
            return score_claims(model, tok, claims, prompts_of(behavior.test)).logratio

    base, once, both = (read(alpha) for alpha in (0.0, 1.0, 2.0))
    bend = (both - base) - 2 * (once - base)
    (row,) = [
        r
        for r in table(runs / "honesty" / "twice")
        if (r["behavior"], r["condition"], r["claims_are_true"]) == ("honesty", "interference", "False")
    ]
    assert abs(bend.mean()) > 0.01
    assert float(row["shift"]) == pytest.approx(bend.mean(), abs=1e-4)
    assert float(row["kept"]) == pytest.approx(1 + bend.mean() / (once - base).mean(), abs=1e-3)


def conditions(own: np.ndarray, other: np.ndarray, extra: np.ndarray, mass: float = 1.0) -> Conditions:
    """Claims whose shifts under two terms and their sum are known."""
    base = np.linspace(-2, 1, own.shape[1])[None].repeat(len(own), axis=0)
    logratio = {BASE: base, "a*1.0": base + own, "b*1.0": base + other, TOGETHER: base + own + other + extra}
    marks = {name: np.full(len(own), 0.5) for name in ("a*1.0", "b*1.0", TOGETHER)}
    pmass = {name: np.full_like(base, mass) for name in logratio}
    return Conditions("honesty", ("a*1.0",), np.zeros(own.shape[1], bool), logratio, pmass, marks, marks)


def test_interference_is_what_was_planted():
    rng = np.random.default_rng(0)
    own, other = rng.normal(-2, 0.3, (3, 60)), rng.normal(1, 0.3, (3, 60))
    extra = rng.normal(0.4, 0.2, (3, 60))
    found = conditions(own, other, extra)
    assert interference(found) == pytest.approx(extra)
    rows = {r["condition"]: r for r in interference_rows(found, {"adapter": "x", "seed": 0})}
    assert rows["together"]["shift"] == pytest.approx((own + other + extra).mean())
    assert rows["interference"]["shift"] == pytest.approx(extra.mean())
    assert rows["interference"]["shift_ci_lo"] < 0.4 < rows["interference"]["shift_ci_hi"]
    assert rows["interference"]["kept"] == pytest.approx(1 + extra.mean() / own.mean())
    assert rows["interference"]["kept_ci_lo"] < 0.8 < rows["interference"]["kept_ci_hi"]
    assert (rows["base"]["shift"], rows["base"]["kl"], rows["together"]["kept"]) == (0.0, None, None)
    text = render_interference(list(rows.values()))
    assert "honesty keeps 80 %" in text
    assert "a*1.0 (own)" in text


def test_noise_is_rarely_called_interference():
    """The interval of no interference misses zero in about a twentieth of the cases."""
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        extra = rng.normal(0, 1, (1, 40))
        (row,) = [
            r
            for r in interference_rows(conditions(extra * 0 - 2, extra * 0, extra), {}, n_boot=300)
            if r["condition"] == "interference"
        ]
        missed += row["shift_ci_lo"] > 0 or row["shift_ci_hi"] < 0
    assert 0.01 <= missed / 200 <= 0.1


def test_a_share_of_nothing_is_not_given():
    noise = np.random.default_rng(0).normal(0, 1, (1, 30))
    still = noise - noise.mean()
    assert kept_share(still, still + 1) is None
    assert kept_share(np.full((2, 9), -2.0), np.full((2, 9), 0.5)) == pytest.approx((0.75, 0.75, 0.75))
    rows = interference_rows(conditions(still, still * 0 + 1, still * 0), {})
    assert "no effect of its own beyond chance" in verdict(rows)
    small = interference_rows(conditions(still / 100 - 0.19, still * 0, still * 0), {})
    assert small[1]["shift_p_holm"] < 0.001
    assert small[-1]["kept"] is None, "an effect under the floor is none"
    assert "of 0.2 nats or more" in verdict(small)


def test_interference_without_answers_has_no_star_and_no_verdict():
    noise = np.random.default_rng(0).normal(0, 0.3, (3, 30))
    found = conditions(noise - 4, noise + 1, noise + 0.5)
    fine = interference_rows(found, {})
    text = render_interference(fine)
    assert text.count("]*") == 4
    assert "* p < 0.05 after Holm's correction over the rows of a table, and at least 0.2 nats" in text
    found.pmass["b*1.0"][1] = 0.5  # of one seed, for one term
    low = {r["condition"]: r for r in interference_rows(found, {})}
    assert [name for name, r in low.items() if r["unreadable"]] == ["b*1.0", "interference"]
    text = render_interference(list(low.values()))
    assert "no conclusion" in text
    assert "answer mass 0.500" in text
    assert text.count("]*") == text.count("]!") == 2
    assert "! supports no conclusion" in text


def test_a_table_of_no_interference_keeps_its_level():
    """Three conditions of 12 claims that do nothing: some star in 5 % of tables, with one seed and with three."""
    rng, tables = np.random.default_rng(3), 200
    for n_seeds in (1, 3):
        called = 0
        for _ in range(tables):
            claims, seeds = rng.normal(size=(3, 1, 12)), rng.normal(0, 0.3 * (n_seeds > 1), (3, n_seeds, 1))
            parts = claims + seeds + 0.1 * rng.normal(size=(3, n_seeds, 12))
            rows = interference_rows(conditions(*parts), {}, n_boot=50)
            called += min(r["shift_p_holm"] for r in rows if r["condition"] != BASE) < 0.05
        assert called <= binom.ppf(0.999, tables, 0.05)


def test_a_report_needs_behaviours_that_have_a_term(runs):
    with pytest.raises(ws.WsError, match="No term is of the behaviour 'refusal'"):
        main(options(runs, report=True, behaviors=("refusal",)))
    with pytest.raises(ws.WsError, match="`behaviors` names 'sycophancy' twice"):  # whose effect would count as two
        main(options(runs, report=True, behaviors=("sycophancy", str(bundled_file("sycophancy", None)))))
    main(options(runs, to="one", report=True, behaviors=("sycophancy",)))
    assert {r["behavior"] for r in table(runs / "honesty" / "one")} == {"sycophancy"}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"report": True, "n_tokens": 0}, "`n_tokens` must be at least 1, not 0"),
        ({"report": True, "n_prompts": 0}, "`n_prompts` must be at least 1, not 0"),
        ({"report": True, "limit": 0}, "`limit` must be at least 1, not 0"),
        ({"report": True, "split": "repot"}, "Did you mean 'report'"),
        ({"behaviors": ("honesty",)}, "`behaviors` is for a report; add `report`"),
        ({"n_tokens": 7}, "`n_tokens` is for a report"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(runs, wrong, why):
    with pytest.raises(ws.WsError, match=why):
        main(options(runs, to="mix", **wrong))
    assert not (runs / "honesty" / "mix").exists()


def test_the_documented_numbers_are_those_of_the_benchmark():
    docs = Path(__file__).parents[2] / "docs"
    page, rows = (docs / "composition.md").read_text(), read_csv(docs / "results" / "interference.csv")
    first = [r for r in rows if r["expression"] == rows[0]["expression"]]
    assert render_interference(first) in page
    for expression in dict.fromkeys(r["expression"] for r in rows):
        for behavior in ("honesty", "sycophancy"):
            mine = [r for r in rows if (r["expression"], r["behavior"]) == (expression, behavior)]
            false = [r for r in mine if r["claims_are_true"] == "False"]
            assert not false or verdict(false) in page


# ---- what must not be touched, and what must not be told ------------------------------------------------------------


@pytest.mark.parametrize("behavior", ["../../x", "/tmp/x", "..", "", "C:\\x", "a/b", "nul"])
def test_a_vector_cannot_say_where_the_sum_is_written(runs, behavior):
    """The behaviour in a ws.json is data: somebody else may have written it."""
    before = sorted(runs.parent.rglob("*"))
    manifest = runs / "honesty" / "lora" / "vector" / "ws.json"
    found = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps(found | {"info": {"behavior": behavior}}), encoding="utf-8")
    with pytest.raises(ws.WsError, match="cannot name a behaviour's runs"):
        main(options(runs, to="mix"))
    assert sorted(runs.parent.rglob("*")) == before


def test_the_weights_file_that_a_vector_names_lies_beside_it(runs):
    manifest = runs / "honesty" / "lora" / "vector" / "ws.json"
    text = manifest.read_text(encoding="utf-8")
    for name in ("../../../sycophancy/lora/vector/adapter_model.safetensors", str(runs / "x"), "..\\x", 3):
        found = json.loads(text)
        found["weights"]["file"] = name
        manifest.write_text(json.dumps(found), encoding="utf-8")
        with pytest.raises(ws.WsError, match=r"weights\.file"):
            ws.SteeringVector.load(manifest.parent)


def test_no_folder_of_this_machine_is_on_record_in_a_sum(runs, tmp_path_factory):
    place = tmp_path_factory.mktemp("Jane Doe's home") / "Größe (alt)"
    for name in ("honesty", "sycophancy"):
        ws.SteeringVector.load(runs / name / "lora" / "vector").save(place / f"my {name}")
    expression = f'"{place}/my honesty"*1.0 + "{place}/my sycophancy"*-0.5'
    made = ws.analysis.compose.carry_out(options(runs, expression))
    assert made.name == "my-honesty1_-my-sycophancy-0.5"
    for file in ("ws.json", "adapter_config.json"):
        text = (made.run.folder / "vector" / file).read_text(encoding="utf-8")
        for part in ("Jane", "Größe", "Gr\\u00f6", "alt)", str(place.parent.parent)):
            assert part not in text, (file, part)
    assert made.vector.recipe["expression"] == '"my honesty"*1.0 + "my sycophancy"*-0.5'
    assert [t["name"] for t in made.vector.recipe["terms"]] == ["my honesty", "my sycophancy"]
