"""Notes on what is not on a page, with the commands that make it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ws.analysis.compare_tables import NULLS
from ws.console import words_of
from ws.eval.suite import evaluations
from ws.files.public import public_name
from ws.options.make import SIGNED, ReplicateConfig, TrainConfig
from ws.report.data import Contents, Gap, Result
from ws.report.scores import ACTS, CLAIMS, CONFOUNDS, DILEMMAS, evaluation_at

_LABELS = {
    CLAIMS: "Held-out claims",
    DILEMMAS: "Dilemmas",
    ACTS: "tiny-mfv",
    CONFOUNDS: "Confounds",
    "calibration": "Calibration (KL and calibrated strengths)",
    "controls": "Random controls",
    "compare": "Comparison with baselines and controls (compare.csv)",
    "nulls": "Controls that are trained",
    "profile": "Profile of side effects",
    "norms": "Norms",
    "samples": "Samples",
    "card": "Data card",
    "pooled": "Pooled table of a sweep (sweep_pooled.csv)",
    "vector": "Vector",
    "derived": "Computed vectors",
    "dilemmas": "Further dilemmas",
}
# Commands that begin from a model rather than from a run, and so must be told which.
_FROM_A_MODEL = ("ws replicate", "ws data")


@dataclass(frozen=True)
class Note:
    """Something that is not on the page.

    Attributes:
        text: what, and why.
        commands: what makes it, as they are typed; none where nothing need be made.
        is_left_out: there is something, and it is not shown.
    """

    text: str
    commands: tuple[str, ...]
    is_left_out: bool


def notes(contents: Contents) -> list[Note]:
    """What is missing, first what is there and left out; runs that miss the same share a note."""
    groups: dict[tuple[str, str], list[Gap]] = {}
    has_no_claims = contents.behavior is not None and contents.behavior.claims is None
    needless = (CLAIMS, CONFOUNDS) if has_no_claims else ()
    of_runs = [g for r in contents.results for g in r.gaps if g.what not in needless]
    for gap in [*contents.gaps, *of_runs, *_untrained(contents), *_unprompted(contents)]:
        groups.setdefault((gap.what, gap.why), []).append(gap)
    if contents.compare:  # it holds random vectors against every vector already
        groups.pop(("controls", "missing"), None)
    made = []
    for (what, why), gaps in groups.items():
        commands = dict.fromkeys(_complete(g.command, contents) for g in gaps if g.command)
        text = f"{_label(what)}: {why}{_whose(gaps, contents)}."
        made.append(Note(text, tuple(commands), gaps[0].is_left_out))
    return sorted(made, key=lambda note: not note.is_left_out)


def _label(what: str) -> str:
    """What it is that is missing, as words."""
    if what in _LABELS:
        return _LABELS[what]
    cls = evaluation_at(what.removeprefix("prompted "))
    assert cls is not None, "what is missing is listed above, or is an evaluation's"
    if what.startswith("prompted "):
        return f"{cls.place.capitalize()} put to a base under a system prompt"
    return cls.name.capitalize()


def _untrained(contents: Contents) -> list[Gap]:
    """Adapters that have no trained null to be held against; the first seed says how it is made."""
    firsts = [contents.of(adapter)[0] for adapter in contents.adapters]
    return [
        Gap.of_run("nulls", f"no {null} vector was trained", command, run.adapter, run.seed)
        for null in NULLS
        for run in firsts
        if f"{run.adapter}-{null}" not in contents.nulls
        for command in [shlex.join(["ws", "replicate", "--control", null, *_settings(run)])]
    ]


def _settings(run: Result) -> list[str]:
    """The words that a vector is trained with as this run's was: a null of other settings is none of it."""
    recorded = run.training.get("config", {})
    usual = ReplicateConfig.preset(run.base, run.adapter.removesuffix(f"-{SIGNED}"))
    names = {field.name for field in fields(TrainConfig)} & recorded.keys()
    settings: Any = {name: tuple(v) if isinstance(v := recorded[name], list) else v for name in names}
    return words_of(replace(usual, train=replace(usual.train, **settings)))


def _unprompted(contents: Contents) -> list[Gap]:
    """Evaluations on the page that no prompted base was put to: there is nothing to compare the vectors with."""
    gaps = []
    compared = {r["score"] for r in contents.compared(intervention="prompt")}
    for cls in evaluations().values():
        stage = cls.stage
        asked = [r for r in contents.results if (stage, "summary") in r.tables]
        known = any(r.tables.get((stage, "prompt")) for r in asked)
        if asked and not known and compared.isdisjoint(s.key for s in cls.scores):
            more = cls.name not in ("sycophancy", "tinymfv_airisk")
            evals = f" --evals sycophancy tinymfv_airisk {cls.name}" if more else ""
            gaps.append(Gap(f"prompted {stage}", "missing", f"ws compare{evals}"))
    return gaps


def _complete(command: str, contents: Contents) -> str:
    """The command with whose behaviour and, where it does not begin from a run, which model."""
    base = shlex.quote(public_name(contents.results[0].base))
    model = f" --model {base}" if command.startswith(_FROM_A_MODEL) else ""
    out = f" --out {shlex.quote(contents.out)}" if contents.out else ""
    return f"{command}{model} --behavior {contents.called}{out}"


def _whose(gaps: Sequence[Gap], contents: Contents) -> str:
    named = [f"{g.adapter} seed {g.seed}" for g in gaps if g.adapter is not None]
    if not named:
        return ""
    if {*named} == {r.name for r in contents.results} and len(named) > 1:
        return ", for every run"
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return f", for {', '.join(named[:4])}{more}"
