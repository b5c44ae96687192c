"""`ws serve`, and with `--replicas` several copies of the server behind one address, by Ray Serve.

    requests -> Observer -> ServerGuard -> Front -> Replica: an engine, and the application of `ws.chat.server` on it

A replica may be lost at any time. A request of which nothing has been answered yet goes to another replica, an answer
that has begun ends with an error object, and Ray puts a new replica in the place of the lost one. Ray itself hands a
request over again only where it has not reached a replica.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, redirect_stdout
from dataclasses import replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from ws import console
from ws.chat import server
from ws.chat.guard import Application, Receive, Scope, Send, respond
from ws.chat.protocol import error_object
from ws.chat.server import METRICS, PATHS, ServerGuard, create_app, listen, load, on_uvicorn, refuse, unless_gone
from ws.chat.service import FAILED, event
from ws.chat.telemetry import CONTENT_TYPE_LATEST, Metrics, Observer, facts, log_as_json
from ws.console import say
from ws.console.cluster import connected
from ws.errors import WsError
from ws.options.shared import read_options
from ws.options.use import ServeOptions as ServeOptions

Message = dict[str, Any]  # of ASGI
Ask = Callable[[Scope, bytes], AsyncGenerator[list[Message]]]

ATTEMPTS = 4  # of a request; one that takes down whoever reads it must not take down all
PAUSE = 0.2  # seconds before the second, and twice as long before every further one
SLACK = 1.0  # seconds beyond --timeout in which a replica's own refusal may still arrive
MANY = 100_000  # requests of a replica or the front at a time: it is the engine's queue that refuses
LOST = "The replica that wrote this answer was lost; ask again."
NOTED = "ws.noted"  # a message from a replica to the front: what its log says of the request

_LOGS = {"log_level": "WARNING", "enable_access_log": False}  # every request has a line of ours
_PLAIN = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")


# ---- what answers ---------------------------------------------------------------------------------------------------


class Replica:
    """One copy of the server, in a process of its own.

    Args:
        options: as for the command.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.app = create_app(load(options), options)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
        """What the application sends, and last what it notes; whoever stops reading has gone away.

        Args:
            scope: of ASGI, as plain data.
            body: the whole of it.
        """
        sent, left = asyncio.Queue[Message](), asyncio.Event()
        asked: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not asked:
                await left.wait()
            return asked.pop() if asked else {"type": "http.disconnect"}

        async def work() -> None:
            try:
                await self.app(scope, receive, sent.put)  # type: ignore[arg-type]
            finally:
                sent.put_nowait({"type": NOTED, **scope.get("ws", {})})

        working = asyncio.ensure_future(work())
        try:
            while True:
                messages = [await sent.get()]
                while not sent.empty():  # in one piece what is there at once
                    messages.append(sent.get_nowait())
                yield messages
                if messages[-1]["type"] == NOTED:
                    return
        finally:
            left.set()
            await asyncio.wait({working})


# ---- what hands requests over ---------------------------------------------------------------------------------------


class LostError(Exception):
    """The replica that had a request is gone."""


