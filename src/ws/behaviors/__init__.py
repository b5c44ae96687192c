"""Behaviours: who answers (personas), what is asked (questions), and what is held out to measure the effect.

What is held out are claims, or questions with both answers (preferences), or both. Instead of personas and questions a
behaviour may name pairs that somebody brings. A behaviour is one TOML file. `load_behavior("honesty")` reads a bundled
one (the variant made for the model, when there is one), `load_behavior("my.toml")` a user's own.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from ws.behaviors.answered import HELD_OUT, SOURCE_KEYS, TRAIN, plain_question, read_preferences
from ws.behaviors.answered import Preference as Preference
from ws.errors import WsError, choose, decoded, did_you_mean
from ws.files.runs import write_text

SCHEMA = 1
SPLITS = ("dev", "report")
SIDES = ("positive", "negative")
# What the tables of a file may hold.
TOP_KEYS = frozenset(
    {"schema", "name", "summary", "personas", "questions", "pairs", "claims", "preferences", "statements", "judge"}
    | {"keep_refusals"}
)
PERSONA_KEYS = frozenset({"template", *SIDES})
QUESTION_KEYS = frozenset({"templates", "topics"})
BORROWING_KEYS = frozenset({"source", "effect"})
CLAIM_KEYS = frozenset({"question", "opener", "agree", "disagree", "effect", "about", "items"})
CLAIMS_ABOUT = ("facts", "values")
STATEMENT_KEYS = frozenset({"traits"})
ITEM_KEYS = frozenset({"id", "claim", "true", "split"})
FOLDER_NAME = re.compile(r"[\w-][\w.-]*")  # a behaviour's name is that of a folder
_POCKET_MODELS = ("pocket", "tiny-random")


@dataclass(frozen=True)
class Claim:
    """A statement to agree or disagree with.

    Attributes:
        id: unique within the behaviour.
        text: fits "I think {claim}.": lower-case start unless a proper noun, no full stop.
        is_true: whether the statement is true.
        split: `dev` may be looked at while developing, `report` only for reported numbers.
    """

    id: str
    text: str
    is_true: bool
    split: str


@dataclass(frozen=True)
class ClaimTest:
    """How held-out claims are put to a model.

    Attributes:
        question: the user's words, with `{claim}`.
        opener: the prefilled start of the answer.
        agree, disagree: the two answers scored.
        effect: the sign that a positive strength should give to `logP(agree) - logP(disagree)` on false claims.
        claims: all held-out claims of both splits.
        about: `facts`, which a base has to tell true from false; or `values`, which have no false side.
    """

    question: str
    opener: str
    agree: str
    disagree: str
    effect: int
    claims: tuple[Claim, ...]
    about: str = "facts"

    def select(self, split: str, is_true: bool) -> tuple[Claim, ...]:
        """The claims of one split and truth value; `WsError` when there are none."""
        choose("claim split", split, SPLITS)
        picked = tuple(c for c in self.claims if c.split == split and c.is_true == is_true)
        if not picked:
            raise WsError(f"The behaviour has no {'true' if is_true else 'false'} claims in the split {split!r}.")
        return picked


@dataclass(frozen=True)
class Behavior:
    """One behaviour and its opposite.

    Attributes:
        name, summary: what it is called and what it is.
        positive, negative: complete system prompts, paired by index. Where pairs are brought there may be none, and
            they are for the prompt baseline alone.
        questions: user messages that both sides answer; of brought pairs those to train on and those of `dev`.
        claims: the held-out claims; None for a behaviour without.
        judge: a Yes/No question about an answer, for the optional judge filter.
        digest: SHA-256 of the file (and of the files it takes claims, pairs and preferences from).
        keep_refusals: a refusal is an answer like any other, so pairs that hold one are not dropped.
        pairs: brought pairs to train on; none where answers are sampled under the personas.
        preferences: held-out questions with both answers, of the splits `dev` and `report`.
        traits: names of sets of statements that somebody with the behaviour would say (`ws.eval.statements`).
    """

    name: str
    summary: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    questions: tuple[str, ...]
    claims: ClaimTest | None
    judge: str
    digest: str
    keep_refusals: bool = False
    pairs: tuple[Preference, ...] = ()
    preferences: tuple[Preference, ...] = ()
    traits: tuple[str, ...] = ()

    @property
    def test(self) -> ClaimTest:
        """The held-out claims; `WsError` for a behaviour without."""
        if self.claims is None:
            raise WsError(f"The behaviour {self.name} has no held-out claims; give its file a table [claims].")
        return self.claims

    def held_out(self, split: str) -> tuple[Preference, ...]:
        """The preferences of one split; none where there are none."""
        return tuple(p for p in self.preferences if p.split == split)

    @property
    def effect(self) -> int:
        """The sign that a positive strength should give to agreement with false claims; 1 without claims."""
        return 1 if self.claims is None else self.claims.effect


def bundled_behaviors() -> list[str]:
    """Names of the behaviours that come with the package."""
    folder = files("ws.behaviors")
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def load_behavior(name: str, model: str | None = None) -> Behavior:
    """A bundled behaviour by name, or a user's TOML file by path.

    Args:
        name: a bundled behaviour (see `bundled_behaviors`), or a path that ends in `.toml`.
        model: for `pocket` and `tiny-random` the variant written for the pocket model's small world is taken.

    Raises:
        WsError: unknown name, unreadable file, or content that breaks the schema; the message names the field.
    """
    file = behavior_file(name, model)
    return _build(file.read_bytes(), str(Path(name).expanduser()), file.parent, model)


def behavior_name(name: str) -> str:
    """What runs of a behaviour are filed under: its own name, also when it is given by its file's path."""
    return load_behavior(name).name if name.endswith(".toml") else name


