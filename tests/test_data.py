"""Contrast pairs: sampling, filters, the card, and resuming in the middle."""

from __future__ import annotations

import copy
import json
import shlex
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import ws
from conftest import reworded
from ws.console import parse
from ws.data import (
    Answer,
    Pair,
    _as_pairs,
    _drop_reason,
    _jobs,
    data_card,
    generate_pairs,
    main,
    read_pairs,
    sample_answers,
)
from ws.files.runs import Run
from ws.intervene.prompt import prompted
from ws.lm.generation import PLAIN
from ws.lm.models import end_ids, render_prompt
from ws.lm.sampling import sample_rows
from ws.options.make import DataCommand, DataConfig, ReplicateConfig, data_preset

SMALL = DataConfig(n_topics=6, n_samples=2, max_new_tokens=16, data_batch=5, anyway=True)


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
    generate_pairs(model, tok, behavior, tmp_path, replace(SMALL, max_new_tokens=48))  # so that some answers end
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


def questions_asked(behavior, config):
    return list(dict.fromkeys(job.question for job in _jobs(behavior, config)))


@pytest.mark.parametrize("total", [1, 4, 5, 9, 20, 100, 216])
def test_by_default_every_fifth_question_is_left_for_calibration(behavior, total):
    pool = [f"Question {i}?" for i in range(total)]
    some = replace(behavior, questions=tuple(pool))
    asked = questions_asked(some, DataConfig())
    assert len(asked) == total - total // 5
    left = [i for i, q in enumerate(pool) if q not in asked]
    assert set(np.diff(left)) <= {5, 6}, "evenly spread"
    assert questions_asked(some, DataConfig(n_topics=total + 1)) == asked, "at most so many is no wish for all"
    assert questions_asked(some, DataConfig(n_topics=total)) == pool, "the exact number is"


