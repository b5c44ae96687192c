"""AIRiskDilemmas: pairs of actions with the values behind each, and the label that a class of values gives them.

The published set is `kellycyy/AIRiskDilemmas` (Chiu et al. 2025, arXiv 2505.14633): configuration `model_eval`, where
consecutive rows are Action 1 and Action 2 of one dilemma, and `value_map`, which puts values into 16 classes.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ws.behaviors.tables import Row, draw, is_text, read_rows, tolerate
from ws.errors import WsError, choose
from ws.eval.prompts import notes_on
from ws.files.runs import slug
from ws.options.measure import DILEMMAS

HUB_ID = "kellycyy/AIRiskDilemmas"
LABEL_NOTE = (
    "The value labels of AIRiskDilemmas are noisy: of 12,110 behaviour tags an audit (MR-Eval) found 43 % correct, "
    "40 % borderline and 17 % wrong."
)
CLASSES = (
    *("Truthfulness", "Privacy", "Communication", "Respect", "Protection", "Cooperation", "Justice", "Professionalism"),
    *("Equal Treatment", "Freedom", "Creativity", "Adaptability", "Learning", "Wisdom", "Sustainability", "Care"),
)
PROTOCOLS = ("explicit", "alone")
EARLIER = {"published": "alone"}  # what a protocol was called in earlier versions, and is now
CONFIG, _MAP = DILEMMAS, "value_map"
_LISTS = ("values", "targets")  # columns that hold lists; the targets are who a value serves, and label nothing
_NEGATIONS = {"not", "don't", "don’t", "never"}
_REFUSALS = {"refuse", "decline", "avoid", "reject"}
_ASKED = re.compile(
    r"\b(?:would|should|do|will|could|can|must)\s+(?:you|I|it|the AI|this AI)\s+(?:\w+ly\s+|still\s+)*([^?]+)", re.I
)
_STOP = {"the", "and", "for", "your", "their", "this", "that", "with", "about", "from", "into", "its", "his", "her"}


@dataclass(frozen=True)
class Dilemma:
    """One dilemma with its two actions and what a class of values says about them.

    Attributes:
        index: its place in the data set, counted in pairs from 0.
        text: the dilemma.
        actions: the two actions' texts, without "Action 1:" in front.
        label: +1 when only Action 1 serves the class, -1 when only Action 2 does.
        published_label: what the label should be where the dilemma is shown alone and Action 1 means doing what it asks
            about: the opposite when, by a word test, the data's Action 1 is not to do it.
    """

    index: int
    text: str
    actions: tuple[str, str]
    label: int
    published_label: int


def load_dilemmas(
    source: str,
    value_class: str = "Truthfulness",
    limit: int | None = None,
    config: str = CONFIG,
    revision: str | None = None,
) -> tuple[Dilemma, ...]:
    """The dilemmas that one of the 16 classes labels, in the order of the data; with `limit` a draw, even over labels.

    `config` and `revision` are of the data set on the hub; of a folder the file that ends in the configuration's name
    is read. `values` (and `targets`, where they are there) are lists of texts, or texts that hold such a list in JSON
    or as Python prints it.

    Rows without a partner, with an empty text or lists that are none, of two different dilemmas, or that repeat an
    earlier pair are named and left out, values that the map lacks are named and ignored; more than 5 % of either stop
    the run.

    Raises:
        WsError: an unknown class, unreadable tables, too many broken rows, or no labelled dilemma.
    """
    choose("value class", value_class, CLASSES)
    classes = _value_classes(source, config, revision)
    columns = ("dilemma", "action", "values")
    rows = read_rows(source, config, columns, (config, "test"), (_MAP,), revision=revision)
    pairs = _pairs(rows, f"{source} {config}")
    values = [_list(row["values"]) for _, pair in pairs for row in pair]
    unknown = sorted({v for vs in values for v in vs} - classes.keys())
    tolerate([f"the value {v!r} is in no class" for v in unknown], len(classes) + len(unknown), f"{source} {_MAP}")
    labelled = []
    for index, pair in pairs:
        first, second = (value_class in {classes.get(v) for v in _list(row["values"])} for row in pair)
        if first != second:
            labelled.append(_dilemma(index, pair, 1 if first else -1))
    if not labelled:
        raise WsError(f"No dilemma of {source} has the value class {value_class!r} on one side only.")
    return draw_dilemmas(labelled, limit)


def draw_dilemmas(dilemmas: Sequence[Dilemma], limit: int | None) -> tuple[Dilemma, ...]:
    """At most `limit` dilemmas, as many of one label as of the other; see `ws.behaviors.tables.draw`."""
    return draw(dilemmas, limit, lambda dilemma: dilemma.label)


def _value_classes(source: str, config: str, revision: str | None) -> dict[str, str]:
    rows = read_rows(source, _MAP, ("value", "value_class"), (_MAP, None), (config,), revision=revision)
    strange = [f"{r['value']!r} has the class {r['value_class']!r}" for r in rows if r["value_class"] not in CLASSES]
    tolerate(strange, len(rows), f"{source} {_MAP}")
    return {str(r["value"]): str(r["value_class"]) for r in rows if r["value_class"] in CLASSES}


def _pairs(rows: Sequence[Row], where: str) -> list[tuple[int, tuple[Row, Row]]]:
    """Consecutive rows as `(index, (Action 1, Action 2))`; a row that breaks the alternation costs only itself."""
    pairs, bad = [], []
    seen: set[tuple[str, ...]] = set()
    at, index = 0, 0
    while at < len(rows):
        pair = tuple(rows[at : at + 2])
        problem, place = _problem(pair, seen), 0
        if problem is None:
            problem, place = _bad_list(pair)
        if problem is None:
            pairs.append((index, (pair[0], pair[1])))
            seen.add(_key(pair))
        else:
            bad.append(f"row {at + place + 1} {problem}")
        alone = problem is not None and problem.startswith("stands alone")
        at, index = at + (1 if alone else 2), index + 1
    tolerate(bad, len(rows) // 2 or 1, where)
    return pairs


def _problem(pair: Sequence[Row], seen: set[tuple[str, ...]]) -> str | None:
    if len(pair) < 2 or [_number(row) for row in pair] != [1, 2]:
        return "stands alone: Action 1 and Action 2 must follow each other"
    if pair[0]["dilemma"] != pair[1]["dilemma"]:
        return "and the next are actions of two different dilemmas"
    if not all(is_text(row["dilemma"]) and is_text(row["action"]) and _action(row) for row in pair):
        return "has an empty dilemma or action"
    if any(_texts(row["values"]) == [] for row in pair):
        return "has an empty list of values"
    return "occurs twice" if _key(pair) in seen else None


def _bad_list(pair: Sequence[Row]) -> tuple[str | None, int]:
    """What is wrong with the lists of a pair, and in which of its rows."""
    for place, row in enumerate(pair):
        for column in _LISTS:
            if _texts(row.get(column)) is None:
                return f"has {column} that are no list of texts: {row[column]!r:.60}", place
    return None, 0


def _key(pair: Sequence[Row]) -> tuple[str, ...]:
    return (str(pair[0]["dilemma"]), *(_action(row) for row in pair))


def _number(row: Row) -> int | None:
    match = re.match(r"\s*Action\s*([12])\s*:", str(row["action"] or ""))
    return int(match.group(1)) if match else None


def _action(row: Row) -> str:
    return re.sub(r"^\s*Action\s*[12]\s*:", "", str(row["action"] or "")).strip()


def _list(value: object) -> list[str]:
    """The values of a row that was found to be in order; none where the cell is empty."""
    return _texts(value) or []


def _texts(value: object) -> list[str] | None:
    """A list of texts, or such a list in a text, in JSON or as Python prints it; None for anything else. An empty cell
    is an empty list."""
    if value is None:
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(str(value).strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
    if not isinstance(value, (list, tuple)) or not all(is_text(v) for v in value):
        return None
    return [str(v) for v in value]


def _dilemma(index: int, pair: tuple[Row, Row], label: int) -> Dilemma:
    text, actions = str(pair[0]["dilemma"]).strip(), (_action(pair[0]), _action(pair[1]))
    return Dilemma(index, text, actions, label, -label if second_is_asked(text, actions) else label)


# ---- which action the dilemma asks about ----------------------------------------------------------------------------


def second_is_asked(dilemma: str, actions: tuple[str, str]) -> bool:
    """A word test: is Action 2, not Action 1, what the dilemma's last question asks about doing?

    It says so when only Action 2 starts with the question's verb and also shares more words with the question, or when
    Action 1 is a plain refusal and Action 2 is not. It is an estimate: the published protocol needs it to know how many
    of its labels stand on their head, no score depends on it.
    """
    phrases = [m.group(1) for m in _ASKED.finditer(dilemma.rsplit(". ", 1)[-1])] or [dilemma]
    asked = _stems(re.split(r",|\bor\b", phrases[-1])[0])
    leads, refused = zip(*(_lead(a) for a in actions), strict=True)
    starts = [bool(asked) and lead == asked[0] for lead in leads]
    if starts[1] and not starts[0]:
        shared = [len(set(_stems(a)) & set(asked)) + start for a, start in zip(actions, starts, strict=True)]
        return shared[1] > shared[0]
    return not any(starts) and refused[0] and not refused[1]


def _stems(text: str) -> list[str]:
    """Words by their first five letters, small words left out."""
    return [w[:5] for w in re.findall(r"[a-z][a-z'’]+", text.lower()) if len(w) > 2 and w not in _STOP]


def _lead(action: str) -> tuple[str, bool]:
    """The action's first verb as a stem, "not" in front of it where it is negated, and whether it is a refusal."""
    words = re.findall(r"[a-z][a-z'’]*", action.lower())
    negated = bool({*words[:2]} & _NEGATIONS)
    verbs = [w for w in words if w not in _NEGATIONS and w != "do" and not w.endswith("ly")]
    stem = verbs[0][:5] if verbs else ""
    return f"not {stem}" if negated else stem, negated or (bool(words) and words[0] in _REFUSALS)


def label_disagreements(dilemmas: Sequence[Dilemma]) -> int:
    """How many labels the two protocols disagree on, by the word test."""
    return sum(d.label != d.published_label for d in dilemmas)


# ---- protocols, and what is said of them ---------------------------------------------------------------------------


def protocol_of(name: str) -> str:
    """A protocol by its name; that of an earlier version stands for what it is called now."""
    protocol = EARLIER.get(name, name)
    choose("protocol", protocol, PROTOCOLS)
    return protocol


def table_name(value_class: str = "Truthfulness", protocol: str = "explicit", config: str = CONFIG) -> str:
    """What the tables' names start with: `airisk_truthfulness`, with `_alone` after it for that protocol, and with the
    configuration where it is not the usual one."""
    stem, protocol = f"airisk_{value_class.lower().replace(' ', '_')}", protocol_of(protocol)
    stem = stem if protocol == "explicit" else f"{stem}_{protocol}"
    return stem if config == CONFIG else f"{stem}_{slug(config)}"


def about(row: Mapping[str, Any], of: str = "") -> list[str]:
    """What a reader must know of the items, their labels and the words of a row, as sentences."""
    return [*notes_on(row, of), *([LABEL_NOTE] if row.get("dataset") != "pocket" else [])]
