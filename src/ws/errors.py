"""The one exception a user is meant to see, its kinds, and the sentence-making helpers around it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from math import inf, isfinite
from numbers import Real
from pathlib import Path
from typing import ClassVar


class WsError(Exception):
    """Bad input or an impossible request: one sentence that says what was wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2. It names options as they are typed; outside of
    a command, where Python calls them by their fields, --min-margin reads as `min_margin`.

    Attributes:
        in_command: the command line is what will print it.
    """

    in_command: ClassVar[bool] = False

    def __str__(self) -> str:
        text = super().__str__()
        return text if WsError.in_command else _OPTION.sub(_as_field, text)


# What stands in backticks is to be typed, and dashes within a name are no option.
_OPTION = re.compile(r"(`[^`]*`)|(?<![\w/.-])--([a-z][a-z0-9-]*)")


def _as_field(option: re.Match[str]) -> str:
    return option[1] or f"`{option[2].replace('-', '_')}`"


FLOAT32_MAX = 3.4028234663852886e38
MOST = 2**31 - 1  # of whatever is counted; libraries fail in their own ways beyond


def require_strength(value: object, what: str = "alpha") -> float:
    """A strength as a number; whatever computes with it does so in float32 at most.

    Raises:
        WsError: no number, not finite, or beyond float32; the message begins with `what`.
    """
    try:
        number = float(value) if isinstance(value, Real) else None
    except OverflowError:
        number = inf
    if number is None or not abs(number) <= FLOAT32_MAX:
        why = "a finite number" if number is None or not isfinite(number) else "within float32 (3.4e38)"
        raise WsError(f"{what} must be {why}, not {shortened(value)}.")
    return number


def require_seed(seed: int, what: str = "The seed") -> int:
    """A seed that every generator of random numbers takes: Python's, NumPy's and torch's; `WsError` otherwise."""
    if not 0 <= seed < 2**32:
        raise WsError(f"{what} must lie between 0 and {2**32 - 1}, not {shortened(seed)}.")
    return seed


def require_count(option: str, count: float | int | None, least: int, most: int = MOST) -> None:
    """`WsError` unless a count lies between `least` and `most`; None stands for no count at all."""
    if count is not None and not least <= count <= most:
        bound = f"at least {least}" if count < least else f"at most {most}"
        raise WsError(f"{option} must be {bound}, not {shortened(count)}.")


def require_distinct(option: str, values: Sequence[object]) -> None:
    """`WsError` where a list names one thing twice, which would count as two."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise WsError(f"{option} names {shortened(value)} twice.")


def require_resamples(n_bootstrap: int) -> None:
    """`WsError` unless a 95 % interval can be had from so many resamples, in memory."""
    require_count("--n-bootstrap", n_bootstrap, 100, most=10**6)


def shortened(value: object, most: int = 40) -> str:
    """How a value is named in a sentence, without its middle where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than some thousand digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


class DamagedError(WsError):
    """A file that cannot be read back: missing, cut, of another kind, or with values that make no sense."""


class DiskError(WsError):
    """The operating system refuses to write or read. What is half done stays, and the same command goes on from it."""


class NoMemoryError(WsError):
    """Too little memory at the moment. The same may do at another time, or in smaller parts."""


_REFUSALS = {
    errno.ENOSPC: "make room and run the same again without --fresh, which goes on from what is finished",
    errno.EDQUOT: "make room and run the same again without --fresh, which goes on from what is finished",
    errno.EFBIG: "raise the limit (`ulimit -f`) or choose another file system, and run the same again without --fresh",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "change the permissions, or choose another place",
    errno.EPERM: "change the permissions, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "it is a file, or lies below one; choose another place",
    errno.EEXIST: "something else is in its place; move that away, or choose another place",
    errno.EISDIR: "move that folder away, or choose another place",
    errno.ENOTEMPTY: "move away what is in it, or choose another place",
    errno.ELOOP: "its links lead in a circle; choose another place",
    errno.EMFILE: "raise the limit (`ulimit -n`), or do less at once",
    errno.EIO: "the device may be failing; choose another one",
    errno.EBUSY: "something else holds it; wait, or choose another place",
    errno.ETXTBSY: "a program runs from it; choose another place",
    errno.ESTALE: "the network file system has lost it; mount that again, or choose another place",
    errno.ENOLCK: "this file system has no locks; choose another place",
}
_HIDDEN = re.compile(r"\.(part|old)-\w*-\d+-")  # a name of `ws.files.writing` that nobody has asked for


@contextmanager
def disk_errors(place: Path | str = "The output") -> Iterator[None]:
    """Inside, what the operating system refuses is a `DiskError` that names the path; `place` where it is not known."""
    try:
        yield
    except WsError:
        raise
    except Exception as problem:
        code = getattr(problem, "errno", None) or _code(str(problem))
        # What is renamed has two names, and the second is the one that it gets.
        named = [getattr(problem, name, None) for name in ("filename2", "filename")]
        where = next((os.fsdecode(n) for n in named if isinstance(n, (str, bytes))), place)
        hidden = _HIDDEN.search(str(where)) is not None
        if code not in _REFUSALS and not (hidden and code == errno.ENOENT):
            raise
        advice = _REFUSALS.get(code, "no new files can be made there; choose another place")
        raise DiskError(f"{place if hidden else where} cannot be used ({os.strerror(code)}): {advice}.") from problem


def _code(message: str) -> int | None:
    """The number of the refusal in a compiled library's message (safetensors; torch and NumPy, which know but one)."""
    if number := re.search(r"\(os error (\d+)\)", message):
        return int(number[1])
    is_short = re.search(r"PytorchStreamWriter failed|unexpected pos|\d+ requested and \d+ written", message)
    return errno.ENOSPC if is_short else None


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
        raise DamagedError(
            f"{where} line {line} is not UTF-8: byte 0x{content[at]:02x} at position {place}; save the file as UTF-8."
        ) from problem


def require_characters(text: str, what: str) -> str:
    """The text, unless it holds what is no character: half of a pair, or a byte that was no UTF-8 where it was read."""
    if wrong := next((c for c in text if "\ud800" <= c <= "\udfff"), ""):
        byte = ord(wrong) - 0xDC00  # how Python keeps a byte that it could not read
        why = f"the byte 0x{byte:02x}, which is not UTF-8" if 0x80 <= byte <= 0xFF else "half of a surrogate pair"
        raise WsError(f"{what} holds {why}: {shortened(text)}.")
    return text


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
