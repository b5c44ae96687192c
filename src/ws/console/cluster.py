"""A connection to a ray cluster, or to one that is started here for the purpose, for the commands that take one."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ws.errors import WsError


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The ray module, connected to the cluster at `address`, or to a new one that ends with the block.

    Args:
        address: `host:port`, or what else `ray.init` takes.

    Raises:
        WsError: ray is not installed or does not start, or there is no such cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # under `uv run` ray would copy the whole folder to its workers
    if address is None:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # ray's word for: its ports are on the loopback alone
    try:
        import ray
    except ImportError:
        raise WsError("This needs ray; install it with `uv sync --extra ray`.") from None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _check_answers(address or "")
        ray.init(address or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as problem:  # ray has no class of its own for a start that fails
        if address is None:
            raise WsError(f"Ray does not start on this machine ({problem}); try when it has less to do.") from problem
        if not isinstance(problem, (OSError, ValueError)):
            raise
        raise WsError(f"There is no ray cluster at {address!r} ({problem}); start one with `ray start`.") from problem
    signal.signal(signal.SIGTERM, on_sigterm)  # ray puts its own handler there
    try:
        with redirect_stdout(sys.stderr):  # where ray's notices of lost workers belong
            yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """`OSError` unless something listens at `host:port`; ray itself would try for minutes."""
    host, separator, port = address.rpartition(":")
    if separator and "//" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()
