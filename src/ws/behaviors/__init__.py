"""Behaviours: who answers (personas), what is asked (questions), and what is held out to measure the effect.

What is held out are claims, or questions with both answers (preferences), or both. Instead of personas and questions a
behaviour may name pairs that somebody brings. A behaviour is one TOML file. `load_behavior("honesty")` reads a bundled
one (the variant made for the model, when there is one), `load_behavior("my.toml")` a user's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from ws.behaviors.answered import HELD_OUT, SOURCE_KEYS, TRAIN, plain_question, read_preferences
from ws.behaviors.answered import Preference as Preference
from ws.behaviors.rubric import MOST_POINTS, POINTS, RUBRIC_KEYS, Rubric, generic_rubric, read_known
from ws.behaviors.tables import SUFFIXES
from ws.errors import WsError, choose, decoded, did_you_mean
from ws.files.places import is_plain_name, plain_name
from ws.files.reading import parse_toml, read_bytes
from ws.files.runs import write_text

SCHEMA = 1
SPLITS = ("dev", "report")
SIDES = ("positive", "negative")
# What the tables of a file may hold.
TOP_KEYS = frozenset(
    {"schema", "name", "summary", "personas", "questions", "pairs", "claims", "preferences", "statements", "judge"}
    | {"keep_refusals", "rubric"}
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
Value = TypeVar("Value")


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
        digest: SHA-256 of the file without `[rubric]` (and of the files it takes claims, pairs and preferences from).
        keep_refusals: a refusal is an answer like any other, so pairs that hold one are not dropped.
        pairs: brought pairs to train on; none where answers are sampled under the personas.
        preferences: held-out questions with both answers, of the splits `dev` and `report`.
        traits: names of sets of statements that somebody with the behaviour would say (`ws.eval.statements`).
        rubric: how free answers are rated (`ws.eval.answers`).
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
    rubric: Rubric = field(default_factory=Rubric)

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


def load_behavior(name: str | os.PathLike[str], model: str | None = None) -> Behavior:
    """A bundled behaviour by name, or a user's TOML file by path.

    Args:
        name: a bundled behaviour (see `bundled_behaviors`), or a path that ends in `.toml`.
        model: for `pocket` and `tiny-random` the variant written for the pocket model's small world is taken.

    Raises:
        WsError: unknown name, unreadable file, or content that breaks the schema; the message names the field.
    """
    if not isinstance(name, str | os.PathLike):
        raise WsError(f"A behaviour is the name of a bundled one or the path of a .toml file, not {name!r}.")
    return read_draft(os.fspath(name), model, strict=True).behavior


def read_draft(name: str, model: str | None = None, strict: bool = False) -> Draft:
    """The same, with all that is wrong with the file instead of the first problem; see `parse_behavior`."""
    file = behavior_file(name, model)
    return parse_behavior(
        read_bytes(file, "give a behaviour file"), str(Path(name).expanduser()), file.parent, model, strict
    )


def behavior_name(name: str) -> str:
    """What runs of a behaviour are filed under: its own name, also when it is given by its file's path."""
    return load_behavior(name).name if name.endswith(".toml") else plain_name(name, "a behaviour")


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
    table |= named_columns(columns, sorted(SOURCE_KEYS - {"file", "hub", "revision"}))
    called = table["hub"].rpartition("/")[2] if "hub" in table else Path(table["file"]).stem
    name = re.sub(r"[^\w.-]+", "-", called).strip("-.") or "pairs"
    lines = [f"schema = {SCHEMA}", f"name = {json.dumps(name)}"]
    lines += [f"summary = {json.dumps(f'Answers as the positive side of {name} does.')}", "", "[pairs]"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]
    file, content = out / "behaviors" / f"{name}.toml", "\n".join(lines) + "\n"
    if file.exists() and read_bytes(file, "move it away") != content.encode():
        raise WsError(f"{file} exists and says something else; use --behavior {file}, or move it away.")
    parse_behavior(content.encode(), str(file), file.parent, strict=True)  # what does not load is not written
    write_text(file, content)
    return str(file)


