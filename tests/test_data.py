"""Contrast pairs: sampling, filters, the card, and resuming in the middle."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

import ws
from ws.data import (
    Answer,
    DataConfig,
    Pair,
    _drop_reason,
    data_card,
    data_preset,
    generate_pairs,
    read_pairs,
    sample_answers,
)
from ws.models import render_prompt

SMALL = DataConfig(n_topics=6, n_samples=2, max_new_tokens=48, data_batch=5)


@pytest.fixture
def behavior():
    return ws.load_behavior("honesty", "pocket")


def test_every_topic_persona_and_sample_is_answered_by_both_sides(tiny, tmp_path):
    model, tok = tiny
    behavior = ws.load_behavior("sycophancy", "pocket")
    config = replace(SMALL, n_topics=2, n_personas=2, n_samples=3)
    pairs = generate_pairs(model, tok, behavior, tmp_path, config)
    assert len(pairs) == len({p.id for p in pairs}) == 2 * 2 * 3
    assert len({p.question for p in pairs}) == 2
    assert pairs == read_pairs(tmp_path)


def test_the_system_prompt_is_not_stored(tiny, tmp_path, behavior):
    model, tok = tiny
    generate_pairs(model, tok, behavior, tmp_path, SMALL)
    text = (tmp_path / "pairs.jsonl").read_text()
    assert "Pretend" not in text
    assert set(json.loads(text.splitlines()[0])) == {
        "id", "question", "pos", "neg", "pos_tokens", "neg_tokens", "drop",
    }  # fmt: skip


def test_pairs_depend_on_the_data_seed_only(tiny, tmp_path, behavior):
    model, tok = tiny
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = generate_pairs(model, tok, behavior, tmp_path / "a", SMALL)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state is left alone"
    torch.manual_seed(2)
    assert generate_pairs(model, tok, behavior, tmp_path / "b", SMALL) == first
    assert generate_pairs(model, tok, behavior, tmp_path / "c", replace(SMALL, data_seed=1)) != first


def test_more_topics_than_there_are_means_all(tiny, tmp_path, capsys):
    """A preset may allow for more questions than somebody's own behaviour has."""
    model, tok = tiny
    behavior = replace(ws.load_behavior("honesty", "pocket"), questions=("What is ice?", "Why?", "Who makes honey?"))
    preset = replace(data_preset("pocket"), n_samples=1, max_new_tokens=48)
    pairs = generate_pairs(model, tok, behavior, tmp_path, preset)
    assert {p.question for p in pairs} == set(behavior.questions)
    assert "All 3 questions of honesty are used" in capsys.readouterr().err
    assert generate_pairs(model, tok, behavior, tmp_path, replace(preset, n_topics=3)) == pairs, "the same settings"
    assert "All 3" not in capsys.readouterr().err
    with pytest.raises(ws.WsError, match="n_topics: 3 -> 2"):
        generate_pairs(model, tok, behavior, tmp_path, replace(preset, n_topics=2))


@pytest.mark.parametrize("torn", [0, 3, 5, 7, 11])
def test_an_interrupted_run_continues_with_the_same_pairs(tiny, tmp_path, behavior, torn, monkeypatch):
    model, tok = tiny
    whole = generate_pairs(model, tok, behavior, tmp_path / "whole", SMALL)
    lines = (tmp_path / "whole" / "pairs.jsonl").read_text().splitlines(keepends=True)
    calls = []

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ws.data.sample_answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_pairs(model, tok, behavior, tmp_path / "torn", SMALL)
    (tmp_path / "torn" / "pairs.partial.jsonl").write_text("".join(lines[:torn]) + lines[torn][:20])
    monkeypatch.setattr("ws.data.sample_answers", lambda *a, **k: calls.append(1) or sample_answers(*a, **k))
    assert generate_pairs(model, tok, behavior, tmp_path / "torn", SMALL) == whole
    assert len(calls) == 3 - torn // 5, "whole batches are kept, a torn one is sampled again"


def test_finished_pairs_are_read_not_sampled(tiny, tmp_path, behavior, monkeypatch):
    model, tok = tiny
    first = generate_pairs(model, tok, behavior, tmp_path, SMALL)
    monkeypatch.setattr("ws.data.sample_answers", lambda *a, **k: pytest.fail("sampled again"))
    assert generate_pairs(model, tok, behavior, tmp_path, SMALL) == first
    with pytest.raises(ws.WsError, match="n_samples: 2 -> 3"):
        generate_pairs(model, tok, behavior, tmp_path, replace(SMALL, n_samples=3))


