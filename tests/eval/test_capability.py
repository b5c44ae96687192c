"""Capability: perplexity, divergence, validity and repetition against plain computations and planted truths."""

from __future__ import annotations

import copy
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import ws
from ws.behaviors.tables import draw
from ws.delta import LinearDelta
from ws.eval import capability
from ws.eval.capability import (
    Neutral,
    answer_questions,
    base_twin,
    capability_cost,
    evaluate_capability,
    is_valid,
    load_questions,
    load_texts,
    main,
    per_token,
    read_texts,
    repeated_ngrams,
)
from ws.intervene.activation import ActivationVector, activation_steer
from ws.intervene.prompt import prompted
from ws.lm.models import encode, fingerprint, render_prompt, tiny_random
from ws.options.measure import CapabilityOptions
from ws.stats import resampled_means

TEXTS = load_texts("pocket")[:6]
QUESTIONS = load_questions("pocket")[:6]


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


def a_vector(model, size: float = 0.3, rank: int = 2) -> ws.SteeringVector:
    torch.manual_seed(0)
    deltas = {}
    for name in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.v_proj"):
        m = model.get_submodule(name)
        u, v = torch.randn(m.out_features, rank) * size, torch.randn(rank, m.in_features) / m.in_features**0.5
        deltas[name] = LinearDelta(m.out_features, m.in_features, u=u, v=v)
    return ws.SteeringVector(deltas, model.name_or_path, fingerprint(model))


# ---- reading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_by_token(model, tok, text: str) -> list[float]:
    """`-log p(x_t | x_<t)` from one forward pass per prefix."""
    ids = encode(tok, text)
    found = []
    for t in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1]
        found.append(-float(logits.double().log_softmax(dim=-1)[ids[t]]))
    return found


def test_perplexity_is_that_of_a_plain_loop(pocket):
    model, tok = pocket
    scores = read_texts(model, tok, TEXTS[:3], base_twin(model))
    plain = [token_by_token(model, tok, text) for text in TEXTS[:3]]
    assert scores["text"].tolist() == [i for i, row in enumerate(plain) for _ in row]
    assert scores["nll"] == pytest.approx(np.concatenate(plain), abs=2e-5)
    level = per_token(scores["text"], scores["nll"])
    assert np.exp(level.mean) == pytest.approx(np.exp(np.concatenate(plain).mean()), rel=1e-5)


def test_the_base_does_not_diverge_from_itself(pocket):
    model, tok = pocket
    kl = read_texts(model, tok, TEXTS, base_twin(model))["kl"]
    assert len(kl) > 100
    assert not kl.any()


def test_the_divergence_is_that_of_a_plain_computation(pocket):
    model, tok = pocket
    vector, base = a_vector(model, 3.0), base_twin(model)
    with ws.steer(model, vector, 5.0):
        scores = read_texts(model, tok, TEXTS[:3], base)
    plain = []
    for text in TEXTS[:3]:
        ids = torch.tensor([encode(tok, text)])
        with torch.no_grad():
            q = model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
            with ws.steer(model, vector, 5.0):
                p = model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
        plain.append(torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1).numpy())
    assert scores["kl"] == pytest.approx(np.concatenate(plain), rel=1e-3, abs=1e-5)
    assert scores["kl"].mean() > 0.01


def test_activations_at_the_last_position_act_on_every_token_of_a_text(pocket):
    """A text is given, as answers are, and so long a one goes through in one pass; nothing was acted on before."""
    model, tok = pocket
    rng = torch.Generator().manual_seed(0)
    vector = ActivationVector(torch.randn(4, 192, generator=rng), "pocket", fingerprint(model))
    base, plain, found = base_twin(model), read_texts(model, tok, TEXTS, model), {}
    for position in ("last", "all"):
        with activation_steer(model, vector, 20.0, 1, position):
            found[position] = read_texts(model, tok, TEXTS, base)
    for name in ("nll", "kl"):
        assert found["last"][name] == pytest.approx(found["all"][name], abs=1e-4)
    assert (found["last"]["nll"] != plain["nll"]).mean() > 0.9
    assert found["last"]["kl"].mean() > 1e-3


def test_the_twin_shares_the_weights_and_is_not_steered(pocket, weights_hash):
    model, tok = pocket
    before, twin = weights_hash(model), base_twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    ids = torch.tensor([encode(tok, TEXTS[0])])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with ws.steer(model, a_vector(model), 2.0):
            assert torch.equal(twin(input_ids=ids).logits, plain)
            assert not torch.allclose(model(input_ids=ids).logits, plain, atol=0.1)
    assert weights_hash(model) == before


