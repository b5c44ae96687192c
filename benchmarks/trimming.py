"""What carries a vector's effect? Honesty with LoRA on the bundled model, three seeds, against norm-matched controls.

`uv run python -m benchmarks.trimming` reads the `dev` claims (the curves are exploratory; nothing is chosen on them) at
alpha -1 and +1 with trimmed vectors. The effect is the change of the mean log ratio on false claims between the two.

That the first k singular directions of a rank-r vector do what the vector does is hardly a finding when they hold most
of its norm, so every trimmed vector is scaled back, module by module, to the norm of the whole one and compared with
equally large vectors: the last k directions, k random ones of the vector's own, and k random ones of nobody's. A set of
layers is compared with every other set of equally many layers, at its own norm and at the whole vector's, and with
random vectors in the same layers.

Writes `benchmarks/results/trimming.json` and `docs/results/trimming.{csv,svg}`. Every reading is kept and resumes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm.auto import tqdm

import ws
from benchmarks import harness
from ws.analysis.controls import draw_seed, random_like
from ws.analysis.trim import scale_depth
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.files.runs import run_folder, write_csv, write_json
from ws.options.make import ReplicateConfig
from ws.replicate import replicate
from ws.stats import estimate_over_seeds

RANKS = (1, 2, 4, 8)
DEPTHS = ((0.5, 1.5), (1.5, 0.5))
WHOLE = "whole"
DOCS = Path(__file__).parents[1] / "docs" / "results"
Conditions = Iterator[tuple[dict[str, Any], ws.SteeringVector]]


# ---- trimmed vectors and their controls -----------------------------------------------------------------------------


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def singular_factors(vector: ws.SteeringVector) -> Factors:
    """Per module, the singular directions of its low-rank part, strongest first: `U S [d_out, r]` and `V [r, d_in]`."""
    found = {}
    for name, delta in vector.deltas.items():
        assert delta.u is not None
        assert delta.v is not None
        left, s, right = torch.linalg.svd(delta.u.double() @ delta.v.double(), full_matrices=False)
        found[name] = (left * s)[:, : delta.rank].float(), right[: delta.rank].float()
    return found


def pick(vector: ws.SteeringVector, factors: Factors, chosen: Sequence[int]) -> ws.SteeringVector:
    """The vector with the chosen singular directions of every module; negative numbers count from the weakest."""
    deltas = {
        name: LinearDelta(d.d_out, d.d_in, u=factors[name][0][:, chosen], v=factors[name][1][chosen].contiguous())
        for name, d in vector.deltas.items()
    }
    return replace(vector, deltas=deltas)


def rescaled(vector: ws.SteeringVector, like: ws.SteeringVector) -> ws.SteeringVector:
    """Every module scaled to the norm that it has in `like`."""
    deltas = {name: d * (like.deltas[name].norm() / d.norm()) for name, d in vector.deltas.items()}
    return replace(vector, deltas=deltas)


def rank_conditions(vector: ws.SteeringVector, model: Any, seed: int, draws: int) -> Conditions:
    """Every rank with its controls."""
    factors = singular_factors(vector)
    for k in RANKS:
        top = pick(vector, factors, list(range(k)))
        yield {"kind": "top, as it is", "rank": k}, top
        yield {"kind": "top", "rank": k}, rescaled(top, vector)
        yield {"kind": "bottom", "rank": k}, rescaled(pick(vector, factors, list(range(-k, 0))), vector)
        for draw in range(draws):
            chosen = np.random.default_rng([seed, draw]).permutation(vector.max_rank)[:k].tolist()
            yield {"kind": "random of its own", "rank": k}, rescaled(pick(vector, factors, chosen), vector)
            noise = random_like(top, model, draw_seed(seed, draw))
            yield {"kind": "random", "rank": k}, rescaled(noise, vector)
    yield {"kind": WHOLE, "rank": vector.max_rank}, vector


def layer_conditions(vector: ws.SteeringVector, model: Any, seed: int, draws: int) -> Conditions:
    """Every set of layers as it is and at the whole vector's norm, and random vectors in the same layers."""
    depth, whole = int(vector.info["depth"]), vector.norm()
    for count in range(1, depth + 1):
        for layers in combinations(range(depth), count):
            part, label = vector.select(layers=layers), {"layers": ",".join(map(str, layers))}
            factor = whole / part.norm()
            yield label | {"kind": "layers, as they are"}, part
            yield label | {"kind": "layers"}, part * factor
            for draw in range(draws):
                yield label | {"kind": "layers, random"}, random_like(part, model, draw_seed(seed, draw)) * factor
    for first, last in DEPTHS:
        scaled = scale_depth(vector, first, last)
        yield {"kind": "depth", "depth_scale": f"{first:g} to {last:g}"}, scaled * (whole / scaled.norm())