@pytest.mark.parametrize(("name", "left"), [("honesty", 188), ("sycophancy", 16)])
def test_the_pocket_preset_asks_what_it_always_asked(name, left):
    behavior = ws.load_behavior(name, "pocket")
    total = len(behavior.questions)
    asked = questions_asked(behavior, data_preset("pocket"))
    assert asked == [behavior.questions[i * total // 400] for i in range(400)]
    assert total - len(asked) == left


def test_more_topics_than_there_are_are_a_limit(tiny, tmp_path, capsys):
    """A preset may allow for more questions than somebody's own behaviour has."""
    model, tok = tiny
    pool = tuple(f"What is {thing}?" for thing in ("ice", "honey", "rain", "bread", "a river", "the moon"))
    behavior = replace(ws.load_behavior("honesty", "pocket"), questions=pool)
    preset = replace(data_preset("pocket"), n_samples=1, max_new_tokens=48, anyway=True)
    pairs = generate_pairs(model, tok, behavior, tmp_path, preset)
    assert {p.question for p in pairs} == set(pool) - {"What is the moon?"}
    assert "5 of 6 questions of honesty are asked; the others are left" in capsys.readouterr().err
    assert generate_pairs(model, tok, behavior, tmp_path, replace(preset, n_topics=5)) == pairs, "the same settings"
    assert "left for" not in capsys.readouterr().err
    with pytest.raises(ws.WsError, match="n_topics: 5 -> 6"):
        generate_pairs(model, tok, behavior, tmp_path, replace(preset, n_topics=6))


@pytest.mark.parametrize("margin", [float("nan"), float("inf")])
def test_a_margin_that_is_no_number_is_said_before_anything_is_made(tiny, tmp_path, behavior, margin):
    with pytest.raises(ws.WsError, match="min_margin`? must be a number of nats per token"):
        generate_pairs(*tiny, behavior, tmp_path / "none", replace(SMALL, min_margin=margin))
    assert not (tmp_path / "none").exists()


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
    with (tmp_path / "torn" / "pairs.partial.jsonl").open("a") as partial:
        partial.write("".join(lines[:torn]) + lines[torn][:20])
    monkeypatch.setattr("ws.data.sample_answers", lambda *a, **k: calls.append(1) or sample_answers(*a, **k))
    assert generate_pairs(model, tok, behavior, tmp_path / "torn", SMALL) == whole
    assert len(calls) == 3 - torn // 5, "whole batches are kept, a torn one is sampled again"


def test_a_run_cut_off_before_publishing_loses_nothing(tiny, tmp_path, behavior, monkeypatch):
    """Between the last batch and the finished file, and between that and the record of it."""
    model, tok = tiny
    whole = generate_pairs(model, tok, behavior, tmp_path / "whole", SMALL)
    wanted = (tmp_path / "whole" / "pairs.jsonl").read_bytes()
    for name in ("write_text", "write_json"):  # the pairs, then their card
        folder = tmp_path / name
        monkeypatch.setattr("ws.data.sample_answers", sample_answers)
        real = getattr(ws.data, name)

        def cut_off(file, value, real=real):
            if file.name in ("pairs.jsonl", "card.json"):
                raise KeyboardInterrupt
            return real(file, value)

        with monkeypatch.context() as patch:
            patch.setattr(f"ws.data.{name}", cut_off)
            with pytest.raises(KeyboardInterrupt):
                generate_pairs(model, tok, behavior, folder, SMALL)
        assert (folder / "pairs.jsonl").exists() == (name == "write_json")
        assert not Run(folder).is_finished("pairs", Run(folder).manifest["stages"]["pairs"]["config"])
        monkeypatch.setattr("ws.data.sample_answers", lambda *a, **k: pytest.fail("sampled again"))
        assert generate_pairs(model, tok, behavior, folder, SMALL) == whole
        assert (folder / "pairs.jsonl").read_bytes() == wanted
        assert not (folder / "pairs.partial.jsonl").exists()


@pytest.mark.parametrize("lost", ["manifest", "header", "header and manifest"])
def test_half_a_sampling_of_other_settings_is_not_continued(tiny, tmp_path, behavior, lost, monkeypatch, capsys):
    model, tok = tiny
    whole = generate_pairs(model, tok, behavior, tmp_path / "whole", SMALL)
    other, folder = replace(SMALL, data_seed=7, n_samples=3), tmp_path / "torn"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ws.data._publish", mock.Mock(side_effect=KeyboardInterrupt))
        generate_pairs(model, tok, behavior, folder, other)
    partial = folder / "pairs.partial.jsonl"
    begun = partial.read_text()
    assert begun.count("\n") == 1 + 6 * 3
    with pytest.raises(ws.WsError, match="data_seed: 7 -> 0"):
        generate_pairs(model, tok, behavior, folder, SMALL)
    assert partial.read_text() == begun
    if "manifest" in lost:
        (folder / "manifest.json").unlink()
    if "header" in lost:
        partial.write_text(begun.split("\n", 1)[1])
    settings = SMALL if "manifest" in lost else other
    found = generate_pairs(model, tok, behavior, folder, settings)
    assert "pairs.partial.jsonl was begun with other settings" in capsys.readouterr().err
    assert (found == whole) == (settings is SMALL)
    assert (folder / "pairs.jsonl").read_text().count("\n") == len(found) == 6 * settings.n_samples


def test_pairs_that_were_changed_by_hand_are_not_sampled_over(tiny, tmp_path, behavior):
    model, tok = tiny
    generate_pairs(model, tok, behavior, tmp_path, SMALL)
    curated = "".join((tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)[::2])
    (tmp_path / "pairs.jsonl").write_text(curated)
    with pytest.raises(ws.WsError, match="was changed after it had been sampled and is not overwritten"):
        generate_pairs(model, tok, behavior, tmp_path, SMALL)
    assert (tmp_path / "pairs.jsonl").read_text() == curated


def test_finished_pairs_are_read_not_sampled(tiny, tmp_path, behavior, monkeypatch):
    model, tok = tiny
    first = generate_pairs(model, tok, behavior, tmp_path, SMALL)
    monkeypatch.setattr("ws.data.sample_answers", lambda *a, **k: pytest.fail("sampled again"))
    assert generate_pairs(model, tok, behavior, tmp_path, SMALL) == first
    with pytest.raises(ws.WsError, match="n_samples: 2 -> 3"):
        generate_pairs(model, tok, behavior, tmp_path, replace(SMALL, n_samples=3))


def test_pairs_of_another_template_or_tokenizer_are_not_gone_on_with(tiny, tmp_path, behavior, monkeypatch):
    model, tok = tiny
    generate_pairs(model, tok, behavior, tmp_path / "whole", SMALL)
    calls = []

    def interrupted(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return sample_answers(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ws.data.sample_answers", interrupted)
        generate_pairs(model, tok, behavior, tmp_path / "torn", SMALL)
    assert len((tmp_path / "torn" / "pairs.partial.jsonl").read_text().splitlines()) == 6, "its settings and a batch"
    other = copy.deepcopy(tok)
    other.add_tokens(["zyx"])
    for folder in ("whole", "torn"):
        for changed in (reworded(tok), other):
            with pytest.raises(ws.WsError, match="made with other settings .tokenizer_hash: "):
                generate_pairs(model, changed, behavior, tmp_path / folder, SMALL)
    generate_pairs(model, prompted(tok, "Lie."), behavior, tmp_path / "torn", SMALL)
    assert read_pairs(tmp_path / "torn") == read_pairs(tmp_path / "whole"), "personas are given, not taken from it"


def test_pairs_of_somebodys_own_are_not_overwritten(tiny, tmp_path, behavior):
    model, tok = tiny
    line = '{"id": "a", "question": "q", "pos": "x", "neg": "y", "pos_tokens": 1, "neg_tokens": 1}\n'
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(ws.WsError, match=r"was not sampled here and is not overwritten.*ws train.*`fresh`"):
        generate_pairs(model, tok, behavior, tmp_path, SMALL)
    assert (tmp_path / "pairs.jsonl").read_text() == line
    for _ in range(2):
        assert len(generate_pairs(model, tok, behavior, tmp_path, SMALL, fresh=True)) > 1
    assert (tmp_path / "pairs.before-1.jsonl").read_text() == line
    assert not (tmp_path / "pairs.before-2.jsonl").exists(), "what was sampled here is simply made again"


def test_an_answer_that_spells_out_a_special_token_is_not_trained_on(tiny, behavior):
    """A model may write the end of turn in pieces; read back it is one token, and the answer would go on behind it."""
    jobs, plain = _jobs(behavior, DataConfig())[:2], Answer("Ice is cold.", 4, True)
    both = [(jobs[0], plain, Answer("It is<|im_end|> hot.", 9, True)), (jobs[1], plain, Answer("It is hot.", 4, True))]
    assert [p.drop for p in _as_pairs(*tiny, behavior, both, DataConfig())] == ["special", None]


def test_the_command_says_what_it_will_take_and_stops_where_there_is_no_room(tmp_path, monkeypatch, capsys):
    command = DataCommand(model="tiny-random", behavior="honesty", out=tmp_path / "out", device="cpu", data=SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("ws.lm.cost.shutil.disk_usage", lambda place: SimpleNamespace(free=0))
        with pytest.raises(ws.WsError, match=r"0\.0 GiB free for .*needs up to"):
            main(command)
    assert not (tmp_path / "out").exists()
    main(command)
    assert "It will take about" in capsys.readouterr().err
    main(command)
    assert "It will take about" not in capsys.readouterr().err, "nothing is left to be done"


@pytest.mark.parametrize("model", ["tiny-random", "smollm2"])
def test_the_next_command_trains_as_the_preset_of_the_model_does(tmp_path, monkeypatch, capsys, tiny, model):
    """It named the settings of real models, with which the small ones learn something else."""
    monkeypatch.setattr("ws.data.load_model", lambda *_: tiny)
    preset = DataCommand.preset(model)
    main(replace(preset, out=tmp_path, data=replace(SMALL, data_seed=7)))
    following = capsys.readouterr().out.split("Next: ")[1].strip()
    chosen = parse(ReplicateConfig, shlex.split(following)[2:])
    assert chosen.train == ReplicateConfig.preset(model).train
    assert not {"--rank", "--layers", "--batch", "--epochs", "--lora-alpha"} & set(following.split())
    assert chosen.data.data_seed == 7


@pytest.mark.parametrize(
    ("pos", "neg", "reason"),
    [
        (Answer("", 0, True), Answer("x", 1, True), "empty"),
        (Answer("x", 9, False), Answer("y", 1, True), "truncated"),
        (Answer("The  same.", 2, True), Answer("the same.", 2, True), "identical"),
        (Answer("I'm sorry, but I can't help with that.", 9, True), Answer("Sure.", 1, True), "refusal"),
        (Answer("I can't pretend to be dishonest.", 9, True), Answer("Sure.", 1, True), "refusal"),
        (Answer("I\N{RIGHT SINGLE QUOTATION MARK}m unable to help.", 9, True), Answer("Sure.", 1, True), "refusal"),
        (Answer("Sure.", 9, True), Answer("I won\N{RIGHT SINGLE QUOTATION MARK}t do that.", 1, True), "refusal"),
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


# What generation_config files of published models advise, and what else `generate` takes from them, made strong.
ADVICE = {
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 3,
    "top_p": 0.5,
    "num_beams": 2,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_length": 60,
    "min_new_tokens": 9,
    "suppress_tokens": list(range(20, 200)),
    "begin_suppress_tokens": list(range(200, 500)),
    "bad_words_ids": [[i] for i in range(500, 700)],
    "sequence_bias": [[[700], 50.0]],
    "forced_bos_token_id": 701,
    "forced_eos_token_id": 702,
    "exponential_decay_length_penalty": [1, 9.0],
    "stop_strings": ["e"],
    "max_time": 0.0,
    "use_cache": False,
    "cache_implementation": "offloaded",
    "return_dict_in_generate": True,
}


def test_greedy_answers_are_the_argmax_whatever_the_model_advises(tiny):
    from ws.chat.engine import Engine, Sampling
    from ws.eval.capability import answer_questions
    from ws.eval.confounds import free_answers
    from ws.lm.divergence import divergence
    from ws.lm.models import encode
    from ws.replicate import _samples

    model, tok = tiny
    nothing = ws.SteeringVector({"lm_head": ws.LinearDelta(len(tok), 64, g=torch.ones(len(tok)))}, "tiny-random", None)
    questions = ["What is red?", "Is snow warm, and why would anybody think so?"]
    prompts, kept = [render_prompt(tok, q) for q in questions], model.generation_config
    plain, ends = [], end_ids(model, tok)
    for prompt in prompts:
        ids, start = encode(tok, prompt), len(encode(tok, prompt))
        while len(ids) - start < 24 and ids[-1] not in ends:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        plain.append(tok.decode([i for i in ids[start:] if i not in ends], skip_special_tokens=True).strip())

    def chat():
        with Engine(model, tok, {"v": nothing}) as engine:
            *_, last = engine.write(prompts, [{"v": 0.0}] * len(prompts), Sampling(max_tokens=24), 0)
        return last

    def sample(question):
        (answer,) = _samples(
            model, tok, replace(ws.load_behavior("honesty", "pocket"), questions=(question,)), mock.Mock(), [0.0], 24
        )
        return answer.answer

    def said():
        return {
            "chat": chat(),
            "samples": [sample(q) for q in questions],
            "sampling": [a.text for a in sample_answers(model, tok, prompts, 24)],
            "confounds": free_answers(model, tok, questions, 24)["answer"].tolist(),
            "capability": answer_questions(model, tok, questions, 24)["answer"].tolist(),
            "divergence": list(divergence(model, tok, prompts, nullcontext, 24).answers),
        }

    assert said() == dict.fromkeys(said(), plain)
    alone = GenerationConfig(eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id, repetition_penalty=5.0)
    model.generation_config = alone
    try:
        assert said() == dict.fromkeys(said(), plain)
        for name, value in ADVICE.items():
            setattr(model.generation_config, name, value)
        assert said() == dict.fromkeys(said(), plain)
    finally:
        model.generation_config = kept


def test_every_setting_of_generate_is_switched_off_or_known_to_be_harmless():
    """A version of transformers that knows another one shows here."""
    harmless = {
        *("max_length", "max_new_tokens", "early_stopping", "length_penalty"),  # beams only, or always given
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),  # more of the same
        *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("speculation_type", "compile_config", "continuous_batching_config", "low_memory", "prefill_chunk_size"),
        *("max_cache_len", "transformers_version"),
    }
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - set(PLAIN) <= harmless


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"n_topics": 0}, "`n_topics`"),
        ({"n_topics": -1}, "`n_topics`"),
        ({"n_personas": 2}, "`n_personas`"),
        ({"n_samples": 0}, "`n_samples`"),
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"data_batch": 0}, "`data_batch`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"temperature": float("inf")}, "`temperature`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"top_p": 1.01}, "`top_p`"),
        ({"top_p": float("nan")}, "`top_p`"),
    ],
)
def test_counts_out_of_range_are_explained(tiny, tmp_path, behavior, change, flag):
    with pytest.raises(ws.WsError, match=flag):
        generate_pairs(*tiny, behavior, tmp_path, replace(SMALL, **change))


