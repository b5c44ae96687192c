"""Pictures: how every figure of the project is written, so that the same numbers give the same bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ws.files.runs import atomic_file


def save_svg(figure: Figure, file: Path) -> Path:
    """Write a figure all at once; the same figure gives the same bytes."""
    with atomic_file(file) as part, matplotlib.rc_context({"svg.hashsalt": "ws", "svg.fonttype": "none"}):
        figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})
    return file
