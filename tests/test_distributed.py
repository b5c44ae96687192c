"""Training on two processes: the steps, the files and the vector of one process, and errors said once."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

import ws
from ws import console
from ws.data import Pair
from ws.files.runs import data_folder
from ws.lm.trainer import _Filled
from ws.options.make import ReplicateConfig, TrainCommand, TrainConfig, train_preset
from ws.train import join, main, on_main

TOLERANCE = 1e-4  # relative difference of dW in float32, where only the order of sums differs
FOLDER = Path("honesty")
# Answers of 4 to 24 tokens, a last training batch and a last validation batch that are short.
PAIRS = [
    Pair(
        f"q{i}", f"What color is number {i}?", "It is red. " * (1 + i % 5), "It is blue and " * (1 + i % 3) + "so", 6, 6
    )
    for i in range(23)
]
# Each process adds up two micro-batches per step; eight steps go twice through the 14 training examples.
CONFIG = replace(train_preset("tiny-random", "lora"), batch=4, micro_batch=1, max_steps=8, validation=0.4)
CUT = 7  # the step after which a training is interrupted; its last checkpoint, at 6, is amid the second pass
ARMS = (("lora", "pos"), ("lora", "neg"), ("pissa", "pos"), ("dora", "signed"), ("ia3", "signed"))
WITH_MARGIN = {("lora", "neg"), ("ia3", "signed")}
DRIVER = """
import json, sys
from pathlib import Path
from test_distributed import interrupted
from ws import console, train

for line, cut in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv = ["ws train", *line]
    if cut:
        interrupted(line)
    else:
        console.run(train.main, train.TrainCommand, "ws train")
"""


def words(out: Path, adapter: str = "lora", sign: str = "pos", **changes: object) -> list[str]:
    """The command line that trains one arm with `CONFIG`."""
    flags = {k: getattr(CONFIG, k) for k in ("batch", "micro_batch", "max_steps", "validation")} | changes
    flags["keep"] = "best" if adapter == "pissa" else "last"
    flags["kl"] = 0.5 if adapter in ("pissa", "dora") else 0.0
    flags["objective"] = "margin" if (adapter, sign) in WITH_MARGIN else "likelihood"
    what = "--contrast signed" if sign == "signed" else f"--signs {sign}"
    line = f"--model tiny-random --device cpu --out {out} --adapter {adapter} {what}"
    return line.split() + [w for k, v in flags.items() for w in ("--" + k.replace("_", "-"), str(v))]


def give_pairs(out: Path) -> Path:
    """Put the pairs where `ws train` looks for them."""
    folder = data_folder(out, "tiny-random", "honesty")
    folder.mkdir(parents=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in PAIRS))
    return out


def train_here(line: list[str]) -> None:
    main(console.parse(TrainCommand, line))


def interrupted(line: list[str]) -> None:
    """Train until all processes are interrupted after step `CUT`."""

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == CUT:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ws.lm.trainer._Progress.on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_here(line)


def on_two_processes(commands: list[tuple[list[str], bool]], file: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run the commands on two processes; like a launcher, end the second one when the first has failed."""
    file.write_text(json.dumps(commands), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(Path(__file__).parent)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        line = [sys.executable, "-c", DRIVER, str(file)]
        started.append(subprocess.Popen(line, env=os.environ | place, **pipes))
    done = []
    for process in started:
        out, err = process.communicate(timeout=240)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        if process.returncode:
            started[1].terminate()
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All that one pair of processes trains, and the same trained here on one process."""
    top = tmp_path_factory.mktemp("distributed")
    one, two, cut, again, handed_over, bad = (
        give_pairs(top / n) for n in ("one", "two", "cut", "again", "handed_over", "bad")
    )
    for adapter, sign in ARMS:
        train_here(words(one, adapter, sign))
    interrupted(words(handed_over))
    commands = [(words(two, adapter, sign), False) for adapter, sign in ARMS] + [(words(two), False)]
    commands += [(words(cut), True), (words(again), True), (words(again), False), (words(handed_over), False)]
    processes = on_two_processes([*commands, (words(bad, lr=2e9), False)], top / "commands.json")
    return top, processes


def named(adapter: str, sign: str) -> str:
    """The adapter's folder."""
    return f"{adapter}-signed" if sign == "signed" else adapter


def difference(a: Path, b: Path, model) -> float:
    """Relative difference of two adapters' changes of the weights."""
    first, second = (ws.SteeringVector.from_adapter(p, model) for p in (a, b))
    return (first - second).norm(model) / first.norm(model)


@pytest.mark.parametrize(("adapter", "sign"), ARMS)
def test_two_processes_train_the_adapter_of_one(trained, tiny, adapter, sign):
    top, _ = trained
    folders = [top / n / FOLDER / named(adapter, sign) / sign for n in ("one", "two")]
    assert difference(*folders, tiny[0]) < TOLERANCE
    facts = [json.loads((f / "ws_train.json").read_text())["facts"] for f in folders]
    assert [f["processes"] for f in facts] == [1, 2]
    for key in ("train_losses", "validation_losses"):
        assert facts[1][key] == pytest.approx(facts[0][key], abs=2e-5)
    assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}