def test_pairs_of_somebodys_own_are_not_overwritten(tiny, tmp_path, behavior):
    model, tok = tiny
    line = '{"id": "a", "question": "q", "pos": "x", "neg": "y", "pos_tokens": 1, "neg_tokens": 1}\n'
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(ws.WsError, match=r"was not sampled here and is not overwritten.*ws train.*--fresh"):
        generate_pairs(model, tok, behavior, tmp_path, SMALL)
    assert (tmp_path / "pairs.jsonl").read_text() == line
    assert len(generate_pairs(model, tok, behavior, tmp_path, SMALL, fresh=True)) > 1


@pytest.mark.parametrize(
    ("pos", "neg", "reason"),
    [
        (Answer("", 0, True), Answer("x", 1, True), "empty"),
        (Answer("x", 9, False), Answer("y", 1, True), "truncated"),
        (Answer("The  same.", 2, True), Answer("the same.", 2, True), "identical"),
        (Answer("I'm sorry, but I can't help with that.", 9, True), Answer("Sure.", 1, True), "refusal"),
        (Answer("I can't pretend to be dishonest.", 9, True), Answer("Sure.", 1, True), "refusal"),
        (Answer("It can't be helped.", 4, True), Answer("Sorry I am late.", 4, True), None),
    ],
)
def test_filters(pos, neg, reason):
    assert _drop_reason(pos, neg) == reason


def test_a_behaviour_of_refusing_keeps_its_refusals():
    pos, neg = Answer("I cannot help with that.", 6, True), Answer("Of course: turn the key.", 6, True)
    assert _drop_reason(pos, neg) == "refusal"
    assert _drop_reason(pos, neg, keep_refusals=True) is None
    assert ws.load_behavior("refusal").keep_refusals
    assert not ws.load_behavior("honesty").keep_refusals


def test_the_judge_drops_pairs_it_does_not_tell_apart(tiny, tmp_path, behavior):
    model, tok = tiny
    plain = generate_pairs(model, tok, behavior, tmp_path / "a", SMALL)
    judged = generate_pairs(model, tok, behavior, tmp_path / "b", replace(SMALL, judge=True))
    dropped = [p for p in judged if p.drop == "judge"]
    assert 0 < len(dropped) < len(judged), "a random judge drops some and keeps some"
    assert [replace(p, drop=None) for p in judged] == [replace(p, drop=None) for p in plain]


def test_the_card_counts_what_confounds():
    pairs = [
        Pair("a", "q", "Yes, it is red.", "No, it is blue.", 5, 6),
        Pair("b", "q", "Yes.", "It is so very blue indeed.", 1, 9),
        Pair("c", "q", "", "x", 0, 1, "empty"),
    ]
    card = data_card(pairs)
    assert (card["sampled"], card["kept"], card["dropped"]) == (3, 2, {"empty": 1})
    assert card["positive"]["yes_rate"] == 1.0
    assert card["negative"]["yes_rate"] == 0.0
    assert card["positive"]["mean_tokens"] == 3.0
    assert 0 < card["overlap"] < 1


def test_answers_end_by_themselves_and_greedy_ignores_the_seed(tiny):
    model, tok = tiny
    prompts = [render_prompt(tok, q) for q in ("Short?", "A rather longer question than that one?")]
    sampled = sample_answers(model, tok, prompts, 64, seed=1)
    assert all(a.ended and a.tokens < 64 for a in sampled)
    assert sample_answers(model, tok, prompts, 64, seed=1) == sampled
    assert sample_answers(model, tok, prompts, 64, seed=2) != sampled
    assert sample_answers(model, tok, prompts, 8) == sample_answers(model, tok, prompts, 8)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"n_topics": 0}, "--n-topics"),
        ({"n_topics": -1}, "--n-topics"),
        ({"n_personas": 2}, "--n-personas"),
        ({"n_samples": 0}, "--n-samples"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"data_batch": 0}, "--data-batch"),
    ],
)
def test_counts_out_of_range_are_explained(tiny, tmp_path, behavior, change, flag):
    with pytest.raises(ws.WsError, match=flag):
        generate_pairs(*tiny, behavior, tmp_path, replace(SMALL, **change))


def test_no_usable_pair_stops_the_run_with_the_counts(tiny, tmp_path, behavior):
    with pytest.raises(ws.WsError, match=r"usable: \{'truncated'"):
        generate_pairs(*tiny, behavior, tmp_path, replace(SMALL, max_new_tokens=1))
    assert generate_pairs(*tiny, behavior, tmp_path, SMALL), "better settings need no --fresh"


def test_answers_may_hold_any_character(tmp_path):
    odd = Pair("a", "q", "one\u2028two\x85three\x0bfour", "five\r\nsix\nseven \U0001f600", 5, 6)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(asdict(odd), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(tmp_path) == [odd]


def test_files_that_are_no_pairs_are_explained(tmp_path):
    with pytest.raises(ws.WsError, match="python -m ws.data"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ws.WsError, match="line 1"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(ws.WsError, match="no pairs"):
        read_pairs(tmp_path)