# ---- settings of the sampling, and the batch size that is found -----------------------------------------------------


def test_a_model_without_settings_is_sampled_with_a_stated_default(tiny, tmp_path, behavior, capsys):
    model, tok = tiny
    pairs = generate_pairs(model, tok, behavior, tmp_path, SMALL)
    stated = "temperature 0.7 (default), top-p 0.9 (default), top-k 50 (default)"
    assert f"Answers are sampled at {stated}." in capsys.readouterr().err
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["sampling"]["temperature"] == {"value": 0.7, "from": "default"}
    assert card["sampling"]["top_p"] == {"value": 0.9, "from": "default"}
    assert f"Sampled at {stated}." in (tmp_path / "card.md").read_text()
    same = replace(SMALL, temperature=0.7, top_p=0.9)
    assert generate_pairs(model, tok, behavior, tmp_path, same) == pairs, "asked for or not, they are the same settings"
    for other, named in (
        (replace(SMALL, temperature=0.2), "temperature: 0.7 -> 0.2"),
        (replace(SMALL, top_p=1.0), "top_p: 0.9 -> 1.0"),
    ):
        with pytest.raises(ws.WsError, match=rf"other settings \({named}\)"):
            generate_pairs(model, tok, behavior, tmp_path, other)


def test_options_reach_the_sampling(tiny, tmp_path, behavior):
    model, tok = tiny
    for number, batch in enumerate((5, None)):
        cold = replace(SMALL, data_batch=batch, temperature=1e-6, keep_truncated=True)
        pairs = generate_pairs(model, tok, behavior, tmp_path / f"{number}", cold)
        prompts = [render_prompt(tok, p.question, system=behavior.positive[0]) for p in pairs]
        assert [p.pos for p in pairs] == [a.text for a in sample_answers(model, tok, prompts, SMALL.max_new_tokens)]
        assert json.loads((tmp_path / f"{number}" / "card.json").read_text())["sampling"]["temperature"] == {
            "value": 1e-6, "from": "option",
        }  # fmt: skip


