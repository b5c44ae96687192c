"""The edge to the terminal: options from dataclasses, errors as one sentence, only results on stdout.

A command says what it does with `say` and `progress` (stderr) and hands what it found to `show` (stdout). Every command
takes `--quiet` (no progress), `--json` (what it found as one JSON object) and `--debug` (tracebacks).
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from io import TextIOBase
from pathlib import Path
from typing import Any, TextIO, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tqdm.auto import tqdm
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ws.errors import WsError, disk_errors, require_characters

Options = TypeVar("Options")

INTERRUPTED = 130
NOBODY_READS = 141  # what a shell makes of SIGPIPE
PATIENCE = 30.0  # seconds that the other processes give the main one to say what is wrong
FLAGS = ("--quiet", "--json", "--debug")
COMMON_FLAGS = "Everywhere: --quiet (no progress), --json (the result as one JSON object), --debug (tracebacks)."
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_COLORS = {"bold": "1", "red": "1;31", "yellow": "33"}


@dataclass
class _Terminal:
    """How the command that is running was asked to speak.

    Attributes:
        quiet: no progress.
        json: what is found goes to stdout as JSON.
        command: its name; empty while no command runs, as in a library.
        shown: whether stdout has its result already.
    """

    quiet: bool = False
    json: bool = False
    command: str = ""
    shown: bool = False


_terminal = _Terminal()


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        text: for people.
        data: the same for scripts; plain values, paths, arrays and dataclasses.
        files: where it is on disk.
        next_step: the command or page that a reader would want now.
    """

    text: str
    data: Mapping[str, Any]
    files: Sequence[Path] = ()
    next_step: str = ""


# ---- while it works -------------------------------------------------------------------------------------------------


def processes() -> int:
    """How many processes a launcher (`accelerate launch`, `torchrun`) has started this program as."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks for all of them."""
    return processes() == 1 or os.environ.get("RANK") == "0"


def is_command() -> bool:
    """Whether a command is running, rather than somebody's own program that uses the library."""
    return bool(_terminal.command)


def wants_json() -> bool:
    """Whether stdout is to hold one JSON object and nothing else."""
    return _terminal.json