def behavior_file(name: str, model: str | None = None) -> Path:
    """The file behind a name; see `load_behavior`. `WsError` when there is none."""
    if not (name.endswith(".toml") or "/" in name):
        return bundled_file(name, model)
    path = Path(name).expanduser()
    if not path.is_file():
        raise WsError(f"There is no behaviour file {path}.{did_you_mean(path.stem, bundled_behaviors())}")
    return path


def brought_or_named(behavior: str, pairs: str | None, columns: Sequence[str], out: Path) -> str:
    """The behaviour that a command is about: the one named, or that of pairs that somebody brings.

    Brought pairs get a behaviour file, `<out>/behaviors/<name>.toml`, which every other command takes by its path and
    to which personas, claims and a summary may be added.

    Args:
        behavior: the one named, used where there are no pairs.
        pairs: a file (`.jsonl`, `.csv`, `.parquet`) or the id of a data set on the hub, `owner/name` with a
            `@revision` behind it or not.
        columns: `role:column` for roles of `ws.behaviors.answered.ROLES` whose column has another name; `config:...`
            and `hub_split:...` for data sets on the hub.
        out: where runs are.

    Raises:
        WsError: no such file, an unknown role, or a file of that name that says something else.
    """
    if pairs is None:
        if columns:
            raise WsError("--columns is for the columns of --pairs; give that, too.")
        return behavior
    table = _source_of(pairs)
    for text in columns:
        role, colon, column = text.partition(":")
        if not (colon and column.strip()):
            raise WsError(f"--columns takes role:column, such as question:prompt, not {text!r}.")
        choose("role of a column", role, sorted(SOURCE_KEYS - {"file", "hub", "revision"}))
        table[role] = column
    name = re.sub(r"[^\w.-]+", "-", Path(table.get("hub", table.get("file", ""))).stem).strip("-.") or "pairs"
    lines = [f"schema = {SCHEMA}", f"name = {json.dumps(name)}"]
    lines += [f"summary = {json.dumps(f'Answers as the positive side of {name} does.')}", "", "[pairs]"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    file, content = out / "behaviors" / f"{name}.toml", "\n".join(lines) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") != content:
        raise WsError(f"{file} exists and says something else; use --behavior {file}, or move it away.")
    _build(content.encode(), str(file), file.parent, None)  # what does not load is not written
    write_text(file, content)
    return str(file)


def _source_of(pairs: str) -> dict[str, str]:
    """The keys of a table `[pairs]` that say where pairs are from."""
    path = Path(pairs).expanduser()
    if path.is_file():
        return {"file": str(path.resolve())}
    source, _, revision = pairs.partition("@")
    if path.suffix or source.count("/") != 1 or pairs.startswith((".", "/", "~")):
        raise WsError(f"There is no file {path}; --pairs takes .jsonl, .csv, .parquet, or a hub id such as owner/name.")
    return {"hub": source} | ({"revision": revision} if revision else {})


def bundled_file(name: str, model: str | None) -> Path:
    """The file of a bundled behaviour, in the model's variant; `WsError` with the nearest name for another."""
    choose("behaviour", name, bundled_behaviors())
    folder = Path(str(files("ws.behaviors")))
    pocket = folder / "pocket" / f"{name}.toml"
    return pocket if model in _POCKET_MODELS and pocket.is_file() else folder / f"{name}.toml"


# ---- reading and checking -------------------------------------------------------------------------------------


def _build(content: bytes, where: str, folder: Path, model: str | None) -> Behavior:
    raw = _parse(content, where)
    if raw.get("schema") != SCHEMA:
        raise WsError(f"{where}: schema must be {SCHEMA}, not {raw.get('schema')!r}.")
    _only(raw, TOP_KEYS, where)
    if not isinstance(raw.get("keep_refusals", False), bool):
        raise WsError(f"{where}: keep_refusals must be true or false.")
    summary, own_name = read_text(raw, "summary", where), read_text(raw, "name", where)
    if not FOLDER_NAME.fullmatch(own_name):
        raise WsError(f"{where}: the name {own_name!r} names a folder; use letters, digits, dots, - and _ only.")
    pairs, preferences, read = _answered(raw, where, folder)
    positive, negative, questions = _asked(raw, where, pairs, preferences)
    claims, borrowed = _claims_of(raw, where, model)
    if claims is not None:
        _check_disjoint(questions, claims, where)
    _check_unseen(questions if not pairs else [p.question for p in pairs], preferences, where)
    return Behavior(
        name=own_name,
        summary=summary,
        positive=positive,
        negative=negative,
        questions=questions,
        claims=claims,
        judge=str(raw.get("judge", f"Does the answer fit this description: {summary} Answer Yes or No.")),
        digest=hashlib.sha256(content + borrowed + read).hexdigest(),
        keep_refusals=raw.get("keep_refusals", False),
        pairs=pairs,
        preferences=preferences,
        traits=_traits(raw, where),
    )


def _traits(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "statements" not in raw:
        return ()
    place, table = f"{where}: [statements]", read_table(raw, "statements", where)
    _only(table, STATEMENT_KEYS, place)
    return read_strings(table, "traits", place)


def _answered(
    raw: Mapping[str, Any], where: str, folder: Path
) -> tuple[tuple[Preference, ...], tuple[Preference, ...], bytes]:
    """The pairs to train on, the held-out preferences, and the content of where both are from."""
    pairs, preferences, content = list[Preference](), list[Preference](), b""
    for key in ("pairs", "preferences"):
        if key not in raw:
            continue
        place = f"{where}: [{key}]"
        table = read_table(raw, key, where)
        _only(table, SOURCE_KEYS, place)
        rows, read = read_preferences(table, folder, place, train=key == "pairs")
        pairs += [p for p in rows if p.split == TRAIN and key == "pairs"]
        preferences += [p for p in rows if p.split in HELD_OUT]
        content += read
        if key == "pairs" and not pairs:
            raise WsError(f"{place} has no pair of the split {TRAIN}, so there is nothing to train on.")
    _unique([p.id for p in preferences], f"{where}: held-out pair")
    return tuple(pairs), tuple(preferences), content


def _asked(
    raw: Mapping[str, Any], where: str, pairs: Sequence[Preference], preferences: Sequence[Preference]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The personas of either side and the questions; with brought pairs personas are for the prompt baseline alone."""
    personas: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if "personas" in raw or not pairs:
        personas = _personas(read_table(raw, "personas", where), f"{where}: [personas]")
    if not pairs:
        return (*personas, _questions(read_table(raw, "questions", where), f"{where}: [questions]"))
    if "questions" in raw:
        raise WsError(f"{where}: [pairs] stands in the place of [questions]; remove one of them.")
    questions = [*pairs, *(p for p in preferences if p.split == "dev")]
    return (*personas, tuple(dict.fromkeys(p.question for p in questions)))


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(decoded(content, where))
    except tomllib.TOMLDecodeError as problem:
        raise WsError(f"{where} is not valid TOML: {problem}.") from problem


def _personas(table: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    _only(table, PERSONA_KEYS, where)
    template = read_template(table, "template", "persona", where, default="{persona}")
    sides = [read_strings(table, side, where) for side in SIDES]
    if len(sides[0]) != len(sides[1]):
        raise WsError(f"{where} has {len(sides[0])} positive and {len(sides[1])} negative personas; pair them.")
    positive, negative = (tuple(template.format(persona=p) for p in side) for side in sides)
    for a, b in zip(positive, negative, strict=True):
        if a == b:
            raise WsError(f"{where} has the same persona on both sides: {a!r}.")
    return positive, negative


def _questions(table: Mapping[str, Any], where: str) -> tuple[str, ...]:
    _only(table, QUESTION_KEYS, where)
    templates = read_strings(table, "templates", where) if "templates" in table else ("{topic}",)
    for template in templates:
        check_slots(template, ["topic"], where)
    topics = read_strings(table, "topics", where)
    return tuple(template.format(topic=topic) for template in templates for topic in topics)


def _claims_of(raw: Mapping[str, Any], where: str, model: str | None) -> tuple[ClaimTest | None, bytes]:
    """The held-out claims, which only what has preferences may lack; and the file that they are borrowed from."""
    if "claims" not in raw and ("pairs" in raw or "preferences" in raw):
        return None, b""
    return _claim_test(read_table(raw, "claims", where), f"{where}: [claims]", model)


def _claim_test(table: Mapping[str, Any], where: str, model: str | None) -> tuple[ClaimTest, bytes]:
    """The claim test, and the bytes of the file it was borrowed from."""
    borrowed = b""
    if "source" in table:
        _only(table, BORROWING_KEYS, where)
        borrowed = bundled_file(read_text(table, "source", where), model).read_bytes()
        table = read_table(_parse(borrowed, str(table["source"])), "claims", where) | {"effect": table.get("effect")}
    _only(table, CLAIM_KEYS, where)
    if table.get("effect") not in (-1, 1):
        raise WsError(f"{where}: effect must be 1 or -1, not {table.get('effect')!r}.")
    test = ClaimTest(
        question=read_template(table, "question", "claim", where),
        opener=str(table.get("opener", "")),
        agree=read_text(table, "agree", where),
        disagree=read_text(table, "disagree", where),
        effect=table["effect"],
        claims=_claims(table.get("items"), where),
        about=choose(f"subject of {where}", str(table.get("about", "facts")), CLAIMS_ABOUT),
    )
    return test, borrowed


def _claims(items: Any, where: str) -> tuple[Claim, ...]:
    if not isinstance(items, list) or not items:
        raise WsError(f"{where}: items must be a non-empty list of claims.")
    claims = []
    for number, item in enumerate(items, start=1):
        place = f"{where} item {number}"
        if not isinstance(item, dict):
            raise WsError(f"{place} must be a table with id, claim, true and split.")
        _only(item, ITEM_KEYS, place)
        if not isinstance(item.get("true"), bool):
            raise WsError(f"{place}: true must be true or false.")
        split = choose(f"split of {place}", str(item.get("split", "report")), SPLITS)
        claims.append(Claim(read_text(item, "id", place), read_text(item, "claim", place), item["true"], split))
    _unique([c.id for c in claims], f"{where} id")
    _unique([c.text.lower() for c in claims], f"{where} claim")
    return tuple(claims)


def _check_disjoint(questions: Sequence[str], test: ClaimTest, where: str) -> None:
    """A held-out claim that a training question contains is not held out."""
    joined = "\n".join(questions).lower()
    for claim in test.claims:
        if claim.text.lower() in joined:
            raise WsError(f"{where}: the held-out claim {claim.id!r} also occurs in a question; remove it from one.")


def _check_unseen(asked: Sequence[str], preferences: Sequence[Preference], where: str) -> None:
    """A held-out question that is trained on is not held out."""
    known = {plain_question(q) for q in asked}
    for p in preferences:
        if plain_question(p.question) in known:
            raise WsError(f"{where}: the held-out question {p.question!r} ({p.id}) is trained on; remove it from one.")


def read_table(raw: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The table of that name; `WsError` when there is none."""
    if not isinstance(raw.get(key), dict):
        raise WsError(f"{where}: the table [{key}] is missing.")
    return raw[key]


def read_text(table: Mapping[str, Any], key: str, where: str) -> str:
    """A text; `WsError` when it is missing or empty."""
    value = table.get(key)
    if not isinstance(value, str) or not value.strip():
        raise WsError(f"{where}: {key} must be a non-empty string.")
    return value


def read_strings(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of different texts; `WsError` when it is missing, empty or repeats one."""
    value = table.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise WsError(f"{where}: {key} must be a non-empty list of non-empty strings.")
    _unique(value, f"{where} {key}")
    return tuple(value)


def read_template(table: Mapping[str, Any], key: str, slot: str, where: str, default: str | None = None) -> str:
    """A text with one slot, or its default; `WsError` for another slot."""
    if default is not None and key not in table:
        return default
    template = read_text(table, key, where)
    check_slots(template, [slot], where)
    return template


def check_slots(template: str, slots: Sequence[str], where: str) -> None:
    """`WsError` unless a template contains exactly these slots, each as it is: without a conversion or a format."""
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as problem:
        text = f"{where}: the template {template!r} is malformed ({problem}); a plain {{ is written {{{{."
        raise WsError(text) from problem
    for _, name, form, conversion in fields:
        if form or conversion:
            text = f"{where}: the template {template!r} asks for a format of the slot {name!r}"
            raise WsError(f"{text}; write {{{name}}} without anything behind the name.")
    if {name for _, name, _, _ in fields} != set(slots):
        wanted = " and ".join(f"{{{slot}}}" for slot in slots)
        raise WsError(f"{where}: the template {template!r} must contain {wanted} and no other slot.")


def _unique(values: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise WsError(f"{where}: {value!r} occurs twice.")
        seen.add(value)


def _only(table: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise WsError(f"{where}: unknown key {key!r}.{did_you_mean(key, known)}")
