"""A graph of shell commands, the ledger of what became of them, and how one is run.

A job that fails stops what waits for it and nothing else. What is finished is on disk, so that running the same graph
again does only the rest.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import msgspec

from ws import console
from ws.errors import DamagedError, WsError, choose, disk_errors
from ws.files.reading import read_json
from ws.files.runs import sha256_file, write_json

STATE, FORMAT_VERSION = "state.json", 1
DONE, KEPT, FAILED, NOT_RUN, QUEUED = "done", "kept", "failed", "not run", "queued"
GRACE = 10.0  # seconds a command gets to put its things in order when the queue is interrupted
_PR_SET_PDEATHSIG = 1
_IS_POSIX = os.name == "posix"


@dataclass(frozen=True)
class Job:
    """A command, what stands before and behind it.

    Attributes:
        name: unique in its graph.
        command: its words.
        after: the names of the jobs that must have succeeded before it.
        leaves: files that it makes, small enough to be hashed; the last part of a path may be a wildcard.
        inputs: a hash of what it reads besides what other jobs leave; empty for nothing.
    """

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    leaves: tuple[Path, ...] = ()
    inputs: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        name: of the job.
        state: `done`, `kept` (finished by an earlier run), `failed`, `not run` (something before it failed), or
            `queued` in pueue.
        seconds: how long it took.
        where: its log, or its id in pueue.
        problem: why it failed.
    """

    name: str
    state: str
    seconds: float = 0.0
    where: str = ""
    problem: str = ""


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs, each behind those it waits for and otherwise as given.

    Raises:
        WsError: a name that is unknown or given twice, or jobs that wait for each other.
    """
    known = {job.name: job for job in jobs}
    if len(known) < len(jobs):
        raise WsError(f"Two jobs have one name among {', '.join(job.name for job in jobs)}.")
    for name in (before for job in jobs for before in job.after):
        choose("job", name, known)
    try:
        TopologicalSorter({job.name: job.after for job in jobs}).prepare()
    except CycleError as problem:
        raise WsError(f"These jobs wait for each other in a circle: {', '.join(problem.args[1][1:])}.") from None
    placed: dict[str, Job] = {}
    while len(placed) < len(jobs):
        job = next(job for job in jobs if job.name not in placed and placed.keys() >= set(job.after))
        placed[job.name] = job
    return list(placed.values())


# ---- what is finished ---------------------------------------------------------------------------------------------


class _Finished(msgspec.Struct):
    """A job that is done: its command, when those before it had ended, how long it took, when it ended, what it read,
    and the hashes of what it left."""

    command: list[str]
    after: dict[str, str]
    seconds: float
    finished: str
    inputs: str = ""
    left: dict[str, str] = {}


class _State(msgspec.Struct):
    jobs: dict[str, _Finished]


class Ledger:
    """What became of the jobs of a graph, in `folder/state.json` as far as later runs need it.

    A job is kept when it finished with the same command and inputs, on top of the very runs of its dependencies that
    are kept too, and what it left is there as it left it.

    Args:
        folder: for the state and the logs.
        jobs: the graph.
        fresh: forget that any of these jobs has finished.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job], fresh: bool = False) -> None:
        self.folder, self.jobs = folder, in_order(jobs)
        self.outcomes: dict[str, Outcome] = {}
        self.finished = self._read(fresh)
        for job in self.jobs:
            record = self.finished.pop(job.name, None)
            if record is not None and not fresh and self._is_of(record, job):
                self.finished[job.name] = record
                self.outcomes[job.name] = Outcome(job.name, KEPT, record.seconds, str(self.log(job)))
            else:
                self.log(job).unlink(missing_ok=True)
        self._write()
        if self.outcomes:
            console.say(f"{len(self.outcomes)} of {len(self.jobs)} jobs are finished already")
        self.countdown = console.Countdown(len(self.jobs) - len(self.outcomes))

    def log(self, job: Job) -> Path:
        """The file that takes what a job prints."""
        return self.folder / f"{job.name}.log"

    def ready(self, job: Job) -> bool:
        """Whether everything before the job has succeeded."""
        return all(name in self.outcomes and self.outcomes[name].state in (DONE, KEPT) for name in job.after)

    def record(self, job: Job, outcome: Outcome) -> None:
        """Take note of an outcome, on disk if it is a success, and say how far the graph is."""
        self.outcomes[job.name] = outcome
        if outcome.state == DONE:
            now = datetime.now(UTC).isoformat()
            made = (job.inputs, _left(job))
            self.finished[job.name] = _Finished(list(job.command), self._runs(job), outcome.seconds, now, *made)
            self._write()
        self.countdown.step()
        what = f"failed ({outcome.problem})" if outcome.state == FAILED else outcome.state
        number, left = f"[{len(self.outcomes)}/{len(self.jobs)}]", self.countdown.left
        console.say(f"{number} {job.name}: {what}, {outcome.seconds:.0f} s{left}")

    def close(self) -> list[Outcome]:
        """One outcome per job; those without one were not run."""
        return [self.outcomes.get(job.name, Outcome(job.name, NOT_RUN)) for job in self.jobs]

    def _is_of(self, record: _Finished, job: Job) -> bool:
        same = record.command == list(job.command) and record.inputs == job.inputs
        return same and record.after == self._runs(job) and record.left == _left(job)

    def _runs(self, job: Job) -> dict[str, str]:
        return {name: self.finished[name].finished for name in job.after if name in self.finished}

    def _read(self, fresh: bool) -> dict[str, _Finished]:
        file = self.folder / STATE
        if not file.exists():
            return {}
        try:
            return read_json(file, _State, "use --fresh to start over", FORMAT_VERSION).jobs
        except DamagedError:
            if fresh:
                return {}
            raise

    def _write(self) -> None:
        state = _State(self.finished)
        write_json(self.folder / STATE, {"format": FORMAT_VERSION, **msgspec.to_builtins(state)})


