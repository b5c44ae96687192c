"""Does it work on a real model? SmolLM2-135M-Instruct, behaviours that it acts and honesty, six families, three seeds.

`uv run python -m benchmarks.smollm2` trains every behaviour with every family and seed and the two nulls of each, reads
what is held out of it at alpha -1, 0 and 1 (preference, claims where it brings them; with the real data at hand also
statements, and tiny-mfv for the first seed, because its prompts are long), and compares at the same divergence with
prompts, fine-tunes and added activations, and for `lora` with one-sided and with random vectors. `--behaviors`,
`--adapters` and `--seeds` do a part; everything resumes, and what is done already takes part in the tables. Writes
`docs/results/smollm2_<behavior>.csv` (the pooled sweep), `..._tinymfv.csv`, `..._compare.csv` and `..._one_sided.csv`
beside it, and `benchmarks/results/smollm2.json`.

The folder of real data is that of the environment variable WS_REAL_DATA, as for the tests: `tiny-mfv/` and
`anthropic-evals/persona/` in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from ws.adapters import FAMILIES
from ws.analysis.compare import main as compare
from ws.analysis.sweep_tables import POOLED, render
from ws.behaviors import load_behavior
from ws.errors import WsError
from ws.eval import tinymfv_airisk
from ws.files.runs import read_csv, run_folder, write_csv
from ws.options.make import SweepConfig
from ws.options.measure import CompareOptions, TinymfvOptions
from ws.run_sweep import failures, run_sweep

MODEL = "smollm2"
BEHAVIORS = ("truthfulness", "honesty", "agreement", "tone")
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
# Of a comparison: questions that strengths are solved for, random vectors a run of `lora` (with fewer p cannot reach
# 0.05; they are most of the work where every family has them), and held-out questions, drawn evenly over their kinds.
N_PROMPTS, N_DRAWS, N_QUESTIONS = 16, 19, 44
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


def sweep(behavior: str, adapters: Sequence[str], seeds: Sequence[int], out: Path, data: Path | None) -> SweepConfig:
    """The sweep of one behaviour: its own held-out items, and the published sets where their tables are at hand."""
    brought = load_behavior(behavior, MODEL)
    evals = ["preference"]
    if brought.claims is not None:
        evals.insert(0, "sycophancy")
    if data is not None:
        evals.append("statements")
    start = SweepConfig.preset(MODEL)
    return replace(
        start,
        behavior=behavior,
        adapters=tuple(adapters),
        seeds=tuple(seeds),
        evals=tuple(evals),
        traits=TRAITS[behavior],
        controls=("shuffled", "same-side"),
        dataset=None if data is None else str(data),
        data=replace(start.data, anyway=True, keep_truncated=True),  # a null result is a result, and is printed
        out=out,
        device="cpu",
    )


def vignettes(config: SweepConfig) -> list[dict[str, str]]:
    """The summary rows of tiny-mfv of every family's first seed."""
    rows = list[dict[str, str]]()
    for adapter in config.adapters:
        seed = config.seeds[0]
        shared = {"model": MODEL, "behavior": config.behavior, "adapter": adapter, "seed": seed, "out": config.out}
        tinymfv_airisk.main(TinymfvOptions(**shared, alphas=(-1.0, 0.0, 1.0), dataset=config.dataset, device="cpu"))
        rows += read_csv(run_folder(config.out, config.behavior, adapter, seed) / "tinymfv_airisk_summary.csv")
    return rows


def at_equal_cost(config: SweepConfig, name: str, n_draws: int, interventions: Sequence[str]) -> None:
    """`ws compare` on the preference, kept as `docs/results/smollm2_<behavior>_<name>.csv`."""
    compare(
        CompareOptions(
            model=MODEL,
            behavior=config.behavior,
            adapters=config.adapters,
            seeds=config.seeds,
            out=config.out,
            interventions=tuple(interventions),
            evals=("preference",),
            n_prompts=N_PROMPTS,
            n_draws=n_draws,
            limit=N_QUESTIONS,
            device="cpu",
        )
    )
    rows = read_csv(config.out / config.behavior / "compare.csv")
    write_csv(DOCS / f"smollm2_{config.behavior}_{name}.csv", rows)


def one_behavior(config: SweepConfig) -> list[dict[str, Any]]:
    """Everything of one behaviour; the rows of its pooled sweep."""
    cells = run_sweep(config)
    if found := failures(cells):
        raise WsError(found)
    rows = read_csv(config.out / config.behavior / POOLED)
    print(render(rows))
    write_csv(DOCS / f"smollm2_{config.behavior}.csv", rows)
    if config.dataset is not None:
        write_csv(DOCS / f"smollm2_{config.behavior}_tinymfv.csv", vignettes(config))
    at_equal_cost(config, "compare", 0, ("weight", "finetune", "prompt", "activation"))
    if "lora" in config.adapters:
        lora = replace(config, adapters=("lora",))
        at_equal_cost(lora, "one_sided", N_DRAWS, ("weight", "positive-only", "negative-only"))
    return [dict(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--behaviors", nargs="+", default=list(BEHAVIORS), choices=BEHAVIORS)
    parser.add_argument("--adapters", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/smollm2"))
    o = parser.parse_args()
    data, rows = data_folder(o.out), {}
    for behavior in o.behaviors:
        rows[behavior] = one_behavior(sweep(behavior, o.adapters, o.seeds, o.out, data))
    harness.record("smollm2", {"adapters": o.adapters, "seeds": o.seeds, "rows": rows})


if __name__ == "__main__":
    main()
