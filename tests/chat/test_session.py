"""The engine of `ws chat` and `ws play`: one batch, shared random numbers, and people who do not disturb each other."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

import ws
from conftest import FAMILY_NAMES, build_adapter, reworded
from ws.chat.engine import (
    Engine,
    Offered,
    Sampling,
    Turn,
    first_conversation,
    open_engine,
    render_chat,
    vector_places,
)
from ws.console import parse
from ws.diff import Units, vector_digest
from ws.lm.choice import choice_tokens
from ws.lm.models import encode, end_ids, render_prompt, tokenizer_hash
from ws.options.shared import EngineOptions
from ws.steer import _STEERED

QUESTIONS = ("What do birds fly with?", "Describe Petra.", "Is ice cold?")


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def vectors(pocket, tmp_path_factory) -> dict[str, ws.SteeringVector]:
    """Random vectors of every family for the pocket model."""
    model, _ = pocket
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for family in FAMILY_NAMES:
        build_adapter(model, family, folder / family, seed=3, oft_block=16)
        found[family] = ws.SteeringVector.from_adapter(folder / family, model)
    return found


def strong(vector: ws.SteeringVector) -> ws.SteeringVector:
    """Few modules, for speed, and so strong that a strength of one changes the words."""
    return 40 * vector.select(layers=[1, 2], modules=["o_proj", "down_proj"])


@pytest.fixture
def engine(pocket, vectors):
    with Engine(*pocket, {name: strong(vectors[name]) for name in ("lora", "oft")}) as found:
        yield found


# ---- prompts and tokens ---------------------------------------------------------------------------------------------


def test_one_turn_is_rendered_as_everywhere_else_and_more_as_the_template_has_them(pocket):
    _, tok = pocket
    assert render_chat(tok, [{"role": "user", "content": "A?"}]) == render_prompt(tok, "A?")
    three = [{"role": r, "content": c} for r, c in (("user", "A?"), ("assistant", "B."), ("user", "C?"))]
    assert render_chat(tok, three) == (
        "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
        "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    told = copy.copy(tok)
    told.ws_system = "Be brief."
    assert render_chat(told, three).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA?")
    plain = copy.deepcopy(tok)
    plain.chat_template, plain.ws_system = None, "Be brief."
    assert render_chat(plain, three) == "User: Be brief.\n\nA?\nAssistant: B.\nUser: C?\nAssistant:"
    assert render_chat(plain, three[:1]) == render_prompt(plain, "A?")
    assert render_chat(plain, three, "I say:").endswith("\nUser: C?\nAssistant: I say:")
    assert render_chat(tok, three, "I say:") == f"{render_chat(tok, three)}I say:"


# ---- base beside steered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.5])
def test_at_strength_zero_both_rows_write_the_same(engine, temperature):
    chat = engine.converse({"lora": 0, "oft": 0}, Sampling(temperature, 16, seed=4))
    for question in QUESTIONS:
        turn = chat.ask(question)
        assert turn.base == turn.steered
        assert turn.base


def plain_greedy(model, tok, prompt: str, n: int) -> str:
    ids, ends = torch.tensor([encode(tok, prompt)]), end_ids(model, tok)
    with torch.no_grad():
        for _ in range(n):
            token = model(ids).logits[0, -1].argmax()
            if token in ends:
                break
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return tok.decode(ids[0, len(encode(tok, prompt)) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_row_is_the_model_merged_at_its_strength(pocket, vectors, family):
    """Against plain decoding without cache, batch or hooks, over two turns whose histories differ."""
    model, tok = pocket
    merged, alpha = copy.deepcopy(model), 30.0 if family == "delora" else 3.0
    vectors[family].merge_into(merged, alpha)
    with Engine(model, tok, {family: vectors[family]}) as engine:
        chat = engine.converse({family: alpha}, Sampling(max_tokens=12))
        for question in QUESTIONS[:2]:
            chat.ask(question)
    for row, alone in (("base", copy.deepcopy(model)), ("steered", merged)):
        messages: list[dict[str, str]] = []
        for turn in chat.turns:
            messages.append({"role": "user", "content": turn.question})
            assert turn.answer(row) == plain_greedy(alone, tok, render_chat(tok, messages), 12)
            messages.append({"role": "assistant", "content": turn.answer(row)})
    assert [t.base for t in chat.turns] != [t.steered for t in chat.turns]


def test_the_strength_changes_the_steered_row_and_never_the_base(engine):
    found = {a: engine.converse({"lora": a, "oft": 0}, Sampling(1.0, 24, 1)).ask(QUESTIONS[1]) for a in (-1, 0, 0.5, 1)}
    assert len({t.base for t in found.values()}) == 1
    assert len({t.steered for t in found.values()}) == 4
    assert found[0].steered == found[0].base


def test_several_vectors_add_up(pocket, vectors):
    both = {name: strong(vectors[name]) for name in ("lora", "oft")}
    with Engine(*pocket, both) as engine:
        together = engine.converse({"lora": 0.5, "oft": -0.5}, Sampling(max_tokens=16)).ask(QUESTIONS[0])
        half = engine.converse({"lora": 0.5, "oft": 0.0}).probe(["yes", "no"], question=QUESTIONS[2])
    total = 0.5 * both["lora"] - 0.5 * both["oft"]
    with Engine(*pocket, {"sum": total}) as engine:
        assert engine.converse({"sum": 1}, Sampling(max_tokens=16)).ask(QUESTIONS[0]).steered == together.steered
    with Engine(*pocket, {"half": both["lora"] * 0.5}) as engine:
        assert engine.converse().probe(["yes", "no"], question=QUESTIONS[2]) == pytest.approx(half, abs=1e-5)


def test_turns_have_random_numbers_of_their_own_and_a_seed_brings_them_back(engine):
    def answers(seed: int) -> list[str]:
        chat = engine.converse({"lora": 0, "oft": 0}, Sampling(1.5, 6, seed))
        return [chat.ask(QUESTIONS[1]).base for _ in range(3)]

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    first = engine.converse(sampling=Sampling(1.5, 6, 1))
    first.reset()
    assert first.ask(QUESTIONS[1]).base == answers(1)[0]


def test_answers_grow_token_by_token(engine):
    chat = engine.converse({"lora": 0.3, "oft": 0}, Sampling(max_tokens=20))
    seen = list(chat.stream(QUESTIONS[0]))
    assert [t.n_steps for t in seen] == list(range(1, len(seen) + 1))
    for a, b in pairwise(seen):
        assert b.base.startswith(a.base)
        assert b.steered.startswith(a.steered)
    assert chat.turns == seen[-1:]


def test_the_model_leaves_the_engine_as_it_came(pocket, vectors, weights_hash):
    model, _ = pocket
    before = weights_hash(model)
    with Engine(*pocket, vectors) as engine:
        engine.converse(dict.fromkeys(vectors, 0.1), Sampling(max_tokens=3)).ask(QUESTIONS[0])
        assert _STEERED
    assert weights_hash(model) == before
    assert not _STEERED
    assert not any(m._forward_hooks for m in model.modules())


# ---- several at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_people_at_different_strengths_at_once_get_what_they_get_alone(engine, monkeypatch, temperature):
    settings = [{"lora": a, "oft": b} for a, b in ((1.0, 0.0), (-1.0, 0.0), (0.5, -0.5), (0.0, 0.0))]

    def talk(strengths) -> list[Turn]:
        chat = engine.converse(strengths, Sampling(temperature, 9, 5))
        return [chat.ask(q) for q in QUESTIONS[:2]]

    alone = [talk(s) for s in settings]
    order, logits = [], engine.scheduler.logits

    def watched(strengths, action):
        order.append(tuple(strengths[-1].values()))
        return logits(strengths, action)

    monkeypatch.setattr(engine.scheduler, "logits", watched)
    together: dict[int, list[Turn]] = {}
    start = threading.Barrier(len(settings))

    def person(number: int) -> None:
        start.wait()
        together[number] = talk(settings[number])

    people = [threading.Thread(target=person, args=(n,)) for n in range(len(settings))]
    for p in people:
        p.start()
    for p in people:
        p.join()
    assert [together[n] for n in range(len(settings))] == alone
    assert len({t[0].steered for t in alone}) == len(settings)
    changes = sum(a != b for a, b in pairwise(order))
    assert changes > len(order) / 4, "the steps of different people really alternated"


def test_a_stop_from_another_thread_ends_an_answer_between_tokens(engine):
    chat, other = (engine.converse({"lora": 1.0, "oft": 0}, Sampling(1.5, 40, 2)) for _ in range(2))
    whole = other.ask(QUESTIONS[1])
    writing = chat.stream(QUESTIONS[1])
    for _ in range(3):
        next(writing)
    stopper = threading.Thread(target=chat.stop)
    stopper.start()
    stopper.join()
    assert list(writing) == []
    (turn,) = chat.turns
    assert turn.stopped
    assert turn.n_steps == 3 < whole.n_steps
    assert whole.steered.startswith(turn.steered)


def test_a_new_question_stops_the_one_that_is_being_answered(engine):
    chat = engine.converse(sampling=Sampling(1.5, 50, 2))
    first = chat.stream(QUESTIONS[0])
    next(first)
    second = chat.ask(QUESTIONS[1])
    assert list(first) == []
    assert [(t.question, t.stopped) for t in chat.turns] == [(QUESTIONS[0], True), (QUESTIONS[1], False)]
    assert chat.turns[1] == second
    untouched = chat.stream(QUESTIONS[2])
    assert chat.shown == chat.turns, "a stream that nobody reads asks nothing"
    untouched.close()


def test_again_replaces_the_last_turn_also_one_under_way(engine):
    chat = engine.converse({"lora": 1.0, "oft": 0}, Sampling(max_tokens=12))
    kept, old = chat.ask(QUESTIONS[0]), chat.ask(QUESTIONS[1])
    chat.set("lora", -1.0)
    (*_, new) = chat.again()
    assert chat.turns == [kept, new]
    assert new.steered != old.steered
    assert new.base == old.base
    running = chat.stream(QUESTIONS[2])
    next(running)
    chat.set("lora", 1.0)
    (*_, newer) = chat.again()
    assert [t.question for t in chat.turns] == list(QUESTIONS)
    assert chat.turns[-1] == newer
    assert list(running) == []


@pytest.mark.parametrize("n_steps", [0, 3])
def test_an_answer_stays_until_another_has_come(engine, monkeypatch, n_steps):
    """`again` may fail, at once or on the way; what was answered before is not lost, and is what is asked again."""
    chat = engine.converse({"lora": 1.0, "oft": 0}, Sampling(max_tokens=12))
    kept, old = chat.ask(QUESTIONS[0]), chat.ask(QUESTIONS[1])
    write = engine.write

    def broken(*asked):
        yield from islice(write(*asked), n_steps)
        raise ws.WsError("The model gave NaN.")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "write", broken)
        with pytest.raises(ws.WsError, match="NaN"):
            list(chat.again())
    assert chat.turns == chat.shown == [kept, old]
    stopped = chat.again()
    if n_steps:
        next(stopped)
    chat.stop()
    assert [t.question for t in chat.turns] == list(QUESTIONS[:2])
    assert chat.turns[-1].stopped == bool(n_steps)
    (*_, last) = chat.again()
    assert chat.turns == [kept, last]
    assert last.steered == old.steered


def test_what_was_stopped_for_an_answer_that_failed_is_kept_as_stopped(engine, monkeypatch):
    chat = engine.converse({"lora": 1.0, "oft": 0}, Sampling(max_tokens=12))
    running = chat.stream(QUESTIONS[0])
    begun = next(running)
    monkeypatch.setattr(engine, "write", lambda *_: (_ for _ in ()).throw(ws.WsError("The model gave NaN.")))
    for _ in range(2):
        with pytest.raises(ws.WsError, match="NaN"):
            list(chat.again())
        assert chat.turns == [replace(begun, stopped=True)]


def test_the_strength_of_an_answer_under_way_is_the_one_it_began_with(engine):
    alone = engine.converse({"lora": 0.5, "oft": 0}, Sampling(max_tokens=12)).ask(QUESTIONS[0])
    chat = engine.converse({"lora": 0.5, "oft": 0}, Sampling(max_tokens=12))
    for _ in chat.stream(QUESTIONS[0]):
        chat.set("lora", -3)
    assert chat.turns == [alone]


def test_a_strength_is_any_number(engine):
    chat = engine.converse({"lora": np.float64(0.5), "oft": np.float32(0.25)})
    assert chat.set("lora", np.linspace(-1, 1, 5)[1]) == -0.5
    assert chat.strengths == {"lora": -0.5, "oft": 0.25}
    with pytest.raises(ws.WsError, match="finite"):
        chat.set("lora", np.float64("nan"))


def test_a_list_of_vectors_agrees_with_itself_while_one_is_added(pocket, vectors):
    """`GET /v1/models` of a server reads it from another thread."""
    with Engine(*pocket, {"lora": vectors["lora"]}) as engine:
        before = engine.offered
        engine.add("oft", vectors["oft"], "elsewhere")
        during = engine.offered
        engine.remove("lora")
        assert (list(before), list(during), list(engine.offered)) == (["lora"], ["lora", "oft"], ["oft"])
    assert during["oft"] == Offered(vectors["oft"], "elsewhere", {})


def test_a_conversation_goes_on_when_vectors_come_and_go(pocket, vectors):
    with Engine(*pocket, {"lora": strong(vectors["lora"])}) as engine:
        chat = engine.converse({"lora": 1.0}, Sampling(max_tokens=8))
        first = chat.ask(QUESTIONS[0])
        engine.add("oft", strong(vectors["oft"]))
        chat.set("oft", 0.5)
        second = chat.ask(QUESTIONS[1])
        played = chat.snippet()
        assert '"lora": 1.0, "oft": 0.0' in played
        assert 'chat.set("oft", 0.5)' in played
        again = engine.converse({"lora": 1.0, "oft": 0.0}, Sampling(max_tokens=8))
        assert again.ask(QUESTIONS[0]).steered == first.steered
        assert again.set("oft", 0.5) == 0.5
        assert again.ask(QUESTIONS[1]).steered == second.steered
        engine.remove("lora")
        assert chat.strengths == {"oft": 0.5}
        assert chat.ask(QUESTIONS[2]).strengths == {"oft": 0.5}
        with pytest.raises(ws.WsError, match="lora, which has been removed"):
            chat.snippet()


def test_units_of_another_template_are_no_strength(pocket, vectors):
    model, tok = pocket
    vector = vectors["lora"]
    for made_for, known in ((tokenizer_hash(tok), True), ("", True), (tokenizer_hash(reworded(tok)), False)):
        units = Units(vector_digest(vector), -0.5, 0.25, made_for)
        with Engine(model, tok, {"lora": replace(vector, units=units)}) as engine:
            assert engine.offered["lora"].units == ({"-1u": -0.5, "+1u": 0.25} if known else {})
            if known:
                assert engine.strength("lora", "+2u") == 0.5
                continue
            with pytest.raises(ws.WsError, match="another tokenizer or chat template"):
                engine.strength("lora", "+2u")


# ---- words ----------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_steered_model(pocket, vectors, engine):
    model, tok = pocket
    chat = engine.converse({"lora": 0.7, "oft": 0})
    found = chat.probe(["yes", "no"], question="Is ice cold?", opener="My answer:")
    for row, alpha in enumerate((0.0, 0.7)):
        merged = copy.deepcopy(model)
        strong(vectors["lora"]).merge_into(merged, alpha)
        ids = torch.tensor([encode(tok, render_prompt(tok, "Is ice cold?", opener="My answer:"))])
        with torch.no_grad():
            p = merged(ids).logits[0, -1].softmax(dim=-1)
        wanted = [float(p[list(choice_tokens(tok, w))].sum()) for w in ("yes", "no")]
        assert found[row] == pytest.approx(wanted, abs=1e-5)
    rows = [{"lora": a, "oft": 0.0} for a in (0.0, 0.35, 0.7)]
    curve = chat.probe(["yes", "no"], rows, "Is ice cold?", "My answer:")
    assert curve.shape == (3, 2)
    assert curve[[0, 2]] == pytest.approx(found, abs=1e-6)


def test_no_memory_for_probabilities_is_a_sentence(pocket, vectors, monkeypatch):
    def full(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with Engine(*pocket, vectors) as engine:
        monkeypatch.setattr("ws.chat.engine.next_logits", full)
        with pytest.raises(ws.WsError, match="no memory left for so many answers"):
            engine.probabilities(["The sun is"], [{}], ["yes"])
        monkeypatch.undo()
        assert engine.probabilities(["The sun is"], [{}], ["yes"]).shape == (1, 1)


def test_probabilities_of_a_bfloat16_model_are_taken_in_float32(pocket, vectors):
    """A softmax in bfloat16 would give numbers of bfloat16 only."""
    low = copy.deepcopy(pocket[0]).to(torch.bfloat16)
    with Engine(low, pocket[1], {"lora": strong(vectors["lora"])}) as engine:
        p = torch.from_numpy(engine.converse({"lora": 0.3}).probe(["yes", "no"], question="Is ice cold?", opener="I:"))
    assert (p != p.bfloat16()).any()


def test_the_base_is_asked_for_words_behind_its_own_answers(pocket, vectors):
    model, tok = pocket
    with Engine(model, tok, {"lora": strong(vectors["lora"])}) as engine:
        chat = engine.converse({"lora": 4.0}, Sampling(max_tokens=8))
        first = chat.ask(QUESTIONS[0])
        assert first.base != first.steered
        chat.ask(QUESTIONS[2])
        found = chat.probe(["yes", "no"])
        for row, answer in enumerate((first.base, first.steered)):
            past = [("user", QUESTIONS[0]), ("assistant", answer), ("user", QUESTIONS[2])]
            prompt = render_chat(tok, [{"role": role, "content": text} for role, text in past])
            alone = engine.probabilities([prompt], [{"lora": 4.0 * row}], ["yes", "no"])
            assert found[row] == pytest.approx(alone[0], abs=1e-5)
        curve = chat.probe(["yes", "no"], [{"lora": 0.0}, {"lora": 4.0}])
    assert curve[1] == pytest.approx(found[1], abs=1e-5)
    assert curve[0] != pytest.approx(found[0], abs=1e-3), "another strength in the steered conversation"


def test_words_are_asked_of_the_last_question_in_its_conversation(engine):
    chat = engine.converse({"lora": 0.5, "oft": 0}, Sampling(max_tokens=8))
    with pytest.raises(ws.WsError, match="Nothing has been asked"):
        chat.probe(["yes"])
    chat.ask(QUESTIONS[2])
    alone = chat.probe(["yes", "no"])
    assert np.array_equal(alone, chat.probe(["yes", "no"], question=QUESTIONS[2]))
    chat.ask(QUESTIONS[0])
    chat.ask(QUESTIONS[2])
    later = chat.probe(["yes", "no"])
    assert not np.allclose(alone, later), "it follows on two turns now"
    running = chat.again()
    next(running)
    assert np.array_equal(chat.probe(["yes", "no"]), later), "also while it is being answered"


# ---- the snippet ----------------------------------------------------------------------------------------------------


def test_the_snippet_gives_the_same_answers(pocket, vectors, tmp_path, capsys):
    """Over changed strengths, changed sampling and a stopped answer."""
    chosen = {"honesty": vectors["lora"], 'odd "name"': vectors["ia3"]}
    places = {}
    for number, (name, vector) in enumerate(chosen.items()):
        places[name] = str(vector.save(tmp_path / str(number)))
    with Engine(*pocket, chosen, places, 'ws.load_model("pocket", device="cpu")') as engine:
        chat = engine.converse({"honesty": 0.3, 'odd "name"': -0.123456789}, Sampling(0.9, 20, 7))
        chat.ask(QUESTIONS[0])
        chat.set("honesty", -0.7)
        writing = chat.stream('Say "no\\yes"\nnow.')
        for _ in range(4):
            next(writing)
        chat.stop()
        chat.sampling = replace(chat.sampling, temperature=1.1)
        chat.ask(QUESTIONS[1])
        code = chat.snippet()
        assert "odd" in code
    names: dict = {}
    exec(code, names)
    replayed = names["chat"].turns
    assert [(t.base, t.steered, t.strengths) for t in replayed] == [
        (t.base, t.steered, t.strengths) for t in chat.turns
    ]
    assert [t.n_steps for t in replayed] == [t.n_steps for t in chat.turns]
    assert capsys.readouterr().out == f"{chat.turns[-1].base}\n{chat.turns[-1].steered}\n"


def test_before_anything_is_asked_the_snippet_holds_the_settings(engine):
    code = engine.converse({"lora": 1.5, "oft": 0}, Sampling(0.5, 9, 3)).snippet()
    assert '{"lora": 1.5, "oft": 0.0}, Sampling(temperature=0.5, max_tokens=9, seed=3)' in code
    assert 'chat.ask("Your question")' in code
    compile(code, "snippet", "exec")


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_a_conversation_ends_where_the_models_context_does(tiny):
    model, tok = tiny
    question = "bird " * 40
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = len(encode(tok, render_prompt(tok, question))) + 5
    vector = ws.SteeringVector({"lm_head": ws.LinearDelta(len(tok), 64, g=torch.ones(len(tok)))}, "tiny-random", None)
    with Engine(short, tok, {"v": vector}) as engine:
        engine.scheduler._ends = frozenset()
        chat = engine.converse(sampling=Sampling(max_tokens=50))
        assert chat.ask(question).n_steps == 5
        with pytest.raises(ws.WsError, match="start a new one"):
            chat.ask("And now?")
        assert len(chat.shown) == 1, "the question that could not be answered is not part of it"


def test_nan_stops_an_answer_with_a_sentence(tiny):
    model, tok = tiny
    vector = ws.SteeringVector(
        {"model.layers.0.mlp.up_proj": ws.LinearDelta(96, 64, g=torch.full((96,), 1e6))}, "tiny-random", None
    )
    with Engine(model, tok, {"v": vector}) as engine:
        chat = engine.converse({"v": 3e38})
        with pytest.raises(ws.WsError, match="too large"):
            chat.ask("Is it?")
        chat.set("v", 0.1)
        assert chat.ask("Is it?").strengths == {"v": 0.1}


@pytest.mark.parametrize("sampling", [Sampling(-1.0), Sampling(float("nan")), Sampling(0.0, 0), Sampling(seed=-1)])
def test_sampling_that_makes_no_sense_is_refused(engine, sampling):
    with pytest.raises(ws.WsError):
        engine.converse(sampling=sampling)


def test_strengths_are_checked(engine):
    with pytest.raises(ws.WsError, match=r"no vector named 'lorra'. Did you mean 'lora'"):
        engine.converse({"lorra": 1})
    chat = engine.converse()
    assert chat.strengths == {"lora": 1.0, "oft": 1.0}
    for alpha, why in ((float("nan"), "finite"), ("+1u", "no calibration"), ("much", "not understood")):
        with pytest.raises(ws.WsError, match=why):
            chat.set("lora", alpha)
    chat.strengths["lora"] = 9.0
    assert chat.strengths == {"lora": 1.0, "oft": 1.0}
    with pytest.raises(ws.WsError, match="empty"):
        chat.ask(" \n")
    with pytest.raises(ws.WsError, match="no vectors"):
        Engine(engine.model, engine.tok, {})


# ---- opening --------------------------------------------------------------------------------------------------------


@pytest.fixture
def out(vectors, tmp_path):
    """Runs of two behaviours, one with two seeds, and a vector that is no run's."""
    for place, family in (("honesty/lora", "lora"), ("honesty/lora/seed-1", "dora"), ("sycophancy/lora", "ia3")):
        vectors[family].save(tmp_path / "out" / place / "vector")
    vectors["oft"].save(tmp_path / "mine")
    return tmp_path / "out"


