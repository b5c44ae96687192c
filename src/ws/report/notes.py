"""Notes on what is not on a page, with the commands that make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ws.eval.suite import SUITE
from ws.export.card import public_name
from ws.report.data import UNCERTAIN, Contents, Gap
from ws.report.scores import ACTS, CLAIMS, CONFOUNDS, DILEMMAS, PLACES, PREFERENCE, SCORES, STATEMENTS
from ws.report.verdict import Caution, missing_nulls

_LABELS = {
    CLAIMS: ("Held-out claims", "claims"),
    DILEMMAS: ("Dilemmas", "dilemmas"),
    ACTS: ("tiny-mfv", "acts"),
    PREFERENCE: ("Preference", "preference"),
    STATEMENTS: ("Statements", "statements"),
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
    "dilemmas": ("Further dilemmas", "dilemmas"),
    **{f"prompted {s}": ("A base under a system prompt, to compare with", a) for s, a in PLACES.items()},
}
# Commands that begin from a model rather than from a run, and so must be told which.
_FROM_A_MODEL = ("ws replicate", "ws data", "ws sweep")
ANCHORS = (*PLACES.values(), "shifts", "checks", "norms", "samples", "data", "provenance")


@dataclass(frozen=True)
class Note:
    """Something that is not on the page.

    Attributes:
        text: what, and why.
        commands: what makes it.
        is_left_out: there is something, and it is not shown.
        is_shown: it is shown after all.
    """

    text: str
    commands: tuple[str, ...]
    is_left_out: bool
    is_shown: bool = False


def notes(contents: Contents) -> dict[str, list[Note]]:
    """What is missing, by the part of the page where it would stand; runs that miss the same share a note."""
    groups: dict[tuple[str, str], list[Gap]] = {}
    own = [g for r in contents.results for g in r.gaps]
    for gap in [*contents.gaps, *own, *_untrained(contents), *_unprompted(contents)]:
        groups.setdefault((gap.what, gap.why), []).append(gap)
    if contents.compare:  # it holds random vectors against every vector already
        groups.pop(("controls", "missing"), None)
    found: dict[str, list[Note]] = {anchor: [] for anchor in ANCHORS}
    for (what, why), gaps in groups.items():
        label, anchor = _LABELS[what]
        commands = list(dict.fromkeys(_complete(g.command, contents) for g in gaps))
        more = (f"and {len(commands) - 2} more like these",) if len(commands) > 2 else ()
        found[anchor].append(
            Note(
                f"{label}: {why}{_whose(gaps, contents)}.",
                (*commands[:2], *more),
                gaps[0].is_left_out,
                why == UNCERTAIN,
            )
        )
    return found


def _untrained(contents: Contents) -> list[Gap]:
    adapter = contents.adapters[0]
    return [
        Gap("nulls", f"no {null} vector was trained", f"ws replicate --adapter {adapter} --control {null}")
        for null in missing_nulls(contents)
    ]


def _unprompted(contents: Contents) -> list[Gap]:
    """Evaluations on the page that no prompted base was put to: there is nothing to compare the vectors with."""
    found = []
    compared = {r["score"] for r in contents.compare if r["intervention"] == "prompt"}
    for entry in SUITE.values():
        stage = entry.stage
        asked = [r for r in contents.results if (stage, "summary") in r.tables]
        known = any(r.tables.get((stage, "prompt")) for r in asked)
        if asked and not known and compared.isdisjoint(s.key for s in SCORES if s.stage == stage):
            more = entry.name not in ("sycophancy", "tinymfv_airisk")
            evals = f" --evals sycophancy tinymfv_airisk {entry.name}" if more else ""
            found.append(Gap(f"prompted {stage}", "missing", f"ws compare{evals}"))
    return found


def _complete(command: str, contents: Contents) -> str:
    """The command with whose behaviour and, where it does not begin from a run, which model."""
    model = f" --model {public_name(contents.results[0].base)}" if command.startswith(_FROM_A_MODEL) else ""
    return f"{command}{model} --behavior {contents.called}"


def _whose(gaps: Sequence[Gap], contents: Contents) -> str:
    named = [f"{g.adapter} seed {g.seed}" for g in gaps if g.adapter is not None]
    if not named:
        return ""
    if len(named) == len(contents.results) > 1:
        return ", for every run"
    shown = ", ".join(named[:4])
    return f", for {shown}{f' and {len(named) - 4} more' if len(named) > 4 else ''}"


def stale(found: Mapping[str, Sequence[Note]]) -> list[Caution]:
    """Tables that are there and not shown, from the notes."""
    return [
        Caution(f"Left out. {note.text}", anchor) for anchor, here in found.items() for note in here if note.is_left_out
    ]
