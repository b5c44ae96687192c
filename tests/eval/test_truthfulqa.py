"""TruthfulQA: MC1 and MC2 against a forward pass per answer and against hand-made odds, the tables, and every shape."""

from __future__ import annotations

import copy
import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from support.knowledge import QUESTIONS, questions_csv
from ws.delta import LinearDelta
from ws.eval.context import open_context
from ws.eval.truthfulqa import (
    Prompts,
    Question,
    Truthfulqa,
    category_rows,
    evaluate_truthfulqa,
    load_questions,
    main,
    question_scores,
)
from ws.files.runs import read_csv
from ws.lm import likelihood
from ws.lm.models import encode, encode_answer, fingerprint, render_prompt
from ws.options.measure import TruthfulqaOptions


def as_lists(rows) -> list[dict]:
    """The rows as the hub's configuration `generation` has them."""
    return [
        {
            "category": category,
            "question": question,
            "best_answer": best,
            "correct_answers": [a.strip() for a in true.split(";") if a.strip()],
            "incorrect_answers": [a.strip() for a in false.split(";") if a.strip()],
        }
        for category, question, best, true, false in rows
    ]


def closed(answer: str) -> str:
    return answer if answer.endswith(".") else f"{answer}."


def as_targets(rows) -> list[dict]:
    """The rows as the hub's configuration `multiple_choice` has them."""
    made = []
    for row in as_lists(rows):
        true, false = ([closed(a) for a in row[f"{side}_answers"]] for side in ("correct", "incorrect"))
        targets = {
            name: {"choices": [*right, *false], "labels": [1] * len(right) + [0] * len(false)}
            for name, right in (("mc1_targets", [closed(row["best_answer"])]), ("mc2_targets", true))
        }
        made.append({"question": row["question"], **targets})
    return made


def jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- items ----------------------------------------------------------------------------------------------------------


def test_every_published_shape_gives_the_same_questions(tmp_path):
    found = load_questions(str(questions_csv(tmp_path / "csv")))
    assert [q.category for q in found] == ["Myths", "Myths", "Places", "Places", "Law"]
    assert found[0].true == ("You digest them.", "Nothing happens.")
    assert found[0].false == found[0].rivals == ("You die.", "A tree grows.")
    assert found[0].best == "Nothing happens."
    assert found[0].answers[0] == found[0].best
    assert len(found[2].answers) == 4, "the best answer is a true one, and empty parts are none"
    assert load_questions(str(tmp_path / "csv")) == found, "a folder that holds the one table"
    assert load_questions(jsonl(tmp_path / "lists.jsonl", as_lists(QUESTIONS))) == found
    targets = load_questions(jsonl(tmp_path / "targets.jsonl", as_targets(QUESTIONS)))
    assert targets == tuple(replace(q, category="") for q in found)


def test_a_best_answer_is_one_text_whatever_stands_in_it(tmp_path):
    rows = as_lists(QUESTIONS)
    rows[0]["best_answer"] = "Nothing; that is, you digest them"
    found = load_questions(jsonl(tmp_path / "lists.jsonl", rows))
    assert len(found) == len(QUESTIONS)
    assert found[0].best == "Nothing; that is, you digest them."


def test_a_file_has_no_configurations(tmp_path):
    file = jsonl(tmp_path / "lists.jsonl", as_lists(QUESTIONS))
    with pytest.raises(ws.WsError, match="`config` is of a data set on the hub, and .*lists.jsonl is none"):
        load_questions(file, "generation")


def test_mc1_has_rivals_of_its_own_where_the_rows_say_so(tmp_path):
    rows = as_targets(QUESTIONS)
    rows[0]["mc1_targets"] = {"choices": ["A tree grows.", "Nothing happens."], "labels": [0, 1]}
    found = load_questions(jsonl(tmp_path / "targets.jsonl", rows))
    assert found[0].rivals == ("A tree grows.",)
    assert found[0].false == ("You die.", "A tree grows.")


@pytest.mark.skipif("WS_REAL_DATA" not in os.environ, reason="WS_REAL_DATA names no folder with the published samples")
def test_the_published_file_is_read():
    folder = Path(os.environ["WS_REAL_DATA"]) / "truthfulqa"
    found = load_questions(str(folder))
    assert len(found) == 500
    assert len({q.category for q in found}) == 38
    assert all(q.best in q.true and q.false for q in found)
    assert sum(len(q.answers) for q in found) / 500 == pytest.approx(7.17, abs=0.01)


