"""Three ways to run a graph of jobs: worker threads here, tasks on ray, or entries in pueue; one outcome per job.

The first two share a ledger, so that what one has finished the other need not do again.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ws import console
from ws.console.cluster import connected
from ws.errors import WsError
from ws.sweep.jobs import DONE, FAILED, NOT_RUN, QUEUED, Children, Job, Ledger, Outcome, attempt, in_order


def _threads(share: int) -> dict[str, str]:
    """A share of the cores for a child's arithmetic, unless the user has decided."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, share))}


# ---- here ---------------------------------------------------------------------------------------------------------


def run_local(ledger: Ledger, workers: int = 1, gpus: Sequence[int] = ()) -> list[Outcome]:
    """Run the jobs in `workers` threads; worker `i` shows its commands the GPU `gpus[i % len(gpus)]` only."""
    waiting = [job for job in ledger.jobs if job.name not in ledger.outcomes]
    idle, running, children = list(range(workers)), dict[Future[Outcome], tuple[int, Job]](), Children()
    threads = _threads((os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                for job in [job for job in waiting if ledger.ready(job)][: len(idle)]:
                    waiting.remove(job)
                    worker = idle.pop(0)
                    shown = {"CUDA_VISIBLE_DEVICES": str(gpus[worker % len(gpus)])} if gpus else {}
                    console.say(f"{job.name}: started, log in {ledger.log(job)}")
                    given = (job, ledger.log(job), threads | shown, Path.cwd(), children)
                    running[pool.submit(attempt, *given)] = worker, job
                if not running:
                    return ledger.close()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    worker, job = running.pop(future)
                    idle.append(worker)
                    ledger.record(job, future.result())
        except BaseException:
            children.stop()
            raise


# ---- ray ----------------------------------------------------------------------------------------------------------


def run_ray(
    ledger: Ledger, address: str | None = None, cpus: float = 1.0, gpus: float = 0.0, retries: int = 3
) -> list[Outcome]:
    """Run the jobs as ray tasks on the cluster at `address`, or on one started here for the purpose.

    Every node needs this interpreter and this folder under the same paths, so a cluster needs a shared file system. A
    job whose worker or node is lost runs again, up to `retries` times.
    """
    threads = _threads(int(cpus))
    with connected(address) as ray:
        if address is None:
            _check_fits(ray.cluster_resources(), {"CPU": cpus, "GPU": gpus})
        task = ray.remote(num_cpus=cpus, num_gpus=gpus or None, max_retries=retries)(_on_ray)
        jobs = [job for job in ledger.jobs if job.name not in ledger.outcomes]
        pending: dict[str, Any] = {}
        for job in jobs:
            before = [pending[name] for name in job.after if name in pending]
            given = (job, ledger.log(job), threads, Path.cwd())
            pending[job.name] = task.options(name=job.name).remote(*given, *before)
        waiting = list(jobs)
        while waiting:
            ready, _ = ray.wait([pending[job.name] for job in waiting])
            job = next(job for job in waiting if pending[job.name] == ready[0])
            waiting.remove(job)
            ledger.record(job, _collect(ray, ledger, job, ready[0]))
    return ledger.close()


def _check_fits(available: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    for kind, amount in wanted.items():
        if amount > available.get(kind, 0):
            raise WsError(
                f"A job wants {amount:g} {kind}s and this machine has {available.get(kind, 0):g}; "
                f"lower --{kind.lower()}s-per-job or name a cluster with --address."
            )


def _on_ray(job: Job, log: Path, environment: Mapping[str, str], folder: Path, *before: Outcome) -> Outcome:
    if any(outcome.state != DONE for outcome in before):
        return Outcome(job.name, NOT_RUN)
    return attempt(job, log, environment, folder)


def _collect(ray: Any, ledger: Ledger, job: Job, reference: Any) -> Outcome:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as problem:  # lost once too often; what waits for it gets the same error
        if not ledger.ready(job):
            return Outcome(job.name, NOT_RUN)
        return Outcome(job.name, FAILED, 0.0, str(ledger.log(job)), f"lost by ray: {str(problem).strip()[:300]}")


# ---- pueue --------------------------------------------------------------------------------------------------------


def run_pueue(jobs: Sequence[Job], group: str) -> list[Outcome]:
    """Hand the jobs to pueue, which then runs them by itself; the group is made if it is missing."""
    if shutil.which("pueue") is None:
        raise WsError(
            "The program pueue is not on PATH; get it from github.com/Nukesor/pueue (`cargo install pueue`, or your "
            "system's package), or see the commands with --dry-run."
        )
    _pueue(["group", "add", group], tolerate="already exists")
    ids: dict[str, str] = {}
    for job in in_order(jobs):
        ids[job.name] = _pueue(_add(job, group, [ids[name] for name in job.after]))
    return [Outcome(job.name, QUEUED, where=f"pueue {ids[job.name]}") for job in jobs]


def pueue_script(jobs: Sequence[Job], group: str) -> str:
    """The same as a bash script that keeps the ids in variables."""
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", f"pueue group add {shlex.quote(group)} || true  # may exist"]
    for job in in_order(jobs):
        words = _add(job, group, [f'"${_variable(name)}"' for name in job.after])
        lines.append(f"{_variable(job.name)}=$(pueue {' '.join(map(_quote, words))})")
    return "\n".join(lines)


def _add(job: Job, group: str, ids: Sequence[str]) -> list[str]:
    # pueue joins its words with spaces and gives them to a shell, so the command is quoted here and is one word.
    after = ["--after", *ids] if ids else []
    return ["add", "--group", group, "--label", job.name, "--print-task-id", *after, "--", shlex.join(job.command)]


def _variable(name: str) -> str:
    return "id_" + re.sub(r"\W", "_", name)


def _quote(word: str) -> str:
    return word if re.fullmatch(r'"\$id_\w+"', word) else shlex.quote(word)


def _pueue(words: Sequence[str], tolerate: str | None = None) -> str:
    done = subprocess.run(["pueue", *words], capture_output=True, text=True, encoding="utf-8", check=False)
    said = (done.stdout + done.stderr).strip()
    if done.returncode and not (tolerate and tolerate in said):
        raise WsError(f"`pueue {words[0]}` failed: {said}. Is its daemon running (`pueued -d`)?")
    return done.stdout.strip()