# ---- readings -------------------------------------------------------------------------------------------------------


class Readings:
    """Log ratios of the false claims between alpha -1 and +1, kept on disk per vector."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.model, self.tok = ws.load_model("pocket", device="cpu")
        self.behavior = ws.load_behavior("honesty", "pocket")

    def span(self, vector: ws.SteeringVector) -> tuple[np.ndarray, float]:
        """The change claim by claim, and the lowest mean answer mass."""
        file = self.folder / f"{self.split}-{vector_digest(vector)[:16]}.json"
        if not file.is_file():
            with ws.steer(self.model, vector, -1.0) as dial:
                low = ws.evaluate_sycophancy(self.model, self.tok, self.behavior, self.split)
                dial.alpha = 1.0
                high = ws.evaluate_sycophancy(self.model, self.tok, self.behavior, self.split)
            mass = min(float(s.pmass.mean()) for s in (low, high))
            write_json(file, {"span": (high.logratio - low.logratio).tolist(), "mass": mass})
        found = json.loads(file.read_text(encoding="utf-8"))
        return np.array(found["span"]), found["mass"]


def load_vector(seed: int, out: Path) -> ws.SteeringVector:
    """The honesty vector of a seed, trained when it is not there."""
    folder = run_folder(out, "honesty", "lora", seed) / "vector"
    if not folder.is_dir():
        replicate(replace(ReplicateConfig.preset("pocket", "lora"), seed=seed, out=out))
    return ws.SteeringVector.load(folder)


def measure(seeds: Sequence[int], out: Path, split: str, draws: int) -> list[dict[str, Any]]:
    """One entry per seed and condition: labels, norm and energy of the vector, its span by claim."""
    readings, found = Readings(out / "readings", split), []
    for seed in seeds:
        vector = load_vector(seed, out)
        conditions = [
            *rank_conditions(vector, readings.model, seed, draws),
            *layer_conditions(vector, readings.model, seed, draws),
        ]
        for label, made in tqdm(conditions, desc=f"seed {seed}", unit="vector"):
            span, mass = readings.span(made)
            found.append(
                {"seed": seed, "label": label, "span": span, "mass": mass, "norm": made.norm() / vector.norm()}
            )
    return found


def summarise(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per condition, pooled over seeds and, for random ones, over draws within a seed."""
    whole = float(np.mean([e["span"] for e in found if e["label"]["kind"] == WHOLE]))
    labels = [e["label"] for e in found]
    return [
        _row([e for e in found if e["label"] == label], whole)
        for i, label in enumerate(labels)
        if label not in labels[:i]
    ]


