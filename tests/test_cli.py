"""The command line: bad input is one sentence and exit code 2, and a killed run resumes to the same bits."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from benchmarks.startup import NEED_PEFT

import ws
from support import processes
from ws import cli
from ws.cli import COMMANDS
from ws.console import FLAGS, about, parse
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.files import runs
from ws.files.runs import DEFAULT_MODEL
from ws.options.make import ReplicateConfig
from ws.options.use import InspectConfig

TINY = ["--model", "tiny-random", "--split", "dev"]


def run_ws(*arguments: str, cwd: Path, importing: bool = False, **options) -> subprocess.CompletedProcess:
    """`ws ...` as a process; with `importing`, every module that it imports is a line on stderr."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPROFILEIMPORTTIME": "1"} if importing else {})
    command = [sys.executable, "-m", "ws.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, **options)


BAD_INPUT = {
    "unknown command": (["replcate"], "Did you mean 'replicate'"),
    "unknown model": (["replicate", "--model", "poket"], "Did you mean 'pocket'"),
    "unknown adapter": (["replicate", *TINY, "--adapter", "delra"], "Did you mean 'delora'"),
    "unknown behaviour": (["replicate", *TINY, "--behavior", "honsty"], "Did you mean 'honesty'"),
    "empty pool": (["replicate", *TINY, "--behavior", "empty.toml"], "topics must be a non-empty list"),
    "no topics": (["replicate", *TINY, "--n-topics", "0"], "--n-topics 0 is out of range"),
    "rank 0": (["replicate", *TINY, "--rank", "0"], "--rank must be at least 1"),
    "layers out of range": (["replicate", *TINY, "--layers", "3:9"], "out of range"),
    "alpha NaN": (["replicate", *TINY, "--alphas", "nan"], "--alphas must be a finite number"),
    "unknown split": (["replicate", *TINY[:2], "--split", "deev"], "Did you mean 'dev'"),
    "half-written folder": (["train", *TINY[:2]], "no contrast pairs"),
    "unknown demo adapter": (["demo", "--adapter", "loora"], "Did you mean 'lora'"),
    "vector gone": (["inspect", "nowhere"], "no folder nowhere"),
    "vector half-written": (["inspect", "torn"], "ws.json is missing"),
    "vector of another base": (["inspect", "vector", "--model", "tiny-random"], "weights differ"),
    "too few resamples": (["replicate", *TINY, "--n-bootstrap", "3"], "--n-bootstrap must be at least 100"),
    "too many resamples": (["replicate", *TINY, "--n-bootstrap", str(10**12)], "--n-bootstrap must be at most 1000000"),
}
EMPTY_POOL = """schema = 1
name = "empty"
summary = "Nothing."
[personas]
positive = ["a"]
negative = ["b"]
[questions]
topics = []
[claims]
source = "sycophancy"
effect = -1
"""


@pytest.mark.parametrize(
    ("arguments", "first", "some"),
    [
        ([], "usage: ws COMMAND", ["Start", "replicate", "Look"]),
        (["eval"], "usage: ws eval NAME", ["eval airisk", "eval preference"]),
        (["export", "--help"], "usage: ws export NAME", ["export peft"]),
        (["--version"], ws.__version__, []),
    ],
)
def test_what_there_is_can_be_asked_for(arguments, first, some, monkeypatch, capsys):
    from ws.cli import main

    monkeypatch.setattr(sys, "argv", ["ws", *arguments])
    main()
    out = capsys.readouterr().out
    assert out.startswith(first)
    assert all(name in out for name in some)
    assert ("  demo" in out) == (not arguments)


def test_every_command_is_listed_once_and_is_there():
    from ws.cli import COMMANDS, FAMILIES, GROUPS, QUEUE, _help

    assert len(COMMANDS) == sum(map(len, GROUPS.values())) + 1, "all but the queue, which is a sweep"
    listed = _help(GROUPS)
    for name, (place, options) in COMMANDS.items():
        module, function = place.split(":")
        assert callable(getattr(import_module(module), function))
        assert about(options)
        family, _, member = name.partition(" ")
        assert name == QUEUE or (f"  {family} NAME " if member else f"  {name} ") in listed
        assert not member or family in FAMILIES
    assert len([line for line in listed.splitlines() if line.startswith("  ")]) <= 25


@pytest.mark.parametrize("name", COMMANDS)
def test_help_opens_with_a_whole_sentence(name):
    """One that begins with what the command does: a verb, as in "Train one vector"."""
    first = (inspect.getdoc(COMMANDS[name][1]) or "").split("\n")[0]
    assert re.fullmatch(r"[A-Z][a-z]+ .*[.;`)]", first), first
    assert first.split()[0] not in ("The", "A", "An", "All", "Every", "What", "Where", "Which", "How", "One", "Fewer")
    assert "..." not in about(COMMANDS[name][1])


@pytest.mark.parametrize("family", cli.FAMILIES)
def test_a_family_says_what_it_is_and_how_it_is_used(family):
    usage, _, title, *_ = cli._without_a_command([family, "--help"]).splitlines()
    assert (usage, title) == (f"usage: ws {family} NAME [options]", cli.FAMILIES[family])


@pytest.mark.parametrize(
    ("words", "name", "rest"),
    [
        (["eval", "airisk", "--limit", "3"], "eval airisk", ["--limit", "3"]),
        (["eval-airisk", "--limit", "3"], "eval airisk", ["--limit", "3"]),
        (["controls"], "check controls", []),
        (["check-behavior", "x.toml"], "behavior check", ["x.toml"]),
        (["push", "a/b"], "export push", ["a/b"]),
        (["sweep", "--seeds", "0"], "sweep", ["--seeds", "0"]),
        (["sweep", "--seeds", "0", "--backend", "pueue"], "queue", ["--seeds", "0", "--backend", "pueue"]),
        (["sweep", "--backend=ray"], "queue", ["--backend=ray"]),
        (["queue"], "queue", []),
    ],
)
def test_a_command_goes_by_its_name_and_by_its_former_one(words, name, rest):
    from ws.cli import _named

    assert _named(words) == (name, rest)


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        ("sweep --backend pueue --seeds 0", "ws sweep --backend pueue --seeds 0"),
        ("queue --workers 2", "ws queue --workers 2"),
        ("eval-airisk --limit 3", "ws eval airisk --limit 3"),
        ("controls --n-draws 5", "ws check controls --n-draws 5"),
    ],
)
def test_what_is_put_on_record_can_be_typed_again(words, recorded, monkeypatch):
    commands = []
    monkeypatch.setattr(sys, "argv", ["ws"])
    monkeypatch.setattr(ws.console, "run", lambda *given: commands.append((runs._command(), given[1])))
    cli._run(words.split(), [])
    [(command, options)] = commands
    assert command == recorded
    assert COMMANDS[cli._named(command.split()[1:])[0]][1] is options


