"""Arithmetic: how a number is read, thoughts and answers against a plain loop, planted losses of thought, tables."""

from __future__ import annotations

import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ws
from conftest import without_thinking
from support.knowledge import PROBLEMS, problems_jsonl
from ws.behaviors.tables import draw
from ws.data import repeated_ngrams
from ws.delta import LinearDelta
from ws.eval.arithmetic import (
    Arithmetic,
    Problem,
    evaluate_arithmetic,
    load_problems,
    main,
    plain_sums,
    read_number,
    render,
    right_answers,
    summary_row,
)
from ws.eval.context import open_context
from ws.files.runs import read_csv
from ws.lm.models import chat_format, encode, end_ids, fingerprint, render_prompt
from ws.lm.rollout import REASONS, thinking_prompt, write_out
from ws.options.measure import ArithmeticOptions

# ---- how a number is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16", "16"),
        ("The answer is 16.", "16"),
        ("3 + 4 = 7", "7"),
        ("He has 3 apples, so 12 are left over.", "12"),
        ("**1,450,000**", "1450000"),
        ("$1,234.50", "1234.50"),
        ("-$5", "-5"),
        ("$-5 in all", "-5"),
        ("It fell to \N{MINUS SIGN}3.5 degrees", "-3.5"),
        ("(-4)", "-4"),
        ("x = -4", "-4"),
        ("12-5", "5"),
        ("12 - 5", "5"),
        ("3 - 5 = -2", "-2"),
        ("(3)-5", "5"),
        ("50%", "50"),
        ("50%-20%", "20"),
        ("about 12km", "12"),
        ("\\boxed{42}", "42"),
        (".5", "0.5"),
        ("I think...5", "5"),
        ("0.50", "0.5"),
        ("5.", "5"),
        ("Numbers 3,4", "4"),
        ("1,2345", "2345"),
        ("Seven of CO2 and x2, so 6", "6"),
        ("The gas is CO2", None),
        ("none", None),
        ("", None),
        ("1/2", "2"),
        ("007", "7"),
        ("5e-05", "0.00005"),
        ("2e+20", "2" + "0" * 20),
        ("-1.5E3 m", "-1500"),
        ("2e", "2"),
        ("2e5x", "2"),
        ("2e1234", "2"),
        ("9" * 400, "9" * 400),
        ("-" + "9" * 400, "-" + "9" * 400),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert read_number(text) == (None if number is None else Decimal(number))


@given(
    st.decimals(min_value=-(10**9), max_value=10**9, places=2, allow_nan=False),
    st.sampled_from(["{}", "The answer is {}.", "7 + 8 = {} apples", "**{}**", "It costs {} dollars!", "= {}%"]),
    st.booleans(),
)
def test_any_number_is_read_back(number, frame, grouped):
    written = f"{number:,}" if grouped else f"{number:f}"
    assert read_number(frame.format(written)) == number


# ---- items ----------------------------------------------------------------------------------------------------------


def test_the_plain_sums_are_right_and_differ():
    sums = plain_sums()
    assert len({p.text for p in sums}) == len(sums) == 60
    for p in sums:
        asked = p.text.removeprefix("What is ").removesuffix("?")
        assert int(p.number) == eval(asked, {"__builtins__": {}}), p
    assert load_problems("sums") == load_problems("pocket") == sums
    drawn = draw(sums, 8, lambda p: p.kind)
    assert sorted(p.kind for p in drawn) == sorted(2 * ["addition", "subtraction", "multiplication", "two additions"])


@pytest.mark.parametrize("source", ["sums", "pocket"])
def test_the_plain_sums_have_no_revision(source):
    assert load_problems(source) == plain_sums()
    with pytest.raises(ws.WsError, match=f"`revision` is of a data set on the hub, and {source} is none"):
        load_problems(source, "main")


def test_problems_come_with_their_number(tmp_path, capsys):
    file = problems_jsonl(tmp_path / "set")
    assert [p.number for p in load_problems(str(file))] == ["7", "2000", "-5", "2.5"]
    assert load_problems(str(tmp_path / "set")) == load_problems(str(file)), "a folder that holds the one table"
    own = problems_jsonl(tmp_path / "own", (("What is 1 + 1?", 2), ("And 1 + 2?", "3")))
    assert [p.number for p in load_problems(str(own))] == ["2", "3"]
    floats = problems_jsonl(tmp_path / "floats", tuple((f"Q{i}", x) for i, x in enumerate((0.00005, 2e20, -2.0, 1e-7))))
    assert [Decimal(p.number) for p in load_problems(str(floats))] == [
        *map(Decimal, ("0.00005", "2e20", "-2", "0.0000001"))
    ]
    rows = [*PROBLEMS * 10, ("Q", "#### none"), ("", "#### 3"), ("Q", None), ("Q", True)]
    with pytest.raises(ws.WsError, match="at most 5%"):
        load_problems(str(problems_jsonl(tmp_path / "bad", tuple(rows))))
    assert len(load_problems(str(problems_jsonl(tmp_path / "few", tuple(rows[:42]))))) == 40
    assert "row 41 has no question or no number for an answer" in capsys.readouterr().err


