"""Rows that come and go: every one is written as it would be alone, and whatever ends one ends no other."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from contextlib import closing
from dataclasses import replace

import pytest
import torch

import ws
from conftest import build_adapter
from ws.chat.batching import Answer, BusyError, ClosedError, Request, Scheduler, _Row, pick
from ws.lm.models import encode, end_ids, render_prompt
from ws.lm.refill import Prefixes, RowBatch

QUESTIONS = (
    "What do birds fly with?",
    "Describe Petra.",
    "Is ice cold?",
    "What is a violin made of, and who plays it?",
)


@pytest.fixture(scope="module")
def pocket():
    return ws.load_model("pocket", device="cpu")


@pytest.fixture(scope="module")
def vectors(pocket, tmp_path_factory) -> dict[str, ws.SteeringVector]:
    """Random vectors, so strong that a strength of one changes the words."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    for family in ("lora", "oft"):
        build_adapter(pocket[0], family, folder / family, seed=3, oft_block=16)
        whole = ws.SteeringVector.from_adapter(folder / family, pocket[0])
        made[family] = 40 * whole.select(layers=[1, 2], modules=["o_proj", "down_proj"])
    return made


@pytest.fixture
def scheduler(pocket, vectors):
    made = Scheduler(*pocket, vectors, max_batch=6, max_queue=100)
    yield made
    made.close()


def prompt(tok, question: str) -> list[int]:
    return encode(tok, render_prompt(tok, question))


def text(answer: Answer) -> str:
    return "".join(piece.text for piece in answer)


def alone(pocket, vectors, request: Request) -> str:
    """The same answer by one forward pass per token over all of the text, steered as a user would."""
    model, tok = pocket
    draw, ids = torch.Generator().manual_seed(request.seed), list(request.tokens)
    with ws.steer_many(model, vectors, {n: request.strengths.get(n, 0.0) for n in vectors}), torch.inference_mode():
        for _ in range(request.max_tokens):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            token = pick(logits, request.temperature, draw, request.top_p)
            if token in end_ids(model, tok):
                break
            ids.append(token)
    return tok.decode(ids[len(request.tokens) :], skip_special_tokens=True).strip()


# ---- drawing --------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_from_the_softmax_and_equal_seeds_draw_equal_tokens():
    logits = torch.tensor([0.0, 1.0, -0.5, 2.0])
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn, again = (torch.tensor([pick(logits, 0.7, draw) for _ in range(8000)]) for draw in draws)
    assert (drawn == again).all()
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    wanted = (logits / 0.7).softmax(dim=0)
    error = (wanted * (1 - wanted) / len(drawn)).sqrt()
    assert ((shares - wanted).abs() < 4 * error).all(), "four binomial standard errors"
    assert {pick(logits, t, draws[0]) for t in (0, 1e-3, 1e-30, 1e-45)} == {3}