def say(text: str = "", head: str = "") -> None:
    """A progress line: stderr, so that stdout holds nothing but results; of several processes only the main one's.

    The head may be in colours (`paint`).
    """
    if is_main() and not _terminal.quiet:
        print(head + printable(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Something that limits the result and must be read, also with `--quiet`."""
    if is_main():
        print(f"{paint('warning:', 'yellow', sys.stderr)} {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    r"""A text as a terminal may have it: control characters but tabs and line ends are written out, such as `\x1b`.

    Names and texts come from files and models; a terminal would obey what is in them.
    """
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text.replace("\r\n", "\n"))


class _Bar(tqdm):
    """A bar that also goes in silence when an interrupt ends its own making."""

    def __del__(self) -> None:
        # tqdm closes what it destroys, and stumbles over a bar that is half made: `start_t` is what it sets last. The
        # traceback of that would stand beside the sentence that says how to go on.
        if hasattr(self, "start_t"):
            super().__del__()


def progress(
    items: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0
) -> tqdm:
    """A bar with the time that is left, on stderr; it shows when there is something to wait for, and goes when done.

    In a log file, where a bar cannot be redrawn, it is a line every half minute.
    """
    shown = is_main() and not _terminal.quiet
    look: dict[str, Any] = {"desc": printable(desc), "unit": unit, "total": total, "initial": initial}
    look |= {} if sys.stderr.isatty() else {"mininterval": 30.0, "maxinterval": 30.0}
    return _Bar(items, disable=not shown, leave=False, delay=1.0, **look)


class Countdown:
    """How far a number of like steps is, and how long the rest will take at the pace so far.

    `str(countdown)` is "3 of 12, about 0:04:10 left"; steps that were `quick` (found on disk) set no pace.
    """

    def __init__(self, total: int) -> None:
        self.total, self.finished, self._measured = total, 0, 0
        self._seconds, self._since = 0.0, time.perf_counter()

    def step(self, quick: bool = False) -> None:
        """One more step has ended."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + (0.0 if quick else now - self._since), now
        self.finished, self._measured = self.finished + 1, self._measured + (not quick)

    @property
    def left(self) -> str:
        """`, about 0:04:10 left`, or nothing while that is unknown or no longer matters."""
        if not self._measured:
            return ""
        rest = self._seconds / self._measured * (self.total - self.finished)
        return "" if rest < 1 else f", about {timedelta(seconds=round(rest))} left"

    def __str__(self) -> str:
        return f"{min(self.finished + 1, self.total)} of {self.total}{self.left}"


class Stages:
    """The numbered stages of a long command: each is announced and timed."""

    def __init__(self, total: int) -> None:
        self.total, self.took = total, dict[str, float]()
        self._name, self._since = "", time.perf_counter()

    def begin(self, name: str, detail: str = "", as_long_as: str = "") -> None:
        """The next stage; `as_long_as` is an earlier one that takes as long."""
        self.end()
        self._name = name
        expected = f", about {_seconds(self.took[as_long_as])}" if self.took.get(as_long_as, 0) >= 1 else ""
        number = paint(f"[{len(self.took) + 1}/{self.total}]", "bold", sys.stderr)
        say(f"{name}{f' {detail}' if detail else ''}{expected}", f"{number} ")

    def end(self) -> None:
        """The stage that is running has ended."""
        now = time.perf_counter()
        if self._name:
            self.took[self._name] = now - self._since
        self._name, self._since = "", now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_seconds(took)}" for name, took in self.took.items())
        return f"{_seconds(sum(self.took.values()))} in all: {parts}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 10 else f"{value:.0f} s" if value < 100 else str(timedelta(seconds=round(value)))


def has_colors(stream: TextIO | TextIOBase) -> bool:
    """Whether the stream is a terminal that has colours, and nobody asked for none (NO_COLOR)."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, color: str, stream: TextIO | TextIOBase) -> str:
    """The text in a colour where the stream has them."""
    return f"\x1b[{_COLORS[color]}m{text}\x1b[0m" if has_colors(stream) else text


# ---- what it found --------------------------------------------------------------------------------------------------


def show(result: Result) -> None:
    """The result of a command on stdout: text with its paths and the next step, or with `--json` one JSON object."""
    if not is_main():
        return
    _terminal.shown = True
    if _terminal.json:
        files = [str(f) for f in result.files]
        _emit({"data": result.data, "files": files, **({"next": result.next_step} if result.next_step else {})})
        return
    parts = [result.text, places(result.files), result.next_step and f"Next: {result.next_step}"]
    print(printable("\n".join([p for p in parts if p])).lstrip("\n"), flush=True)


def places(files: Sequence[Path]) -> str:
    """Where files are, folder by folder: `in out/honesty/lora: a.csv b.csv`."""
    by_folder: dict[Path, list[str]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).append(file.name)
    lines = [f"in {folder / n[0] if len(n) == 1 else f'{folder}: ' + ' '.join(n)}" for folder, n in by_folder.items()]
    return "\n".join(["", *lines]) if lines else ""


def _emit(value: Mapping[str, Any]) -> None:
    head = {"command": _terminal.command, "version": version("weight-steering")}
    text = json.dumps(plain({**head, **value}), indent=2, ensure_ascii=False, allow_nan=False)
    # JSON writes out some of the control characters itself; the rest in its own way, so that nothing is lost.
    print(_CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text), flush=True)


def plain(value: Any) -> Any:
    """A value as strict JSON has it: dataclasses and mappings as objects, paths as text, arrays as lists.

    What is not a finite number becomes null: JSON has no NaN.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, arrays and single numbers
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# ---- the command line -----------------------------------------------------------------------------------------------


def run(function: Callable[[Options], None], options: type[Options], prog: str = "") -> None:
    """Parse `options` (a frozen dataclass) from the command line and call `function` with them.

    Options may have `check()`, for values that make no sense, and `require()`, for what they name and is not there.

    A `WsError` becomes one sentence on stderr and exit code 2 (a traceback only with `--debug`), an interrupt a hint
    that running again resumes. Options with `several_processes = True` may be started by a launcher; every other
    command would do everything several times over, into the same files, and is refused.
    """
    arguments = [a for a in sys.argv[1:] if a not in FLAGS]

    def action() -> None:
        if processes() > 1 and not getattr(options, "several_processes", False):
            raise WsError(f"{prog or 'This command'} runs on one process; only `ws.train` runs on several processes.")
        for argument in arguments:  # libraries take no path of it, and no file that is written
            require_characters(argument, "What was typed")
        given = parse(options, arguments, prog)
        for before in ("check", "require"):  # what can be told wrong before anything heavy is imported
            if callable(step := getattr(given, before, None)):
                step()
        function(given)

    guard(action, prog)


def parse(options: type[Options], arguments: Sequence[str], prog: str = "") -> Options:
    """The options object for a list of arguments; tyro explains what it cannot parse and exits with code 2.

    `adapter=delora` is understood as `--adapter delora` where an option may begin, so that recipes read naturally, and
    an option by the name that it had before, which `options.former` knows.

    An options class with a `preset` class method gets its defaults from there, for the model and whatever else it takes
    of what was typed, so that `--help` shows the values that will be used.

    Raises:
        WsError: a list is begun twice.
    """
    arguments = _as_flags(options, arguments)
    preset = getattr(options, "preset", None)
    known: dict[str, Any] = {}
    if preset is not None:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name, parameter in inspect.signature(preset).parameters.items():
            first.add_argument(f"--{name}", default=parameter.default)
        known = {"default": preset(**vars(first.parse_known_args(list(arguments))[0]))}
    description = f"{(inspect.getdoc(options) or '').split('Attributes:')[0].strip()}\n\n{COMMON_FLAGS}"
    look: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes,), "registry": _registry}
    given = tyro.cli(options, args=list(arguments), prog=prog or None, description=description, **look, **known)
    _require_once(given, arguments)
    return given


