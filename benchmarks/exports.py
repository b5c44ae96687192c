"""Merging a vector into a checkpoint of Qwen3-0.6B's exact shape (random weights), against mergekit's task arithmetic.

`uv run python -m benchmarks.exports` writes a random base in bfloat16 and two rank-32 adapters, and then, as processes
of their own and in alternation,

- ours: the vector of both adapters written into the base (`ws export merged`);
- mergekit: task arithmetic over the base and two checkpoints into which the adapters were merged beforehand. That
  merging is not counted, although a user of mergekit has to do it.

It records whole-process times, peak memory beside that of a process that only imports the libraries, how much of dW
both results have lost, and, for the difference of the two checkpoints (`ws diff`), the peak memory of reading it
densely. mergekit runs in an environment of its own, which uv makes from the package index.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import ws
from benchmarks import harness
from benchmarks import vector as adapters
from ws.export.merged import export_merged
from ws.lm.checkpoints import Checkpoint
from ws.options.make import DiffOptions

MERGEKIT = ("mergekit==0.1.4", "transformers==4.55.4")  # it does not work with transformers 5
ALPHA = 1.0


def prepare(folder: Path) -> None:
    """The base, the adapters, their vector, and for mergekit the merged checkpoints and its configuration."""
    adapters.prepare(folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    adapters.build(base, folder).save(folder / "vector")
    for sign in ("pos", "neg"):
        tuned = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto"), str(folder / sign)
        )
        tuned.merge_and_unload().save_pretrained(folder / f"{sign}-merged")
    models = [
        {"model": str(folder / f"{sign}-merged"), "parameters": {"weight": weight}}
        for sign, weight in (("pos", ALPHA), ("neg", -ALPHA))
    ]
    config = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}
    (folder / "task.yaml").write_text(
        json.dumps(config | {"dtype": "bfloat16", "parameters": {"normalize": False}}), encoding="utf-8"
    )
    print(json.dumps({"prepared": True}))


def only_imports(folder: Path) -> None:
    print(json.dumps({"versions": len(harness.library_versions())}))


def merge(folder: Path) -> None:
    vector = ws.SteeringVector.load(folder / "vector")
    done = export_merged(vector, ALPHA, folder / "ours", model=str(folder / "base"))
    print(json.dumps({"lost": done.lost}))


def difference(folder: Path) -> None:
    from ws.diff import diff_checkpoints

    places = {sign: str(folder / f"{sign}-merged") for sign in ("pos", "neg")}
    print(json.dumps(diff_checkpoints(DiffOptions(**places, to=folder / "dense"))))


PARTS = {"prepare": prepare, "only_imports": only_imports, "merge": merge, "difference": difference}


def mergekit(folder: Path) -> list[str]:
    """The program, in an environment of its own: its interpreter and its script."""
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.11", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, *MERGEKIT], check=True)
    return [python, str(folder / "bin" / "mergekit-yaml")]


def lost(folder: Path, made: str) -> float:
    """`‖written - (W + alpha dW)‖ / ‖alpha dW‖` over the touched matrices of a merged checkpoint, in float64."""
    vector, base = ws.SteeringVector.load(folder / "vector"), Checkpoint.open(str(folder / "base"))
    merged = Checkpoint.open(str(folder / made))
    gone = asked = 0.0
    for name, delta in vector.deltas.items():
        before = base.tensor(f"{name}.weight").double()
        step = ALPHA * delta.dense(before)
        gone += float((merged.tensor(f"{name}.weight").double() - before - step).square().sum())
        asked += float(step.square().sum())
    return math.sqrt(gone / asked)


def over_ours(rounds: Sequence[tuple[harness.Process, harness.Process]], what: str) -> harness.Spread:
    """Theirs over ours, round by round."""
    ours, theirs = zip(*rounds, strict=True)
    return harness.Spread.ratio(*([getattr(process, what) for process in side] for side in (theirs, ours)))


def working_set(folder: Path) -> dict[str, float]:
    """MiB of the largest file's tensors, and of the largest tensor, in the base's dtype."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            sizes[file] = [stored.get_tensor(k).numel() * 2 / 2**20 for k in stored.keys()]  # noqa: SIM118
    return {"largest_file": max(map(sum, sizes.values())), "largest_tensor": max(map(max, sizes.values()))}


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
        folder = Path(name)
        part = ["-m", "benchmarks.exports", "--folder", name, "--part"]
        harness.fresh_process([*part, "prepare"])
        python, script = mergekit(folder / "environment")
        theirs = [script, str(folder / "task.yaml"), str(folder / "theirs"), "--no-copy-tokenizer"]
        rounds = []
        for _ in range(options.rounds):
            ours = harness.fresh_process([*part, "merge"])
            rounds.append((ours, harness.fresh_process(theirs, program=python)))
        alone, dense = (harness.fresh_process([*part, p]) for p in ("only_imports", "difference"))
        sets = working_set(folder / "base")
        peak = max(a.peak_mib for a, _ in rounds)
        results = {
            "mergekit_over_ours_seconds": over_ours(rounds, "seconds"),
            "mergekit_over_ours_peak": over_ours(rounds, "peak_mib"),
            "seconds_ours": [a.seconds for a, _ in rounds],
            "seconds_mergekit": [b.seconds for _, b in rounds],
            "peak_mib_ours": peak,
            "peak_mib_mergekit": max(b.peak_mib for _, b in rounds),
            "peak_mib_only_imports": alone.peak_mib,
            "base_mib": sets,
            "peak_over_largest_file": peak / sets["largest_file"],
            "lost_ours": lost(folder, "ours"),
            "lost_mergekit": lost(folder, "theirs"),
            "peak_mib_dense_difference": dense.peak_mib,
            "threads": torch.get_num_threads(),
        }
    harness.record("exports", results)


if __name__ == "__main__":
    main()