@pytest.mark.parametrize(
    ("name", "words", "field", "value"),
    [
        ("replicate", ["--kinds", "q_proj"], "train.kinds", ("q_proj",)),
        ("replicate", ["--modules", "q_proj", "k_proj"], "train.kinds", ("q_proj", "k_proj")),
        ("trim", ["--to", "small"], "to", "small"),
        ("chat", ["--max_tokens=9"], "max_tokens", 9),
        ("monitor", ["x", "--library", "y", "--controls", "z"], "controls", ("z",)),
        ("eval capability", ["split=train"], "split", "train"),
    ],
)
def test_an_option_goes_by_the_name_that_it_had_before(name, words, field, value):
    assert attrgetter(field)(parse(COMMANDS[name][1], words, f"ws {name}")) == value


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_sentence(name, capsys):
    """And what stands for its value is readable."""
    with pytest.raises(SystemExit) as stop:
        parse(COMMANDS[name][1], ["--help"], f"ws {name}")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    text = "\n".join(line.strip("│ ") for line in shown.splitlines() if line.startswith("│"))
    assert re.findall(r"^(--\S+(?: [A-Z|]+)?(?: \.\.\.)?)\s+(?:\(|-)", text, re.MULTILINE) == []
    assert not re.search(r"\{None\}|\[STR \[|Config`|Options`", shown)


