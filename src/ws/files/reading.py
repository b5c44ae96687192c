"""What is read back: JSON, TOML, JSON Lines and tables, each through one reader.

A file may come from a run that was cut off, another version, an editor or a download that failed, so none is believed.
JSON is checked against a type (a dataclass, a `Struct`, `dict[str, float]`), a table for its columns. What does not fit
is a `DamagedError`: the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import RLock
from types import GenericAlias
from typing import Any, TypeVar

import msgspec

from ws import console
from ws.errors import DamagedError, WsError, decoded

T = TypeVar("T")
_CONVERTING = RLock()
_BAD_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError)

csv.field_size_limit(2**31 - 1)  # a text may be a whole book


def read_bytes(file: Path, remedy: str) -> bytes:
    """The content of a file; `DamagedError` when there is none, or something else in its place."""
    try:
        return file.read_bytes()
    except OSError as problem:
        raise DamagedError(f"{file} cannot be read ({problem.strerror}); {remedy}.") from problem


def disguise(content: bytes) -> str:
    """What content is that was put in a file's place, in words that go into brackets; empty where it shows none."""
    start = content[:256].lstrip().lower()
    if not content.strip(b"\0"):
        return "it is empty" if not content else "it holds nothing but zeros"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, as a download that failed leaves it"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git LFS, whose content was not fetched: `git lfs pull`"
    return ""


# ---- JSON and TOML ----------------------------------------------------------------------------------------------


def read_json(file: Path, kind: type[T] | GenericAlias, remedy: str = "make it again", format: int | None = None) -> T:
    """The value in a JSON file, as `kind`.

    Args:
        file: the place.
        kind: any type that `msgspec` knows; keys that it does not name are left out.
        remedy: what to do about a damaged file, as half a sentence.
        format: what its key `format` must be; None for files that have none.

    Raises:
        DamagedError: anything but strict JSON of this type.
        WsError: another format.
    """
    return parse_json(read_bytes(file, remedy), file, kind, remedy, format)


def parse_json(content: bytes, file: Path, kind: type[T] | GenericAlias, remedy: str, format: int | None = None) -> T:
    """The value in the content of a JSON file; see `read_json`."""
    try:
        values = msgspec.json.decode(content)
        if format is not None and isinstance(values, dict) and "format" in values and values["format"] != format:
            raise WsError(
                f"{file} has format {values['format']!r:.40}, and this version reads {format}; use the version that "
                f"wrote it, or {remedy}."
            )
        return convert(values, kind)
    except _BAD_JSON as problem:
        why = disguise(content) or str(problem)
        raise DamagedError(f"{file} is damaged ({why}); {remedy}.") from problem


def convert(value: Any, kind: Any, **how: Any) -> Any:
    """`msgspec.convert`, in one thread at a time: two that meet a type for the first time can end the whole process."""
    with _CONVERTING:
        return msgspec.convert(value, kind, **how)


def parse_toml(text: str) -> dict[str, Any]:
    """The tables in a TOML text; `WsError` with what is wrong, which does not say where the text is from."""
    try:
        return tomllib.loads(text)
    except RecursionError as problem:
        raise WsError("This is not valid TOML: it is nested too deeply.") from problem
    except ValueError as problem:  # a number of too many digits is no TOMLDecodeError
        why = disguise(text.encode()) or str(problem)
        raise WsError(f"This is not valid TOML: {why}.") from problem


def json_lines(content: bytes, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with the number of its line; blank lines hold none.

    Raises:
        DamagedError: anything but whole objects in UTF-8, each key once and without NaN; the message names the line.
    """
    for number, line in enumerate(decoded(content, where).split("\n"), start=1):  # texts may hold other separators
        if not line.strip():
            continue
        try:
            values = strict_json(line)
        except WsError as problem:
            raise DamagedError(f"{where} line {number} is not JSON: {disguise(content) or problem}") from problem
        if not isinstance(values, dict):
            raise DamagedError(f"{where} line {number} is no object but {values!r:.60}.")
        yield number, values


def strict_json(text: str) -> Any:
    """The value of a JSON text, each key once and without NaN; `WsError` with what is wrong."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError as problem:
        raise WsError("it is nested too deeply.") from problem
    except ValueError as problem:  # a number of too many digits is no JSONDecodeError
        raise WsError(f"{str(problem).rstrip('.')}.") from problem


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) < len(items):
        twice = next(key for key, n in Counter(key for key, _ in items).items() if n > 1)
        raise WsError(f"the key {twice!r} stands there twice.")
    return values


