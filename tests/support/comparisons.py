"""Cells of a comparison with planted spans."""

from __future__ import annotations

import numpy as np

from ws.analysis.compare_tables import Cell

KEY = {"behavior": "honesty"}
N_BOOT = 400


def claims(rng, effect, n=60, noise=1.0, shared=0.0):
    """Scores by sign of `n` items whose expected span is `effect`, from -1u to +1u."""
    base = rng.normal(size=n)
    lean = shared * rng.normal(size=n)
    return {s: base + s * effect / 2 + abs(s) * lean + (noise if s else 0.0) * rng.normal(size=n) for s in (-1, 0, 1)}


def cell(rng, name="weight", adapter="lora", seed=0, false=-4.0, true=3.0, wrongness=0.5, **more):
    """A cell with planted spans."""
    scores = {
        "false_claims": claims(rng, false),
        "true_claims": claims(rng, true, n=30),
        "wrongness": claims(rng, wrongness, noise=0.05),
        "nll": {-1: np.full(8, 2.1), 0: np.full(8, 2.0), 1: np.full(8, 2.3)},
    }
    plain = {"alphas": {-1: -1.5, 1: 2.0}, "divergence": {-1: 0.9, 1: 1.1}, "matched": True}
    return Cell(name, adapter, seed, scores=scores, **(plain | more))


def nulls_of(rng, size=0.0):
    sizes = {"false_claims": 60, "true_claims": 30}
    return {null: {s: claims(rng, size, n) for s, n in sizes.items()} for null in ("shuffled", "same-side")}


def draws_of(rng, sd=0.1, n=20):
    return {s: {sign: rng.normal(scale=sd, size=n) for sign in (-1, 1)} for s in ("false_claims", "true_claims")}