# What takes seconds to import.
HEAVY = {"torch", "transformers", "peft", "accelerate", "scipy", "numpy", "matplotlib", "datasets", "pyarrow"}
HEAVY |= {"gradio", "fastapi", "uvicorn"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["eval"], 0),
        (["replicate", "--adaptr", "lora"], 2),
        (["replicate", "--behavior", "nowhere.toml"], 2),
        (["eval", "airisk"], 2),
        (["eval", "airisk", "--batch-size", "0"], 2),
        (["chat"], 2),
        (["serve", "--help"], 0),
        (["serve", "--host", "10.0.0.5"], 2),
        (["export", "merged"], 2),
        (["behavior", "check", "nowhere.toml"], 2),
        (["inspect", "nowhere"], 2),
        (["report"], 2),
    ],
)
def test_what_needs_no_model_is_answered_without_torch(words, code, tmp_path):
    assert imported_by(*words, code=code, cwd=tmp_path) & HEAVY == set()


def test_tables_are_read_without_torch(tmp_path):
    computing = {"numpy", "scipy"}
    assert imported_by("behavior", "check", "honesty", code=0, cwd=tmp_path) & HEAVY <= computing
    assert imported_by("summarize-airisk", code=2, cwd=tmp_path) & HEAVY == computing, "it came as far as the tables"


def imported_by(*words: str, code: int, cwd: Path) -> set[str]:
    """The packages that a command has imported when it ends with an exit code."""
    done = run_ws(*words, cwd=cwd, importing=True)
    assert done.returncode == code, done.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "tyro" in imported, "the imports were listed"
    return imported


def test_no_command_needs_torch_to_say_what_it_can_be_told():
    code = (
        "import sys\nfrom contextlib import suppress\nfrom ws.cli import COMMANDS\nfrom ws.console import parse\n"
        "for name, (_, options) in COMMANDS.items():\n    with suppress(SystemExit):\n"
        "        parse(options, ['--help'], name)\n"
        f"print('heavy:', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n")
    assert done.stdout.count("usage: ") == len(COMMANDS)


def test_peft_is_imported_by_what_needs_it_only():
    """It takes seconds, and brings bitsandbytes where that is installed."""
    others = {place.split(":")[0] for place, _ in COMMANDS.values()} - {f"ws.{name}" for name in NEED_PEFT.split()}
    assert len(others) > 20
    code = f"import sys, {', '.join(sorted(others))}\nprint('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_a_shell_completes_commands_members_and_options(tmp_path):
    script = run_ws("--completion", "bash", cwd=tmp_path)
    assert script.returncode == 0, script.stderr
    (tmp_path / "completion.bash").write_text(script.stdout, encoding="utf-8")

    def completed(*words: str) -> set[str]:
        line = f"COMP_WORDS=({' '.join(words)}) COMP_CWORD={len(words) - 1}; _tyro_ws; echo ${{COMPREPLY[@]}}"
        shell = ["bash", "-c", f"source {tmp_path}/completion.bash; {line}"]
        return set(subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split())

    assert completed("ws", "comp") == {"compare", "compose"}
    assert {"airisk", "lm-eval"} <= completed("ws", "eval", "''")
    assert "--n-bootstrap" in completed("ws", "eval", "airisk", "--n-b")
    unknown = run_ws("--completion", "fish", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "zsh" in unknown.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes end otherwise there")
@pytest.mark.parametrize(
    "words", [["--help"], ["replicate", "--help"], ["behavior", "new", "--help"], ["--completion", "bash"]]
)
def test_a_reader_that_has_had_enough_is_no_error(words, tmp_path):
    command = [sys.executable, "-m", "ws.cli", *words]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.skipif(os.name != "posix", reason="a POSIX shell closes them")
@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [
        ("inspect nowhere", ">&-", 2),
        ("behavior new --help", ">&-", 0),
        ("behavior new one", ">&-", 0),
        ("inspect nowhere", "2>&-", 2),
        ("inspect nowhere", "<&- >&- 2>&-", 2),
    ],
)
def test_closed_streams_lead_nowhere(words, closed, code, tmp_path):
    command = f'exec "$0" -m ws.cli {words} {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert "Traceback" not in done.stdout + done.stderr
    assert ("There is no folder nowhere" in done.stderr) == (code == 2 and "2>" not in closed)


