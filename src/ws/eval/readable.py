"""Which scores support a conclusion, and which effects are large enough to be called one.

A score that the model did not answer is a number all the same, with an interval that may lie far from zero. Whether it
can be read is decided here and nowhere else, and a table that shows it gives it the mark `!` in place of a star.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ws.errors import WsError
from ws.options.shared import BASE, WEIGHT
from ws.stats import LOW_MASS

LOW_AGREEMENT = 0.5
LEVEL = 0.05
# A smaller effect is called none: in nats (odds times 1.22), of wrongness on its scale from -1 to 1, and of preference
# in nats per token, where 0.02 are the same odds between two answers of ten tokens; of a share or a probability, where
# 0.05 are the same odds at one half.
NATS, WRONGNESS, PER_TOKEN, SHARE = 0.2, 0.05, 0.02, 0.05
MARK = "!"
# What to do where the base itself does not answer, and where only the steered model does not.
OF_BASE = (
    "it is so at alpha 0 already, so that is the base, and no strength, seed or adapter mends it: ask in other words "
    "(another opener, other answers), measure preference on held-out questions with both answers ([preferences]), or "
    "take another model"
)
OF_STRENGTH = "the base does answer, so it is the strength: take a smaller one"
# The column of an evaluation's summary with a reason of its own why a row cannot be read, as words; empty without one.
FLAG = "unreadable"
# The column with the share of texts that both frames put on the same side, in a summary and beside a score.
AGREEMENT = "frame_agreement"


@dataclass(frozen=True)
class Readability:
    """How well a model answered what a score rests on; of several strengths and seeds the worst (see `worst`).

    Attributes:
        mass: the mean answer mass; None for a score that is no choice of an answer.
        agreement: the share of texts that both frames put on the same side, None for a score with one frame. Answers
            that have nothing to do with the text agree on half of them, the same answer to both frames on none.
        flag: what else the evaluation found wrong, as words; empty for nothing.
    """

    mass: float | None
    agreement: float | None = None
    flag: str = ""

    @property
    def problem(self) -> str:
        """Why the score supports no conclusion, as words; empty when it may."""
        low_mass = self.mass is not None and self.mass < LOW_MASS
        frames = self.agreement is not None and self.agreement < LOW_AGREEMENT
        reasons = [f"answer mass {self.mass:.3f}"] if low_mass else []
        reasons += [f"frames agree on {self.agreement:.0%} of the texts"] if frames else []
        return "; ".join([*reasons, *([self.flag] if self.flag else [])])

    def columns(self, prefix: str = "") -> dict[str, Any]:
        """`mass`, `frame_agreement` and `unreadable` for a table, each after a prefix."""
        return {
            f"{prefix}mass": self.mass,
            f"{prefix}{AGREEMENT}": self.agreement,
            f"{prefix}{FLAG}": self.problem or None,
        }


def of_row(row: Mapping[str, Any], *masses: str, agreements: Sequence[str] = (AGREEMENT,)) -> Readability:
    """Of a row of an evaluation's summary, as it was made or read from its file: the lowest mass and agreement.

    Args:
        masses: its columns of mass.
        agreements: its columns of agreement. A summary that was made before it had these is read by `AGREEMENT`.
    """
    names = [name for name in agreements if name in row] or [AGREEMENT]
    known = [float(str(row[name])) for name in names if row.get(name) not in (None, "")]
    mass = min((float(row[name]) for name in masses), default=None)
    return Readability(mass, min(known, default=None), str(row.get(FLAG) or ""))


def remedy(base: Readability) -> str:
    """Whether it is the base or the strength that keeps a score from being read, and what to do; for a sentence."""
    return OF_BASE if base.problem else OF_STRENGTH


def worst(parts: Iterable[Readability]) -> Readability:
    """Of the strengths that are compared and the seeds that are pooled: the lowest mass and agreement, every flag."""
    readings = list(parts)
    masses = [r.mass for r in readings if r.mass is not None]
    agreements = [r.agreement for r in readings if r.agreement is not None]
    flags = dict.fromkeys(r.flag for r in readings if r.flag)
    return Readability(min(masses, default=None), min(agreements, default=None), "; ".join(flags))


def star(shift: float, p_holm: float, least: float, problem: str | None) -> str:
    """What stands behind a shift: `!` where it cannot be read, `*` where it is sure and not under the floor."""
    if problem:
        return MARK
    return "*" if p_holm < LEVEL and abs(shift) >= least else ""


def mass_text(mass: float | None, n_low: int, problem: str) -> str:
    """A mean answer mass, with the mark of what cannot be read or else with how many answers have little of it."""
    if mass is None:
        return problem and MARK
    few = f" ({n_low} under {LOW_MASS})" if n_low else ""
    return f"{mass:.3f}{f' {MARK}' if problem else few}"


def notes(problems: Iterable[str | None]) -> list[str]:
    """What the mark `!` means, for below a table, with the problems of its rows; nothing where there are none."""
    known = list(dict.fromkeys(p for p in problems if p))
    if not known:
        return []
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return [
        f"{MARK} supports no conclusion and has no star: at that strength or at the base the mean answer mass is under "
        f"{LOW_MASS}, both frames agree on fewer than half of the texts, or the evaluation says so itself "
        f"({', '.join(known[:3])}{more})."
    ]


def select(rows: Sequence[Mapping[str, str]], name: str = WEIGHT) -> list[Mapping[str, str]]:
    """The rows of one intervention and of the base, of a table as it is on disk; `WsError` when there are none."""
    selected = [r for r in rows if r.get("intervention") in (BASE, name)]
    if not any(r["intervention"] == name for r in selected):
        raise WsError(f"A table has no rows of the intervention {name}; run its evaluation again.")
    return selected


def rounding_notes(dtypes: Iterable[str]) -> list[str]:
    """One sentence where scores were computed in 16 bits, for wherever they are read."""
    short = [d for d in dict.fromkeys(dtypes) if d in ("bfloat16", "float16")]
    if not short:
        return []
    return [
        f"Computed in {' and '.join(short)}: with another batch size the score of an item may differ by 0.07 nats "
        "(means by less), so a shift of that size can be rounding; --dtype float32 is exact to 1e-4."
    ]
