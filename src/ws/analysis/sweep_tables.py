"""The tables of a sweep: every cell by itself, and the seeds of each adapter pooled.

`sweep_summary.csv` has one row per adapter, seed and strength; its intervals know nothing about seeds.
`sweep_pooled.csv` has one row per adapter and strength, from a bootstrap over seeds and items. What was not evaluated
is left empty. The p-values of a table are Holm-corrected over those that it has, per evaluation. The mass and the
agreement of frames of a row are the lowest over its seeds, at its strength and at the base; where they are too low, the
column `<evaluation>_unreadable` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from ws.console import warn
from ws.errors import WsError
from ws.eval.evaluation import HeadlineScore
from ws.eval.prompts import check_same, notes_by_score
from ws.eval.readable import AGREEMENT, FLAG, Readability, notes, select, star, worst
from ws.eval.suite import evaluation_named, evaluations, floors_text, set_notes
from ws.files.runs import lock, read_csv, write_csv
from ws.options.shared import WEIGHT
from ws.stats import estimate_over_seeds, estimate_text, holm

SUMMARY, POOLED = "sweep_summary.csv", "sweep_pooled.csv"
_ASKED = ("words", "drawn")  # what rows say of their words and items

Row = dict[str, Any]
Items = dict[float, dict[str, float]]  # an averaged column by strength and item


def write_summary(folder: Path, cells: Sequence[Path], evals: Sequence[str], n_boot: int) -> None:
    """Both tables over the cells that went well; nothing when none did."""
    if cells:
        with lock(folder / "sweep"):  # both tables are of one sweep
            write_csv(folder / SUMMARY, sweep_rows(cells, evals))
            write_csv(folder / POOLED, pooled_rows(cells, evals, n_boot))


def sweep_rows(cells: Sequence[Path], evals: Sequence[str]) -> list[Row]:
    """One row per cell and strength: the headline columns of every evaluation, each under the evaluation's name.

    `WsError` when no cell was evaluated, or when cells were asked other items or in other words.
    """
    _check_asked(cells, evals)
    rows = [row for folder in cells for row in _cell_rows(folder, evals)]
    if not rows:
        raise WsError(f"None of {', '.join(map(str, cells))} has a table of an evaluation; evaluate them again.")
    return _with_holm(_filled(rows, evals), evals)


def _cell_rows(folder: Path, evals: Sequence[str]) -> list[Row]:
    merged: dict[float, Row] = {}
    for name in evals:
        readable = _readable([folder], name)
        for row in _rows_of(folder, name):
            alpha = float(row["alpha"])
            target = merged.setdefault(alpha, {k: row[k] for k in ("behavior", "adapter", "seed")} | {"alpha": alpha})
            columns = (*evaluation_named(name).columns, f"{_main(name).shift}_p")
            target |= {f"{name}_{column}": row[column] for column in columns}
            target |= _said(name, row)
            target[f"{name}_{FLAG}"] = readable[alpha].problem or None
    return [merged[alpha] for alpha in sorted(merged)]


def _said(name: str, row: Mapping[str, str]) -> Row:
    """What a row says of its words and items; of a published set that is not the bundled one, its name as well."""
    named = evaluation_named(name).is_published and row.get("dataset") not in (None, "", "pocket")
    return {f"{name}_{column}": row.get(column) for column in (*_ASKED, *(["dataset"] if named else []))}


def _check_asked(cells: Sequence[Path], evals: Sequence[str]) -> None:
    for name in evals:
        tables = {folder: _summary(folder, name) for folder in cells}
        check_same({str(folder): rows[0] for folder, rows in tables.items() if rows})


def _rows_of(folder: Path, name: str) -> list[Mapping[str, str]]:
    """The rows of an evaluation's summary that a sweep is about, those of its first score."""
    return _main(name).rows(_summary(folder, name))


