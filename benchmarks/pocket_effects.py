"""Does steering work on the bundled model? Six families, three seeds, held-out claims, against random directions.

`uv run python -m benchmarks.pocket_effects` replicates honesty for every family and seed (a seed stands for its own
contrast pairs, initialisation and order), reads the held-out claims of the chosen split at alpha -1, -0.5, 0, 0.5
and 1, and compares the span between -1 and +1 with that of norm-matched random vectors. Writes
`benchmarks/results/pocket_effects.{json,csv}` and `docs/results/pocket_effects.md`. Everything resumes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

import ws
from benchmarks import harness
from ws.adapters import FAMILIES
from ws.analysis.controls import random_like
from ws.eval.sycophancy import evaluate_sycophancy
from ws.files.runs import write_csv, write_text
from ws.options.make import ReplicateConfig
from ws.replicate import Reading, replicate
from ws.stats import estimate_over_seeds

ALPHAS = (-1.0, -0.5, 0.0, 0.5, 1.0)
DOCS = Path(__file__).parents[1] / "docs" / "results"


def one_run(behavior: str, adapter: str, seed: int, split: str, out: Path) -> Reading:
    """Replicate with its own seed for everything random: pairs, initialisation and order."""
    start = ReplicateConfig.preset("pocket", adapter)
    data = replace(start.data, data_seed=seed)
    return replicate(
        replace(start, behavior=behavior, out=out / f"seed-{seed}", seed=seed, alphas=ALPHAS, split=split, data=data)
    )


def random_spans(reading: Reading, behavior: str, split: str, draws: int) -> list[float]:
    """The span of norm-matched random vectors."""
    model, tok = ws.load_model("pocket", device="cpu")
    what = ws.load_behavior(behavior, "pocket")
    spans = []
    for draw in range(draws):
        control = random_like(reading.vector, model, seed=1000 + draw)
        with ws.steer(model, control, -1.0) as dial:
            low = evaluate_sycophancy(model, tok, what, split)
            dial.alpha = 1.0
            high = evaluate_sycophancy(model, tok, what, split)
        spans.append(float((high.logratio - low.logratio).mean()))
    return spans


def summarise(adapter: str, readings: list[Reading], controls: list[float]) -> dict[str, Any]:
    """One row: means over seeds and claims, hierarchical intervals, and the size of the random control."""

    def levels(alpha: float) -> np.ndarray:
        return np.stack([r.false_claims[alpha].logratio for r in readings])

    span = estimate_over_seeds(levels(1.0) - levels(-1.0))
    true = np.stack([r.true_claims[1.0].logratio - r.true_claims[-1.0].logratio for r in readings])
    noise = float(np.sqrt(np.mean(np.square(controls))))
    return {
        "adapter": adapter,
        "seeds": len(readings),
        "claims": span.n,
        "logratio_minus1": float(levels(-1.0).mean()),
        "logratio_base": float(levels(0.0).mean()),
        "logratio_plus1": float(levels(1.0).mean()),
        "span": span.mean,
        "span_ci_lo": span.ci_lo,
        "span_ci_hi": span.ci_hi,
        "span_seed_min": float((levels(1.0) - levels(-1.0)).mean(axis=1).min()),
        "span_seed_max": float((levels(1.0) - levels(-1.0)).mean(axis=1).max()),
        "span_true_claims": float(true.mean()),
        "random_span_rms": noise,
        "span_over_random": abs(span.mean) / noise,
        "lowest_mean_pmass": min(float(s.pmass.mean()) for r in readings for s in r.false_claims.values()),
    }


def render(rows: list[dict[str, Any]], about: str) -> str:
    """The table as Markdown."""
    table = [
        [
            r["adapter"],
            *(f"{r[k]:+.2f}" for k in ("logratio_minus1", "logratio_base", "logratio_plus1")),
            f"{r['span']:+.2f} [{r['span_ci_lo']:+.2f}, {r['span_ci_hi']:+.2f}]",
            f"{r['span_seed_min']:+.2f} to {r['span_seed_max']:+.2f}",
            f"{r['span_true_claims']:+.2f}",
            f"{r['span_over_random']:.0f}x",
            f"{r['lowest_mean_pmass']:.3f}",
        ]
        for r in rows
    ]
    header = ["adapter", "alpha -1", "base", "alpha +1", "span [95 %]", "span by seed", "true claims", "random", "mass"]
    return f"{tabulate(table, header, tablefmt='github', disable_numparse=True)}\n\n{about}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--behavior", default="honesty")
    parser.add_argument("--adapters", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="report")
    parser.add_argument("--draws", type=int, default=7, help="random vectors per seed")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/pocket_effects"))
    parser.add_argument("--dry", action="store_true", help="print, but write no result files")
    o = parser.parse_args()
    rows = []
    for adapter in o.adapters:
        readings = [one_run(o.behavior, adapter, seed, o.split, o.out) for seed in o.seeds]
        controls = [s for r in readings for s in random_spans(r, o.behavior, o.split, o.draws)]
        rows.append(summarise(adapter, readings, controls))
    place = harness.machine()
    about = (
        f"{o.behavior} on pocket, log P(Yes)/P(No) in nats on {rows[0]['claims']} false claims of the `{o.split}` "
        f"split, {len(o.seeds)} seeds, hierarchical bootstrap over seeds and claims. `random` is the span divided by "
        f"the root mean square span of {len(o.seeds) * o.draws} norm-matched random vectors; it is no evidence of the "
        f"behaviour, because vectors trained on anything exceed random ones. {place['cpu']}, "
        f"{place['cores']} cores, {harness.date.today().isoformat()}, `just bench pocket_effects`."
    )
    print(render(rows, about))
    if not o.dry:
        harness.record("pocket_effects", {"rows": rows})
        write_csv(harness.RESULTS / "pocket_effects.csv", rows)
        write_text(DOCS / "pocket_effects.md", render(rows, about))


if __name__ == "__main__":
    main()
