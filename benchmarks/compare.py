"""The history of `just bench all`, and what became worse between two of its runs beyond noise.

`uv run python -m benchmarks.compare` judges the last run (or the one of `--to`) against the one before it that was made
on the same machine with the same settings (or that of `--against`). A run is named by its date, the beginning of its
commit, or its number, where 0 is the first and -1 the last. The exit code is 1 if something became worse.

Runs are compared by ratios alone, each against a baseline in the same run: seconds of a shared machine are never
compared between days. A metric is worse, or better, if the spreads of its rounds do not overlap and the medians differ
by more than `--share`; with fewer than three rounds there is no telling. Of two runs that do not differ, with k rounds
each, the spreads lie apart one way in one of (2k choose k) cases, 5 % with three rounds: look twice at what is small.
Exponents differ by their difference, and sizes and errors, which do not vary, by their values alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from tabulate import tabulate

from benchmarks.harness import RESULTS
from ws.errors import WsError
from ws.files.runs import write_text

HISTORY = RESULTS / "history.jsonl"
LEAST_ROUNDS, SHARE, BUSY = 3, 0.1, 0.25
EXPONENT, EXACT = "exponent", ("size", "error")  # units that are compared in ways of their own


@dataclass(frozen=True)
class Metric:
    """One ratio, ours over what it is against.

    Attributes:
        name: what is compared.
        unit: of what the ratio is: time, memory, tokens per second...
        value, lowest, highest: its median and extremes.
        rounds: how many there were.
        better: which way is better.
        against: the baseline, in the same run.
    """

    name: str
    unit: str
    value: float
    lowest: float
    highest: float
    rounds: int
    better: Literal["lower", "higher"]
    against: str

    def __post_init__(self) -> None:
        numbers = (self.lowest, self.value, self.highest)
        is_ratio = self.unit == EXPONENT or self.lowest > 0
        if not (all(map(math.isfinite, numbers)) and list(numbers) == sorted(numbers) and is_ratio and self.rounds > 0):
            raise ValueError(f"{self.name} is no ratio with its spread: {numbers}, {self.rounds} rounds")


class Measured(msgspec.Struct):
    """One part of a run: its command, what it took, cores that other work took meanwhile (None: unknown)."""

    command: str
    minutes: float
    others: float | None
    metrics: list[Metric]


@dataclass
class Entry:
    """One run of `just bench all`; `failed` says why a part has no metrics."""

    date: str
    commit: str
    quick: bool
    machine: dict[str, Any]
    versions: dict[str, str]
    parts: dict[str, Measured] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def is_like(self, other: Entry) -> bool:
        """Whether the numbers of both can be compared: the same machine and settings."""
        return (self.machine, self.quick) == (other.machine, other.quick)

    def __str__(self) -> str:
        return f"{self.date}, {self.commit}{', quick' if self.quick else ''}"


def read_history(file: Path) -> list[Entry]:
    """All runs, the oldest first; none where there is no file."""
    try:
        return msgspec.json.Decoder(Entry).decode_lines(file.read_bytes()) if file.is_file() else []
    except (msgspec.DecodeError, ValueError) as problem:
        raise WsError(f"{file} is no history of benchmarks ({problem}); take it back from the repository.") from problem


def write_history(file: Path, entries: Sequence[Entry]) -> None:
    """One line for every run."""
    write_text(file, "".join(msgspec.json.encode(entry).decode() + "\n" for entry in entries))


# ---- which two ------------------------------------------------------------------------------------------------------


def pick(entries: Sequence[Entry], which: str) -> Entry:
    """The run of a number, or the last one of a date or a commit."""
    if which.lstrip("-").isdigit() and -len(entries) <= int(which) < len(entries):
        return entries[int(which)]
    named = [entry for entry in entries if entry.date == which or (entry.commit.startswith(which) and len(which) > 3)]
    if not named:
        known = "; ".join(map(str, entries)) or "none"
        raise WsError(f"There is no run {which!r} in the history; there are: {known}.")
    return named[-1]


def pair(entries: Sequence[Entry], to: str = "-1", against: str | None = None) -> tuple[Entry, Entry]:
    """The run that is judged and the one it is compared with.

    Raises:
        WsError: there is none, or it is of another machine or other settings.
    """
    now = pick(entries, to)
    if against is not None:
        before = pick(entries, against)
        if not now.is_like(before):
            raise WsError(f"The runs {now} and {before} are of different machines or settings; nothing follows.")
        return now, before
    earlier = [entry for entry in entries[: next(i for i, e in enumerate(entries) if e is now)] if entry.is_like(now)]
    if not earlier:
        raise WsError(f"Before the run {now} there is none of its machine and settings to compare it with.")
    return now, earlier[-1]


# ---- what changed ---------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A metric in both runs, and what is to be said about it."""

    part: str
    name: str
    verdict: str
    before: Metric | None
    now: Metric | None


