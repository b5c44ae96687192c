"""Many runs: adapters x seeds x evaluations on one set of pairs.

`python -m ws.run_sweep --behavior honesty --n-personas 1 --n-samples 50` does the six families. A cell that fails does
not lose the others: its traceback goes to `sweep.log` in its folder and it is listed at the end. Running the sweep
again fills only what is missing. Writes the tables of `ws.analysis.sweep_tables`.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from ws import console
from ws.adapters import FAMILIES, family
from ws.analysis.sweep_tables import POOLED, SUMMARY, render, write_summary
from ws.behaviors import behavior_name, load_behavior
from ws.data import DataConfig, data_preset
from ws.errors import WsError, choose
from ws.eval import airisk
from ws.eval.context import EvalContext, EvalOptions, open_context
from ws.eval.suite import DEFAULT_EVALS, EVALS, SUITE
from ws.files.runs import DEFAULT_OUT, read_csv, read_values, run_folder, write_text
from ws.lm.models import DEFAULT_MODEL
from ws.replicate import CONTROLS, ReplicateConfig, replicate, verdict
from ws.report import write_report
from ws.train import TrainConfig, train_preset

LOG = "sweep.log"


@dataclass(frozen=True)
class SweepConfig:
    """Which cells, and how each is made.

    Attributes:
        model, behavior, out, split, device, dtype, fresh: as in `ReplicateConfig`.
        adapters: families, all six by default.
        seeds: of initialisation and order; the pairs are shared by all cells.
        evals: which evaluations (`ws.eval.suite`).
        traits: of statements; none for the behaviour's own.
        controls: nulls to train beside every vector, `shuffled` and `same-side` (see `ws.analysis.compare`); they are
            read on the claims and stay out of the tables.
        alphas: steering strengths; 0 is always included.
        dataset: a folder with the tables of the published sets, or `pocket`; None for the published ones.
        n_think: tokens of chain of thought before a dilemma's answer.
        limit: only so many dilemmas and vignettes, drawn as every evaluation's.
        batch_size: prompts per forward pass, found automatically when None.
        n_bootstrap: resamples per interval.
        data: how the pairs are sampled.
        train: settings for every family; `lr=None` takes each family's own.
    """

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    adapters: tuple[str, ...] = tuple(FAMILIES)
    seeds: tuple[int, ...] = (0,)
    evals: tuple[str, ...] = DEFAULT_EVALS
    traits: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    out: Path = DEFAULT_OUT
    alphas: tuple[float, ...] = (-1.0, 0.0, 1.0)
    split: str = "report"
    dataset: str | None = None
    n_think: int = airisk.N_THINK
    limit: int | None = None
    batch_size: int | None = None
    n_bootstrap: int = 10_000
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def preset(cls, model: str = DEFAULT_MODEL) -> SweepConfig:
        """The defaults for a model."""
        return cls(model=model, data=data_preset(model), train=replace(train_preset(model, "lora"), lr=None))


@dataclass(frozen=True)
class Cell:
    """One adapter and one seed, as it is or as a null, with what became of it."""

    adapter: str
    seed: int
    folder: Path
    control: str = "none"
    problem: str | None = None


def run_sweep(config: SweepConfig) -> list[Cell]:
    """Carry out every cell, write the summary over all cells on disk, and return the cells with their problems.

    Raises:
        WsError: unknown adapters, evaluations or behaviour, found before anything runs.
    """
    for adapter in config.adapters:
        family(adapter)
    for name in config.evals:
        choose("evaluation", name, EVALS)
    for name in config.controls:
        choose("control", name, CONTROLS[1:])
    behavior = load_behavior(config.behavior, config.model).name
    plan = list(product(config.seeds, config.adapters, (CONTROLS[0], *config.controls)))
    done, countdown = list[Cell](), console.Countdown(len(plan))
    for number, (seed, adapter, control) in enumerate(plan):
        name = _replicate_config(config, adapter, seed, control).run_name
        console.say(f"== {name}, seed {seed} ({countdown})")
        # The second sampling belongs to `same-side`, so with --fresh its first cell samples anew as well.
        first = number == 0 or (control == "same-side" and number <= len(config.controls))
        done.append(_run_cell(config, behavior, adapter, seed, control, first))
        countdown.step()
    fine = [c.folder for c in done if c.problem is None and c.control == CONTROLS[0]]
    write_summary(config.out / behavior, fine, config.evals, config.n_bootstrap)
    return done


def _run_cell(config: SweepConfig, behavior: str, adapter: str, seed: int, control: str, first: bool) -> Cell:
    plan = _replicate_config(config, adapter, seed, control, first)
    folder = run_folder(config.out, behavior, plan.run_name, seed)
    try:
        reading = replicate(plan)
        console.say(verdict(reading))
        others = [name for name in config.evals if name != "sycophancy"]  # replicate has read the claims already
        if others and control == CONTROLS[0]:
            context = open_context(_eval_options(config, behavior, adapter, seed))
            for name in others:
                console.say(context.carry_out(SUITE[name].make(_for(name, context), config)).text)
    except Exception as problem:  # whatever it is, the other cells must not be lost to it
        write_text(folder / LOG, traceback.format_exc())
        console.say(f"failed: {problem}")
        kind = "" if isinstance(problem, WsError) else f"{type(problem).__name__}: "
        return Cell(plan.run_name, seed, folder, control, f"{kind}{problem}")
    (folder / LOG).unlink(missing_ok=True)
    return Cell(plan.run_name, seed, folder, control)


def _replicate_config(
    config: SweepConfig, adapter: str, seed: int, control: str, first: bool = False
) -> ReplicateConfig:
    rate = train_preset(config.model, adapter).lr if config.train.lr is None else config.train.lr
    shared = {k: getattr(config, k) for k in ("model", "behavior", "out", "alphas", "split", "n_bootstrap", "device")}
    return ReplicateConfig(
        **shared,
        dtype=config.dtype,
        adapter=adapter,
        seed=seed,
        control=control,
        fresh=config.fresh,
        fresh_data=first,
        data=config.data,
        train=replace(config.train, lr=rate),
    )


def _for(name: str, context: EvalContext) -> EvalContext:
    """The context as one evaluation takes it: only the dilemmas are thought about."""
    return context if name == "airisk" else replace(context, options=replace(context.options, n_think=None))


def _eval_options(config: SweepConfig, behavior: str, adapter: str, seed: int) -> EvalOptions:
    names = ("model", "out", "alphas", "dataset", "n_think", "limit", "batch_size", "n_bootstrap", "device", "dtype")
    shared = {k: getattr(config, k) for k in names}
    return EvalOptions(**shared, behavior=behavior, adapter=adapter, seed=seed)


def failures(cells: Sequence[Cell]) -> str:
    """Which cells failed, every problem once with its cells and the log of the first; empty when none did."""
    by_problem: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.problem:
            by_problem.setdefault(cell.problem.rstrip("."), []).append(cell)
    parts = [
        f"{', '.join(f'{c.adapter} seed {c.seed}' for c in found)} ({problem}; {found[0].folder / LOG})"
        for problem, found in by_problem.items()
    ]
    count = sum(map(len, by_problem.values()))
    return f"{count} of {len(cells)} cells failed: {'; '.join(parts)}." if parts else ""


def main(config: SweepConfig) -> None:
    """The command `python -m ws.run_sweep`."""
    cells = run_sweep(config)
    if any(c.problem is None for c in cells):
        folder = config.out / behavior_name(config.behavior)
        tables = [folder / SUMMARY, folder / POOLED]
        text = render(read_csv(tables[1]))
        files = [*tables, write_report(config.out, config.behavior)]
        console.show(console.Result(text, {"rows": read_values(tables[1]), "cells": cells}, files))
    if found := failures(cells):
        raise WsError(f"{found} Run the sweep again to retry only those.")


if __name__ == "__main__":
    console.run(main, SweepConfig, "python -m ws.run_sweep")
