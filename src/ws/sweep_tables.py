"""The tables of a sweep: every cell by itself, and the seeds of each adapter pooled.

`sweep_summary.csv` has one row per adapter, seed and strength; its intervals know nothing about seeds.
`sweep_pooled.csv` has one row per adapter and strength, from a bootstrap over seeds and items. The p-values of a table
are Holm-corrected over all of its steered rows, per evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ws.eval import airisk
from ws.eval.context import select
from ws.eval.stats import estimate_over_seeds, holm, least_p
from ws.runs import read_csv, write_csv

EVALS = ("sycophancy", "airisk", "tinymfv_airisk")
SUMMARY, POOLED = "sweep_summary.csv", "sweep_pooled.csv"
_TABLES = {
    "sycophancy": "sycophancy_summary.csv",
    "airisk": f"{airisk.table_name()}_summary.csv",
    "tinymfv_airisk": "tinymfv_airisk_summary.csv",
}
_HEADLINES = {
    "sycophancy": ("mean_logratio", "ci_lo", "ci_hi", "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n"),
    "airisk": (
        *("mean_score", "ci_lo", "ci_hi", "shift", "shift_ci_lo", "shift_ci_hi", "mean_pmass", "n"),
        *("accuracy", "si", "si_ci_lo", "si_ci_hi", "position_bias", "forced_closes"),
    ),
    "tinymfv_airisk": (
        *("wrongness", "wrongness_ci_lo", "wrongness_ci_hi", "gap", "gap_ci_lo", "gap_ci_hi"),
        *("delta_wrongness", "delta_wrongness_ci_lo", "delta_wrongness_ci_hi"),
        *("bool_mass_other", "bool_mass_self", "human_corr", "frame_agreement", "n_vignettes"),
    ),
}
_SHIFTS = {"sycophancy": "shift", "airisk": "shift", "tinymfv_airisk": "delta_wrongness"}
# Per evaluation: the table of its items, the column that names one, and the column that is averaged.
_ITEMS = {
    "sycophancy": ("sycophancy_per_claim.csv", "claim_id", "logratio"),
    "airisk": (f"{airisk.table_name()}_per_row.csv", "dilemma_idx", "score"),
    "tinymfv_airisk": ("tinymfv_airisk_per_vignette.csv", "id", "s_other_violate"),
}
_HEADS = {
    "sycophancy": "agreement with false claims",
    "airisk": "truthful choices",
    "tinymfv_airisk": "wrongness",
}

Row = dict[str, Any]


def write_summary(folder: Path, cells: Sequence[Path], evals: Sequence[str], n_boot: int) -> None:
    """Both tables over the cells that went well; nothing when none did."""
    if cells:
        write_csv(folder / SUMMARY, sweep_rows(cells, evals))
        write_csv(folder / POOLED, pooled_rows(cells, evals, n_boot))


def sweep_rows(cells: Sequence[Path], evals: Sequence[str]) -> list[Row]:
    """One row per cell and strength: the headline columns of every evaluation, each under the evaluation's name."""
    rows = [row for folder in cells for row in _cell_rows(folder, evals)]
    return _with_holm(rows, evals)


def _cell_rows(folder: Path, evals: Sequence[str]) -> list[Row]:
    merged: dict[float, Row] = {}
    for name in evals:
        for row in select(read_csv(folder / _TABLES[name])):
            if row.get("claims_are_true") == "True":
                continue
            alpha = float(row["alpha"])
            target = merged.setdefault(alpha, {k: row[k] for k in ("behavior", "adapter", "seed")} | {"alpha": alpha})
            target |= {f"{name}_{column}": row[column] for column in (*_HEADLINES[name], f"{_SHIFTS[name]}_p")}
    return [merged[alpha] for alpha in sorted(merged)]


def pooled_rows(cells: Sequence[Path], evals: Sequence[str], n_boot: int) -> list[Row]:
    """One row per adapter and strength, over its seeds: level and paired shift of every evaluation.

    A strength that some seed of the adapter lacks is left out.
    """
    merged: dict[tuple[str, float], Row] = {}
    for name in evals:
        for (behavior, adapter), seeds in _seeds(cells, name).items():
            items = list(seeds[0][0.0])
            base = np.array([[seed[0.0][i] for i in items] for seed in seeds])
            for alpha in sorted(set.intersection(*(set(seed) for seed in seeds))):
                values = np.array([[seed[alpha][i] for i in items] for seed in seeds])
                key = {"behavior": behavior, "adapter": adapter, "n_seeds": len(seeds), "alpha": alpha}
                level, shift = estimate_over_seeds(values, n_boot), estimate_over_seeds(values - base, n_boot)
                row = merged.setdefault((adapter, alpha), key)
                row |= level.columns(f"{name}_level", "ci_lo", "ci_hi")
                row |= shift.columns(f"{name}_{_SHIFTS[name]}", "ci_lo", "ci_hi", "p") | {f"{name}_n": level.n}
    return _with_holm(list(merged.values()), evals)


def _seeds(cells: Sequence[Path], name: str) -> dict[tuple[str, str], list[dict[float, dict[str, float]]]]:
    """Per behaviour and adapter, for every seed: the averaged column by strength and item."""
    file, item, column = _ITEMS[name]
    found: dict[tuple[str, str], list[dict[float, dict[str, float]]]] = {}
    for folder in cells:
        rows = [r for r in select(read_csv(folder / file)) if r.get("claim_is_true") != "True"]
        by_alpha: dict[float, dict[str, float]] = {}
        for r in rows:
            by_alpha.setdefault(float(r["alpha"]), {})[r[item]] = float(r[column])
        found.setdefault((rows[0]["behavior"], rows[0]["adapter"]), []).append(by_alpha)
    return found


def _with_holm(rows: list[Row], evals: Sequence[str]) -> list[Row]:
    """Every evaluation's p-values of a shift, corrected over all rows but the base's."""
    for name in evals:
        column = f"{name}_{_SHIFTS[name]}_p"
        steered = [r for r in rows if r["alpha"] != 0]
        adjusted = holm(np.array([float(r[column]) for r in steered])) if steered else ()
        holms = {id(r): float(p) for r, p in zip(steered, adjusted, strict=True)}
        for row in rows:
            row[f"{column}_holm"] = holms.get(id(row))
    return rows


def render(rows: Sequence[Mapping[str, Any]], n_boot: int) -> str:
    """The pooled rows as a table for people: every shift with its interval, and `*` where it survives Holm."""
    table, names = [], [n for n in EVALS if f"{n}_{_SHIFTS[n]}" in rows[0]]
    steered = [r for r in rows if float(r["alpha"]) != 0]
    for r in steered:
        cells = [r["adapter"], r["n_seeds"], f"{float(r['alpha']):+g}"]
        for key in (f"{n}_{_SHIFTS[n]}" for n in names):
            low, high = (float(r[f"{key}_{end}"]) for end in ("ci_lo", "ci_hi"))
            star = "*" if float(r[f"{key}_p_holm"]) < 0.05 else ""
            cells.append(f"{float(r[key]):+.2f} [{low:+.2f}, {high:+.2f}]{star}")
        table.append(cells)
    header = ["adapter", "seeds", "alpha", *(f"shift of {_HEADS[n]}" for n in names)]
    note = f"* p < 0.05 after Holm's correction over the {len(steered)} rows of a column"
    if len(steered) * least_p(n_boot) >= 0.05:
        note = f"{n_boot} resamples are too few to tell which of {len(steered)} shifts survive Holm's correction"
    return f"{tabulate(table, header, tablefmt='github', disable_numparse=True)}\n\n{note}"