def _refuse_constant(name: str) -> float:
    raise WsError(f"{name} is no number there.")


# ---- tables -----------------------------------------------------------------------------------------------------


def parse_csv(content: bytes, where: str) -> list[dict[str, str]]:
    """The rows of a CSV file as texts, by column.

    Raises:
        DamagedError: another encoding, a column named twice, a row with more or fewer cells than there are columns, or
            open quotes; the message names the line.
    """
    reader = csv.reader(io.StringIO(decoded(content, where), newline=""), strict=True)
    rows, header = list[dict[str, str]](), list[str]()
    try:
        for cells in filter(None, reader):
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    raise DamagedError(f"{where} names a column twice: {header!r:.200}.")
            elif len(cells) != len(header):
                why = f"has {len(cells)} cells for {len(header)} columns"
                raise DamagedError(f"{where} line {reader.line_num} {disguise(content) or why}.")
            else:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as problem:
        raise DamagedError(f"{where} line {reader.line_num} is not CSV ({problem}).") from problem
    return rows


def read_csv(
    file: Path,
    texts: Iterable[str] = (),
    numbers: Iterable[str] = (),
    sparse: Iterable[str] = (),
    remedy: str = "run the command that writes it again",
) -> list[dict[str, str]]:
    """The rows of a table written by `write_csv`, as text.

    Args:
        file: the place.
        texts: columns that must be there.
        numbers: columns that must be there and hold a finite number in every row.
        sparse: columns that hold a finite number or nothing in every row, where they are there.
        remedy: what to do about a damaged file, as half a sentence.

    Raises:
        DamagedError: no such file, no table, or one without these columns and numbers.
    """
    content, numbers = read_bytes(file, remedy), list(numbers)
    try:
        rows = parse_csv(content, str(file))
    except WsError as problem:
        raise DamagedError(f"{str(problem).rstrip('.')}; {remedy}.") from problem
    there = rows[0].keys() if rows else frozenset[str]()
    if absent := [name for name in (*texts, *numbers) if name not in there]:
        why = disguise(content) or f"it lacks {'rows' if not rows else f'the column {absent[0]}'}"
        raise DamagedError(f"{file} is damaged ({why}); {remedy}.")
    wanted = [(name, False) for name in numbers] + [(name, True) for name in sparse if name in there]
    for number, row in enumerate(rows, start=1):
        for name, may_be_empty in wanted:
            if not _is_number(row[name]) and not (may_be_empty and not row[name]):
                why = f"row {number} has {row[name]!r:.40} where {name} is a number"
                raise DamagedError(f"{file} is damaged ({why}); {remedy}.")
    return rows


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


_NUMBER = re.compile(r"[+-]?(inf|(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)", re.ASCII)
_TEXT_COLUMN = re.compile(r"(^|_)(hash|sha256|id)$|^(vectors?|behavior|adapter|board|trait|targets|largest|strength)$")
_LONGEST = 4000  # digits of a whole number; Python refuses to read much longer ones


def typed(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Rows of a table as they were before they were written: numbers, truth values, and None for empty cells.

    Identifiers and names stay text, also those that happen to be made of digits.
    """
    return [{k: v if _TEXT_COLUMN.search(k) else _value(v) for k, v in row.items()} for row in rows]


def read_values(file: Path) -> list[dict[str, Any]]:
    """The typed rows of a table written by `write_csv`; see `read_csv`."""
    return typed(read_csv(file))


def _value(text: str) -> Any:
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    if len(text) > _LONGEST or not _NUMBER.fullmatch(text):
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


# ---- what can be made again ---------------------------------------------------------------------------------------


def kept(file: Path, read: Callable[[Path], T], otherwise: str = "it is made again") -> T | None:
    """What `read` makes of a file that spares work; None when there is none, or, which is said, it cannot be read."""
    if not file.exists():
        return None
    try:
        return read(file)
    except DamagedError as problem:
        console.warn(f"{str(problem).rstrip('.')}: {otherwise}.")
        return None