def test_top_p_draws_from_the_smallest_set_that_reaches_it():
    logits, draw = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    for top_p, wanted in ((0.4, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        assert {pick(logits, 1.0, draw, top_p) for _ in range(400)} == wanted


def test_similar_rows_mostly_draw_the_same_token():
    """The draws of two rows differ with a probability of at most 2 TV / (1 + TV), TV their total variation."""
    torch.manual_seed(0)
    logits = torch.randn(50)
    rows, draws = [logits, logits + 0.05 * torch.randn(50)], [torch.Generator().manual_seed(0) for _ in range(2)]
    p, q = torch.stack(rows).softmax(dim=-1)
    distance = float((p - q).abs().sum() / 2)
    drawn = [[pick(row, 1.0, draw) for row, draw in zip(rows, draws, strict=True)] for _ in range(4000)]
    differ = sum(a != b for a, b in drawn) / len(drawn)
    bound = 2 * distance / (1 + distance)
    assert differ < bound + 4 * (bound / len(drawn)) ** 0.5
    assert bound < 0.1


# ---- in company -----------------------------------------------------------------------------------------------------


def requests(tok, number: int) -> list[Request]:
    """Requests of all lengths, strengths and ways of sampling."""
    chance = random.Random(0)
    return [
        Request(
            prompt(tok, chance.choice(QUESTIONS)),
            chance.choice([{}, {"lora": 1.0}, {"lora": -1.0}, {"oft": 0.7}, {"lora": 0.5, "oft": -0.5}]),
            max_tokens=chance.randrange(1, 20),
            temperature=chance.choice([0.0, 0.0, 0.8]),
            top_p=chance.choice([1.0, 0.9]),
            seed=chance.randrange(1000),
        )
        for _ in range(number)
    ]


def hold(scheduler: Scheduler) -> threading.Event:
    """The scheduler does nothing from now on until the event is set; what is asked meanwhile waits."""
    begun, held = threading.Event(), threading.Event()
    threading.Thread(target=scheduler.call, args=(lambda: begun.set() or held.wait(),)).start()
    assert begun.wait(60)
    return held


@pytest.mark.parametrize("reproducible", [False, True])
def test_rows_that_come_and_go_are_written_as_alone(pocket, vectors, reproducible):
    asked = requests(pocket[1], 24)
    wanted = [alone(pocket, vectors, request) for request in asked]
    assert len(set(wanted)) > 12
    with closing(Scheduler(*pocket, vectors, max_batch=5, reproducible=reproducible)) as scheduler:
        held, answers, texts, most = hold(scheduler), [], [], 0
        for number, request in enumerate(asked):
            answers += scheduler.submit(request)
            if number == 12:  # the others come while these are written
                held.set()
        for answer in answers:
            pieces = []
            for piece in answer:
                pieces.append(piece.text)
                most = max(most, scheduler.stats.running)
            texts.append("".join(pieces))
    assert texts == wanted
    assert {answer.finish for answer in answers} == {"stop", "length"}
    assert 1 < most <= 5
    assert (scheduler.stats.running, scheduler.stats.waiting) == (0, 0)
    assert scheduler.stats.tokens == sum(answer.n_tokens for answer in answers)
    assert reproducible or scheduler.stats.steps < scheduler.stats.tokens / 1.5, "rows share their steps"


def test_reproducible_numbers_do_not_depend_on_company(pocket, vectors):
    scheduler = Scheduler(*pocket, vectors, reproducible=True)
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {"lora": 0.3}, 8, 0.9, 0.95, seed=4, logprobs=3)
    by_itself = list(scheduler.submit(asked)[0])
    others = [scheduler.submit(request)[0] for request in requests(pocket[1], 6)]
    in_company = list(scheduler.submit(asked)[0])
    assert in_company == by_itself, "to the last bit"
    for answer in others:
        text(answer)
    scheduler.close()


def test_a_vector_that_goes_while_a_request_comes_leaves_no_answer_of_the_base(pocket, vectors, monkeypatch):
    scheduler = Scheduler(*pocket, vectors)
    removing, row = threading.Thread(target=scheduler.remove, args=("lora",)), scheduler._row

    def slow(*asked):
        made = row(*asked)
        removing.start()
        removing.join(0.3)
        return made

    monkeypatch.setattr(scheduler, "_row", slow)
    (answer,) = scheduler.submit(Request(prompt(pocket[1], QUESTIONS[0]), {"lora": 0.3}, 400))
    with pytest.raises(ws.WsError, match="removed"):
        text(answer)
    removing.join()
    scheduler.close()


LONG = "Birds fly with wings, and violins are made of wood. " * 6


def test_a_beginning_that_is_shared_is_read_once_and_the_answers_are_those_without(pocket, vectors):
    tok, scheduler = pocket[1], Scheduler(*pocket, vectors, max_batch=4, max_known=400)
    asked = [Request(prompt(tok, LONG + q), {"lora": a}, 8) for a in (1.0, -1.0) for q in QUESTIONS]
    shared = next(i for i, tokens in enumerate(zip(*(r.tokens for r in asked), strict=False)) if len(set(tokens)) > 1)
    for number, request in enumerate(asked):
        known = scheduler.stats.known
        assert text(scheduler.submit(request)[0]) == alone(pocket, vectors, request)
        first = number in (0, len(QUESTIONS))  # of its strength, and the cache depends on that
        assert scheduler.stats.known - known in ([0] if first else range(shared, shared + 3))
        assert 0 < len(scheduler._prefixes) <= 400
    known = scheduler.stats.known
    answers = scheduler.submit(*(Request(r.tokens, r.strengths, 8) for r in asked), Request(prompt(tok, "Hi."), {}, 8))
    assert [text(a) for a in answers[:-1]] == [alone(pocket, vectors, r) for r in asked], "some know more than others"
    assert scheduler.stats.known > known + len(asked) * shared // 2
    scheduler.remove("oft")
    assert len(scheduler._prefixes) == 0, "what was read under a vector goes with it"
    scheduler.close()


def test_answers_to_one_prompt_read_it_once(pocket, vectors, monkeypatch):
    model, tok = pocket
    scheduler, rows = Scheduler(*pocket, vectors, max_batch=8), []
    handle = model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    asked = [Request(prompt(tok, QUESTIONS[1]), {"lora": 0.5}, 6, temperature=1.0, seed=n) for n in range(3)]
    asked.insert(1, Request(prompt(tok, QUESTIONS[0]), {"lora": 0.5}, 6))
    answers = [text(answer) for answer in scheduler.submit(*asked)]
    handle.remove()
    assert answers == [alone(pocket, vectors, request) for request in asked]
    assert rows[:2] == [2, 4]
    scheduler.close()


def test_what_was_read_last_is_remembered_as_far_as_there_is_room(pocket):
    model, tok = pocket
    texts = [encode(tok, word * 30)[:24] for word in (" bird", " wood", " gold")]
    batch, _ = RowBatch.begin(model, 0, texts, texts)
    held = Prefixes(50)
    for place in range(3):
        held.hold("a", batch, place, texts[place])
    assert held.longest("a", [*texts[0], 5]) is None, "gone first"
    assert held.longest("b", [*texts[1], 5]) is None, "under something else"
    known = held.longest("a", [*texts[1], 5])
    assert known is not None
    assert list(known.tokens) == texts[1]
    assert len(held.longest("a", texts[1]).tokens) == 23, "the last token is read: its logits are what is asked for"
    assert held.longest("a", [*texts[1][:15], 5, 6]) is None, "not worth it"
    held.hold("a", batch, 0, texts[0])
    assert held.longest("a", [*texts[1], 5]) is not None, "used after the third"
    assert len(held) == 48
    assert Prefixes(0).longest("a", texts[0]) is None


def test_a_request_of_many_rows_begins_together_although_it_is_larger_than_a_batch(scheduler, pocket):
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {}, 3)
    assert len({text(answer) for answer in scheduler.submit(*[asked] * 9)}) == 1


