"""What stands before the page of `ws play`: who may ask, what for, and how much at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import httpx
import pytest
import torch

import ws
from ws.chat.engine import Engine
from ws.chat.guard import LIMIT
from ws.chat.page import HOST, build, close, launch
from ws.lm.models import fingerprint
from ws.options.use import PlayOptions

pytest.importorskip("gradio")


def a_vector() -> ws.SteeringVector:
    model, _ = ws.load_model("pocket", device="cpu")
    delta = ws.LinearDelta(192, 192, g=torch.randn(192, generator=torch.Generator().manual_seed(1)))
    return ws.SteeringVector({"model.layers.1.self_attn.o_proj": delta}, "pocket", fingerprint(model))


@pytest.fixture(scope="module")
def address():
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector()}) as engine:
        blocks = build(PlayOptions(), engine)
        yield launch(blocks).rstrip("/")
        close(blocks)


JOIN = "/gradio_api/queue/join"


@pytest.mark.parametrize("name", [HOST, "localhost", "[::1]", "LOCALHOST"])
def test_the_page_is_served_under_the_names_of_this_machine(address, name):
    host = f"{name}:{urlsplit(address).port}"
    for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
        assert httpx.get(address, headers=headers).status_code == 200
        assert httpx.get(f"{address}/config", headers=headers).status_code == 200
        assert httpx.post(f"{address}{JOIN}", headers=headers, json={}).status_code not in (403, 421)


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example@127.0.0.1", "0.0.0.0"),
        *("127.0.0.2", "192.168.0.7", "localhost.", "", "127.0.0.1:80:80", "[::2]", "127.0.0.1, evil.example"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/theme.css", JOIN, "/gradio_api/upload"])
def test_another_name_for_this_machine_gets_nothing(address, host, path):
    """A page whose name is pointed at this machine asks with its own name."""
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        origin = {"origin": f"http://{host}", "access-control-request-method": "POST"}
        for more in ({}, origin):
            answer = httpx.request(method, f"{address}{path}", headers={"host": host} | more)
            assert answer.status_code == 421
            assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost", "file://", "http://[::1", ""]
)
@pytest.mark.parametrize("path", ["/config", JOIN, "/gradio_api/call/sent", "/gradio_api/upload"])
def test_another_page_gets_nothing(address, origin, path):
    for method in ("GET", "POST", "OPTIONS"):
        headers = {"origin": origin, "access-control-request-method": "POST"}
        answer = httpx.request(method, f"{address}{path}", headers=headers)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/upload", "/gradio_api/upload/", "/gradio_api/process_recording"]
)
def test_nothing_is_uploaded(address, path):
    files = {"files": ("a.txt", b"x" * 100)}
    assert httpx.post(f"{address}{path}", files=files).status_code == 403
    assert httpx.put(f"{address}{path}", content=b"x").status_code == 403


def test_a_request_has_a_size(address):
    whole = httpx.post(f"{address}{JOIN}", content=b"x" * (LIMIT + 1))
    pieces = httpx.post(f"{address}{JOIN}", content=(b"x" * 1000 for _ in range(LIMIT // 1000 + 2)))
    assert whole.status_code == pieces.status_code == 413
    assert httpx.post(f"{address}{JOIN}", content=b'"' + b"x" * (LIMIT - 2) + b'"').status_code not in (403, 413)
    assert httpx.get(address).status_code == 200, "and the page goes on"


def test_the_page_ends_at_once_though_somebody_listens():
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector()}) as engine:
        blocks = build(PlayOptions(), engine)
        listening = launch(blocks).rstrip("/")
        with httpx.stream("GET", f"{listening}/gradio_api/heartbeat/abc", timeout=30) as answer:
            next(answer.iter_raw())
            start = time.perf_counter()
            close(blocks)
        assert time.perf_counter() - start < 3
        assert not blocks.server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(listening)


@pytest.mark.slow
def test_an_interrupt_ends_the_command_though_somebody_listens(tmp_path):
    a_vector().save(tmp_path / "honesty" / "lora" / "vector")
    arguments = [sys.executable, "-m", "ws.chat.page", "--out", str(tmp_path), "--device", "cpu"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            served = process.stdout.readline().strip().rstrip("/")
            with httpx.stream("GET", f"{served}/gradio_api/heartbeat/abc", timeout=30) as answer:
                next(answer.iter_raw())
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert said.rstrip().endswith("Ended.")
