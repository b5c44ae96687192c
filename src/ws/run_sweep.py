"""Many runs: adapters x seeds x evaluations on one set of pairs.

`python -m ws.run_sweep --behavior honesty --n-personas 1 --n-samples 50` does the six families. A cell that fails does
not lose the others: its traceback goes to `sweep.log` in its folder and it is listed at the end. Running the sweep
again fills only what is missing. Writes the tables of `ws.analysis.sweep_tables`.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from ws import console
from ws.adapters import family
from ws.analysis.sweep_tables import POOLED, SUMMARY, render, write_summary
from ws.behaviors import Behavior, behavior_name, load_behavior
from ws.errors import WsError, choose
from ws.eval.before import require_readable
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import Evaluation
from ws.eval.suite import asked_of, evaluation_named, measured_of
from ws.files.runs import read_csv, read_values, run_folder, write_text
from ws.lm.models import load_model
from ws.options.make import ReplicateConfig, train_preset
from ws.options.make import SweepConfig as SweepConfig
from ws.options.shared import EvalOptions, shared_with
from ws.replicate import (
    CONTROLS,
    before_anything,
    eval_options,
    make_pairs,
    read_at_the_end,
    replicate,
    require_settings,
    verdict,
)
from ws.report import write_report

LOG = "sweep.log"


@dataclass(frozen=True)
class Cell:
    """One adapter and one seed, as it is or as a null, with what became of it."""

    adapter: str
    seed: int
    folder: Path
    control: str = "none"
    problem: str | None = None


def run_sweep(config: SweepConfig) -> list[Cell]:
    """Carry out every cell, write the tables over those that did not fail, and return all with their problems.

    Raises:
        WsError: unknown adapters, evaluations or behaviour, found before anything runs.
    """
    config.check()
    for adapter in config.adapters:
        family(adapter)
    for name in config.evals:
        cls = evaluation_named(name)
        if cls.thinks:  # the others are not asked with the sweep's thought
            shared_with(cls.options, shared_with(EvalOptions, config)).check()
    for name in config.controls:
        choose("control", name, CONTROLS[1:])
    loaded = load_behavior(config.behavior, config.model)
    behavior, plan = loaded.name, _cells(config)
    _before_cells(config, loaded, plan)
    done, countdown = list[Cell](), console.Countdown(len(plan))
    for cell in plan:
        console.say(f"== {cell.run_name}, seed {cell.seed} ({countdown})")
        done.append(_run_cell(config, behavior, replace(cell, fresh_data=False)))
        countdown.step()
    fine = [c.folder for c in done if _in_tables(c)]
    write_summary(config.out / behavior, fine, measured_of(config.evals, loaded), config.n_bootstrap)
    return done


def _in_tables(cell: Cell) -> bool:
    """Whether the tables of the sweep have its rows: no null, and nothing that failed."""
    return cell.problem is None and cell.control == CONTROLS[0]


def _before_cells(config: SweepConfig, behavior: Behavior, plan: Sequence[ReplicateConfig]) -> None:
    """Say which cells cannot be filled, put the evaluations to the base, and make the pairs, which the cells share.

    Raises:
        WsError: items that cannot be had, a base that answers none of the evaluations, or pairs that cannot be made.
    """
    model, tok = load_model(config.model, config.device, config.dtype)
    possible = list[ReplicateConfig]()
    for cell in plan:
        try:
            require_settings(model, tok, behavior, cell)
            possible.append(cell)
        except WsError as problem:  # the other cells must not be lost to it
            console.warn(f"{cell.run_name}, seed {cell.seed}, will fail: {problem}")
    first = plan[0]
    first_asked = read_at_the_end(EvalContext.of_base(eval_options(first), model, tok), behavior, first)
    context = EvalContext.of_base(_eval_options(config, first.adapter, first.seed), model, tok)
    others = [evaluation_named(name) for name in config.evals if name not in ("sycophancy", "preference")]
    asked = [
        *first_asked,
        *(asked_of(cls, _for(cls, context), config.split, config.traits, config.judges) for cls in others),
    ]
    require_readable(context, asked, config.data.anyway)
    if possible:
        before_anything(model, tok, behavior, possible[0])
        # A `same-side` null needs the second sampling as well; one call, so that --fresh samples neither twice.
        make_pairs(model, tok, behavior, max(possible, key=lambda cell: cell.control == "same-side"))


def _run_cell(config: SweepConfig, behavior: str, cell: ReplicateConfig) -> Cell:
    seed, control, folder = cell.seed, cell.control, run_folder(config.out, behavior, cell.run_name, cell.seed)
    try:
        reading = replicate(cell)
        console.say(verdict(reading))
        others = [name for name in config.evals if name != "sycophancy"]  # replicate has read what is held out already
        if others and control == CONTROLS[0]:
            context = open_context(_eval_options(config, cell.run_name, seed))
            for name in others:
                cls = evaluation_named(name)
                asked = asked_of(cls, _for(cls, context), config.split, config.traits, config.judges)
                console.say(context.carry_out(asked).text)
    except Exception as problem:  # whatever it is, the other cells must not be lost to it
        write_text(folder / LOG, traceback.format_exc())
        console.say(f"failed: {problem}")
        kind = "" if isinstance(problem, WsError) else f"{type(problem).__name__}: "
        return Cell(cell.run_name, seed, folder, control, f"{kind}{problem}")
    (folder / LOG).unlink(missing_ok=True)
    return Cell(cell.run_name, seed, folder, control)


def _cells(config: SweepConfig) -> list[ReplicateConfig]:
    """The runs of a sweep, in the order in which they are made."""
    cells = list[ReplicateConfig]()
    for seed, adapter, control in product(config.seeds, config.adapters, (CONTROLS[0], *config.controls)):
        rate = train_preset(config.model, adapter).lr if config.train.lr is None else config.train.lr
        train = replace(config.train, lr=rate)
        cells.append(shared_with(ReplicateConfig, config, adapter=adapter, seed=seed, control=control, train=train))
    return cells


def _for(cls: type[Evaluation], context: EvalContext) -> EvalContext:
    """The context as one evaluation takes it: the sweep's thought is for those that come after one."""
    return context if cls.thinks else replace(context, options=replace(context.options, n_think=None))


