"""What every export shares: which vector, at which strength, and where the result goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ws.behaviors import behavior_name
from ws.diff import SteeringVector
from ws.errors import WsError
from ws.files.runs import DEFAULT_OUT, run_folder
from ws.run import vector_of_run


@dataclass(frozen=True)
class VectorOptions:
    """Which vector.

    Attributes:
        vector: a vector's folder or its repository on the hub; None for the one of the run below.
        behavior, adapter, seed: the run.
        out: where runs are.
    """

    vector: str | None = None
    behavior: str = "honesty"
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that the vector is of, None when a vector is named."""
        name = behavior_name(self.behavior)
        return None if self.vector else run_folder(self.out, name, self.adapter, self.seed)

    @property
    def name(self) -> str:
        """A short name for what is exported: `honesty-lora`, or that of the named vector."""
        if self.vector:
            return Path(self.vector).name
        seed = f"-seed-{self.seed}" if self.seed else ""
        return f"{behavior_name(self.behavior)}-{self.adapter}{seed}"

    def open(self) -> SteeringVector:
        """The vector, loaded; `WsError` when there is none."""
        if self.vector:
            return SteeringVector.load(self.vector)
        otherwise = ", or name one with --vector"
        return vector_of_run(self.out, self.behavior, self.adapter, self.seed, otherwise)[1]


@dataclass(frozen=True)
class ExportOptions(VectorOptions):
    """Which vector, how strong, and where to.

    Attributes:
        alpha: the strength that is written into the export, a number or calibrated units such as `+1u`.
        to: the folder or file to write; None for one under the run's `exports/`.
    """

    alpha: str = "1"
    to: Path | None = None

    def target(self, name: str) -> Path:
        """Where the export goes: `to`, or else `<run>/exports/<name>`; `WsError` when neither is known."""
        if self.to is not None:
            return self.to
        if self.run_folder is None:
            raise WsError("Say where the export of a named vector goes with --to.")
        return self.run_folder / "exports" / name


def strength_text(alpha: float) -> str:
    """A strength as a part of a file's name: `-alpha+1`, `-alpha-0.5`."""
    return f"-alpha{alpha:+.4g}"