def test_the_difference_is_one_that_a_wrong_batch_would_show(trained, tiny, tmp_path):
    """The tolerance is tight: leaving out one example of 23 moves dW by far more."""
    top, _ = trained
    give_pairs(tmp_path)
    file = data_folder(tmp_path, "tiny-random", "honesty") / "pairs.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    train_here(words(tmp_path))
    assert difference(top / "one" / FOLDER / "lora" / "pos", tmp_path / FOLDER / "lora" / "pos", tiny[0]) > 0.01


def test_only_the_main_process_writes_and_speaks(trained):
    top, (first, second) = trained
    assert second.stdout == ""
    assert "error: " in first.stderr, "the last of its commands was one that fails"
    assert "error: " not in second.stderr
    assert "train:" not in second.stderr
    said = re.findall(r"^(?:pos|neg|signed): (.+)", first.stdout, re.MULTILINE)
    assert said == ["trained"] * len(ARMS) + ["already there"] + ["trained"] * 2
    for adapter, sign in ARMS:
        folders = [top / n / FOLDER / named(adapter, sign) for n in ("one", "two")]
        assert {p.name for p in folders[0].iterdir()} == {p.name for p in folders[1].iterdir()}, (
            "no work folder is left"
        )
        stages = [json.loads((f / "manifest.json").read_text())["stages"][sign] for f in folders]
        assert stages[0]["outputs"].keys() == stages[1]["outputs"].keys()
        assert stages[0]["config"] == stages[1]["config"], "so what several trained is finished for one as well"


def test_an_interrupted_training_continues_on_as_many_processes_as_there_are(trained, tiny):
    """Begun on two and ended on two, begun on one and ended on two, begun on two and ended on one."""
    top, _ = trained
    (work,) = (top / "cut").rglob(".pos.work")
    assert {p.name for p in work.iterdir()} == {"settings", "checkpoint-4", "checkpoint-6"}
    train_here(words(top / "cut"))
    for name in ("again", "handed_over", "cut"):
        arms = (top / n / FOLDER / "lora" / "pos" for n in ("one", name))
        assert difference(*arms, tiny[0]) < TOLERANCE, name


def test_an_error_is_said_once_and_leaves_nothing(trained):
    top, (first, second) = trained
    assert first.returncode == 2
    assert "error: Training diverged" in first.stderr
    assert (first.stderr + second.stderr).count("error: ") == 1
    assert "Traceback" not in first.stderr + second.stderr
    folder = top / "bad" / FOLDER / "lora"
    assert {p.name for p in folder.iterdir()} <= {"manifest.json", ".manifest.json.lock", ".pos.lock"}
    assert json.loads((folder / "manifest.json").read_text())["stages"] == {}


# ---- the arithmetic -----------------------------------------------------------------------------------------------

small = st.integers(1, 12)


