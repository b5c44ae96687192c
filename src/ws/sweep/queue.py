"""A sweep as a graph of commands, on this machine, on a ray cluster or in pueue.

`ws sweep --backend local --workers 2` samples the pairs, trains every adapter and seed, evaluates each as soon as it is
trained and sums up; `--eval-only` evaluates what is trained already; `--dry-run` shows the commands. A job that fails
stops only what needs it; running again does what is missing, or was made of something else. Logs and state are in
`out/<behavior>/queue/`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import TypeVar

from tabulate import tabulate

from ws import console
from ws.adapters import family
from ws.behaviors import behavior_name, load_behavior
from ws.data import PAIRS_FILE
from ws.errors import WsError, choose
from ws.eval.evaluation import Evaluation
from ws.eval.readme_airisk_table import TABLE
from ws.eval.suite import evaluation_named, evaluations, measured_of
from ws.files.runs import VECTOR_MANIFEST, data_folder, lock, run_folder, sha256_json
from ws.options.make import CONTRASTS, ReplicateConfig, data_preset, run_name
from ws.options.make import QueueConfig as QueueConfig
from ws.options.shared import EvalOptions
from ws.sweep.backends import pueue_script, run_local, run_pueue, run_ray
from ws.sweep.jobs import FAILED, NOT_RUN, STATE, Job, Ledger, Outcome

FOLDER = "queue"
_SUMMARIZED = {"airisk", "tinymfv_airisk"}
# Options that decide where a job's results go, and what to do instead of giving them to the jobs.
_OWN = {
    **dict.fromkeys(("model", "behavior", "adapter", "seed", "out"), "the queue does so for each of its jobs"),
    **dict.fromkeys(
        ("pairs", "columns"), "bring pairs with `ws data --pairs` and give the file it writes as --behavior"
    ),
    "control": "the evaluations are of vectors, not of nulls; train those with `ws sweep --controls`",
    "tuned": "what it chooses may lie in other folders; write out the settings that `ws tune` has chosen",
}
Options = TypeVar("Options", bound=ReplicateConfig | EvalOptions)


# ---- the graph ----------------------------------------------------------------------------------------------------


def sweep_jobs(config: QueueConfig) -> list[Job]:
    """The jobs of a sweep: the pairs, every cell's training and its evaluations, and the summary.

    Raises:
        WsError: unknown adapters, evaluations, back end or behaviour, or nothing to do.
    """
    config.check()
    for adapter in config.adapters:
        family(adapter)
    for name in config.evals:
        evaluation_named(name)
    behavior = load_behavior(config.behavior, config.model)
    asked = [n for n in config.evals if n != "sycophancy" or config.eval_only]
    wanted = [n for n in evaluations() if n in measured_of(asked, behavior)]
    train = _parsed(ReplicateConfig, "ws.replicate", config, _shared(config), "--train-args", config.train_args)
    train.train.check()
    choose("contrast", train.contrast, CONTRASTS)
    for name in wanted:
        cls = evaluation_named(name)
        words = (*_shared(config), *_items(config, cls))
        _parsed(cls.options, cls.__module__, config, words, "--eval-args", config.eval_args).check()
    pairs = data_folder(config.out, config.model, behavior.name) / PAIRS_FILE
    jobs = [] if config.eval_only else [Job("pairs", _pairs(config, train), leaves=(pairs,))]
    evals: list[str] = []
    for seed, adapter in product(config.seeds, config.adapters):
        cell, filed = adapter if seed == 0 else f"{adapter}-seed-{seed}", run_name(adapter, train.contrast)
        run, named = (("--adapter", name, "--seed", str(seed)) for name in (adapter, filed))
        folder = run_folder(config.out, behavior.name, filed, seed)
        before = () if config.eval_only else (f"train-{cell}",)
        if not config.eval_only:
            made = (folder / "vector" / VECTOR_MANIFEST, folder / "samples.json")
            jobs.append(Job(f"train-{cell}", _train(config, run, train), ("pairs",), made))
        for name in wanted:
            tables = (folder / evaluation_named(name).summaries,)
            jobs.append(Job(f"{name}-{cell}", _evaluate(config, name, named), before, tables))
        evals += [f"{name}-{cell}" for name in wanted]
    if set(wanted) >= _SUMMARIZED:
        table = config.out / behavior.name / f"{TABLE}.csv"
        jobs.append(Job("summarize", _summarize(config), tuple(evals), (table,)))
    if not jobs:
        raise WsError("There is nothing to do: no evaluations, and --eval-only leaves out training.")
    return [replace(job, inputs=sha256_json(asdict(behavior))) for job in jobs]


def _python(config: QueueConfig, module: str, *words: str) -> tuple[str, ...]:
    """A module's command line; in pueue people read it, and another shell runs it."""
    python = ("uv", "run", "python") if config.backend == "pueue" else (sys.executable,)
    return (*python, "-m", module, *words)


def _pairs(config: QueueConfig, train: ReplicateConfig) -> tuple[str, ...]:
    """`ws.data` with what the training jobs will expect of the pairs, so that they find them finished."""
    words = ["--model", config.model, "--behavior", config.behavior, "--out", str(config.out)]
    words += _machine(train.device, train.dtype)
    usual = asdict(data_preset(config.model))
    for name, value in asdict(train.data).items():
        flag = name.replace("_", "-")
        if value != usual[name]:
            words += [f"--{flag}", str(value)] if not isinstance(value, bool) else [f"--{'' if value else 'no-'}{flag}"]
    return _python(config, "ws.data", *words, *(["--fresh"] if train.fresh and train.fresh_data else []))