def named_columns(columns: Sequence[str], roles: Sequence[str]) -> dict[str, str]:
    """Columns by their roles, from options such as `question:prompt`; `WsError` for others than these roles."""
    named = dict[str, str]()
    for text in columns:
        role, colon, column = text.partition(":")
        if not (colon and column.strip()):
            raise WsError(f"--columns takes role:column, such as question:prompt, not {text!r}.")
        named[choose("role of a column", role, roles)] = column
    return named


def _source_of(pairs: str) -> dict[str, str]:
    """The keys of a table `[pairs]` that say where pairs are from."""
    path = Path(pairs).expanduser()
    if path.is_file():
        return {"file": str(path.resolve())}
    source, _, revision = pairs.partition("@")
    if Path(source).suffix in SUFFIXES or source.count("/") != 1 or pairs.startswith((".", "/", "~")):
        raise WsError(f"There is no file {path}; --pairs takes .jsonl, .csv, .parquet, or a hub id such as owner/name.")
    return {"hub": source} | ({"revision": revision} if revision else {})


def bundled_file(name: str, model: str | None) -> Path:
    """The file of a bundled behaviour, in the model's variant; `WsError` with the nearest name for another."""
    choose("behaviour", name, bundled_behaviors())
    folder = Path(str(files("ws.behaviors")))
    pocket = folder / "pocket" / f"{name}.toml"
    return pocket if model in _POCKET_MODELS and pocket.is_file() else folder / f"{name}.toml"


