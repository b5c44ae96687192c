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
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = [
    "accelerate",
    "datasets",
    "matplotlib.figure",
    "peft",
    "polars",
    "scipy.stats",
    "torch",
    "transformers.trainer",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(LIBRARIES)


def run(words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `ws ...` or `python -m ...`, as `subprocess.run` with captured text would."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        process = _CONTEXT.Process(target=_child, args=(list(words), cwd, dict(os.environ), out, err))
        process.start()
        process.join()
        code, said = process.exitcode, [f.read_text() if f.exists() else "" for f in (out, err)]
    assert code is not None
    return subprocess.CompletedProcess(list(words), code, *said)


def _child(words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
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
    runpy.run_module(module, run_name="__main__", alter_sys=True)