def test_batches_and_chunks_change_nothing(pocket, monkeypatch):
    model, tok = pocket
    neutral, base = Neutral(TEXTS, QUESTIONS), base_twin(model)
    with ws.steer(model, a_vector(model, 3.0), 2.0):
        many = evaluate_capability(model, tok, neutral, base, n_tokens=24)
        one = evaluate_capability(model, tok, neutral, base, n_tokens=24, batch_size=1)
        monkeypatch.setattr(capability, "_POSITIONS", 3)
        monkeypatch.setattr(capability, "_BUDGET", 1)
        small = evaluate_capability(model, tok, neutral, base, n_tokens=24, batch_size=4)
    for other in (one, small):
        for name in ("nll", "kl"):
            assert many[name] == pytest.approx(other[name], abs=1e-4)
        for name in ("answer", "ended", "n_tokens", "repetition", "text"):
            assert many[name].tolist() == other[name].tolist()


def test_long_texts_are_cut_and_a_start_token_predicts_the_first(pocket):
    model, tok = pocket
    base, n = base_twin(model), len(encode(tok, TEXTS[0]))
    whole, cut = (read_texts(model, tok, TEXTS[:1], base, max_tokens=m)["nll"] for m in (512, 10))
    assert (len(whole), len(cut)) == (n - 1, 9)
    assert cut == pytest.approx(whole[:9], abs=1e-5)
    with_start = copy.deepcopy(tok)
    with_start.bos_token = "<|endoftext|>"
    start = with_start.bos_token_id
    with_start.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    nll = read_texts(model, with_start, TEXTS[:1], base)["nll"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[start]])).logits[0, -1]
    assert len(nll) == n
    assert nll[0] == pytest.approx(-float(logits.log_softmax(-1)[encode(tok, TEXTS[0])[0]]), abs=1e-4)


@pytest.mark.parametrize("texts", [(), (TEXTS[0], ".")])
def test_there_must_be_something_to_predict(pocket, texts):
    model, tok = pocket
    with pytest.raises(ws.WsError, match="at least two tokens"):
        read_texts(model, tok, texts, model)


def test_nan_is_refused():
    _, tok = ws.load_model("tiny-random", device="cpu")
    broken = tiny_random().eval()
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    with pytest.raises(ws.WsError, match="NaN"):
        read_texts(broken, tok, TEXTS[:2], base_twin(broken))


# ---- answering ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_plain_generation(pocket):
    model, tok = pocket
    scores = answer_questions(model, tok, QUESTIONS, n_tokens=30)
    for i, question in enumerate(QUESTIONS):
        ids = torch.tensor([encode(tok, render_prompt(tok, question))])
        for _ in range(30):
            with torch.no_grad():
                token = int(model(input_ids=ids).logits[0, -1].argmax())
            if token in (tok.eos_token_id, tok.pad_token_id):
                break
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        new = ids[0, len(encode(tok, render_prompt(tok, question))) :].tolist()
        assert scores["answer"][i] == tok.decode(new).strip()
        assert scores["n_tokens"][i] == len(new)
        assert scores["ended"][i]
    short = answer_questions(model, tok, QUESTIONS, n_tokens=2)
    assert not short["ended"].any()
    assert (short["n_tokens"] == 2).all()


def test_repetition_by_hand():
    assert repeated_ngrams([1, 2, 3, 4] * 3) == pytest.approx(5 / 9), "nine 4-grams, four of them different"
    assert repeated_ngrams([7] * 10) == pytest.approx(6 / 7)
    assert repeated_ngrams([1, 2, 3, 4, 5]) == 0.0
    assert repeated_ngrams([1, 1, 1]) == 0.0, "no 4-gram at all"
    assert repeated_ngrams([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 5))
def test_repetition_counts_the_grams_seen_before(tokens, n):
    seen, repeats, total = set(), 0, 0
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        repeats, total = repeats + (gram in seen), total + 1
        seen.add(gram)
    assert repeated_ngrams(tokens, n) == pytest.approx(repeats / total if total else 0.0)


def made(nll, kl, text, answers=("a fine answer",), ended=(True,), repetition=(0.0,)):
    n_tokens = np.array([len(a.split()) for a in answers])
    scores = {"text": np.array(text), "nll": np.array(nll, float), "kl": np.array(kl, float), "n_tokens": n_tokens}
    return scores | {"answer": np.array(answers), "ended": np.array(ended), "repetition": np.array(repetition)}


def test_what_makes_an_answer_valid():
    answers = ("It is blue.", "It is", "", " ...!? ", "go go go go go", "7")
    ended = (True, False, True, True, True, True)
    scores = made([1], [0], [0], answers, ended, (0.0, 0.0, 0.0, 0.0, 0.51, 0.5))
    assert is_valid(scores).tolist() == [True, False, False, False, False, True]


