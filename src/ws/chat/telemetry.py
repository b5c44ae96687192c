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
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

from ws.chat.guard import Application, Receive, Scope, Send

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # seconds

# What each number is, as Prometheus shows it.
HELP = {
    "ws_requests_total": ("counter", "Requests, by path and status."),
    "ws_prompt_tokens_total": ("counter", "Tokens of prompts."),
    "ws_known_tokens_total": ("counter", "Tokens of prompts that were known from earlier ones and not read again."),
    "ws_completion_tokens_total": ("counter", "Tokens that were written."),
    "ws_request_seconds": ("histogram", "Seconds from a request to the end of its answer, by path."),
    "ws_first_token_seconds": ("histogram", "Seconds from a request to its first token, by path."),
    "ws_running": ("gauge", "Answers that are being written: the size of the batch."),
    "ws_waiting": ("gauge", "Answers that wait for a place in the batch."),
    "ws_steps_total": ("counter", "Forward passes; tokens divided by steps is the mean size of the batch."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms, counted in one thread."""

    def __init__(self) -> None:
        self._totals, self._buckets = Counter[tuple[str, Labels]](), dict[tuple[str, Labels], list[int]]()

    def count(self, name: str, by: float | int = 1, **labels: str) -> None:
        """Add to a counter."""
        self._totals[name, tuple(labels.items())] += by  # type: ignore[assignment]

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add a value to a histogram."""
        key = name, tuple(labels.items())
        self._buckets.setdefault(key, [0] * (len(BUCKETS) + 1))[bisect_left(BUCKETS, seconds)] += 1
        self._totals[key] += seconds  # type: ignore[assignment]

    def mean(self, name: str) -> float:
        """The mean of a histogram over all its labels, 0 before the first value."""
        number = sum(sum(counts) for (known, _), counts in self._buckets.items() if known == name)
        return sum(total for (known, _), total in self._totals.items() if known == name) / max(number, 1)

    def render(self, now: Mapping[str, float | int]) -> str:
        """Everything as Prometheus reads it, with values of now that are not counted here."""
        values: dict[tuple[str, Labels], float | int] = {(name, ()): value for name, value in now.items()}
        values |= self._totals
        lines = list[str]()
        for name, (kind, text) in HELP.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for (known, labels), value in values.items():
                if known == name and kind == "histogram":
                    lines += self._histogram(name, labels, value)
                elif known == name:
                    lines.append(f"{name}{_labels(labels)} {value}")
        return "\n".join([*lines, ""])

    def _histogram(self, name: str, labels: Labels, total: float | int) -> list[str]:
        lines, below = list[str](), 0
        for bound, number in zip((*BUCKETS, "+Inf"), self._buckets[name, labels], strict=True):
            below += number
            lines.append(f"{name}_bucket{_labels((*labels, ('le', str(bound))))} {below}")
        return [*lines, f"{name}_sum{_labels(labels)} {total}", f"{name}_count{_labels(labels)} {below}"]


def _labels(labels: Labels) -> str:
    """Labels as they stand behind a name; their values are words of ours, which need no escapes."""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels) + "}" if labels else ""


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
            self.metrics.count("ws_requests_total", path=path, status=str(status))
            if scope["method"] == "POST":
                self.metrics.observe("ws_request_seconds", seconds, path=path)
            log("request", **noted, status=status, seconds=round(seconds, 4))


def facts(scope: Scope) -> dict[str, Any]:
    """What is noted of a request."""
    return scope["ws"]
