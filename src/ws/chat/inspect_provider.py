"""Models of Inspect (`inspect-ai`) that run steered in its own process: `ws/pocket`, with strengths as model arguments.

    inspect eval task.py --model ws/pocket -M vectors=honesty -M steering="{honesty: +1u}"

Every sample is a row of one batch (`ws.chat.batching`), and models that differ by their strengths alone share one
engine. Messages become a prompt as they do for `ws serve`, the defaults are the server's, and a seed gives the same
answer here and there. What is not done here is refused by name: nothing is ignored that could change an answer.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from threading import Lock
from typing import Any

from anyio import CapacityLimiter, to_thread
from click import ClickException
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from ws.analysis.controls import draw_seed
from ws.chat.batching import MAX_BATCH, Answer, Piece, Request
from ws.chat.engine import Engine, load_engine
from ws.chat.protocol import MAX_CHOICES, MAX_LOGPROBS, NEUTRAL, seed_of, split_messages, token_entry
from ws.diff import vector_digest
from ws.errors import MOST, WsError, choose, require_characters, require_count, shortened
from ws.lm.models import encode, encode_text, render_prompt, token_bytes, tokenizer_hash
from ws.options.shared import VectorsOptions, read_options
from ws.options.use import ServeOptions

MAX_TOKENS = ServeOptions.max_tokens  # of an answer, unless the task or the command says otherwise

_IDENTITY = "ws:"  # what the identity of a model begins with

# Settings of a request that are passed on to the engine, and those that Inspect itself acts upon.
_OURS = {
    *("max_tokens", "temperature", "top_p", "seed", "stop_seqs", "num_choices", "logprobs", "top_logprobs"),
    "extra_body",
}
_INSPECTS = {
    *("max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "adaptive_connections"),
    *("system_message", "max_tool_output", "reasoning_history", "fail_on_refusal", "cache"),
}


class ModelArgumentError(WsError, ClickException):
    """A model that cannot be had as it is asked for; Inspect's commands are click's, which prints the sentence only."""

    exit_code = 2


# ---- engines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectOptions(VectorsOptions):
    """Which vectors on which model, and how answers are batched; `-M name=value` sets each field but the model.

    Attributes:
        max_batch: answers that are written at a time.
        reproducible: no answer depends on what else is written, to the last bit; samples then share no batch.
    """

    max_batch: int = MAX_BATCH
    reproducible: bool = False

    @classmethod
    def read(cls, model: str, arguments: Mapping[str, Any]) -> InspectOptions:
        """The options in model arguments; `WsError` for one that is not known or of another type."""
        names = [f.name for f in fields(cls) if f.name != "model"]
        for name in arguments:
            choose("model argument", name, ["steering", *names])
        given = {name: value for name, value in arguments.items() if name != "steering"}
        options = read_options(cls, {**given, "model": model}, "model argument")
        require_count("max_batch", options.max_batch, 1)
        return options


class _Engines:
    """The engines of this process, one for each set of options, as long as a model of Inspect uses it."""

    def __init__(self) -> None:
        self._lock, self._shared = Lock(), dict[InspectOptions, tuple[Engine, int]]()
        atexit.register(self.close)

    def take(self, options: InspectOptions) -> Engine:
        """The engine for these options, loaded unless it is there."""
        with self._lock:
            engine, users = self._shared.get(options) or (_load(options), 0)
            self._shared[options] = engine, users + 1
        return engine

    def leave(self, engine: Engine) -> None:
        """Somebody who took the engine needs it no more; after the last it is closed."""
        with self._lock:
            options, users = next(((o, n) for o, (e, n) in self._shared.items() if e is engine), (None, 0))
            if options is None:  # closed with all others
                return
            if users > 1:
                self._shared[options] = engine, users - 1
                return
            del self._shared[options]
        engine.close()

    def close(self) -> None:
        """Close all, at the end of the process."""
        with self._lock:
            for engine, _ in self._shared.values():
                engine.close()
            self._shared.clear()


def _load(options: InspectOptions) -> Engine:
    # Inspect bounds how much is asked at once by itself.
    o, known = options, ServeOptions.max_known
    return load_engine(o, reproducible=o.reproducible, max_batch=o.max_batch, max_queue=MOST, max_known=known)


_ENGINES = _Engines()


def _strengths(engine: Engine, steering: Any) -> dict[str, float]:
    """Strengths as numbers: of vectors by name, or one for all of them; `WsError` for unknown names."""
    if not isinstance(steering, Mapping):
        steering = {} if steering is None else dict.fromkeys(engine.vectors, steering)
    for name, alpha in steering.items():
        if isinstance(alpha, bool) or not isinstance(alpha, float | int | str):
            raise WsError(f"steering: {name} needs a number or calibrated units such as +1u, not {shortened(alpha)}.")
    return {name: engine.strength(str(name), alpha) for name, alpha in steering.items()}


# ---- what is asked --------------------------------------------------------------------------------------------------


def require_supported(tools: Sequence[ToolInfo], config: GenerateConfig) -> None:
    """`WsError` for what is asked of a model and not done here."""
    if tools:
        raise WsError(f"A ws model calls no tools; leave {tools[0].name} out of the task.")
    given = config.model_dump(exclude_none=True, exclude=_OURS | _INSPECTS)
    if unknown := sorted(name for name, value in given.items() if value and value not in NEUTRAL.get(name, ())):
        raise WsError(f"A ws model does nothing about {', '.join(unknown)}; leave it out.")
    if others := sorted((config.extra_body or {}).keys() - {"steering"}):
        raise WsError(f"A ws model understands `steering` in extra_body, and not {others[0]}.")
    if config.top_logprobs is not None and not config.logprobs:
        raise WsError("top_logprobs needs logprobs beside it.")
    require_count("max_tokens", config.max_tokens, 1)
    require_count("num_choices", config.num_choices, 1, MAX_CHOICES)
    require_count("top_logprobs", config.top_logprobs, 0, MAX_LOGPROBS)


def prompt_of(engine: Engine, messages: Sequence[ChatMessage]) -> str:
    """The text up to where the answer starts, as `ws.lm.models.render_prompt` makes it.

    System messages stand before all others. An assistant's message at the end is the start of the answer.

    Raises:
        WsError: messages in another order, of tools, or with anything but text.
    """
    said = [{"role": message.role, "content": _text(message)} for message in messages]
    opener = said.pop()["content"] if said and said[-1]["role"] == "assistant" else ""
    system, earlier, user = split_messages(said)
    return render_prompt(engine.tok, user, system=system or None, earlier=earlier, opener=opener)


def _text(message: ChatMessage) -> str:
    """A message's text; what another model thought before it is not part of the conversation."""
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise WsError("A ws model calls no tools, and reads no conversation in which some were called.")
    for part in message.content if isinstance(message.content, list) else []:
        if not isinstance(part, ContentText | ContentReasoning):
            raise WsError(f"A ws model reads text alone, and no {part.type}.")
    return require_characters(message.text, "A message")


