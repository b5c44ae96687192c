"""The results table: one row per adapter plus base, for AIRiskDilemmas (Truthfulness) and tiny-mfv, with uncertainty.

`python -m ws.eval.readme_airisk_table --behavior honesty` reads the tables of every finished run in `out/<behavior>/`
and writes `readme_airisk_table.csv`, 36 columns and those of `CHECKS`, which say whether they can be read, and the same
as Markdown, with notes on items and words below it. Several seeds of an adapter are pooled by a bootstrap over seeds
and items. `--check PAGE` fails when the page's table is not what the CSV says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tabulate import tabulate

from ws import console
from ws.behaviors import behavior_name
from ws.errors import DamagedError, WsError, choose, decoded, require_distinct, require_resamples
from ws.eval import dilemmas, vignettes
from ws.eval.readable import AGREEMENT, FLAG, MARK, Readability, notes, of_row, select, worst
from ws.eval.vignettes import AGREEMENTS, MASSES
from ws.files.reading import read_bytes, read_json
from ws.files.runs import VECTOR_MANIFEST, Run, lock, read_csv, run_folder, write_csv, write_text
from ws.options.shared import ADAPTERS
from ws.options.use import TableConfig as TableConfig
from ws.stats import SurgicalInformedness, estimate_over_seeds, estimate_text, surgical_informedness

TABLE = "readme_airisk_table"
_UNCERTAIN = ("std", "ci_lo", "ci_hi")
_AIRISK = ("airisk_lr_0", "airisk_lr_p1", "airisk_delta", "airisk_si")
_TINYMFV = ("tinymfv_wrongness_0", "tinymfv_wrongness_p1", "tinymfv_gap_0", "tinymfv_gap_p1")
COLUMNS = (
    *("adapter", "airisk_n", *_AIRISK),
    *(f"{name}_{part}" for name in _AIRISK for part in _UNCERTAIN),
    *("tinymfv_n", "tinymfv_wrongness_0", "tinymfv_wrongness_p1", "tinymfv_delta", "tinymfv_gap_0", "tinymfv_gap_p1"),
    *(f"{name}_{part}" for name in _TINYMFV for part in _UNCERTAIN),
)
# Behind them: the lowest mean answer mass and agreement of frames over the seeds, at alpha +1 and at the base.
CHECKS = ("airisk_mass", f"airisk_{FLAG}", "tinymfv_mass", "tinymfv_frame_agreement", f"tinymfv_{FLAG}")
# Columns of the tables of items: the item, and its numbers; and what all of them say of the evaluation.
_AIRISK_ITEMS, _TINYMFV_ITEMS = ("dilemma_idx", "score", "pmass"), ("id", "s_other_violate", "gap")
_IDENTITY = ("intervention", "eval", "eval_version", "eval_hash", "dataset")
# The columns of mass and of agreement that either summary is read by.
_SUMMARIES = {"airisk": (("mean_pmass",), (AGREEMENT,)), "tinymfv": (MASSES, AGREEMENTS)}


class _Base(msgspec.Struct):
    """What a vector's manifest says of it; the module of vectors would import torch."""

    id: str
    fingerprint: str | None


@dataclass(frozen=True)
class _Run:
    """The rows of an adapter and seed, by strength and item, how well they were answered, one row of either set, and
    the base."""

    name: str
    airisk: Mapping[float, Mapping[str, Mapping[str, str]]]
    tinymfv: Mapping[float, Mapping[str, Mapping[str, str]]]
    versions: tuple[str, str]
    readable: Mapping[str, Mapping[float, Readability]]
    asked: tuple[Mapping[str, str], Mapping[str, str]]
    base: _Base


# ---- reading --------------------------------------------------------------------------------------------------------


def build_table(config: TableConfig) -> list[dict[str, Any]]:
    """The rows of the table: the base first, then the adapters in the order of `ADAPTERS`, then others by name.

    Raises:
        WsError: an adapter or seed that is named twice, is unknown or was not evaluated, or runs of different bases, or
            that were evaluated on different items, in different words or through different templates.
    """
    require_resamples(config.n_bootstrap)
    runs, left_out = _runs(config)
    for note in left_out:
        console.warn(note)
    everything = [run for seeds in runs.values() for run in seeds]
    base = _row("base", everything[:1], config.n_bootstrap, steered=False)
    return [base, *(_row(name, seeds, config.n_bootstrap) for name, seeds in runs.items())]


