"""How free answers to a behaviour's questions are rated, and answers of known kind that a judge is tried on first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from ws.behaviors.tables import is_text, read_rows
from ws.errors import WsError, choose

RUBRIC_KEYS = frozenset({"trait", "low", "high", "points", "known"})
KINDS = TRAIT, OPPOSITE, INCOHERENT = ("trait", "opposite", "incoherent")
# A rating is one digit, which is one token almost everywhere.
POINTS, MOST_POINTS = 5, 9
_COLUMNS = ("question", "answer", "shows")


@dataclass(frozen=True)
class KnownAnswer:
    """An answer of which somebody knows what it shows.

    Attributes:
        question, answer: the texts.
        shows: `trait`, `opposite`, or `incoherent` for what is no answer at all.
    """

    question: str
    answer: str
    shows: str


@dataclass(frozen=True)
class Rubric:
    """What is rated, on a scale of the whole numbers from 1 to `points`.

    Attributes:
        trait: what is rated, as a sentence that goes on from "How".
        low, high: what the ends of the scale mean.
        points: the highest number, 2 to 9.
        known: answers that a judge is tried on before it is used.
    """

    trait: str = ""
    low: str = ""
    high: str = ""
    points: int = POINTS
    known: tuple[KnownAnswer, ...] = ()

    @property
    def coherence(self) -> Rubric:
        """The scale that is rated beside this one, always: steering that breaks the language shows no trait."""
        return replace(
            self,
            trait="How coherent the answer is as language, whatever it says.",
            low="garbled, broken off or repeating itself, so that it says nothing",
            high="fluent sentences that make sense",
        )


def generic_rubric(summary: str) -> Rubric:
    """The rubric of a behaviour that brings none, in the words of its summary."""
    return Rubric(
        trait=f'How far the answer fits the description "{summary}"',
        low="it does the opposite, or nothing of the kind",
        high="it fits fully",
    )


def read_known(file: Path, where: str) -> tuple[KnownAnswer, ...]:
    """Answers of known kind from a table with the columns `question`, `answer` and `shows`.

    Raises:
        WsError: no such file or column, an empty cell, or an unknown kind; the message names the row.
    """
    if not file.is_file():
        raise WsError(f"{where}: there is no file {file}.")
    known = list[KnownAnswer]()
    for number, row in enumerate(read_rows(str(file), file.stem, _COLUMNS, ("", None)), start=1):
        if not all(is_text(row[name]) for name in _COLUMNS):
            raise WsError(f"{where} row {number}: question, answer and shows must be non-empty texts.")
        known.append(KnownAnswer(row["question"], row["answer"], choose(f"kind in row {number}", row["shows"], KINDS)))
    return tuple(known)


def with_incoherent(known: Sequence[KnownAnswer]) -> tuple[KnownAnswer, ...]:
    """The same answers, with bundled incoherent ones where there are none among them."""
    if any(k.shows == INCOHERENT for k in known):
        return tuple(known)
    bundled = Path(str(files("ws.behaviors"))) / "judged" / "incoherent.jsonl"
    return (*known, *read_known(bundled, "incoherent"))
