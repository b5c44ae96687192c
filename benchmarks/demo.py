"""`ws demo` in a fresh process and an empty folder, on either of its models: seconds, CPU seconds and peak memory.

`uv run python -m benchmarks.demo`; for orientation only, times depend on the machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import harness


def measure(model: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = harness.fresh_process(["-m", "ws.cli", "demo", "--model", model], cwd=Path(folder))
    return {"seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "peak_mib": done.peak_mib}


def main() -> None:
    harness.record("demo", {model: measure(model) for model in ("pocket", "smollm2")})


if __name__ == "__main__":
    main()
