"""The edge to the terminal: options from dataclasses, errors as one sentence, only results on stdout."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from ws.errors import WsError

Options = TypeVar("Options")

INTERRUPTED = 130
PATIENCE = 30.0  # seconds that the other processes give the main one to say what is wrong


def processes() -> int:
    """How many processes a launcher (`accelerate launch`, `torchrun`) has started this program as."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks for all of them."""
    return processes() == 1 or os.environ.get("RANK") == "0"


def say(text: str = "") -> None:
    """A progress line: stderr, so that stdout holds nothing but results; of several processes only the main one's."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


def run(function: Callable[[Options], None], options: type[Options], prog: str = "") -> None:
    """Parse `options` (a frozen dataclass) from the command line and call `function` with them.

    A `WsError` becomes one sentence on stderr and exit code 2 (a traceback only with `--debug`), an interrupt a hint
    that running again resumes. Options with `several_processes = True` may be started by a launcher; every other
    command would do everything several times over, into the same files, and is refused.
    """
    arguments = sys.argv[1:]
    debug = "--debug" in arguments

    def action() -> None:
        if processes() > 1 and not getattr(options, "several_processes", False):
            raise WsError(f"{prog or 'This command'} runs on one process; only `ws.train` runs on several processes.")
        function(parse(options, [a for a in arguments if a != "--debug"], prog))

    guard(action, debug)


def parse(options: type[Options], arguments: Sequence[str], prog: str = "") -> Options:
    """The options object for a list of arguments; tyro explains what it cannot parse and exits with code 2.

    `adapter=delora` is understood as `--adapter delora`, so that recipes read naturally.

    An options class with a `preset(model, adapter)` class method gets its defaults from there, so that `--help` shows
    the values that will be used for the chosen model.
    """
    arguments = [_as_flag(argument) for argument in arguments]
    preset = getattr(options, "preset", None)
    known: dict[str, Any] = {}
    if preset is not None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name, parameter in inspect.signature(preset).parameters.items():
            first.add_argument(f"--{name}", default=parameter.default)
        known = {"default": preset(**vars(first.parse_known_args(list(arguments))[0]))}
    return tyro.cli(options, args=list(arguments), prog=prog or None, config=(tyro.conf.OmitArgPrefixes,), **known)


def _as_flag(argument: str) -> str:
    found = re.fullmatch(r"([a-z][a-z_-]*)=(.*)", argument)
    return f"--{found.group(1).replace('_', '-')}={found.group(2)}" if found else argument


def guard(action: Callable[[], None], debug: bool = False) -> None:
    """Run `action`, turning a `WsError` into one sentence and exit code 2 and an interrupt into exit code 130.

    Of several processes only the main one speaks: the others wait, to be ended by the launcher when it has done so and
    has cleared up.
    """
    _quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        action()
    except WsError as problem:
        if debug:
            raise
        if not is_main():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("\nInterrupted; run the same command again to resume.")
        raise SystemExit(INTERRUPTED) from None


def _quiet_libraries() -> None:
    """Library notices that a user can do nothing about stay off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