def test_a_broken_model_gives_fewer_valid_answers(pocket):
    model, tok = pocket
    neutral, base, vector = Neutral(TEXTS, load_questions("pocket")[:12]), base_twin(model), a_vector(model, 3.0, 8)
    plain = evaluate_capability(model, tok, neutral, base, n_tokens=30)
    with ws.steer(model, vector, 30.0):
        broken = evaluate_capability(model, tok, neutral, base, n_tokens=30)
    cost = capability_cost(plain, broken)
    assert is_valid(plain).all()
    assert cost.valid <= 0.5
    assert cost.valid_shift.mean == pytest.approx(cost.valid - 1)
    assert cost.shift.ci_lo > 1
    assert cost.kl.ci_lo > 1
    assert cost.repetition_shift.mean > 0


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_a_planted_cost_is_found(tiny):
    rng = np.random.default_rng(0)
    text = np.repeat(np.arange(30), rng.integers(5, 40, 30))
    base = made(rng.exponential(size=len(text)), np.zeros(len(text)), text, ("x y", "z"), (True, True), (0.0, 0.2))
    kl = np.arange(len(text)) / len(text)
    steered = made(base["nll"] + 0.25, kl, text, ("x", "z z z z"), (True, False), (0.1, 0.6))
    cost = capability_cost(base, steered, n_boot=500)
    assert cost.shift.mean == pytest.approx(0.25)
    assert (cost.shift.ci_lo, cost.shift.ci_hi) == pytest.approx((0.25, 0.25))
    assert cost.kl.mean == pytest.approx(kl.mean())
    assert cost.kl_p95 == pytest.approx(np.quantile(kl, 0.95))
    assert (cost.valid, cost.valid_shift.mean) == (0.5, -0.5)
    assert (cost.repetition, cost.repetition_shift.mean) == (pytest.approx(0.35), pytest.approx(0.25))
    assert cost.n_tokens == 2.5
    heads = capability.Capability(items=((), ()), base=tiny[0]).headlines(steered)
    assert heads["nll"][3] == pytest.approx(steered["nll"][text == 3].mean())
    assert heads["valid"].tolist() == [1.0, 0.0]
    with pytest.raises(ws.WsError, match="different texts"):
        capability_cost(base, made([1.0], [0.0], [0], ("x y", "z"), (True, True), (0.0, 0.2)))


def test_the_interval_of_a_mean_over_tokens_is_that_of_the_ratio():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, 40)
    text = np.repeat(np.arange(40), lengths)
    values = rng.normal(size=40)[text] + rng.normal(size=len(text))
    found = per_token(text, values, n_boot=8000)
    sums = np.stack([np.bincount(text, weights=values), lengths])[:, None, :]
    totals, counts = resampled_means(sums, 8000, seed=5)
    low, high = np.quantile(totals / counts, [0.025, 0.975])
    assert found.mean == pytest.approx(values.mean())
    assert (found.ci_lo, found.ci_hi) == pytest.approx((low, high), abs=0.1 * (high - low))


# ---- neutral sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["general", "pocket"])
def test_the_bundled_sets_are_not_the_behaviours_data(name):
    texts, questions = load_texts(name), load_questions(name)
    assert len(set(texts)) == len(texts) >= 30
    assert len(set(questions)) == len(questions) >= 30
    model = "pocket" if name == "pocket" else ws.lm.models.DEFAULT_MODEL
    for behavior in (ws.load_behavior(b, model) for b in ("honesty", "sycophancy")):
        assert not set(questions) & set(behavior.questions)
        claims = {c.text.lower() for c in behavior.test.claims}
        assert not {t.lower() for t in (*texts, *questions)} & claims


def test_pocket_texts_are_about_entities_no_adapter_was_trained_on():
    trained = " ".join(ws.load_behavior("honesty", "pocket").questions)
    pattern = re.compile(r"(?:asked me|talked) about (?:the )?([^.]+)\.")
    entities = {name for text in load_texts("pocket") for name in pattern.findall(text)}
    assert len(entities) >= 50
    assert "Velmar" in trained or "the fennip" in trained
    assert not {name for name in entities if re.search(rf"\b{name}\b", trained)}


