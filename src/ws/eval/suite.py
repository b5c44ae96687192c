"""The evaluations that sweeps, comparisons, controls, slopes, reports and model cards know, and how to add one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from ws.behaviors import Behavior
from ws.errors import WsError, choose
from ws.eval.airisk import Airisk
from ws.eval.answers import Answers
from ws.eval.arithmetic import Arithmetic
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation, HeadlineScore
from ws.eval.judges import LEXICAL
from ws.eval.preference import Preferences
from ws.eval.readable import NATS, WRONGNESS
from ws.eval.statements import Statements
from ws.eval.sycophancy import Sycophancy
from ws.eval.tinymfv_airisk import TinymfvAirisk
from ws.eval.truthfulqa import Truthfulqa
from ws.options.shared import HEADLINES

SUITE: dict[str, type[Evaluation]] = {
    cls.name: cls
    for cls in (
        Sycophancy,
        Airisk,
        TinymfvAirisk,
        Preferences,
        Statements,
        Answers,
        Truthfulqa,
        Arithmetic,
    )
}
_ENTRY_POINTS = "ws.evaluations"


def register(cls: type[Evaluation]) -> None:
    """Add an evaluation for this process: every command then takes it by its name, and its scores by theirs.

    Raises:
        WsError: its name or that of a score is taken, or is not of lower-case letters, digits and `_` (they name files
            and columns); or it has no scores.
    """
    if not cls.scores:
        raise WsError(f"The evaluation {cls.name!r} must state at least one headline in `scores`.")
    named = [("an evaluation", cls.name, list(SUITE)), *(("a score", s.key, list(_headlines())) for s in cls.scores)]
    for kind, name, taken in named:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise WsError(f"{name!r} cannot name {kind}: use lower-case letters, digits and _.")
        if name in taken:
            raise WsError(f"There is {kind} {name!r} already.")
    SUITE[cls.name] = cls


@cache
def _register_installed() -> None:
    """Add what installed packages bring: entry points of the group `ws.evaluations`, each of them a class."""
    for point in entry_points(group=_ENTRY_POINTS):
        try:
            register(point.load())
        except (ImportError, AttributeError) as problem:
            raise WsError(f"The installed evaluation {point.value} cannot be loaded ({problem}).") from problem


def evaluations() -> dict[str, type[Evaluation]]:
    """All evaluations by name, those of installed packages among them."""
    _register_installed()
    return SUITE


def evaluation_named(name: str) -> type[Evaluation]:
    """The evaluation of that name, or a `WsError` with the nearest one."""
    return evaluations()[choose("evaluation", name, evaluations())]


def _headlines() -> dict[str, HeadlineScore]:
    known = {score.key: score for cls in SUITE.values() for score in cls.scores}
    return {key: known[key] for key in dict.fromkeys((*HEADLINES, *known))}  # these first, in the order of tables


def headlines() -> dict[str, HeadlineScore]:
    """All headline scores by key, in the order of tables."""
    _register_installed()
    return _headlines()


def headline(key: str) -> HeadlineScore:
    """The headline score of that key; for one that no evaluation here has, such as in another's table, a plain one."""
    return headlines().get(key) or HeadlineScore(key, key.replace("_", " "))


def evaluations_of(scores: Sequence[str]) -> list[type[Evaluation]]:
    """The evaluations that some headline scores are read from, each once, in the order of tables.

    Raises:
        WsError: a score that there is not; it names the nearest one.
    """
    for score in scores:
        choose("score", score, headlines())
    wanted = {key: cls for cls in SUITE.values() for s in cls.scores if (key := s.key) in scores}
    return list(dict.fromkeys(wanted[key] for key in headlines() if key in wanted))


def measured_of(names: Sequence[str], behavior: Behavior) -> tuple[str, ...]:
    """The evaluations that those of these names are for a behaviour: without claims it is measured by preference."""
    wanted = ["preference" if name == "sycophancy" and behavior.claims is None else name for name in names]
    return tuple(dict.fromkeys(wanted))


def scores_of(names: Sequence[str], behavior: Behavior) -> tuple[str, ...]:
    """The headline scores that those of these names are for a behaviour, as its evaluations are (`measured_of`)."""
    claims, (preference,) = {score.key for score in Sycophancy.scores}, Preferences.scores
    wanted = [preference.key if name in claims and behavior.claims is None else name for name in names]
    return tuple(dict.fromkeys(wanted))


def asked_of(
    cls: type[Evaluation],
    context: EvalContext,
    split: str = "report",
    traits: Sequence[str] = (),
    judges: Sequence[str] = (),
) -> Evaluation:
    """An evaluation as a command on several of them asks it of a run.

    Args:
        cls: which.
        context: the run. Its data set is of the published sets alone.
        split, traits, judges: for those whose options have them: which held-out items, whose statements, and who
            rates free answers.

    Raises:
        WsError: free answers without a judge that rates them, of which a table of several evaluations has no column.
    """
    options = context.options_as(cls.options)
    given: dict[str, Any] = {"split": split, "traits": tuple(traits)}
    given["judges"] = tuple(judges)
    overrides = {name: value for name, value in given.items() if hasattr(options, name)}
    if "judges" in overrides and not set(judges) - {LEXICAL}:
        raise WsError(f"{cls.name} stands beside other evaluations by a judge that rates: name one with --judges.")
    overrides |= {} if cls.is_published else {"dataset": None}
    return cls.of_run(replace(context, options=replace(options, **overrides)))


def has_own_floor(score: HeadlineScore) -> bool:
    """Whether the floor of a score is another than those of nats and of wrongness, which every table names."""
    return score.floor != (WRONGNESS if score.key == "wrongness" else NATS)


def floors_text(scores: Iterable[HeadlineScore]) -> str:
    """The floors of some headline scores, for a sentence: `0.2 nats (0.05 of wrongness)`."""
    others = [s for s in scores if has_own_floor(s)]
    more = "".join(f"; {s.floor} {s.unit} of {s.key.replace('_', ' ')}" for s in others)
    return f"{NATS} nats ({WRONGNESS} of wrongness{more})"


def set_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of the published sets that rows of several scores rest on; their `dataset` says which.

    Rows of scores that come from elsewhere, or that do not say of what they are, add nothing.
    """
    known = headlines()
    sets = [(known[row["score"]], row["dataset"]) for row in rows if row.get("score") in known and row.get("dataset")]
    asked = [(score.evaluation, dataset) for score, dataset in sets]
    return list(dict.fromkeys(note for cls, dataset in asked if cls for note in cls.about({"dataset": dataset})))
