"""What may leave the machine: names and records without the folders they came from, and text that is only text.

Whatever is put on record in a vector, on a card or on a page passes through here, so that nobody has to remember it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ws.console import printable
from ws.files.runs import BUNDLED, is_gguf

_PLACE = re.compile(r"(?:file:)?(?:~|\.{0,2}/|[A-Z]:[\\/]|\\\\[\w?.-]+\\|\.\.\\)", re.IGNORECASE)
# Where a path begins in a text: not inside a word (`and/or`), nor behind the colon of a web address.
_START = r"""(?:
    (?<![\w./~\\]) (?!(?<=:)//) (?:(?i:file):)?
    (?: (?:~\w*|\.{1,2}|[A-Za-z]:)?/(?=[^\s'",;()*]) | (?:~\w*|\.\.|[A-Za-z]:|\\\\[\w?.-]+)\\ )
  | (?<![A-Za-z0-9.~]) / (?:home|Users|root|tmp|mnt|media|srv|Volumes)/
)"""
_APOSTROPHE = r"(?<=\w)'(?=\w)"  # of a name, which ends no quotation
# A folder's name may hold spaces, but none before an operator, an option or another path; the last name holds none.
_PATH = re.compile(
    rf"""{_START} (?: (?: (?!\s+(?:[-+=|&]|{_START})) (?:[^/\\\n'"`,;()*]|{_APOSTROPHE}) )* [/\\] )*
    (?:[^\s/\\'"`,;()*]|{_APOSTROPHE})*""",
    re.VERBOSE,
)
_QUOTED = re.compile(rf"""(?P<quote>['"`]) (?P<path>{_START}[^\n]*?) (?P=quote)(?!\w)""", re.VERBOSE)
_WHOLE = re.compile(
    rf"""(?! .* (?:\s[-+*]\s|\*|[,;]\s|\s(?:~|\.{{0,2}}/|[A-Za-z]:[\\/])) ) (?:[^\n'"`]|{_APOSTROPHE})+""", re.VERBOSE
)
_HEAD = re.compile(r"^'(ws [\w-]+)'")  # so were two words on record once
_CODE = re.compile(r"^```(?:python|bash)\n.*?^```$", re.DOTALL | re.MULTILINE)
_HTML = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])\(")


def is_local(name: str) -> bool:
    """Whether a name is a place on this machine rather than a bundled model or a name on the hub."""
    return name not in BUNDLED and (
        bool(_PLACE.match(name))
        or name.count("/") > 1
        or "\\" in name
        or is_gguf(name)
        or (len(name) < 4096 and Path(name).is_dir())
    )


def public_name(name: str) -> str:
    """A base model's or data set's name as it may be published: of a folder only the last part."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if is_local(name) else name


def public(value: Any) -> Any:
    """A JSON value in which every path of a machine is cut down to its last part, in keys too."""
    if isinstance(value, Mapping):
        return {public(key): public(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(part) for part in value]
    return _cut(value) if isinstance(value, str) else value


def _cut(text: str) -> str:
    """A text with its paths cut down to their last parts."""
    if _PLACE.match(text) and _WHOLE.fullmatch(text):
        return public_name(text)
    for known in (Path.cwd(), Path.home()):  # may hold what ends a path in a text
        if len(known.parts) > 1:
            text = text.replace(f"{known}/", "./")
    text = _QUOTED.sub(lambda match: f"{match['quote']}{public_name(match['path'])}{match['quote']}", text)
    return _PATH.sub(lambda match: public_name(match.group()), text)


def public_command(command: str) -> str:
    """A recorded command line that can be typed elsewhere: without `--out`, with folders cut down to their names."""
    command = " ".join(_HEAD.sub(r"\1", command.strip()).splitlines())
    try:
        words = shlex.split(command) if re.search("['\"]", command) else []
    except ValueError:  # joined by spaces, without quotes, as records once were
        words = []
    if not words:
        head, *options = re.split(r"\s+(?=--?[A-Za-z])", command)
        program, *values = head.split(" ", 1)
        portable = [option for option in options if not re.match(r"--out\b(?!-)", option)]
        return " ".join([_public_program(program), *map(_cut_option, [*values, *portable])])
    public_words, is_place = [], False
    for word in words[1:]:
        if is_place and not word.startswith("-"):
            continue
        is_place = word == "--out"
        if not is_place and not word.startswith("--out="):
            public_words.append(shlex.quote(_cut_option(word)))
    return " ".join([_public_program(words[0]), *public_words])


def _public_program(name: str) -> str:
    """`sycophancy.py` is on record for `python -m ws.eval.sycophancy`."""
    stem = name.removesuffix(".py")
    if stem == name or not stem.isidentifier():
        return public_name(name)
    rooms = ("ws", "ws.eval", "ws.export", "ws.intervene", "ws.analysis", "ws.chat", "ws.sweep")
    modules = [f"{room}.{stem}" for room in rooms if find_spec(f"{room}.{stem}")]
    return f"python -m {modules[0]}" if modules else name


def _cut_option(text: str) -> str:
    """An option with its values."""
    flag = text[: match.end()] if (match := re.match(r"--?[A-Za-z][\w.-]*[ =]", text)) else ""
    return flag + _cut(text.removeprefix(flag))


def without_markup(markdown: str) -> str:
    """Markdown in which what others wrote is no HTML and no link: both are marked as text outside of our own code.

    Control characters are written out, for a terminal would obey them when the file is shown in it.
    """
    markdown, parts, end = printable(markdown), list[str](), 0
    for code in [*_CODE.finditer(markdown), None]:
        text = markdown[end : code.start() if code else None]
        parts.append(_HTML.sub(lambda match: "&lt;" if match.group() == "<" else "\\(", text))
        if code:
            parts.append(code.group())
            end = code.end()
    return "".join(parts)