@pytest.mark.skipif("WS_REAL_DATA" not in os.environ, reason="WS_REAL_DATA names no folder with the published samples")
def test_the_published_file_is_read():
    problems = load_problems(str(Path(os.environ["WS_REAL_DATA"]) / "gsm8k"))
    assert len(problems) == 100
    assert [p.number for p in problems[:4]] == ["16", "240", "80", "15"]
    assert "1450000" in {p.number for p in problems}


# ---- scores ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@torch.no_grad()
def greedily(model, start: list[int], n: int, stops: set[int]) -> tuple[list[int], int | None]:
    """At most `n` tokens without a cache, and the token that ended them, if one did."""
    ids: list[int] = []
    for _ in range(n):
        best = int(model(torch.tensor([start + ids])).logits[0, -1].argmax())
        if best in stops:
            return ids, best
        ids.append(best)
    return ids, None


ITEMS = tuple(Problem(str(i), "", q, "7") for i, (q, _) in enumerate(PROBLEMS[:3], start=1))


@pytest.mark.parametrize("n_think", [3, 40])
@pytest.mark.parametrize("which", ["tiny", "pocket"])
def test_thoughts_in_a_block_and_answers_are_those_of_a_plain_loop(which, n_think, tiny, pocket):
    model, tok = tiny if which == "tiny" else pocket
    close, ends = chat_format(tok).think_close_id, set(end_ids(model, tok))
    questions = [f"{p.text}\n\nAnswer with the number only." for p in ITEMS]
    scores = evaluate_arithmetic(model, tok, ITEMS, n_think=n_think, n_tokens=5, batch_size=2)
    written = write_out(model, tok, questions, n_think, 5, anchor="Answer:")
    for i, question in enumerate(questions):
        direct, _ = greedily(model, encode(tok, render_prompt(tok, question, opener="Answer:")), 5, ends)
        start = encode(tok, thinking_prompt(tok, question))
        thought, ended = greedily(model, start, n_think, {*ends, close})
        shut = ([] if ended == close else encode(tok, "\n")) + [close]
        answer, _ = greedily(model, start + thought + shut + encode(tok, "\n\nAnswer:"), 5, ends)
        assert written.thoughts[i] == thought
        assert written.answers[i] == answer
        assert (scores["n_tokens"][i], scores["forced"][i]) == (len(thought), ended != close)
        assert scores["repetition"][i] == repeated_ngrams(thought)
        assert scores["answer"][i] == tok.decode(answer, skip_special_tokens=True).strip()
        assert scores["direct"][i] == tok.decode(direct, skip_special_tokens=True).strip()


def test_a_model_without_a_block_is_asked_for_its_reasons(pocket):
    model, tok = pocket[0], without_thinking(pocket[1])
    ends = set(end_ids(model, tok))
    scores = evaluate_arithmetic(model, tok, ITEMS, n_think=12, n_tokens=4)
    for i, p in enumerate(ITEMS):
        text, ended = greedily(model, encode(tok, render_prompt(tok, p.text + REASONS)), 12, ends)
        assert scores["answer"][i] == tok.decode(text, skip_special_tokens=True).strip()
        assert (scores["n_tokens"][i], scores["forced"][i], scores["thought"][i]) == (len(text), ended is None, "")
    with pytest.raises(ws.WsError, match="no think block"):
        write_out(model, tok, ["Why?"], 3, 3)


def planted(n: int, thought_right: int, direct_right: int, tokens: int, n_forced: int) -> dict[str, np.ndarray]:
    """Scores of `n` problems whose number is 7."""
    return {
        "direct": np.array(["7"] * direct_right + ["8"] * (n - direct_right)),
        "direct_ended": np.full(n, True),
        "thought": np.full(n, ""),
        "answer": np.array(["3 + 4 = 7 apples"] * thought_right + ["I do not know"] * (n - thought_right)),
        "n_tokens": np.full(n, tokens),
        "forced": np.arange(n) < n_forced,
        "repetition": np.full(n, 0.25),
    }