def _train(config: QueueConfig, run: Sequence[str], train: ReplicateConfig) -> tuple[str, ...]:
    place = ("--model", config.model, "--behavior", config.behavior, *run, "--out", str(config.out))
    words = (*place, *_shared(config), *_split("--train-args", config.train_args))
    # Fresh pairs are everybody's and come from the pairs job.
    return _python(config, "ws.replicate", *words, *(["--no-fresh-data"] if train.fresh and train.fresh_data else []))


def _evaluate(config: QueueConfig, name: str, run: Sequence[str]) -> tuple[str, ...]:
    place = ("--model", config.model, "--behavior", config.behavior, *run, "--out", str(config.out))
    cls = evaluation_named(name)
    extra = _split("--eval-args", config.eval_args)
    return _python(config, cls.__module__, *place, *_shared(config), *_items(config, cls), *extra)


def _items(config: QueueConfig, cls: type[Evaluation]) -> tuple[str, ...]:
    """The options of an evaluation that say what is asked and who rates it."""
    dataset = ("--dataset", config.dataset) if config.dataset and cls.is_published else ()
    traits = ("--traits", *config.traits) if config.traits and hasattr(cls.options, "traits") else ()
    judges = ("--judges", *config.judges) if config.judges and hasattr(cls.options, "judges") else ()
    return (*dataset, *traits, *judges)


def _summarize(config: QueueConfig) -> tuple[str, ...]:
    words = ("--behavior", config.behavior, "--out", str(config.out), "--n-bootstrap", str(config.n_bootstrap))
    return _python(config, "ws.eval.readme_airisk_table", *words)


def _shared(config: QueueConfig) -> tuple[str, ...]:
    """The options that training, for its first reading, and the evaluations have in common."""
    words = ("--alphas", *map(str, config.alphas), "--n-bootstrap", str(config.n_bootstrap))
    return (*words, *_machine(config.device, config.dtype))


def _machine(device: str, dtype: str) -> list[str]:
    chosen = {"--device": device, "--dtype": dtype}
    return [word for flag, value in chosen.items() if value != "auto" for word in (flag, value)]


def _split(flag: str, words: str) -> list[str]:
    try:
        return shlex.split(words)
    except ValueError as problem:
        raise WsError(f"{flag} is not a list of words ({problem}): {words}") from problem


def _parsed(
    options: type[Options], module: str, config: QueueConfig, own: Sequence[str], flag: str, extra: str
) -> Options:
    """A command's options with the extra words behind the queue's own, so that mistakes show before anything runs."""
    words = ["--model", config.model, *own]
    before = console.parse(options, words)
    try:
        after = console.parse(options, [*words, *_split(flag, extra)], f"python -m {module}")
    except WsError as problem:
        raise WsError(f"With {flag} behind the queue's own options {problem}") from problem
    for name, instead in _OWN.items():
        if getattr(before, name, None) != getattr(after, name, None):
            raise WsError(f"{flag} cannot set --{name}: {instead}.")
    return after


# ---- the command --------------------------------------------------------------------------------------------------


def run_queue(config: QueueConfig, jobs: Sequence[Job]) -> list[Outcome]:
    """Run the jobs on the chosen back end; one outcome for each."""
    if config.backend == "pueue":
        return run_pueue(jobs, config.group)
    folder = config.out / behavior_name(config.behavior) / FOLDER
    with lock(folder / STATE):  # a second queue for the behaviour waits, and then finds the jobs finished
        ledger = Ledger(folder, jobs, config.fresh)
        if config.backend == "ray":
            return run_ray(ledger, config.address, config.cpus_per_job, config.gpus_per_job, config.retries)
        return run_local(ledger, config.workers or max(1, len(config.gpus)), config.gpus)


def preview(config: QueueConfig, jobs: Sequence[Job]) -> str:
    """The jobs as text: for pueue the script that adds them, otherwise what each waits for and its command."""
    if config.backend == "pueue":
        return pueue_script(jobs, config.group)
    parts = [f"{job.name} after {', '.join(job.after) or 'nothing'}\n  {shlex.join(job.command)}" for job in jobs]
    return "\n".join(parts)


def report(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table."""
    rows = [(o.name, o.state, f"{o.seconds:.0f}" if o.seconds else "", o.where) for o in outcomes]
    return tabulate(rows, ("job", "state", "seconds", "log"), disable_numparse=True)


def main(config: QueueConfig) -> None:
    """The command `ws sweep --backend`."""
    jobs = sweep_jobs(config)
    if config.dry_run:
        console.show(console.Result(preview(config, jobs), {"jobs": jobs}))
        return
    outcomes = run_queue(config, jobs)
    console.show(console.Result(report(outcomes), {"jobs": outcomes}))
    failed = [f"{o.name} ({o.where})" for o in outcomes if o.state == FAILED]
    idle = [o.name for o in outcomes if o.state == NOT_RUN]
    if failed:
        because = f"; not run because of that: {', '.join(idle)}" if idle else ""
        raise WsError(
            f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}{because}. "
            f"Run the queue again{' without --fresh' if config.fresh else ''} to retry only those."
        )


if __name__ == "__main__":
    console.run(main, QueueConfig, "ws queue")