def test_flags_may_come_before_the_command(tmp_path, monkeypatch, capsys):
    from ws.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ws", "--json", "--quiet", "inspect", "nowhere"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == 2
    assert "nowhere" in json.loads(capsys.readouterr().out)["error"]


def test_modules_without_a_command_say_so_and_the_package_has_one(tmp_path):
    for module, code, said in (
        ("ws", 0, "usage: ws COMMAND"),
        ("ws.steer", 2, "is for Python"),
        ("ws.diff", 2, "--pos"),
    ):
        done = processes.run(["python", "-m", module], tmp_path)
        assert done.returncode == code
        assert said in done.stdout + done.stderr


def test_no_library_speaks_when_a_module_is_run():
    """Training imports its libraries before the command line is reached."""
    done = subprocess.run([sys.executable, "-m", "ws.train", "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, case, monkeypatch, capsys):
    arguments, message = BAD_INPUT[case]
    (tmp_path / "empty.toml").write_text(EMPTY_POOL)
    (tmp_path / "torn").mkdir()
    foreign = LinearDelta(2, 2, g=torch.ones(2))
    ws.SteeringVector({"model.layers.0.mlp.up_proj": foreign}, "someone/else", "0123").save(tmp_path / "vector")
    files = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ws", *arguments])
    from ws.cli import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2
    assert len(errors) == 1
    assert message in errors[0]
    assert set(tmp_path.rglob("*.safetensors")) <= files, "nothing was trained"


def test_no_traceback_unless_asked_for(tmp_path):
    plain = processes.run(["ws", "replicate", "--model", "poket"], tmp_path)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert "Traceback" not in plain.stderr
    debug = processes.run(["ws", "replicate", "--model", "poket", "--debug"], tmp_path)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


def test_a_misspelt_option_is_explained_with_exit_code_2(tmp_path):
    done = processes.run(["ws", "replicate", "--modl", "pocket"], tmp_path)
    assert done.returncode == 2
    assert "--modl" in done.stderr + done.stdout


def test_help_lists_every_command_and_its_presets(tmp_path):
    listing = processes.run(["ws", "--help"], tmp_path).stdout
    assert all(name in listing for name in ("demo", "replicate", "data", "train"))
    assert processes.run(["ws", "--version"], tmp_path).stdout.strip() == "0.1.0"
    options = processes.run(["ws", "replicate", "--model", "pocket", "--help"], tmp_path).stdout
    assert "--rank" in options
    assert "(default: 8)" in options


def test_inspect_says_what_a_vector_is(tmp_path, monkeypatch, capsys):
    from ws.cli import inspect

    factors = LinearDelta(2, 2, u=torch.ones(2, 1), v=torch.ones(1, 2))
    modules = dict.fromkeys(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], factors)
    vector = ws.SteeringVector(modules, "someone/else", "0123", {}, {"behavior": "wit"})
    inspect(InspectConfig(str(vector.save(tmp_path / "v"))))
    said = " ".join(capsys.readouterr().out.split())
    assert "base someone/else (0123) behavior wit modules 2 parameters stored 4 largest" in said
    assert "largest rank 1 loads as a PEFT LoRA yes norm 2" in said


def test_options_start_from_the_models_preset():
    assert parse(ReplicateConfig, []).model == DEFAULT_MODEL
    assert parse(ReplicateConfig, []).train.rank == 32
    pocket = parse(ReplicateConfig, ["--model", "pocket", "--adapter", "ia3", "--lr", "0.5", "--alphas", "-1", "1"])
    assert (pocket.train.rank, pocket.train.lr, pocket.alphas) == (8, 0.5, (-1.0, 1.0))


LONG = ["replicate", *TINY, "--n-topics", "40", "--data-batch", "4", "--max-steps", "30", "--batch", "4"]
LONG += ["--micro-batch", "2", "--out", "out"]


def kill_when(path: str, cwd: Path) -> None:
    """Start the long run and kill it without warning as soon as something matches `path`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ws.cli", *LONG], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size for f in cwd.glob(path)) and process.poll() is None:
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.005)
    assert process.poll() is None, f"the run ended before {path} appeared"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_vector(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    assert processes.run(["ws", *LONG], whole).returncode == 0
    kill_when("out/data/tiny-random/honesty/pairs.partial.jsonl", torn)
    kill_when("out/honesty/lora/.pos.work/checkpoint-*/trainer_state.json", torn)
    kill_when("out/honesty/lora/.neg.work/checkpoint-*/adapter_model.safetensors", torn)
    assert processes.run(["ws", *LONG], torn).returncode == 0
    vector = torn / "out/honesty/lora/vector"
    vector.rename(vector.with_name(".vector.part"))  # as a kill in the middle of writing the vector leaves it
    (vector.with_name(".vector.part") / "ws.json").unlink()
    done = processes.run(["ws", *LONG], torn)
    assert done.returncode == 0, done.stderr
    assert "No conclusion" in done.stdout
    digests = {vector_digest(ws.SteeringVector.load(f / "out/honesty/lora/vector")) for f in (whole, torn)}
    assert len(digests) == 1
    tables = {(f / "out/honesty/lora/sycophancy_per_claim.csv").read_text() for f in (whole, torn)}
    assert len(tables) == 1
    assert not [p for p in (torn / "out/honesty/lora").glob(".*") if p.is_dir()], "no work folder stays behind"


SHORT, ARM = ["--n-topics", "12", "--data-batch", "3"], ["--max-steps", "4", "--batch", "4", "--micro-batch", "2"]
PAIRS = Path("out/data/tiny-random/honesty/pairs.jsonl")


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Pairs, arms and vectors below a folder; not what says when something was made."""
    kept = (".jsonl", ".safetensors")
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.name.endswith(kept)}