# ---- what is said of the tokens -------------------------------------------------------------------------------------


def test_logprobs_are_those_of_a_plain_pass(scheduler, pocket, vectors):
    model, tok = pocket
    asked = Request(prompt(tok, QUESTIONS[1]), {"lora": -0.4}, 6, 1.3, seed=2, logprobs=4, echo=True)
    (answer,) = scheduler.submit(asked)
    pieces = list(answer)
    ids = [*asked.tokens, *(piece.token for piece in pieces)]
    with ws.steer(model, vectors["lora"], -0.4), torch.inference_mode():
        logp = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
    everything = [*answer.prompt, *pieces]
    assert [piece.token for piece in everything] == ids
    assert everything[0].logprob is None
    for place, piece in enumerate(everything[1:]):
        assert piece.logprob == pytest.approx(float(logp[place, piece.token]), abs=1e-4)
        best = logp[place].topk(4)
        assert [token for token, _ in piece.top] == best.indices.tolist()
        assert [value for _, value in piece.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_alone_can_be_scored(scheduler, pocket):
    (answer,) = scheduler.submit(Request(prompt(pocket[1], QUESTIONS[0]), {}, 0, logprobs=0, echo=True))
    assert list(answer) == []
    assert answer.finish == "length"
    assert all(piece.logprob < 0 for piece in answer.prompt[1:])


def test_an_answer_ends_before_a_stop_wherever_the_tokens_lie(scheduler, pocket):
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {}, 30)
    whole = text(scheduler.submit(asked)[0])
    for begin, end in ((3, 5), (7, 14), (len(whole) - 2, len(whole))):
        stop = whole[begin:end]
        (answer,) = scheduler.submit(Request(asked.tokens, {}, 30, stop=("never", stop)))
        pieces = [piece.text for piece in answer]
        assert "".join(pieces) == whole[: whole.index(stop)].rstrip()
        assert answer.finish == "stop"


def test_a_piece_never_holds_half_a_character_or_a_part_of_a_stop(pocket):
    _, tok = pocket
    said = "Ä\n\nB 猫 end of it"
    ids = encode(tok, said)
    row = _Row(Request(prompt(tok, "Q?"), {}, 99, stop=("of it",), trim=False), tok, frozenset(), 99, Answer())
    for token in ids:
        logits = torch.zeros(len(tok))
        logits[token] = 9.0
        if not row.done:
            row.write(logits)
    pieces = [piece.text for piece in row.answer]
    assert "".join(pieces) == said.removesuffix("of it")
    assert all("\ufffd" not in piece for piece in pieces)
    assert row.answer.finish == "stop"


