"""What clients of OpenAI's API send and are sent, as types; nothing here knows a model or a socket.

A request is read strictly. A parameter that is not understood is refused by name, unless it says what holds anyway
(`presence_penalty: 0`) or is a label of the client's own (`user`); nothing is ignored that could change an answer.

Strengths come as an object `steering` beside the other parameters, or in the name of the model for clients that can say
nothing else: `pocket+honesty@1.5`, `pocket+honesty@+1u+sycophancy@-0.5`.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ws.errors import WsError, did_you_mean, require_characters, shortened
from ws.files.reading import convert, strict_json

MAX_LOGPROBS, MAX_CHOICES, MAX_STOPS = 20, 128, 16
LOWEST = -9999.0  # JSON has no infinity: OpenAI's number for what a model thinks impossible

# Labels of the client's own, which are for its own records.
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# What is not done here, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), (0,)),
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "moderation", "verbosity"), ()),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "logit_bias": ({},),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
}

Steering = Mapping[str, float | int | str]


class RequestError(WsError):
    """A request that is not answered: a sentence with what else OpenAI's error objects hold.

    Attributes:
        status: of HTTP.
        param: which parameter is wrong, None where it is none in particular.
        code: for programs.
        headers: to send along.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_object(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- what is asked --------------------------------------------------------------------------------------------------


class StreamOptions(Struct, forbid_unknown_fields=True):
    """How a stream is written; `include_usage` adds a last chunk with the number of tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Body(Struct, forbid_unknown_fields=True, kw_only=True):
    """What requests of both kinds hold; the defaults are OpenAI's."""

    model: str
    steering: dict[str, float | str] = {}
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    seed: int | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    def __post_init__(self) -> None:
        if self.stream_options is None:
            return
        if not self.stream:
            raise RequestError(400, "stream_options needs `stream: true` beside it.", "stream_options")
        if self.stream_options.include_obfuscation:
            raise RequestError(400, "Streams are not obfuscated here; leave it out.", "stream_options")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer; empty ones end none."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(require_characters(stop, "A stop text") for stop in stops if stop)

    @property
    def sends_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Message(Struct, forbid_unknown_fields=True, kw_only=True):
    """One message of a chat; its content is a text, or parts that are texts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The content as one text; `RequestError` for pictures, sounds and files."""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.keys() != {"type", "text"} or part["type"] != "text" or not isinstance(part["text"], str):
                raise RequestError(400, f"Only text is read here, not {part.get('type', part)!r:.40}.", "messages")
        return "".join(part["text"] for part in self.content)


class ChatBody(Body, kw_only=True):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """At most so many tokens, under either name; `RequestError` where they differ."""
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                400, "max_tokens and max_completion_tokens mean the same and differ; send one.", "max_tokens"
            )
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the most probable tokens are shown beside the chosen one; None for no probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(400, "top_logprobs needs `logprobs: true` beside it.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> tuple[str, list[dict[str, str]], str]:
        """The system's text, what was said, and what the user says last."""
        return split_messages(
            [{"role": m.role, "content": require_characters(m.text, "A message")} for m in self.messages]
        )


def split_messages(messages: Sequence[dict[str, str]]) -> tuple[str, list[dict[str, str]], str]:
    """The system's text, what was said, and what the user says last.

    Raises:
        RequestError: a system message behind others, or another last message than the user's.
    """
    heads = next((i for i, m in enumerate(messages) if m["role"] in ("user", "assistant")), len(messages))
    system, rest = "\n\n".join(m["content"] for m in messages[:heads]), list(messages[heads:])
    if any(m["role"] in ("system", "developer") for m in rest):
        raise RequestError(400, "A system message stands before all others here.", "messages")
    if not rest or rest[-1]["role"] != "user":
        raise RequestError(400, "The last message must be the user's, for it is what is answered.", "messages")
    return system, rest[:-1], rest[-1]["content"]


class CompletionBody(Body, kw_only=True):
    """A request to `/v1/completions`; a prompt is a text or a list of tokens, and there may be several."""

    prompt: str | list[Any]
    max_tokens: Annotated[int, Meta(ge=0)] = 16
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

    @property
    def wanted_tokens(self) -> int | None:
        """At most so many tokens."""
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(400, "max_tokens 0 asks for nothing but the prompt: set `echo`.", "max_tokens")
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the most probable tokens are shown beside the chosen one; None for no probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as a text or as tokens."""
        given = self.prompt
        single = isinstance(given, str) or (bool(given) and all(type(token) is int for token in given))
        prompts = [given] if single else list(given)
        for prompt in prompts:
            if isinstance(prompt, str):
                require_characters(prompt, "The prompt")
            elif not (isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)):
                raise RequestError(
                    400,
                    f"A prompt is a text or a list of tokens, not {shortened(prompt)}; several make a list.",
                    "prompt",
                )
        if not prompts:
            raise RequestError(400, "The list of prompts is empty.", "prompt")
        return prompts


class Addition(Struct, forbid_unknown_fields=True, kw_only=True):
    """A vector to add while the server runs: what to call it, and where it lies below the folder of runs."""

    name: str
    vector: str


Kind = TypeVar("Kind", bound=Struct)


def parse_body(content: bytes, kind: type[Kind]) -> Kind:
    """The request in a body of HTTP.

    Raises:
        RequestError: no UTF-8, no JSON, other types, or a parameter that is not understood; it names the parameter.
    """
    try:
        given = _without_nulls(strict_json(content.decode("utf-8")), but="steering")
    except UnicodeDecodeError as problem:
        where = f"byte 0x{content[problem.start]:02x} at position {problem.start}"
        raise RequestError(400, f"The request is not UTF-8: {where}.", code="invalid_utf8") from problem
    except WsError as problem:
        raise RequestError(400, f"The request is not JSON: {problem}", code="invalid_json") from problem
    if not isinstance(given, dict):
        raise RequestError(400, f"The request is no object of JSON but {shortened(given)}.", code="invalid_json")
    try:
        return convert(_understood(given, kind), kind)
    except msgspec.ValidationError as problem:
        what, _, place = str(problem).rstrip("`").partition(" - at `$.")
        param = place.split("[")[0] or None
        raise RequestError(400, f"{f'{place}: ' if place else ''}{what}.", param, "invalid_value") from problem


def _without_nulls(value: Any, but: str = "") -> Any:
    """JSON without the keys that hold null, which is how clients write what they do not say.

    What lies under the key `but` keeps its own: a strength that is null was to be one.
    """
    if isinstance(value, dict):
        said = {key: part for key, part in value.items() if part is not None}
        return {key: part if key == but else _without_nulls(part) for key, part in said.items()}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _understood(given: Mapping[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """The parameters without those that change nothing; `RequestError` for what nothing is done about."""
    fields = {field.name for field in msgspec.structs.fields(kind)}
    for name, value in given.items():
        if name in fields or name in _LABELS or (name in NEUTRAL and value in NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            raise RequestError(
                400, f"{name} is not supported by this server; leave it out.", name, "unsupported_parameter"
            )
        hint = did_you_mean(name, fields)
        hint = hint if "Did you mean" in hint else ""
        raise RequestError(400, f"There is no parameter named {name!r:.60}.{hint}", name[:60], "unknown_parameter")
    return {name: value for name, value in given.items() if name in fields}


def seed_of(given: int | None) -> int:
    """The seed that a request draws with: its own, or one by chance."""
    return secrets.randbits(32) if given is None else given % 2**32


def split_model(name: str, served: str, vectors: Iterable[str]) -> dict[str, str]:
    """The strengths in the name of a model, by vector.

    Args:
        name: as a client gives it, such as `pocket+honesty@1.5`.
        served: the name of the base here.
        vectors: the names of those that are known, which may hold any character.

    Raises:
        RequestError: another model, a vector without its strength, or one that is named twice.
    """
    if not name.startswith(served) or (len(name) > len(served) and name[len(served)] != "+"):
        hint = did_you_mean(name, [served])
        raise RequestError(404, f"There is no model named {shortened(name)}.{hint}", "model", "model_not_found")
    known = "|".join(map(re.escape, sorted(vectors, key=len, reverse=True)))
    pair = re.compile(rf"\+({known}|[^+@]+)@([+-]?(?:[^+@]|(?<=[eE])\+(?=\d))+)")
    rest, strengths = name[len(served) :], dict[str, str]()
    for vector, strength in pair.findall(rest):
        if vector in strengths:
            raise RequestError(400, f"The model's name has the vector {vector!r} twice.", "model")
        strengths[vector] = strength
    if pair.sub("", rest):
        usage = f"write a vector with its strength, such as {served}+honesty@1.5"
        raise RequestError(
            404, f"The model's name {shortened(name)} is not understood; {usage}.", "model", "model_not_found"
        )
    return strengths


# ---- what is answered -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """A token with its probability.

    Attributes:
        raw: its bytes, which need not be whole characters.
        logprob: in nats, None where there is none: nothing stands before the first token of a prompt.
        top: the most probable tokens in its place, with theirs.
        is_text: whether the text has it; special tokens of an answer are left out.
    """

    raw: bytes
    logprob: float | None
    top: Sequence[tuple[bytes, float]] = ()
    is_text: bool = True

    @property
    def text(self) -> str:
        """The token as text; OpenAI's way of writing bytes that are none."""
        return token_text(self.raw)


def token_text(raw: bytes) -> str:
    """A token's bytes as text: `bytes:\\xe2\\x80` where they are no whole characters."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_entry(raw: bytes, logprob: float | None) -> dict[str, Any]:
    """A token as OpenAI lists it beside its probability."""
    return {"token": token_text(raw), "logprob": _number(logprob), "bytes": list(raw)}


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)


class Chat:
    """How answers of `/v1/chat/completions` look, whole and in chunks."""

    prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, index: int, text: str, tokens: Sequence[Token] | None, finish: str | None) -> dict[str, Any]:
        """A whole answer; `tokens` is None where no probabilities are asked for."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """A chunk with what an answer has gained."""
        return self._chunk(index, {"content": text}, tokens)

    def closing(self, index: int, finish: str | None) -> dict[str, Any]:
        """The last chunk of an answer."""
        return self._chunk(index, {}, None, finish)

    def _chunk(
        self, index: int, delta: Mapping[str, Any], tokens: Sequence[Token] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        content = [
            token_entry(t.raw, t.logprob) | {"top_logprobs": [token_entry(raw, p) for raw, p in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}


class Completion:
    """How answers of `/v1/completions` look, whole and in chunks; one for each request, for offsets are counted.

    `ahead` has, by answer, the characters of its tokens that are in front of its text, as those of a start-of-text are.
    """

    prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def __init__(self, ahead: Sequence[int] = ()) -> None:
        self._offsets = {index: -n for index, n in enumerate(ahead)}
        self._characters = dict[int, codecs.IncrementalDecoder]()

    def choice(self, index: int, text: str, tokens: Sequence[Token] | None, finish: str | None) -> dict[str, Any]:
        """A whole answer, or a chunk of one; `tokens` is None where no probabilities are asked for."""
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any] | None:
        """There is no first chunk without text."""
        return None

    def piece(self, index: int, text: str, tokens: Sequence[Token] | None) -> dict[str, Any]:
        """A chunk with what an answer has gained."""
        return self.choice(index, text, tokens, None)

    def closing(self, index: int, finish: str | None) -> dict[str, Any]:
        """The last chunk of an answer."""
        return self.choice(index, "", None, finish)

    def _logprobs(self, index: int, tokens: Sequence[Token] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [_number(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens],
            "text_offset": [self._offset(index, t) for t in tokens],
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most probable tokens and the chosen one; of those that read alike the most probable."""
        if token.logprob is None:
            return None
        best = dict[str, float]()
        for raw, logprob in (*token.top, (token.raw, token.logprob)):
            best.setdefault(token_text(raw), max(logprob, LOWEST))
        return best

    def _offset(self, index: int, token: Token) -> int:
        """Characters of the text in front of a token; bytes that wait for the rest of theirs are none yet."""
        decoder = self._characters.setdefault(index, codecs.getincrementaldecoder("utf-8")("replace"))
        before = self._offsets.get(index, 0)
        self._offsets[index] = before + (len(decoder.decode(token.raw)) if token.is_text else 0)
        return max(0, before)