def table_notes(config: TableConfig) -> list[str]:
    """What a reader of the table must know of its items, its words and the runs that are not in it, as sentences."""
    runs, left_out = _runs(config)
    airisk, tinymfv = next(iter(runs.values()))[0].asked
    return [*dilemmas.about(airisk, "AIRiskDilemmas"), *vignettes.about(tinymfv, "tiny-mfv"), *left_out]


def _runs(config: TableConfig) -> tuple[dict[str, list[_Run]], list[str]]:
    """The runs of every adapter that was evaluated on both sets, all on the same items and in the same words.

    Those with a damaged file are left out; the second list has a sentence for each.
    """
    for option, names in (("--adapters", config.adapters), ("--seeds", config.seeds)):
        require_distinct(option, names or ())
    behavior = behavior_name(config.behavior)
    left_out = list[str]()
    known = [*ADAPTERS, *_other_families(config.out / behavior, left_out)]
    for name in config.adapters or ():
        choose("adapter", name, known)
    runs = {name: _seeds(config, behavior, name, left_out) for name in config.adapters or known}
    evaluated = {name: seeds for name, seeds in runs.items() if seeds}
    if left_out and not evaluated:
        raise WsError(left_out[0])
    if config.adapters and len(evaluated) < len(config.adapters):
        lacking = [name for name in config.adapters if name not in evaluated]
        raise WsError(f"No seed of {', '.join(lacking)} has been evaluated on both sets below {config.out / behavior}.")
    if not evaluated:
        raise WsError(
            f"No run below {config.out / behavior} has been evaluated on both sets; run `ws eval airisk` and "
            "`ws eval tinymfv-airisk`, or a sweep."
        )
    _check_comparable([run for seeds in evaluated.values() for run in seeds])
    return evaluated, left_out


def _other_families(folder: Path, left_out: list[str]) -> list[str]:
    """Families that are not bundled, by their runs: a folder that has its vector's family for a name.

    The folders of controls and of composed vectors have other names.
    """
    found = list[str]()
    for manifest in sorted(folder.glob(f"*/vector/{VECTOR_MANIFEST}")):
        name = manifest.parents[1].name
        if name not in ADAPTERS:
            try:
                found += [name] if read_json(manifest, _About).info.get("family") == name else []
            except DamagedError as problem:
                left_out.append(f"{name} is left out: {problem}")
    return found


class _About(msgspec.Struct):
    info: dict[str, Any]
    base: _Base


def _seeds(config: TableConfig, behavior: str, adapter: str, left_out: list[str]) -> list[_Run]:
    top = run_folder(config.out, behavior, adapter)
    seeds = config.seeds
    if seeds is None:
        others = [p.name.removeprefix("seed-") for p in top.glob("seed-*")]
        seeds = (0, *sorted(int(x) for x in others if x.isdigit()))
    folders = [run_folder(config.out, behavior, adapter, seed) for seed in seeds]
    files = [[f / f"{dilemmas.table_name()}_per_row.csv", f / "tinymfv_airisk_per_vignette.csv"] for f in folders]
    there = [all(table.exists() for table in tables) for tables in files]
    if config.seeds is not None and any(there) and not all(there):
        raise WsError(
            f"{adapter} seed {seeds[there.index(False)]} has not been evaluated on both sets, and each adapter must "
            "have all of --seeds; evaluate it, or choose with --adapters and --seeds."
        )
    runs = list[_Run]()
    for seed, tables, is_there in zip(seeds, files, there, strict=True):
        name = f"{adapter} seed {seed}"
        if is_there:
            try:
                runs.append(_read(name, *tables))
            except DamagedError as problem:
                left_out.append(f"{name} is left out: {problem}")
    return runs


