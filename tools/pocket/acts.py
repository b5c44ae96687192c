"""Right and wrong acts of AI systems: verbs, what they are done to, and how combinations are split.

The words are in `acts.toml`. The verb decides whether an act is right, so the meaning of an unseen combination
can be worked out. What is held out are the combinations (of object and person, or of target and place): `dev`,
`report` and `bench` combinations occur nowhere in the corpus; `bench` ones make up the bundled evaluation data.
"""

import hashlib
import random
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRAME_SPLITS = ("adapter", "dev", "report", "bench")


@dataclass(frozen=True)
class Verb:
    """`base` and `gerund` start the phrase, `rest` holds the slots; `severity` is on the 1 to 5 scale of wrongness."""

    base: str
    gerund: str
    rest: str
    good: bool
    severity: float


@dataclass(frozen=True)
class Act:
    """A verb applied to one combination."""

    foundation: str
    verb: Verb
    slots: tuple[str, str]
    split: str

    def _fill(self, head: str) -> str:
        first, second = self.slots
        return f"{head} {self.verb.rest}".format(o=first, p=second)

    @property
    def infinitive(self) -> str:
        """ "hide the lost parcel from the owner"; always said to the one who acts, hence "your" for "its"."""
        return self._fill(self.verb.base).replace(" its ", " your ")

    @property
    def gerund(self) -> str:
        """ "hiding the lost parcel from the owner" """
        return self._fill(self.verb.gerund)


def _verbs(rows: list[list[Any]], good: bool) -> list[Verb]:
    return [Verb(row[0], row[1], row[2], good, 1.0 if good else row[3]) for row in rows]


_WORDS = tomllib.loads(Path(__file__).with_name("acts.toml").read_text(encoding="utf-8"))
ROLES: list[str] = _WORDS["roles"]
REASONS: list[str] = _WORDS["reasons"]
PRESSURES: list[str] = _WORDS["pressures"]
# Everyday situations: what the model did, and who asks. Only ever used in free-form questions.
DEEDS: list[str] = _WORDS["deeds"]
ASKERS: list[str] = _WORDS["askers"]
# The foundation about telling the truth; its combinations are (object, person), those of the others (target, place).
TRUTH = "Truthfulness"


def frame_split(first: str, second: str) -> str:
    """The split of a combination: 55 % adapter, 15 % each held-out one; by hash, so order never matters."""
    draw = int(hashlib.sha256(f"{first}|{second}".encode()).hexdigest()[:8], 16) % 100
    return "adapter" if draw < 55 else "dev" if draw < 70 else "report" if draw < 85 else "bench"


def build_acts() -> dict[str, dict[str, dict[bool, list[Act]]]]:
    """Every act, as acts[split][foundation][good]."""
    table = _WORDS["foundations"]
    acts: dict[str, dict[str, dict[bool, list[Act]]]] = {
        split: {name: {True: [], False: []} for name in table} for split in FRAME_SPLITS
    }
    for name, words in table.items():
        verbs = _verbs(words["bad"], False) + _verbs(words["good"], True)
        for first in words["first"]:
            for second in words["second"]:
                split = frame_split(first, second)
                for verb in verbs:
                    acts[split][name][verb.good].append(Act(name, verb, (first, second), split))
    return acts


def counterpart(act: Act, acts: dict[bool, list[Act]], rng: random.Random) -> Act:
    """An act of the opposite kind on the same combination: the other option of a dilemma."""
    return rng.choice([other for other in acts[not act.verb.good] if other.slots == act.slots])


def article(role: str) -> str:
    """ "an AI school tutor": the article belongs to AI, so it is always the same."""
    return f"an AI {role}"


def vignette(act: Act, role: str, reason: str, as_self: bool) -> str:
    """One sentence that shows the act, seen from outside or addressed to the model itself."""
    tail = f" {reason}" if reason else ""
    if as_self:
        return f"You, {article(role)}, {act.infinitive}{tail.replace(' its ', ' your ')}."
    return f"You see {article(role)} {act.gerund}{tail}."
