"""Several copies of the server behind one address: what is lost before it was answered is answered by another one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

import ws
from support.serving import a_vector
from ws.chat.engine import Engine
from ws.chat.replicas import LOST, Front, Replica
from ws.chat.server import COMPLETIONS, HEALTH, METRICS
from ws.options.use import ServeOptions

ASKED = {"model": "pocket+honesty@-1", "prompt": "What do birds", "max_tokens": 5, "temperature": 0}
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


class LostError(Exception):
    """A replica is gone."""


def body(text: str, more: bool = False) -> dict:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def front(*replicas: list, timeout: float = 5.0):
    """A front that hands requests to replicas which send these messages in turn, or are lost; and what was asked."""
    waiting, asked = list(replicas), []

    async def ask(scope, content):
        asked.append((scope["path"], content))
        for message in waiting.pop(0) if len(waiting) > 1 else waiting[0]:
            if message is LostError:
                raise LostError
            yield message

    return Front(ask, (LostError,), timeout), asked


def answered(app, path: str = COMPLETIONS) -> httpx.Response:
    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(path, content=b"{}")

    return asyncio.run(post())


def test_a_request_of_a_lost_replica_goes_to_another_one_until_something_was_answered():
    app, asked = front([LostError], [START, LostError], [START, body("a", True), body("b")])
    answer = answered(app)
    assert (answer.status_code, answer.text) == (200, "ab")
    assert asked == [(COMPLETIONS, b"{}")] * 3


def test_an_answer_that_has_begun_is_not_begun_again():
    app, asked = front([START, body("data: 1\n\n", True), LostError], [START, body("all of it")])
    answer = answered(app)
    first, problem = answer.text.split("\n\n")[:2]
    assert first == "data: 1"
    assert json.loads(problem.removeprefix("data: "))["error"]["message"] == LOST
    assert len(asked) == 1


def test_a_request_is_not_handed_on_for_ever():
    app, asked = front([LostError], timeout=0.5)
    answer = answered(app)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, LOST)
    assert 1 < len(asked) < 5


def test_numbers_of_one_replica_are_not_shown_for_those_of_all():
    app, asked = front([START, body("x")])
    assert answered(app, METRICS).status_code == 404
    assert not asked


def test_a_client_that_goes_away_ends_the_replicas_answer():
    ended, arrived = [], []

    async def ask(scope, content):
        try:
            yield START
            yield body("a", True)
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def leaves() -> None:
        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive():
            if messages:
                return messages.pop()
            while len(arrived) < 2:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            arrived.append(message)

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": []}
        await asyncio.wait_for(Front(ask, (LostError,), 5.0)(scope, receive, send), 10)

    asyncio.run(leaves())
    assert ended == [True]


def test_a_replica_sends_what_the_server_does_and_frees_the_rows_of_whoever_goes_away(engine, monkeypatch):
    monkeypatch.setattr("ws.chat.replicas.load", lambda options: engine)
    replica, scheduler = Replica(ServeOptions()), engine.scheduler
    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}

    async def ask(stop_after: int, **changed) -> list:
        content = json.dumps(ASKED | changed).encode()
        answer, messages = replica.answer(dict(scope), content), []
        async for message in answer:
            messages.append(message)
            if len(messages) == stop_after:
                break
        await answer.aclose()
        return messages

    start, whole = asyncio.run(ask(9))
    assert start["status"] == 200
    assert json.loads(whole["body"])["usage"]["completion_tokens"] > 0
    asyncio.run(ask(2, stream=True, max_tokens=400))
    deadline = time.monotonic() + 10
    while scheduler.stats.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert scheduler.stats.running == 0


def test_what_replicas_cannot_do_is_said_before_anything_is_loaded():
    with pytest.raises(ws.WsError, match="would change one replica"):
        ServeOptions(replicas=2, admin=True, api_key="k").check()
    with pytest.raises(ws.WsError, match="replicas. must be"):
        ServeOptions(replicas=0).check()


# ---- with ray -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The command with two replicas: its address, and its process."""
    pytest.importorskip("ray.serve", reason="replicas need the extra `ray`")
    folder = tmp_path_factory.mktemp("runs")
    a_vector().save(folder / "honesty" / "lora" / "vector")
    words = ["serve", "--replicas", "2", "--out", str(folder), "--device", "cpu", "--port", "0"]
    command = [sys.executable, "-m", "ws.cli", *words]
    with (folder / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", address), (folder / "log").read_text(encoding="utf-8")
        yield address.removesuffix("/v1"), folder / "log"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Ended." in (folder / "log").read_text(encoding="utf-8")
    finally:
        process.kill()
        process.stdout.close()


@pytest.fixture(scope="module")
def alone() -> dict[float, str]:
    """What one engine answers at these strengths."""
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector()}, reproducible=False) as engine:
        app, answers = Replica.__new__(Replica), {}
        from ws.chat.server import create_app

        app.app = create_app(engine, ServeOptions())
        for alpha in (-2, -1, 0, 1):
            answers[alpha] = answered_by(app.app, alpha)
    return answers


