"""Answers of one steered model, written side by side: requests join the batch when they come and leave when they end.

Every row has strengths, sampling and random numbers of its own. One thread writes: in turn it reads the prompts that
have come, all in one pass, and gives every row one more token, all in another; a dial holds a strength per row.

    token = argmax_v (logits_v / T + G_v)        G_v = -log E_v,   E_v ~ Exp(1), drawn anew for every step

is a sample from `softmax(logits / T)` (the Gumbel-max trick; Maddison, Tarlow & Minka 2014, arXiv 1411.0030), and the
greedy choice at T = 0. Rows with the same seed draw the same numbers.

What a row computes does not depend on the rows beside it but for the rounding of a batch's arithmetic. A `reproducible`
scheduler excludes that, too: what is submitted together is a batch of its own, whose shape stays as it begins, and all
batches take their steps in turn. Models whose layers cannot overlook masked columns are always written so, and those
with caches of their own from the start at every step.

Transformers' own continuous batching lays all rows' tokens out as one list, in attention kernels of its own; here a
layer sees rows, which is what a strength per row needs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, TopPLogitsWarper
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.diff import SteeringVector
from ws.errors import WsError, choose, disk_errors, require_count, require_seed, require_strength
from ws.lm.batches import left_pad, next_logits, padded_groups, row_logits, takes_cache, takes_masks
from ws.lm.models import end_ids, trim_answer
from ws.lm.refill import Prefixes, RowBatch
from ws.steer import Dial, steer

Result = TypeVar("Result")
MAX_BATCH, MAX_QUEUE = 16, 64
_NAN = "The model gave NaN or infinity; the strength is too large for it, choose a smaller one."
_ANCHOR = 4  # tokens of the prompt that say whether the first word behind it has a space before it


class BusyError(WsError):
    """More requests are waiting than may; the same request may be tried again later."""


class ClosedError(WsError):
    """The engine has been closed."""


class FailureError(WsError):
    """The machine or the library failed, which is no fault of the request."""


# ---- requests and answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What one row of a batch is asked for.

    Attributes:
        tokens: the prompt.
        strengths: of vectors by name; those that are not named have 0.
        max_tokens: at most so many tokens of an answer; with 0 only the prompt is scored.
        temperature: 0 for the most probable token of every step, otherwise what logits are divided by.
        top_p: of the tokens, only the most probable that together reach this probability are drawn from.
        seed: of the random numbers.
        stop: texts before which the answer ends.
        logprobs: also the log-probability of every token and of so many of the most probable ones; None for neither.
        echo: the same for the tokens of the prompt.
        trim: leave out white space around the answer, as in a conversation.
    """

    tokens: Sequence[int]
    strengths: Mapping[str, float]
    max_tokens: int = 128
    temperature: float | int = 0.0
    top_p: float | int = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    trim: bool = True

    def check(self, vectors: Mapping[str, object]) -> None:
        """`WsError` for vectors that are not there and numbers that make no sense."""
        for name, alpha in self.strengths.items():
            require_strength(alpha, f"The strength of {choose('vector', name, vectors)}")
        if not self.tokens:
            raise WsError("The prompt is empty.")
        check_drawing(self.temperature, self.seed)
        if not 0 < self.top_p <= 1:
            raise WsError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        require_count("max_tokens", self.max_tokens, 0)
        require_count("logprobs", self.logprobs, 0)


def check_drawing(temperature: float | int, seed: int) -> None:
    """`WsError` for a temperature or a seed that nothing can be drawn with."""
    if not 0 <= temperature < float("inf"):
        raise WsError(f"The temperature must be 0 or a positive number, not {temperature}.")
    require_seed(seed, "The sampling seed")


