"""What stands before a server of this package: who may ask by which name, and how much a request may bring.

A server on this machine can be asked by every web page that is open in a browser on it. A foreign page sends its own
`Origin`; one that has a name of its own point at this machine (DNS rebinding) sends that name as `Host`. Both are
answered by a refusal, before anything else looks at them. `ws play` has the guard as it is: nobody leaves files there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

from ws.options.use import LOOPBACK as LOOPBACK

LIMIT = 1 << 20  # bytes of a request: a message and the state of a few dials
PATIENCE = 30.0  # seconds in which a request has to be here
# What the page of `ws play` itself posts to; uploads are not among it.
_POSTS = re.compile(r"(/gradio_api)?/(queue/join|cancel|reset|run/\w+|api/\w+|call/\w+)/?")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """An ASGI application that passes on what may be asked of another.

    Args:
        app: the other.
        hosts: the names by which it may be called, without a port.
    """

    def __init__(self, app: Application, hosts: Container[str] = LOOPBACK) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or have it answered."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refusal := self.refusal(scope):
            await self.refuse(send, *refusal)
        else:
            try:
                body = await asyncio.wait_for(_body(receive), PATIENCE)
            except TimeoutError:
                await self.refuse(send, 408, f"The request was not here after {PATIENCE:g} seconds.")
                return
            if body is None:
                await self.refuse(send, 413, f"A request may have {LIMIT:,} bytes at most.")
            else:
                await self.app(scope, _first(body, receive), send)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for what is not passed on."""
        method = scope["method"]
        if stranger := foreign(scope, self.hosts, "This page is served under the address that `ws play` printed"):
            return stranger
        if method not in ("GET", "HEAD") and not (method == "POST" and _POSTS.fullmatch(scope["path"])):
            return 403, "Nothing can be uploaded or changed here."
        return None

    async def refuse(self, send: Send, status: int, text: str) -> None:
        """Answer with a status and a sentence."""
        await respond(send, status, text.encode(), "text/plain; charset=utf-8")


def foreign(scope: Scope, hosts: Container[str], served: str) -> tuple[int, str] | None:
    """Status and sentence for a request under another name, or from another page.

    Args:
        hosts: the names that hold, without a port; all do where `*` is among them.
        served: half a sentence that says which they are.
    """
    named, origins = (header(scope, name) for name in (b"host", b"origin"))
    name = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]@/]+)(:\d+)?", named[0]) if len(named) == 1 else None
    if name is None or (name.group(1) not in hosts and "*" not in hosts):
        return 421, f"{served}, and under no other name."
    # The very page: another port is another program's, and `null` is a file or a frame of anybody's.
    if any(re.fullmatch(rf"https?://{re.escape(named[0])}", origin) is None for origin in origins):
        return 403, "Only the page itself may ask; this was asked from another."
    return None


def header(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header, in small letters."""
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key == name]


async def respond(send: Send, status: int, body: bytes, kind: str, *more: tuple[bytes, bytes]) -> None:
    """A whole answer, after which the connection ends: what else was sent is not read."""
    length = (b"content-length", str(len(body)).encode())
    headers = [(b"content-type", kind.encode()), length, (b"connection", b"close"), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes | None:
    """A request's body, None when it is too long, however long it says it is."""
    parts, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > LIMIT:
            return None
    return b"".join(parts)


def _first(body: bytes, receive: Receive) -> Receive:
    """Receives the body as one message, and then what else comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return next_message
