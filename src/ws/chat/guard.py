"""What stands before the page of `ws play`: only browsers on it reach the model, and nobody leaves files here.

A server on this machine can be asked by every web page that is open in a browser on it. A foreign page sends its own
`Origin`; one that has a name of its own point at this machine (DNS rebinding) sends that name as `Host`. Both are
answered by a refusal, before anything else looks at them.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LIMIT = 1 << 20  # bytes of a request: a message and the state of a few dials
# What the page itself posts to; uploads are not among it.
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
        elif refusal := self._refusal(scope):
            await _answer(send, *refusal)
        else:
            body = await _body(receive)
            if body is None:
                await _answer(send, 413, f"A request may have {LIMIT:,} bytes at most.")
            else:
                await self.app(scope, _first(body, receive), send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for what is not passed on."""
        given = [(name, value.decode("latin-1").lower()) for name, value in scope["headers"]]
        hosts, origins = ([value for name, value in given if name == wanted] for wanted in (b"host", b"origin"))
        name = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]@/]+)(:\d+)?", hosts[0]) if len(hosts) == 1 else None
        if name is None or name.group(1) not in self.hosts:
            return 421, "This page is served under the address that `ws play` printed, and under no other name."
        # The very page: another port is another program's, and `null` is a file or a frame of anybody's.
        if any(urlsplit(origin).netloc != hosts[0] for origin in origins):
            return 403, "Only the page itself may ask; this was asked from another."
        method = scope["method"]
        if method not in ("GET", "HEAD") and not (method == "POST" and _POSTS.fullmatch(scope["path"])):
            return 403, "Nothing can be uploaded or changed here."
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


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