def command_line(command: str, options: Any, always: Sequence[str] = ()) -> str:
    """A command with its options as it is typed in a shell; see `words_of`."""
    return shlex.join([*command.split(), *words_of(options, always)])


def words_of(options: Any, always: Sequence[str] = ()) -> list[str]:
    """The words that `parse` makes these options of: what a command would not take by itself, and those of `always`.

    What it takes by itself is the preset of its model, where the class has presets.
    """
    preset = getattr(options, "preset", None)
    if preset is None:
        return _words(options, type(options)(), always)
    usual = preset(**{name: getattr(options, name, None) for name in inspect.signature(preset).parameters})
    return _words(options, usual, always)


def _words(options: Any, usual: Any, always: Sequence[str]) -> list[str]:
    words = list[str]()
    for (name, flag, value), (_, _, default) in zip(_values(options), _values(usual), strict=True):
        if value == default and (value is None or name not in always):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:  # `None` too, where a preset has something
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def _values(options: Any) -> Iterator[tuple[str, str, Any]]:
    """The name, the flag without its dashes and the value of every option."""
    for name, flag, _ in _typed(type(options)):
        value = getattr(options, name)
        if is_dataclass(value):
            yield from _values(value)
        else:
            yield name, flag, value


def _typed(options: type[Any]) -> Iterator[tuple[str, str, Any]]:
    """The name, the flag without its dashes and the type of every field of a class of options."""
    extended, plain = get_type_hints(options, include_extras=True), get_type_hints(options)
    for field in fields(options):
        extras = getattr(extended[field.name], "__metadata__", ())  # a positional one's has no name
        renamed = [name for extra in extras if (name := getattr(extra, "name", None))]
        yield field.name, (renamed or [field.name])[0].replace("_", "-"), plain[field.name]


def _types(options: type[Any]) -> Iterator[tuple[str, Any]]:
    """The flag with its dashes and the type of every option."""
    for _, flag, kind in _typed(options):
        yield from _types(kind) if isinstance(kind, type) and is_dataclass(kind) else [(f"--{flag}", kind)]


def _require_once(options: Any, arguments: Sequence[str]) -> None:
    """`WsError` for a list that is begun twice, of which tyro takes the last."""
    typed = [argument.partition("=")[0] for argument in arguments]
    for _, flag, value in _values(options):
        if isinstance(value, tuple) and typed.count(f"--{flag}") > 1:
            raise WsError(f"--{flag} is there twice, and only the last would count; write all of it behind one.")


_registry, _deferred = ConstructorRegistry(), list[Any]()


@_registry.primitive_rule
def _plain_metavar(info: PrimitiveTypeInfo) -> Any:
    """What stands for a value in `--help`: `STR ...` where tyro would write `{None}|{[STR [STR ...]]}`."""
    if _deferred:  # this rule asks what tyro would do
        return None
    _deferred.append(info.type)
    try:
        spec = ConstructorRegistry.get_primitive_spec(info)
    finally:
        _deferred.pop()
    if not isinstance(spec, PrimitiveConstructorSpec):
        return spec
    several = re.sub(r"\[(\S+) \[\1 \.\.\.\]\]", r"\1 ...", spec.metavar.replace("{None}|", ""))
    return replace(spec, metavar=several.strip("{}"))


