"""`ws demo` in a fresh process and an empty folder: wall-clock time and peak memory.

`uv run python -m benchmarks.demo`; for orientation only, times depend on the machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import harness


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = harness.fresh_process(["-m", "ws.cli", "demo"], cwd=Path(folder))
    harness.record("demo", {"seconds": done.seconds, "peak_mib": done.peak_mib})


if __name__ == "__main__":
    main()
