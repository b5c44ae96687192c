"""The engine below `ws chat`, `ws play` and `ws serve`, and conversations of a base and a steered answer side by side.

Both answers of a conversation are submitted together (`ws.chat.batching`): row 0 has strength 0 of every vector and row
1 the strengths asked for. Both rows draw their tokens with the same random numbers, so at strength 0 both write the
same, and elsewhere they differ by what the vector does rather than by chance. In a reproducible engine, as that of
conversations is, the shapes that a conversation's arithmetic sees are those it would see alone; nobody's strength
touches anybody else's answer in any.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.analysis.compose import vector_folder
from ws.analysis.controls import draw_seed
from ws.behaviors import behavior_name
from ws.chat.batching import Request, Scheduler, check_drawing, require_numbers
from ws.console import say
from ws.diff import SteeringVector
from ws.errors import WsError, choose, require_characters, require_strength
from ws.files.runs import run_folder
from ws.lm.batches import in_groups, left_pad, next_logits
from ws.lm.choice import choice_tokens
from ws.lm.hub import parse_id
from ws.lm.models import encode, load_model, model_id, render_prompt, tokenizer_hash
from ws.options.shared import EngineOptions as EngineOptions
from ws.options.shared import VectorsOptions

Message = Mapping[str, str]
Strengths = Mapping[str, float]

BASE, STEERED = "base", "steered"
MAX_PEOPLE = 1000  # answers of conversations that may wait for their turn


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 for the most probable token of every step, otherwise what logits are divided by.
        max_tokens: at most so many tokens per answer.
        seed: of the random numbers, which both rows share; every turn of a conversation has its own.
    """

    temperature: float | int = 0.0
    max_tokens: int = 128
    seed: int = 0

    def check(self) -> None:
        """`WsError` for numbers that make no sense."""
        check_drawing(self.temperature, self.seed)
        if self.max_tokens < 1:
            raise WsError(f"An answer needs at least 1 token, not {self.max_tokens}.")


@dataclass(frozen=True)
class Turn:
    """A question with both answers, as far as they are written.

    Attributes:
        question: what was asked.
        strengths: of every vector, in the steered row.
        sampling: how both answers were drawn.
        base, steered: the answers.
        n_steps: tokens of the longer answer.
        stopped: somebody cut the answers off.
    """

    question: str
    strengths: Strengths
    sampling: Sampling
    base: str = ""
    steered: str = ""
    n_steps: int = 0
    stopped: bool = False

    def answer(self, row: str) -> str:
        """The answer of the row `base` or `steered`."""
        return self.base if row == BASE else self.steered


# ---- prompts and tokens ---------------------------------------------------------------------------------------------


def render_chat(tok: Tokenizer, messages: Sequence[Message], opener: str = "") -> str:
    """The text up to where the next answer starts, thinking off; `ws.lm.models.render_prompt` for several turns.

    Args:
        messages: user's and assistant's in turn, the user's first and last, each with `role` and `content`.
        opener: a start of the answer that is put into the model's mouth.
    """
    return render_prompt(tok, messages[-1]["content"], earlier=messages[:-1], opener=opener)


# ---- the engine -----------------------------------------------------------------------------------------------------


class Offered(NamedTuple):
    """A vector that an engine steers with.

    Attributes:
        vector: the vector.
        place: where it can be loaded from, for snippets.
        units: its `-1u` and `+1u`, as far as it has them.
    """

    vector: SteeringVector
    place: str
    units: dict[str, float]


