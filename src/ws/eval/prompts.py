"""Instruction texts that a TOML file can replace, and what the rows of an evaluation call its words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ws.behaviors import check_slots
from ws.errors import WsError, decoded, did_you_mean
from ws.files.reading import parse_toml, read_bytes

Texts = TypeVar("Texts")

# The words of a row: this project's own, for items of its own or a behaviour's; this project's, for items that others
# published with words of theirs; those that the items were published with; or `file:<name>@<hash>` of a prompts file.
OWN, PARAPHRASE, PUBLISHED = "own", "paraphrase", "published"


def load_prompts(defaults: Texts, file: Path | None, required: Mapping[str, tuple[str, ...]]) -> Texts:
    """`defaults`, a frozen dataclass of texts, with those of a TOML file put in their place.

    The file may also give its words a `name`; see `words_of`.

    Args:
        required: the slots that a template must contain, by the template's name; it may contain no others.

    Raises:
        WsError: an unreadable file, unknown keys, values that are no text, wrong slots, or no prompt text at all.
    """
    if file is None:
        return defaults
    given = {key: value for key, value in _parsed(file).items() if key != "name"}
    names = [f.name for f in fields(defaults)]  # type: ignore[arg-type]
    if not given:
        raise WsError(f"{file} has no prompt text; there are {', '.join(names)}.")
    for key, value in given.items():
        if key not in names or not isinstance(value, str):
            hint = did_you_mean(key, names)
            raise WsError(f"{file}: {key!r} is not a prompt text; there are {', '.join(names)}.{hint}")
        if key in required:
            check_slots(value, required[key], f"{file}: {key}")
    return replace(defaults, **given)  # type: ignore[type-var]


def own_words(source: str) -> str:
    """What this project's words for items of a source are called: `own` for the bundled items, else `paraphrase`."""
    return OWN if source == "pocket" else PARAPHRASE


def words_of(file: Path | None, default: str, asked: Sequence[str]) -> str:
    """What the rows of an evaluation call the words that they were asked in.

    Args:
        file: a prompts file. Its words are called `file:<name>@<hash>`, by its key `name` or else by its own name
            without the suffix, and by the first eight digits of its SHA-256 (as `sha256sum` prints it).
        default: what the words are called without a file, `OWN`, `PARAPHRASE` or `PUBLISHED`.
        asked: the questions that are put. Where the file lacks one of them, ` + <default>` follows.
    """
    if file is None:
        return default
    given = _parsed(file)
    name = given.get("name", file.stem)
    if not isinstance(name, str) or not name.strip():
        raise WsError(f"{file}: name must be a text that names these words, not {name!r}.")
    plain = re.sub(r"[^\w .-]", "-", name.strip())[:60]
    rest = "" if all(key in given for key in asked) else f" + {default}"
    return f"file:{plain}@{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}{rest}"


def words_note(words: str | None, of: str = "") -> str:
    """What a reader of a table must know of its words, as a sentence; empty for `own` and `published` words, and where
    nothing is on record.

    Args:
        of: which words, where a table has rows of several evaluations.
    """
    if not words or words in (OWN, PUBLISHED):
        return ""
    about = f"Words{f' of {of}' if of else ''}: {words}"
    if words.endswith(PARAPHRASE):
        return (
            f"{about}, which is this project's and not the published text (that can be given as --prompts); "
            "the sign of a small effect can depend on it."
        )
    return f"{about}; numbers in other words are not comparable."


def notes_on(row: Mapping[str, Any], of: str = "") -> list[str]:
    """What a reader of an evaluation's table must know of its items and words, from any of its rows, as sentences."""
    drawn = row.get("drawn")
    part = "" if drawn in (None, "", "all") else f"Items{f' of {of}' if of else ''}: a draw of {drawn} (--limit)."
    return [note for note in (part, words_note(row.get("words"), of)) if note]


def notes_by_score(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same of a table whose rows are of several scores."""
    return list(dict.fromkeys(note for row in rows for note in notes_on(row, str(row["score"]).replace("_", " "))))


def check_same(asked: Mapping[str, Mapping[str, Any]]) -> None:
    """`WsError` when runs that would stand in one table were asked other items, or in other words.

    Args:
        asked: a row of each run's evaluation, by the run's name.
    """
    first = next(iter(asked), "")
    for name, row in asked.items():
        if row.get("eval_hash") != asked[first].get("eval_hash"):
            pair = (row, asked[first])
            theirs, ours = (f"{r.get('words') or 'not on record'}, items {r.get('eval_hash')}" for r in pair)
            raise WsError(
                f"{name} was asked other items or words than {first} (words {theirs}; there words {ours}), so they do "
                "not go into one table; evaluate them again with the same options."
            )


def _parsed(file: Path) -> dict[str, Any]:
    content = read_bytes(file, "give a file of prompts")
    try:
        return parse_toml(decoded(content, str(file)))
    except WsError as problem:
        raise WsError(f"The prompts file {file} cannot be read: {problem}") from problem
