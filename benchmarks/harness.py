"""A small harness: alternation, warm-up, ratios with their spread, peak memory of fresh processes, and a JSON record.

A wall-clock time means little on a shared machine, so a comparison runs A and B in turn and reports the ratio of each
round; memory is that of a process of its own, as the operating system accounts for it when it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from ws.files.runs import library_versions, write_json

ROOT = Path(__file__).parents[1]
ELSEWHERE = "WS_BENCHMARKS"  # the variable that names another folder for records
RESULTS = Path(os.environ.get(ELSEWHERE) or ROOT / "benchmarks" / "results")


@dataclass(frozen=True)
class Spread:
    """A number of every round, as its median and its extremes."""

    median: float
    lowest: float
    highest: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of one value a round."""
        seen = sorted(values)
        return Spread(statistics.median(seen), seen[0], seen[-1], len(seen))

    @classmethod
    def ratio(cls, of: Iterable[float], against: Iterable[float]) -> Spread:
        """Of one number over another, round by round."""
        return cls.of(a / b for a, b in zip(of, against, strict=True))


@dataclass(frozen=True)
class Ratio(Spread):
    """How many times slower B is than A, round by round."""

    seconds_a: float
    seconds_b: float

    @classmethod
    def of_times(cls, a: Sequence[float], b: Sequence[float]) -> Ratio:
        """Of the seconds of every round."""
        return cls(**asdict(Spread.ratio(b, a)), seconds_a=statistics.median(a), seconds_b=statistics.median(b))


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
        first = seconds(a)
        with around_b():
            if around_b is not nullcontext:
                b()
            return first, seconds(b)

    for _ in range(warmup):
        one_round()
    times = [one_round() for _ in range(rounds)]
    return Ratio.of_times(*zip(*times, strict=True))


def seconds(action: Callable[[], object]) -> float:
    """By the clock."""
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


def in_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Process]]:
    """Fresh processes of `python <arguments>`, one after the other; who goes first changes from round to round."""
    done: dict[str, list[Process]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            done[name].append(fresh_process(commands[name]))
    return done


def peak_above(action: Callable[[], object]) -> float:
    """MiB at the peak of an action above what was in memory before it, as Linux accounts for it."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    action()
    return status("VmHWM") - before


def commit() -> str:
    """The commit that is measured; with a mark of its own for every state of the code that is in no commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
        return done.stdout.strip()

    code = ("--", "src", "benchmarks", ":!benchmarks/results")
    new = git("ls-files", "--others", "--exclude-standard", *code)
    changes = git("diff", "HEAD", *code) + new + git("hash-object", "--", *new.splitlines())
    mark = f"+{hashlib.sha256(changes.encode()).hexdigest()[:7]}" if changes else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + mark


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
    """Write `benchmarks/results/<name>.json` with date, commit, command, machine and versions; print the results, too.

    `module` is the benchmark's, where it is not `name`.
    """
    plain = json.loads(json.dumps(results, default=asdict))
    command = " ".join(["uv run python -m", f"benchmarks.{module or name}", *sys.argv[1:]])
    about = {"date": date.today().isoformat(), "commit": commit(), "command": command}
    about |= {"machine": machine(), "versions": library_versions()}
    print(json.dumps(plain, indent=2))
    return write_json(RESULTS / f"{name}.json", about | {"results": plain})