def _eval_options(config: SweepConfig, adapter: str, seed: int) -> EvalOptions:
    return shared_with(EvalOptions, config, adapter=adapter, seed=seed)


def failures(cells: Sequence[Cell]) -> str:
    """Which cells failed, every problem once with its cells and the log of the first; empty when none did."""
    by_problem: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.problem:
            by_problem.setdefault(cell.problem.rstrip("."), []).append(cell)
    parts = [
        f"{', '.join(f'{c.adapter} seed {c.seed}' for c in failed)} ({problem}; {failed[0].folder / LOG})"
        for problem, failed in by_problem.items()
    ]
    count = sum(map(len, by_problem.values()))
    return f"{count} of {len(cells)} cells failed: {'; '.join(parts)}." if parts else ""


def main(config: SweepConfig) -> None:
    """The command `python -m ws.run_sweep`."""
    cells = run_sweep(config)
    if any(_in_tables(c) for c in cells):
        folder = config.out / behavior_name(config.behavior)
        tables = [folder / SUMMARY, folder / POOLED]
        text = render(read_csv(tables[1]))
        files = [*tables, write_report(config.out, config.behavior)]
        console.show(console.Result(text, {"rows": read_values(tables[1]), "cells": cells}, files))
    if failed := failures(cells):
        raise WsError(f"{failed} Run the sweep again{' without --fresh' if config.fresh else ''} to retry only those.")


if __name__ == "__main__":
    console.run(main, SweepConfig, "python -m ws.run_sweep")