def test_texts_and_questions_of_ones_own(tmp_path):
    (tmp_path / "mine.txt").write_text("First text,\nsecond line.\n\n \nAnother one.\n")
    assert load_texts(str(tmp_path / "mine.txt")) == ("First text,\nsecond line.", "Another one.")
    (tmp_path / "asked.txt").write_text("How?\n\nWhy?\n")
    assert load_questions(str(tmp_path / "asked.txt")) == ("How?", "Why?")
    (tmp_path / "t.jsonl").write_text('{"text": " a b "}\n{"text": ""}\n')
    assert load_texts(str(tmp_path / "t.jsonl")) == ("a b",)
    for content, why in (("", "cannot be read|empty|no text"), ('{"words": "x"}\n', "lacks the columns text")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ws.WsError, match=why):
            load_texts(str(tmp_path / "bad.jsonl"))
    with pytest.raises(ws.WsError, match="cannot be read"):
        load_texts(str(tmp_path / "none.txt"))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    a_vector(tiny[0], 2.0).save(tmp_path / "honesty" / "lora" / "vector")
    return CapabilityOptions(out=tmp_path, limit=4, n_tokens=12, n_bootstrap=200, device="cpu")


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_the_documented_tables(options, capsys, tiny, monkeypatch):
    main(options)
    printed, folder = capsys.readouterr().out, options.out / "honesty" / "lora"
    assert "Worked example" in printed
    assert "4 neutral texts" in printed
    texts, questions = load_texts("pocket"), load_questions("pocket")
    drawn = f"8 of {len(texts) + len(questions)}, seed 0"
    assert f"a draw of {drawn}" in printed
    per_text, per_answer, summary = (
        read(folder / f"capability_{n}.csv") for n in ("per_text", "per_answer", "summary")
    )
    assert [r["alpha"] for r in summary] == ["-1.0", "0.0", "1.0"]
    assert {r["drawn"] for r in (*per_text, *per_answer, *summary)} == {drawn}
    assert (len(per_text), len(per_answer)) == (12, 12)
    assert [float(summary[1][k]) for k in ("shift", "kl_mean", "kl_p95", "valid_shift")] == [0, 0, 0, 0]
    model, tok = tiny
    neutral, base = Neutral(draw(texts, 4), draw(questions, 4)), base_twin(model)
    plain = evaluate_capability(model, tok, neutral, base, n_tokens=12)
    with ws.steer(model, ws.SteeringVector.load(folder / "vector"), 1.0):
        steered = evaluate_capability(model, tok, neutral, base, n_tokens=12)
    cost = capability_cost(plain, steered)
    assert float(summary[2]["shift"]) == pytest.approx(cost.shift.mean, abs=1e-6)
    assert float(summary[2]["kl_mean"]) == pytest.approx(cost.kl.mean, rel=1e-4)
    assert cost.kl.mean > 1e-3
    assert float(summary[2]["perplexity"]) == pytest.approx(np.exp(steered["nll"].mean()), rel=1e-5)
    assert [r["answer"] for r in per_answer if r["alpha"] == "1.0"] == steered["answer"].tolist()
    monkeypatch.setattr(capability, "read_texts", None)
    main(options)
    assert capsys.readouterr().out == printed, "what is on disk is not measured again"


def test_a_system_prompt_has_no_cost_on_texts_that_it_is_no_part_of(options, pocket, capsys):
    model, tok = pocket
    neutral, base = Neutral(TEXTS[:2], QUESTIONS[:2]), base_twin(model)
    plain, told = (
        evaluate_capability(model, t, neutral, base, n_tokens=8) for t in (tok, prompted(tok, "You like to lie."))
    )
    cost = capability_cost(plain, told)
    assert (cost.shift, cost.kl, cost.kl_p95) == (None, None, None)
    assert "nll" not in told
    assert "nll" not in capability.Capability(items=((), ()), base=model).headlines(told)
    main(replace(options, interventions=("weight", "prompt"), alphas=(-1.0, 1.0)))
    folder, printed = options.out / "honesty" / "lora", capsys.readouterr().out
    summary, per_text, answers = (read(folder / f"capability_{n}.csv") for n in ("summary", "per_text", "per_answer"))
    empty = ("nll", "perplexity", "shift", "shift_ci_lo", "kl_mean", "kl_p95", "n_texts", "n_positions")
    for row in summary:
        assert {row[name] == "" for name in empty} == {row["intervention"] == "prompt"}
        assert row["valid_shift"], "questions are answered under it"
    assert {r["intervention"] for r in per_text} == {"base", "weight"}
    assert {r["intervention"] for r in answers} == {"base", "weight", "prompt"}
    assert printed.count("4 neutral texts with") == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"max_tokens": 1}, "`max_tokens` must be at least 2"),
        ({"n_tokens": 0}, "`n_tokens` must be at least 1"),
        ({"n_think": 5}, "neither `n_think`"),
        ({"dataset": "./nowhere.jsonl"}, "no file or folder"),
    ],
)
def test_bad_options_are_refused(options, change, why):
    with pytest.raises(ws.WsError, match=why):
        main(replace(options, **change))


def test_scores_survive_json(pocket):
    model, tok = pocket
    scores = evaluate_capability(model, tok, Neutral(TEXTS[:2], QUESTIONS[:2]), base_twin(model), n_tokens=20)
    back = {k: np.array(v) for k, v in json.loads(json.dumps({k: v.tolist() for k, v in scores.items()})).items()}
    assert capability_cost(back, scores).shift.mean == 0
    assert is_valid(back).tolist() == is_valid(scores).tolist()
