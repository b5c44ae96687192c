"""A small harness: alternation, warm-up, medians of ratios, peak memory of fresh processes, and a JSON record.

A wall-clock time means little on a shared machine, so a comparison runs A and B in turn and reports the ratio of each
round; memory is that of a process of its own, as the operating system accounts for it when it ends.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ws.files.runs import library_versions, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """How many times slower B is than A, round by round."""

    median: float
    lowest: float
    highest: float
    rounds: int
    seconds_a: float
    seconds_b: float


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    rounds: int = 5,
    warmup: int = 1,
    around_b: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Ratio:
    """Time `a` and `b` in alternation after `warmup` uncounted rounds; the ratio is time of B over time of A.

    B runs inside the context `around_b`, which is entered and left with the clock stopped, after one uncounted call.
    """

    def one_round() -> tuple[float, float]:
        first = _seconds(a)
        with around_b():
            if around_b is not nullcontext:
                b()
            return first, _seconds(b)

    for _ in range(warmup):
        one_round()
    times = [one_round() for _ in range(rounds)]
    ratios = [tb / ta for ta, tb in times]
    medians = [statistics.median(t) for t in zip(*times, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), rounds, *medians)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Process:
    """A finished process: seconds by the clock and of CPU, peak resident memory in MiB, its last line of JSON."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    output: Any


def fresh_process(arguments: Sequence[str], cwd: Path | None = None, program: str = sys.executable) -> Process:
    """Run `python <arguments>`, or another program, on its own and account for it; raises if it fails.

    Linux counts the caller's memory at the moment of the start as the child's, so call this while the caller is small.
    """
    start = time.perf_counter()
    child = subprocess.Popen([program, *arguments], cwd=cwd, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with code {child.returncode}")
    last = next((line for line in reversed(text.splitlines()) if line.startswith(("{", "["))), "null")
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return Process(seconds, cpu, usage.ru_maxrss / 1024, json.loads(last))


def machine() -> dict[str, Any]:
    """What the numbers depend on, without the machine's name or paths."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (x.split(":", 1)[1].strip() for x in info.read_text(encoding="utf-8").splitlines() if "model name" in x),
            model,
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def record(name: str, results: dict[str, Any], module: str | None = None) -> Path:
    """Write `benchmarks/results/<name>.json` with the date, the machine, versions and the command; print it too.

    `module` is the benchmark's, where it is not `name`.
    """
    plain = {k: asdict(v) if isinstance(v, (Ratio, Process)) else v for k, v in results.items()}
    command = " ".join(["uv run python -m", f"benchmarks.{module or name}", *sys.argv[1:]])
    about = {"date": date.today().isoformat(), "machine": machine(), "versions": library_versions(), "command": command}
    print(json.dumps(plain, indent=2))
    return write_json(RESULTS / f"{name}.json", about | {"results": plain})
