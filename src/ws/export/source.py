"""What every export shares: which vector, at which strength, and where the result goes."""

from __future__ import annotations

from pathlib import Path

from ws.diff import SteeringVector, vector_folder
from ws.options.shared import ExportOptions as ExportOptions
from ws.options.shared import VectorOptions as VectorOptions
from ws.run import vector_of_run


def vector_of(options: VectorOptions) -> SteeringVector:
    """The vector that options name, loaded; `WsError` when there is none."""
    if options.vector:
        return SteeringVector.load(options.vector)
    options.require()
    return vector_of_run(options.out, options.behavior, options.adapter, options.seed)[1]


def folder_of(options: VectorOptions) -> Path:
    """The folder with the files of the vector that options name; `WsError` when a named one is not there."""
    if options.vector:
        return vector_folder(options.vector)
    assert options.run_folder is not None
    return options.run_folder / "vector"


def strength_text(alpha: float) -> str:
    """A strength as a part of a file's name: `-alpha+1`, `-alpha-0.5`; two strengths never have the same."""
    return f"-alpha{float(alpha):+}".removesuffix(".0")