class Piece(NamedTuple):
    """What one step adds to an answer.

    Attributes:
        text: what has become certain: no half character, and nothing that may belong to a stop.
        token: the token that was written.
        logprob: its natural logarithm of probability, at temperature 1; None unless asked for.
        top: the most probable tokens with theirs.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Written = Piece | WsError | None  # None behind the last piece


class Answer:
    """An answer as it is written: iterate over its pieces, from any thread, once.

    Iterating raises `WsError` where the answer cannot go on: its logits are NaN, a vector of it was removed, or the
    engine was closed.

    Attributes:
        prompt: the scored tokens of the prompt, where they were asked for, from the first piece or the end on.
        finish: why it ended: by itself or a `stop`, at its greatest `length`, or `cancelled`; None as long as it goes.
        n_tokens: how many tokens have been written, with the one that ended it.
        put: where pieces go, then None or what the answer cannot go on for; a queue that iterating reads, unless given.
    """

    def __init__(self, put: Callable[[Written], None] | None = None) -> None:
        self.prompt: tuple[Piece, ...] = ()
        self.finish: Literal["stop", "length", "cancelled"] | None = None
        self.n_tokens = 0
        self.is_cancelled = False
        self._pieces: SimpleQueue[Written] = SimpleQueue()
        self.put = put or self._pieces.put

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, WsError):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Leave the batch at the next step; nothing is written after that."""
        self.is_cancelled = True


# ---- one row --------------------------------------------------------------------------------------------------------


def pick(
    logits: Float[Tensor, "vocabulary"], temperature: float | int, draw: torch.Generator, top_p: float | int = 1.0
) -> int:
    """The next token; see the head of this module."""
    if temperature == 0:
        return int(logits.argmax())
    scores = (logits - logits.max()) / temperature  # the most probable stays finite at any temperature
    if top_p < 1:
        scores = TopPLogitsWarper(float(top_p))(torch.empty(1, 0), scores[None])[0]
    noise = torch.empty(logits.shape[-1]).exponential_(generator=draw).clamp(min=torch.finfo().tiny).log()
    return int((scores - noise.to(logits.device)).argmax())