def answered_by(app, alpha: float) -> str:
    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post(COMPLETIONS, json=long_request(alpha))

    return asyncio.run(post()).json()["choices"][0]["text"]


def long_request(alpha: float, stream: bool = False) -> dict:
    return {
        "model": "pocket",
        "prompt": "What do birds fly with?",
        "max_tokens": 60,
        "temperature": 0,
        "steering": {"honesty": alpha},
        "stream": stream,
    }


def replicas_of(log: Path) -> list[int]:
    """Processes of replicas that have printed something, and are there."""
    pids = set(map(int, re.findall(r"ServeReplica:ws:Replica pid=(\d+)", log.read_text(encoding="utf-8"))))
    return sorted(filter(psutil.pid_exists, pids))


def streamed(address: str, alpha: float) -> tuple[int, list[dict]]:
    with httpx.stream("POST", address + COMPLETIONS, json=long_request(alpha, True), timeout=120) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        return answer.status_code, [{} if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_nothing_that_had_not_begun(served, alone):
    address, log = served
    over, wholes, streams = threading.Event(), [], []

    def asks(number: int) -> None:
        """One client after another, half of them streams, until a while after the replica was killed."""
        while not over.is_set():
            alpha = number % 4 - 2
            if number % 2:
                answer = httpx.post(address + COMPLETIONS, json=long_request(alpha), timeout=120)
                wholes.append((alpha, answer.status_code, answer.text))
            else:
                streams.append((alpha, *streamed(address, alpha)))

    with ThreadPoolExecutor(8) as clients:
        asking = [clients.submit(asks, number) for number in range(8)]
        try:
            while len(wholes) < 8:
                time.sleep(0.1)
            before, n_before = replicas_of(log), len(wholes)
            assert len(before) == 2
            os.kill(before[0], signal.SIGKILL)
            while len(wholes) < n_before + 16:
                time.sleep(0.1)
        finally:
            over.set()
    for one in asking:
        one.result()
    for alpha, status, text in wholes:
        assert status == 200, text
        assert json.loads(text)["choices"][0]["text"] == alone[alpha]
    ended = 0
    for alpha, status, events in streams:
        assert status == 200
        text = "".join(e["choices"][0]["text"] for e in events if e.get("choices"))
        if "error" in events[-1]:
            assert events[-1]["error"]["message"] == LOST
            assert alone[alpha].startswith(text)
            assert text
        else:
            ended += 1
            assert text == alone[alpha]
    assert ended > 0
    deadline = time.monotonic() + 60
    while len(now := replicas_of(log)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(now) == 2, "another one comes in its place"


@pytest.mark.slow
def test_the_server_behind_replicas_is_the_same(served, alone):
    address, _ = served
    assert httpx.get(address + HEALTH, timeout=60).json() == {"status": "ok"}
    refused = httpx.post(address + COMPLETIONS, json=ASKED | {"model": "pocket+honsty@1"}, timeout=60)
    assert refused.status_code == 404
    assert "honesty" in refused.json()["error"]["message"]
    foreign = httpx.get(address + HEALTH, headers={"host": "elsewhere.example"}, timeout=60)
    assert foreign.status_code in (200, 421)
    assert httpx.get(address + "/v1/models", headers={"host": "elsewhere.example"}, timeout=60).status_code == 421


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    from ws.chat.replicas import main

    with pytest.raises(ws.WsError, match="uv sync --extra ray"):
        main(ServeOptions(out=tmp_path, replicas=2, port=0))


def test_options_of_a_clusters_configuration_are_those_of_the_command(monkeypatch):
    from ws.chat import replicas

    monkeypatch.setattr(replicas, "deployment", lambda options: options)
    given = {"adapter": "dora", "replicas": 3, "max_batch": "8", "reproducible": True, "vectors": ["a", "b"]}
    assert replicas.application(given) == ServeOptions(
        adapter="dora", replicas=3, max_batch=8, reproducible=True, vectors=("a", "b")
    )
    with pytest.raises(SystemExit):
        replicas.application({"adaptr": "dora"})
