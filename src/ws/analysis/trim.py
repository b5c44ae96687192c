"""Trimming: a vector with fewer layers, module kinds or columns, or with a strength that changes with depth.

`ws trim --layers 0.3:0.8 --rank 4` makes a new vector from a finished run's, files it as a run of its own
that every evaluation takes by `--adapter`, and says how far it is from the original. The steps come in this order:

- `--layers`, `--modules`: only these (`SteeringVector.select`);
- `--depth-scale FIRST LAST`: layer by layer more or less (`scale_depth`);
- `--rank` or `--energy`: the best approximation of the low-rank parts (`SteeringVector.compress`).

What stays of a vector's *effect* is another question than what stays of its size; see `benchmarks.trimming`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tabulate import tabulate
from torch import Tensor

from ws import console
from ws.analysis.compose import save_run
from ws.behaviors import behavior_name
from ws.delta import LinearDelta
from ws.diff import SteeringVector, vector_digest
from ws.errors import WsError
from ws.files.runs import write_csv
from ws.lm.models import layer_of, weight_of
from ws.options.make import TrimOptions as TrimOptions
from ws.options.shared import RunOptions, shared_with
from ws.run import FinishedRun, measure_with, open_run

TABLE = "trimming.csv"
_SHOWN = 5


def scale_depth(vector: SteeringVector, first: float | int, last: float | int) -> SteeringVector:
    """Multiply the change of decoder layer `l` of `L` by `first + (last - first) l / (L - 1)`, with `l` from 0.

    The linear layer scaling of LiNeS (Wang et al. 2024, arXiv 2410.17146) for steering vectors: its
    `lambda_l = alpha + beta (l - 1) / (L - 1)`, `l` from 1, has `alpha = first` and `beta = last - first`. `L` is the
    base's depth where the vector knows it, else that of the deepest layer it changes. Modules outside the decoder
    layers stay as they are, and a single layer is multiplied by `first`.
    """
    if not (math.isfinite(first) and math.isfinite(last)):
        raise WsError(f"The factors of the first and the last layer must be finite, not {first} and {last}.")
    deltas, scaled = dict[str, LinearDelta](), dict[tuple[int, float], LinearDelta]()
    for name, delta in vector.deltas.items():
        layer = layer_of(name)
        factor = 1.0 if layer is None else first + (last - first) * layer / max(vector.depth - 1, 1)
        # One change stays one where modules share it.
        deltas[name] = scaled[id(delta), factor] = scaled.get((id(delta), factor)) or delta * factor
    recipe = {"op": "scale_depth", "first": float(first), "last": float(last), "of": vector.recipe}
    return replace(vector, deltas=deltas, recipe=recipe)


# ---- what a trim loses ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleLoss:
    """How far one module's change is from the original.

    Attributes:
        module: its name.
        rank_before, rank: columns of the low-rank part; both 0 where there is none.
        size: Frobenius norm of the original change.
        lost: Frobenius norm of the difference; equal to `size` for a module that was dropped.
    """

    module: str
    rank_before: int
    rank: int
    size: float
    lost: float

    @property
    def error(self) -> float:
        """`lost / size`, 0 for a module that changed nothing."""
        return self.lost / self.size if self.size else 0.0


def losses(before: SteeringVector, after: SteeringVector, weights: Mapping[str, Tensor]) -> list[ModuleLoss]:
    """Every module's loss, the original's order; `weights` are needed for modules that are not purely low-rank.

    Modules that share one change (tied weights), before and after, have one loss, by the first one's name.
    """
    modules, pairs = [], dict[tuple[int, int], str]()
    for name, delta in before.deltas.items():
        pairs.setdefault((id(delta), id(after.deltas.get(name))), name)
    for name in pairs.values():
        delta = before.deltas[name]
        weight, left = weights.get(name), after.deltas.get(name, delta.holding({}))
        lost = (delta - left).norm(weight)
        modules.append(ModuleLoss(name, delta.rank, left.rank, delta.norm(weight), lost))
    return modules


def total_error(modules: list[ModuleLoss]) -> float:
    """The relative Frobenius error over the whole vector, dropped modules included."""
    size = math.hypot(*(m.size for m in modules))
    return math.hypot(*(m.lost for m in modules)) / size if size else 0.0


# ---- the command ----------------------------------------------------------------------------------------------------


def trim(vector: SteeringVector, options: TrimOptions) -> SteeringVector:
    """Select, scale and compress, as far as the options ask for it.

    Raises:
        WsError: nothing is left, numbers out of range, or no low-rank part to compress.
    """
    o = options
    if o.layers is not None or o.modules:
        vector = vector.select(layers=o.layers, modules=o.modules or None)
    if o.depth_scale is not None:
        vector = scale_depth(vector, *o.depth_scale)
    if o.rank is not None or o.energy is not None:
        vector = vector.compress(rank=o.rank, energy=o.energy)
    if vector.is_zero:
        raise WsError("Nothing is left of the vector: every module that was kept is scaled to zero.")
    return vector


def render(modules: list[ModuleLoss], before: SteeringVector, after: SteeringVector) -> str:
    """The kept modules that lose most, and the total in one sentence."""
    remaining = sorted((m for m in modules if m.module in after.deltas), key=lambda m: -m.error)
    cells = [[m.module, m.rank_before, m.rank, f"{m.size:.4g}", f"{m.error:.4f}"] for m in remaining[:_SHOWN]]
    table = tabulate(cells, ["module", "rank", "new rank", "norm", "relative error"], disable_numparse=True)
    more = f"\n... and {len(remaining) - _SHOWN} modules that lose no more" if len(remaining) > _SHOWN else ""
    n_dropped = len(before.deltas) - len(after.deltas)
    dropped = f"\n{n_dropped} modules are left out" if n_dropped else ""
    share = after.numbers / before.numbers
    return (
        f"{table}{more}{dropped}\n\nThe trimmed vector differs from the original by {total_error(modules):.4f} of its "
        f"Frobenius norm and stores {after.numbers:,} numbers instead of {before.numbers:,} ({share:.0%})."
    )


def main(options: TrimOptions) -> None:
    """The command `ws trim`."""
    o = options
    o.check()
    opened = open_run(o.out, o.behavior, o.adapter, o.seed, o.model, "cpu")
    trimmed = trim(opened.vector, o)
    modules = losses(opened.vector, trimmed, _weights(opened))
    behavior = behavior_name(o.behavior)
    inputs = {"vector": vector_digest(opened.vector)}
    config = o.settings | {"adapter": o.adapter}
    run = save_run(trimmed, (o.out, behavior, o.name, o.seed), "trim", config, inputs, o.fresh)
    key = {"behavior": behavior, "adapter": o.name, "seed": o.seed}
    rows = [key | vars(m) | {"error": m.error} for m in modules]
    table = write_csv(run.folder / TABLE, rows)
    following = measure_with(shared_with(RunOptions, o, adapter=o.name))
    data = {"total_error": total_error(modules), "modules": rows}
    files = [run.folder / "vector", table]
    console.show(console.Result(render(modules, opened.vector, trimmed), data, files, following))


def _weights(opened: FinishedRun) -> dict[str, Tensor]:
    return {name: weight_of(module) for name, _, module in opened.vector.matched(opened.model)}


if __name__ == "__main__":
    console.run(main, TrimOptions, "ws trim")
