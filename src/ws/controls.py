"""Control vectors: what a direction without meaning does at the same size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ws.delta import LinearDelta
from ws.diff import SteeringVector
from ws.models import weight_of


def random_like(vector: SteeringVector, model: nn.Module, seed: int) -> SteeringVector:
    """A random vector with the coordinates of `vector` and, module by module, its Frobenius norms.

    Every coordinate is Gaussian (rotations skew-symmetric, as small rotations are) and scaled so that its own part of
    `Delta(W)` has the norm of the original's part; the whole is then scaled to the module's norm.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = {name: weight_of(module) for name, _, module in vector.matched(model)}
    deltas = {name: _random_delta(delta, weights[name], rng) for name, delta in vector.deltas.items()}
    recipe = {"op": "random_like", "seed": seed, "of": vector.recipe}
    return replace(vector, deltas=deltas, recipe=recipe)


def _random_delta(delta: LinearDelta, weight: Tensor, rng: torch.Generator) -> LinearDelta:
    total = LinearDelta(delta.d_out, delta.d_in)
    for names in (("g",), ("c",), ("d",), ("u", "v"), ("e",), ("bias",)):
        parts = {n: t for n, t in delta.coordinates().items() if n in names}
        if not parts:
            continue
        noise = {n: torch.randn(t.shape, generator=rng) for n, t in parts.items()}
        if "d" in noise:
            noise["d"] = noise["d"] - noise["d"].mT
        size = LinearDelta(delta.d_out, delta.d_in, **parts).norm(weight)
        drawn = LinearDelta(delta.d_out, delta.d_in, **noise)
        total = total + drawn * (size / drawn.norm(weight))
    size = total.norm(weight)
    return total * (delta.norm(weight) / size) if size else total
