"""The engine below `ws chat` and `ws play`: the base's answer beside the steered one, for several people at once.

Both answers come from one batch: row 0 has strength 0 of every vector and row 1 the strengths asked for. Both rows draw
their tokens with the same random numbers,

    token = argmax_v (logits_v / T + G_v)        G_v = -log E_v,   E_v ~ Exp(1), drawn anew for every step

which is a sample from `softmax(logits / T)` (the Gumbel-max trick; Maddison, Tarlow & Minka 2014, arXiv 1411.0030), and
the greedy choice at T = 0. So at strength 0 both rows write the same, and elsewhere they differ by what the vector does
rather than by chance.

A conversation carries its own strengths and hands them to the model with every step; the steps of all conversations
pass one by one, in the order in which they come, through one thread. The shapes that a conversation's arithmetic sees
are therefore those it would see alone, and nobody's strength touches anybody else's answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.analysis.compose import vector_folder
from ws.analysis.controls import draw_seed
from ws.behaviors import behavior_name
from ws.console import say
from ws.diff import SteeringVector
from ws.errors import WsError, choose, require_characters, require_seed
from ws.files.runs import run_folder
from ws.lm.batches import left_pad, next_logits, padded_groups, takes_cache
from ws.lm.choice import choice_tokens, choice_variants
from ws.lm.hub import parse_id
from ws.lm.models import decode_answer, encode, end_ids, load_model, model_id, render_prompt, tokenizer_hash
from ws.options.shared import EngineOptions as EngineOptions
from ws.steer import DialBoard, steer_many

Message = Mapping[str, str]
Strengths = Mapping[str, float]
Result = TypeVar("Result")

BASE, STEERED = "base", "steered"


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
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise WsError(f"The temperature must be 0 or a positive number, not {self.temperature}.")
        if self.max_tokens < 1:
            raise WsError(f"An answer needs at least 1 token, not {self.max_tokens}.")
        require_seed(self.seed, "The sampling seed")


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


def pick(
    logits: Float[Tensor, "rows vocabulary"], temperature: float | int, draw: torch.Generator
) -> Int[Tensor, "rows"]:
    """The next token of every row, with the same random numbers for all of them; see the head of this module."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    noise = torch.empty(logits.shape[-1]).exponential_(generator=draw).clamp(min=torch.finfo().tiny).log()
    return (logits / temperature - noise.to(logits.device)).argmax(dim=-1)


def _readable(tok: Tokenizer, ids: Sequence[int], ended: bool) -> str:
    """An answer's tokens as text; of one that goes on, without the bytes of a character that is not complete."""
    text = decode_answer(tok, ids)
    return text if ended else text.rstrip("\ufffd")


# ---- the engine -----------------------------------------------------------------------------------------------------