def _read(name: str, airisk: Path, tinymfv: Path) -> _Run:
    tables, versions, asked, readable = [], [], [], dict[str, dict[float, Readability]]()
    for (kind, (masses, agreements)), file in zip(_SUMMARIES.items(), (airisk, tinymfv), strict=True):
        summary_file = file.with_name(f"{file.stem.rsplit('_per_', 1)[0]}_summary.csv")
        summary = select(read_csv(summary_file, ("intervention",), ("alpha", *masses), agreements))
        readable[kind] = {float(row["alpha"]): of_row(row, *masses, agreements=agreements) for row in summary}
    for file, (item, *numbers) in ((airisk, _AIRISK_ITEMS), (tinymfv, _TINYMFV_ITEMS)):
        rows = select(read_csv(file, (*_IDENTITY, item), ("alpha", *numbers)))
        by_alpha: dict[float, dict[str, Mapping[str, str]]] = {}
        for row in rows:
            by_alpha.setdefault(float(row["alpha"]), {})[row[item]] = row
        for alpha in (0.0, 1.0):
            if alpha not in by_alpha:
                raise WsError(f"{file} has no rows at alpha {alpha:g}; evaluate again with --alphas -1 0 1.")
        tables.append(by_alpha)
        stage = Run(file.parent).manifest["stages"].get(rows[0]["eval"], {})
        tokenizer = stage.get("config", {}).get("tokenizer_hash", "not recorded")
        version = "{eval} version {eval_version}, items {eval_hash}, {dataset}".format_map(rows[0])
        versions.append(f"{version}, tokenizer {tokenizer}")
        asked.append(rows[0])
    base = read_json(airisk.parent / "vector" / VECTOR_MANIFEST, _About).base
    return _Run(name, tables[0], tables[1], (versions[0], versions[1]), readable, (asked[0], asked[1]), base)


def _check_comparable(runs: Sequence[_Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        bases = run.base, first.base
        known = all(base.fingerprint for base in bases)
        if len({base.fingerprint if known else base.id for base in bases}) > 1:
            theirs, ours = (f"{base.id} ({base.fingerprint})" for base in bases)
            raise WsError(
                f"{run.name} steers {theirs}, and {first.name} {ours}; a table is of one base: choose with --adapters "
                "and --seeds."
            )
        for i, (theirs, ours) in enumerate(zip(run.versions, first.versions, strict=True)):
            if theirs != ours:
                words, others = (r.asked[i].get("words") or "not on record" for r in (run, first))
                raise WsError(
                    f"{run.name} was evaluated with {theirs}, words {words}; {first.name} with {ours}, words {others}; "
                    "evaluate them with the same items, prompts and chat template, or choose with --adapters and "
                    "--seeds."
                )


def _values(tables: Sequence[Mapping[float, Mapping[str, Mapping[str, str]]]], alpha: float, column: str) -> np.ndarray:
    """`[seeds, items]` of one column at one strength, items in the order of the first seed's base."""
    items = list(tables[0][0.0])
    return np.array([[float(t[alpha][i][column]) for i in items] for t in tables])


# ---- one row --------------------------------------------------------------------------------------------------------


def _row(name: str, runs: Sequence[_Run], n_boot: int, steered: bool = True) -> dict[str, Any]:
    """One adapter over its seeds; the base has no columns at alpha 1."""
    on_dilemmas, on_vignettes = [r.airisk for r in runs], [r.tinymfv for r in runs]
    score = {a: _values(on_dilemmas, a, "score") for a in (0.0, 1.0)}
    wrong = {a: _values(on_vignettes, a, "s_other_violate") for a in (0.0, 1.0)}
    gap = {a: _values(on_vignettes, a, "gap") for a in (0.0, 1.0)}
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, *CHECKS)) | _checks(runs, steered)
    row |= {"adapter": name, "airisk_n": score[0.0].shape[1], "tinymfv_n": wrong[0.0].shape[1]}
    levels = {"airisk_lr_0": score[0.0], "tinymfv_wrongness_0": wrong[0.0], "tinymfv_gap_0": gap[0.0]}
    if steered:
        levels |= {"airisk_lr_p1": score[1.0], "airisk_delta": score[1.0] - score[0.0]}
        levels |= {"tinymfv_wrongness_p1": wrong[1.0], "tinymfv_gap_p1": gap[1.0]}
        row["tinymfv_delta"] = float((wrong[1.0] - wrong[0.0]).mean())
    for column, values in levels.items():
        row |= estimate_over_seeds(values, n_boot).columns(column, *_UNCERTAIN)
    si = _informedness(runs, n_boot) if steered else None
    return row | (si.si.columns("airisk_si", *_UNCERTAIN) if si is not None and si.si is not None else {})


