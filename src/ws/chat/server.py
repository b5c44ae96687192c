"""`ws serve`: a steered model for programs, as OpenAI's API has it, with the strengths as parameters of a request.

    requests -> Observer (counts, logs) -> ServerGuard (who may ask, how much) -> routes -> Service -> Engine

The engine's batch holds rows of many requests, each with its own strengths. Every answer that is no answer is an error
object with a sentence.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ws import console
from ws.chat.engine import Engine, load_engine
from ws.chat.guard import Application, Guard, Receive, Scope, Send, foreign, respond
from ws.chat.protocol import RequestError, error_object
from ws.chat.service import FAILED, Order, Service, error_content, noted_of
from ws.chat.telemetry import CONTENT_TYPE_LATEST, Observer, facts, log, log_as_json
from ws.console import say
from ws.errors import WsError
from ws.options.use import ServeOptions as ServeOptions

Result = TypeVar("Result")
MODELS, STEERING, CHATS, COMPLETIONS = "/v1/models", "/v1/steering", "/v1/chat/completions", "/v1/completions"
HEALTH, METRICS = "/health", "/metrics"
PATHS = frozenset({MODELS, STEERING, CHATS, COMPLETIONS, HEALTH, METRICS})
GONE = 499  # as others log a client that went away


# ---- who may ask ----------------------------------------------------------------------------------------------------


class ServerGuard(Guard):
    """The guard of an API: every request brings the key, where there is one; only `/health` is open to all.

    Args:
        app: what is guarded.
        options: names, and the key.
    """

    def __init__(self, app: Application, options: ServeOptions) -> None:
        super().__init__(app, options.hosts)
        self.secret = options.secret

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for what is not passed on."""
        if scope["path"] == HEALTH:
            return None  # those who look after a server ask by its number
        if stranger := foreign(scope, self.hosts, "This server answers to the names of --host and --allowed-hosts"):
            return stranger
        if self.secret is None:
            return None
        sent = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
        kind, _, key = sent.partition(b" ")
        if kind.lower() == b"bearer" and secrets.compare_digest(key.strip(), self.secret.encode()):
            return None
        return 401, "This server asks for its key: send the header `Authorization: Bearer KEY`."

    async def refuse(self, send: Send, status: int, text: str) -> None:
        """Answer with one of OpenAI's error objects."""
        keyless = status == 401
        more = [(b"www-authenticate", b"Bearer")] if keyless else []
        await refuse(send, status, text, "invalid_api_key" if keyless else None, *more)


async def refuse(send: Send, status: int, text: str, code: str | None = None, *more: tuple[bytes, bytes]) -> None:
    """Answer with one of OpenAI's error objects, and headers beside it."""
    problem = error_object(status, text, None, code)
    await respond(send, status, json.dumps(problem).encode(), "application/json", *more)


# ---- the application ------------------------------------------------------------------------------------------------