class Engine:
    """A model with its vectors, for any number of conversations at once.

    The model is the engine's alone until `close`: use it as a context manager.

    Args:
        model, tok: the base and its tokenizer.
        vectors: by the names that strengths go by.
        places: where each vector can be loaded from, for snippets.
        loading: the expression that loads the model, for snippets.
        reproducible, limits: see `ws.chat.batching.Scheduler`.

    Attributes:
        offered: the vectors by name; another dictionary whenever one is added or removed, so that whoever reads a list
            from another thread reads one that agrees with itself.

    Raises:
        WsError: no vectors, or one of another base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: Tokenizer,
        vectors: Mapping[str, SteeringVector],
        places: Mapping[str, str] | None = None,
        loading: str | None = None,
        *,
        reproducible: bool = True,
        **limits: int,
    ) -> None:
        if not vectors:
            raise WsError("There are no vectors to steer with.")
        self.model, self.tok = model, tok
        self.offered = {n: self._offer(n, vector, (places or {}).get(n, "")) for n, vector in vectors.items()}
        self.loading = loading or f"ws.load_model({_literal(model_id(model))})"
        self.scheduler = Scheduler(model, tok, vectors, reproducible=reproducible, **limits)
        self._changing = RLock()  # of two that add at once the second would forget the first's

    @property
    def vectors(self) -> dict[str, SteeringVector]:
        """The vectors by the names that strengths go by."""
        return {name: offered.vector for name, offered in self.offered.items()}

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it came; answers that are being written end with an error."""
        self.scheduler.close()

    def converse(
        self, strengths: Mapping[str, float | int | str] | None = None, sampling: Sampling | None = None
    ) -> Conversation:
        """A new conversation with strengths of its own; vectors that are not named have strength 1."""
        return Conversation(self, strengths, sampling or Sampling())

    def strength(self, name: str, alpha: float | int | str) -> float:
        """A strength of the named vector as a number, from a number or calibrated units such as `+1u`."""
        offered = self.offered
        return self._strength(offered[choose("vector", name, offered)].vector, alpha)

    def _strength(self, vector: SteeringVector, alpha: float | int | str) -> float:
        return vector.strength(alpha, tokenizer_hash(self.tok)) if isinstance(alpha, str) else require_strength(alpha)

    def add(self, name: str, vector: SteeringVector, place: str = "") -> None:
        """Steer with one more vector, which `place` can be loaded from; `WsError` for a taken name or another base."""
        with self._changing:
            offered = self._offer(name, vector, place)
            self.scheduler.add(name, vector)
            self.offered = {**self.offered, name: offered}

    def remove(self, name: str) -> None:
        """Steer with a vector no longer; answers under way that it takes part in end with an error."""
        with self._changing:
            self.scheduler.remove(name)
            self.offered = {n: offered for n, offered in self.offered.items() if n != name}

    def _offer(self, name: str, vector: SteeringVector, place: str) -> Offered:
        units = dict[str, float]()
        for text in ("-1u", "+1u") if vector.units else ():
            try:
                units[text] = self._strength(vector, text)
            except WsError:  # this sign did not converge, or it is not of this vector and tokenizer: there is no mark
                continue
        return Offered(vector, place or f"{name}/vector", units)

    def write(
        self, prompts: Sequence[str], rows: Sequence[Strengths], sampling: Sampling, seed: int
    ) -> Iterator[list[str]]:
        """Answer rendered prompts in one batch; yields all answers so far after every step.

        Args:
            prompts: one per row.
            rows: the strengths of every vector, row by row.
            sampling: its own seed is not used.
            seed: of the random numbers, the same ones for all rows.
        """
        ids = [encode(self.tok, p) for p in prompts]
        steps = min(sampling.max_tokens, self._left(max(map(len, ids))))
        asked = (
            Request(tokens, strengths, steps, sampling.temperature, seed=seed)
            for tokens, strengths in zip(ids, rows, strict=True)
        )
        answers = self.scheduler.submit(*asked)
        texts, writing = [""] * len(answers), dict(enumerate(map(iter, answers)))
        try:
            while writing:
                pieces = {row: next(answer, None) for row, answer in writing.items()}
                writing = {row: answer for row, answer in writing.items() if pieces[row] is not None}
                for row, piece in pieces.items():
                    texts[row] += "" if piece is None else piece.text
                if writing:
                    yield list(texts)
        finally:
            for answer in answers:
                answer.cancel()

    def probabilities(
        self, prompts: Sequence[str], rows: Sequence[Strengths], words: Sequence[str]
    ) -> Float[np.ndarray, "rows words"]:
        """The probability of each word as the next token of every row's prompt, at the row's strengths.

        A word counts in any case and with a space before it; see `ws.lm.choice`.

        Raises:
            WsError: a word that is no single token of this tokenizer.
        """
        variants = [torch.tensor(choice_tokens(self.tok, w), device=self.model.device) for w in words]
        encoded = {prompt: encode(self.tok, prompt) for prompt in set(prompts)}
        self._left(max(map(len, encoded.values())))
        ids = [encoded[prompt] for prompt in prompts]
        p = self.scheduler.call(partial(self._next_logits, ids, rows)).softmax(dim=-1)
        return torch.stack([p[:, v].sum(dim=-1) for v in variants], dim=1).cpu().double().numpy()

    def single_tokens(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words whose probability can be asked for, and for each of the others a sentence.

        Raises:
            WsError: none can.
        """
        known, problems = list[str](), list[str]()
        for word in words:
            try:
                choice_tokens(self.tok, word)
                known.append(word)
            except WsError as problem:
                problems.append(str(problem))
        if problems and not known:
            raise WsError(" ".join(problems))
        return known, problems

    def _next_logits(self, ids: Sequence[Sequence[int]], rows: Sequence[Strengths]) -> Float[Tensor, "rows vocabulary"]:
        """The next token's logits behind every row's tokens, at its strengths."""

        def read(part: Sequence[tuple[Sequence[int], Strengths]]) -> Tensor:
            ids, strengths = zip(*part, strict=True)
            tokens, mask = left_pad(ids, self.tok.pad_token_id, self.model.device)
            return self.scheduler.logits(strengths, partial(next_logits, self.model, tokens, mask, None))

        return require_numbers(torch.stack(in_groups(self.model, list(zip(ids, rows, strict=True)), read)))

    def _left(self, length: int) -> int:
        """Tokens that fit behind a prompt of this length."""
        room = self.scheduler.room
        if length >= room:
            raise WsError(
                f"The conversation is {length} tokens long and the model reads {room} at most; start a new one."
            )
        return room - length


# ---- a conversation -------------------------------------------------------------------------------------------------


class Conversation:
    """One person's turns, strengths and sampling; the base and the steered row remember their own answers.

    Attributes:
        engine: what answers.
        sampling: of the next answer; may be set.
        turns: what was asked and answered, in order; a turn that is being written is not among them.
    """

    def __init__(self, engine: Engine, strengths: Mapping[str, float | int | str] | None, sampling: Sampling) -> None:
        sampling.check()
        self.engine, self.sampling, self.turns = engine, sampling, list[Turn]()
        self._strengths = dict.fromkeys(engine.vectors, 1.0)
        self._running: Turn | None = None
        self._replaced: Turn | None = None  # what `again` gives up as soon as there is something better
        self._lock = RLock()
        for name, alpha in (strengths or {}).items():
            self.set(name, alpha)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of every vector in the next answer, as a copy; those that have been removed have none."""
        offered = self.engine.offered
        return {name: alpha for name, alpha in self._strengths.items() if name in offered}

    def set(self, name: str, alpha: float | int | str) -> float:
        """Set one vector's strength, a number or calibrated units; an answer under way keeps the one it began with."""
        value = self.engine.strength(name, alpha)
        self._strengths[name] = value
        return value

    @property
    def shown(self) -> list[Turn]:
        """All turns, with the one that is being written."""
        with self._lock:
            return [*self.turns, *([self._running] if self._running else [])]

    # ---- answers --------------------------------------------------------------------------------------------

    def stream(self, question: str) -> Iterator[Turn]:
        """Ask; yields the turn after every token. A question that is being answered meanwhile is stopped there."""
        if not require_characters(question, "The message").strip():
            raise WsError("The message is empty.")
        with self._lock:
            self.stop()
            turn = self._running = Turn(question, self.strengths, self.sampling)
        yield from self._write(turn)

    def _write(self, turn: Turn) -> Iterator[Turn]:
        """Answer the turn that is running, after those before it."""
        try:
            turn.sampling.check()
            prompts = [render_chat(self.engine.tok, self._messages(row, turn.question)) for row in (BASE, STEERED)]
            rows = [dict.fromkeys(turn.strengths, 0.0), turn.strengths]
            seed = draw_seed(turn.sampling.seed, len(self.turns))
            for base, steered in self.engine.write(prompts, rows, turn.sampling, seed):
                grown = replace(turn, base=base, steered=steered, n_steps=turn.n_steps + 1)
                if not self._follow(turn, grown):
                    return
                turn = grown
                yield turn
        except WsError:
            self._end(turn, self._replaced)
            raise
        self._end(turn, turn)

    def ask(self, question: str) -> Turn:
        """Ask, and wait for both answers."""
        for _ in self.stream(question):
            pass
        return self.turns[-1]

    def again(self) -> Iterator[Turn]:
        """Answer the last question anew, with the strengths and the sampling of now, as `stream` does.

        What it was answered before stays the answer where there comes no other.
        """
        with self._lock:
            if not self.shown:
                raise WsError("Nothing has been asked yet.")
            *self.turns, last = self.shown
            if not self._running:
                self._replaced = last
            elif last.n_steps:
                self._replaced = replace(last, stopped=True)
            turn = self._running = Turn(last.question, self.strengths, self.sampling)
        return self._write(turn)

    def stop(self) -> None:
        """Stop after the token that is being written; what there is of the answers is kept."""
        with self._lock:
            if turn := self._running:
                self._end(turn, replace(turn, stopped=True) if turn.n_steps else self._replaced)

    def reset(self) -> None:
        """Forget all turns; strengths and sampling stay."""
        with self._lock:
            self._running, self._replaced, self.turns = None, None, []

    def _follow(self, turn: Turn, grown: Turn) -> bool:
        """Replace the turn that is being written, unless it was stopped; whether it was not."""
        with self._lock:
            mine = self._running is turn
            self._running = grown if mine else self._running
            return mine

    def _end(self, turn: Turn, kept: Turn | None) -> None:
        """Put what is kept in the place of the turn that is being written, unless it was stopped."""
        with self._lock:
            if self._running is turn:
                self._running = self._replaced = None
                self.turns += [kept] if kept else []

    def _messages(self, row: str, question: str) -> list[Message]:
        """What a row has heard and said so far, and the question."""
        past = [
            message
            for turn in self.turns
            for message in (
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer(row)},
            )
        ]
        return [*past, {"role": "user", "content": question}]

    # ---- beside the answers ---------------------------------------------------------------------------------

    def probe(
        self, words: Sequence[str], rows: Sequence[Strengths] | None = None, question: str = "", opener: str = ""
    ) -> Float[np.ndarray, "rows words"]:
        """The probability of each word as the first one of the answer to the last question.

        Args:
            words: each a single token.
            rows: strengths, of which each goes on from the steered answers; without them the base, which goes on from
                its own, and the strengths of now, `[2, words]`.
            question: another one, put as the first of a conversation.
            opener: a start of the answer that is put into the model's mouth.

        Raises:
            WsError: nothing to answer, no words, or a word that is no single token.
        """
        if not words:
            raise WsError("Name at least one word.")
        require_characters(" ".join([*words, question, opener]), "What is asked")
        now = self.strengths
        sides = [STEERED] * len(rows) if rows else [BASE, STEERED]
        with self._lock:
            if not question and not self.shown:
                raise WsError("Nothing has been asked yet.")
            asked = {side: self._asked(side, question) for side in set(sides)}
        prompts = {side: render_chat(self.engine.tok, messages, opener) for side, messages in asked.items()}
        rows = rows or [dict.fromkeys(now, 0.0), now]
        return self.engine.probabilities([prompts[side] for side in sides], rows, words)

    def _asked(self, row: str, question: str) -> list[Message]:
        """The question as the first of a conversation; without one the last, behind what the row said before it."""
        if question:
            return [{"role": "user", "content": question}]
        messages = self._messages(row, self.shown[-1].question)
        return messages if self._running else [*messages[:-3], messages[-1]]

    def snippet(self) -> str:
        """Python that loads the same model and vectors and gives the same answers, turn by turn.

        Raises:
            WsError: a turn was steered with a vector that has been removed.
        """
        offered = self.engine.offered
        names = ", ".join(f"{_literal(n)}: ws.SteeringVector.load({_literal(o.place)})" for n, o in offered.items())
        turns = self.shown or [Turn("Your question", self.strengths, self.sampling)]
        if removed := {n for turn in turns for n, a in turn.strengths.items() if a} - set(offered):
            raise WsError(f"The answers were steered with {', '.join(sorted(removed))}, which has been removed.")
        everyone = dict.fromkeys(offered, 0.0)  # one that came later took no part in the turns before
        turns = [replace(t, strengths=everyone | {n: a for n, a in t.strengths.items() if n in offered}) for t in turns]
        strengths, sampling = turns[0].strengths, _replayed(turns[0])
        lines = [
            "import ws",
            "from ws.chat.engine import Engine, Sampling",
            "",
            f"model, tok = {self.engine.loading}",
            f"vectors = {{{names}}}",
            "with Engine(model, tok, vectors) as engine:",
            f"    chat = engine.converse({_strengths(strengths)}, {sampling!r})",
        ]
        for turn in turns:
            if turn.strengths != strengths:
                changed = {n: a for n, a in turn.strengths.items() if a != strengths[n]}
                lines += [f"    chat.set({_literal(n)}, {a!r})" for n, a in changed.items()]
            if _replayed(turn) != sampling:
                lines.append(f"    chat.sampling = {_replayed(turn)!r}")
            strengths, sampling = turn.strengths, _replayed(turn)
            lines.append(f"    turn = chat.ask({_literal(turn.question)})")
        return "\n".join([*lines, '    print(turn.base, turn.steered, sep="\\n")', ""])


