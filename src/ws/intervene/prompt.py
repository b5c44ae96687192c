"""The prompted baseline: a persona as system prompt at inference, and no change of the model at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError


def prompted(tok: Tokenizer, system: str) -> Tokenizer:
    """A copy of a tokenizer whose prompts open with `system`, so that an evaluation need not know about it.

    Every prompt that `ws.lm.models.render_prompt` renders with it, and that is not given a system text of its own,
    reads as with `system=system`: templates without a system role get it in front of the user's words. Contrast pairs
    are unaffected, since their personas are given, and so are training examples, which have none by definition.

    The copy shares nothing with `tok`, which stays as it is; a copy of the copy keeps the system text.

    Raises:
        WsError: `system` is empty.
    """
    _check(system)
    copied = copy.deepcopy(tok)
    copied.ws_system = system
    return copied


@contextmanager
def prompting(tok: Tokenizer, system: str) -> Iterator[None]:
    """The same for `tok` itself, inside a `with` block, which it leaves as it came.

    So a system prompt is switched on and off like a steering vector, under code that holds on to its tokenizer.
    """
    _check(system)
    before = vars(tok).get("ws_system")
    tok.ws_system = system
    try:
        yield
    finally:
        if before is None:
            del tok.ws_system
        else:
            tok.ws_system = before


def _check(system: str) -> None:
    if not system.strip():
        raise WsError("The system prompt of a prompted baseline must not be empty.")