def test_commands_begun_together_do_the_work_once(tmp_path):
    """Two on the same pairs, half a second apart, and two on the same arm: each pair ends as one command would."""
    data, train = ["ws", "data", *TINY[:2], *SHORT], ["ws", "train", *TINY[:2], *ARM, "--signs", "pos"]
    for name in ("whole", "both"):
        (tmp_path / name).mkdir()
    for words in (data, train):
        assert processes.run(words, tmp_path / "whole").returncode == 0
        done = processes.together([words, words], tmp_path / "both", apart=0.5 * (words is data), slow=0.4)
        assert [d.returncode for d in done] == [0, 0], done
        assert sum("waiting for another process that is working on" in d.stderr for d in done) == 1
    assert sorted(d.stdout.splitlines()[0] for d in done) == ["pos: already there", "pos: trained"]
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "whole")
    assert len(bytes_of(tmp_path / "both")) == 2
    facts = json.loads((tmp_path / "both/out/honesty/lora/pos/ws_train.json").read_text())["facts"]
    kept = json.loads((tmp_path / "both" / PAIRS.with_name("card.json")).read_text())["kept"]
    assert kept - 2 <= facts["examples"] <= kept, "all of the pairs, but for the questions of the validation"


def test_a_killed_command_keeps_nobody_waiting(tmp_path):
    words, partial = ["ws", "data", *TINY[:2], *SHORT], tmp_path / PAIRS.with_name("pairs.partial.jsonl")
    (streams := tmp_path / "streams").mkdir()
    process = processes.start(words, tmp_path, streams, slow=0.4)
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / PAIRS).exists()
    done = processes.run(words, tmp_path)
    assert done.returncode == 0
    assert "waiting" not in done.stderr
    assert (tmp_path / PAIRS).read_bytes().count(b"\n") == 12
    assert not partial.exists()


