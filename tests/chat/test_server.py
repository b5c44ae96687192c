"""`ws serve` among people who mistype, hurry, dawdle and leave: each gets a status and a sentence, and it stays up."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

import ws
from support.serving import a_vector, an_engine, served
from ws.chat import guard
from ws.chat.batching import Answer, BusyError, ClosedError, FailureError, Piece
from ws.chat.protocol import ChatBody, RequestError, parse_body, split_model
from ws.chat.server import create_app
from ws.chat.telemetry import Metrics
from ws.console import parse
from ws.errors import DiskError
from ws.lm.models import encode
from ws.options.use import ServeOptions

pytest.importorskip("fastapi")

ASKED = {"model": "pocket", "messages": [{"role": "user", "content": "Is ice cold?"}], "max_tokens": 4}
CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = "a key"
WITH_KEY = {"authorization": f"Bearer {KEY}"}


def ask(app, path: str = CHATS, method: str = "POST", headers=None, **more) -> httpx.Response:
    """One request to the application, without a socket."""

    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, path, headers=headers, timeout=30, **more)

    return asyncio.run(answered())


class Held(Answer):
    """An answer that a test writes by hand."""

    def __init__(self, *pieces: str, problem: ws.WsError | None = None) -> None:
        self.texts, self.problem, self.left = pieces, problem, threading.Event()
        self.cancelled, self.goes_on = threading.Event(), threading.Event()

    prompt, n_tokens = (), 0

    @property
    def finish(self):
        return "cancelled" if self.cancelled.is_set() else "stop"

    def cancel(self) -> None:
        self.cancelled.set()
        self.goes_on.set()

    def begin(self, put, number: int = 0) -> Held:
        """Write it, in a thread of its own."""

        def write() -> None:
            for text in self.texts:
                put(number, Piece(text, 5, None, ()))
            self.goes_on.wait(30)
            put(number, self.problem)
            self.left.set()

        threading.Thread(target=write, daemon=True).start()
        return self


@pytest.fixture
def by_hand(engine, monkeypatch):
    """Makes the engine answer with what a test gives, in turn."""

    def answer_with(*answers):
        waiting = list(answers)

        def submit(*requests, put):
            if isinstance(waiting[0], Exception):
                raise waiting[0]
            return [waiting.pop(0).begin(put, number) for number, _ in enumerate(requests)]

        monkeypatch.setattr(engine.scheduler, "submit", submit)
        return create_app(engine, ServeOptions(timeout=0.5))

    return answer_with


def is_well(address: str) -> bool:
    """Whether the server answers a plain question."""
    answer = httpx.post(f"{address}{CHATS}", json=ASKED, timeout=60)
    return answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


# ---- what cannot be read --------------------------------------------------------------------------------------------

BAD = {
    "nothing": (b"", "not JSON"),
    "half an object": (b'{"model": "pocket"', "not JSON"),
    "trailing text": (json.dumps(ASKED).encode() + b"x", "not JSON"),
    "no object": (b"[1]", "no object"),
    "a text": (b'"hello"', "no object"),
    "invalid UTF-8": (
        b'{"model": "pocket", "messages": [{"role": "user", "content": "\xff"}]}',
        "not UTF-8: byte 0xff",
    ),
    "UTF-16": (json.dumps(ASKED).encode("utf-16"), "not UTF-8"),
    "NaN": (b'{"model": "pocket", "messages": [], "steering": {"honesty": NaN}}', "NaN is no number"),
    "infinity": (b'{"model": "pocket", "messages": [], "steering": {"honesty": -Infinity}}', "Infinity is no number"),
    "a key twice": (b'{"model": "pocket", "n": 1, "n": 2, "messages": []}', "'n' stands there twice"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"model":' * 100_000, "nested too deeply"),
    "a long number": (b'{"model": "pocket", "n": ' + b"9" * 5000 + b"}", "digits"),
    "half a character": (b'{"model": "pocket", "messages": [{"role": "user", "content": "\\ud83e"}]}', "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", [CHATS, COMPLETIONS])
def test_what_is_no_request_is_said_to_be_none(engine, name, path):
    content, why = BAD[name]
    answer = ask(create_app(engine, ServeOptions()), path, content=content)
    problem = answer.json()["error"]
    assert answer.status_code == 400
    assert problem["type"] == "invalid_request_error"
    assert why in problem["message"] or (path == COMPLETIONS and "messages" in problem["message"])
    assert problem["message"].endswith(".")


def test_offsets_count_the_characters_of_the_text_and_not_of_its_start(engine, monkeypatch):
    """Many tokenizers put a start in front of a text, which is a token of many characters, and not in the echo."""
    start = encode(engine.tok, engine.tok.eos_token)
    monkeypatch.setattr("ws.chat.service.encode_text", lambda tok, text: [*start, *encode(tok, text)])
    asked = {"model": "pocket", "prompt": ["Ice is", "Birds"], "echo": True, "logprobs": 1, "max_tokens": 3, "n": 2}
    for choice in ask(create_app(engine, ServeOptions()), COMPLETIONS, json=asked).json()["choices"]:
        read = choice["logprobs"]
        assert (read["tokens"][0], read["text_offset"][:2]) == (engine.tok.eos_token, [0, 0])
        for at, token in zip(read["text_offset"][1:], read["tokens"][1:], strict=True):
            assert choice["text"][at : at + len(token)] in (token, "")


def test_an_echo_is_what_was_read_where_the_tokenizer_composes_accents(engine):
    whole = "Is the caf\N{LATIN SMALL LETTER E WITH ACUTE} open?"
    apart = whole.replace("\N{LATIN SMALL LETTER E WITH ACUTE}", "e\N{COMBINING ACUTE ACCENT}")
    app, asked = create_app(engine, ServeOptions()), {"model": "pocket", "echo": True, "logprobs": 0, "temperature": 0}
    one, other = (
        ask(app, COMPLETIONS, json=asked | {"prompt": prompt, "max_tokens": 4}).json()["choices"][0]
        for prompt in (whole, apart)
    )
    assert one == other
    assert one["text"].startswith(whole)
    written = len(encode(engine.tok, whole))
    assert one["logprobs"]["text_offset"][written] == len(whole)


def test_offsets_pass_over_special_tokens_of_an_answer_and_not_over_those_of_an_echo(engine, monkeypatch):
    """An answer is shown without them, a prompt with them."""
    tok, written = engine.tok, []
    (special,), (ordinary, *_) = encode(tok, tok.eos_token), encode(tok, " is")
    asked = {"model": "pocket", "prompt": f"Ice{tok.eos_token} is", "echo": True, "logprobs": 0, "max_tokens": 8}

    def pick(*_):
        written.append(special if len(written) == 2 else ordinary)
        return written[-1]

    monkeypatch.setattr("ws.chat.batching.pick", pick)
    monkeypatch.setattr(engine.scheduler, "_ends", frozenset())
    (choice,) = ask(create_app(engine, ServeOptions()), COMPLETIONS, json=asked).json()["choices"]
    read = choice["logprobs"]
    assert read["tokens"].count(tok.eos_token) == 2
    assert choice["text"].count(tok.eos_token) == 1
    after = read["tokens"].index(tok.eos_token, len(read["tokens"]) - 7)
    for place, (at, token) in enumerate(zip(read["text_offset"], read["tokens"], strict=True)):
        assert place == after or choice["text"][at : at + len(token)] == token


@pytest.mark.parametrize("depth", [50, 200, 400, 900])
def test_a_value_of_any_depth_is_refused(engine, depth):
    deep = b'{"model": "pocket", "prompt": ' + b"[" * depth + b"]" * depth + b"}"
    for content in (deep, deep.replace(b"prompt", b"stop"), deep.replace(b"prompt", b"tools")):
        answer = ask(create_app(engine, ServeOptions()), COMPLETIONS, content=content)
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, None),
        ({"model": 5}, "model"),
        ({"messages": None}, None),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [*ASKED["messages"], {"role": "system", "content": "x"}, *ASKED["messages"]]}, "messages"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 100}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "2"}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens"),
        ({"max_completion_tokens": 100_000}, "max_tokens"),
        ({"seed": "a"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["\ud83e"]}, None),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include": True}}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"temprature": 1}, "temprature"),
        ({"prompt": "x"}, "prompt"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_wrong_values_are_refused_by_name(engine, change, param):
    answer = ask(create_app(engine, ServeOptions()), content=json.dumps(ASKED | change).encode())
    problem = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert problem["param"] == param
    assert problem["message"].endswith((".", "?"))


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], ["a", ["b"]], [1, "a"], [True], [-1], [10**6], [1.5], {"a": 1}, 5, [[1], [10**6]], "\ud83e"],
    ids=repr,
)
def test_prompts_that_are_none_are_refused(engine, prompt):
    body = json.dumps({"model": "pocket", "prompt": prompt}).encode()
    answer = ask(create_app(engine, ServeOptions()), COMPLETIONS, content=body)
    assert answer.status_code == 400, answer.text


def test_a_mistyped_parameter_is_shown_the_right_one(engine):
    answer = ask(create_app(engine, ServeOptions()), json=ASKED | {"temprature": 1})
    assert "Did you mean 'temperature'?" in answer.json()["error"]["message"]


def test_prompts_and_answers_have_lengths(engine):
    app = create_app(engine, ServeOptions(max_prompt=20, max_tokens=8))
    long = {"model": "pocket", "prompt": "ice " * 30, "max_tokens": 4}
    answer = ask(app, COMPLETIONS, json=long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "20 are read here at most" in answer.json()["error"]["message"]
    assert "8 here at most" in ask(app, json=ASKED | {"max_tokens": 9}).json()["error"]["message"]
    assert ask(app, json={**ASKED, "max_tokens": None}).json()["usage"]["completion_tokens"] <= 8
    room = create_app(engine, ServeOptions())
    answer = ask(room, COMPLETIONS, json=long | {"prompt": [5] * 1000, "max_tokens": 25})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert ask(room, COMPLETIONS, json=long | {"prompt": [5] * 5000}).status_code == 400
    whole = long | {"prompt": [5] * 1023, "max_tokens": 0, "echo": True, "logprobs": 1}
    assert ask(room, COMPLETIONS, json=whole).json()["usage"]["total_tokens"] == 1023


def test_paths_and_methods_that_are_none(engine):
    app = create_app(engine, ServeOptions())
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", CHATS, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", CHATS, 405),
    ):
        answer = ask(app, path, method)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


# ---- the name of a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strengths"),
    [
        ("m", {}),
        ("m+a@1.5", {"a": "1.5"}),
        ("m+a@+1u+b@-0.5u", {"a": "+1u", "b": "-0.5u"}),
        ("m+a@1e+3+b@-2E+1", {"a": "1e+3", "b": "-2E+1"}),
        ("m+a/lora-seed-1@2", {"a/lora-seed-1": "2"}),
        ("m+user/v@main@2+a@1", {"user/v@main": "2", "a": "1"}),
        ("m+x+y@2", {"x+y": "2"}),
    ],
)
def test_strengths_in_a_model_name(name, strengths):
    assert split_model(name, "m", ["a", "b", "user/v@main", "x+y"]) == strengths


@pytest.mark.parametrize("name", ["", "n", "mm", "m+", "m+a", "m+a@", "m@1", "m+@1", "m a@1", "m+a@1+", "m+a@1@2"])
def test_other_names_are_no_models(name):
    with pytest.raises(RequestError) as problem:
        split_model(name, "m", ["a"])
    assert problem.value.status == 404


def test_a_request_is_read_into_its_type():
    body = parse_body(b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1}', ChatBody)
    assert (body.temperature, body.n, body.wanted_tokens, body.wanted_logprobs) == (1, 1, None, None)


# ---- who may ask ----------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_everywhere_but_at_health(engine):
    app = create_app(engine, ServeOptions(api_key=KEY))
    for headers in (
        None,
        {"authorization": KEY},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer \u00e9".encode()},
    ):
        for method, path in (("GET", "/v1/models"), ("POST", CHATS), ("GET", "/metrics"), ("GET", "/nowhere")):
            answer = ask(app, path, method, headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(app, "/health", "GET").json() == {"status": "ok"}
    assert ask(app, "/v1/models", "GET", WITH_KEY).status_code == 200
    assert ask(app, json=ASKED, headers=WITH_KEY).status_code == 200


def test_the_key_may_stand_in_the_environment(engine, monkeypatch):
    monkeypatch.setenv("WS_API_KEY", KEY)
    app = create_app(engine, ServeOptions())
    assert ask(app, "/v1/models", "GET").status_code == 401
    assert ask(app, "/v1/models", "GET", WITH_KEY).status_code == 200


def test_other_names_and_other_pages_get_nothing(engine):
    app = create_app(engine, ServeOptions(host="10.0.0.5", api_key=KEY, allowed_hosts=("Models.Example",)))
    for host, status in (
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:9", 200),
        ("10.0.0.5:8000", 200),
        ("models.example", 200),
        ("evil.example", 421),
        ("models.example.evil.example", 421),
        ("", 421),
    ):
        assert ask(app, "/v1/models", "GET", {"host": host, **WITH_KEY}).status_code == status, host
    for origin, status in (("http://localhost:8000", 200), ("http://evil.example", 403), ("null", 403)):
        headers = {"host": "localhost:8000", "origin": origin, **WITH_KEY}
        assert ask(app, "/v1/models", "GET", headers).status_code == status
        assert ask(app, json=ASKED, headers=headers).status_code == status
    anybody = create_app(engine, ServeOptions(host="0.0.0.0", api_key=KEY, allowed_hosts=("*",)))
    assert ask(anybody, "/v1/models", "GET", {"host": "any.example", **WITH_KEY}).status_code == 200


def test_nothing_reveals_that_another_page_may_ask(engine):
    headers = {"origin": "http://localhost:8000", "access-control-request-method": "POST"}
    answer = ask(create_app(engine, ServeOptions()), CHATS, "OPTIONS", headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--host", "192.168.0.7"], "needs a key"),
        (["--host", "0.0.0.0", "--api-key", "k"], "allowed_hosts"),
        (["--host", "::", "--api-key", "k"], "allowed_hosts"),
        (["--admin"], "needs a key"),
        (["--port", "70000"], "port"),
        (["--port", "-1"], "port"),
        (["--max-batch", "0"], "max_batch"),
        (["--max-queue", "0"], "max_queue"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-prompt", "0"], "max_prompt"),
        (["--timeout", "0"], "timeout"),
        (["--timeout", "nan"], "timeout"),
        (["--grace", "inf"], "grace"),
        (["--max-strength", "-1"], "max_strength"),
    ],
)
def test_options_that_make_no_sense_or_leave_it_open_are_refused(given, why, monkeypatch):
    monkeypatch.delenv("WS_API_KEY", raising=False)
    with pytest.raises(ws.WsError, match=why):
        parse(ServeOptions, given, "ws serve").check()


@pytest.mark.parametrize(
    "given", [[], ["--host", "localhost"], ["--host", "::1"], ["--host", "10.0.0.5", "--api-key", "k"]]
)
def test_options_that_hold(given):
    parse(ServeOptions, given, "ws serve").check()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("ws.options.use.find_spec", lambda name: None)
    with pytest.raises(ws.WsError, match="needs fastapi, prometheus_client, uvicorn; `uv sync --extra serve`"):
        ServeOptions(vectors=("a",)).require()


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ServeOptions(port=taken.getsockname()[1])
        with pytest.raises(ws.WsError, match=f"port {options.port} .*`port`"):
            ws.chat.server.listen(options)


# ---- how much and how long ------------------------------------------------------------------------------------------


def test_a_request_has_a_size(address):
    whole = httpx.post(f"{address}{CHATS}", content=b"x" * (guard.LIMIT + 1))
    pieces = httpx.post(f"{address}{CHATS}", content=(b"x" * 10_000 for _ in range(guard.LIMIT // 10_000 + 2)))
    assert whole.status_code == pieces.status_code == 413
    assert "1,048,576 bytes at most" in whole.json()["error"]["message"]
    assert httpx.post(f"{address}{CHATS}", content=b'"' + b"x" * (guard.LIMIT - 2) + b'"').status_code == 400
    assert is_well(address)


def raw(address: str) -> socket.socket:
    split = urlsplit(address)
    return socket.create_connection((split.hostname, split.port), timeout=20)


def test_a_request_that_dawdles_is_given_up(address, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.3)
    with raw(address) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        assert is_well(address), "others do not wait for it"
        answer = b"".join(iter(lambda: slow.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"after 0.3 seconds" in answer
    assert is_well(address)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/models\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 20_000,
    ],
)
def test_what_is_no_http_ends_that_connection_alone(address, content):
    with raw(address) as line:
        line.sendall(content)
        line.shutdown(socket.SHUT_WR)
        answer = line.recv(1000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert is_well(address)


def test_half_a_request_and_nothing_more(address):
    for part in (b"POST", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"):
        with raw(address) as line:
            line.sendall(part)
        assert is_well(address)


def test_an_answer_takes_no_longer_than_the_timeout(by_hand):
    held = Held("a")
    answer = ask(by_hand(held), json=ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert held.cancelled.is_set()
    held = Held("a")
    answer = ask(by_hand(held), json=ASKED | {"stream": True})
    events = [line for line in answer.text.splitlines() if line]
    assert answer.status_code == 200
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert held.cancelled.is_set()


def test_a_row_that_fails_ends_its_request_with_its_sentence(by_hand):
    problem = ws.WsError("The model gave NaN.")
    failing = Held("a", problem=problem)
    failing.goes_on.set()
    other = Held("b")
    answer = ask(by_hand(failing, other), json=ASKED | {"n": 2})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "The model gave NaN.")
    assert other.cancelled.is_set()
    failing = Held("a", problem=problem)
    failing.goes_on.set()
    lines = [line for line in ask(by_hand(failing), json=ASKED | {"stream": True}).text.splitlines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "The model gave NaN."
    assert "[DONE]" not in "".join(lines)


def test_a_machine_that_fails_is_no_fault_of_the_request(by_hand, capsys):
    for problem in (FailureError("The model cannot compute this (RuntimeError: inner workings)."), DiskError("Full.")):
        failing = Held("a", problem=problem)
        failing.goes_on.set()
        answer = ask(by_hand(failing), json=ASKED)
        assert answer.status_code == 500
        assert "inner workings" not in answer.text
        assert logged(capsys)[-1]["message"] == str(problem)


def test_an_error_nobody_expected_is_an_error_object_and_is_logged(by_hand, capsys):
    answer = ask(by_hand(ZeroDivisionError("secret words")), json=ASKED)
    assert answer.status_code == 500
    assert "secret words" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in json.loads(capsys.readouterr().err.splitlines()[-1])["traceback"]


def test_a_full_queue_says_when_to_come_back(by_hand):
    answer = ask(by_hand(BusyError("64 requests are waiting.")), json=ASKED | {"n": 3})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert answer.json()["error"]["message"] == "64 requests are waiting."
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_an_engine_that_is_closed_is_no_fault_of_the_request(by_hand):
    answer = ask(by_hand(ClosedError("The engine has been closed.")), json=ASKED)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ending")
    held = Held("a", problem=ClosedError("The engine has been closed."))
    held.goes_on.set()
    assert ask(by_hand(held), json=ASKED).status_code == 503


def test_a_client_that_goes_away_frees_its_rows(engine, address, monkeypatch):
    for stream in (False, True):
        held = Held("a ")
        monkeypatch.setattr(engine.scheduler, "submit", lambda *requests, put, held=held: [held.begin(put)])
        body = json.dumps(ASKED | {"stream": stream}).encode()
        head = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with raw(address) as line:
            line.sendall(head.encode() + body)
            if stream:
                assert line.recv(100).startswith(b"HTTP/1.1 200")
            else:
                time.sleep(0.3)
            assert not held.cancelled.is_set()
        assert held.cancelled.wait(5)
        assert held.left.wait(5)
    monkeypatch.undo()
    assert is_well(address)


def test_a_client_that_does_not_read_holds_up_nobody(engine, address, monkeypatch):
    held = Held(*["many words " * 1000] * 2000)
    monkeypatch.setattr(engine.scheduler, "submit", lambda *requests, put: [held.begin(put)])
    body = json.dumps(ASKED | {"stream": True}).encode()
    with raw(address) as line:
        line.sendall(f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        line.recv(100)
        monkeypatch.undo()
        assert is_well(address)
    assert held.cancelled.wait(10)


# ---- with the whole engine ------------------------------------------------------------------------------------------


def test_many_at_once_are_all_answered_as_each_alone(address):
    asked = [
        {**ASKED, "max_tokens": 3 + number % 5, "temperature": 0, "steering": {"honesty": number / 4 - 2}}
        for number in range(24)
    ]
    answers: dict[int, httpx.Response] = {}

    def one(number: int) -> None:
        answers[number] = httpx.post(f"{address}{CHATS}", json=asked[number], timeout=60)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers.values()} == {200}
    for number in (0, 7, 16, 23):
        alone = httpx.post(f"{address}{CHATS}", json=asked[number], timeout=60).json()
        assert answers[number].json()["choices"] == alone["choices"]


def test_too_many_at_once_are_told_to_come_back():
    with an_engine() as engine, served(engine) as address:
        codes = list[int]()

        def one() -> None:
            body = {
                "model": "pocket",
                "prompt": "ice",
                "n": engine.scheduler.max_queue // 2,
                "max_tokens": 40,
                "temperature": 2,
            }
            codes.append(httpx.post(f"{address}{COMPLETIONS}", json=body, timeout=120).status_code)

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) == {200, 429}
        assert is_well(address)


# ---- what it tells of itself ----------------------------------------------------------------------------------------


def numbers(text: str) -> dict[str, float]:
    """The samples of Prometheus' format; every line is one, or a comment that was announced."""
    samples, known = dict[str, float](), set()
    for line in text.splitlines():
        if match := re.fullmatch(r"# (?:HELP (\w+) .+|TYPE (\w+) (?:counter|gauge|histogram))", line):
            known.add(match[1] or match[2])
        else:
            match = re.fullmatch(r'(\w+)(\{(?:\w+="[^"\\]*",?)+\})? (\S+)', line)
            assert match, line
            assert match[1] in known or re.sub("_(bucket|sum|count)$", "", match[1]) in known
            samples[match[1] + (match[2] or "")] = float(match[3])
    return samples