def test_white_space_stays_where_it_is_not_trimmed(scheduler, pocket):
    model, tok = pocket
    asked = encode(tok, "User: Is ice cold?\nAssistant: It")
    (answer,) = scheduler.submit(Request(asked, {}, 4, trim=False))
    with torch.inference_mode():
        written = model.generate(torch.tensor([asked]), max_new_tokens=4, do_sample=False)[0, len(asked) :]
    assert text(answer) == tok.decode(written, skip_special_tokens=True)


# ---- what ends a row ------------------------------------------------------------------------------------------------


def test_a_cancelled_row_leaves_at_the_next_step_and_one_that_waits_never_begins(pocket, vectors):
    scheduler = Scheduler(*pocket, vectors, max_batch=2)
    long = Request(prompt(pocket[1], QUESTIONS[3]), {"lora": 0.2}, 200, 1.5)
    running, waiting = [scheduler.submit(long)[0] for _ in range(2)], [scheduler.submit(long)[0] for _ in range(3)]
    next(iter(running[0]))
    waiting[0].cancel()
    waiting[2].cancel()
    running[0].cancel()
    list(running[0])
    assert running[0].finish == "cancelled"
    assert 0 < running[0].n_tokens < 200
    for answer in (running[1], waiting[1]):
        answer.cancel()
    assert [list(waiting[i]) for i in (0, 2)] == [[], []]
    assert waiting[0].n_tokens == 0
    scheduler.close()


def test_nan_ends_its_own_row(scheduler, pocket, vectors):
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {}, 8)
    wanted = alone(pocket, vectors, asked)
    good, bad, other = (
        scheduler.submit(Request(asked.tokens, strengths, 8))[0] for strengths in ({}, {"lora": 3e38}, {})
    )
    with pytest.raises(ws.WsError, match="NaN or infinity; the strength is too large"):
        list(bad)
    assert text(good) == text(other) == wanted


def test_infinity_ends_its_own_row_and_a_token_that_is_ruled_out_does_not(scheduler, pocket, vectors, monkeypatch):
    """A head in half precision overflows before anything is NaN."""
    logits = scheduler.logits

    def overflowing(strengths, action):
        found = logits(strengths, action).clone()
        found[..., 5] = -torch.inf
        found[[i for i, row in enumerate(strengths) if row.get("lora")], 7] = torch.inf
        return found

    asked = Request(prompt(pocket[1], QUESTIONS[0]), {}, 8, logprobs=1)
    wanted = alone(pocket, vectors, asked)
    monkeypatch.setattr(scheduler, "logits", overflowing)
    good, bad = (scheduler.submit(replace(asked, strengths=strengths))[0] for strengths in ({}, {"lora": 0.3}))
    with pytest.raises(ws.WsError, match="infinity"):
        list(bad)
    assert text(good) == wanted