class Front:
    """An ASGI application whose requests replicas answer.

    Args:
        ask: hands a request, its scope as plain data, to a replica; yields what that sends, and raises `LostError`
            where the replica is lost.
        options: times.
        metrics: for `/metrics`, which are those of the front: requests and seconds as clients see them, and tokens.
    """

    def __init__(self, ask: Ask, options: ServeOptions, metrics: Metrics) -> None:
        self.ask, self.options, self.metrics = ask, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whose body comes as one message (`ws.chat.guard`)."""
        if (scope["method"], scope["path"]) == ("GET", METRICS):
            await respond(send, 200, self.metrics.render(), CONTENT_TYPE_LATEST)
            return
        body = (await receive()).get("body", b"")
        await unless_gone(receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        begun, noted, seconds = False, facts(scope), self.options.timeout

        async def pass_on() -> None:
            """What one replica sends."""
            nonlocal begun
            async with aclosing(self._messages(plain, body, noted)) as messages:
                async for message in messages:
                    if not begun:  # from here on the replica keeps the time; the rest is for slow readers
                        limit.reschedule((limit.when() or 0) + self.options.grace)
                    begun = True
                    await send(message)

        lost = f"{ATTEMPTS} replicas were lost with this request, one after the other; no further one is asked."
        plain = {key: scope[key] for key in _PLAIN if key in scope} | {"ws": {"id": noted["id"]}}
        try:
            async with asyncio.timeout(seconds + SLACK) as limit:
                for attempt in range(ATTEMPTS):
                    if attempt:
                        await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
                    try:
                        await pass_on()
                        return
                    except LostError:
                        noted["lost"] = attempt + 1
                        if begun:
                            await _end_stream(send, 503, LOST)
                            return
        except TimeoutError:
            noted["error"] = "not_read" if begun else "no_replica"
            lost = f"No replica has answered within {seconds:g} seconds; ask again."
        except Exception:
            await (_end_stream if begun else refuse)(send, 500, FAILED)
            raise
        if not begun:
            await refuse(send, 503, lost)

    async def _messages(self, scope: Scope, body: bytes, noted: dict[str, Any]) -> AsyncGenerator[Message]:
        """What a replica sends. The head of an answer waits for what comes behind it, for until then there is a way
        back, and the end of it for the notes, for a client that has everything is gone."""
        waiting, is_whole = list[Message](), False
        try:
            # A scope of its own for every attempt: whoever answers writes into it.
            async with aclosing(self.ask({**scope, "ws": dict(scope["ws"])}, body)) as parts:
                async for messages in parts:
                    for message in messages:
                        if message["type"] == NOTED:
                            self._note(message, noted)
                            continue
                        waiting.append(message)
                        is_body = message["type"] == "http.response.body"
                        is_whole = is_body and not message.get("more_body", False)
                        if is_body and not is_whole:
                            for ready in waiting:
                                yield ready
                            waiting = []
        except LostError:
            if not is_whole:
                raise
        for ready in waiting:
            yield ready

    def _note(self, message: Message, noted: dict[str, Any]) -> None:
        """Count and log here what the replica notes of a request."""
        noted |= {key: value for key, value in message.items() if key not in ("type", "id", "method", "path")}
        self.metrics.prompt_tokens.inc(message.get("prompt_tokens", 0))
        self.metrics.completion_tokens.inc(message.get("completion_tokens", 0))


async def _end_stream(send: Send, status: int, text: str) -> None:
    await send({"type": "http.response.body", "body": event(error_object(status, text)).encode()})


# ---- on Ray Serve ---------------------------------------------------------------------------------------------------


def front(replicas: Any, options: ServeOptions) -> Application:
    """What clients speak to, on a handle of a deployment of `Replica`."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    streaming = replicas.options(stream=True)

    async def ask(scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
        answer = streaming.answer.remote(scope, body)
        try:
            async for messages in answer:
                yield messages
        except RayTaskError:  # an error of the code, which the next replica would make, too
            raise
        except (RayError, RayServeException) as problem:
            raise LostError from problem
        except (asyncio.CancelledError, GeneratorExit):  # nobody waits for it any more
            answer.cancel()
            raise

    metrics = Metrics()
    return Observer(ServerGuard(Front(ask, options, metrics), options), metrics, PATHS)


class Entrance:
    """The front where Ray Serve's own proxies listen.

    Args:
        replicas: a handle of their deployment.
        options: as they have them.
    """

    def __init__(self, replicas: Any, options: ServeOptions) -> None:
        self.app = front(replicas, options)

    async def __call__(self, request: Request) -> Response:
        """What answers a request, in the form in which Ray Serve takes it."""
        return _PassedOn(self.app)


class _PassedOn(Response):
    """A response that an application sends."""

    def __init__(self, app: Application) -> None:
        super().__init__()
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self.app(scope, receive, send)


def _with_key(options: ServeOptions) -> ServeOptions:
    """With the key in them: other processes have not the variable that it may come from."""
    return replace(options, api_key=options.secret)


def _replicas(options: ServeOptions, cpus: int, gpus: int) -> Any:
    """The deployment of `Replica`, bound to its options."""
    from ray import serve

    return serve.deployment(
        Replica,
        name="Replica",
        num_replicas=options.replicas,
        max_ongoing_requests=MANY,
        max_constructor_retry_count=1,  # what could not be loaded once cannot be loaded the next time
        graceful_shutdown_timeout_s=options.grace,
        logging_config=_LOGS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    ).bind(options)


def application(arguments: Mapping[str, Any]) -> Any:
    """A server for `serve run ws.chat.replicas:application replicas=4`, and for the configuration of a cluster.

    Args:
        arguments: options of `ws serve`, by the names of their fields.

    Raises:
        WsError: one that is not known, of another type, or makes no sense there.
    """
    from ray import serve

    options = read_options(ServeOptions, arguments, "option", strict=False)
    for name in ("host", "port", "admin"):
        if name in arguments:
            why = "would change one replica alone" if name == "admin" else "is among the `http_options` of Ray Serve"
            raise WsError(f"The option {name!r} cannot be given here: it {why}.")
    if options.secret is None:
        raise WsError("A server on a cluster needs a key: put one into the variable WS_API_KEY.")
    options.check()
    options.require()
    options = _with_key(options)
    replicas = _replicas(options, 1, int(options.device.startswith("cuda")))
    entrance = serve.deployment(
        Entrance, name="Front", max_ongoing_requests=MANY, logging_config=_LOGS, ray_actor_options={"num_cpus": 0}
    )
    return entrance.bind(replicas, options)


def run(options: ServeOptions) -> None:
    """Serve with replicas, on the cluster that RAY_ADDRESS names or here, until an interrupt or SIGTERM."""
    listening, address = listen(options)  # before minutes of loading
    cluster, stdout, name = os.environ.get("RAY_ADDRESS"), sys.stdout, f"ws-{uuid4().hex[:8]}"
    with listening, connected(cluster) as ray:
        from ray import serve

        log_as_json("ray.serve")
        cpus, gpus = _share(options, ray.cluster_resources(), is_here=cluster is None)
        say(f"Loading {options.replicas} replicas.")
        serve.start(proxy_location="Disabled")
        try:
            try:
                handle = serve.run(_replicas(_with_key(options), cpus, gpus), name=name, route_prefix=None)
            except RuntimeError as problem:
                raise WsError(_sentence(serve.status().applications[name].deployments["Replica"].message)) from problem
            with redirect_stdout(stdout):
                server.run(on_uvicorn(front(handle, options), options).run, listening, address)
        finally:
            if cluster is not None:  # what was started here ends with it
                serve.delete(name)


def _share(options: ServeOptions, there: Mapping[str, float], is_here: bool) -> tuple[int, int]:
    """CPU cores and GPUs of a replica; `WsError` where there are too few."""
    n, gpus = options.replicas, int(there.get("GPU", 0) > 0 and options.device != "cpu")
    for kind, each in (("CPU", 1), ("GPU", gpus)):
        if n * each > there.get(kind, 0):
            what = {"CPU": "CPU cores", "GPU": "GPUs"}[kind]
            raise WsError(f"{n} replicas need as many {what}, and there are {there.get(kind, 0):g}; lower --replicas.")
    return int(there["CPU"]) // n if is_here else 1, gpus


def _sentence(message: str) -> str:
    """Why replicas do not start, from Ray's message, which ends with the traceback of one of them."""
    *_, last = re.split(r"^ws\.[\w.]+: ", message, flags=re.MULTILINE)
    if last != message:  # an error of ours, which is a sentence
        return last.strip()
    return f"The replicas did not start: {message.strip().splitlines()[-1].strip()}"


def main(options: ServeOptions) -> None:
    """The command `ws serve`."""
    (server.main if options.replicas == 1 else run)(options)


if __name__ == "__main__":
    console.run(main, ServeOptions, "ws serve")