def test_folders_of_versions_that_recorded_no_settings_stay_good_where_those_are_the_same(tmp_path, behavior):
    """They sampled as `generate` does by itself: with the model's own settings."""
    model, tok = ws.load_model("pocket", device="cpu")
    few = replace(SMALL, n_topics=2, n_samples=1)
    pairs = generate_pairs(model, tok, behavior, tmp_path, few)
    file = tmp_path / "manifest.json"
    record = json.loads(file.read_text())
    for name in ("temperature", "top_p", "top_k"):
        assert record["stages"]["pairs"]["config"].pop(name) is not None
    file.write_text(json.dumps(record))
    for same in (few, replace(few, temperature=0.8, top_p=0.95)):
        assert generate_pairs(model, tok, behavior, tmp_path, same) == pairs
    with pytest.raises(ws.WsError, match=r"other settings \(temperature: None -> 0.7\)"):
        generate_pairs(model, tok, behavior, tmp_path, replace(few, temperature=0.7))
    assert generate_pairs(model, tok, behavior, tmp_path, few, fresh=True) == pairs
    model.generation_config.temperature = 0.5
    with pytest.raises(ws.WsError, match=r"other settings \(temperature: 0.8 -> 0.5\)"):
        generate_pairs(model, tok, behavior, tmp_path, few)