def test_metrics_count_requests_tokens_and_seconds(engine):
    app = create_app(engine, ServeOptions())
    tokens = ask(app, json=ASKED).json()["usage"]
    ask(app, json=ASKED | {"stream": True})
    ask(app, json=ASKED | {"n": 0})
    ask(app, "/any/path/at/all", "GET")
    answer = ask(app, "/metrics", "GET")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    seen = numbers(answer.text)
    assert seen[f'ws_requests_total{{path="{CHATS}",status="200"}}'] == 2
    assert seen[f'ws_requests_total{{path="{CHATS}",status="400"}}'] == 1
    assert seen['ws_requests_total{path="other",status="404"}'] == 1
    assert seen["ws_prompt_tokens_total"] == 2 * tokens["prompt_tokens"]
    assert seen["ws_completion_tokens_total"] >= tokens["completion_tokens"] + 1
    assert seen[f'ws_request_seconds_count{{path="{CHATS}"}}'] == 2, "the refusal is none"
    assert seen[f'ws_request_seconds_bucket{{le="+Inf",path="{CHATS}"}}'] == 2
    assert seen[f'ws_first_token_seconds_count{{path="{CHATS}"}}'] == 2
    assert seen["ws_steps_total"] > 0
    assert seen["ws_running"] == seen["ws_waiting"] == 0