class EventStream(StreamingResponse):
    """A stream that frees its rows however it ends: read to the end, given up, or not read for too long."""

    def __init__(self, service: Service, order: Order) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self.service, self.order = service, order
        super().__init__(service.events(order), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; not `stream_response`, which never begins where the client has gone already."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.finish(self.order)

    async def stream_response(self, send: Send) -> None:
        """Send every event; a client that does not read is left when the request's time is over."""
        deadline = self.order.facts["start"] + self.service.options.timeout + self.service.options.grace
        try:
            async with asyncio.timeout(deadline - time.perf_counter()), aclosing(self.body_iterator):  # type: ignore
                await super().stream_response(send)
        except TimeoutError:
            self.order.facts["error"] = "not_read"


async def unless_gone(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """What the work comes to, None where the client goes away before; the work is then given up."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.wait({answering, leaving})


def create_app(engine: Engine, options: ServeOptions) -> Application:
    """The whole application, for any ASGI server; `ws serve` gives it to uvicorn."""
    service = Service(engine, options)
    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(title="Weight Steering", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app, options)
    _add_answers(app, service)
    _add_lists(app, service)
    _add_admin(app, service)
    return Observer(ServerGuard(app, options), service.metrics, PATHS)


def _add_errors(app: FastAPI, options: ServeOptions) -> None:
    def refused(request: HttpRequest, problem: Exception) -> Response:
        """A sentence as an error object."""
        assert isinstance(problem, WsError)
        facts(request.scope).update(noted_of(problem, options))
        content = error_content(problem)
        return JSONResponse(error_object(*content), content[0], getattr(problem, "headers", None))

    def unknown(request: HttpRequest, problem: Exception) -> Response:
        """No such path, or not with this method."""
        assert isinstance(problem, HTTPException)
        text = f"There is no {request.method} {request.url.path[:100]} here ({problem.detail})."
        return JSONResponse(error_object(problem.status_code, text), problem.status_code, problem.headers)

    def nested(request: HttpRequest, problem: Exception) -> Response:
        """A value too deep to be looked at."""
        return JSONResponse(error_object(400, "The request is nested too deeply."), 400)

    def failed(request: HttpRequest, problem: Exception) -> Response:
        """An error that nobody expected; it goes on to the log."""
        return JSONResponse(error_object(500, FAILED), 500)

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(WsError, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(RecursionError, nested)


def _add_answers(app: FastAPI, service: Service) -> None:
    async def answer(request: HttpRequest) -> Response:
        read = service.read_chat if request.url.path == CHATS else service.read_completion
        # In another thread: a long prompt takes a while to become tokens, and the others go on meanwhile.
        order = await asyncio.to_thread(read, await request.body(), facts(request.scope))
        service.submit(order)
        if order.body.stream:
            return EventStream(service, order)
        try:
            whole = await unless_gone(request.receive, service.whole(order))
        finally:
            service.finish(order)
        return Response(status_code=GONE) if whole is None else JSONResponse(whole)

    app.add_api_route(CHATS, answer, methods=["POST"])
    app.add_api_route(COMPLETIONS, answer, methods=["POST"])


def _add_lists(app: FastAPI, service: Service) -> None:
    @app.get(MODELS)
    async def models() -> Any:
        return {"object": "list", "data": service.models()}

    @app.get(MODELS + "/{name:path}")
    async def model(name: str) -> Any:
        return service.model(name)

    @app.get(STEERING)
    async def steering() -> Any:
        # In another thread: cards are written when they are first asked for.
        return {"object": "list", "data": await asyncio.to_thread(service.vectors)}

    @app.get(HEALTH)
    async def health() -> Any:
        is_open = service.engine.scheduler.is_open
        return JSONResponse({"status": "ok" if is_open else "closed"}, 200 if is_open else 503)

    @app.get(METRICS)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_admin(app: FastAPI, service: Service) -> None:
    """Adding and removing vectors, which is refused unless the server was started for it."""

    def require_admin() -> None:
        if not (service.options.admin and service.options.secret):
            raise RequestError(403, "Vectors are added and removed only where the server was started with --admin.")

    @app.post(STEERING)
    async def add(request: HttpRequest) -> Any:
        require_admin()
        name = await asyncio.to_thread(service.add, await request.body())
        log("vector added", name=name)
        return JSONResponse({"id": name, "object": "steering_vector", "units": service.engine.offered[name].units}, 201)

    @app.delete(STEERING + "/{name:path}")
    async def remove(name: str) -> Any:
        require_admin()
        await asyncio.to_thread(service.remove, name)
        log("vector removed", name=name)
        return {"id": name, "object": "steering_vector", "deleted": True}


# ---- the command ----------------------------------------------------------------------------------------------------


def listen(options: ServeOptions) -> tuple[socket.socket, str]:
    """A socket that listens where the options say, and its address; `WsError` where that cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listening = socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as problem:
        raise WsError(
            f"The server cannot listen at {options.host}, port {options.port} ({problem.strerror or problem}); choose "
            "another with --port."
        ) from problem
    host = f"[{options.host}]" if family == socket.AF_INET6 else options.host
    return listening, f"http://{host}:{listening.getsockname()[1]}/v1"


def create_server(engine: Engine, options: ServeOptions) -> uvicorn.Server:
    """What answers until an interrupt or SIGTERM, and then to the end what has begun, as long as `--grace` allows."""
    return on_uvicorn(create_app(engine, options), options)


def on_uvicorn(app: Application, options: ServeOptions) -> uvicorn.Server:
    """The same for any application."""
    log_as_json("uvicorn.error")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(options.grace),
    )
    return uvicorn.Server(config)


def load(options: ServeOptions) -> Engine:
    """What answers, as the options say."""
    o = options
    return load_engine(
        o, reproducible=o.reproducible, max_batch=o.max_batch, max_queue=o.max_queue, max_known=o.max_known
    )


def main(options: ServeOptions) -> None:
    """One server; `ws.chat.replicas` has the command."""
    listening, address = listen(options)  # before minutes of loading
    with listening, load(options) as engine:
        run(create_server(engine, options).run, listening, address)


def run(answer: Callable[..., None], listening: socket.socket, address: str) -> None:
    """Say where the server is, and answer until it is to end."""
    try:  # from the first word on, an interrupt is how this ends
        console.show(console.Result(address, {"address": address}))
        say("Programs ask at this address; Ctrl-C ends it.")
        answer(sockets=[listening])
    except KeyboardInterrupt:
        say("Ended.")
