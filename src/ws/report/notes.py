"""Notes on what is not on a page, with the commands that make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ws.report.data import Contents, Gap
from ws.report.scores import ACTS, CLAIMS, CONFOUNDS, DILEMMAS
from ws.report.verdict import Caution, missing_nulls

_LABELS = {
    CLAIMS: ("Held-out claims", "claims"),
    DILEMMAS: ("Dilemmas", "dilemmas"),
    ACTS: ("tiny-mfv", "acts"),
    CONFOUNDS: ("Confounds", "checks"),
    "calibration": ("Calibration (KL and calibrated strengths)", "claims"),
    "controls": ("Random controls", "checks"),
    "compare": ("Comparison with baselines and controls (compare.csv)", "checks"),
    "nulls": ("Controls that are trained", "checks"),
    "norms": ("Norms", "norms"),
    "samples": ("Samples", "samples"),
    "card": ("Data card", "data"),
    "pooled": ("Pooled table of a sweep (sweep_pooled.csv)", "shifts"),
    "vector": ("Vector", "provenance"),
}
ANCHORS = ("claims", "dilemmas", "acts", "shifts", "checks", "norms", "samples", "data", "provenance")


@dataclass(frozen=True)
class Note:
    """Something that is not on the page, the commands that make it, and whether there is something that is left out."""

    text: str
    commands: tuple[str, ...]
    is_left_out: bool


def notes(contents: Contents) -> dict[str, list[Note]]:
    """What is missing, by the part of the page where it would stand; runs that miss the same share a note."""
    groups: dict[tuple[str, str], list[Gap]] = {}
    for gap in [*contents.gaps, *(g for r in contents.results for g in r.gaps), *_untrained(contents)]:
        groups.setdefault((gap.what, gap.why), []).append(gap)
    if contents.compare:  # it holds random vectors against every vector already
        groups.pop(("controls", "missing"), None)
    found: dict[str, list[Note]] = {anchor: [] for anchor in ANCHORS}
    for (what, why), gaps in groups.items():
        label, anchor = _LABELS[what]
        commands = list(dict.fromkeys(_for_behavior(g.command, contents.name) for g in gaps))
        more = (f"and {len(commands) - 2} more like these",) if len(commands) > 2 else ()
        found[anchor].append(
            Note(f"{label}: {why}{_whose(gaps, contents)}.", (*commands[:2], *more), gaps[0].is_left_out)
        )
    return found


def _untrained(contents: Contents) -> list[Gap]:
    adapter = contents.adapters[0]
    return [
        Gap("nulls", f"no {null} vector was trained", f"ws replicate --adapter {adapter} --control {null}")
        for null in missing_nulls(contents)
    ]


def _for_behavior(command: str, behavior: str) -> str:
    return f"{command} --behavior {behavior}"


def _whose(gaps: Sequence[Gap], contents: Contents) -> str:
    named = [f"{g.adapter} seed {g.seed}" for g in gaps if g.adapter is not None]
    if not named:
        return ""
    if len(named) == len(contents.results) > 1:
        return ", for every run"
    shown = ", ".join(named[:4])
    return f", for {shown}{f' and {len(named) - 4} more' if len(named) > 4 else ''}"


def stale(contents: Contents) -> list[Caution]:
    """Tables that are there and not shown."""
    return [
        Caution(f"Left out. {note.text}", anchor)
        for anchor, here in notes(contents).items()
        for note in here
        if note.is_left_out
    ]
