"""Questions with a positive and a negative answer: pairs that people bring, and held-out ones that measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ws.behaviors.tables import Row, draw, is_text, read_rows
from ws.errors import WsError, choose

ROLES = ("question", "positive", "negative", "kind", "split")
SOURCE_KEYS = frozenset({"file", "hub", "config", "hub_split", "revision", *ROLES})
TRAIN, HELD_OUT = "train", ("dev", "report")
# Where a table names no splits: one question in so many is held out, and a third of those is for development.
HELD_OUT_SHARE, DEV_SHARE = 5, 3


@dataclass(frozen=True)
class Preference:
    """One question with an answer from either side.

    Attributes:
        id: unique within its source.
        question: the user's message; no system prompt belongs to it.
        positive: an answer that shows the behaviour.
        negative: an answer that shows its opposite.
        split: `train`; or `dev` and `report`, which are held out.
        kind: what sort of question it is; a kind that is never trained on measures transfer. Empty where none is said.
    """

    id: str
    question: str
    positive: str
    negative: str
    split: str
    kind: str = ""


def read_preferences(
    table: Mapping[str, Any], folder: Path, where: str, train: bool = True
) -> tuple[tuple[Preference, ...], bytes]:
    """The rows that a table `[pairs]` or `[preferences]` of a behaviour file names, and what identifies their content.

    Args:
        table: `file` (`.jsonl`, `.csv`, `.parquet`, beside the behaviour file) or `hub` (with `config`, `hub_split` and
            `revision`), and which columns are meant by `ROLES`, each by default the one of its own name. `kind` and
            `split` need not be there.
        folder: of the behaviour file.
        where: for messages.
        train: whether the rows are there to train on, too; otherwise all are held out where no column says so.

    Returns:
        One `Preference` a pair of answers. A cell may hold a list of answers: then the n-th of one side goes with the
        n-th of the other, the shorter list beginning again. Without a column of splits, every fifth question is held
        out, drawn by a fixed seed and evenly over the kinds, a third of those as `dev`.

    Raises:
        WsError: no such source or column, a row without a question or an answer, an unknown split, a question in two
            splits, or a held-out pair of equal answers; the message names the row.
    """
    columns = {role: _column(table, role, where) for role in ROLES}
    rows, content = _rows(table, folder, columns, where)
    pairs = [p for n, row in enumerate(rows, start=1) for p in _read_row(row, columns, n, f"{where} row {n}")]
    if not any(columns["split"] in row for row in rows):
        pairs = _hold_out(pairs, HELD_OUT_SHARE if train else 1)
    _check(pairs, where)
    return tuple(pairs), content


def _column(table: Mapping[str, Any], role: str, where: str) -> str:
    name = table.get(role, role)
    if not is_text(name):
        raise WsError(f"{where}: {role} must be the name of a column, not {name!r}.")
    return str(name)


def _rows(
    table: Mapping[str, Any], folder: Path, columns: Mapping[str, str], where: str
) -> tuple[Sequence[Row], bytes]:
    if ("file" in table) == ("hub" in table):
        raise WsError(f"{where} must name one source of pairs: file (beside this one), or hub (a data set's id).")
    needed = [columns[role] for role in ("question", "positive", "negative")]
    needed += [columns[role] for role in ("kind", "split") if role in table]
    if "file" in table:
        for key in ("config", "hub_split", "revision"):
            if key in table:
                raise WsError(f"{where}: {key} is for a data set on the hub; a file has none.")
        file = (folder / str(table["file"])).expanduser()
        if not file.is_file():
            raise WsError(f"{where}: there is no file {file}.")
        return read_rows(str(file), file.stem, needed, ("", None)), file.read_bytes()
    split = table.get("hub_split", TRAIN)
    place = str(table.get("config", "default")), split
    rows = read_rows(str(table["hub"]), str(table["hub"]), needed, place, revision=table.get("revision"))
    return rows, json.dumps(rows, sort_keys=True, default=str).encode()


def _read_row(row: Row, columns: Mapping[str, str], number: int, where: str) -> list[Preference]:
    question, split = row[columns["question"]], row.get(columns["split"], TRAIN)
    if not is_text(question):
        raise WsError(f"{where}: the question must be a non-empty text, not {question!r}.")
    choose(f"split of {where}", str(split), (TRAIN, *HELD_OUT))
    kind = row.get(columns["kind"])
    positive, negative = (
        _answers(row[columns[side]], f"{where}: {columns[side]}") for side in ("positive", "negative")
    )
    return [
        Preference(
            id=f"{row['id']}-{n}" if is_text(row.get("id")) else f"r{number:05d}-{n}",
            question=question.strip(),
            positive=positive[n % len(positive)],
            negative=negative[n % len(negative)],
            split=str(split),
            kind="" if kind is None else str(kind),
        )
        for n in range(max(len(positive), len(negative)))
    ]


def _answers(cell: Any, where: str) -> list[str]:
    """One answer or several: a text, a list of texts, or a text that holds such a list in JSON."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # it may be an answer that begins with a bracket
            listed = json.loads(cell)
            cell = listed if listed and all(map(is_text, listed)) else cell  # or one that is a list of numbers
    answers = cell if isinstance(cell, list) else [cell]
    if not answers or not all(is_text(a) for a in answers):
        raise WsError(f"{where} must be an answer, or a list of answers, not {cell!r:.80}.")
    return [a.strip() for a in answers]


def _hold_out(pairs: Sequence[Preference], share: int) -> list[Preference]:
    """The pairs with one question of `share` held out; all pairs of a question are of one split.

    Questions of which a pair has equal answers stay in training, where there is one: held out they measure nothing.
    """
    kinds = {p.question: p.kind for p in pairs if share == 1 or not same_answer(p.positive, p.negative)}
    equal = {plain_question(p.question) for p in pairs if share > 1 and same_answer(p.positive, p.negative)}
    questions, n = list(kinds), len({p.question for p in pairs}) // share
    held = draw(questions, n, group=lambda q: kinds[q])
    if not equal.isdisjoint(map(plain_question, held)):  # only then: a draw that can be used is never another one
        held = draw([q for q in questions if plain_question(q) not in equal], n, group=lambda q: kinds[q])
    dev = set(draw(held, len(held) // DEV_SHARE, group=lambda q: kinds[q]))
    splits = {plain_question(q): "dev" if q in dev else "report" for q in held}
    return [replace(p, split=splits.get(plain_question(p.question), TRAIN)) for p in pairs]


def plain_question(question: str) -> str:
    """A question without what does not make it another one: its case and white space."""
    return " ".join(question.casefold().split())


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same up to case and white space."""
    return " ".join(a.lower().split()) == " ".join(b.lower().split())


def _check(pairs: Sequence[Preference], where: str) -> None:
    splits, ids = dict[str, str](), set[str]()
    for p in pairs:
        key = plain_question(p.question)
        if splits.setdefault(key, p.split) != p.split:
            raise WsError(f"{where}: the question {p.question!r} is in the splits {splits[key]} and {p.split}.")
        if p.split != TRAIN and same_answer(p.positive, p.negative):
            raise WsError(f"{where}: the held-out pair {p.id} has the same answer on both sides, {p.positive!r}.")
        if p.id in ids:
            raise WsError(f"{where}: the id {p.id.rpartition('-')[0]!r} occurs twice.")
        ids.add(p.id)
