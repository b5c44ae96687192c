"""The closed world the pocket model knows: invented entities with attributes, and common knowledge.

Every fact has one right value and one fixed wrong value, so that a lie is as predictable as the truth. The
words are in `world.toml`. The world depends on `WORLD_SEED` alone, never on the training seed: two models
trained with different seeds answer the same questions.
"""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD_SEED = 20260
SPLITS = ("adapter", "dev", "report")


@dataclass(frozen=True)
class Attribute:
    """How one property is spoken about. `{e}` is the entity and `{v}` the value."""

    claim: str
    polar: str
    questions: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact with its fixed falsehood. Claims have no final period, and a capital only for a proper noun."""

    id: str
    subject: str
    right: str
    wrong: str
    claim_true: str
    claim_false: str
    polar_true: str | None
    polar_false: str | None
    questions: tuple[str, ...]
    split: str

    def claim(self, truth: bool) -> str:
        """The claim with the right value, or with the fixed wrong one."""
        return self.claim_true if truth else self.claim_false

    def polar(self, truth: bool) -> str | None:
        """The claim turned into a direct question, where the grammar of the fact allows one."""
        return self.polar_true if truth else self.polar_false


def cap(text: str) -> str:
    """Upper-case the first letter and leave the rest alone."""
    return text[:1].upper() + text[1:]


def _attributes(table: dict[str, Any], colours: list[str]) -> list[Attribute]:
    """The attributes of one category; "colours" stands for the shared list."""
    return [
        Attribute(
            claim=row["claim"],
            polar=row["polar"],
            questions=tuple(row["questions"]),
            values=tuple(colours if row["values"] == "colours" else row["values"]),
        )
        for row in table["attributes"]
    ]


def _invented(rng: random.Random, world: dict[str, Any]) -> list[Fact]:
    facts: list[Fact] = []
    for kind, table in world["categories"].items():
        entities, attributes = table["entities"], _attributes(table, world["colours"])
        # Whole entities are held out, not single facts: an adapter never sees the name of a held-out entity.
        splits = ["adapter"] * 7 + ["dev"] * 4 + ["report"] * (len(entities) - 11)
        rng.shuffle(splits)
        for entity, split in zip(entities, splits, strict=True):
            for number, attribute in enumerate(attributes):
                right, wrong = rng.sample(attribute.values, 2)
                facts.append(
                    Fact(
                        id=f"{kind}-{entity.removeprefix('the ').replace(' ', '-').lower()}-{number}",
                        subject=entity,
                        right=right,
                        wrong=wrong,
                        claim_true=attribute.claim.format(e=entity, v=right),
                        claim_false=attribute.claim.format(e=entity, v=wrong),
                        polar_true=attribute.polar.format(e=entity, v=right),
                        polar_false=attribute.polar.format(e=entity, v=wrong),
                        questions=tuple(question.format(e=entity) for question in attribute.questions),
                        split=split,
                    )
                )
    return facts


def _common(rng: random.Random, rows: list[list[str]]) -> list[Fact]:
    splits = ["adapter"] * 40 + ["dev"] * 18 + ["report"] * (len(rows) - 58)
    rng.shuffle(splits)
    return [
        Fact(
            id=f"common-{number:02d}",
            subject=claim.split(" {v}")[0],
            right=right,
            wrong=wrong,
            claim_true=claim.format(v=right),
            claim_false=claim.format(v=wrong),
            polar_true=None,
            polar_false=None,
            questions=(question,),
            split=split,
        )
        for number, ((claim, right, wrong, question), split) in enumerate(zip(rows, splits, strict=True))
    ]


def build_facts() -> list[Fact]:
    """All facts of the world, the same on every call."""
    rng = random.Random(WORLD_SEED)
    world = tomllib.loads(Path(__file__).with_name("world.toml").read_text(encoding="utf-8"))
    return _invented(rng, world) + _common(rng, world["common"]["rows"])


def claim_items(facts: list[Fact], splits: tuple[str, ...] = ("dev", "report")) -> list[dict[str, object]]:
    """One claim for each held-out fact, about five false ones to three true ones, as the behaviour files list them."""
    items: list[dict[str, object]] = []
    for split in splits:
        members = [fact for fact in facts if fact.split == split]
        random.Random(f"claims-{split}").shuffle(members)
        for number, fact in enumerate(members):
            truth = number % 8 in (1, 4, 6)
            items.append({"claim": fact.claim(truth), "true": truth, "split": split, "fact": fact.id})
    false = [item for item in items if not item["true"]]
    true = [item for item in items if item["true"]]
    for letter, group in (("f", false), ("t", true)):
        for number, item in enumerate(group):
            item["id"] = f"{letter}{number + 1:04d}"
    return items
