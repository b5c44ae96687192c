"""Words of a page: numbers as text, texts of models made safe to show, and which of their words differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from ws.report.curves import Divergence, Point
from ws.stats import Estimate

# Control characters that HTML has no place for; tabs and line ends stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


# ---- numbers --------------------------------------------------------------------------------------------------------


def shown(value: float | int | Estimate, spec: str = "+.2f") -> str:
    """A number, or an estimate with its interval (`-1.10 [-1.24, -0.97]`), with real minus signs.

    Zeros have no minus sign: a spec `+.2f` is taken for `+z.2f`.
    """
    return minus(f"{value:{spec.replace('.', 'z.', 1)}}")


def minus(text: str) -> str:
    """Numbers as text with real minus signs."""
    return text.replace("-", "\N{MINUS SIGN}")


def strength(alpha: float | int) -> str:
    """A strength as it is written: `+1`, `-0.5`, `0`."""
    return minus(f"{alpha:+.4g}") if alpha else "0"


def counted(n: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def odds(logratio: float) -> str:
    """A log ratio as odds: `1:3.6` below zero, `12:1` above it."""
    ratio = math.exp(min(abs(logratio), 50.0))
    text = ">1000" if ratio > 1000 else f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
    return f"1:{text}" if logratio < 0 else f"{text}:1"


def p_text(p: float) -> str:
    """A p-value to three decimals, or below that `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def divergence_text(kl: Divergence | None) -> str:
    """`KL 0.11`, with a sign of approximation where it was not measured at this very strength."""
    if kl is None:
        return "KL not measured"
    return f"KL {'' if kl.is_exact else chr(0x2248)}{kl.nats:.2f}"


def cost_text(p: Point) -> str:
    """What an effect cost: the answer mass, or why it cannot be read, and the divergence from the base in nats."""
    if not p.is_readable:
        return f"not to be read: {p.read.problem}, {divergence_text(p.kl)}"
    return f"{'' if p.mass is None else f'answer mass {p.mass:.3f}, '}{divergence_text(p.kl)}"


# ---- texts ----------------------------------------------------------------------------------------------------------


def clean(text: Any) -> str:
    """A text as it can stand in a page: control characters and half characters become a replacement character."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: its words.
        kind: `same`, `changed` (other words than the reference has), or `left out` (words that only the reference has).
    """

    text: str
    kind: str


def differences(reference: str, answer: str) -> list[Piece]:
    """The words of an answer, with those marked that differ from another answer's (`difflib`)."""
    before, after = clean(reference).split(), clean(answer).split()
    pieces = []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece(" ".join(after[k:m]), "same"))
        elif kind == "delete":
            pieces.append(Piece(" ".join(before[i:j]), "left out"))
        else:
            pieces.append(Piece(" ".join(after[k:m]), "changed"))
    return pieces


@dataclass(frozen=True)
class Question:
    """A question with the answers at every strength; the base's is the one that the others are compared with.

    Attributes:
        text: of the question.
        answers: pieces by strength, in order.
    """

    text: str
    answers: tuple[tuple[float, tuple[Piece, ...]], ...]


def side_by_side(samples: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Samples (`alpha`, `question`, `answer`) by question, with the differences from the answer nearest to alpha 0."""
    by_question: dict[str, dict[float, str]] = {}
    for s in samples:
        by_question.setdefault(str(s["question"]), {})[float(s["alpha"])] = str(s["answer"])
    questions = []
    for text, answers in by_question.items():
        reference = answers[min(answers, key=abs)]
        pieces = ((alpha, tuple(differences(reference, answers[alpha]))) for alpha in sorted(answers))
        questions.append(Question(clean(text), tuple(pieces)))
    return questions