def test_a_lost_thought_is_told_from_lost_answers():
    items = [Problem(str(i), "", "Q", "7") for i in range(40)]
    base, lost = planted(40, 32, 12, 50, 0), planted(40, 8, 12, 5, 20)
    row = summary_row({}, 1.0, items, lost, base, 300)
    assert (row["thought_accuracy"], row["direct_accuracy"]) == (0.2, 0.3)
    assert (row["thought_shift"], row["direct_shift"]) == (pytest.approx(-0.6), 0)
    assert (row["gain"], row["gain_shift"]) == (pytest.approx(-0.1), pytest.approx(-0.6))
    assert row["gain_shift_ci_hi"] < 0
    assert row["gain_shift_p"] < 1e-6
    assert row["direct_shift_ci_lo"] == row["direct_shift_ci_hi"] == 0
    assert (row["mean_thought_tokens"], row["thought_tokens_shift"]) == (5, -45)
    assert (row["share_closed"], row["closed_shift"]) == (0.5, -0.5)
    assert (row["thought_unread"], row["direct_unread"], row["n"]) == (32, 0, 40)
    zero = summary_row({}, 0.0, items, base, base, 300)
    text = [{k: str(v) for k, v in (r | {"n_think": 64}).items()} for r in (zero, row)]
    shown = render(text)
    assert "-0.600" in shown
    assert "32 / 0" in shown
    assert "at most 64 tokens of thought" in shown


def test_without_a_thought_there_are_answers_at_once_alone(pocket):
    scores = evaluate_arithmetic(*pocket, ITEMS, n_think=0, n_tokens=4)
    assert set(scores) == {"direct", "direct_ended"}
    evaluation = Arithmetic(items=ITEMS, n_think=0)
    assert set(evaluation.headlines(scores)) == {"direct_accuracy"}
    assert set(right_answers(ITEMS, scores)) == {"direct"}
    with pytest.raises(ws.WsError, match="n_think"):
        evaluation.tables({}, {0.0: scores}, 100)
    with pytest.raises(ws.WsError, match="no gradient"):
        evaluation.means(pocket[1], ["direct_accuracy"])


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(pocket, tmp_path):
    model, _ = pocket
    torch.manual_seed(0)
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    n_out, n_in = module.out_features, module.in_features
    delta = LinearDelta(n_out, n_in, u=torch.randn(n_out, 1), v=torch.randn(1, n_in))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "pocket", fingerprint(model))
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    return ArithmeticOptions(out=tmp_path, limit=4, n_think=12, n_tokens=6, n_bootstrap=100, device="cpu")


def test_the_command_writes_the_documented_tables(options, pocket, capsys):
    main(options)
    printed = capsys.readouterr().out
    assert "Worked example (problem " in printed
    assert "gain of thought" in printed
    at = options.out / "honesty" / "lora"
    problems, summary = (read_csv(at / f"arithmetic_{n}.csv") for n in ("per_problem", "summary"))
    assert len(problems) == 3 * 4
    assert {(r["words"], r["dataset"], r["drawn"], r["n_think"]) for r in summary} == {
        ("own", "pocket", "4 of 60, seed 0", "12")
    }
    items = draw(plain_sums(), 4, lambda p: p.kind)
    with ws.steer(pocket[0], ws.SteeringVector.load(at / "vector"), 1.0):
        steered = evaluate_arithmetic(*pocket, items, n_think=12, n_tokens=6)
    row = next(r for r in summary if r["alpha"] == "1.0")
    assert float(row["mean_thought_tokens"]) == pytest.approx(steered["n_tokens"].mean())
    assert float(row["share_closed"]) == pytest.approx(1 - steered["forced"].mean())
    assert float(row["thought_accuracy"]) == right_answers(items, steered)["thought"].mean()
    shown = [r for r in problems if r["alpha"] == "1.0"]
    assert [r["thought_answer"] for r in shown] == steered["answer"].tolist()
    assert [r["direct_answer"] for r in shown] == steered["direct"].tolist()


def test_what_is_asked_is_in_the_hash(options, tmp_path):
    context = open_context(options)
    made = Arithmetic.of_run(context)
    words = tmp_path / "terse.toml"
    words.write_text('number = "{question} Number:"\n')
    others = [replace(options, **change) for change in ({"n_tokens": 7}, {"n_think": 13}, {"prompts": words})]
    digests = {Arithmetic.of_run(replace(context, options=o)).digest for o in others}
    assert len(digests | {made.digest}) == 4
    assert made.prompts.reasons == "", "a model with a think block is asked for none"
    aloud = Arithmetic.of_run(replace(context, tok=without_thinking(context.tok)))
    assert aloud.prompts.reasons == REASONS


@pytest.mark.parametrize("change", [{"n_think": 0}, {"n_tokens": 0}, {"limit": 0}])
def test_options_that_make_no_sense_are_refused(options, change):
    with pytest.raises(ws.WsError, match=f"`{next(iter(change))}`"):
        replace(options, **change).check()
