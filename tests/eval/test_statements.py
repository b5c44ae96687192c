"""Statements: scores against a plain forward pass per statement, both halves apart, the loader and the command."""

from __future__ import annotations

import copy
import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from support.statements import ASK, folder, rows
from ws.delta import LinearDelta
from ws.eval.context import open_context
from ws.eval.readable import Readability
from ws.eval.statements import (
    Prompts,
    Statement,
    Statements,
    draw_statements,
    evaluate_statements,
    load_statements,
    main,
    render,
    score_columns,
    signed_scores,
    trait_files,
    uneven,
)
from ws.lm.models import encode, fingerprint, render_prompt
from ws.options.measure import StatementOptions


def load(source: object, *traits: str) -> tuple[Statement, ...]:
    return load_statements(trait_files(str(source), traits))


@pytest.mark.skipif("WS_REAL_DATA" not in os.environ, reason="WS_REAL_DATA names no folder with the published samples")
def test_the_published_files_are_read():
    real = Path(os.environ["WS_REAL_DATA"]) / "anthropic-evals"
    for source in (real, real / "persona"):
        found = load(source, "agreeableness", "psychopathy")
        assert len(found) == 80
        assert {s.trait for s in found} == {"agreeableness", "psychopathy"}
        assert sum(s.matching == "Yes" for s in found) == 40
        assert not uneven(found)
    assert found[0].question == ASK.format(found[0].text)
    assert len({s.id for s in found}) == 80
    with pytest.raises(ws.WsError, match="no trait in .* named 'agreableness'. Did you mean 'agreeableness'"):
        load(real, "agreableness")


def plain(model, tok, statement: Statement) -> tuple[float, float]:
    """`log p(Yes) - log p(No)` and the mass of both, in double precision: every token that reads as the word counts."""
    ids = torch.tensor([encode(tok, render_prompt(tok, statement.question, system=""))])
    with torch.no_grad():
        p = model(input_ids=ids).logits[0, -1].softmax(-1)
    sums = [
        sum(float(p[i]) for i in range(len(tok)) if i not in tok.all_special_ids and reads(tok, i) == word)
        for word in ("yes", "no")
    ]
    return float(np.log(sums[0]) - np.log(sums[1])), sum(sums)


def reads(tok, i: int) -> str:
    return tok.decode([i], clean_up_tokenization_spaces=False).lstrip(" \n\t").lower()


def test_scores_equal_a_forward_pass_per_statement(tiny, tmp_path):
    model, tok = tiny
    statements = load(folder(tmp_path, kind=rows("kindness", 5)), "kind")
    scores = evaluate_statements(model, tok, statements)
    exact = copy.deepcopy(model).double()
    expected = [plain(exact, tok, s) for s in statements]
    assert scores["logratio"] == pytest.approx([r for r, _ in expected], abs=1e-4)
    assert scores["pmass"] == pytest.approx([m for _, m in expected], rel=1e-3)
    signs = [1 if s.matching == "Yes" else -1 for s in statements]
    assert signed_scores(statements, scores) == pytest.approx(
        [s * r for s, (r, _) in zip(signs, expected, strict=True)], abs=1e-4
    )


def made(n_yes: int, n_no: int) -> list[Statement]:
    answers = ["Yes"] * n_yes + ["No"] * n_no
    return [Statement(f"t/{i}", "t", f"s{i}", f"q{i}", answer) for i, answer in enumerate(answers)]


def test_agreement_cancels_and_is_told_from_the_trait():
    """Yes moves by 2 everywhere, the trait by 0.5 on top: scores move by +2.5 where Yes matches and by -1.5 where No
    does, whose mean is the trait and whose half difference is the agreement."""
    statements, noise = made(4, 4), np.array([0.1, -0.1, 0.2, -0.2, 0.1, -0.1, 0.2, -0.2])
    base = {"logratio": np.zeros(8), "pmass": np.full(8, 0.95)}
    trait = 0.5 * np.array([1, 1, 1, 1, -1, -1, -1, -1])
    row = score_columns(statements, {"logratio": 2.0 + trait + noise, "pmass": np.full(8, 0.95)}, base, 300)
    assert row["shift"] == pytest.approx(0.5)
    assert (row["shift_yes"], row["shift_no"]) == (pytest.approx(2.5), pytest.approx(-1.5))
    assert row["agreement"] == pytest.approx(2.0)
    assert row["agreement_ci_lo"] < 2.0 < row["agreement_ci_hi"]
    assert row["unreadable"] is None
    text = {k: "" if v is None else str(v) for k, v in row.items()}
    zero = text | {"alpha": "0.0", "shift": "0.0", "agreement": "0.0"}
    shown = render([zero | {"traits": "t"}, text | {"alpha": "1.0", "traits": "t"}])
    assert "Agreement moves further than the trait at alpha +1 (+2.00 against +0.50)" in shown


@pytest.mark.parametrize(
    ("yes", "no", "is_even"), [(20, 20, True), (21, 20, True), (11, 9, True), (30, 10, False), (4, 0, False)]
)
def test_uneven_halves_support_no_conclusion(yes, no, is_even):
    assert (uneven(made(yes, no)) == "") == is_even
    assert is_even or "agreement does not cancel" in Readability(0.99, flag=uneven(made(yes, no))).problem


def test_broken_rows_are_named_and_many_stop_the_run(tmp_path, capsys):
    good = rows("x", 40)
    bad = [good[0] | {"answer_matching_behavior": " (A)"}, good[1] | {"statement": " "}]
    source = folder(tmp_path / "few", kind=[*good, *bad])
    assert len(load(source, "kind")) == 40
    said = capsys.readouterr().err
    assert "row 41 has the answers '(A)' and 'Yes'" in said
    assert "row 42 has no question or no statement" in said
    with pytest.raises(ws.WsError, match="at most 5%"):
        load(folder(tmp_path / "many", kind=[*good[:10], *bad]), "kind")


