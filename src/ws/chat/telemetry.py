"""What a server tells about itself: a JSON line per request on stderr, and numbers in Prometheus' text format.

Neither holds what people asked or were answered, unless `ws serve --log-contents` wants that in the log.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ws.chat.batching import Stats
from ws.chat.guard import Application, Receive, Scope, Send

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # seconds


class Metrics:
    """The numbers of one server, in a registry of their own.

    Args:
        stats: of the engine, counted there and looked up when the numbers are asked for; None without one.
    """

    def __init__(self, stats: Callable[[], Stats] | None = None) -> None:
        self._registry, self._stats = CollectorRegistry(), stats
        mine: dict[str, Any] = {"namespace": "ws", "registry": self._registry}
        by_path: dict[str, Any] = {"labelnames": ["path"], "buckets": BUCKETS} | mine
        self.requests = Counter("requests", "Requests, by path and status.", ["path", "status"], **mine)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **mine)
        self.completion_tokens = Counter("completion_tokens", "Tokens that were written.", **mine)
        self.seconds = Histogram("request_seconds", "Seconds from a request to its answer's end.", **by_path)
        self.first_token = Histogram("first_token_seconds", "Seconds from a request to its first token.", **by_path)
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's numbers, as the registry asks for them."""
        if self._stats is None:
            return
        now = self._stats()
        yield GaugeMetricFamily("ws_running", "Answers that are being written: the size of the batch.", now.running)
        yield GaugeMetricFamily("ws_waiting", "Answers that wait for a place in the batch.", now.waiting)
        steps = "Forward passes; tokens divided by steps is the mean size of the batch."
        yield CounterMetricFamily("ws_steps", steps, now.steps)
        known = "Tokens of prompts that were known from earlier ones and not read again."
        yield CounterMetricFamily("ws_known_tokens", known, now.known)

    def mean_seconds(self) -> float:
        """Of a request to the end of its answer, over all paths; 0 before the first."""
        sums = {"_sum": 0.0, "_count": 0.0}
        for sample in (sample for family in self.seconds.collect() for sample in family.samples):
            for end in sums:
                sums[end] += sample.value if sample.name.endswith(end) else 0.0
        return sums["_sum"] / max(sums["_count"], 1.0)

    def render(self) -> bytes:
        """Everything as Prometheus reads it, of the media type `CONTENT_TYPE_LATEST`."""
        return generate_latest(self._registry)


# ---- the log --------------------------------------------------------------------------------------------------------


def log(event: str, **facts: Any) -> None:
    """One line of JSON on stderr."""
    time_now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": time_now, "event": event} | facts, default=str), file=sys.stderr, flush=True)


class _Records(logging.Handler):
    """What a library logs, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        log("server", level=record.levelname.lower(), message=record.getMessage())


def log_as_json(logger: str) -> None:
    """Have the warnings and errors of a library's logger written as lines of ours, and nothing else of it."""
    named = logging.getLogger(logger)
    named.handlers, named.propagate = [_Records(logging.WARNING)], False
    named.setLevel(logging.WARNING)


class Observer:
    """An ASGI application that counts and logs what another one answers.

    What handlers put into `facts(scope)` stands in the line of their request, and so does the traceback of an error
    that nobody expected. A request that an observer before this one has named keeps its name.

    Args:
        app: the other.
        metrics: where requests are counted.
        paths: those that are counted by their name.
    """

    def __init__(self, app: Application, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request answered, and note how that went."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, identity, status = time.perf_counter(), scope.get("ws", {}).get("id") or uuid.uuid4().hex, 0
        path = scope["path"] if scope["path"] in self.paths else "other"
        noted = scope["ws"] = {"id": identity, "method": scope["method"], "path": path, "start": start}

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"]
                message["headers"] = [*headers, (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:  # answered already, as far as that was possible
            noted["traceback"] = traceback.format_exc()
        finally:
            seconds = time.perf_counter() - noted.pop("start")
            self.metrics.requests.labels(path, str(status)).inc()
            # A refusal takes no time, and with many of them a full queue would tell clients to come back at once.
            if scope["method"] == "POST" and 200 <= status < 300:
                self.metrics.seconds.labels(path).observe(seconds)
            log("request", **noted, status=status, seconds=round(seconds, 4))


def facts(scope: Scope) -> dict[str, Any]:
    """What is noted of a request."""
    return scope["ws"]
