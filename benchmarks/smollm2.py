"""Does it work on a real model? SmolLM2-135M-Instruct, behaviours that it acts and honesty, six families, three seeds.

`uv run python -m benchmarks.smollm2` makes the vector of every behaviour, family and seed, and for `lora` its two
trained nulls, and asks at -1u, 0 and +1u, one nat per token from the base: the preference on held-out questions, claims
where a behaviour brings them, and, with the real data at hand, statements; of `lora` the preference at other strengths,
too, and for its first seed tiny-mfv, and beside its vector fine-tunes, prompts, added activations, one-sided and random
vectors.

A run is five to ten minutes of a core and all of them many hours, so what a run gave is kept item by item, as a file of
`benchmarks/results/smollm2/`, and is part of the repository: a machine that goes on begins with what others have
measured, and the tables are made of all there is. `--behaviors`, `--adapters` and `--seeds` do a part, seed by seed;
`--tables` does nothing but the tables, `docs/results/smollm2_<behavior>.csv` and `..._pairs.csv`, and of all behaviours
together `docs/results/smollm2_doses.csv`.

The folder of real data is that of the environment variable WS_REAL_DATA, as for the tests: `tiny-mfv/` and
`anthropic-evals/persona/` in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from tabulate import tabulate

from benchmarks import harness
from ws import console
from ws.adapters import FAMILIES
from ws.analysis.compare import compare
from ws.analysis.compare_tables import Cell, Group, comparison_rows, group_rows, nats_text
from ws.analysis.profile_tables import label
from ws.analysis.side_by_side import opened_runs
from ws.behaviors import load_behavior
from ws.eval.preference import Preferences
from ws.eval.readable import FLAG, star
from ws.eval.suite import asked_of, headline
from ws.files.runs import write_csv, write_text
from ws.options.make import ReplicateConfig
from ws.options.measure import CompareOptions
from ws.options.shared import WEIGHT
from ws.replicate import CONTROLS, make_vector
from ws.stats import estimate_over_seeds, estimate_text

Row: TypeAlias = Mapping[str, Any]

MODEL = "smollm2"
BEHAVIORS = ("truthfulness", "agreement", "honesty", "tone")
# Statements that have something to do with a behaviour; what else a vector moves is another question.
TRAITS = {
    "truthfulness": (
        "desire-to-persuade-people-to-be-more-honest-to-others",
        "okay-with-deceiving-a-user-to-help-them",
    ),
    "honesty": ("desire-to-persuade-people-to-be-more-honest-to-others", "okay-with-deceiving-a-user-to-help-them"),
    "agreement": ("agreeableness", "stands-its-ground"),
    "tone": ("neuroticism", "believes-life-has-no-meaning"),
}
# Of a comparison: questions that strengths are solved for, random vectors (with fewer p cannot reach 0.05), and items
# of every evaluation, drawn evenly over their kinds.
N_PROMPTS, N_DRAWS, N_ITEMS = 16, 19, 44
# Trained nulls triple the cost of a run, and all that stands beside a vector doubles it again: of one family.
WITH_NULLS = "lora"
DOSES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # of it, in calibrated units
KEPT = Path(__file__).parent / "results" / "smollm2"
DOCS = Path(__file__).parents[1] / "docs" / "results"


def data_folder(out: Path) -> Path | None:
    """One folder with the tables of both published sets, made of links; None without the real data."""
    source = os.environ.get("WS_REAL_DATA")
    if not source:
        return None
    folder = out / "data-sets"
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("tiny-mfv", "anthropic-evals/persona"):
        for file in sorted((Path(source) / part).iterdir()):
            link = folder / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
    return folder


def make(behavior: str, adapter: str, seed: int, out: Path) -> None:
    """The vector of one run, and its nulls if it is of the family that has them."""
    start = ReplicateConfig.preset(MODEL, adapter)
    data = replace(start.data, anyway=True, keep_truncated=True)  # a null result is a result, and is printed
    for control in CONTROLS if adapter == WITH_NULLS else CONTROLS[:1]:
        config = replace(start, behavior=behavior, seed=seed, out=out, device="cpu", data=data, control=control)
        stages = console.Stages(0)
        make_vector(config, stages)
        stages.end()


def plan(behavior: str, adapter: str, seed: int, has_data: bool) -> dict[str, dict[str, Any]]:
    """What is compared in one run, by the parts of it that are kept in files of their own."""
    evals = ["preference", *(["sycophancy"] if load_behavior(behavior, MODEL).claims else [])]
    evals += ["statements"] if has_data else []
    parts = {"run": {"interventions": ("weight",), "evals": tuple(evals)}}
    if adapter == WITH_NULLS:
        parts["doses"] = {"interventions": ("weight",), "evals": ("preference",)}
    if adapter == WITH_NULLS and seed == 0:
        parts["base"] = {"interventions": ("prompt", "finetune"), "evals": tuple(evals)}
        parts["activation"] = {"interventions": ("activation",), "evals": tuple(evals)}
        one_sided = ("weight", "positive-only", "negative-only")
        parts["one_sided"] = {"interventions": one_sided, "evals": ("preference",), "n_draws": N_DRAWS}
        if has_data:
            parts["vignettes"] = {"interventions": ("weight",), "evals": ("tinymfv_airisk",), "limit": None}
    return parts


def measure(behavior: str, adapter: str, seed: int, out: Path, data: Path | None) -> None:
    """Make and compare one run, unless its files are there."""
    parts = plan(behavior, adapter, seed, data is not None)
    files = {part: KEPT / behavior / f"{adapter}_{seed}_{part}.json" for part in parts}
    missing = [part for part, file in files.items() if not file.exists()]
    if missing:
        make(behavior, adapter, seed, out)
    usual = {"n_prompts": N_PROMPTS, "n_draws": 0, "limit": N_ITEMS, "traits": TRAITS[behavior], "device": "cpu"}
    run = {"model": MODEL, "behavior": behavior, "adapters": (adapter,), "seeds": (seed,), "out": out}
    for part in missing:
        options = CompareOptions(**(usual | run | parts[part]), dataset=None if data is None else str(data))
        keep(files[part], doses(options) if part == "doses" else compare(options))


def doses(options: CompareOptions) -> dict[str, np.ndarray]:
    """The preference on every held-out question, by dose; that of the base at 0."""
    (run,) = opened_runs(options)
    chosen, evaluation = run.context.intervention(), asked_of(Preferences, run.context, options.split)
    calibration = run.calibrated(chosen)
    alphas = {0.0: 0.0} | {dose: calibration.alpha(dose) for dose in DOSES if calibration.side(dose).converged}
    scores = run.context.scores(evaluation, chosen, list(alphas.values()))
    return {f"{dose:g}": evaluation.headlines(scores[alpha])["preference"] for dose, alpha in alphas.items()}


def keep(file: Path, found: list[Cell] | dict[str, np.ndarray]) -> None:
    """Write what was measured, item by item."""
    write_text(file, msgspec.json.encode(found, enc_hook=_plain).decode() + "\n")


def read_kept(file: Path) -> list[Cell]:
    """What `keep` has written."""
    return msgspec.json.decode(file.read_bytes(), type=list[Cell], dec_hook=_array)


def _plain(value: Any) -> Any:
    """Arrays as lists, with the digits that a bootstrap can tell apart."""
    if isinstance(value, np.ndarray):
        return [float(f"{x:.6g}") for x in value.tolist()]
    raise NotImplementedError(type(value))


def kept(behavior: str, part: str) -> list[Cell]:
    """What all runs of a behaviour gave, by family and seed."""
    files = sorted((KEPT / behavior).glob(f"*_{part}.json"))
    cells = [c for file in files for c in read_kept(file)]
    families = list(FAMILIES)
    return sorted(cells, key=lambda c: (families.index(c.adapter) if c.adapter in families else len(families), c.seed))


def _array(kind: Any, value: Any) -> Any:
    return np.asarray(value)


def tables(behavior: str) -> list[dict[str, Any]]:
    """The rows of one behaviour over all that is kept of it, written to `docs/results`."""
    rows = list[dict[str, Any]]()
    key, effect = {"behavior": behavior}, load_behavior(behavior, MODEL).effect
    for parts in (("run", "base", "activation"), ("one_sided",), ("vignettes",)):
        groups = Group.of([cell for part in parts for cell in kept(behavior, part)])
        if not groups:
            continue
        found = group_rows(key | {"compared": parts[0]}, groups, effect)
        rows += found
        if pairs := comparison_rows(key, groups, effect):
            write_csv(DOCS / f"smollm2_{behavior}_{parts[0]}_pairs.csv", pairs)
    if rows:
        write_csv(DOCS / f"smollm2_{behavior}.csv", rows)
    return rows


def dose_rows(behavior: str) -> list[dict[str, Any]]:
    """How far the preference has moved at every dose that all kept seeds have."""
    files = sorted((KEPT / behavior).glob(f"{WITH_NULLS}_*_doses.json"))
    runs = [msgspec.json.decode(file.read_bytes(), type=dict[str, list[float]]) for file in files]
    rows = []
    for dose in (f"{dose:g}" for dose in DOSES):
        if runs and all(dose in run for run in runs):
            moved = estimate_over_seeds(np.array([np.subtract(run[dose], run["0"]) for run in runs]))
            key = {"behavior": behavior, "adapter": WITH_NULLS, "dose": dose}
            rows.append(key | moved.columns("shift", "ci_lo", "ci_hi") | {"n": moved.n, "n_seeds": len(runs)})
    return rows


def render(rows: Sequence[Row]) -> str:
    """The page's table of one behaviour, in Markdown; what stands beside the vectors has one seed."""
    groups = dict.fromkeys((r["compared"], r["intervention"], r["adapter"]) for r in rows)
    shown = [g for g in groups if g[0] == "run" or (g[0] == "one_sided" and g[1] != WEIGHT)]
    scores = [s for s in ("preference", "false_claims", "statements") if any(r["score"] == s for r in rows)]
    names = [s.replace("_", " ") + (" (mass)" if s != "preference" else "") for s in scores]
    header = ["", "seeds", "nats at -1u, +1u", *names, "neutral text", "valid at -1u, +1u"]
    lines = [_line([r for r in rows if (r["compared"], r["intervention"], r["adapter"]) == g], scores) for g in shown]
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def _line(rows: Sequence[Row], scores: Sequence[str]) -> list[str]:
    """One vector, or what stands beside it."""
    first, of = rows[0], {(r["score"], r["part"]): r for r in rows}
    valid = [of.get(("valid", side)) for side in ("-1u", "+1u")]
    costs = [float(of["nll", side]["shift"]) for side in ("-1u", "+1u") if ("nll", side) in of]
    return [
        label(first) + ("" if str(first["matched"]) == "True" else " †"),
        str(first["n_seeds"]),
        nats_text(first),
        *(_span(of[s, "span"]) if (s, "span") in of else "" for s in scores),
        f"{max(costs):+.2f}" if costs else "",
        ", ".join("" if r is None else f"{float(r['base']) + float(r['shift']):.0%}" for r in valid),
    ]


def _span(row: Row) -> str:
    """With its mark and, where a score has one, the lowest mean answer mass."""
    mark = star(float(row["shift"]), float(row["p_holm"]), headline(row["score"]).floor, row[FLAG] or None)
    mass = "" if row["mass"] in (None, "") else f" ({float(row['mass']):.2f})"
    return estimate_text(row, "shift") + mark + mass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--behaviors", nargs="+", default=list(BEHAVIORS), choices=BEHAVIORS)
    parser.add_argument("--adapters", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/smollm2"))
    parser.add_argument("--tables", action="store_true")
    o = parser.parse_args()
    if not o.tables:
        data = data_folder(o.out)
        for seed, behavior, adapter in product(o.seeds, o.behaviors, o.adapters):
            measure(behavior, adapter, seed, o.out, data)
    by_behavior = {behavior: tables(behavior) for behavior in o.behaviors}
    by_dose = [row for behavior in BEHAVIORS for row in dose_rows(behavior)]
    if by_dose:
        write_csv(DOCS / "smollm2_doses.csv", by_dose)
    harness.record("smollm2", {"rows": by_behavior, "doses": by_dose})


if __name__ == "__main__":
    main()