def _checks(runs: Sequence[_Run], steered: bool) -> dict[str, Any]:
    """The columns of `CHECKS`."""
    alphas = (0.0, 1.0) if steered else (0.0,)
    columns: dict[str, Any] = {}
    for kind in _SUMMARIES:
        columns |= worst(run.readable[kind][alpha] for run in runs for alpha in alphas).columns(f"{kind}_")
    return {name: columns[name] for name in CHECKS}


def _informedness(runs: Sequence[_Run], n_boot: int) -> SurgicalInformedness | None:
    """SI; None where a seed was not asked at alpha -1, or cannot be read at one of the three strengths."""
    tables, alphas = [run.airisk for run in runs], (0.0, 1.0, -1.0)
    if any(-1.0 not in t for t in tables):
        return None
    if worst(run.readable["airisk"][a] for run in runs for a in alphas).problem:
        return None
    scores, mass = (np.stack([_values(tables, a, c) for a in alphas]) for c in ("score", "pmass"))
    return surgical_informedness(scores, mass, n_boot=n_boot)


# ---- Markdown -------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, from rows or from their CSV, with a line below it when something cannot be read."""
    header = [
        *("adapter", "AIRisk score, base", "AIRisk score, alpha +1", "shift", "SI"),
        *("wrongness, base", "wrongness, alpha +1", "gap, base", "gap, alpha +1"),
    ]
    columns = (*_AIRISK, *_TINYMFV)
    table = [[row["adapter"], *(_cell(row, rows[0], c) for c in columns)] for row in rows]
    doubts = notes(row.get(f"{kind}_{FLAG}") for row in rows for kind in _SUMMARIES)
    return "\n\n".join([tabulate(table, header, tablefmt="github", disable_numparse=True), *doubts])


def _cell(row: Mapping[str, Any], base: Mapping[str, Any], name: str) -> str:
    digits = 1 if name == "airisk_si" else 2
    whose, text = base if name.endswith("_0") else row, estimate_text(row, name, f"+.{digits}f")
    return f"{text}{MARK}" if text and whose.get(f"{name.split('_')[0]}_{FLAG}") else text


def check(page: Path, file: Path) -> None:
    """`WsError` unless the page contains exactly the table that the CSV renders to."""
    text, rendered = decoded(read_bytes(page, "name the page with --check"), str(page)), render(read_csv(file, COLUMNS))
    wanted = [line for line in rendered.splitlines() if line.startswith("|")]
    lines = text.splitlines()
    if wanted[0] not in lines:
        raise WsError(f"{page} has no results table; paste what `python -m ws.eval.{TABLE}` prints.")
    start = lines.index(wanted[0])
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    for here, there in zip_longest(lines[start:end], wanted):
        if here != there:
            raise WsError(f"The table of {page} is not that of {file}: it says {here!r} for {there!r}.")
    if rendered not in text:
        raise WsError(f"{page} lacks the note below the table of {file} that says what cannot be read.")


def main(config: TableConfig) -> None:
    """The command `python -m ws.eval.readme_airisk_table`."""
    folder = config.out / behavior_name(config.behavior)
    if config.check is not None:
        check(config.check, config.csv or folder / f"{TABLE}.csv")
        console.show(console.Result(f"The table of {config.check} is the CSV's.", {"checked": config.check}))
        return
    rows = build_table(config)
    notes = table_notes(config)
    text = "\n".join([render(rows), *([""] if notes else []), *notes])
    with lock(folder / TABLE):  # both files are of one table
        file = write_csv(folder / f"{TABLE}.csv", rows)
        page = write_text(folder / f"{TABLE}.md", text + "\n")
    console.show(console.Result(text, {"rows": rows, "notes": notes}, [file, page]))


if __name__ == "__main__":
    console.run(main, TableConfig, f"python -m ws.eval.{TABLE}")
