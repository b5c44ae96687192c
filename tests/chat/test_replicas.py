"""Copies of the server behind one address: a request of which nothing was answered yet survives the loss of a copy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

import ws
from support.serving import a_vector
from ws.chat import replicas
from ws.chat.engine import Engine
from ws.chat.replicas import ATTEMPTS, LOST, NOTED, Front, LostError, Replica
from ws.chat.server import CHATS, COMPLETIONS, HEALTH, METRICS, PATHS, ServerGuard, create_app
from ws.chat.telemetry import Metrics, Observer
from ws.options.use import ServeOptions

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
NOTES = {"type": NOTED, "id": "not the front's", "prompt_tokens": 3, "completion_tokens": 2, "stream": True}


def part(text: str, more: bool = True) -> dict:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


WHOLE = [START, part("all of it", more=False), NOTES]


def behind(ask, **options) -> Observer:
    """The application that clients speak to, in front of `ask`."""
    given, metrics = ServeOptions(**options), Metrics()
    return Observer(ServerGuard(Front(ask, given, metrics), given), metrics, PATHS)


class Scripted:
    """Hands requests to replicas that do what a test says, one after another; the last one for ever.

    Messages that stand in one list come at once. An exception is raised, a number is waited for in seconds.
    """

    def __init__(self, *scripts: list) -> None:
        self.scripts, self.asked, self.left = list(scripts), [], 0

    async def __call__(self, scope, body):
        self.asked.append((scope["method"], scope["path"], body))
        try:
            for step in self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]:
                if isinstance(step, type):
                    raise step
                if isinstance(step, (int, float)):
                    await asyncio.sleep(step)
                else:
                    yield step if isinstance(step, list) else [step]
        except GeneratorExit:
            self.left += 1
            raise
        except asyncio.CancelledError:
            self.left += 1
            raise


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(replicas, "PAUSE", 0.01)
    monkeypatch.setattr(replicas, "SLACK", 0.1)


def ask(app, path: str = COMPLETIONS, method: str = "POST", **more) -> httpx.Response:
    async def answered() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **({"content": b"{}"} if method == "POST" else {}) | more)

    return asyncio.run(answered())


def logged(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]


# ---- what is handed over again --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "losses",
    [[[LostError]], [[START, LostError]], [[[START], LostError], [LostError]], [[LostError]] * (ATTEMPTS - 1)],
    ids=["at once", "with the head", "twice", "all but the last"],
)
def test_a_request_of_which_nothing_was_answered_goes_to_another_replica(losses, capsys):
    script = Scripted(*losses, WHOLE)
    answer = ask(behind(script))
    assert (answer.status_code, answer.text) == (200, "all of it")
    assert script.asked == [("POST", COMPLETIONS, b"{}")] * (len(losses) + 1)
    (line,) = logged(capsys)
    assert (line["lost"], line["status"]) == (len(losses), 200)


def test_a_stream_that_has_begun_is_not_begun_again(capsys):
    script = Scripted([START, part("data: 1\n\n"), LostError], WHOLE)
    answer = ask(behind(script))
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == LOST
    assert len(script.asked) == 1
    assert logged(capsys)[0]["lost"] == 1


@pytest.mark.parametrize("sent", [WHOLE[:2], [START, part("all "), part("of it", more=False)]])
def test_a_replica_that_is_lost_behind_a_whole_answer_changes_nothing(sent):
    script = Scripted([*sent, LostError], [LostError])
    assert ask(behind(script)).text == "all of it"
    assert len(script.asked) == 1


def test_a_request_is_not_handed_to_ever_more_replicas():
    script = Scripted([LostError])
    answer = ask(behind(script))
    assert answer.status_code == 503
    assert f"{ATTEMPTS} replicas were lost" in answer.json()["error"]["message"]
    assert len(script.asked) == ATTEMPTS


def test_a_request_waits_no_longer_for_a_replica_than_for_an_answer(capsys):
    script = Scripted([60])
    answer = ask(behind(script, timeout=0.3))
    assert answer.status_code == 503
    assert "within 0.3 seconds" in answer.json()["error"]["message"]
    assert script.left == 1
    assert logged(capsys)[0]["error"] == "no_replica"


def test_a_stream_has_the_time_of_a_slow_reader():
    script = Scripted([START, part("a"), 0.6, part("b", more=False), NOTES])
    assert ask(behind(script, timeout=0.3, grace=5.0)).text == "ab"


@pytest.mark.parametrize(("sent", "status"), [([], 500), ([START, part("data: 1\n\n")], 200)])
def test_an_error_of_the_code_is_not_repeated(sent, status, capsys):
    script = Scripted([*sent, ValueError], WHOLE)
    answer = ask(behind(script))
    assert answer.status_code == status
    assert "The server failed" in answer.text
    assert len(script.asked) == 1
    assert "ValueError" in logged(capsys)[0]["traceback"]


@pytest.mark.parametrize("sent", [[], [START, part("a")]], ids=["waits", "reads"])
def test_a_client_that_goes_away_ends_the_answer_at_the_replica(sent):
    script, arrived = Scripted([*sent, 60]), []

    async def leaves() -> None:
        messages = [{"type": "http.request", "body": b"{}"}]

        async def receive():
            if messages:
                return messages.pop()
            while not script.asked or len(arrived) < len(sent):
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            arrived.append(message)

        headers = [(b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}
        await asyncio.wait_for(behind(script)(scope, receive, send), 10)

    asyncio.run(leaves())
    assert script.left == 1


# ---- who may ask, and what is counted -------------------------------------------------------------------------------


def test_the_front_asks_for_the_key_before_a_replica_has_work():
    script = Scripted(WHOLE)
    app = behind(script, api_key="k")
    assert ask(app).status_code == 401
    assert ask(app, METRICS, "GET").status_code == 401
    assert ask(app, headers={"host": "elsewhere.example"}).status_code == 421
    assert script.asked == []
    assert ask(app, headers={"authorization": "Bearer k"}).status_code == 200
    assert ask(app, HEALTH, "GET").text == "all of it", "a replica says that it is well"


def test_requests_and_tokens_are_counted_once(capsys):
    app = behind(Scripted(WHOLE, [LostError], WHOLE))
    answers = [ask(app), ask(app)]
    lines = dict(line.rsplit(" ", 1) for line in ask(app, METRICS, "GET").text.splitlines() if line[0] != "#")
    assert lines['ws_requests_total{path="/v1/completions",status="200"}'] == "2.0"
    assert (lines["ws_prompt_tokens_total"], lines["ws_completion_tokens_total"]) == ("6.0", "4.0")
    first = logged(capsys)[0]
    assert first["id"] == answers[0].headers["x-request-id"]
    assert (first["completion_tokens"], first["stream"]) == (2, True)


# ---- a replica ------------------------------------------------------------------------------------------------------


def long_request(alpha: float, **more) -> dict:
    asked = {"model": "pocket", "prompt": "What do birds fly with?", "max_tokens": 60, "temperature": 0}
    return asked | {"steering": {"honesty": alpha}} | more


@pytest.fixture
def replica(engine, monkeypatch) -> Replica:
    monkeypatch.setattr(replicas, "load", lambda options: engine)
    return Replica(ServeOptions())


def test_a_replica_answers_as_the_server_does_and_under_the_fronts_name(engine, replica, capsys):
    front, alone = behind(replica.answer), create_app(engine, ServeOptions())
    for method, path, more in (
        ("POST", COMPLETIONS, {"json": long_request(-1)}),
        ("POST", COMPLETIONS, {"json": long_request(1, stream=True)}),
        ("POST", COMPLETIONS, {"json": long_request(1, n=0)}),
        ("POST", CHATS, {"content": b"\xff"}),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models/pocket+honsty@1", {}),
        ("GET", "/v1/steering?a=b", {}),
        ("GET", "/nowhere", {}),
        ("DELETE", METRICS, {}),
    ):
        given, expected = (ask(app, path, method, **({"content": None} | more)) for app in (front, alone))
        assert given.status_code == expected.status_code
        own = r"\w{32}|\"created\": ?\d+"
        assert re.sub(own, "", given.text) == re.sub(own, "", expected.text)
        assert given.headers.keys() == expected.headers.keys()
        lines = logged(capsys)
        names = {line["id"] for line in lines[:2]}
        assert names == {given.headers["x-request-id"]}, "the replica's line and the front's"
        assert lines[1].keys() >= lines[0].keys()
        if path == COMPLETIONS and given.status_code == 200:
            assert f"cmpl-{given.headers['x-request-id']}" in given.text


def test_whoever_leaves_frees_the_rows_of_a_replica(engine, replica, capsys):
    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
    body = json.dumps(long_request(0, stream=True, max_tokens=900, temperature=2, seed=1)).encode()

    before = engine.scheduler.stats.tokens

    async def leaves() -> None:
        messages = replica.answer(scope, body)
        async for parts in messages:
            if parts[-1]["type"] == "http.response.body":
                break
        await messages.aclose()

    asyncio.run(leaves())
    (line,) = logged(capsys)
    assert 0 < line["completion_tokens"] < 100
    deadline = time.monotonic() + 10
    while engine.scheduler.stats.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.scheduler.stats.running == 0
    assert engine.scheduler.stats.tokens - before < 200


# ---- options --------------------------------------------------------------------------------------------------------


def test_what_replicas_cannot_do_is_said_before_anything_is_loaded():
    with pytest.raises(ws.WsError, match="would change one replica"):
        ServeOptions(replicas=2, admin=True, api_key="k").check()
    with pytest.raises(ws.WsError, match="replicas"):
        ServeOptions(replicas=0).check()


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ws.WsError, match="uv sync --extra ray"):
        replicas.main(ServeOptions(out=tmp_path, replicas=2, port=0))


def test_a_ray_that_does_not_start_is_a_sentence(monkeypatch, tmp_path):
    def init(*words, **options):
        raise Exception("The current node timed out during startup")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ws.WsError, match="does not start on this machine .The current node timed out"):
        replicas.main(ServeOptions(out=tmp_path, replicas=2, port=0))


@pytest.mark.parametrize(
    ("device", "there", "is_here", "share"),
    [
        ("auto", {"CPU": 8.0}, True, (4, 0)),
        ("auto", {"CPU": 3.0}, True, (1, 0)),
        ("auto", {"CPU": 8.0}, False, (1, 0)),
        ("auto", {"CPU": 8.0, "GPU": 2.0}, True, (4, 1)),
        ("cpu", {"CPU": 8.0, "GPU": 1.0}, True, (4, 0)),
        ("auto", {"CPU": 1.0}, True, None),
        ("auto", {}, False, None),
        ("cuda", {"CPU": 8.0, "GPU": 1.0}, True, None),
    ],
)
def test_replicas_share_the_machine_or_are_too_many(device, there, is_here, share):
    options = ServeOptions(replicas=2, device=device)
    if share is None:
        with pytest.raises(ws.WsError, match="2 replicas need as many"):
            replicas._share(options, there, is_here)
    else:
        assert replicas._share(options, there, is_here) == share


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"adaptr": "dora"}, "Did you mean 'adapter'"),
        ({"replicas": "many"}, "replicas"),
        ({"replicas": 0}, "replicas"),
        ({"max_batch": 1.5}, "max_batch"),
        ({"out": 5}, "out"),
        ({"port": 9000}, "http_options"),
        ({"admin": True}, "one replica"),
        ({"api_key": ""}, "WS_API_KEY"),
        ({"vectors": ["nowhere"], "timeout": "-1"}, "timeout"),
        ({}, "no vector in"),
    ],
    ids=str,
)
def test_a_clusters_configuration_is_refused_in_a_sentence(arguments, why, monkeypatch, tmp_path):
    pytest.importorskip("ray.serve", reason="replicas need the extra `ray`")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ws.WsError, match=why):
        replicas.application({"api_key": "k"} | arguments)


def test_a_clusters_configuration_has_the_options_of_the_command(monkeypatch, tmp_path):
    pytest.importorskip("ray.serve", reason="replicas need the extra `ray`")
    a_vector().save(tmp_path / "calm")
    given = []
    monkeypatch.setattr(replicas, "_replicas", lambda options, *resources: given.append((options, resources)))
    monkeypatch.setenv("WS_API_KEY", "k")
    words = {"replicas": "3", "out": str(tmp_path), "vectors": "calm", "reproducible": "true", "device": "cuda"}
    replicas.application(words)
    options = ServeOptions(replicas=3, out=tmp_path, vectors=("calm",), reproducible=True, device="cuda", api_key="k")
    assert given == [(options, (1, 1))]


def test_why_replicas_do_not_start_is_their_own_sentence():
    trace = "Error:\nRuntimeError: Traceback (most recent call last):\n  File x\nValueError: a\n\n"
    said = "out/ws.json is damaged: {};\n make it again."
    ours = f"{trace}ws.errors.WsError: first\n\nws.errors.DamagedError: {said}\n"
    assert replicas._sentence(ours) == said
    assert replicas._sentence(trace) == "The replicas did not start: ValueError: a"


# ---- with ray -------------------------------------------------------------------------------------------------------


@contextmanager
def command(out: Path, *words: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """`ws serve` with two replicas, and its log; what it has started is gone in the end."""
    pytest.importorskip("ray.serve", reason="replicas need the extra `ray`")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two replicas need two cores")
    place = tempfile.mkdtemp(prefix="ws")  # the names of ray's sockets must be short
    environment = os.environ | {"RAY_TMPDIR": place, "RAY_AUTH_TOKEN": "a" * 64, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    started = [sys.executable, "-m", "ws.cli", "serve", "--replicas", "2", "--out", str(out), "--device", "cpu"]
    with (out / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*started, "--port", "0", *words], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    family = []
    try:
        yield process, out / "log"
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        assert process.wait(180) in (0, 2)
    finally:
        process.kill()
        process.stdout.close()
        _, alive = psutil.wait_procs(family, timeout=20)
        shutil.rmtree(place)
    assert not alive


def replicas_of(process: subprocess.Popen) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [p for p in family if p.is_running() and "ServeReplica" in " ".join(p.cmdline())]


def streamed(address: str, alpha: float) -> tuple[float, int, list[dict]]:
    body = long_request(alpha, stream=True)
    with httpx.stream("POST", address + COMPLETIONS, json=body, timeout=120) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return alpha, answer.status_code, [{} if line == "[DONE]" else json.loads(line) for line in lines]


def answered(address: str, alpha: float) -> tuple[float, int, str]:
    answer = httpx.post(address + COMPLETIONS, json=long_request(alpha), timeout=120)
    return alpha, answer.status_code, answer.text


def alone() -> dict[float, str]:
    """What one engine answers to the requests of the crowd."""
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector()}, reproducible=False) as engine:
        app = create_app(engine, ServeOptions())
        answers = {alpha: ask(app, json=long_request(alpha), content=None) for alpha in (-2, -1, 0, 1)}
    return {alpha: answer.json()["choices"][0]["text"] for alpha, answer in answers.items()}


def crowd(address: str, process: subprocess.Popen) -> tuple[list, list]:
    """Eight clients ask again and again, half of them for streams; a replica is killed, and they go on for a while."""
    over, wholes, streams = threading.Event(), [], []

    def asks(number: int) -> None:
        while not over.is_set():
            if number % 2:
                wholes.append(answered(address, number // 2 - 2))
            else:
                streams.append(streamed(address, number // 2 - 2))

    with ThreadPoolExecutor(8) as clients:
        asking = [clients.submit(asks, number) for number in range(8)]
        try:
            for enough in (8, 32):
                while len(wholes) < enough and not any(client.done() for client in asking):
                    time.sleep(0.05)
                if enough == 8:
                    victim, _ = replicas_of(process)
                    victim.kill()
        finally:
            over.set()
    for client in asking:
        client.result()
    return wholes, streams


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_takes_nothing_with_it_that_had_not_begun(tmp_path):
    a_vector().save(tmp_path / "honesty" / "lora" / "vector")
    right = alone()
    with command(tmp_path) as (process, log):
        address = process.stdout.readline().strip().removesuffix("/v1")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), log.read_text(encoding="utf-8")
        before = {p.pid for p in replicas_of(process)}
        wholes, streams = crowd(address, process)
        for alpha, status, text in wholes:
            assert (status, json.loads(text)["choices"][0]["text"]) == (200, right[alpha])
        cut = 0
        for alpha, status, events in streams:
            text = "".join(event["choices"][0]["text"] for event in events if event.get("choices"))
            assert status == 200
            if events[-1]:
                cut += 1
                assert events[-1]["error"]["message"] == LOST
                assert right[alpha].startswith(text)
            else:
                assert text == right[alpha]
        assert len(streams) - cut >= 8
        deadline = time.monotonic() + 300
        while len(after := {p.pid for p in replicas_of(process)}) < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert len(after) == 2, "another one has taken its place"
        assert len(after & before) == 1
        with httpx.stream("POST", address + COMPLETIONS, json=long_request(1, stream=True), timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]", "what has begun is finished"
        process.wait(180)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) == len(wholes) + len(streams) + 1
    assert any("lost" in line for line in requests), "the kill met requests under way"
    assert log.read_text(encoding="utf-8").rstrip().endswith("Ended.")


@pytest.mark.slow
def test_replicas_that_cannot_load_end_the_command_with_their_sentence(tmp_path):
    vector = tmp_path / "honesty" / "lora" / "vector"
    a_vector().save(vector)
    (vector / "ws.json").write_text("{}", encoding="utf-8")
    with command(tmp_path) as (process, log):
        assert process.wait(240) == 2
    said = log.read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert "ws.json" in said.splitlines()[-1]