def test_the_mean_that_clients_are_told_to_wait_is_over_all_paths():
    metrics = Metrics()
    assert metrics.mean_seconds() == 0
    for path, seconds in (("/a", 0.5), ("/a", 3.0), ("/b", 1000.0)):
        metrics.seconds.labels(path).observe(seconds)
    assert metrics.mean_seconds() == pytest.approx(1003.5 / 3)
    assert numbers(metrics.render().decode())['ws_request_seconds_sum{path="/b"}'] == 1000


def logged(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


def test_the_log_says_how_and_not_what(engine, capsys):
    app = create_app(engine, ServeOptions())
    secret = {"role": "user", "content": "a secret of mine"}
    answer = ask(app, json=ASKED | {"messages": [secret], "model": "pocket+honesty@1"})
    ask(app, json=ASKED | {"messages": [secret], "stream": True})
    ask(app, json=ASKED | {"messages": [{**secret, "role": "secret of mine"}]})
    ask(app, json=ASKED | {"model": "secret of mine"})
    ask(app, COMPLETIONS, json={"model": "pocket", "prompt": [["secret of mine"]]})
    ask(app, "/secret of mine", "GET")
    lines = logged(capsys)
    assert "secret" not in json.dumps(lines)
    assert answer.json()["choices"][0]["message"]["content"] not in json.dumps(lines)
    assert [line["status"] for line in lines] == [200, 200, 400, 404, 400, 404]
    first = lines[0]
    assert first["id"] == answer.headers["x-request-id"] == answer.json()["id"].removeprefix("chatcmpl-")
    assert (first["event"], first["path"], first["stream"]) == ("request", CHATS, False)
    assert first["strengths"] == {"honesty": 1.0}
    assert first["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert first["finish"] == ["stop"] or first["finish"] == ["length"]
    assert lines[1]["stream"] is True
    assert lines[1]["completion_tokens"] > 0
    assert lines[3]["error"] == "model_not_found"


def test_the_log_has_contents_where_they_are_wanted(engine, capsys):
    answer = ask(create_app(engine, ServeOptions(log_contents=True)), json=ASKED)
    (line,) = logged(capsys)
    assert line["contents"]["messages"] == ASKED["messages"]
    assert line["answers"] == [answer.json()["choices"][0]["message"]["content"]]


# ---- vectors that come and go ---------------------------------------------------------------------------------------


def test_vectors_are_added_and_removed_by_those_who_may(tmp_path):
    a_vector().save(tmp_path / "calm" / "lora" / "vector")
    with an_engine() as engine:
        closed = create_app(engine, ServeOptions(api_key=KEY, out=tmp_path))
        body = {"name": "calm", "vector": "calm/lora"}
        assert ask(closed, "/v1/steering", headers=WITH_KEY, json=body).status_code == 403
        assert ask(closed, "/v1/steering/honesty", "DELETE", WITH_KEY).status_code == 403
        app = create_app(engine, ServeOptions(api_key=KEY, admin=True, out=tmp_path))
        assert ask(app, "/v1/steering", json=body).status_code == 401
        added = ask(app, "/v1/steering", headers=WITH_KEY, json=body)
        assert (added.status_code, added.json()["id"]) == (201, "calm")
        assert ask(app, "/v1/steering", headers=WITH_KEY, json=body).status_code == 409

        def probabilities(**steering):
            asked = ASKED | {"logprobs": True, "temperature": 0, "steering": steering}
            content = ask(app, json=asked, headers=WITH_KEY).json()["choices"][0]["logprobs"]["content"]
            return [token["logprob"] for token in content]

        assert probabilities(calm=2) == pytest.approx(probabilities(honesty=2), abs=1e-4)
        assert probabilities(calm=2) != pytest.approx(probabilities(), abs=1e-4)
        assert ask(app, "/v1/steering/calm", "DELETE", WITH_KEY).json()["deleted"] is True
        assert ask(app, json=ASKED | {"steering": {"calm": 1}}, headers=WITH_KEY).status_code == 404
        assert ask(app, "/v1/steering/calm", "DELETE", WITH_KEY).status_code == 404
        assert [v["id"] for v in ask(app, "/v1/steering", "GET", WITH_KEY).json()["data"]] == ["honesty", "tone"]


@pytest.mark.parametrize(
    ("name", "vector", "status"),
    [
        ("x", "../elsewhere", 400),
        ("x", "/etc", 400),
        ("x", "a/../../b", 400),
        ("x", "linked", 404),
        ("x", "linked/vector", 400),
        ("x", "run", 404),
        ("x", "run/vector", 404),
        ("x", "nowhere", 404),
        ("x", "user/vector", 404),
        ("x", "empty", 400),
        ("x", "", 400),
        ("x", 5, 400),
        ("a b", "empty", 400),
        ("a@1", "empty", 400),
        ("a+b", "empty", 400),
        ("", "empty", 400),
    ],
)
def test_vectors_are_added_from_below_the_runs_alone(engine, tmp_path, name, vector, status):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "empty").mkdir(parents=True)
    a_vector().save(elsewhere / "vector")
    (out / "linked").symlink_to(elsewhere)
    (out / "run").mkdir()
    (out / "run" / "vector").symlink_to(elsewhere / "vector")
    app = create_app(engine, ServeOptions(api_key=KEY, admin=True, out=out))
    answer = ask(app, "/v1/steering", headers=WITH_KEY, json={"name": name, "vector": vector})
    assert answer.status_code == status, answer.text
    assert list(engine.vectors) == ["honesty", "tone"]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_when_told_to_and_finishes_what_has_begun(tmp_path, how):
    a_vector().save(tmp_path / "honesty" / "lora" / "vector")
    words = ["-m", "ws.chat.replicas", "--out", str(tmp_path), "--device", "cpu", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        try:
            served_at = process.stdout.readline().strip().removesuffix("/v1")
            body = {
                "model": "pocket+honesty@1",
                "prompt": "Ice is",
                "max_tokens": 200,
                "temperature": 2,
                "stream": True,
            }
            with httpx.stream("POST", f"{served_at}{COMPLETIONS}", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                process.send_signal(how)
                rest = [line for line in lines if line]
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert first.startswith("data: {")
    assert rest[-1] == "data: [DONE]"
    assert process.returncode == 0
    assert said.rstrip().endswith("Ended.")
    assert "Traceback" not in said


def test_the_address_is_the_result(tmp_path, monkeypatch, capsys):
    a_vector().save(tmp_path / "honesty" / "lora" / "vector")

    def interrupted(self, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    ws.chat.server.main(ServeOptions(out=tmp_path, port=0, device="cpu"))
    printed = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1\n", printed.out)
    assert printed.err.rstrip().endswith("Ended.")
