"""What it takes to calibrate a vector of the pocket model and to compare it with 20 random ones.

`uv run python -m benchmarks.trust` trains vectors in a temporary folder, then runs `ws calibrate` (94 held-out prompts
of up to 50 tokens, both signs, the audit included) and `ws check controls` (20 draws, the claims and tiny-mfv, alpha -1
and +1) in fresh processes. For orientation only: times depend on the machine, and include starting Python and importing
torch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from ws.adapters import FAMILIES
from ws.files.runs import read_csv


def measure(adapter: str, folder: Path) -> dict[str, Any]:
    harness.fresh_process(["-m", "ws.cli", "demo", "--adapter", adapter], cwd=folder)
    calibration = harness.fresh_process(["-m", "ws.intervene.calibrate", "--adapter", adapter], cwd=folder)
    scores = ("false_claims", "true_claims", "wrongness")
    controls = harness.fresh_process(
        ["-m", "ws.analysis.controls", "--adapter", adapter, "--scores", *scores], cwd=folder
    )
    run = folder / "out" / "demo" / "honesty" / adapter
    stored = json.loads((run / "vector" / "calibration.json").read_text(encoding="utf-8"))
    sides = {name: stored[name] for name in ("positive", "negative")}
    return {
        "calibration_seconds": calibration.seconds,
        "controls_seconds": controls.seconds,
        "controls_draws": len({r["draw"] for r in read_csv(run / "controls.csv") if r["control"] == "random"}),
        **{f"{name}_alpha": side["alpha"] for name, side in sides.items()},
        **{f"{name}_converged": side["converged"] for name, side in sides.items()},
        **{f"{name}_nats": side["divergence"] for name, side in sides.items()},
        **{f"{name}_nats_on_other_prompts": side["audit"] for name, side in sides.items()},
        **{f"{name}_measurements": len(side["evaluations"]) + 1 for name, side in sides.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", choices=FAMILIES, default=["lora", "delora"])
    with tempfile.TemporaryDirectory() as folder:
        harness.record("trust", {adapter: measure(adapter, Path(folder)) for adapter in parser.parse_args().adapters})


if __name__ == "__main__":
    main()
