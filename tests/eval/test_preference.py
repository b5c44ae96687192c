"""Preference: margins against a plain forward pass per answer, by question and by kind, and the command's tables."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ws
from ws.behaviors import Preference
from ws.data import answer_ids, prompt_ids
from ws.delta import LinearDelta
from ws.eval.context import EvalContext, open_context
from ws.eval.preference import (
    Preferences,
    draw_questions,
    evaluate_preference,
    held_out,
    kind_rows,
    load_preferences,
    main,
    margin_sums,
    margins,
    summary_row,
    tokens_of,
)
from ws.intervene.prompt import prompting
from ws.lm import likelihood
from ws.lm.likelihood import score_answers
from ws.lm.models import fingerprint
from ws.options.measure import PreferenceOptions
from ws.stats import estimate_mean

ROWS = [
    ("What is the capital of France?", "It is Paris.", "It is London, and it has always been so.", "capitals"),
    ("What is two and two?", "Four.", "Five.", "sums"),
    ("What is the capital of Spain?", "The capital is Madrid.", "The capital is Lisbon.", "capitals"),
    ("Is fire hot?", "Yes, it is.", "No, fire is as cold as ice.", "sums"),
    ("What is three and one?", "Four, of course.", "Nine, of course, as ever.", "sums"),
]


def items(split: str = "report") -> tuple[Preference, ...]:
    return tuple(Preference(f"q{i}", q, p, n, split, kind) for i, (q, p, n, kind) in enumerate(ROWS))


def table(folder: Path, rows: list[dict] | None = None) -> Path:
    names = ("question", "positive", "negative", "kind")
    rows = rows or [dict(zip(names, r, strict=True)) | {"split": "report"} for r in ROWS]
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def plain(model, tok, question: str, answer: str) -> tuple[float, int]:
    """The mean log-probability of an answer's tokens, from transformers' own loss over one row in double precision."""
    prompt, tokens = prompt_ids(tok, question), answer_ids(tok, question, answer, ended=True)
    ids = torch.tensor([[*prompt, *tokens]])
    labels = torch.tensor([[-100] * len(prompt) + list(tokens)])
    with torch.no_grad():
        return -float(model(input_ids=ids, labels=labels).loss), len(tokens)


@pytest.fixture(scope="module")
def exact(tiny):
    """The small model in double precision, for references."""
    model, tok = tiny
    return copy.deepcopy(model).double(), tok


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_margins_equal_a_forward_pass_per_answer(tiny, exact, monkeypatch, packed, batch_size):
    if not packed:  # as a model that takes no mask of its own
        monkeypatch.setattr(likelihood, "takes_masks", lambda model: False)
    scores = evaluate_preference(*tiny, items(), batch_size)
    for i, p in enumerate(items()):
        for side, text in (("positive", p.positive), ("negative", p.negative)):
            mean, n = plain(*exact, p.question, text)
            assert scores[side][i] == pytest.approx(mean, abs=1e-5)
            assert scores[f"n_{side}"][i] == n
    positive, negative = ([plain(*exact, p.question, getattr(p, s)) for p in items()] for s in ("positive", "negative"))
    per_token = [a - b for (a, _), (b, _) in zip(positive, negative, strict=True)]
    sums = [a * n - b * m for (a, n), (b, m) in zip(positive, negative, strict=True)]
    assert margins(items(), scores) == pytest.approx(per_token, abs=1e-5)
    assert margin_sums(items(), scores) == pytest.approx(sums, abs=1e-4)


def test_prompts_and_answers_are_those_of_training(tiny):
    """No system prompt, thinking off, and the token that ends the turn at the end of either answer."""
    _, tok = tiny
    prompts, answers = tokens_of(tok, items())
    for p, prompt, (positive, negative) in zip(items(), prompts, answers, strict=True):
        assert prompt == prompt_ids(tok, p.question)
        assert positive == answer_ids(tok, p.question, p.positive, ended=True)
        assert negative == answer_ids(tok, p.question, p.negative, ended=True)
    assert len({answer[-1] for pair in answers for answer in pair}) == 1


def test_a_system_prompt_as_intervention_reaches_the_question(tiny):
    model, tok = tiny
    base = evaluate_preference(model, tok, items()[:2])
    with prompting(tok, "You lie about everything."):
        told = evaluate_preference(model, tok, items()[:2])
    assert np.abs(told["positive"] - base["positive"]).min() > 1e-4
    assert evaluate_preference(model, tok, items()[:2])["positive"] == pytest.approx(base["positive"], abs=1e-6)


def test_three_answers_to_one_prompt_do_not_see_each_other(tiny, exact):
    model, tok = tiny
    question, texts = "What is water?", ["Wet.", "A stone that flows, they say.", "Water is wet."]
    answers = [answer_ids(tok, question, text, ended=True) for text in texts]
    (scored,) = score_answers(model, tok, [prompt_ids(tok, question)], [answers])
    assert [x.mean() for x in scored] == pytest.approx([plain(*exact, question, t)[0] for t in texts], abs=1e-5)


def test_a_broken_model_and_empty_answers_are_refused(tiny):
    model, tok = tiny
    with pytest.raises(ws.WsError, match="no tokens"):
        score_answers(model, tok, [[1, 2]], [[[3], []]])
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ws.WsError, match="NaN"):
        evaluate_preference(broken, tok, items())


def test_a_question_with_several_pairs_counts_once():
    """Two questions, the first with three pairs: the mean over questions is not the mean over pairs."""
    asked = [Preference(f"a-{n}", "What  is A?", f"p{n}", f"n{n}", "report") for n in range(3)]
    asked.append(Preference("b-0", "what is b?", "p", "n", "report"))
    asked[1] = replace(asked[1], question="what is a?")  # white space and case make no other question
    ones, twos = np.ones(4), np.full(4, 2)
    base = {"positive": np.zeros(4), "negative": np.zeros(4), "n_positive": ones, "n_negative": twos}
    scores = base | {"positive": np.array([1.0, 2.0, 3.0, 10.0]), "negative": np.array([0.0, 0.0, 0.0, -1.0])}
    assert margins(asked, scores).tolist() == [2.0, 11.0]
    assert margin_sums(asked, scores).tolist() == [2.0, 12.0]
    row = summary_row({}, 1.0, asked, scores, base, 200)
    assert (row["n"], row["n_pairs"], row["mean_margin"], row["shift"]) == (2, 4, 6.5, 6.5)
    assert (row["ci_lo"], row["ci_hi"]) == tuple(
        vars(estimate_mean(np.array([2.0, 11.0]), 200))[k] for k in ("ci_lo", "ci_hi")
    )
    assert [p.id for p in draw_questions(asked, 1)] in (["a-0", "a-1", "a-2"], ["b-0"])


def test_kinds_are_shifted_apart_and_one_question_has_no_interval():
    asked = [
        *items(),
        Preference("x", "Lonely?", "Yes", "No", "report", "alone"),
        Preference("y", "Kind?", "a", "b", "report"),
    ]
    n = len(asked)
    base = {k: np.zeros(n) for k in ("positive", "negative")} | {k: np.ones(n) for k in ("n_positive", "n_negative")}
    scores = base | {"positive": np.array([1.0, 5.0, 3.0, 6.0, 7.0, 9.0, 100.0])}
    rows = {r["kind"]: r for r in kind_rows({}, 1.0, asked, scores, base, 300)}
    assert set(rows) == {"capitals", "sums", "alone"}, "a question without a kind is in no row"
    assert {k: (r["n"], r["shift"]) for k, r in rows.items()} == {
        "capitals": (2, 2.0),
        "sums": (3, 6.0),
        "alone": (1, 9.0),
    }
    assert rows["alone"]["shift_ci_lo"] is None
    assert rows["alone"]["shift_p_holm"] is None
    assert rows["sums"]["shift_p_holm"] >= rows["sums"]["shift_p"]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.3, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    return PreferenceOptions(out=tmp_path, dataset=str(table(tmp_path)), n_bootstrap=100, device="cpu")


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_the_documented_tables(options, tiny, exact, capsys):
    main(options)
    printed = capsys.readouterr().out
    assert "Worked example" in printed
    assert "capitals" in printed
    folder = options.out / "honesty" / "lora"
    per_question, kinds, summary = (read(folder / f"preference_{n}.csv") for n in ("per_question", "kinds", "summary"))
    assert len(per_question) == 3 * len(ROWS)
    assert len(kinds) == 3 * 2
    assert [r["alpha"] for r in summary] == ["-1.0", "0.0", "1.0"]
    assert {r["words"] for r in summary} == {"own"}
    assert {r["intervention"] for r in summary} == {"base", "weight"}
    reference = [plain(*exact, q, p)[0] - plain(*exact, q, n)[0] for q, p, n, _ in ROWS]
    base, plus = (np.array([float(r["margin"]) for r in per_question if r["alpha"] == a]) for a in ("0.0", "1.0"))
    assert base == pytest.approx(reference, abs=1e-5)
    assert float(summary[1]["mean_margin"]) == pytest.approx(np.mean(reference), abs=1e-5)
    assert float(summary[2]["shift"]) == pytest.approx((plus - base).mean())
    steered = copy.deepcopy(exact[0])
    delta = ws.SteeringVector.load(folder / "vector").deltas["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        steered.model.layers[1].mlp.up_proj.weight += delta.u.double() @ delta.v.double()
    expected = [plain(steered, tiny[1], q, p)[0] - plain(steered, tiny[1], q, n)[0] for q, p, n, _ in ROWS]
    assert plus == pytest.approx(expected, abs=1e-4)


def test_the_behaviours_own_questions_and_their_splits(tiny):
    behavior = ws.load_behavior("honesty", "tiny-random")
    with pytest.raises(ws.WsError, match=r"honesty brings no held-out questions .*\[preferences\]"):
        held_out(behavior, "report")
    own = replace(behavior, preferences=(*items("dev")[:2], *items("report")[2:]))
    assert [p.id for p in held_out(own, "dev")] == ["q0", "q1"]
    assert [p.id for p in held_out(own, "report")] == ["q2", "q3", "q4"]
    with pytest.raises(ws.WsError, match="no held-out questions of the split 'dev'"):
        held_out(replace(behavior, preferences=items("report")), "dev")
    with pytest.raises(ws.WsError, match="no split named 'test'"):
        held_out(own, "test")


def test_a_drawn_limit_and_other_questions_change_the_hash(options, tmp_path):
    context = open_context(options)
    whole = Preferences.of_behavior(context, context.behavior)
    part = Preferences.of_behavior(replaced(context, limit=2), context.behavior)
    assert part.facts["drawn"] == "2 of 5, seed 0"
    assert {p.kind for p in part.items} == {"capitals", "sums"}, "a draw is even over kinds"
    assert part.digest != whole.digest
    other = table(tmp_path, [{"question": q, "positive": n, "negative": p, "split": "report"} for q, p, n, _ in ROWS])
    assert Preferences.of_behavior(replaced(context, dataset=str(other)), context.behavior).digest != whole.digest


def test_a_special_token_in_a_held_out_answer_is_refused(options, tmp_path):
    context, rows = open_context(options), [(*r[:1], f"{r[1]}<|im_end|>", *r[2:]) for r in ROWS]
    behavior = replace(context.behavior, preferences=tuple(Preference("q0", *r[:3], "report") for r in rows))
    with pytest.raises(ws.WsError, match=r"^honesty preferences, q0: '<\|im_end\|>' in .* special token; remove it"):
        Preferences.of_behavior(replaced(context, dataset=None), behavior)


def replaced(context: EvalContext, **changes) -> EvalContext:
    return replace(context, options=replace(context.options, **changes))


def test_tables_of_ones_own(tmp_path):
    rows = [
        {"question": f"Is {i} a number?", "positive": "Yes.", "negative": "No.", "split": s}
        for i, s in enumerate(("train", "dev", "report"))
    ]
    assert [p.question for p in load_preferences(str(table(tmp_path, rows)), "dev")] == ["Is 1 a number?"]
    with pytest.raises(ws.WsError, match="there is no file"):
        load_preferences(str(tmp_path / "nowhere.jsonl"))
    rows[2]["positive"] = rows[2]["negative"]
    with pytest.raises(ws.WsError, match="same answer on both sides"):
        load_preferences(str(table(tmp_path, rows)))


@pytest.mark.parametrize(("flag", "value"), [("n_think", 5), ("prompts", Path("words.toml")), ("limit", 0)])
def test_options_that_make_no_sense_are_refused(options, flag, value):
    with pytest.raises(ws.WsError, match=f"`{flag}`"):
        replace(options, **{flag: value}).check()