def _left(job: Job) -> dict[str, str]:
    """The hashes of the files that a job has left, by path."""
    files = (file for place in job.leaves for file in place.parent.glob(place.name))
    return {str(file): sha256_file(file) for file in sorted(files)}


# ---- one command --------------------------------------------------------------------------------------------------


class Children:
    """The processes that are running, so that an interrupt can end all of them and let no further one begin."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def call(self, command: Sequence[str], **options: Any) -> int:
        """Start the command in a process group of its own and wait for its exit code."""
        with self._lock:
            if self._stopped:
                return -signal.SIGTERM
            apart: dict[str, Any] = {"process_group": 0, "preexec_fn": _die_with_parent()} if _IS_POSIX else {}
            process = subprocess.Popen(command, **apart, **options)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def stop(self) -> None:
        """Ask every process group to end, and kill what has not ended in time."""
        with self._lock:
            self._stopped, running = True, list(self._running)
        for process in running:
            _end(process, by_force=False)
        deadline = time.monotonic() + GRACE
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _end(process, by_force=True)


def _end(process: subprocess.Popen[bytes], by_force: bool) -> None:
    """End a process and all that it has started; other systems than POSIX know no groups, and end it alone."""
    if not _IS_POSIX:
        process.kill() if by_force else process.terminate()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if by_force else signal.SIGTERM)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does between fork and exec: ask Linux to be killed when the thread that started it ends.

    A queue that is killed outright, or a ray worker whose node is lost, can tell its child nothing any more. The child
    would go on, and the next run, or ray's second attempt, would write the same files beside it.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # looked up here: the child should do as little as it can

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it was asked
            os._exit(1)

    return ask


def attempt(
    job: Job, log: Path, environment: Mapping[str, str], folder: Path, children: Children | None = None
) -> Outcome:
    """Run a job's command in `folder` with additions to the environment, and append what it prints to the log."""
    start, file = time.perf_counter(), folder / log
    file.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(file), file.open("ab", buffering=0) as out:
        out.write(f"$ {shlex.join(job.command)}\n".encode())
        options = {"env": {**os.environ, **environment}, "cwd": folder, "stdin": subprocess.DEVNULL}
        try:
            code = (children or Children()).call(job.command, stdout=out, stderr=subprocess.STDOUT, **options)
        except OSError as problem:
            code = 127
            out.write(f"{problem}\n".encode())
    seconds = round(time.perf_counter() - start, 2)
    if code == 0:
        return Outcome(job.name, DONE, seconds, str(log))
    return Outcome(job.name, FAILED, seconds, str(log), f"exit code {code}: {_last_line(file)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "it printed nothing")