def placed_texts(behavior: Behavior, claims: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Every text of a behaviour that goes into a prompt or an answer, with its place.

    Args:
        behavior: whose.
        claims: the places of its claims in the file, unless every item there is one.
    """
    sides = zip(SIDES, (behavior.positive, behavior.negative), strict=True)
    placed = [(f"[personas] {side} {n}", p) for side, texts in sides for n, p in enumerate(texts, start=1)]
    asked = () if behavior.pairs else behavior.questions  # else they are those of the pairs
    placed += [(f"[questions] {n}", q) for n, q in enumerate(asked, start=1)]
    for table, rows in (("[pairs]", behavior.pairs), ("[preferences]", behavior.preferences)):
        placed += [(f"{table} {p.id}", text) for p in rows for text in (p.question, p.positive, p.negative)]
    if (test := behavior.claims) is not None:
        placed += [(f"[claims] {key}", getattr(test, key)) for key in ("question", "opener", "agree", "disagree")]
        places = claims or [f"[claims] item {n}" for n in range(1, len(test.claims) + 1)]
        placed += zip(places, (claim.text for claim in test.claims), strict=True)
    return [*placed, ("judge", behavior.judge)]


# ---- the parser -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One problem of a behaviour file.

    Attributes:
        severity: `error` (it cannot be run, or would measure nothing) or `warning` (it runs, and this limits it).
        where: the place in the file.
        text: what is wrong and what to do, in a sentence.
    """

    severity: str
    where: str
    text: str


@dataclass
class Draft:
    """A behaviour file as far as it can be read, and what is wrong with it.

    Attributes:
        file: what the file is called.
        strict: raise the first problem that keeps the file from being loaded, and look for no others.
        findings: so far.
        behavior: what could be read; what could not is empty.
        places: of the claims in the file, one for each.
        claims_known: whether the truth and the split of every claim could be read.
        borrowed: the bundled behaviour that the claims are from; empty where they are its own.
    """

    file: str
    strict: bool = False
    findings: list[Finding] = field(default_factory=list)
    behavior: Behavior = Behavior("", "", (), (), (), None, "", "")
    places: list[str] = field(default_factory=list)
    claims_known: bool = True
    borrowed: str = ""

    @property
    def valid(self) -> bool:
        """Whether no error was found."""
        return all(f.severity != "error" for f in self.findings)

    @property
    def claims(self) -> list[tuple[str, Claim]]:
        """The claims with their places."""
        test = self.behavior.claims
        return [] if test is None else list(zip(self.places, test.claims, strict=True))

    def refuse(self, where: str, text: str) -> None:
        """Note what keeps the file from being loaded; strict reading ends here with a `WsError`."""
        if self.strict:
            raise WsError(f"{self.file}: {where}: {text}")
        self.error(where, text)

    def error(self, where: str, text: str) -> None:
        """Note what can be loaded and would measure nothing."""
        self.findings.append(Finding("error", where, text))

    def warn(self, where: str, text: str) -> None:
        """Note what limits the file's results."""
        self.findings.append(Finding("warning", where, text))

    def attempt(self, where: str, read: Callable[[], Value]) -> Value | None:
        """What `read` gives; None after noting why it gives nothing."""
        try:
            return read()
        except WsError as problem:
            self.refuse(where, str(problem).removeprefix(where).lstrip(": "))
            return None


def parse_behavior(content: bytes, file: str, folder: Path, model: str | None = None, strict: bool = False) -> Draft:
    """The content of a behaviour file.

    Args:
        content: TOML.
        file: what the file is called, for messages.
        folder: that the files it names are beside.
        model: which variant of a bundled behaviour claims are borrowed from; see `load_behavior`.
        strict: raise the first problem instead of listing all. What is merely doubtful is listed.

    Raises:
        WsError: when strict, the first problem; it names the file, the place and the key.
    """
    draft = Draft(file, strict)
    raw = _toml(draft, content)
    if raw is None:
        return draft
    raw = _known(draft, raw, TOP_KEYS, "top level")
    name, summary = _top(draft, raw)
    pairs, preferences, read = _answered(draft, raw, folder)
    positive, negative = _personas(draft, raw)
    questions = _questions(draft, raw, pairs, preferences)
    test, borrowed = _claim_test(draft, raw, model)
    table = _table(draft, raw, "statements", STATEMENT_KEYS) if "statements" in raw else None
    generic_judge = f"Does the answer fit this description: {summary} Answer Yes or No."
    draft.behavior = Behavior(
        name=name,
        summary=summary,
        positive=positive,
        negative=negative,
        questions=questions,
        claims=test,
        judge=_text(draft, raw, "judge", "top level") if "judge" in raw else generic_judge,
        digest=hashlib.sha256(_without_rubric(content, raw) + borrowed + read).hexdigest(),
        keep_refusals=raw.get("keep_refusals") is True,
        pairs=pairs,
        preferences=preferences,
        traits=() if table is None else _texts(draft, table, "traits", "[statements]"),
        rubric=_rubric(draft, raw, folder, summary),
    )
    _check_held_out(draft)
    return draft


def _toml(draft: Draft, content: bytes) -> dict[str, Any] | None:
    try:
        return parse_toml(decoded(content, "The text in"))
    except WsError as problem:
        line = re.search(r"line \d+", str(problem))
        draft.refuse(line.group() if line else "end of file", str(problem))
        return None


def _top(draft: Draft, raw: Mapping[str, Any]) -> tuple[str, str]:
    """The name and the summary, after a look at what else stands outside the tables."""
    if raw.get("schema") != SCHEMA:
        draft.refuse("schema", f"It must be {SCHEMA}, not {raw.get('schema')!r}.")
    if not isinstance(raw.get("keep_refusals", False), bool):
        draft.refuse("keep_refusals", "It must be true or false.")
    name = _text(draft, raw, "name", "top level")
    if name and not (FOLDER_NAME.fullmatch(name) and is_plain_name(name)):
        draft.refuse("name", f"{name!r} names a folder; use letters, digits, dots, - and _ only.")
    return name, _text(draft, raw, "summary", "top level")


def _answered(
    draft: Draft, raw: Mapping[str, Any], folder: Path
) -> tuple[tuple[Preference, ...], tuple[Preference, ...], bytes]:
    """The pairs to train on, the held-out preferences, and the content of where both are from."""
    pairs, preferences, content = list[Preference](), list[Preference](), b""
    for key in ("pairs", "preferences"):
        where = f"[{key}]"
        table = _table(draft, raw, key, SOURCE_KEYS) if key in raw else None
        if table is None:
            continue
        source = draft.attempt(where, partial(read_preferences, table, folder, where, train=key == "pairs"))
        if source is None:
            continue
        pairs += [p for p in source[0] if p.split == TRAIN and key == "pairs"]
        known = {p.id for p in preferences}  # rows are numbered in either source
        held_out = [p for p in source[0] if p.split in HELD_OUT]
        preferences += [replace(p, id=f"{key}-{p.id}") if p.id in known else p for p in held_out]
        content += source[1]
        if key == "pairs" and not pairs:
            draft.refuse(where, f"There is no pair of the split {TRAIN}, so there is nothing to train on.")
    return tuple(pairs), tuple(preferences), content


def _personas(draft: Draft, raw: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The system prompts of either side; with brought pairs there need be none."""
    table = _table(draft, raw, "personas", PERSONA_KEYS) if "personas" in raw or "pairs" not in raw else None
    if table is None:
        return (), ()
    where = "[personas]"
    template = _template(draft, table, "template", "persona", where) if "template" in table else "{persona}"
    words = [_texts(draft, table, side, where) for side in SIDES]
    if all(words) and len(words[0]) != len(words[1]):
        many = f"{len(words[0])} positive and {len(words[1])} negative personas"
        draft.refuse(where, f"There are {many}; pair them, the n-th with the n-th.")
    positive, negative = (tuple(template.format(persona=p) for p in side) for side in words)
    for number, (a, b) in enumerate(zip(positive, negative, strict=False), start=1):
        if a == b:
            text = f"positive {number} and negative {number} are the same persona on both sides, {a!r}"
            draft.refuse(where, f"{text}; they must differ.")
    return positive, negative


def _questions(
    draft: Draft, raw: Mapping[str, Any], pairs: Sequence[Preference], preferences: Sequence[Preference]
) -> tuple[str, ...]:
    """What both sides are asked; of brought pairs, what they are about and what is held out for development."""
    if "pairs" in raw:
        if "questions" in raw:
            draft.refuse("[pairs]", "They stand in the place of [questions]; remove one of them.")
        return tuple(dict.fromkeys(p.question for p in (*pairs, *(p for p in preferences if p.split == "dev"))))
    table = _table(draft, raw, "questions", QUESTION_KEYS)
    if table is None:
        return ()
    where = "[questions]"
    templates = _texts(draft, table, "templates", where) if "templates" in table else ("{topic}",)
    usable = [t for t in templates if _has_slot(draft, t, "topic", where)]
    topics = _texts(draft, table, "topics", where)
    return tuple(template.format(topic=topic) for template in usable for topic in topics)


def _claim_test(draft: Draft, raw: Mapping[str, Any], model: str | None) -> tuple[ClaimTest | None, bytes]:
    """The held-out claims, which only what has preferences may lack; and the file that they are borrowed from."""
    if "claims" not in raw and ("pairs" in raw or "preferences" in raw):
        return None, b""
    where, borrowed = "[claims]", b""
    lends = isinstance(raw.get("claims"), dict) and "source" in raw["claims"]
    table = _table(draft, raw, "claims", BORROWING_KEYS if lends else CLAIM_KEYS)
    if table is None:
        return None, b""
    effect = table.get("effect")
    if type(effect) is not int or effect not in (-1, 1):  # to Python `true` is 1
        effect = 1
        draft.refuse(where, f"effect must be 1 or -1, not {table.get('effect')!r}.")
    if lends:
        source = _text(draft, table, "source", where)
        file = draft.attempt(where, partial(bundled_file, source, model)) if source else None
        if file is None:
            return None, b""
        draft.borrowed, borrowed = source, file.read_bytes()
        table = parse_toml(borrowed.decode("utf-8"))["claims"] | {"effect": table.get("effect")}
    about, opener = str(table.get("about", "facts")), table.get("opener", "")
    if not isinstance(opener, str):
        draft.refuse(where, f"opener must be a text, empty for none, not {opener!r}.")
        opener = ""
    draft.attempt(where, partial(choose, "subject of claims", about, CLAIMS_ABOUT))
    test = ClaimTest(
        question=_template(draft, table, "question", "claim", where),
        opener=opener,
        agree=_text(draft, table, "agree", where),
        disagree=_text(draft, table, "disagree", where),
        effect=effect,
        claims=_claims(draft, table.get("items")),
        about=about,
    )
    agree, disagree = (plain_words(answer) or answer.strip() for answer in (test.agree, test.disagree))
    if test.agree and agree == disagree:
        draft.refuse(where, f"agree and disagree are the same answer, {test.agree!r}; they must differ.")
    return test, borrowed


def _claims(draft: Draft, items: Any) -> tuple[Claim, ...]:
    if not isinstance(items, list) or not items:
        draft.refuse("[claims]", "items must be a non-empty list of claims; without them no effect can be measured.")
        return ()
    claims = list[Claim]()
    for number, item in enumerate(items, start=1):
        place = f"[claims] item {number}"
        if not isinstance(item, dict):
            draft.refuse(place, "It must be a table with id, claim, true and split.")
            draft.claims_known = False
            continue
        claim = _claim(draft, _known(draft, item, ITEM_KEYS, place), place)
        if claim.text:
            claims.append(claim)
            draft.places.append(place)
    for twice, count in _twice(c.id for c in claims if c.id).items():
        draft.refuse("[claims]", f"The id {twice!r} is given to {count} claims; give each its own.")
    _check_repeated(draft, [c.text for c in claims], "[claims] items", same=str.lower)
    return tuple(claims)


def _claim(draft: Draft, item: Mapping[str, Any], place: str) -> Claim:
    claim_id, text = _text(draft, item, "id", place), _text(draft, item, "claim", place)
    is_true, split = item.get("true"), str(item.get("split", "report"))
    if not isinstance(is_true, bool):
        draft.refuse(place, f"true must be true or false; the claim {text!r} has no known answer.")
    if split not in SPLITS:
        draft.refuse(place, f"There is no split named {split!r}.{did_you_mean(split, SPLITS)}")
    draft.claims_known &= isinstance(is_true, bool) and split in SPLITS
    return Claim(claim_id, text, is_true is True, split)


def _rubric(draft: Draft, raw: Mapping[str, Any], folder: Path, summary: str) -> Rubric:
    """How free answers are rated; in the words of the summary where the file does not say."""
    table = _table(draft, raw, "rubric", RUBRIC_KEYS) if "rubric" in raw else None
    if table is None:
        return generic_rubric(summary)
    where = "[rubric]"
    trait, low, high = (_text(draft, table, key, where) for key in ("trait", "low", "high"))
    if low and low.strip() == high.strip():
        draft.refuse(where, f"low and high mean the same, {low!r}; they must differ.")
    points = table.get("points", POINTS)
    if type(points) is not int or not 2 <= points <= MOST_POINTS:
        draft.refuse(where, f"points must be a whole number from 2 to {MOST_POINTS}, not {points!r}.")
        points = POINTS
    file = _text(draft, table, "known", where) if "known" in table else ""
    known = draft.attempt(where, partial(read_known, folder / file, where)) if file else None
    return Rubric(trait, low, high, points, known or ())


# Up to the next table, with one empty line before it and none behind it: what stays is the file as it was without.
_RUBRIC = re.compile(rb"^(?:\r?\n)?\[rubric\][^\n]*(?:\n|\Z)(?:(?:\r?\n)*[^\[\r\n][^\n]*(?:\n|\Z))*", re.MULTILINE)


def _without_rubric(content: bytes, raw: Mapping[str, Any]) -> bytes:
    """A file's content without the table `[rubric]`, which nothing that is trained depends on.

    So a rubric can be written when the vectors are there. Where the table cannot be cut out by its first line and the
    start of the next table, as from within a text of several lines, all of the content counts.
    """
    if "rubric" not in raw:
        return content
    rest = _RUBRIC.sub(b"", content, count=1)
    try:
        same = parse_toml(decoded(rest, "The text in")) == {key: v for key, v in raw.items() if key != "rubric"}
    except WsError:
        same = False
    return rest if same else content


def _check_held_out(draft: Draft) -> None:
    """What is held out must not be in a question that is trained on: neither a claim in it, nor a question as it is.

    Nor may a question be `dev` in one table and `report` in the other.
    """
    behavior = draft.behavior
    folded = [(q, q.lower()) for q in behavior.questions]
    for place, claim in draft.claims:
        text = claim.text.lower()
        question = next((q for q, lower in folded if text in lower), None)
        if question is not None:
            draft.refuse(place, f"The held-out claim {claim.text!r} occurs in the question {question!r}; remove one.")
    asked = [p.question for p in behavior.pairs] if behavior.pairs else behavior.questions
    splits = {plain_question(q): TRAIN for q in asked}
    for p in behavior.preferences:
        split = splits.setdefault(plain_question(p.question), p.split)
        if split == TRAIN:
            text = f"The held-out question {p.question!r} ({p.id}) is trained on; remove it from one."
            draft.refuse("[preferences]", text)
        elif split != p.split:
            text = f"The question {p.question!r} ({p.id}) is in the splits {split} and {p.split}; remove it from one."
            draft.refuse("[preferences]", text)


# ---- tables and texts -----------------------------------------------------------------------------------------------


def _table(draft: Draft, raw: Mapping[str, Any], key: str, known: frozenset[str]) -> dict[str, Any] | None:
    """The table of that name with its known keys; None after noting that there is none."""
    if isinstance(raw.get(key), dict):
        return _known(draft, raw[key], known, f"[{key}]")
    draft.refuse(f"[{key}]", f"The table [{key}] is missing.")
    return None


def _known(draft: Draft, table: Mapping[str, Any], known: frozenset[str], where: str) -> dict[str, Any]:
    """The table with its known keys; a misspelt one is noted and read as the missing one that it is nearest to."""
    entries = {key: value for key, value in table.items() if key in known}
    for key in sorted(table.keys() - known):
        missing = known - entries.keys()
        draft.refuse(where, f"There is no key {key!r} here.{did_you_mean(key, missing) or ' Remove it.'}")
        for meant in get_close_matches(key, missing, n=1, cutoff=0.5):
            entries[meant] = table[key]
    return entries


def _text(draft: Draft, table: Mapping[str, Any], key: str, where: str) -> str:
    """A text; empty after noting that there is none."""
    value = table.get(key)
    if isinstance(value, str) and value.strip():
        return value
    draft.refuse(where, f"{key} must be a non-empty string.")
    return ""


def _texts(draft: Draft, table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """A list of different texts; empty after noting that there is no usable one."""
    value = table.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        draft.refuse(where, f"{key} must be a non-empty list of non-empty strings.")
        return ()
    _check_repeated(draft, value, f"{where} {key}")
    return tuple(value)


def _template(draft: Draft, table: Mapping[str, Any], key: str, slot: str, where: str) -> str:
    """A text with one slot; the slot alone after noting that there is none."""
    template = _text(draft, table, key, where)
    return template if template and _has_slot(draft, template, slot, where) else f"{{{slot}}}"


def _has_slot(draft: Draft, template: str, slot: str, where: str) -> bool:
    problem = slot_problem(template, [slot])
    if problem:
        draft.refuse(where, problem)
    return not problem


def _check_repeated(draft: Draft, texts: Sequence[str], where: str, same: Callable[[str], str] = str) -> None:
    """Refuse texts that occur twice, up to `same`; differing in case is an error, in marks and spaces a warning."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(plain_words(text), []).append(text)
    for alike in groups.values():
        if len(set(map(str.lower, alike))) < len(alike):
            note = draft.refuse if len(set(map(same, alike))) < len(alike) else draft.error
            note(where, f"{alike[0]!r} occurs {len(alike)} times; keep one.")
        elif len(alike) > 1:
            draft.warn(where, f"{alike[0]!r} and {alike[1]!r} have the same words; keep one.")


def _twice(values: Iterable[str]) -> dict[str, int]:
    """Values that occur more than once, and how often."""
    return {value: count for value, count in Counter(values).items() if count > 1}


def plain_words(text: str) -> str:
    """Lower case, words only, single spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def check_slots(template: str, slots: Sequence[str], where: str) -> None:
    """`WsError` unless a template contains exactly these slots, each as it is: without a conversion or a format."""
    problem = slot_problem(template, slots)
    if problem:
        raise WsError(f"{where}: {problem}")


def slot_problem(template: str, slots: Sequence[str]) -> str:
    """Why a template does not contain exactly these slots, each as it is; empty when it does."""
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as problem:
        return f"the template {template!r} is malformed ({problem}); a plain {{ is written {{{{."
    for _, name, form, conversion in fields:
        if form or conversion:
            text = f"the template {template!r} asks for a format of the slot {name!r}"
            return f"{text}; write {{{name}}} without anything behind the name."
    if {name for _, name, _, _ in fields} != set(slots):
        wanted = " and ".join(f"{{{slot}}}" for slot in slots)
        return f"the template {template!r} must contain {wanted} and no other slot."
    return ""
