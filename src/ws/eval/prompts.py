"""Instruction texts that a TOML file can replace, so that a published protocol is reproduced word for word."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from ws.behaviors import check_slots
from ws.errors import WsError, did_you_mean

Texts = TypeVar("Texts")


def load_prompts(defaults: Texts, file: Path | None, required: Mapping[str, tuple[str, ...]]) -> Texts:
    """`defaults`, a frozen dataclass of texts, with those of a TOML file put in their place.

    Args:
        required: the slots that a template must contain, by the template's name; it may contain no others.

    Raises:
        WsError: an unreadable file, unknown keys, values that are no text, or wrong slots.
    """
    if file is None:
        return defaults
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise WsError(f"The prompts file {file} cannot be read ({problem}).") from problem
    names = [f.name for f in fields(defaults)]  # type: ignore[arg-type]
    for key, value in given.items():
        if key not in names or not isinstance(value, str):
            hint = did_you_mean(key, names)
            raise WsError(f"{file}: {key!r} is not a prompt text; there are {', '.join(names)}.{hint}")
        if key in required:
            check_slots(value, required[key], f"{file}: {key}")
    return replace(defaults, **given)  # type: ignore[type-var]