FOUND = replace(SMALL, data_batch=None)


def test_pairs_of_a_batch_that_is_found_depend_on_their_id_and_the_data_seed(tiny, tmp_path, behavior, monkeypatch):
    model, tok = tiny
    whole = {p.id: p for p in generate_pairs(model, tok, behavior, tmp_path / "whole", FOUND)}
    monkeypatch.setattr("ws.data._CHUNK", 5)
    fewer = replace(FOUND, n_samples=1)
    some = generate_pairs(model, tok, behavior, tmp_path / "some", fewer)
    assert len(some) == 6
    assert all(whole[p.id] == p for p in some)
    other = generate_pairs(model, tok, behavior, tmp_path / "other", replace(fewer, data_seed=1))
    assert sum(whole[p.id].pos != p.pos for p in other) > 3
    assert sum(p.pos == p.neg for p in some) < 3, "the sides have random numbers of their own"
    assert sum(whole[p.id].pos == whole[p.id.replace("s0", "s1")].pos for p in some) < 3, "and so have samples"


@pytest.mark.parametrize("torn", [0, 4, 5, 11])
def test_a_found_batch_continues_with_the_same_pairs(tiny, tmp_path, behavior, torn, monkeypatch):
    model, tok = tiny
    monkeypatch.setattr("ws.data._CHUNK", 5)
    whole = generate_pairs(model, tok, behavior, tmp_path / "whole", FOUND)
    lines, calls = (tmp_path / "whole" / "pairs.jsonl").read_text().splitlines(keepends=True), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ws.data.sample_rows", mock.Mock(side_effect=KeyboardInterrupt))
        generate_pairs(model, tok, behavior, tmp_path / "torn", FOUND)
    with (tmp_path / "torn" / "pairs.partial.jsonl").open("a") as partial:
        partial.write("".join(lines[:torn]) + lines[torn][:20])
    monkeypatch.setattr("ws.data.sample_rows", lambda *a, **k: calls.append(1) or sample_rows(*a, **k))
    assert generate_pairs(model, tok, behavior, tmp_path / "torn", FOUND) == whole
    assert len(calls) == 3 - torn // 5


