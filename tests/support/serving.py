"""A server on the pocket model for tests: vectors with visible effects, an engine, and an address to ask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

import ws
from ws.chat.engine import Engine
from ws.chat.server import create_server, listen
from ws.diff import Units, vector_digest
from ws.lm.models import fingerprint
from ws.options.use import ServeOptions


def a_vector(size: float = 0.3) -> ws.SteeringVector:
    """Row scales of two layers of the pocket model, calibrated at -2 and +4."""
    model, _ = ws.load_model("pocket", device="cpu")
    scales = size * torch.randn(192, generator=torch.Generator().manual_seed(1))
    deltas = {f"model.layers.{n}.self_attn.o_proj": ws.LinearDelta(192, 192, g=scales.clone()) for n in (1, 2)}
    vector = ws.SteeringVector(deltas, "pocket", fingerprint(model), info={"behavior": "honesty"})
    return replace(vector, units=Units(vector_digest(vector), -2.0, 4.0))


def an_engine() -> Engine:
    """The pocket model with a calibrated vector `honesty`, and its opposite `tone` without a calibration."""
    model, tok = ws.load_model("pocket", device="cpu")
    return Engine(model, tok, {"honesty": a_vector(), "tone": -1 * a_vector()}, reproducible=False)


@contextmanager
def served(engine: Engine, **options) -> Iterator[str]:
    """The address of a server that answers meanwhile, without the last `/v1`."""
    given = ServeOptions(**{"port": 0, "grace": 1.0, **options})
    given.check()
    listening, address = listen(given)
    server = create_server(engine, given)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield address.removesuffix("/v1")
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
    assert not thread.is_alive(), "the server ends"
