"""Many runs: adapters x seeds x evaluations on one set of pairs.

`python -m ws.run_sweep --behavior honesty --n-personas 1 --n-samples 50` does the six families. A cell that fails does
not lose the others: its traceback goes to `sweep.log` in its folder and it is listed at the end. Running the sweep
again fills only what is missing. Writes `out/<behavior>/sweep_summary.csv`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

from tabulate import tabulate

from ws import console
from ws.adapters import FAMILIES, family
from ws.behaviors import load_behavior
from ws.data import DataConfig, data_preset
from ws.errors import WsError, choose
from ws.eval import tinymfv_airisk
from ws.eval.context import EvalOptions, open_context
from ws.models import DEFAULT_MODEL
from ws.replicate import ReplicateConfig, replicate, verdict
from ws.runs import DEFAULT_OUT, read_csv, run_folder, write_csv, write_text
from ws.train import TrainConfig, train_preset

EVALS = ("sycophancy", "tinymfv_airisk")
LOG, SUMMARY = "sweep.log", "sweep_summary.csv"
_HEADLINES = {
    "sycophancy": ("mean_logratio", "ci_lo", "ci_hi", "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n"),
    "tinymfv_airisk": (
        *("wrongness", "wrongness_ci_lo", "wrongness_ci_hi", "gap", "gap_ci_lo", "gap_ci_hi"),
        *("delta_wrongness", "delta_wrongness_ci_lo", "delta_wrongness_ci_hi"),
        *("bool_mass_other", "bool_mass_self", "human_corr", "frame_agreement", "n_vignettes"),
    ),
}


@dataclass(frozen=True)
class SweepConfig:
    """Which cells, and how each is made.

    Attributes:
        model, behavior, out, split, device, dtype, fresh: as in `ReplicateConfig`.
        adapters: families, all six by default.
        seeds: of initialisation and order; the pairs are shared by all cells.
        evals: which evaluations.
        alphas: steering strengths; 0 is always included.
        dataset: for tiny-mfv: a hub id, a local folder or `pocket`.
        n_bootstrap: resamples per interval.
        data: how the pairs are sampled.
        train: settings for every family; `lr=None` takes each family's own.
    """

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    adapters: tuple[str, ...] = tuple(FAMILIES)
    seeds: tuple[int, ...] = (0,)
    evals: tuple[str, ...] = EVALS
    out: Path = DEFAULT_OUT
    alphas: tuple[float, ...] = (-1.0, 0.0, 1.0)
    split: str = "report"
    dataset: str | None = None
    n_bootstrap: int = 1000
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
    """One adapter and one seed, with what became of it."""

    adapter: str
    seed: int
    folder: Path
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
    behavior = load_behavior(config.behavior, config.model).name
    plan = list(product(config.seeds, config.adapters))
    done: list[Cell] = []
    start = time.perf_counter()
    for number, (seed, adapter) in enumerate(plan):
        left = (time.perf_counter() - start) / number * (len(plan) - number) if number else 0
        estimate = f", about {timedelta(seconds=round(left))} left" if number else ""
        console.say(f"== {adapter}, seed {seed} ({number + 1} of {len(plan)}{estimate})")
        done.append(_run_cell(config, behavior, adapter, seed, first=number == 0))
    rows = [row for cell in done if cell.problem is None for row in summary_rows(cell, config.evals)]
    if rows:
        write_csv(config.out / behavior / SUMMARY, rows)
    return done


def _run_cell(config: SweepConfig, behavior: str, adapter: str, seed: int, first: bool) -> Cell:
    folder = run_folder(config.out, behavior, adapter, seed)
    try:
        reading = replicate(_replicate_config(config, adapter, seed, first))
        console.say(verdict(reading))
        if "tinymfv_airisk" in config.evals:
            console.say(tinymfv_airisk.run(open_context(_eval_options(config, behavior, adapter, seed))))
    except Exception as problem:  # whatever it is, the other cells must not be lost to it
        write_text(folder / LOG, traceback.format_exc())
        console.say(f"failed: {problem}")
        return Cell(adapter, seed, folder, f"{type(problem).__name__}: {problem}")
    (folder / LOG).unlink(missing_ok=True)
    return Cell(adapter, seed, folder)


def _replicate_config(config: SweepConfig, adapter: str, seed: int, first: bool) -> ReplicateConfig:
    rate = train_preset(config.model, adapter).lr if config.train.lr is None else config.train.lr
    shared = {k: getattr(config, k) for k in ("model", "behavior", "out", "alphas", "split", "n_bootstrap", "device")}
    return ReplicateConfig(
        **shared,
        dtype=config.dtype,
        adapter=adapter,
        seed=seed,
        fresh=config.fresh,
        fresh_data=first,
        data=config.data,
        train=replace(config.train, lr=rate),
    )


def _eval_options(config: SweepConfig, behavior: str, adapter: str, seed: int) -> EvalOptions:
    shared = {k: getattr(config, k) for k in ("model", "out", "alphas", "dataset", "n_bootstrap", "device", "dtype")}
    return EvalOptions(**shared, behavior=behavior, adapter=adapter, seed=seed)


# ---- the summary --------------------------------------------------------------------------------------------------


def summary_rows(cell: Cell, evals: Sequence[str]) -> list[dict[str, Any]]:
    """One row per strength: the headline columns of every evaluation, each under the evaluation's name."""
    merged: dict[float, dict[str, Any]] = {}
    for name in evals:
        for row in read_csv(cell.folder / f"{name}_summary.csv"):
            if row.get("claims_are_true") == "True":
                continue
            alpha = float(row["alpha"])
            target = merged.setdefault(alpha, {k: row[k] for k in ("behavior", "adapter", "seed")} | {"alpha": alpha})
            target |= {f"{name}_{column}": row[column] for column in _HEADLINES[name]}
    return [merged[alpha] for alpha in sorted(merged)]


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table for people: every shift against the base with its interval."""
    table = []
    for r in rows:
        cells = [r["adapter"], r["seed"], f"{float(r['alpha']):+g}"]
        for name, shift in (("sycophancy", "shift"), ("tinymfv_airisk", "delta_wrongness")):
            if f"{name}_{shift}" in r:
                low, high = (float(r[f"{name}_{shift}_{end}"]) for end in ("ci_lo", "ci_hi"))
                cells.append(f"{float(r[f'{name}_{shift}']):+.3f} [{low:+.3f}, {high:+.3f}]")
        table.append(cells)
    heads = {"sycophancy_shift": "agreement with false claims", "tinymfv_airisk_delta_wrongness": "wrongness"}
    header = ["adapter", "seed", "alpha", *(f"shift of {h}" for k, h in heads.items() if k in rows[0])]
    return tabulate(table, header, disable_numparse=True)


def main(config: SweepConfig) -> None:
    """The command `python -m ws.run_sweep`."""
    cells = run_sweep(config)
    rows = [row for cell in cells if cell.problem is None for row in summary_rows(cell, config.evals)]
    if rows:
        print(render(rows))
        print(f"\nSummary: {config.out / rows[0]['behavior'] / SUMMARY}")
    failed = [c for c in cells if c.problem]
    if failed:
        listing = "; ".join(f"{c.adapter} seed {c.seed} ({c.problem}; {c.folder / LOG})" for c in failed)
        raise WsError(
            f"{len(failed)} of {len(cells)} cells failed: {listing}. Run the sweep again to retry only those."
        )


if __name__ == "__main__":
    console.run(main, SweepConfig, "python -m ws.run_sweep")
