"""Cosines of 12 low-rank vectors of Qwen3-0.6B's shape, from their factors on disk, against dense matrices.

`uv run python -m benchmarks.cosines` writes 12 vectors of rank 64 (what a pair of rank-32 adapters leaves) over all 196
linear modules to a temporary folder, then measures, each in a fresh process,

- peak memory of loading one vector after the other, the least that any comparison needs;
- time and peak memory of the cosine matrix by `ws.analysis.geometry`, which reads one layer of all vectors at a time;
- the same by a plain opponent: all vectors in memory, and for every module all changes as dense matrices;

and how far apart the two matrices are. Times are those of the computation, without starting Python and importing torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import ws
from benchmarks import harness
from ws.analysis.geometry import cosine_matrix, open_vector

LAYERS, VECTORS, RANK = 28, 12, 64
KINDS = {
    "self_attn.q_proj": (2048, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 2048),
    "mlp.gate_proj": (3072, 1024),
    "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}
PLANTED = 0.6


class Watch:
    """Wall-clock and processor seconds since it was made; other jobs on a machine disturb the second less."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def folders(folder: Path) -> list[Path]:
    return [folder / f"vector-{i}" for i in range(VECTORS)]


def prepare(folder: Path) -> None:
    """Random factors; those of the second vector share so many with the first that their cosine is near 0.6."""
    rng, shared = torch.Generator().manual_seed(0), round(PLANTED * RANK)
    first: dict[str, ws.LinearDelta] = {}
    for i, place in enumerate(folders(folder)):
        deltas = {}
        for layer in range(LAYERS):
            for kind, (d_out, d_in) in KINDS.items():
                name = f"model.layers.{layer}.{kind}"
                u, v = torch.randn(d_out, RANK, generator=rng) * 1e-3, torch.randn(RANK, d_in, generator=rng)
                if i == 1:
                    u[:, :shared], v[:shared] = first[name].u[:, :shared], first[name].v[:shared]
                deltas[name] = ws.LinearDelta(d_out, d_in, u=u, v=v)
        first = deltas if i == 0 else first
        ws.SteeringVector(deltas, "Qwen3-0.6B's shape", None, info={"seed": i}).save(place)
    print(json.dumps({"prepared": True}))


def load_each(folder: Path) -> None:
    norms = [len(ws.SteeringVector.load(place).deltas) for place in folders(folder)]
    print(json.dumps({"modules": norms}))


def ours(folder: Path) -> None:
    watch = Watch()
    found = cosine_matrix([open_vector(place) for place in folders(folder)])
    print(json.dumps(watch.read() | {"cosine": found.cosine.tolist(), "random_sd": float(found.random_sd[0, 1])}))


def dense(folder: Path) -> None:
    """Everything loaded, and dense float32 changes of each module multiplied with one another."""
    watch = Watch()
    vectors = [ws.SteeringVector.load(place) for place in folders(folder)]
    gram = torch.zeros(VECTORS, VECTORS, dtype=torch.float64)
    for name in vectors[0].deltas:
        flat = torch.stack([(v.deltas[name].u @ v.deltas[name].v).flatten() for v in vectors])
        gram += (flat @ flat.T).double()
    size = gram.diagonal().sqrt()
    print(json.dumps(watch.read() | {"cosine": (gram / size.outer(size)).tolist()}))


PARTS = {"prepare": prepare, "load_each": load_each, "ours": ours, "dense": dense}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part](options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        part = ["-m", "benchmarks.cosines", "--folder", name, "--part"]
        harness.fresh_process([*part, "prepare"])
        alone = harness.fresh_process([*part, "load_each"])
        mine, other = harness.in_turns({p: [*part, p] for p in ("ours", "dense")}, options.rounds).values()
    a, b = (torch.tensor(p[0].output["cosine"], dtype=torch.float64) for p in (mine, other))

    def middle(side: Sequence[harness.Process], key: str) -> float:
        return statistics.median(p.output[key] for p in side)

    def over_dense(number: Callable[[harness.Process], float]) -> harness.Spread:
        return harness.Spread.ratio(map(number, mine), map(number, other))

    results = {
        "vectors": VECTORS,
        "rank": RANK,
        "modules": LAYERS * len(KINDS),
        "peak_load_each_mib": alone.peak_mib,
        "seconds": middle(mine, "seconds"),
        "seconds_highest": max(p.output["seconds"] for p in mine),
        "cpu_seconds": middle(mine, "cpu_seconds"),
        "peak_mib": max(p.peak_mib for p in mine),
        "peak_beyond_loading_mib": max(p.peak_mib for p in mine) - alone.peak_mib,
        "dense_seconds": middle(other, "seconds"),
        "dense_cpu_seconds": middle(other, "cpu_seconds"),
        "dense_peak_beyond_loading_mib": max(p.peak_mib for p in other) - alone.peak_mib,
        "seconds_over_dense": over_dense(lambda p: p.output["seconds"]),
        "peak_over_dense": over_dense(lambda p: p.peak_mib),
        "largest_difference": float((a - b).abs().max()),
        "cosine_of_the_planted_pair": float(a[0, 1]),
        "largest_other_cosine": float((a - torch.eye(VECTORS)).abs().fill_diagonal_(0)[2:].max()),
        "random_sd": mine[0].output["random_sd"],
        "rounds": options.rounds,
    }
    harness.record("cosines", results)


if __name__ == "__main__":
    main()