def test_what_is_no_truthfulqa_is_explained(tmp_path, capsys):
    with pytest.raises(ws.WsError, match="bundled models come with no TruthfulQA"):
        load_questions("pocket")
    with pytest.raises(ws.WsError, match="no table of TruthfulQA: it needs the columns question, best_answer"):
        load_questions(jsonl(tmp_path / "other.jsonl", [{"question": "Q", "answer": "A"}]))
    with pytest.raises(ws.WsError, match="no file or folder ./nowhere"):
        load_questions("./nowhere")
    rows = as_targets(QUESTIONS) * 10
    rows[3] = rows[3] | {"mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}
    rows[7] = rows[7] | {"mc2_targets": {"choices": ["a", "b"], "labels": [1]}}
    assert len(load_questions(jsonl(tmp_path / "few.jsonl", rows))) == 48
    said = capsys.readouterr().err
    assert "row 4 lacks a question, a true answer or a false one" in said
    assert "row 8 " in said
    with pytest.raises(ws.WsError, match="at most 5%"):
        load_questions(jsonl(tmp_path / "many.jsonl", rows[:10]))


# ---- scores ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def whole_answer(model, tok, prompt: str, answer: str) -> float:
    """`log p(answer | prompt)`, token by token, in double precision."""
    ids = encode(tok, prompt)
    total = 0.0
    for token in encode_answer(tok, prompt, answer):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("packed", [True, False])
def test_scores_equal_a_forward_pass_per_answer(tiny, tmp_path, monkeypatch, packed):
    model, tok = tiny
    if not packed:
        monkeypatch.setattr(likelihood, "takes_masks", lambda model: False)
    items, exact = load_questions(str(questions_csv(tmp_path))), copy.deepcopy(model).double()
    assert len({len(q.answers) for q in items}) > 2, "questions differ in how many answers they have"
    for batch_size in (None, 1, 2):
        scores = evaluate_truthfulqa(model, tok, items, batch_size=batch_size)
        for i, q in enumerate(items):
            prompt = render_prompt(tok, q.text)
            best = whole_answer(exact, tok, prompt, q.best)
            true, false = (np.array([whole_answer(exact, tok, prompt, a) for a in of]) for of in (q.true, q.false))
            assert scores["logp_best"][i] == pytest.approx(best, abs=2e-4)
            assert scores["logp_false"][i] == pytest.approx(false.max(), abs=2e-4)
            assert scores["mc1"][i] == (best > false.max())
            assert scores["mc2"][i] == pytest.approx(np.exp(true).sum() / np.exp(np.r_[true, false]).sum(), abs=1e-4)


def test_the_scores_are_those_of_their_definitions():
    question = Question("1", "", "Q", "b.", ("f.",), ("a.", "b."), ("f.", "g."))
    odds = {"b.": 0.2, "f.": 0.1, "a.": 0.3, "g.": 0.4}
    scores = question_scores(question, [np.log(odds[a]) for a in question.answers])
    assert scores["mc2"] == pytest.approx(0.5)
    assert scores["mc1"] == 1, "g is likelier, and no rival of MC1"
    tie = question_scores(question, [np.log(0.1)] * 4)
    assert (tie["mc1"], tie["mc2"]) == (0, pytest.approx(0.5)), "a tie is not the best answer's"
    deep = question_scores(question, [-900.0, -905.0, -900.0, -5000.0])  # no probability of it is a float above 0
    assert deep["mc2"] == pytest.approx(2 / (2 + np.exp(-5.0)))


def test_the_published_examples_can_stand_before_the_question(tiny, tmp_path):
    model, tok = tiny
    items = load_questions(str(questions_csv(tmp_path)))
    words = Prompts(question="Q: Is water wet?\nA: Yes.\n\nQ: {question}\nA:")
    scores = evaluate_truthfulqa(model, tok, items[:1], words)
    prompt = render_prompt(tok, f"Q: Is water wet?\nA: Yes.\n\nQ: {items[0].text}\nA:")
    assert scores["logp_best"][0] == pytest.approx(whole_answer(model, tok, prompt, items[0].best), abs=2e-4)


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_categories_are_corrected_over_those_that_have_a_test():
    rng = np.random.default_rng(0)
    kinds = ["far"] * 8 + ["near"] * 8 + ["one"]
    items = [Question(str(i), kind, "Q", "t.", ("f.",), ("t.",), ("f.",)) for i, kind in enumerate(kinds)]
    noise = rng.normal(0, 0.02, (2, 17))
    base = dict.fromkeys(("mc1", "mc2", "logp_best", "logp_false"), np.full(17, 0.5))
    moved = np.r_[np.full(8, 0.2), np.zeros(8), 0.4]
    now = base | {"mc2": base["mc2"] + moved + noise[0], "mc1": base["mc1"] + noise[1]}
    rows = {r["category"]: r for r in category_rows({}, 1.0, items, now, base, 300)}
    assert rows["far"]["mc2_shift"] == pytest.approx((moved + noise[0])[:8].mean())
    assert rows["far"]["mc2_shift_p_holm"] == pytest.approx(min(1, 2 * rows["far"]["mc2_shift_p"]))
    assert rows["near"]["mc2_shift_p_holm"] == pytest.approx(rows["near"]["mc2_shift_p"])
    assert (rows["one"]["n"], rows["one"]["mc2_shift_ci_lo"], rows["one"]["mc2_shift_p_holm"]) == (1, None, None)
    assert rows["one"]["mc2_shift"] == pytest.approx(0.4 + noise[0][16])


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.3, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    return TruthfulqaOptions(out=tmp_path, dataset=str(questions_csv(tmp_path / "set")), n_bootstrap=100, device="cpu")


def test_the_command_writes_the_documented_tables(options, tiny, capsys):
    main(options)
    printed = capsys.readouterr().out
    assert "Worked example (question 1):" in printed
    assert "Shift of MC2, by category." in printed
    assert "without the published examples" in printed
    at = options.out / "honesty" / "lora"
    per_question, categories, summary = (
        read_csv(at / f"truthfulqa_{n}.csv") for n in ("per_question", "categories", "summary")
    )
    assert (len(per_question), len(categories)) == (3 * 5, 3 * 3)
    assert [r["alpha"] for r in summary] == ["-1.0", "0.0", "1.0"]
    assert {(r["words"], r["n"], r["n_think"]) for r in summary} == {("published", "5", "0")}
    model, tok = tiny
    items = load_questions(options.dataset)
    with ws.steer(model, ws.SteeringVector.load(at / "vector"), 1.0):
        steered = evaluate_truthfulqa(model, tok, items, batch_size=1)
    base = evaluate_truthfulqa(model, tok, items, batch_size=1)
    for name in ("mc1", "mc2"):
        assert float(summary[2][name]) == pytest.approx(steered[name].mean(), abs=1e-4)
        assert float(summary[2][f"{name}_shift"]) == pytest.approx((steered[name] - base[name]).mean(), abs=1e-4)
        shown = [float(r[name]) for r in per_question if r["alpha"] == "1.0"]
        assert shown == pytest.approx(steered[name], abs=1e-4)
    margin = [float(r["margin"]) for r in per_question if r["alpha"] == "0.0"]
    assert margin == pytest.approx(base["logp_best"] - base["logp_false"], abs=4e-4)


def test_a_draw_and_other_words_change_the_hash(options, tmp_path):
    whole = Truthfulqa.of_run(open_context(options))
    part = Truthfulqa.of_run(open_context(replace(options, limit=3)))
    assert {q.category for q in part.items} == {"Myths", "Places", "Law"}, "a draw is even over categories"
    assert part.facts["drawn"] == "3 of 5, seed 0"
    words = tmp_path / "examples.toml"
    words.write_text('question = "Q: {question}"\n')
    other = Truthfulqa.of_run(open_context(replace(options, prompts=words)))
    assert other.facts["words"].startswith("file:examples@")
    assert len({e.digest for e in (whole, part, other)}) == 3
    words.write_text('question = "{text}"\n')
    with pytest.raises(ws.WsError, match=r"must contain \{question\}"):
        Truthfulqa.of_run(open_context(replace(options, prompts=words)))


def test_a_table_of_targets_has_no_categories(options, tmp_path, capsys):
    main(replace(options, dataset=jsonl(tmp_path / "targets.jsonl", as_targets(QUESTIONS))))
    assert "by category" not in capsys.readouterr().out
    assert not (options.out / "honesty" / "lora" / "truthfulqa_categories.csv").exists()


def test_a_thought_before_a_given_answer_is_refused(options):
    with pytest.raises(ws.WsError, match="`n_think`"):
        replace(options, n_think=5).check()


def test_the_rows_of_the_support_are_the_published_columns(tmp_path):
    with questions_csv(tmp_path).open(encoding="utf-8", newline="") as handle:
        assert {"Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"} <= set(
            csv.DictReader(handle).fieldnames or ()
        )