class Engine:
    """A model with its vectors, for any number of conversations at once.

    The model is steered from here until `close`, and is the engine's alone: use it as a context manager.

    Args:
        model, tok: the base and its tokenizer.
        vectors: by the names that strengths go by.
        places: where each vector can be loaded from, for snippets.
        loading: the expression that loads the model, for snippets.

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
    ) -> None:
        self.model, self.tok, self.vectors = model, tok, dict(vectors)
        self.places = {n: f"{n}/vector" for n in vectors} | dict(places or {})
        self.loading = loading or f"ws.load_model({_literal(model_id(model))})"
        self.units = {name: self._calibrated(name) for name in vectors}
        self._ends, self._room = frozenset(end_ids(model, tok)), _context(model)
        self._thread, self._steering = ThreadPoolExecutor(1, "ws-engine"), ExitStack()
        try:
            self._dials: DialBoard = self._run(self._attach)
        except BaseException:
            self._thread.shutdown()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it came; answers that are being written end with an error."""
        self._run(self._steering.close)
        self._thread.shutdown()

    def converse(
        self, strengths: Mapping[str, float | int | str] | None = None, sampling: Sampling | None = None
    ) -> Conversation:
        """A new conversation with strengths of its own; vectors that are not named have strength 1."""
        return Conversation(self, strengths, sampling or Sampling())

    def strength(self, name: str, alpha: float | int | str) -> float:
        """A strength of the named vector as a number, from a number or calibrated units such as `+1u`."""
        vector = self.vectors[choose("vector", name, self.vectors)]
        return vector.strength(alpha if isinstance(alpha, str) else repr(alpha), tokenizer_hash(self.tok))

    def _calibrated(self, name: str) -> dict[str, float]:
        """The vector's `-1u` and `+1u`, as far as it has them."""
        known = {}
        for text in ("-1u", "+1u") if self.vectors[name].units else ():
            try:
                known[text] = self.strength(name, text)
            except WsError:  # this sign did not converge, or it is not of this vector and tokenizer: there is no mark
                continue
        return known

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
        # Not `ws.lm.generation.generate`: every token is shown when it is there, every row has its own strengths, which
        # the steps of other conversations change in between, and all rows share their random numbers.
        ids = [encode(self.tok, p) for p in prompts]
        steps = min(sampling.max_tokens, self._left(max(map(len, ids))))
        # Not a cache of fixed size: its width would depend on max_tokens, and with it the rounding of every step.
        cache = DynamicCache(config=self.model.config) if takes_cache(self.model) else None
        tokens, mask = left_pad(ids, self.tok.pad_token_id, self.model.device)
        draw = torch.Generator().manual_seed(seed)
        written: list[list[int]] = [[] for _ in ids]
        ended = [False] * len(ids)
        for _ in range(steps):
            if cache is None:
                texts = [prompt + answer for prompt, answer in zip(ids, written, strict=True)]
                logits = self._run(partial(self._from_the_start, texts, rows))
            else:
                logits = self._run(partial(self._forward, tokens, mask, cache, rows))
            for row, token in enumerate(pick(logits, sampling.temperature, draw).tolist()):
                ended[row] = ended[row] or token in self._ends
                written[row] += [] if ended[row] else [token]
            yield [_readable(self.tok, row, end) for row, end in zip(written, ended, strict=True)]
            if all(ended):
                return
            last = [self.tok.pad_token_id if end else row[-1] for row, end in zip(written, ended, strict=True)]
            tokens = torch.tensor(last, device=self.model.device)[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)

    def probabilities(
        self, prompt: str, rows: Sequence[Strengths], words: Sequence[str]
    ) -> Float[np.ndarray, "rows words"]:
        """The probability of each word as the next token, at the strengths of every row.

        A word counts in any case and with a space before it; see `ws.lm.choice`.

        Raises:
            WsError: a word that is no single token of this tokenizer.
        """
        variants = choice_variants(self.tok, words, self.model.device)
        ids = encode(self.tok, prompt)
        self._left(len(ids))
        p = self._run(partial(self._from_the_start, [ids] * len(rows), rows)).softmax(dim=-1)
        return torch.stack([p[:, v].sum(dim=-1) for v in variants], dim=1).double().cpu().numpy()

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

    # ---- in the engine's thread -----------------------------------------------------------------------------

    def _run(self, action: Callable[[], Result]) -> Result:
        return self._thread.submit(action).result()

    def _attach(self) -> DialBoard:
        return self._steering.enter_context(steer_many(self.model, self.vectors, 0.0))

    def _from_the_start(
        self, texts: Sequence[list[int]], rows: Sequence[Strengths]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The next token's logits behind every text, without a cache."""
        logits = dict[int, Tensor]()
        for group in padded_groups(self.model, texts):
            tokens, mask = left_pad([texts[i] for i in group], self.tok.pad_token_id, self.model.device)
            logits |= zip(group, self._forward(tokens, mask, None, [rows[i] for i in group]), strict=True)
        return torch.stack([logits[i] for i in range(len(texts))])

    @torch.inference_mode()
    def _forward(
        self, tokens: Tensor, mask: Tensor, cache: Cache | None, rows: Sequence[Strengths]
    ) -> Float[Tensor, "rows vocabulary"]:
        """The next token's logits of every row, steered with its strengths, in float32."""
        try:
            for name, dial in self._dials.items():
                dial.alpha = torch.tensor([row[name] for row in rows], dtype=torch.float32)
            logits = next_logits(self.model, tokens, mask, cache)
        finally:
            for dial in self._dials.values():
                dial.alpha = 0.0
        if logits.isnan().any():
            raise WsError("The model gave NaN; the strength is too large for it, choose a smaller one.")
        return logits.float()

    def _left(self, length: int) -> int:
        """Tokens that fit behind a prompt of this length."""
        if length >= self._room:
            raise WsError(
                f"The conversation is {length} tokens long and the model reads {self._room} at most; start a new one."
            )
        return self._room - length


def _context(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


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
        self._lock = RLock()
        for name, alpha in (strengths or {}).items():
            self.set(name, alpha)

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of every vector in the next answer, as a copy."""
        return dict(self._strengths)

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
        try:
            turn.sampling.check()
            prompts = [render_chat(self.engine.tok, self._messages(row, question)) for row in (BASE, STEERED)]
            rows = [dict.fromkeys(turn.strengths, 0.0), turn.strengths]
            seed = draw_seed(turn.sampling.seed, len(self.turns))
            for base, steered in self.engine.write(prompts, rows, turn.sampling, seed):
                grown = replace(turn, base=base, steered=steered, n_steps=turn.n_steps + 1)
                if not self._follow(turn, grown):
                    return
                turn = grown
                yield turn
        except WsError:
            self._follow(turn, None)
            raise
        with self._lock:
            if self._follow(turn, None):
                self.turns.append(turn)

    def ask(self, question: str) -> Turn:
        """Ask, and wait for both answers."""
        for _ in self.stream(question):
            pass
        return self.turns[-1]

    def again(self) -> Iterator[Turn]:
        """Answer the last question anew, with the strengths and the sampling of now, as `stream` does."""
        with self._lock:
            shown = self.shown
            if not shown:
                raise WsError("Nothing has been asked yet.")
            self._running, self.turns = None, shown[:-1]
        return self.stream(shown[-1].question)

    def stop(self) -> None:
        """Stop after the token that is being written; what there is of the answers is kept."""
        with self._lock:
            if self._running and self._running.n_steps:
                self.turns.append(replace(self._running, stopped=True))
            self._running = None

    def reset(self) -> None:
        """Forget all turns; strengths and sampling stay."""
        with self._lock:
            self._running, self.turns = None, []

    def _follow(self, turn: Turn, grown: Turn | None) -> bool:
        """Replace the turn that is being written, unless it was stopped; whether it was not."""
        with self._lock:
            mine = self._running is turn
            self._running = grown if mine else self._running
            return mine

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
            rows: strengths; without them the base's and those of now, `[2, words]`.
            question: another one, put as the first of a conversation.
            opener: a start of the answer that is put into the model's mouth.

        Raises:
            WsError: nothing to answer, no words, or a word that is no single token.
        """
        if not words:
            raise WsError("Name at least one word.")
        require_characters(" ".join([*words, question, opener]), "What is asked")
        with self._lock:
            messages: list[Message] = [{"role": "user", "content": question}]
            if not question:
                if not self.shown:
                    raise WsError("Nothing has been asked yet.")
                messages = self._messages(STEERED, self.shown[-1].question)
                messages = messages if self._running else [*messages[:-3], messages[-1]]
        prompt = render_chat(self.engine.tok, messages, opener)
        now = self.strengths
        return self.engine.probabilities(prompt, rows or [dict.fromkeys(now, 0.0), now], words)

    def snippet(self) -> str:
        """Python that loads the same model and vectors and gives the same answers, turn by turn."""
        names = ", ".join(
            f"{_literal(n)}: ws.SteeringVector.load({_literal(p)})" for n, p in self.engine.places.items()
        )
        turns = self.shown or [Turn("Your question", self.strengths, self.sampling)]
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


def vector_places(options: EngineOptions) -> dict[str, str]:
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


def _place(name: str, options: EngineOptions) -> str:
    try:
        return str(vector_folder(name, options.out, options.adapter, options.seed))
    except WsError:
        first = name.split("/")[0]
        if parse_id(name) is None or name.startswith((".", "~")) or (options.out / first).is_dir():
            raise
        return name


def open_engine(options: EngineOptions) -> Engine:
    """The engine with the model and all vectors loaded, and a line on stderr that says which."""
    o, places, sampling = options, vector_places(options), sampling_of(options)
    vectors = {name: SteeringVector.load(place) for name, place in places.items()}
    name = o.model or next(iter(vectors.values())).base_id
    given = {"device": o.device, "dtype": o.precision}
    chosen = "".join(f", {k}={_literal(v)}" for k, v in given.items() if v != "auto")
    model, tok = load_model(name, o.device, o.precision)
    engine = Engine(model, tok, vectors, places, f"ws.load_model({_literal(name)}{chosen})")
    for vector in vectors:
        engine.strength(vector, o.alpha)
    say(f"{name} with {', '.join(f'{n} ({p})' for n, p in places.items())}; at most {sampling.max_tokens} tokens.")
    return engine


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