def _readable(folders: Sequence[Path], name: str) -> dict[float, Readability]:
    """Per strength the worst of all folders, there and at the base."""
    by_alpha: dict[float, list[Readability]] = {}
    for folder in folders:
        for row in _rows_of(folder, name):
            by_alpha.setdefault(float(row["alpha"]), []).append(_main(name).readability(row))
    return {alpha: worst([*parts, *by_alpha.get(0.0, [])]) for alpha, parts in by_alpha.items()}


def _main(name: str) -> HeadlineScore:
    """The first headline score of an evaluation."""
    return evaluation_named(name).scores[0]


def _summary(folder: Path, name: str) -> Sequence[Mapping[str, str]]:
    score = _main(name)
    numbers = [column for column in (score.mass, score.level, score.shift) if column]
    file = folder / f"{evaluation_named(name).stage}_summary.csv"
    return _steered(file, ("alpha", *numbers), {AGREEMENT, score.agreement})


def _steered(file: Path, numbers: Iterable[str], sparse: Iterable[str] = ()) -> Sequence[Mapping[str, str]]:
    """A table's rows of the base and of the vector; none where the evaluation was not carried out."""
    rows = read_csv(file, ("intervention",), numbers, sparse) if file.exists() else []
    return select(rows) if any(r.get("intervention") == WEIGHT for r in rows) else []


def pooled_rows(cells: Sequence[Path], evals: Sequence[str], n_boot: int) -> list[Row]:
    """One row per adapter and strength, over its seeds: level and paired shift of every evaluation.

    An evaluation that some seed of the adapter lacks at a strength is left empty there. `WsError` when cells were asked
    other items or in other words.
    """
    _check_asked(cells, evals)
    rows: list[Row] = []
    for (behavior, adapter), folders in _by_adapter(cells, evals).items():
        key = {"behavior": behavior, "adapter": adapter, "n_seeds": len(folders)}
        merged: dict[float, Row] = {}
        for name in evals:
            readable = _readable(folders, name)
            asked = next((table[0] for folder in folders if (table := _summary(folder, name))), {})
            said = _said(name, asked)
            for alpha, columns in _pooled(name, [_items(folder, name) for folder in folders], n_boot).items():
                columns |= readable[alpha].columns(f"{name}_") | said
                merged.setdefault(alpha, key | {"alpha": alpha}).update(columns)
        rows += [merged[alpha] for alpha in sorted(merged)]
    return _with_holm(_filled(rows, evals), evals)


def _by_adapter(cells: Sequence[Path], evals: Sequence[str]) -> dict[tuple[str, str], list[Path]]:
    """The seeds' folders of every behaviour and adapter that was evaluated at all."""
    groups: dict[tuple[str, str], list[Path]] = {}
    for folder in cells:
        rows = [row for name in evals for row in _summary(folder, name)]
        if rows:
            groups.setdefault((rows[0]["behavior"], rows[0]["adapter"]), []).append(folder)
    return groups


def _items(folder: Path, name: str) -> Items:
    of, score, found = evaluation_named(name), _main(name), Items()
    for row in score.rows(_steered(folder / f"{of.stage}_{of.item_table}.csv", ("alpha", score.value))):
        found.setdefault(float(row["alpha"]), {})[row[of.item]] = float(row[score.value])
    return found


def _pooled(name: str, seeds: Sequence[Items], n_boot: int) -> dict[float, Row]:
    """One evaluation's level and paired shift at the strengths that all seeds have; none if their items differ."""
    shared = set.intersection(*map(set, seeds))
    if 0.0 not in shared:
        return {}
    items, rows = list(seeds[0][0.0]), dict[float, Row]()
    if any(seed[0.0].keys() != set(items) for seed in seeds):
        warn(f"{name} is not pooled over the seeds of an adapter that were asked different items.")
        return {}
    base = np.array([[seed[0.0][i] for i in items] for seed in seeds])
    for alpha in sorted(shared):
        values = np.array([[seed[alpha][i] for i in items] for seed in seeds])
        level, shift = estimate_over_seeds(values, n_boot), estimate_over_seeds(values - base, n_boot)
        row = level.columns(f"{name}_level", "ci_lo", "ci_hi")
        row |= shift.columns(f"{name}_{_main(name).shift}", "ci_lo", "ci_hi", "p")
        rows[alpha] = row | {f"{name}_n": level.n}
    return rows


