"""The edge to the terminal: what goes to stdout, what to stderr, in which form, and for how long it will go on."""

from __future__ import annotations

import ast
import gc
import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ws
from ws import console
from ws.console import Countdown, Result, Stages, plain
from ws.delta import LinearDelta
from ws.eval.sycophancy import main as evaluate_claims
from ws.files.runs import read_csv, read_values, write_csv
from ws.lm.models import fingerprint
from ws.options.measure import SycophancyOptions


@dataclass(frozen=True)
class Options:
    """A command for these tests.

    Attributes:
        n: a number.
    """

    n: int = 1


def a_command(options: Options) -> None:
    console.say("working")
    for _ in console.progress(range(options.n), desc="rows", unit="row"):
        pass
    if options.n < 0:
        raise ws.WsError("--n must not be negative.")
    console.warn("one seed")
    console.show(Result(f"n is {options.n}", {"n": options.n, "span": math.nan}, [Path("out/a.csv")], "ws more"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command as from a shell: exit code, stdout, stderr."""

    def run(*arguments: str, function=a_command, options=Options) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ws-test", *arguments])
        code, before = 0, signal.getsignal(signal.SIGTERM)
        try:
            console.run(function, options, "ws test")
        except SystemExit as stop:
            code = int(stop.code)
        finally:
            signal.signal(signal.SIGTERM, before)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_results_go_to_stdout_and_progress_to_stderr(command):
    assert command("--n", "3") == (
        0,
        "n is 3\n\nin out/a.csv\nNext: ws more\n",
        "working\nwarning: one seed\n",
    )


def test_quiet_leaves_results_warnings_and_errors(command):
    code, out, err = command("--quiet", "--n", "2")
    assert (code, err) == (0, "warning: one seed\n")
    assert out.startswith("n is 2\n")
    assert command("--quiet", "--n", "-1") == (2, "", "error: --n must not be negative.\n")


def test_json_is_one_object_with_null_for_nan(command):
    code, out, _ = command("--n=5", "--json")
    assert code == 0
    assert json.loads(out) == {
        "command": "ws test",
        "version": "0.1.0",
        "data": {"n": 5, "span": None},
        "files": ["out/a.csv"],
        "next": "ws more",
    }


def test_json_of_an_error_and_of_an_interrupt(command):
    code, out, err = command("--json", "--n", "-4")
    assert (code, err.splitlines()[-1]) == (2, "error: --n must not be negative.")
    assert json.loads(out)["error"] == "--n must not be negative."

    def interrupted(options: Options) -> None:
        raise KeyboardInterrupt

    code, out, err = command("--json", function=interrupted)
    assert (code, json.loads(out)["error"]) == (130, "interrupted")
    assert "run the same command again to resume" in err


def test_what_starts_over_resumes_without_it(command):
    @dataclass(frozen=True)
    class Fresh:
        """Can start over."""

        fresh: bool = False

    def interrupted(options: Fresh) -> None:
        raise KeyboardInterrupt

    _, _, err = command("--fresh", function=interrupted, options=Fresh)
    assert "run the same command again, without --fresh, to resume" in err


@dataclass(frozen=True)
class Listed:
    """Has a list."""

    seeds: tuple[int, ...] = (0,)
    n: int = 1


@pytest.mark.parametrize("second", [("--seeds", "1"), ("--seeds=1",), ("seeds=1",)])
def test_a_list_that_is_begun_twice_is_refused(command, second):
    made = list[Listed]()
    code, _, err = command("--seeds", "0", "2", *second, function=made.append, options=Listed)
    assert (code, made) == (2, [])
    assert err == "error: --seeds is there twice, and only the last would count; write all of it behind one.\n"
    code, _, _ = command("--n", "2", "--seeds", "0", "--n", "3", function=made.append, options=Listed)
    assert (code, made) == (0, [Listed((0,), 3)])


@dataclass(frozen=True)
class Inner:
    """Further options."""

    places: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Said:
    """Has texts."""

    say: tuple[str, ...] = ()
    message: str = ""
    alphas: tuple[float | str, ...] = ()
    alpha: float = 1.0
    loud: bool = False
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (
            ["--say", "hello", "alpha=2", "alpha=3, or what?", "--loud"],
            Said(("hello", "alpha=2", "alpha=3, or what?"), loud=True),
        ),
        (["--places", "a", "alpha=2"], Said(inner=Inner((Path("a"), Path("alpha=2"))))),
        (["--message", "fix=typo", "alpha=2"], Said(message="fix=typo", alpha=2.0)),
        (["--message", "alpha=2"], Said(message="alpha=2")),
        (["--alphas", "-1", "1", "alpha=2"], Said(alphas=(-1.0, 1.0), alpha=2.0)),
        (["--loud", "alpha=2"], Said(loud=True, alpha=2.0)),
        (["message=two words", "alpha=2", "say=a=b"], Said(("a=b",), "two words", alpha=2.0)),
        (["--message=a", "alpha=2"], Said(message="a", alpha=2.0)),
    ],
)
def test_a_value_is_never_taken_for_an_option(words, made):
    """`alpha=2` behind `--say hello` once changed the strength instead of being said."""
    assert console.parse(Said, words) == made


def test_an_error_behind_a_result_does_not_print_twice(command):
    def partly(options: Options) -> None:
        console.show(Result("half", {"done": 1}))
        raise ws.WsError("1 of 2 cells failed.")

    code, out, err = command("--json", function=partly)
    assert (code, json.loads(out)["data"]) == (2, {"done": 1})
    assert err == "error: 1 of 2 cells failed.\n"


def test_what_was_asked_for_ends_with_the_command(command, capsys):
    command("--json", "--quiet")
    assert not console.is_command()
    console.say("heard")
    console.show(Result("text", {}))
    said = capsys.readouterr()
    assert (said.out, said.err) == ("text\n", "heard\n")


def test_help_names_the_common_flags(command):
    code, out, _ = command("--help")
    assert code == 0
    for flag in console.FLAGS:
        assert flag in out
    assert "A command for these tests." in out


# ---- values ---------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(JSON_VALUES)
def test_everything_plain_is_strict_json(value):
    made = plain(value)
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_arrays_paths_and_dataclasses_are_plain():
    value = {"p": Path("a/b"), 3: np.array([1.0, np.inf]), "t": torch.tensor(2), "n": np.float64(0.5), "o": Options(7)}
    assert plain(value) == {"p": "a/b", "3": [1.0, None], "t": 2, "n": 0.5, "o": {"n": 7}}


def test_files_are_named_folder_by_folder():
    files = [Path("out/a/x.csv"), Path("out/a/y.csv"), Path("out/b")]
    assert console.places(files) == "\nin out/a: x.csv y.csv\nin out/b"
    assert console.places([]) == ""


def test_table_values_are_typed_and_identifiers_stay_text(tmp_path):
    rows = [{"eval_hash": "123e45", "id": "007", "alpha": -1.0, "n": 12, "ok": True, "none": "", "word": "1 of 2"}]
    rows[0] |= {"trait": "2024", "targets": "1", "largest": "007", "strength": "+1", "adapter": "1", "board": "2"}
    file = write_csv(tmp_path / "t.csv", rows)
    assert read_values(file) == [rows[0] | {"none": None}]
    assert {type(v) for v in read_csv(file)[0].values()} == {str}


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when the test says so."""
    now = [100.0]
    monkeypatch.setattr("ws.console.time.perf_counter", lambda: now[0])
    return now


def test_a_countdown_estimates_from_what_took_time(clock):
    countdown = Countdown(5)
    assert str(countdown) == "1 of 5"
    countdown.step(quick=True)
    assert str(countdown) == "2 of 5"
    clock[0] += 30
    countdown.step()
    assert str(countdown) == "3 of 5, about 0:01:30 left"
    clock[0] += 10
    countdown.step()
    assert str(countdown) == "4 of 5, about 0:00:40 left"
    countdown.step()
    clock[0] += 1
    countdown.step()
    assert (str(countdown), countdown.left) == ("5 of 5", "")


def test_stages_are_numbered_timed_and_compared(clock, capsys):
    stages = Stages(3)
    stages.begin("train pos", "in out/pos")
    clock[0] += 12
    stages.begin("train neg", as_long_as="train pos")
    clock[0] += 110
    stages.begin("vector")
    clock[0] += 0.25
    stages.end()
    assert capsys.readouterr().err.splitlines() == [
        "[1/3] train pos in out/pos",
        "[2/3] train neg, about 12 s",
        "[3/3] vector",
    ]
    assert str(stages) == "0:02:02 in all: train pos 12 s, train neg 0:01:50, vector 0.2 s"


# ---- colours --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert console.paint("error:", "red", Terminal()) == "\x1b[1;31merror:\x1b[0m"
    assert console.paint("error:", "red", io.StringIO()) == "error:"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("error:", "red", Terminal()) == "error:"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert console.paint("error:", "red", Terminal()) == "error:"


def test_a_real_command_is_coloured_on_a_terminal_and_plain_in_a_pipe(tmp_path):
    command = [sys.executable, "-m", "ws.cli", "inspct"]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    piped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (piped.returncode, piped.stdout) == (2, "")
    assert piped.stderr.startswith("error: ")
    assert "\x1b" not in piped.stderr
    ours, theirs = pty.openpty()
    shown = subprocess.run(command, cwd=tmp_path, env=environment, stdout=theirs, stderr=theirs, check=False)
    os.close(theirs)
    assert shown.returncode == 2
    assert os.read(ours, 4096).decode().startswith("\x1b[1;31merror:\x1b[0m ")
    os.close(ours)


# ---- every command --------------------------------------------------------------------------------------------------


HOSTILE = "a\x1b[31mred\x1b]0;title\x07 b\x9b2J\rc\x00d\x7fe\udcfff\r\ng\th"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07 b\x9b2J\rc\x00d\x7fe\udcfff" + "\ng\th"


def hostile_command(options: Options) -> None:
    console.say(HOSTILE)
    stages = Stages(1)
    stages.begin(HOSTILE, HOSTILE)
    for _ in console.progress(range(2), desc=HOSTILE, unit="row"):
        pass
    console.warn(HOSTILE)
    if options.n < 0:
        raise ws.WsError(HOSTILE)
    console.show(Result(HOSTILE, {HOSTILE: HOSTILE}, [Path(f"out/{HOSTILE}")], HOSTILE))


@pytest.mark.parametrize("moment", ["_get_free_pos", "status_printer"])
def test_a_bar_that_an_interrupt_leaves_half_made_says_nothing(moment, monkeypatch):
    """What is destroyed has no caller to tell: a traceback of it would stand in the middle of what the command says."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(console.tqdm, moment, interrupt)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        console.progress(range(2), desc="rows", unit="row")
    del interrupted
    gc.collect()
    assert not complaints


def test_no_text_is_obeyed_by_a_terminal(command):
    """Names in files and what models write are shown, control characters written out."""
    code, out, err = command(function=hostile_command)
    assert (code, out.count(SHOWN), err.count(SHOWN)) == (0, 3, 4)
    code, more, error = command("--n", "-1", function=hostile_command)
    assert (code, error.count(SHOWN)) == (2, 5)
    _, text, _ = command("--json", function=hostile_command)
    _, failed, _ = command("--json", "--n", "-1", function=hostile_command)
    for printed in (out, err, more, error, text, failed):
        assert not [c for c in printed if not (c.isprintable() or c in "\n\t")]
    assert json.loads(text)["data"] == {HOSTILE: HOSTILE}, "nothing is lost where scripts read it"
    assert json.loads(failed)["error"] == HOSTILE


def test_a_word_that_is_no_utf_8_is_refused_before_it_becomes_a_files_name(command):
    code, out, err = command("--n", os.fsdecode(b"1\xff"))
    assert (code, out) == (2, "")
    assert "0xff, which is not UTF-8" in err
    assert "Traceback" not in err


def test_no_command_prints_past_the_console():
    """Results go through `console.show`, so that every command has `--json`; help, chat's lines and a log aside."""
    allowed = {"console/__init__.py": 5, "cli.py": 2, "chat/terminal.py": 3, "chat/telemetry.py": 1}
    root = Path(ws.__file__).parent
    for file in sorted(root.rglob("*.py")):
        calls = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        name = file.relative_to(root).as_posix()
        assert len(prints) <= allowed.get(name, 0), f"{name} prints in lines {prints}"


def test_an_evaluation_as_json_is_its_tables(command, tiny, tmp_path):
    model, _ = tiny
    delta = LinearDelta(96, 64, u=0.3 * torch.randn(96, 2), v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    asked = ["--out", str(tmp_path), "--split", "dev", "--limit", "6", "--n-bootstrap", "100", "--device", "cpu"]
    code, out, err = command(*asked, "--json", "--quiet", function=evaluate_claims, options=SycophancyOptions)
    assert (code, err) == (0, "")
    found = json.loads(out)
    summary = tmp_path / "honesty/lora/sycophancy_summary.csv"
    assert found["data"]["rows"] == read_values(summary)
    assert [r["alpha"] for r in found["data"]["rows"] if r["claims_are_true"] is False] == [-1.0, 0.0, 1.0]
    assert str(summary) in found["files"]
    assert "Worked example" in found["data"]["example"]
