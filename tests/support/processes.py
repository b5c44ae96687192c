"""Commands in processes of their own that start at once: forked from a server that has imported the heavy libraries.

A documented command spends most of its time importing torch and transformers. Here a small server does so once; every
command is then parsed and run in a fresh fork of it, with its own folder, environment, standard streams and exit code.
None of our own modules is loaded before the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIBRARIES = [
    "accelerate",
    "datasets",
    "matplotlib.figure",
    "peft",
    "pyarrow.parquet",
    "scipy.stats",
    "torch",
    "transformers.trainer",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(LIBRARIES)


def run(words: Sequence[str], cwd: Path, slow: float = 0.0) -> subprocess.CompletedProcess[str]:
    """Run `ws ...` or `python -m ...`, as `subprocess.run` with captured text would.

    Args:
        slow: seconds that every call of `ws.data.sample_answers` takes longer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        process = start(words, cwd, Path(scratch), slow)
        process.join()
        said = [
            f.read_text(encoding="utf-8") if f.exists() else "" for f in (Path(scratch) / "out", Path(scratch) / "err")
        ]
    assert process.exitcode is not None
    return subprocess.CompletedProcess(list(words), process.exitcode, *said)


def together(
    commands: Sequence[Sequence[str]], cwd: Path, apart: float = 0.0, slow: float = 0.0
) -> list[subprocess.CompletedProcess[str]]:
    """Run commands side by side, each begun so many seconds after the one before."""

    def one(number: int, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        time.sleep(number * apart)
        return run(words, cwd, slow)

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(one, range(len(commands)), commands))


def start(words: Sequence[str], cwd: Path, scratch: Path, slow: float = 0.0) -> BaseProcess:
    """Begin a command whose streams go to `scratch/out` and `scratch/err`."""
    given = (list(words), cwd, dict(os.environ), scratch / "out", scratch / "err", slow)
    process = _CONTEXT.Process(target=_child, args=given)
    process.start()
    return process


def _child(words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path, slow: float) -> None:
    for number, file in ((0, os.devnull), (1, out), (2, err)):
        opened = os.open(file, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    module, arguments = ("ws.cli", words[1:]) if words[0] == "ws" else (words[2], words[3:])
    assert words[0] == "ws" or words[:2] == ["python", "-m"], f"only `ws` and `python -m` can be run: {words}"
    sys.argv = [words[0], *arguments]
    if slow:
        _slow_down(slow)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _slow_down(seconds: float) -> None:
    import ws.data

    quick = ws.data.sample_answers

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return quick(*args, **kwargs)

    ws.data.sample_answers = slowly