def _filled(rows: Sequence[Row], evals: Sequence[str]) -> list[Row]:
    """All rows with the columns of all: first what names a row, then evaluation by evaluation."""
    every = dict.fromkeys(column for row in rows for column in row)
    by_evaluation = {name: [column for column in every if column.startswith(f"{name}_")] for name in evals}
    known = {column for columns in by_evaluation.values() for column in columns}
    columns = [*(c for c in every if c not in known), *(c for name in evals for c in by_evaluation[name])]
    return [{column: row.get(column) for column in columns} for row in rows]


def _with_holm(rows: list[Row], evals: Sequence[str]) -> list[Row]:
    """Every evaluation's p-values of a shift, corrected over all that there are; the base is not tested."""
    for name in evals:
        column = f"{name}_{_main(name).shift}_p"
        tested = [r for r in rows if r["alpha"] != 0 and r.get(column) is not None]
        adjusted = holm(np.array([float(r[column]) for r in tested])) if tested else ()
        holms = {id(r): float(p) for r, p in zip(tested, adjusted, strict=True)}
        for row in rows if column in rows[0] else ():
            row[f"{column}_holm"] = holms.get(id(row))
    return rows


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The pooled rows as a table for people: every shift with its interval, and `*` where it is more than chance."""
    columns = {name: f"{name}_{cls.scores[0].shift}" for name, cls in evaluations().items()}
    keys = {name: column for name, column in columns.items() if column in rows[0]}
    steered = [r for r in rows if float(r["alpha"]) != 0]
    table = [
        [
            *(r["adapter"], r["n_seeds"], f"{float(r['alpha']):+g}"),
            *(_shift(r, name, key) for name, key in keys.items()),
            *_lowest_mass(r, keys),
        ]
        for r in steered
    ]
    header = ["adapter", "seeds", "alpha", *(f"shift of {_main(n).heading}" for n in keys)]
    header += ["mass"] if any(_lowest_mass(r, keys) for r in steered) else []
    counts = [sum(r[key] not in (None, "") for r in steered) for key in keys.values()]
    tests = f"the {counts[0]} rows of a column" if len(set(counts)) == 1 else "the shifts of its column"
    note = (
        f"* p < 0.05 after Holm's correction over {tests}, and at least {floors_text(map(_main, keys))}. That "
        "is more than no shift; whether it comes from the behaviour is not known before trained nulls stand beside it "
        "(`--controls shuffled same-side`, then `ws compare`)."
    )
    asked = [{c: r.get(f"{n}_{c}") for c in _ASKED} | {"score": _main(n).heading} for r in rows for n in keys]
    more = [*notes(r.get(f"{name}_{FLAG}") for r in steered for name in keys), *notes_by_score(asked)]
    more += set_notes({"score": _main(n).key, "dataset": r.get(f"{n}_dataset")} for r in rows for n in keys)
    return "\n\n".join([tabulate(table, header, tablefmt="github", disable_numparse=True), note, *more])


def _lowest_mass(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    masses = [float(m) for name in names if (m := row.get(f"{name}_mass")) not in (None, "")]
    return [f"{min(masses):.3f}"] if masses else []


def _shift(row: Mapping[str, Any], name: str, key: str) -> str:
    """A shift with its interval; empty where nothing was measured."""
    if row[key] in (None, ""):
        return ""
    tested = float(row[key]), float(row[f"{key}_p_holm"])
    stars = star(*tested, _main(name).floor, row.get(f"{name}_{FLAG}"))
    return f"{estimate_text(row, key, _main(name).spec)}{stars}"