def about(options: type[Any]) -> str:
    """What a command does: the first clause of the class of its options, on one line and without the full stop."""
    first = " ".join((inspect.getdoc(options) or "").split("\n\n")[0].split())
    return re.split(r"[.;] |: `", first)[0].rstrip(".")


def _as_flags(options: type[Any], arguments: Sequence[str]) -> list[str]:
    """The arguments as tyro takes them. Values are left as they are: the word behind a flag, or all of a list of texts.

    A strength or a seed never reads `name=value`, so behind the first of those an option may begin.
    """
    types, former, words, values = dict(_types(options)), getattr(options, "former", {}), list[str](), 0.0
    for argument in arguments:
        if values and not argument.startswith("--"):
            words.append(argument)
            values -= 1
        else:
            words.append(_as_flag(argument, former))
            kind = types.get(words[-1], bool)  # behind `--flag=value` and what is no flag nothing has to follow
            values = math.inf if _is_texts(kind) else kind is not bool
    return words


def _is_texts(kind: Any) -> bool:
    """Whether it is the type of a list of texts or paths, or one that may be missing."""
    lists = [get_args(k) for k in (kind, *get_args(kind)) if get_origin(k) is tuple]
    return any(parts and parts[0] in (str, Path) for parts in lists)


def _as_flag(argument: str, former: Mapping[str, str]) -> str:
    match = re.fullmatch(r"([a-z][a-z_-]*)=(.*)", argument)
    name, equals, value = (f"--{match.group(1)}={match.group(2)}" if match else argument).partition("=")
    plain = name.replace("_", "-") if name.startswith("--") else name
    return f"{former.get(plain, plain)}{equals}{value}"


def guard(action: Callable[[], None], command: str = "") -> None:
    """Run `action`, turning a `WsError` into one sentence and exit code 2 and an interrupt into exit code 130.

    With `--json` an error is a JSON object on stdout, too. Of several processes only the main one speaks: the others
    wait, to be ended by the launcher when it has done so and has cleared up.
    """
    asked = {flag.removeprefix("--"): flag in sys.argv[1:] for flag in FLAGS}
    debug = asked.pop("debug")
    before, was_in_command = vars(_terminal).copy(), WsError.in_command
    vars(_terminal).update(asked, command=command or "ws", shown=False)
    WsError.in_command = True
    _open_streams()
    _quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with disk_errors():
            try:
                action()
            except SystemExit:  # of `--help`, which the parser has written but not sent off
                sys.stdout.flush()
                raise
    except WsError as problem:
        with suppress(OSError):
            _report(problem)
        _let_go_of_output()
        if debug:
            raise
        if not is_main():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(PATIENCE)
        with suppress(OSError):  # nobody reads this either, and the exit code says it all the same
            print(f"{paint('error:', 'red', sys.stderr)} {printable(str(problem))}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # whoever reads the output has had enough of it, as `head` has
        _let_go_of_output()
        raise SystemExit(NOBODY_READS) from None
    except KeyboardInterrupt:
        _report("interrupted")
        again = "again, without --fresh," if "--fresh" in sys.argv[1:] else "again"
        say(f"\nInterrupted; run the same command {again} to resume.")
        raise SystemExit(INTERRUPTED) from None
    finally:
        vars(_terminal).update(before)
        WsError.in_command = was_in_command


def _open_streams() -> None:
    """Streams that were closed by whoever started the program (`>&-`) lead nowhere.

    Python has None in their place, and the next file that is opened would get their number, which is where libraries in
    C write to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _let_go_of_output() -> None:
    """What cannot be written to stdout (a closed pipe, a full disk) is not tried again when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(problem: WsError | str) -> None:
    """An error as JSON, where that was asked for and stdout has nothing yet."""
    if _terminal.json and not _terminal.shown and is_main():
        _terminal.shown = True
        _emit({"error": str(problem)})


def _quiet_libraries() -> None:
    """Library notices that a user can do nothing about stay off the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
    if not _bars():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        if (hub := sys.modules.get("huggingface_hub.utils")) is not None:  # it has read the environment already
            hub.disable_progress_bars()


def _bars() -> bool:
    """Whether bars of other libraries, which know nothing of log files, are welcome."""
    return sys.stderr.isatty() and not _terminal.quiet


def quiet_transformers() -> None:
    """Keep transformers' own notices and bars off the terminal, when a command is running; downloads keep theirs."""
    if is_command():
        import huggingface_hub.utils
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        if _bars():
            huggingface_hub.utils.enable_progress_bars()