@pytest.mark.slow
def test_five_adapters_at_once_are_what_they_are_one_after_the_other(tmp_path):
    commands = [
        ["ws", "replicate", *TINY, *SHORT, *ARM, "--adapter", name] for name in ("lora", "dora", "pissa", "oft", "ia3")
    ]
    for name in ("one by one", "at once"):
        (tmp_path / name).mkdir()
    assert [processes.run(words, tmp_path / "one by one").returncode for words in commands] == [0] * 5
    done = processes.together(commands, tmp_path / "at once", slow=0.4)
    assert [d.returncode for d in done] == [0] * 5, done
    waits = [[line for line in d.stderr.splitlines() if "waiting for another process" in line] for d in done]
    assert sum(any(PAIRS.name in line for line in lines) for lines in waits) == 4, waits
    alone, together = (bytes_of(tmp_path / name) for name in ("one by one", "at once"))
    assert together == alone
    assert len(alone) == 1 + 5 * 3 + 2, "pairs, two arms and a vector each, and PiSSA's two starts"


def test_an_interrupt_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ws.cli", *LONG],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any(tmp_path.glob("out/data/*/*/pairs.partial.jsonl")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors


def test_a_local_folder_goes_the_way_of_a_hub_id(tmp_path):
    """Real-model defaults (not the presets of the bundled models) and the real behaviour, on a folder of that shape."""
    from dataclasses import replace

    from ws.lm.models import load_tokenizer, tiny_random
    from ws.replicate import render, replicate

    tiny_random().save_pretrained(tmp_path / "model")
    load_tokenizer("pocket").save_pretrained(tmp_path / "model")
    config = ReplicateConfig.preset(str(tmp_path / "model"), "dora")
    assert config.train.lr is None
    config = replace(config, out=tmp_path / "out", alphas=(0.0, 2.0), train=replace(config.train, lr=1e-2, batch=4))
    config = replace(config, data=replace(config.data, n_topics=16, n_samples=1, anyway=True))
    reading = replicate(config)
    assert len(reading.false_claims[0.0].claims) == 12
    assert {n.split(".")[2] for n in reading.vector.deltas} == {"1", "2"}, "layers 30 to 80 %"
    assert reading.vector.max_rank == 2 * 32
    assert (tmp_path / "out/data/model/honesty/pairs.jsonl").is_file()
    assert "claims" in render(reading)


def hints() -> Iterator[tuple[str, str]]:
    """Where a `ws` command stands in backticks in the source, and its text; what is put in at run time is `X`."""
    for file in sorted(Path(ws.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            yield from ((file.name, hint) for hint in re.findall(r"`ws ([a-z][^`]*)`", text))


def names_of(options: type) -> set[str]:
    """The options of a command, those of nested classes among them, as they are typed."""
    kinds = get_type_hints(options)
    nested = [kinds[f.name] for f in fields(options) if is_dataclass(kinds[f.name])]
    names = {f"--{f.name.replace('_', '-')}" for f in fields(options)}.union(*map(names_of, nested))
    return names | {f"--no-{f.name.replace('_', '-')}" for f in fields(options) if kinds[f.name] is bool}


def test_every_hint_in_the_source_names_a_command_and_options_that_it_has():
    found = list(hints())
    assert len(found) > 80
    for place, hint in found:
        if not hint.startswith(tuple(cli.FAMILIES)) or hint.split()[1:]:
            name, rest = cli._named(hint.split())
            known = names_of(COMMANDS[name][1]) | set(FLAGS) | {"--help"}
            unknown = {word for word in rest if word.startswith("--")} - known
            assert not unknown, f"{place}: `ws {hint}` has no {unknown}"


def test_an_error_names_options_as_its_reader_gives_them(monkeypatch):
    problem = ws.WsError("--n-think 3 is too many for a--b/--c; run `ws data --fresh` (or --keep-truncated).")
    text = "`n_think` 3 is too many for a--b/--c; run `ws data --fresh` (or `keep_truncated`)."
    assert str(problem) == text
    monkeypatch.setattr(ws.WsError, "in_command", True)
    assert str(problem) == problem.args[0]