def test_the_presets_of_bundled_models_keep_their_draws():
    """Published tables rest on them."""
    assert (data_preset("pocket").data_batch, data_preset("tiny-random").data_batch) == (200, 8)
    assert data_preset("smollm2").data_batch is None


def test_no_usable_pair_stops_the_run_with_the_counts(tiny, tmp_path, behavior):
    with pytest.raises(ws.WsError, match=r"usable: \d+ truncated .*`keep_truncated`"):
        generate_pairs(*tiny, behavior, tmp_path, replace(SMALL, max_new_tokens=1))
    assert generate_pairs(*tiny, behavior, tmp_path, SMALL), "better settings need no --fresh"


def test_answers_may_hold_any_character(tmp_path):
    odd = Pair("a", "q", "one\u2028two\x85three\x0bfour", "five\r\nsix\nseven \U0001f600", 5, 6)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(asdict(odd), ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(tmp_path) == [odd]


LINE = {"id": "a", "question": "Naïve?", "pos": "Yes.", "neg": "No.", "pos_tokens": 2, "neg_tokens": 2}
OTHER = json.dumps(LINE | {"id": "b", "drop": "refusal", "pos": ""})


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(LINE) + "\n" + OTHER,
        json.dumps(LINE) + "\n" + OTHER + "\n",
        json.dumps(LINE, ensure_ascii=False) + "\r\n" + OTHER + "\r\n\r\n",
        "\ufeff" + json.dumps(LINE | {"drop": None}, ensure_ascii=False) + "\n\n" + OTHER + "\n\n",
    ],
    ids=["no newline at the end", "one", "as Windows writes it", "byte order mark and blank lines"],
)
def test_every_pair_of_a_file_is_read_however_its_lines_end(tmp_path, raw):
    (tmp_path / "pairs.jsonl").write_bytes(raw.encode())
    assert read_pairs(tmp_path) == [Pair(**LINE), Pair(**LINE | {"id": "b", "drop": "refusal", "pos": ""})]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        *[
            ({key: value}, f"{key} must be a text")
            for key in ("id", "question", "pos", "neg")
            for value in (None, 5, [])
        ],
        *[({"pos_tokens": value}, "pos_tokens must be a whole number") for value in (None, 2.0, "2", True, -1)],
        *[({"drop": value}, "drop must be null, or a text") for value in (False, True, 0, "", " ", [])],
        *[({key: " "}, f"{key} is empty") for key in ("id", "question", "pos", "neg")],
        ({"positive": "Yes."}, "unknown key 'positive'"),
        ({"pos": "\ud83d"}, "pos holds half of a surrogate pair"),
        ({"id": "first"}, "its id 'first' is that of line 1"),
    ],
)
def test_what_is_wrong_with_a_pair_is_said_with_its_line(tmp_path, change, why):
    lines = [json.dumps(LINE | {"id": "first"}), json.dumps(LINE | change)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(ws.WsError, match=f"pairs.jsonl line 2 is not a contrast pair: {why}"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (json.dumps(LINE)[:-9].encode(), "is not JSON"),
        (json.dumps(LINE | {"pos_tokens": float("nan")}).encode(), "is not JSON: NaN is no number"),
        (json.dumps(LINE | {"pos_tokens": float("inf")}).encode(), "is not JSON: Infinity is no number"),
        (json.dumps(LINE).replace('"neg"', '"pos"').encode(), "the key 'pos' stands there twice"),
        (b"[1, 2]", r"is no object but \[1, 2\]"),
        (b'"text"', "is no object"),
        (json.dumps({k: v for k, v in LINE.items() if "tokens" not in k}).encode(), "it lacks pos_tokens, neg_tokens"),
        (json.dumps(LINE, ensure_ascii=False).encode("latin-1"), "is not UTF-8: byte 0xef at position 28"),
        (json.dumps(LINE).encode("utf-16"), "is not UTF-8: byte 0xff at position 1"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_pair_at_all_is_said_with_its_line(tmp_path, line, why):
    (tmp_path / "pairs.jsonl").write_bytes(json.dumps(LINE | {"id": "first"}).encode() + b"\n\n" + line)
    with pytest.raises(ws.WsError, match=f"pairs.jsonl line 3 .*{why}"):
        read_pairs(tmp_path)


def test_a_pair_made_in_python_is_held_to_its_types():
    """Where no type checker of the tests stands before it."""
    for change, why in (({"drop": False}, "drop must be null"), ({"pos": None}, "pos must be a text, not None")):
        pair = object.__new__(Pair)
        vars(pair).update(LINE | {"drop": None} | change)
        with pytest.raises(ws.WsError, match=why):
            pair.__post_init__()


def test_files_that_are_no_pairs_are_explained(tmp_path):
    with pytest.raises(ws.WsError, match="ws data"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ws.WsError, match="line 1"):
        read_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(ws.WsError, match="no pairs"):
        read_pairs(tmp_path)
