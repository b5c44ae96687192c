"""What a request over HTTP becomes: rows for the engine, and from their pieces the answer, whole or as a stream.

A request is answered completely or refused with a sentence: too many rows for the queue are told to come back, and rows
of a request that ends early leave the batch at the next step.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ws.analysis.controls import draw_seed
from ws.chat.batching import Answer, BusyError, ClosedError, FailureError, Piece, Request, Written
from ws.chat.engine import Engine, Offered
from ws.chat.protocol import (
    Addition,
    Body,
    Chat,
    ChatBody,
    Completion,
    CompletionBody,
    RequestError,
    Token,
    error_object,
    parse_body,
    seed_of,
    split_model,
)
from ws.chat.telemetry import Metrics
from ws.diff import SteeringVector
from ws.errors import DiskError, WsError, choose, shortened
from ws.export.card import describe, vector_card
from ws.files.places import place_below
from ws.files.public import public, public_name
from ws.files.runs import RUN_MANIFEST
from ws.lm.models import encode, encode_text, model_id, render_prompt, token_bytes
from ws.options.use import ServeOptions

LONGEST_WAIT = 60  # seconds that a client is told to wait at most
FAILED = "The server failed at this request; its log says why."


# ---- a request and its rows -----------------------------------------------------------------------------------------


@dataclass
class Order:
    """A request that was read, with what its rows have answered so far.

    Attributes:
        body: what was asked.
        dialect: how the answer looks.
        rows: what the engine is asked, `n` for every prompt in turn.
        echoes: the text that an answer begins with, by row; empty without `echo`.
        n_prompt: tokens of all prompts.
        facts: what the log says of the request.
        answers, pieces: of every row, as far as they have come.
        arrived: what has come and is not among them yet, with the row's number.
    """

    body: ChatBody | CompletionBody
    dialect: Chat | Completion
    rows: Sequence[Request]
    echoes: Sequence[str]
    n_prompt: int
    facts: dict[str, Any]
    answers: list[Answer] = field(default_factory=list)
    pieces: list[list[Piece]] = field(default_factory=list)
    arrived: asyncio.Queue[tuple[int, Written]] = field(default_factory=asyncio.Queue)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, object_name: str) -> dict[str, Any]:
        """What every answer and every chunk begins with."""
        identity = f"{self.dialect.prefix}{self.facts['id']}"
        return {"id": identity, "object": object_name, "created": self.created, "model": self.body.model}

    def usage(self) -> dict[str, int]:
        """Tokens read and written; a prompt counts once however many answers it has."""
        written = sum(map(len, self.pieces))
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": written,
            "total_tokens": self.n_prompt + written,
        }

    def cancel(self) -> None:
        """Have the rows leave the batch, those that are not finished."""
        for answer in self.answers:
            answer.cancel()


class Service:
    """What the routes do.

    Args:
        engine: what answers; the service adds and removes vectors where `--admin` allows it.
        options: names and limits.

    Attributes:
        name: what the base is called in requests.
        metrics: what was counted.
    """

    def __init__(self, engine: Engine, options: ServeOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = Metrics(lambda: engine.scheduler.stats)
        self.name = options.served_name or public_name(model_id(engine.model))
        self.created = int(time.time())
        self._most = engine.scheduler.max_queue  # rows of a request, which begin together
        self._token = token_bytes(engine.tok)
        self._special = {i for i, token in engine.tok.added_tokens_decoder.items() if token.special}
        self._cards = dict[str, tuple[SteeringVector, str]]()

    # ---- reading ------------------------------------------------------------------------------------------------

    def read_chat(self, content: bytes, noted: dict[str, Any]) -> Order:
        """The rows of a request to `/v1/chat/completions`; `WsError` for what cannot be answered."""
        body = parse_body(content, ChatBody)
        strengths = self._strengths(body)
        system, earlier, user = body.conversation()
        text = render_prompt(self.engine.tok, user, system=system or None, earlier=earlier)
        return self._order(body, Chat(), strengths, [(encode(self.engine.tok, text), "")], noted)

    def read_completion(self, content: bytes, noted: dict[str, Any]) -> Order:
        """The rows of a request to `/v1/completions`; `WsError` for what cannot be answered."""
        body = parse_body(content, CompletionBody)
        strengths, tok = self._strengths(body), self.engine.tok
        prompts = list[tuple[list[int], str]]()
        size = self.engine.model.get_input_embeddings().weight.shape[0]
        for prompt in body.prompts():
            if isinstance(prompt, str):
                tokens = encode_text(tok, prompt)
                prompts.append((tokens, self._as_read(tokens, prompt) if body.echo else prompt))
            elif strange := next((token for token in prompt if not 0 <= token < size), None):
                raise RequestError(400, f"There is no token {strange}; they go from 0 to {size - 1}.", "prompt")
            else:
                prompts.append((prompt, tok.decode(prompt, clean_up_tokenization_spaces=False)))
        ahead = [self._ahead(*prompt) for prompt in prompts for _ in range(body.n)] if body.echo else ()
        return self._order(body, Completion(ahead), strengths, prompts, noted)

    def _as_read(self, tokens: Sequence[int], text: str) -> str:
        """A prompt as its tokens have it behind their start; it is another where a tokenizer composes accents."""
        if self._characters(tokens).endswith(text):
            return text
        return self._characters(tokens[len(encode_text(self.engine.tok, "")) :])

    def _ahead(self, tokens: Sequence[int], text: str) -> int:
        """Characters by which the tokens of a prompt are longer than its text: a start, or a space before a word."""
        return max(0, len(self._characters(tokens)) - len(text))

    def _characters(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self._token, tokens)).decode("utf-8", "replace")

    def _order(
        self,
        body: ChatBody | CompletionBody,
        dialect: Chat | Completion,
        strengths: Mapping[str, float],
        prompts: Sequence[tuple[list[int], str]],
        noted: dict[str, Any],
    ) -> Order:
        echo = isinstance(body, CompletionBody) and body.echo
        if len(prompts) * body.n > self._most:
            many = f"{len(prompts) * body.n} answers are asked for"
            raise RequestError(400, f"{many}, and a request has {self._most} here at most.", "n")
        seed = seed_of(body.seed)
        rows = [
            Request(
                tokens=tokens,
                strengths=strengths,
                max_tokens=self._length(body, len(tokens)),
                temperature=body.temperature,
                top_p=body.top_p,
                seed=draw_seed(seed, number),  # not the prompt's number: beside others it is answered as it is alone
                stop=body.stops,
                logprobs=body.wanted_logprobs,
                echo=echo,
                trim=isinstance(body, ChatBody),
            )
            for tokens, _ in prompts
            for number in range(body.n)
        ]
        noted |= {"stream": body.stream, "strengths": dict(strengths)}
        noted |= {"contents": msgspec.to_builtins(body)} if self.options.log_contents else {}
        echoes = [text if echo else "" for _, text in prompts for _ in range(body.n)]
        return Order(body, dialect, rows, echoes, sum(len(tokens) for tokens, _ in prompts), noted)

    def _strengths(self, body: Body) -> dict[str, float]:
        """The strengths that a request names, as numbers; `RequestError` for unknown vectors."""
        by_name = split_model(body.model, self.name, self.engine.vectors)
        if both := sorted(by_name.keys() & body.steering.keys()):
            raise RequestError(
                400, f"{both[0]!r} has a strength in the model's name and one in `steering`.", "steering"
            )
        strengths = dict[str, float]()
        for name, value in {**by_name, **body.steering}.items():
            try:
                choose("vector", name, self.engine.vectors)
            except WsError as problem:
                raise RequestError(404, str(problem), "steering", "vector_not_found") from problem
            try:
                strengths[name] = self.engine.strength(name, value)
            except WsError as problem:
                raise RequestError(400, f"{name}: {problem}", "steering", "invalid_strength") from problem
            if abs(strengths[name]) > (most := self.options.max_strength):
                why = f"{name}: a strength lies between {-most:g} and {most:g} here, not at {strengths[name]:g}."
                raise RequestError(400, why, "steering", "invalid_strength")
        return strengths

    def _length(self, body: ChatBody | CompletionBody, n_prompt: int) -> int:
        """How many tokens an answer may have; `RequestError` where prompt or answer are too long."""
        most, room = self.options.max_tokens, self.engine.scheduler.room
        limit, wanted = min(self.options.max_prompt or room, room - 1), body.wanted_tokens
        if n_prompt == 0:
            raise RequestError(400, "The prompt is empty.", "prompt")
        if n_prompt > limit:
            raise RequestError(
                400,
                f"The prompt has {n_prompt} tokens; {limit} are read here at most.",
                None,
                "context_length_exceeded",
            )
        if wanted is not None and wanted > most:
            raise RequestError(
                400, f"{wanted} tokens are asked for, and an answer has {most} here at most.", "max_tokens"
            )
        if wanted is not None and n_prompt + wanted > room:
            both = f"The prompt has {n_prompt} tokens and {wanted} are asked for"
            raise RequestError(400, f"{both}; the model reads {room} in all.", "max_tokens", "context_length_exceeded")
        return min(most, room - n_prompt) if wanted is None else wanted

    # ---- answering ----------------------------------------------------------------------------------------------

    def submit(self, order: Order) -> None:
        """Hand the rows of a request to the engine, all or none; `RequestError` where the queue has no room."""
        loop = asyncio.get_running_loop()

        def put(number: int, piece: Written) -> None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(order.arrived.put_nowait, (number, piece))

        try:
            order.answers = self.engine.scheduler.submit(*order.rows, put=put)
        except BusyError as problem:
            wait = min(max(1, math.ceil(self.metrics.mean_seconds())), LONGEST_WAIT)
            raise RequestError(429, str(problem), code="queue_full", retry_after=str(wait)) from problem
        order.pieces = [[] for _ in order.answers]

    async def follow(self, order: Order) -> AsyncGenerator[tuple[int, Piece | None]]:
        """Every piece of every row as it comes, with the row's number; None where a row has ended.

        Raises:
            WsError: a row has failed.
            RequestError: it took too long.
        """
        start, timeout = order.facts["start"], self.options.timeout
        late = RequestError(504, f"The answer was not finished after {timeout:g} seconds.", code="timeout")
        left = start + timeout - time.perf_counter()
        alarm = asyncio.get_running_loop().call_later(left, order.arrived.put_nowait, (0, late))
        going, is_first = len(order.answers), True
        try:
            while going:
                number, piece = await order.arrived.get()
                if isinstance(piece, WsError):
                    raise piece
                if is_first:
                    seconds = time.perf_counter() - start
                    self.metrics.first_token.labels(order.facts["path"]).observe(seconds)
                    is_first = False
                if piece is None:
                    going -= 1
                else:
                    order.pieces[number].append(piece)
                yield number, piece
        finally:
            alarm.cancel()

    def finish(self, order: Order) -> None:
        """Free what a request held, and note what it came to."""
        order.cancel()
        usage = order.usage()
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.completion_tokens.inc(usage["completion_tokens"])
        order.facts |= {"prompt_tokens": usage["prompt_tokens"], "completion_tokens": usage["completion_tokens"]}
        order.facts["finish"] = [answer.finish for answer in order.answers]
        if self.options.log_contents:
            order.facts["answers"] = ["".join(piece.text for piece in row) for row in order.pieces]

    async def whole(self, order: Order) -> dict[str, Any]:
        """The answer to a request that wants no stream."""
        async with aclosing(self.follow(order)) as pieces:
            async for _ in pieces:
                pass
        choices = []
        for number, (answer, row) in enumerate(zip(order.answers, order.pieces, strict=True)):
            text = order.echoes[number] + "".join(piece.text for piece in row)
            tokens = self._tokens(order, answer.prompt, row)
            choices.append(order.dialect.choice(number, text, tokens, answer.finish))
        return order.head(order.dialect.whole) | {"choices": choices, "usage": order.usage()}

    async def events(self, order: Order) -> AsyncGenerator[str]:
        """The answer as server-sent events; one that fails on the way ends with an error object."""
        dialect, opened = order.dialect, set[int]()
        head = order.head(dialect.chunk) | ({"usage": None} if order.body.sends_usage else {})

        def chunk(*choices: dict[str, Any] | None) -> str:
            return event(head | {"choices": [c for c in choices if c is not None]})

        try:
            async with aclosing(self.follow(order)) as pieces:
                async for number, piece in pieces:
                    answer = order.answers[number]
                    if number not in opened:
                        opened.add(number)
                        if opening := dialect.opening(number):
                            yield chunk(opening)
                        if order.echoes[number]:
                            tokens = self._tokens(order, answer.prompt)
                            yield chunk(dialect.piece(number, order.echoes[number], tokens))
                    if piece is None:
                        yield chunk(dialect.closing(number, answer.finish))
                    elif piece.text or order.body.wanted_logprobs is not None:
                        yield chunk(dialect.piece(number, piece.text, self._tokens(order, (), [piece])))
            if order.body.sends_usage:
                yield event(head | {"choices": [], "usage": order.usage()})
            yield "data: [DONE]\n\n"
        except WsError as problem:
            order.facts |= noted_of(problem, self.options)
            yield event(error_object(*error_content(problem)))
        except Exception:
            yield event(error_object(500, FAILED))
            raise

    def _tokens(self, order: Order, echoed: Iterable[Piece], written: Iterable[Piece] = ()) -> list[Token] | None:
        if order.body.wanted_logprobs is None:
            return None
        pieces = [*((p, True) for p in echoed), *((p, p.token not in self._special) for p in written)]
        return [
            Token(self._token(p.token), p.logprob, [(self._token(token), logprob) for token, logprob in p.top], is_text)
            for p, is_text in pieces
        ]

    # ---- models and vectors -------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """The base, and every vector at strength 1 and at its calibrated ones, for clients that choose from a list."""
        names = [self.name]
        for vector, offered in self.engine.offered.items():
            names += [f"{self.name}+{vector}@{strength}" for strength in ("1", *offered.units)]
        return [self._model(name) for name in names]

    def model(self, name: str) -> dict[str, Any]:
        """One entry of that list, also for a name that is not in it; `RequestError` where it cannot be asked."""
        self._strengths(Body(model=name))
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "weight-steering"}

    def vectors(self) -> list[dict[str, Any]]:
        """Every vector with its calibrated strengths, its model card, and the base that it is for."""
        return [
            {
                "id": name,
                "object": "steering_vector",
                "units": offered.units,
                "base": public_name(offered.vector.base_id),
                "base_fingerprint": offered.vector.base_fingerprint,
                "card": self._card(name, offered),
            }
            for name, offered in self.engine.offered.items()
        ]

    def _card(self, name: str, offered: Offered) -> str:
        """The vector's card in Markdown, as it would be published with the tables of its run."""
        known, vector = self._cards.get(name), offered.vector
        if known is None or known[0] is not vector:
            folder = Path(offered.place)
            is_of_run = folder.name == "vector" and (folder.parent / RUN_MANIFEST).is_file()
            about = describe(vector, name, folder.parent if is_of_run else None)
            known = self._cards[name] = vector, str(vector_card(about))
        return known[1]

    def add(self, content: bytes) -> str:
        """Add a vector that lies below `--out`; its name."""
        given = parse_body(content, Addition)
        if not re.fullmatch(r"[^+@\s]+", given.name):
            raise RequestError(400, "A vector's name has no spaces, no + and no @.", "name")
        if given.name in self.engine.vectors:
            raise RequestError(409, f"There is a vector named {given.name!r} already; remove it first.", "name")
        try:
            place = place_below(self.options.out, given.vector, "The request")
        except WsError as problem:
            usage = "A vector is named by its place below the folder of runs, such as honesty/lora"
            raise RequestError(400, f"{usage}, not {shortened(given.vector)}.", "vector") from problem
        inner = place / "vector"
        if place.is_symlink() or inner.is_symlink() or not place.is_dir():
            raise RequestError(404, f"There is no vector {shortened(given.vector)} below the folder of runs.", "vector")
        place = inner if inner.is_dir() else place
        try:
            self.engine.add(given.name, SteeringVector.load(place), str(place))
        except WsError as problem:  # which names folders of this machine
            raise RequestError(400, public(str(problem)), "vector") from problem
        return given.name

    def remove(self, name: str) -> None:
        """Remove a vector."""
        try:
            choose("vector", name, self.engine.vectors)
        except WsError as problem:
            raise RequestError(404, str(problem), "name", "vector_not_found") from problem
        self.engine.remove(name)


def error_content(problem: WsError) -> tuple[int, str, str | None, str | None]:
    """Status and content of the error object for a problem."""
    if isinstance(problem, RequestError):
        return problem.status, str(problem), problem.param, problem.code
    if isinstance(problem, ClosedError):
        return 503, "The server is ending; ask again when it is back.", None, "ending"
    if isinstance(problem, (FailureError, DiskError)):
        return 500, FAILED, None, None
    return 400, str(problem), None, None


def noted_of(problem: WsError, options: ServeOptions) -> dict[str, str]:
    """What the log says of a refusal; its sentence may quote what was asked."""
    status, _, param, code = error_content(problem)
    shows = options.log_contents or status >= 500
    return {"error": code or param or "refused"} | ({"message": str(problem)} if shows else {})


def event(value: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"