def test_vectors_are_found_by_what_they_are_called(out, tmp_path):
    mine = str(tmp_path / "mine")
    names = ("honesty", "honesty/lora/seed-1", "sycophancy", mine, "ada/honesty")
    places = vector_places(EngineOptions(out=out, vectors=names))
    assert list(places) == ["honesty", "honesty/lora/seed-1", "sycophancy", "mine", "ada/honesty"]
    assert places["honesty/lora/seed-1"] == str(out / "honesty/lora/seed-1/vector")
    assert places["ada/honesty"] == "ada/honesty", "left to the hub"
    assert vector_places(EngineOptions(out=out)) == {"honesty": str(out / "honesty/lora/vector")}
    by_path = vector_places(EngineOptions(out=out, vectors=(str(out / "honesty/lora/vector"),)))
    assert list(by_path) == ["honesty/lora"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"adapter": "oft"}, "`ws demo` makes one"),
        ({"vectors": ("honest",)}, "Did you mean 'honesty'"),
        ({"vectors": ("honesty/oft",)}, "no vector named 'honesty/oft'"),
        ({"vectors": ("honesty", "honesty/lora")}, "the same vector twice"),
        ({"temperature": -1.0}, "temperature"),
        ({"alpha": "+1u"}, "no calibration"),
    ],
)
def test_what_is_not_there_is_said(out, given, why):
    options = EngineOptions(out=out, device="cpu", **given)
    with pytest.raises(ws.WsError, match=why), open_engine(options) as engine:
        first_conversation(options, engine)
    assert not _STEERED


def test_the_command_line_opens_an_engine(out, capsys):
    options = parse(EngineOptions, ["--out", str(out), "--vectors", "honesty", "sycophancy", "--alpha", "-0.5"])
    with open_engine(options) as engine:
        chat = first_conversation(options, engine)
        assert chat.strengths == {"honesty": -0.5, "sycophancy": -0.5}
        assert chat.ask("Is ice cold?").base
        code = chat.snippet()
    assert code.splitlines()[3] == 'model, tok = ws.load_model("pocket")'
    assert capsys.readouterr().out == ""