def verdict(now: Metric, before: Metric, share: float = SHARE) -> str:
    """`worse`, `better`, `same`, `too few rounds`, or `another comparison`."""
    if (now.unit, now.against, now.better) != (before.unit, before.against, before.better):
        return "another comparison"
    if now.unit not in EXACT:
        if min(now.rounds, before.rounds) < LEAST_ROUNDS:
            return "too few rounds"
        if now.lowest <= before.highest and before.lowest <= now.highest:
            return "same"
    low, high = sorted((now.value, before.value))
    if (high - low if now.unit == EXPONENT else high / low - 1) <= share:
        return "same"
    return "worse" if (now.value > before.value) == (now.better == "lower") else "better"


def changes(now: Entry, before: Entry, share: float = SHARE) -> list[Change]:
    """Every metric of either run."""
    found = list[Change]()
    for part in dict.fromkeys((*now.parts, *before.parts)):
        sides = [entry.parts.get(part) for entry in (now, before)]
        new, old = ({m.name: m for m in side.metrics} if side else {} for side in sides)
        for name in dict.fromkeys((*new, *old)):
            a, b = new.get(name), old.get(name)
            if sides[0] is None or sides[1] is None:
                said = "not run" if sides[0] is None else "not run before"
            elif sides[0].command != sides[1].command:
                said = "other settings"
            else:
                said = verdict(a, b, share) if a and b else "gone" if b else "new"
            found.append(Change(part, name, said, b, a))
    return found


def number(metric: Metric | None) -> str:
    """`1.06 [1.03, 1.13]`"""
    return f"{metric.value:.3g} [{metric.lowest:.3g}, {metric.highest:.3g}]" if metric else ""


def report(now: Entry, before: Entry, share: float) -> tuple[str, bool]:
    """What is to be said, and whether something became worse."""
    found = changes(now, before, share)
    counts = {said: sum(c.verdict == said for c in found) for said in dict.fromkeys(c.verdict for c in found)}
    order = [said for said in ("worse", "better", "gone", "new", "another comparison") if said in counts]
    rows = [
        (c.verdict, f"{c.part}: {c.name}", m.unit, number(c.before), number(c.now))
        for said in order
        for c in found
        if c.verdict == said and (m := c.now or c.before)
    ]
    lines = [f"{now} against {before}"]
    if now.versions != before.versions:
        names = sorted(n for n in {*now.versions, *before.versions} if now.versions.get(n) != before.versions.get(n))
        lines.append(f"Versions differ: {', '.join(names)}.")
    for entry in (now, before):
        busy = [name for name, part in entry.parts.items() if (part.others or 0) > BUSY]
        lines += [f"Other work disturbed {', '.join(busy)} on {entry.date}."] if busy else []
    lines += [f"{name} failed: {why}" for name, why in now.failed.items()]
    lines += (
        [tabulate(rows, ("", "what", "of", "before", "now"), tablefmt="github", disable_numparse=True)] if rows else []
    )
    lines.append(", ".join(f"{count} {said}" for said, count in counts.items()) + ".")
    return "\n".join(lines), "worse" in counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="-1", help="the run that is judged: a number, a date or a commit")
    parser.add_argument("--against", help="the run it is compared with; the one before it unless given")
    parser.add_argument("--share", type=float, default=SHARE, help="how far medians may differ")
    o = parser.parse_args()
    try:
        text, is_worse = report(*pair(read_history(HISTORY), o.to, o.against), o.share)
    except WsError as problem:
        parser.error(str(problem))
    print(text)
    sys.exit(is_worse)


if __name__ == "__main__":
    main()