def test_sources_and_traits_that_are_not_there_are_explained(tmp_path):
    source = folder(tmp_path / "sets", kind=rows("x"), rude=rows("y"))
    assert [s.trait for s in load(source / "rude.jsonl")] == ["rude"] * 8
    with pytest.raises(ws.WsError, match="Did you mean 'rude'"):
        load(source, "ruude")
    with pytest.raises(ws.WsError, match="holds the trait 'rude' alone"):
        load(source / "rude.jsonl", "kind")
    with pytest.raises(ws.WsError, match="No traits"):
        load(source)
    with pytest.raises(ws.WsError, match="each once"):
        load(source, "kind", "kind")
    with pytest.raises(ws.WsError, match="no trait in pocket named 'kind'"):
        load("pocket", "kind")
    with pytest.raises(ws.WsError, match="holds no table"):
        load(folder(tmp_path / "empty"), "kind")
    with pytest.raises(ws.WsError, match="no file or folder ./nowhere"):
        load("./nowhere", "kind")
    with pytest.raises(ws.WsError, match="`revision` is of a data set on the hub"):
        trait_files(str(source), ["kind"], "main")
    with pytest.raises(ws.WsError, match="hf download somebody/evals --repo-type dataset"):
        load("somebody/evals", "kind")


def test_a_draw_is_even_over_traits_and_answers(tmp_path):
    source = folder(tmp_path, kind=rows("x", 20), rude=rows("y", 8))
    drawn = draw_statements(load(source, "kind", "rude"), 8)
    assert sorted((s.trait, s.matching) for s in drawn) == sorted(
        (t, a) for t in ("kind", "rude") for a in ("Yes", "No") for _ in (0, 1)
    )


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.3, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    source = folder(tmp_path / "sets" / "persona", kind=rows("x"), rude=rows("y"))
    return StatementOptions(
        out=tmp_path, dataset=str(source.parent), traits=("kind", "rude"), n_bootstrap=100, device="cpu"
    )


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_the_documented_tables(options, tiny, capsys):
    main(options)
    printed = capsys.readouterr().out
    assert "Worked example (kind/1; No matches kind)" in printed
    assert "answer mass" in printed
    at = options.out / "honesty" / "lora"
    per_statement, traits, summary = (read(at / f"statements_{n}.csv") for n in ("per_statement", "traits", "summary"))
    assert len(per_statement) == 3 * 16
    assert len(traits) == 3 * 2
    assert [r["alpha"] for r in summary] == ["-1.0", "0.0", "1.0"]
    assert {(r["words"], r["traits"], r["n"], r["n_yes"]) for r in summary} == {("published", "kind rude", "16", "8")}
    score = {a: np.array([float(r["score"]) for r in per_statement if r["alpha"] == a]) for a in ("0.0", "1.0")}
    assert float(summary[2]["shift"]) == pytest.approx((score["1.0"] - score["0.0"]).mean())
    yes = np.array([r["matching_answer"] == "Yes" for r in per_statement if r["alpha"] == "0.0"])
    assert float(summary[2]["shift_yes"]) == pytest.approx((score["1.0"] - score["0.0"])[yes].mean())
    assert float(summary[2]["shift_no"]) == pytest.approx((score["1.0"] - score["0.0"])[~yes].mean())
    model, tok = tiny
    statements = load(options.dataset, *options.traits)
    with ws.steer(model, ws.SteeringVector.load(at / "vector"), 1.0):
        steered = signed_scores(statements, evaluate_statements(model, tok, statements, batch_size=1))
    assert score["1.0"] == pytest.approx(steered, abs=1e-4)


def test_other_words_are_called_by_their_file(options, tmp_path):
    words = tmp_path / "plain.toml"
    words.write_text('name = "plain"\nquestion = "Would you say: {statement}? Yes or No?"\nopener = "I say"\n')
    context = open_context(replace(options, prompts=words))
    made = Statements.of_run(context)
    assert made.facts["words"].startswith("file:plain@")
    assert made.content[0] == {"question": "Would you say: {statement}? Yes or No?", "opener": "I say"}
    assert made.digest != Statements.of_run(open_context(options)).digest
    words.write_text('question = "{question}"\n')
    with pytest.raises(ws.WsError, match=r"must contain \{statement\}"):
        Statements.of_run(context)


def test_a_behaviour_may_name_its_traits(options, tmp_path):
    context = open_context(replace(options, traits=()))
    with pytest.raises(ws.WsError, match="`traits` agreeableness"):
        Statements.of_run(context)
    text = (Path(ws.__file__).parent / "behaviors" / "refusal.toml").read_text()
    file = tmp_path / "mine.toml"
    file.write_text(text + '\n[statements]\ntraits = ["rude"]\n')
    behavior = ws.load_behavior(str(file))
    assert behavior.traits == ("rude",)
    mine = replace(context, options=replace(context.options, behavior=str(file)))
    assert {s.trait for s in Statements.of_run(mine).items} == {"rude"}
    file.write_text(text + '\n[statements]\ntrait = ["rude"]\n')
    with pytest.raises(ws.WsError, match=r"\[statements\]: .*'trait'.* Did you mean 'traits'"):
        ws.load_behavior(str(file))


def test_prompts_have_the_published_question_and_no_opener_by_default():
    assert Prompts() == Prompts("", "")
