"""How much every command costs before it does anything, in CPU seconds of a fresh process and against `import torch`.

`uv run python -m benchmarks.startup` takes, in turns and so many rounds (`--rounds`), the medians of

- `import torch`, alone and with the model classes of transformers, which any tool of this kind pays for;
- `ws --help`, `ws COMMAND --help` of every command, a mistyped option, and files and runs that are not there;
- the commands that need no model, on an empty behaviour file and on a vector of the tests' size;
- the modules that carry the other commands out, imported and no more; those that need PEFT also where it finds no
  bitsandbytes, which it imports wherever it is installed (the extra `quantized`; a clone has it for the tests).

`--only` measures what begins with one of its words, beside the first two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import ws
from benchmarks import harness
from ws.cli import COMMANDS

TORCH, BOTH = "import torch", "import torch, transformers; transformers.PreTrainedModel"
WITHOUT = "import sys; sys.modules['bitsandbytes'] = None"  # for Python it is not there
NEED_PEFT = "replicate run_sweep train sweep.queue sweep.tune analysis.compare analysis.monitor analysis.prevention"
NEED_PEFT += " analysis.profile"
MISTAKES = {
    "mistyped option": ["replicate", "--adaptr", "lora"],
    "mistyped command": ["replcate"],
    "no behaviour file": ["replicate", "--behavior", "nowhere.toml"],
    "no finished run": ["eval", "airisk"],
    "no vector": ["inspect", "nowhere"],
}


def command(words: Sequence[str]) -> str:
    """`ws ...` as Python that ends with code 0 also where the command does not."""
    lines = ["import sys", "from ws.cli import main", f"sys.argv = {['ws', '--quiet', *words]!r}"]
    return "\n".join([*lines, "try:", "    main()", "except SystemExit:", "    pass", "print('{}')"])


def codes(folder: Path) -> dict[str, str]:
    """What is measured, by the names of the record."""
    delta = ws.LinearDelta(64, 64, u=torch.ones(64, 2), v=torch.ones(2, 64))
    ws.SteeringVector({"model.layers.0.mlp.up_proj": delta}, "a-base", None).save(folder / "vector")
    found = {"import torch": TORCH, "import torch, transformers": BOTH, "ws --help": command(["--help"])}
    found |= {f"ws {name} --help": command([*name.split()[:2], "--help"]) for name in COMMANDS}
    found |= {name: command(words) for name, words in MISTAKES.items()}
    found["ws inspect VECTOR"] = command(["inspect", str(folder / "vector")])
    found["ws behavior check honesty"] = command(["behavior", "check", "honesty"])
    modules = sorted({place.split(":")[0] for place, _ in COMMANDS.values()} - {"ws.cli"})
    found |= {f"import {module}": f"import {module}" for module in modules}
    return found | {f"import ws.{m}, no bitsandbytes": f"{WITHOUT}; import ws.{m}" for m in NEED_PEFT.split()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""])
    o = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as on any machine where a command has run before
    with tempfile.TemporaryDirectory() as place:
        asked, seconds = ("import torch", *o.only), dict[str, list[float]]()
        wanted = {name: code for name, code in codes(Path(place)).items() if name.startswith(asked)}
        for number in range(o.rounds + 1):
            for name, code in wanted.items():
                taken = harness.fresh_process(["-c", code], cwd=Path(place)).cpu_seconds
                if number:  # the first round fills the file cache
                    seconds.setdefault(name, []).append(taken)
    rows = {
        name: {
            "cpu_seconds": round(statistics.median(taken), 2),
            "ratio to torch": harness.Spread.ratio(taken, seconds["import torch"]),
            "ratio to torch and transformers": harness.Spread.ratio(taken, seconds["import torch, transformers"]),
        }
        for name, taken in seconds.items()
    }
    harness.record("startup", {"rounds": o.rounds, "commands": rows})


if __name__ == "__main__":
    main()