def _requests(tokens: list[int], strengths: Mapping[str, float], config: GenerateConfig) -> list[Request]:
    """One for every choice; as over the server each draws from numbers of its own, also at one seed."""
    seed = seed_of(config.seed)
    stop = tuple(require_characters(text, "A stop text") for text in config.stop_seqs or () if text)
    return [
        Request(
            tokens,
            strengths,
            MAX_TOKENS if config.max_tokens is None else config.max_tokens,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            seed=draw_seed(seed, number),
            stop=stop,
            logprobs=(config.top_logprobs or 0) if config.logprobs else None,
        )
        for number in range(1 if config.num_choices is None else config.num_choices)
    ]


# ---- the model ------------------------------------------------------------------------------------------------------


class SteeredAPI(ModelAPI):
    """What `get_model("ws/pocket", steering={"honesty": "+1u"}, vectors=["honesty"])` makes.

    Args:
        model_name: the model, as `--model` of every command takes it.
        config: settings for all requests; see Inspect.
        model_args: `steering`, strengths of vectors by name (numbers, or calibrated units), or one for all of them;
            those that are not named have strength 0, and so have all without it. The others are fields of
            `InspectOptions`.

    Raises:
        ModelArgumentError: the model, a vector or a strength cannot be had.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008, Inspect's own signature
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        try:
            if base_url and not base_url.startswith(_IDENTITY):
                raise WsError("A ws model runs in this process; ask `ws serve` by Inspect's provider `openai-api`.")
            self._options = InspectOptions.read(model_name, model_args)
            self.engine = _ENGINES.take(self._options)
            try:
                self.strengths = _strengths(self.engine, model_args.get("steering"))
            except WsError:
                _ENGINES.leave(self.engine)
                raise
            self._bytes, self._is_closed = token_bytes(self.engine.tok), False
            self.base_url = self._identity()
        except WsError as problem:
            raise ModelArgumentError(str(problem)) from problem

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one conversation, `num_choices` times.

        Raises:
            WsError: something that is not done here, or a strength at which the model gives NaN.
        """
        start = time.perf_counter()
        require_supported(tools, config)
        strengths = self.strengths
        if config.extra_body:
            strengths = strengths | _strengths(self.engine, config.extra_body["steering"])
        tokens = encode(self.engine.tok, prompt_of(self.engine, input))
        if len(tokens) >= (room := self.engine.scheduler.room):
            text = f"The prompt is {len(tokens)} tokens long and the model reads {room} at most."
            return ModelOutput.from_content(self.model_name, text, stop_reason="model_length", error=text)
        requests = _requests(tokens, strengths, config)
        answers = self.engine.scheduler.submit(*requests)
        try:
            # A thread of this sample's own: those that Inspect keeps for such things are few.
            limit = CapacityLimiter(1)
            rows = [await to_thread.run_sync(list, a, abandon_on_cancel=True, limiter=limit) for a in answers]
        finally:
            for answer in answers:
                answer.cancel()
        written = sum(answer.n_tokens for answer in answers)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(*parts) for parts in zip(requests, answers, rows, strict=True)],
            usage=ModelUsage(input_tokens=len(tokens), output_tokens=written, total_tokens=len(tokens) + written),
            time=time.perf_counter() - start,
        )

    def _identity(self) -> str:
        """All that answers depend on beside the request, in place of an address.

        Inspect finds the answers that it keeps (`--cache`) by the address, and not by model arguments. It also brings
        the address back when a log is run again.
        """
        digests = sorted((name, vector_digest(vector)) for name, vector in self.engine.vectors.items())
        parts = (self._options, sorted(self.strengths.items()), digests, tokenizer_hash(self.engine.tok))
        return _IDENTITY + sha256(repr(parts).encode("utf-8")).hexdigest()[:16]

    def max_tokens(self) -> int:
        """Of an answer, where nothing is said."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Samples that are answered at once: as many as are rows of a batch."""
        return self._options.max_batch

    def connection_key(self) -> str:
        """Models of one engine share what it can do at once."""
        return repr(self._options)

    def collapse_user_messages(self) -> bool:
        """Chat templates want the user and the assistant in turn."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """The same."""
        return True

    async def count_text_tokens(self, text: str) -> int:
        """By the model's own tokenizer; Inspect would fetch another one."""
        return len(encode_text(self.engine.tok, text))

    def close(self) -> None:
        """Need the engine no more."""
        if not self._is_closed:
            self._is_closed = True
            _ENGINES.leave(self.engine)

    def _choice(self, request: Request, answer: Answer, pieces: Sequence[Piece]) -> ChatCompletionChoice:
        content = "".join(piece.text for piece in pieces)
        return ChatCompletionChoice(
            message=ChatMessageAssistant(content=content, model=self.model_name, source="generate"),
            stop_reason=_stop_reason(request, answer),
            logprobs=None if request.logprobs is None else Logprobs(content=[self._logprob(p) for p in pieces]),
        )

    def _logprob(self, piece: Piece) -> Logprob:
        top = [TopLogprob(**token_entry(self._bytes(token), logprob)) for token, logprob in piece.top]
        return Logprob(**token_entry(self._bytes(piece.token), piece.logprob), top_logprobs=top or None)


def _stop_reason(request: Request, answer: Answer) -> StopReason:
    """Why an answer ended, in Inspect's words."""
    if answer.finish == "length":
        return "max_tokens" if answer.n_tokens >= request.max_tokens else "model_length"
    return "stop" if answer.finish == "stop" else "unknown"