def _replayed(turn: Turn) -> Sampling:
    """The sampling that gives a turn's answers again: one that was stopped gets no more tokens than it had."""
    return replace(turn.sampling, max_tokens=turn.n_steps) if turn.stopped else turn.sampling


def _strengths(values: Strengths) -> str:
    return "{" + ", ".join(f"{_literal(n)}: {a!r}" for n, a in values.items()) + "}"


def _literal(text: str) -> str:
    """A text as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


# ---- opening --------------------------------------------------------------------------------------------------------


def sampling_of(options: EngineOptions) -> Sampling:
    """How answers are drawn, checked."""
    sampling = Sampling(options.temperature, options.max_tokens, options.sample_seed)
    sampling.check()
    return sampling


def vector_places(options: VectorsOptions) -> dict[str, str]:
    """Where the vectors are, a folder or a repository each, by short names.

    Raises:
        WsError: a vector that is not there, or one that is named twice.
    """
    o = options
    o.require()
    if not o.vectors:
        name = behavior_name(o.behavior)
        return {name: str(run_folder(o.out, name, o.adapter, o.seed) / "vector")}
    places = [_place(name, o) for name in o.vectors]
    if len(set(places)) < len(places):
        raise WsError(f"--vectors names the same vector twice: {' '.join(o.vectors)}.")
    return dict(zip(_short_names(o.vectors, places), places, strict=True))


def _place(name: str, options: VectorsOptions) -> str:
    try:
        return str(vector_folder(name, options.out, options.adapter, options.seed))
    except WsError:
        first = name.split("/")[0]
        if parse_id(name) is None or name.startswith((".", "~")) or (options.out / first).is_dir():
            raise
        return name


def open_engine(options: EngineOptions) -> Engine:
    """The engine with the model and all vectors loaded, once what is to begin with is known to be right."""
    sampling = sampling_of(options)
    engine = load_engine(options, max_queue=MAX_PEOPLE)
    say(f"At most {sampling.max_tokens} tokens per answer.")
    try:
        for vector in engine.vectors:
            engine.strength(vector, options.alpha)
    except WsError:
        engine.close()
        raise
    return engine


def load_engine(options: VectorsOptions, *, reproducible: bool = True, **limits: int) -> Engine:
    """The engine with the model and all vectors loaded, and a line on stderr that says which; see `Engine`."""
    o, places = options, vector_places(options)
    vectors = {name: SteeringVector.load(place) for name, place in places.items()}
    name = o.model or next(iter(vectors.values())).base_id
    given = {"device": o.device, "dtype": o.precision}
    chosen = "".join(f", {k}={_literal(v)}" for k, v in given.items() if v != "auto")
    model, tok = load_model(name, o.device, o.precision)
    say(f"{name} with {', '.join(f'{n} ({p})' for n, p in places.items())}.")
    loading = f"ws.load_model({_literal(name)}{chosen})"
    return Engine(model, tok, vectors, places, loading, reproducible=reproducible, **limits)


def first_conversation(options: EngineOptions, engine: Engine) -> Conversation:
    """A new conversation with the strength to begin with."""
    return engine.converse(dict.fromkeys(engine.vectors, options.alpha), sampling_of(options))


def _short_names(given: Sequence[str], places: Sequence[str]) -> list[str]:
    """What to call vectors: a folder by its own name, a run's `vector/` by the run's; others as they were named."""
    names = []
    for name, place in zip(given, places, strict=True):
        path = Path(place)
        folder = "/".join(path.parts[-3:-1]) if path.name == "vector" else path.name
        names.append(folder if path.is_dir() and Path(name).expanduser() == path else name)
    return names if len(set(names)) == len(names) else list(given)