def _row(entries: Sequence[dict[str, Any]], whole: float) -> dict[str, Any]:
    label, seeds = entries[0]["label"], sorted({e["seed"] for e in entries})
    means = [np.mean([e["span"] for e in entries if e["seed"] == seed], axis=0) for seed in seeds]
    span, single = estimate_over_seeds(np.stack(means)), [float(e["span"].mean()) for e in entries]
    return {
        **{name: label.get(name) for name in ("kind", "rank", "layers", "depth_scale")},
        **span.columns("span", "ci_lo", "ci_hi"),
        "share_of_whole": span.mean / whole,
        "least": min(single),
        "most": max(single),
        "norm_share": float(np.mean([e["norm"] for e in entries])),
        "lowest_mean_pmass": min(e["mass"] for e in entries),
        "n_seeds": len(seeds),
        "n_vectors": len(entries),
        "n_claims": span.n,
    }


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Three tables in Markdown: ranks, sets of layers, depth scaling."""
    form = {"tablefmt": "github", "disable_numparse": True}
    kinds = ("top, as it is", "top", "bottom", "random of its own", "random")
    ranks = [[k, *(_cell(rows, kind=kind, rank=k) for kind in kinds)] for k in RANKS]
    ranks += [[f"{r['rank']} (whole)", _span(r)] for r in rows if r["kind"] == WHOLE]
    sets = [r["layers"] for r in rows if r["kind"] == "layers"]
    kinds = ("layers, as they are", "layers", "layers, random")
    layers = [[s, *(_cell(rows, kind=kind, layers=s) for kind in kinds)] for s in sets]
    depths = [[r["depth_scale"], _span(r)] for r in rows if r["kind"] == "depth"]
    return "\n\n".join(
        [
            tabulate(ranks, ["rank", "top k, as it is", "top k", "bottom k", "random k of its own", "random"], **form),
            tabulate(layers, ["layers", "as they are", "at the whole norm", "random, same size"], **form),
            tabulate(depths, ["factors of the first and the last layer", "span"], **form),
        ]
    )


def _cell(rows: Sequence[dict[str, Any]], **wanted: Any) -> str:
    found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
    return _span(found[0]) if found else ""


def _span(row: dict[str, Any]) -> str:
    mark = " !" if row["lowest_mean_pmass"] < 0.9 else ""
    return f"{row['span']:+.2f} [{row['span_ci_lo']:+.2f}, {row['span_ci_hi']:+.2f}]{mark}"


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Effect against rank and against sets of layers; the same rows give the same file."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "trimming", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), width_ratios=(3, 4), layout="constrained")
        _plot_ranks(left, rows)
        _plot_layers(right, rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _plot_ranks(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    styles = {
        "top, as it is": ("top k, as it is", "C0", "--"),
        "top": ("top k", "C0", "-"),
        "bottom": ("bottom k", "C1", "-"),
        "random of its own": ("random k of its own", "C2", "-"),
        "random": ("random", "C7", "-"),
    }
    (whole,) = (r for r in rows if r["kind"] == WHOLE)
    for kind, (label, colour, style) in styles.items():
        mine = [r for r in rows if r["kind"] == kind]
        if kind != "random":
            mine.append(whole)
        _errorbars(axes, [math.log2(r["rank"]) for r in mine], mine, label, colour, style)
    ranks = [*RANKS, whole["rank"]]
    axes.set_xticks([math.log2(k) for k in ranks], [*map(str, RANKS), f"{whole['rank']} (whole)"])
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("singular directions per module")
    axes.set_ylabel("span on false claims (nats)")
    _legend(axes, "rank (scaled to the whole norm unless said)")


def _plot_layers(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    styles = {
        "layers, as they are": ("as they are", "C0", "o"),
        "layers": ("scaled to the whole norm", "C3", "s"),
        "layers, random": ("random, scaled to the whole norm", "C7", "x"),
    }
    sets = [r["layers"] for r in rows if r["kind"] == "layers"]
    for number, (kind, (label, colour, marker)) in enumerate(styles.items()):
        mine = [next(r for r in rows if r["kind"] == kind and r["layers"] == s) for s in sets]
        _errorbars(axes, [i + 0.2 * (number - 1) for i in range(len(sets))], mine, label, colour, "none", marker)
    for i in range(1, len(sets)):
        if sets[i].count(",") != sets[i - 1].count(","):
            axes.axvline(i - 0.5, color="0.85", linewidth=0.8)
    axes.set_xticks(range(len(sets)), [s.replace(",", "\n") for s in sets], fontsize=8)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xlabel("decoder layers that are kept")
    _legend(axes, "sets of layers")


def _legend(axes: Any, title: str) -> None:
    axes.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)


def _errorbars(
    axes: Any, x: Sequence[float], rows: Sequence[dict], label: str, colour: str, style: str, marker: str = "o"
) -> None:
    y = np.array([r["span"] for r in rows])
    ends = np.array([[r["span"] - r["span_ci_lo"], r["span_ci_hi"] - r["span"]] for r in rows]).T.clip(min=0)
    options = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
    axes.errorbar(x, y, yerr=ends, label=label, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="dev")
    parser.add_argument("--draws", type=int, default=3, help="random vectors per seed and condition")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/trimming"))
    parser.add_argument("--dry", action="store_true", help="print, but write no result files")
    o = parser.parse_args()
    rows = summarise(measure(o.seeds, o.out, o.split, o.draws))
    print(render(rows))
    if not o.dry:
        harness.record("trimming", {"split": o.split, "seeds": o.seeds, "draws": o.draws, "rows": rows})
        write_csv(DOCS / "trimming.csv", rows)
        plot(rows, DOCS / "trimming.svg")


if __name__ == "__main__":
    main()
