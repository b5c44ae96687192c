"""`ws serve`, and with `--replicas` several copies of the server behind one address, by Ray Serve.

    client -> Ray Serve's proxy -> Front -> Replica: an engine, and the application of `ws.chat.server` on it

A replica may be lost at any time. What had not been answered yet is then answered by another one, and an answer that
has begun ends with an error object; Ray puts a new replica in the place of the lost one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, MutableMapping
from contextlib import aclosing, redirect_stdout
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.routing import Mount

from ws import console
from ws.chat import server
from ws.chat.guard import Application, Receive, Scope, Send, respond
from ws.chat.protocol import error_object
from ws.chat.server import METRICS, ServerGuard, create_app, listen, load, unless_gone
from ws.console import say
from ws.console.cluster import connected
from ws.errors import WsError
from ws.options.use import ServeOptions as ServeOptions

NAME = "ws"
LOST = "The replica that wrote this answer was lost; ask again."
PAUSE = 0.2  # seconds before a request goes to the next replica
MANY = 100_000  # requests that may be under way at the front: replicas have the bounds

_PLAIN = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")

Message = MutableMapping[str, Any]
Ask = Callable[[Scope, bytes], AsyncGenerator[Message]]


# ---- what answers ---------------------------------------------------------------------------------------------------


class Replica:
    """One copy of the server, in a process of its own.

    Args:
        options: as for the command.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.app = create_app(load(options), options)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[Message]:
        """What the application sends, message by message; whoever stops reading has gone away."""
        sent, has_gone = asyncio.Queue[Message | None](), asyncio.Event()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if asked:
                return asked.pop()
            await has_gone.wait()
            return {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self.app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        working = asyncio.ensure_future(work())
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            has_gone.set()
            await asyncio.wait({working})


# ---- what hands requests over ---------------------------------------------------------------------------------------


class Front:
    """An ASGI application that has requests answered by replicas.

    Args:
        ask: hands a request to a replica; gives the messages of its answer.
        lost: what that raises where the replica is lost.
        timeout: seconds within which a lost request is handed over again.
    """

    def __init__(self, ask: Ask, lost: tuple[type[Exception], ...], timeout: float) -> None:
        self.ask, self.lost, self.timeout = ask, lost, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whose body comes as one message (`ws.chat.guard`)."""
        if scope["path"] == METRICS:
            text = "Every replica counts for itself; Ray Serve has the numbers of all of them."
            await respond(send, 404, _error(404, text), "application/json")
            return
        plain = {key: scope[key] for key in _PLAIN if key in scope} | {"asgi": {"version": "3.0"}}
        body = (await receive()).get("body", b"")
        await unless_gone(receive, self._relay(plain, body, send))

    async def _relay(self, scope: Scope, body: bytes, send: Send) -> None:
        deadline = time.monotonic() + self.timeout
        while True:
            start, has_begun = None, False
            try:
                async with aclosing(self.ask(scope, body)) as messages:
                    async for message in messages:
                        if message["type"] == "http.response.start":
                            start = message  # sent with what comes behind it: until then there is a way back
                            continue
                        if start is not None:
                            await send(start)
                            start, has_begun = None, True
                        await send(message)
                return
            except self.lost:
                if has_begun:
                    await send({"type": "http.response.body", "body": b"data: " + _error(503, LOST) + b"\n\n"})
                    return
            if time.monotonic() + PAUSE > deadline:
                await respond(send, 503, _error(503, LOST), "application/json")
                return
            await asyncio.sleep(PAUSE)


def _error(status: int, text: str) -> bytes:
    return json.dumps(error_object(status, text)).encode()


# ---- the deployment -------------------------------------------------------------------------------------------------


def deployment(options: ServeOptions) -> Any:
    """Replicas and their front, as `ray.serve.run` takes them."""
    from ray import serve

    def front() -> Application:
        """Made where it runs."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        replicas = serve.get_deployment_handle("Replica").options(stream=True)

        async def ask(scope: Scope, body: bytes) -> AsyncGenerator[Message]:
            answer = replicas.answer.remote(scope, body)
            try:
                async for message in answer:
                    yield message
            finally:
                answer.cancel()

        relay = Front(ask, (RayError, RayServeException), options.timeout)
        return Starlette(routes=[Mount("/", ServerGuard(relay, options))])

    logs = {"log_level": "WARNING", "enable_access_log": False}  # replicas log requests themselves
    on_gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
    replica = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=options.replicas,
        max_ongoing_requests=options.max_batch + options.max_queue,
        graceful_shutdown_timeout_s=options.grace,
        logging_config=logs,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(on_gpu)},
    )
    entrance = serve.deployment(
        serve.ingress(front)(),
        name="Front",
        max_ongoing_requests=MANY,
        logging_config=logs,
        ray_actor_options={"num_cpus": 0},
    )
    return entrance.bind(replica.bind(options))


def application(arguments: Mapping[str, Any]) -> Any:
    """For `serve run ws.chat.replicas:application adapter=lora replicas=2`, and for the configurations of clusters.

    Args:
        arguments: options of `ws serve` by name.
    """
    words = list[str]()
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [] if value is False else [f"--{name.replace('_', '-')}", *map(str, values)]
    options = console.parse(ServeOptions, words, "ws serve")
    options.check()
    return deployment(options)


def run(options: ServeOptions) -> None:
    """Serve with replicas until an interrupt or SIGTERM."""
    listening, address = listen(options)  # whether it can be had, and which port is free
    port = listening.getsockname()[1]
    listening.close()
    stdout = sys.stdout
    with connected(os.environ.get("RAY_ADDRESS"), shows_logs=True) as ray:
        if (cores := ray.cluster_resources().get("CPU", 0)) < options.replicas:
            raise WsError(f"{options.replicas} replicas need as many CPU cores, and there are {cores:g}.")
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options={"host": options.host, "port": port})
        try:
            serve.run(deployment(options), name=NAME, route_prefix="/")
            with redirect_stdout(stdout):
                console.show(console.Result(address, {"address": address}))
            say("Programs ask at this address; Ctrl-C ends it.")
            threading.Event().wait()
        except KeyboardInterrupt:
            say("Ended.")
        finally:
            serve.shutdown()


def main(options: ServeOptions) -> None:
    """The command `ws serve`."""
    (server.main if options.replicas == 1 else run)(options)


if __name__ == "__main__":
    console.run(main, ServeOptions, "ws serve")