def test_a_failure_of_the_model_ends_those_rows_alone(scheduler, pocket, monkeypatch):
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {}, 8)
    step = scheduler.logits

    def failing(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(scheduler, "logits", failing)
    (answer,) = scheduler.submit(asked)
    with pytest.raises(ws.WsError, match="no memory left"):
        list(answer)
    monkeypatch.setattr(scheduler, "logits", step)
    assert text(scheduler.submit(asked)[0])


@pytest.mark.parametrize("where", ["joined", "only"])
def test_memory_that_does_not_suffice_as_rows_come_and_go_ends_those_rows_alone(pocket, vectors, monkeypatch, where):
    """Both copy the whole cache."""
    scheduler, method = Scheduler(*pocket, vectors), getattr(RowBatch, where)

    def failing(*args):
        monkeypatch.setattr(RowBatch, where, method)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    tokens = prompt(pocket[1], QUESTIONS[0])
    held = hold(scheduler)
    long, short = (scheduler.submit(Request(tokens, {"lora": 0.1 * n}, n))[0] for n in (200, 2))
    monkeypatch.setattr(RowBatch, where, failing)
    held.set()
    if where == "joined":
        next(iter(long))
        scheduler.submit(Request(tokens, {}, 200))
    else:
        assert list(short)
    with pytest.raises(ws.WsError, match="no memory left"):
        list(long)
    assert text(scheduler.submit(Request(tokens, {}, 8))[0])
    scheduler.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine_leaves_nobody_waiting(pocket, vectors, weights_hash, monkeypatch):
    before, scheduler = weights_hash(pocket[0]), Scheduler(*pocket, vectors)
    held = hold(scheduler)
    answers = [scheduler.submit(Request(prompt(pocket[1], QUESTIONS[n]), {"lora": 1.0}, 8))[0] for n in range(2)]
    monkeypatch.setattr(scheduler, "_advance", lambda: 1 / 0)
    held.set()
    for answer in answers:
        with pytest.raises(ws.WsError, match="engine has failed .ZeroDivisionError"):
            list(answer)
    scheduler._thread.join(60)
    assert not scheduler.is_open
    with pytest.raises(ClosedError):
        scheduler.submit(Request([5], {}))
    with pytest.raises(ClosedError):
        scheduler.call(lambda: None)
    scheduler.close()
    assert weights_hash(pocket[0]) == before
    assert not any(module._forward_hooks for module in pocket[0].modules())


def test_a_full_queue_is_busy_and_has_room_again(pocket, vectors):
    scheduler = Scheduler(*pocket, vectors, max_batch=1, max_queue=2)
    held = hold(scheduler)
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {}, 2)
    answers = [scheduler.submit(asked)[0] for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests wait, and 2 at most may"):
        scheduler.submit(asked)
    held.set()
    assert len({text(answer) for answer in answers}) == 1
    assert text(scheduler.submit(asked)[0])
    scheduler.close()


def test_closing_ends_answers_with_a_sentence_or_lets_them_end(pocket, vectors, weights_hash):
    before = weights_hash(pocket[0])
    asked = Request(prompt(pocket[1], QUESTIONS[3]), {"lora": 0.5}, 30, 1.0)
    for drain in (False, True):
        scheduler = Scheduler(*pocket, vectors, max_batch=2)
        answers = [scheduler.submit(asked)[0] for _ in range(4)]
        scheduler.close(drain)
        for answer in answers:
            if drain:
                assert text(answer)
            else:
                with pytest.raises(ClosedError):
                    list(answer)
        with pytest.raises(ClosedError):
            scheduler.submit(asked)
    assert weights_hash(pocket[0]) == before
    assert not any(m._forward_hooks for m in pocket[0].modules())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"strengths": {"lorra": 1.0}}, "no vector named 'lorra'. Did you mean 'lora'"),
        ({"strengths": {"lora": float("nan")}}, "strength of lora must be a finite number"),
        ({"strengths": {"lora": 1e39}}, "within float32"),
        ({"tokens": []}, "prompt is empty"),
        ({"tokens": [5] * 5000}, "5000 tokens long and the model reads"),
        ({"max_tokens": -1}, "max_tokens must be at least 0"),
        ({"temperature": -0.5}, "temperature must be 0 or a positive number"),
        ({"temperature": float("nan")}, "temperature must be 0 or a positive number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"seed": -1}, "seed must lie between"),
    ],
)
def test_requests_that_make_no_sense_are_refused(scheduler, changed, why):
    with pytest.raises(ws.WsError, match=why):
        scheduler.submit(Request(**{"tokens": [5, 6], "strengths": {}} | changed))


# ---- vectors that come and go, and what is left ---------------------------------------------------------------------


def test_a_vector_comes_and_goes_while_others_are_used(pocket, vectors):
    scheduler = Scheduler(*pocket, {"lora": vectors["lora"]})
    tokens = prompt(pocket[1], QUESTIONS[3])
    scheduler.add("oft", vectors["oft"])
    with pytest.raises(ws.WsError, match="named oft already"):
        scheduler.add("oft", vectors["oft"])
    asked = Request(prompt(pocket[1], QUESTIONS[0]), {"oft": 0.7}, 8)
    assert text(scheduler.submit(asked)[0]) == alone(pocket, vectors, asked)
    held, removing = hold(scheduler), threading.Thread(target=scheduler.remove, args=("lora",))
    mine, other = (scheduler.submit(Request(tokens, {"lora": a}, 150, 1.2))[0] for a in (0.5, 0.0))
    removing.start()
    held.set()
    with pytest.raises(ws.WsError, match="lora was removed"):
        list(mine)
    removing.join()
    other.cancel()
    assert text(scheduler.submit(asked)[0]) == alone(pocket, vectors, asked)
    with pytest.raises(ws.WsError, match="no vector named 'lora'"):
        scheduler.submit(Request(tokens, {"lora": 1.0}))
    scheduler.close()
    assert not any(m._forward_hooks for m in pocket[0].modules())


def test_nothing_of_an_answer_is_kept_behind_its_end(scheduler, pocket):
    answers = [scheduler.submit(request)[0] for request in requests(pocket[1], 12)]
    for answer in answers:
        text(answer)
    scheduler.call(lambda: None)
    scheduler.call(lambda: None)
    gone = [weakref.ref(answer) for answer in answers]
    del answers, answer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 12
    assert scheduler._batches == []
