"""Ways in which files come to harm, and mutations of them at random."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not, found, here</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345\n"

# Of the whole file; each is no file of any format that is read back.
WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "cut": lambda content: content[: len(content) // 2],
    "web page": lambda content: HTML,
    "LFS pointer": lambda content: POINTER,
    "no UTF-8": lambda content: b"\xff\xfe" + content,
    "nested list": lambda content: b"[" * 100_000,
    "nested object": lambda content: b'{"a":' * 100_000,
    "long number": lambda content: b"9" * 5000,
    "NaN": lambda content: b"NaN",
    "another type": lambda content: b'["a", 1, null]',
    "no fields": lambda content: b"{}",
}
VALUES = (None, True, -1, 1.5, "x", [], {}, [[]], {"a": None}, 10**30)


def replace(file: Path, content: bytes | None) -> None:
    """Put other content in a file's place; None for a folder."""
    if content is None:
        file.unlink()
        file.mkdir()
        (file / "inside").touch()
    else:
        file.write_bytes(content)


def altered(value: Any, depth: int = 3) -> Iterator[tuple[str, Any]]:
    """A JSON value with each of its fields left out or given a value of another type, with a name for what was done."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return
    keys = list(value) if isinstance(value, dict) else range(min(2, len(value)))
    for key in keys:
        without = copy.copy(value)
        del without[key]
        yield f"without {key}", without
        for other in VALUES:
            if type(other) is not type(value[key]):
                changed = copy.copy(value)
                changed[key] = other
                yield f"{key} is {other!r}", changed
        for name, inner in altered(value[key], depth - 1):
            changed = copy.copy(value)
            changed[key] = inner
            yield f"{key}: {name}", changed


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes at random places: of bytes, stretches, and words that mean something."""
    data = bytearray(content)
    words = (b"NaN", b"-1e999", b"null", b"{}", b"[[", b"\0", b"\xff", b'"', b",", b"\n", b"9" * 400, b"-", b"0")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64, 1000)))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = rng.randbytes(end - at)
            case 4:
                del data[at:]
            case _:
                data[at : min(end, at + 4)] = rng.choice(words)
    return bytes(data)


def mutated_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON text in which one value, anywhere, is left out or is another."""
    value = json.loads(content)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return json.dumps(value).encode()
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.7:
            place = place[key]
        elif rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice(VALUES)
            return json.dumps(value).encode()
