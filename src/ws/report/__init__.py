"""`ws report`: what the runs of a behaviour have shown, as one page that needs nothing else.

The page is one HTML file with its pictures in it, and it asks the network for nothing. It shows what is on disk: a
table that was made with another vector than the one beside it, or with another tokenizer or chat template than the base
has now, and whatever is missing, leaves a note with the command that would make it. Nothing is measured here, and the
numbers behind every figure are printed below it.
"""

from __future__ import annotations

from pathlib import Path

from ws import console
from ws.errors import WsError
from ws.files.runs import write_text
from ws.options.use import ReportOptions as ReportOptions
from ws.report.data import read_contents
from ws.report.page import render

PAGE = "report.html"
_MARK = b'<meta name="generator" content="ws report">'  # by which a report is known


def write_report(out: Path, behavior: str, to: Path | None = None) -> Path:
    """Write the report of the runs in `out/<behavior>/`, and return the file.

    Args:
        out: where runs are.
        behavior: a behaviour's name or its TOML file.
        to: the file to write, where nothing or an earlier report is; None for `out/<behavior>/report.html`.

    Raises:
        WsError: no run of the behaviour has a vector, or a place that holds something else.
    """
    if to is not None and to.exists() and not (to.is_file() and _MARK in to.read_bytes()[:4096]):
        raise WsError(f"{to} exists and is no report that was written here; choose another place with --to.")
    contents = read_contents(out, behavior)
    return write_text(to or out / contents.name / PAGE, render(contents))


def main(options: ReportOptions) -> None:
    """The command `ws report`."""
    page = write_report(options.out, options.behavior, options.to)
    console.show(console.Result("", {"bytes": page.stat().st_size}, [page]))