@dataclass(eq=False)
class _Row:
    """A request on its way."""

    request: Request
    tok: Tokenizer
    ends: frozenset[int]
    most: int
    answer: Answer
    written: list[int] = field(default_factory=list)
    shown: int = 0

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.request.seed)
        anchor = list(self.request.tokens[-_ANCHOR:])
        self._anchor, self._before = anchor, self._decoded(anchor)

    @property
    def done(self) -> bool:
        return self.answer.finish is not None

    @property
    def steering(self) -> frozenset[tuple[str, float]]:
        """The strengths that change anything."""
        return frozenset((name, float(alpha)) for name, alpha in self.request.strengths.items() if alpha)

    @property
    def tokens(self) -> list[int]:
        """The prompt, and what is written."""
        return [*self.request.tokens, *self.written]

    def write(self, logits: Float[Tensor, "vocabulary"]) -> None:
        """Take the next token from the logits behind the last one."""
        r, answer = self.request, self.answer
        token = pick(logits, r.temperature, self.draw, r.top_p)
        answer.n_tokens += 1
        has_ended = token in self.ends
        self.written += [] if has_ended else [token]
        text, stopped = _before_stop(self._text(), r.stop)
        finish: Literal["stop", "length"] | None
        finish = "stop" if has_ended or stopped else "length" if answer.n_tokens >= self.most else None
        piece = _piece(logits, token, r.logprobs, self._new(text, finish))
        if finish is None:
            answer.put(piece)
        else:
            self.end(finish, piece)

    def end(self, finish: Literal["stop", "length", "cancelled"], *last: Piece) -> None:
        """Whoever reads the answer's last piece finds why it was the last."""
        self.answer.finish = finish
        for piece in (*last, None):
            self.answer.put(piece)

    def fail(self, problem: WsError) -> None:
        self.answer.finish = "cancelled"
        self.answer.put(problem)

    def _new(self, text: str, finish: str | None) -> str:
        """What of the answer so far has not been shown, and is certain."""
        if finish != "stop":
            text = text.rstrip("\ufffd")  # bytes of a character that is not complete
        if finish is None:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self.request.stop), default=0)]
        text = trim_answer(self.tok, text) if self.request.trim else text
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return new

    def _text(self) -> str:
        whole = self._decoded([*self._anchor, *self.written])
        return whole[len(self._before) :] if whole.startswith(self._before) else self._decoded(self.written)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _piece(logits: Float[Tensor, "vocabulary"], token: int, n_top: int | None, text: str) -> Piece:
    if n_top is None:
        return Piece(text, token)
    logp = logits.log_softmax(dim=-1)
    top = logp.topk(min(n_top, len(logp)))
    return Piece(text, token, float(logp[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def _before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stops, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end may be the beginning of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def require_numbers(logits: Tensor) -> Tensor:
    """The logits; `WsError` where one is NaN or infinite, as half precision is before it is NaN."""
    if _broken(logits).any():
        raise WsError(_NAN)
    return logits


def _broken(logits: Float[Tensor, "*rows vocabulary"]) -> Bool[Tensor, "*rows"]:
    return (logits.isnan() | logits.isposinf()).any(dim=-1)  # -inf is a token that the model rules out


# ---- the scheduler --------------------------------------------------------------------------------------------------


class _Whole:
    """Rows of a model that remembers nothing it can be handed back: every step reads them from the start."""

    def __init__(self, rows: list[_Row], pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id

    def step(self, model: PreTrainedModel, tokens: Sequence[int]) -> Float[Tensor, "rows vocabulary"]:
        ids, mask = left_pad([row.tokens for row in self.rows], self.pad_id, model.device)
        return next_logits(model, ids, mask, None)


_Batch = RowBatch[_Row] | _Whole


class Stats(NamedTuple):
    """Passes of the model and tokens so far, also those of prompts that were known; rows written now, and waiting."""

    steps: int
    tokens: int
    known: int
    running: int
    waiting: int


class Scheduler:
    """Writes answers of a model in a thread of its own; the model is the scheduler's alone until `close`.

    Args:
        model, tok: the base and its tokenizer.
        vectors: by the names that strengths go by.
        max_batch: rows that are written at a time.
        max_queue: requests that may wait; with more, `submit` raises `BusyError`.
        max_known: tokens of prompts, read lately, whose keys and values are kept for others that begin alike and have
            the same strengths; none where rows neither join nor leave.
        reproducible: see the head of this module.

    Raises:
        WsError: a vector of another base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: Tokenizer,
        vectors: Mapping[str, SteeringVector],
        *,
        max_batch: int = MAX_BATCH,
        max_queue: int = MAX_QUEUE,
        max_known: int = 0,
        reproducible: bool = False,
    ) -> None:
        self.model, self.tok, self.max_batch, self.max_queue = model, tok, max_batch, max_queue
        self._steps = self._tokens = self._known = 0
        self._joins = takes_masks(model) and takes_cache(model) and not reproducible
        self._caches, self._ends = takes_cache(model), frozenset(end_ids(model, tok))
        self._dials, self._blocks = dict[str, Dial](), dict[str, ExitStack]()
        self._waiting, self._calls = deque[list[_Row]](), deque[Callable[[], None]]()
        self._prefixes = Prefixes(max_known if self._joins else 0)
        self._joined: RowBatch[_Row] | None = None
        self._apart, self._ending = list[_Batch](), False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="ws-engine", daemon=True)
        self._thread.start()
        try:
            for name, vector in vectors.items():
                self.add(name, vector)
        except BaseException:
            self.close()
            raise

    def submit(self, *requests: Request, put: Callable[[int, Written], None] | None = None) -> list[Answer]:
        """Begin to answer; from any thread. What is submitted together begins together.

        Args:
            put: is told of every piece in the scheduler's thread, with the number of its request; see `Answer.put`.

        Raises:
            BusyError: too many requests are waiting.
            WsError: a request makes no sense, or is longer than the model reads.
        """
        answers = [Answer(None if put is None else partial(put, number)) for number in range(len(requests))]
        with self._wake:  # from the check of its vectors on: one that is removed ends what waits, and only that
            rows = [self._row(request, answer) for request, answer in zip(requests, answers, strict=True)]
            if self._ending:
                raise ClosedError("The engine has been closed.")
            if (waiting := self.stats.waiting) + len(rows) > self.max_queue:
                raise BusyError(f"{waiting} requests wait, and {self.max_queue} at most may; try again later.")
            self._waiting.append(rows)
            self._wake.notify()
        return answers

    @property
    def stats(self) -> Stats:
        """Numbers of this moment, from any thread."""
        with self._wake:
            running, waiting = sum(len(batch.rows) for batch in self._batches), sum(map(len, self._waiting))
        return Stats(self._steps, self._tokens, self._known, running, waiting)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken: it has not been closed, and has not failed."""
        return not self._ending

    @property
    def room(self) -> int:
        """Tokens that the model reads at most, prompt and answer together."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    def call(self, action: Callable[[], Result]) -> Result:
        """Do something with the model between two steps; from any other thread."""
        done: Future[Result] = Future()

        def carry_out() -> None:
            try:
                done.set_result(action())
            except BaseException as problem:
                done.set_exception(problem)

        with self._wake:
            if self._ending:
                raise ClosedError("The engine has been closed.")
            self._calls.append(carry_out)
            self._wake.notify()
        return done.result()

    def add(self, name: str, vector: SteeringVector) -> None:
        """Steer with one more vector, from the next step on; `WsError` for a name that is taken or another base."""
        self.call(partial(self._add, name, vector))

    def remove(self, name: str) -> None:
        """Steer with a vector no longer; requests under way that it takes part in end with an error."""
        self.call(partial(self._remove, name))

    def close(self, drain: bool = False) -> None:
        """Leave the model as it came. Answers under way end with an error, or with `drain` as they would."""
        with self._wake:
            if not drain:
                self._calls.append(partial(self._fail, ClosedError("The engine has been closed.")))
            self._ending = True
            self._wake.notify()
        self._thread.join()

    def logits(
        self, strengths: Sequence[Mapping[str, float]], action: Callable[[], Tensor]
    ) -> Float[Tensor, "rows *columns vocabulary"]:
        """What a pass of the model gives, in float32, while the dials hold these strengths, row by row.

        Only in the scheduler's thread (`call`).
        """
        with _said(), self._steered(strengths), torch.inference_mode():
            return action().float()

    # ---- in the scheduler's thread --------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._has_work():
                for call in self._taken_calls():
                    call()
                self._begin(self._next())
                self._advance()
        except BaseException as problem:  # a fault of ours: whoever waits is told, and nobody else is let in
            with self._wake:
                self._ending = True
            self._fail(FailureError(f"The engine has failed ({type(problem).__name__}: {problem}); start it again."))
            for call in self._taken_calls():
                call()
            raise
        finally:
            for block in self._blocks.values():
                block.close()

    def _advance(self) -> None:
        for batch in self._batches:
            self._guarded(batch.rows, partial(self._step, batch))
        self._leave()

    @property
    def _batches(self) -> list[_Batch]:
        return [*([] if self._joined is None else [self._joined]), *self._apart]

    def _has_work(self) -> bool:
        """Wait for something to do; False when there is nothing left and nothing will come."""
        with self._wake:
            self._wake.wait_for(lambda: self._calls or self._waiting or self._batches or self._ending)
            return bool(self._calls or self._waiting or self._batches)

    def _taken_calls(self) -> list[Callable[[], None]]:
        with self._wake:
            return [self._calls.popleft() for _ in range(len(self._calls))]

    def _next(self) -> list[list[_Row]]:
        """The requests whose turn it is to begin, as many as there is room for; one that is cancelled never begins."""
        fresh = list[list[_Row]]()
        with self._wake:
            for row in chain.from_iterable(self._waiting):
                if row.answer.is_cancelled:
                    row.end("cancelled")
            self._waiting = deque(group for group in self._waiting if not all(row.done for row in group))
            room = self.max_batch - self.stats.running
            while self._waiting and (len(self._waiting[0]) <= room or room == self.max_batch):
                fresh.append(self._waiting.popleft())
                room -= len(fresh[-1])
        return fresh

    def _begin(self, fresh: list[list[_Row]]) -> None:
        """Read the prompts, and write the first tokens."""
        for row in chain.from_iterable(fresh):
            if row.request.echo and not row.done:
                self._guarded([row], partial(self._score_prompt, row))
            if row.most == 0 and not row.done:
                row.end("length")
        for group in [list(chain.from_iterable(fresh))] if self._joins else fresh:
            for rows in self._together([row for row in group if not row.done]):
                batch = self._guarded(rows, partial(self._read, rows))
                if isinstance(batch, RowBatch) and self._joins:
                    self._join(batch)
                elif batch is not None:
                    self._apart.append(batch)

    def _join(self, batch: RowBatch[_Row]) -> None:
        """Write the rows in one batch with those that are written; where that fails, all of them end."""
        before = self._joined
        rows = [*(before.rows if before else ()), *batch.rows]
        self._joined = self._guarded(rows, partial(before.joined, batch)) if before else batch

    def _together(self, rows: list[_Row]) -> list[list[_Row]]:
        groups = padded_groups(self.model, [row.request.tokens for row in rows])
        return [[rows[i] for i in group] for group in groups if group]

    def _read(self, rows: list[_Row]) -> _Batch:
        pad_id = self.tok.pad_token_id
        if not self._caches:
            cacheless = _Whole(rows, pad_id)
            self._step(cacheless)
            return cacheless
        alike = dict[object, list[_Row]]()  # rows that differ in nothing but their draws are read once
        for row in rows:
            alike.setdefault((row.steering, *row.request.tokens) if self._joins else row, []).append(row)
        batch, logits = self._read_once([same[0] for same in alike.values()])
        if len(alike) < len(rows):
            places = [place for place, same in enumerate(alike.values()) for _ in same]
            repeated = batch.only(places)
            assert repeated is not None
            batch, logits = repeated, logits[places]
            batch.rows = list(chain.from_iterable(alike.values()))
        self._write(batch.rows, logits)
        return batch

    def _read_once(self, rows: list[_Row]) -> tuple[RowBatch[_Row], Float[Tensor, "rows vocabulary"]]:
        """Read the prompts, from where they are not known yet."""
        prompts = [row.request.tokens for row in rows]
        prefixes = [self._prefixes.longest(row.steering, ids) for row, ids in zip(rows, prompts, strict=True)]
        begun = list[RowBatch[_Row]]()

        def read() -> Tensor:
            batch, logits = RowBatch.begin(self.model, self.tok.pad_token_id, rows, prompts, prefixes)
            begun.append(batch)
            return logits

        logits = self.logits([row.request.strengths for row in rows], read)
        self._known += sum(len(prefix.tokens) for prefix in prefixes if prefix is not None)
        for place, row in enumerate(rows):
            self._prefixes.hold(row.steering, begun[0], place, prompts[place])
        return begun[0], logits

    def _step(self, batch: _Batch) -> None:
        """One more token for every row; what an ended row is given is thrown away."""
        tokens = [row.written[-1] if row.written and not row.done else self.tok.pad_token_id for row in batch.rows]
        strengths = [row.request.strengths for row in batch.rows]
        self._write(batch.rows, self.logits(strengths, lambda: batch.step(self.model, tokens)))

    def _write(self, rows: Sequence[_Row], logits: Float[Tensor, "rows vocabulary"]) -> None:
        self._steps += 1
        broken = _broken(logits).tolist()
        for row, scores, is_broken in zip(rows, logits, broken, strict=True):
            if row.done:
                continue
            if row.answer.is_cancelled:
                row.end("cancelled")
            elif is_broken:
                row.fail(WsError(_NAN))
            else:
                row.write(scores)
                self._tokens += 1

    def _score_prompt(self, row: _Row) -> None:
        ids = list(row.request.tokens)
        action = partial(row_logits, self.model, self.tok.pad_token_id, [ids])
        logits = require_numbers(self.logits([row.request.strengths], action)[0])
        n_top = row.request.logprobs
        scored = [_piece(scores, token, n_top, "") for scores, token in zip(logits[:-1], ids[1:], strict=True)]
        row.answer.prompt = (Piece("", ids[0]), *scored)

    def _leave(self) -> None:
        """Let go of the rows that have ended, and of those that are cancelled."""
        for row in chain.from_iterable(batch.rows for batch in self._batches):
            if row.answer.is_cancelled and not row.done:
                row.end("cancelled")
        self._apart = [batch for batch in self._apart if not all(row.done for row in batch.rows)]
        if self._joined is not None and any(row.done for row in self._joined.rows):
            left = [i for i, row in enumerate(self._joined.rows) if not row.done]
            self._joined = self._guarded(self._joined.rows, partial(self._joined.only, left))

    def _guarded(self, rows: Sequence[_Row], action: Callable[[], Result]) -> Result | None:
        """What goes wrong ends these rows with a sentence, and nothing else."""
        try:
            with _said():
                return action()
        except WsError as problem:
            _fail(rows, problem)
        return None

    @contextmanager
    def _steered(self, strengths: Sequence[Mapping[str, float]]) -> Iterator[None]:
        try:
            for name, dial in self._dials.items():
                alphas = [row.get(name, 0.0) for row in strengths]
                on = self.model.device
                dial.alpha = torch.tensor(alphas, dtype=torch.float32, device=on) if any(alphas) else 0.0
            yield
        finally:
            for dial in self._dials.values():
                dial.alpha = 0.0

    def _row(self, request: Request, answer: Answer) -> _Row:
        request.check(self._dials)
        room = self.room - len(request.tokens)
        if room <= 0:
            raise WsError(f"The prompt is {len(request.tokens)} tokens long and the model reads {self.room} at most.")
        return _Row(request, self.tok, self._ends, min(request.max_tokens, room), answer)

    def _add(self, name: str, vector: SteeringVector) -> None:
        if name in self._dials:
            raise WsError(f"There is a vector named {name} already; remove it first, or take another name.")
        with ExitStack() as block:
            self._dials[name] = block.enter_context(steer(self.model, vector, 0.0))
            self._blocks[name] = block.pop_all()

    def _remove(self, name: str) -> None:
        del self._dials[choose("vector", name, self._dials)]
        self._prefixes.clear()  # another vector may come by this name
        self._blocks.pop(name).close()
        removed = WsError(f"The vector {name} was removed while this answer was being written.")
        self._fail(removed, lambda row: bool(row.request.strengths.get(name)))

    def _fail(self, problem: WsError, chosen: Callable[[_Row], bool] = lambda row: True) -> None:
        """End the chosen rows of all that are written or wait."""
        with self._wake:
            rows = [*chain.from_iterable(self._waiting), *chain.from_iterable(b.rows for b in self._batches)]
        _fail(filter(chosen, rows), problem)


@contextmanager
def _said() -> Iterator[None]:
    """What goes wrong while the model computes, as a sentence."""
    try:
        with disk_errors("The model's memory"):
            yield
    except WsError:
        raise
    except torch.OutOfMemoryError as problem:
        few = "try again with fewer or shorter"
        raise FailureError(f"The device has no memory left for so many answers; {few}.") from problem
    except Exception as problem:
        raise FailureError(f"The model cannot compute this ({type(problem).__name__}: {problem}).") from problem


def _fail(rows: Iterable[_Row], problem: WsError) -> None:
    for row in rows:
        if not row.done:
            row.fail(problem)