@given(batch=st.integers(1, 64), micro=small, processes=small)
def test_a_step_has_the_same_number_of_examples_on_any_number_of_processes(batch, micro, processes):
    config = TrainConfig(batch=batch, micro_batch=micro)
    try:
        assert config.accumulation(processes) * micro * processes == batch
    except ws.WsError as problem:
        assert batch % (micro * processes)
        if "use `micro_batch`" in str(problem):
            fits = int(str(problem).rstrip(".").split()[-1])
            assert fits <= micro
            assert replace(config, micro_batch=fits).accumulation(processes) * fits * processes == batch
        else:
            assert batch % processes


@given(count=st.integers(1, 60), micro=st.integers(1, 5), processes=st.integers(1, 4), passes=st.integers(1, 3))
def test_a_step_takes_the_same_examples_on_any_number_of_processes(count, micro, processes, passes):
    """Dealt out by accelerate's own sampler; what is past the end (a filler) takes the place of nothing."""
    order = list(range(count))[::-1]
    filled = _Filled(count, micro * processes, lambda: order)
    shares = [
        list(BatchSamplerShard(BatchSampler(filled, micro, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(len(micro_batch) == micro for share in shares for micro_batch in share)
    batch = micro * processes * passes
    steps = [
        sorted(i for share in shares for part in share[first : first + passes] for i in part if i < count)
        for first in range(0, len(shares[0]), passes)
    ]
    assert steps == [sorted(order[start : start + batch]) for start in range(0, count, batch)]


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture
def announced(monkeypatch):
    """As if a launcher had started two processes and this were the main one."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_other_commands_run_on_one_process_only(announced, monkeypatch, capsys):

    done = []
    monkeypatch.setattr(sys, "argv", ["ws replicate"])
    with pytest.raises(SystemExit) as end:
        console.run(done.append, ReplicateConfig, "ws replicate")
    assert end.value.code == 2
    assert "ws replicate runs on one process; only `ws.train` runs on several" in capsys.readouterr().err
    assert not done


@pytest.mark.parametrize(("device", "way", "message"), [("cuda:1", "", "`device` cuda:1"), ("cpu", "FSDP", "FSDP")])
def test_what_cannot_be_shared_is_refused(announced, monkeypatch, device, way, message):
    if way:
        monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(ws.WsError, match=message):
        join(device)


def test_a_batch_that_cannot_be_shared_is_refused_with_one_that_can(announced, tmp_path, tiny):
    from ws.train import train_adapter

    with pytest.raises(ws.WsError, match="`batch` 4 is not a multiple of 2 processes x `micro_batch` 4; use .* 2"):
        train_adapter(*tiny, PAIRS, "pos", "lora", tmp_path / "pos", replace(CONFIG, micro_batch=4))


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for programs that they start once
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert console.processes() == 1
    assert console.is_main()
    assert on_main(lambda: 7) == 7


# ---- the real launchers -------------------------------------------------------------------------------------------

LAUNCHERS = {
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_replicate_takes_up_what_a_launcher_trained(launcher, tmp_path):
    program, *rest = LAUNCHERS[launcher]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}

    def call(*line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    flags = ["--model", "tiny-random", "--device", "cpu"]
    settings = [*flags, "--micro-batch", "2"]
    assert call(sys.executable, "-m", "ws.data", *flags).returncode == 0
    launch = [str(Path(sys.executable).parent / program), *rest, "-m"]
    done = call(*launch, "ws.train", *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": trained") == 2
    arms = [tmp_path / "out" / FOLDER / "lora" / s / "adapter_model.safetensors" for s in ("pos", "neg")]
    stamps = [a.stat().st_mtime_ns for a in arms]
    done = call(sys.executable, "-m", "ws.replicate", *settings, "--split", "dev")
    assert done.returncode == 0, done.stderr
    assert [a.stat().st_mtime_ns for a in arms] == stamps, "nothing was trained again"
    assert (arms[0].parents[1] / "vector" / "ws.json").is_file()
    done = call(*launch, "ws.replicate", *settings)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "only `ws.train` runs on several processes" in done.stderr
