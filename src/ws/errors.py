"""The one exception a user is meant to see, and the sentence-making helpers around it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class WsError(Exception):
    """Bad input or an impossible request: one sentence that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def decoded(content: bytes, where: str) -> str:
    """A file's bytes as text: UTF-8, with or without a byte order mark.

    Raises:
        WsError: another encoding; the message names the line and the byte.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        at = problem.start
        line, place = content.count(b"\n", 0, at) + 1, at - content.rfind(b"\n", 0, at)
        raise WsError(
            f"{where} line {line} is not UTF-8: byte 0x{content[at]:02x} at position {place}; save the file as UTF-8."
        ) from problem


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` when an option is close to `name`, else `" Choose from: ..."` (leading space included)."""
    choices = sorted(set(options))
    close = get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Choose from: {', '.join(choices)}." if choices else ""


def choose(kind: str, name: str, options: Iterable[str]) -> str:
    """`name` if it is one of `options`; otherwise a `WsError` that names the kind and the nearest option."""
    choices = list(options)
    if name not in choices:
        raise WsError(f"There is no {kind} named {name!r}.{did_you_mean(name, choices)}")
    return name
