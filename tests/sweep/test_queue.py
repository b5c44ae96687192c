"""The queue: the graph of a sweep, and back ends that order, isolate, resume, and survive the loss of a node."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import ws
from ws.behaviors import behavior_file
from ws.console import parse
from ws.new_behavior import style_template
from ws.options.make import DataCommand, QueueConfig, ReplicateConfig
from ws.options.shared import EvalOptions
from ws.options.use import TableConfig
from ws.sweep.backends import pueue_script, run_local, run_pueue, run_ray
from ws.sweep.jobs import Job, Ledger, in_order
from ws.sweep.queue import main, report, run_queue, sweep_jobs

TINY = QueueConfig(model="tiny-random", device="cpu")
PATIENCE = 60  # seconds until something that should happen at once counts as not happening
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


def job(name: str, code: str, *after: str) -> Job:
    """A job of a few lines of Python."""
    return Job(name, (sys.executable, "-c", f"import os, sys, time, pathlib\n{code}"), after)


def note(name: str, *after: str) -> Job:
    """A job that writes its name to the file `order`."""
    return job(name, f"open('order', 'a').write('{name} ')", *after)


def until(file: str) -> str:
    """Code that waits for a file."""
    return f"end = time.time() + {PATIENCE}\nwhile not os.path.exists({file!r}) and time.time() < end: time.sleep(0.01)"


def states(outcomes) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the graph ----------------------------------------------------------------------------------------------------


def test_finished_runs_are_evaluated_by_twelve_jobs_and_a_summary():
    *evals, summary = sweep_jobs(replace(TINY, eval_only=True))
    families = ("ia3", "oft", "dora", "lora", "pissa", "delora")
    assert {j.name for j in evals} == {f"{e}-{a}" for e in ("airisk", "tinymfv_airisk") for a in families}
    assert len(evals) == 12
    assert not any(j.after for j in evals)
    assert summary.name == "summarize"
    assert set(summary.after) == {j.name for j in evals}
    assert summary.command[1:3] == ("-m", "ws.eval.readme_airisk_table")
    assert parse(TableConfig, summary.command[3:]) == TableConfig()


def test_training_comes_after_the_pairs_and_before_its_evaluations():
    jobs = {j.name: j for j in sweep_jobs(replace(TINY, seeds=(0, 2), adapters=("lora", "ia3")))}
    assert len(jobs) == 1 + 4 + 8 + 1
    assert jobs["pairs"].after == ()
    assert jobs["train-ia3"].after == jobs["train-lora-seed-2"].after == ("pairs",)
    assert jobs["airisk-lora-seed-2"].after == jobs["tinymfv_airisk-lora-seed-2"].after == ("train-lora-seed-2",)
    run = parse(ReplicateConfig, jobs["train-lora-seed-2"].command[3:])
    assert (run.model, run.adapter, run.seed, run.alphas) == ("tiny-random", "lora", 2, (-1.0, 0.0, 1.0))
    scored = parse(EvalOptions, jobs["airisk-lora-seed-2"].command[3:])
    assert (scored.model, scored.adapter, scored.seed, scored.device) == ("tiny-random", "lora", 2, "cpu")


def test_signed_runs_are_evaluated_by_the_names_of_their_folders():
    jobs = {j.name: j for j in sweep_jobs(replace(TINY, adapters=("lora",), train_args="--contrast signed"))}
    run = parse(ReplicateConfig, jobs["train-lora"].command[3:])
    assert (run.adapter, run.contrast, run.run_name) == ("lora", "signed", "lora-signed")
    assert parse(EvalOptions, jobs["airisk-lora"].command[3:]).adapter == run.run_name


def test_the_summary_needs_both_data_sets_and_sycophancy_is_part_of_training():
    one = sweep_jobs(replace(TINY, adapters=("lora",), evals=("tinymfv_airisk", "sycophancy")))
    assert [j.name for j in one] == ["pairs", "train-lora", "tinymfv_airisk-lora"]
    (reading,) = sweep_jobs(replace(TINY, adapters=("lora",), evals=("sycophancy",), eval_only=True, dataset="pocket"))
    assert reading.name == "sycophancy-lora"
    assert "--dataset" not in reading.command, "claims come with the behaviour"
    with pytest.raises(ws.WsError, match="nothing to do"):
        sweep_jobs(replace(TINY, evals=(), eval_only=True))


def test_without_claims_it_is_the_preference_that_is_evaluated(folder):
    text, answers = style_template("pirate", "pirate.jsonl")
    Path("pirate.toml").write_text(text, encoding="utf-8")
    Path("pirate.jsonl").write_text(answers, encoding="utf-8")
    config = replace(TINY, behavior="pirate.toml", adapters=("lora",), evals=("sycophancy",))
    assert [j.name for j in sweep_jobs(replace(config, eval_only=True))] == ["preference-lora"]
    assert [j.name for j in sweep_jobs(config)] == ["pairs", "train-lora"], "which reads it"


def test_the_pairs_are_made_as_training_expects_them():
    extra = "--n-samples 2 --judge --n-topics None --data-seed 4 --rank 2 --fresh --dtype float32"
    pairs, train, *_ = sweep_jobs(replace(TINY, adapters=("lora",), train_args=extra, eval_args="--limit 5"))
    sampled, trained = parse(DataCommand, pairs.command[3:]), parse(ReplicateConfig, train.command[3:])
    assert sampled.data == trained.data
    assert (sampled.data.n_samples, sampled.data.judge, sampled.data.n_topics) == (2, True, None)
    assert (sampled.fresh, trained.fresh, trained.fresh_data) == (True, True, False), "pairs are sampled once"
    assert (sampled.device, sampled.dtype) == (trained.device, trained.dtype) == ("cpu", "float32")


def test_fresh_runs_may_keep_their_pairs():
    extra = "--fresh --no-fresh-data"
    pairs, train, *_ = sweep_jobs(replace(TINY, adapters=("lora",), train_args=extra))
    assert not parse(DataCommand, pairs.command[3:]).fresh
    assert not parse(ReplicateConfig, train.command[3:]).fresh_data


def test_mistakes_are_found_before_anything_runs(folder):
    for change, message in (
        ({"backend": "rey"}, "no back end named 'rey'. Did you mean 'ray'"),
        ({"adapters": ("loora",)}, "Did you mean 'lora'"),
        ({"evals": ("airsk",)}, "no evaluation named 'airsk'. Did you mean 'airisk'"),
        ({"behavior": "honsty"}, "Did you mean 'honesty'"),
        ({"workers": 0}, "`workers` must be at least 1"),
        ({"train_args": "--out there"}, "`train_args` cannot set `out`"),
        ({"train_args": "--batch 0"}, "`batch` must be positive"),
        ({"train_args": "--contrast sined"}, "no contrast named 'sined'. Did you mean 'signed'"),
        ({"eval_args": "--seed 3"}, "`eval_args` cannot set `seed`"),
        ({"train_args": "--control shuffled"}, "`train_args` cannot set `control`: the evaluations are of vectors"),
        ({"train_args": "--tuned"}, "`train_args` cannot set `tuned`: .* write out the settings"),
        ({"train_args": "--pairs my.csv"}, "`train_args` cannot set `pairs`: bring pairs with `ws data --pairs`"),
        ({"train_args": "--columns question:q"}, "`train_args` cannot set `columns`"),
        ({"eval_args": "--limit '3"}, "`eval_args` is not a list of words"),
        (
            {"train_args": "--alphas -2 2"},
            "With `train_args` behind the queue's own options `alphas` is there twice, and only the last would count",
        ),
        ({"train_args": "--modules q_proj --modules k_proj"}, "`modules` is there twice"),
        ({"eval_args": "--alphas 1"}, "With `eval_args` behind the queue's own options `alphas` is there twice"),
        ({"evals": ("statements",), "traits": ("a",), "eval_args": "--traits b"}, "`traits` is there twice"),
        ({"evals": ("answers",), "judges": ("a",), "eval_args": "--judges b"}, "`judges` is there twice"),
    ):
        with pytest.raises(ws.WsError, match=message):
            main(replace(TINY, **change))
    for change in (
        {"train_args": "--n-sample 3"},
        {"eval_args": "--protocol published"},
    ):  # the second is airisk's only
        with pytest.raises(SystemExit):
            main(replace(TINY, **change))
    assert not list(folder.iterdir())


def test_an_order_is_found_or_the_reason_why_there_is_none():
    given = [note("c", "a"), note("a"), note("d", "c", "b"), note("b")]
    assert [j.name for j in in_order(given)] == ["a", "c", "b", "d"]
    for jobs, message in (
        ([note("a", "c"), note("b", "a"), note("c", "b")], "wait for each other in a circle: [abc], [abc], [abc]"),
        ([note("train-lora"), note("eval", "train-loar")], "no job named 'train-loar'. Did you mean 'train-lora'"),
        ([note("a"), note("a")], "Two jobs have one name"),
    ):
        with pytest.raises(ws.WsError, match=message):
            in_order(jobs)


# ---- here ---------------------------------------------------------------------------------------------------------


def test_jobs_run_in_order_and_print_into_their_logs(folder):
    jobs = [note("last", "left", "right"), note("left", "first"), note("right", "first"), note("first")]
    jobs += [job("talker", "print('to stdout'); print('to stderr', file=sys.stderr)")]
    assert set(states(run_local(Ledger(folder / "q", jobs))).values()) == {"done"}
    order = (folder / "order").read_text().split()
    assert order[0] == "first"
    assert order[-1] == "last"
    log = (folder / "q" / "talker.log").read_text()
    assert log.startswith(f"$ {sys.executable} -c ")
    assert {"to stdout", "to stderr"} <= set(log.splitlines())


def test_only_what_failed_is_retried_without_fresh(folder, monkeypatch):
    monkeypatch.setattr("ws.sweep.queue.sweep_jobs", lambda config: [job("bad", "sys.exit(3)")])
    with pytest.raises(ws.WsError, match="Run the queue again without `fresh` to retry only those"):
        main(replace(TINY, fresh=True))


def test_workers_run_jobs_at_the_same_time_on_their_own_gpus(folder, monkeypatch):
    def meet(name: str, other: str) -> Job:
        show = "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
        return job(name, f"{show}\nopen('{name}', 'w')\n{until(other)}\nsys.exit(not os.path.exists('{other}'))")

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    outcomes = run_local(Ledger(folder / "q", [meet("a", "b"), meet("b", "a")]), workers=2, gpus=(3, 5))
    assert states(outcomes) == {"a": "done", "b": "done"}, "each has waited for the other to begin"
    share = str(max(1, os.cpu_count() // 2))
    assert {(folder / "q" / f"{n}.log").read_text().splitlines()[-1] for n in "ab"} == {f"3 {share}", f"5 {share}"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_local(Ledger(folder / "q", [job("c", "print(os.environ['OMP_NUM_THREADS'])")]), workers=2)
    assert (folder / "q" / "c.log").read_text().endswith("\n7\n")


def test_a_failure_stops_what_needs_it_and_nothing_else(folder, monkeypatch, capsys):
    jobs = [job("bad", "print('the reason'); sys.exit(3)"), note("child", "bad"), note("grandchild", "child", "good")]
    jobs += [note("good"), Job("missing", ("no-such-program",)), note("better", "good")]
    monkeypatch.setattr("ws.sweep.queue.sweep_jobs", lambda config: jobs)
    with pytest.raises(ws.WsError) as problem:
        main(TINY)
    said = str(problem.value)
    assert said.startswith("2 of 6 jobs failed: bad (out/honesty/queue/bad.log), missing (")
    assert "not run because of that: child, grandchild. Run the queue again to retry only those." in said
    assert (folder / "order").read_text().split() == ["good", "better"]
    printed = capsys.readouterr()
    table = {line.split()[0]: line for line in printed.out.splitlines()[2:]}
    assert [next(w for w in ("failed", "not run", "done") if w in table[j.name]) for j in jobs] == [
        *("failed", "not run", "not run", "done", "failed", "done"),
    ]
    assert "bad: failed (exit code 3: the reason)" in printed.err
    assert "no-such-program" in (folder / "out/honesty/queue/missing.log").read_text()


def test_a_second_run_does_what_is_missing_and_what_stands_on_something_new(folder):
    def run(*jobs: Job, fresh: bool = False) -> dict[str, str]:
        return states(run_local(Ledger(folder / "q", jobs, fresh)))

    a, b, c = note("a"), note("b", "a"), note("c", "b")
    broken = job("b", "sys.exit(1)", "a")
    assert run(a, broken, c) == {"a": "done", "b": "failed", "c": "not run"}
    assert run(a, b, c) == {"a": "kept", "b": "done", "c": "done"}
    assert run(a, b, c) == {"a": "kept", "b": "kept", "c": "kept"}
    assert (folder / "order").read_text().split() == ["a", "b", "c"]
    other = replace(b, command=(*b.command, "changed"))
    assert run(a, other) == {"a": "kept", "b": "done"}
    assert run(a, other, c) == {"a": "kept", "b": "kept", "c": "done"}, "b has run again since c did"
    assert run(note("d")) == {"d": "done"}
    assert run(a, other, c, fresh=True) == {"a": "done", "b": "done", "c": "done"}
    assert run(note("d")) == {"d": "kept"}, "another graph's jobs are not forgotten"
    (folder / "q" / "state.json").write_text("{")
    with pytest.raises(ws.WsError, match=r"state.json is damaged"):
        run(a)


def test_a_finished_job_is_not_kept_when_what_it_reads_or_left_is_not_as_it_was(folder):
    """An edited behaviour and a deleted run were once kept, without a word."""

    def run(**change) -> dict[str, str]:
        made = replace(job("a", "open('a_summary.csv', 'w').write('1')"), leaves=(folder / "a_*.csv",), **change)
        return states(run_local(Ledger(folder / "q", [made, note("b", "a")])))

    assert run() == {"a": "done", "b": "done"}
    assert run() == {"a": "kept", "b": "kept"}
    assert run(inputs="another behaviour") == {"a": "done", "b": "done"}
    (folder / "a_summary.csv").write_text("2")
    assert run(inputs="another behaviour") == {"a": "done", "b": "done"}
    (folder / "a_summary.csv").unlink()
    assert run(inputs="another behaviour") == {"a": "done", "b": "done"}
    assert run(inputs="another behaviour") == {"a": "kept", "b": "kept"}


def test_jobs_say_what_they_leave_and_depend_on_the_behaviour(folder):
    own = Path("own.toml")
    own.write_bytes(behavior_file("honesty", "tiny-random").read_bytes())
    config = replace(TINY, behavior="own.toml", adapters=("lora",), seeds=(1,), train_args="--contrast signed")
    before = sweep_jobs(config)
    run = Path("out/honesty/lora-signed/seed-1")
    assert {j.name: set(map(str, j.leaves)) for j in before} == {
        "pairs": {"out/data/tiny-random/honesty/pairs.jsonl"},
        "train-lora-seed-1": {f"{run}/vector/ws.json", f"{run}/samples.json"},
        "airisk-lora-seed-1": {f"{run}/airisk_*_summary.csv"},
        "tinymfv_airisk-lora-seed-1": {f"{run}/tinymfv_*_summary.csv"},
        "summarize": {"out/honesty/readme_airisk_table.csv"},
    }
    own.write_bytes(own.read_bytes() + b"\n# another file\n")
    assert all(a.inputs != b.inputs for a, b in zip(before, sweep_jobs(config), strict=True))


RUNNER = """
import signal, sys
from pathlib import Path
from ws.sweep.backends import run_local
from ws.sweep.jobs import Job, Ledger
signal.signal(signal.SIGTERM, signal.default_int_handler)
code = '''
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("pids.part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename("pids.part", "pids")
time.sleep(600)
'''
slow = Job("slow", (sys.executable, "-c", code), ("quick",))
jobs = [Job("quick", ("true",)), slow, Job("never", ("true",), ("slow",))]
try:
    run_local(Ledger(Path("q"), jobs))
except KeyboardInterrupt:
    sys.exit(130)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended within a moment."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=linux)])
def test_an_interrupt_ends_the_children_and_leaves_a_state_that_resumes(folder, how):
    process = subprocess.Popen([sys.executable, "-c", RUNNER], stderr=subprocess.DEVNULL)
    wait_for(folder / "pids", process)
    process.send_signal(how)
    assert process.wait(PATIENCE) == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    child, grandchild = map(int, (folder / "pids").read_text().split())
    assert gone(child)
    if how == signal.SIGKILL:
        os.kill(grandchild, signal.SIGKILL)  # nobody was left to end it
    else:
        assert gone(grandchild)
    assert list(json.loads((folder / "q" / "state.json").read_text())["jobs"]) == ["quick"]


def wait_for(file: Path, process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} never appeared"
        assert process is None or process.poll() is None, f"it ended before {file.name} appeared"
        time.sleep(0.01)


# ---- pueue --------------------------------------------------------------------------------------------------------

FAKE_PUEUE = f"""#!{sys.executable}
import json, os, pathlib, sys
calls = pathlib.Path("calls")
seen = calls.read_text().splitlines() if calls.exists() else []
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "group":
    sys.exit(f'Group "{{sys.argv[3]}}" already exists')
if os.environ.get("BROKEN"):
    sys.exit("Couldn't connect to daemon")
print(40 + len(seen))
"""


@pytest.fixture
def pueue(folder, monkeypatch) -> Path:
    """A stand-in on PATH that notes its arguments in the file `calls` and prints an id."""
    program = folder / "bin" / "pueue"
    program.parent.mkdir()
    program.write_text(FAKE_PUEUE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return folder / "calls"


def test_pueue_gets_every_job_behind_the_ids_it_waits_for(pueue):
    jobs = sweep_jobs(replace(TINY, backend="pueue", adapters=("lora",), out=Path("a folder/o'ut")))
    outcomes = run_pueue(jobs, "steering")
    group, *adds = [json.loads(line) for line in pueue.read_text().splitlines()]
    assert group == ["group", "add", "steering"]
    assert {o.name: o.where for o in outcomes} == {j.name: f"pueue {41 + i}" for i, j in enumerate(jobs)}
    assert "pueue 41" in report(outcomes)
    for call, made in zip(adds, jobs, strict=True):
        front, command = call[: call.index("--")], call[call.index("--") + 1 :]
        ids = [str(41 + [j.name for j in jobs].index(name)) for name in made.after]
        after = ["--after", *ids] if ids else []
        assert front == ["add", "--group", "steering", "--label", made.name, "--print-task-id", *after]
        # pueue joins the words and hands them to a shell
        assert tuple(shlex.split(" ".join(command))) == made.command
        assert made.command[:4] == ("uv", "run", "python", "-m")


def test_the_script_makes_the_calls_of_a_direct_submission(pueue, folder, capsys):
    config = replace(TINY, backend="pueue", seeds=(0, 1), out=Path("a folder/o'ut"), dry_run=True, group="a group")
    main(config)
    script = capsys.readouterr().out
    assert not pueue.exists()
    (folder / "script.sh").write_text(script)
    subprocess.run(["bash", "-n", "script.sh"], check=True)
    subprocess.run(["bash", "script.sh"], check=True, stderr=subprocess.DEVNULL)
    scripted = pueue.read_text()
    pueue.unlink()
    assert set(states(run_queue(config, sweep_jobs(config))).values()) == {"queued"}
    assert pueue.read_text() == scripted
    assert script.strip() == pueue_script(sweep_jobs(config), "a group")


def test_a_pueue_that_is_missing_or_has_no_daemon_is_explained(pueue, folder, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(ws.WsError, match=r"`pueue add` failed: Couldn't connect to daemon. Is its daemon running"):
        run_pueue([note("a")], "ws")
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ws.WsError, match=r"cargo install pueue.* `dry_run`"):
        run_pueue([note("a")], "ws")


def test_a_dry_run_lists_jobs_with_what_they_wait_for(folder, capsys):
    main(replace(TINY, backend="ray", adapters=("lora",), dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pairs after nothing"
    assert lines[2] == "train-lora after pairs"
    assert lines[3].startswith(f"  {sys.executable} -m ws.replicate --model tiny-random")
    assert lines[-2] == "summarize after airisk-lora, tinymfv_airisk-lora"
    assert not list(folder.iterdir())


# ---- ray ----------------------------------------------------------------------------------------------------------


def test_a_missing_ray_is_explained(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ws.WsError, match="uv sync --extra ray"):
        run_ray(Ledger(folder / "q", [note("a")]))


@pytest.fixture
def cluster(monkeypatch):
    """A head that runs no jobs, and two nodes that run one each at a time."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pytest.importorskip("ray", reason="the ray back end needs the extra `ray`")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    config = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 0, "_system_config": config})
    for _ in range(2):
        made.add_node(num_cpus=1, **small)
    made.wait_for_nodes()
    yield made
    made.shutdown()


class Outage(threading.Thread):
    """Once `begun` gives a process, the ray node that it runs on is lost without a warning."""

    def __init__(self, cluster, begun: Callable[[], psutil.Process | None]) -> None:
        super().__init__(daemon=True)
        self.cluster, self.begun, self.happened = cluster, begun, False
        self.start()

    def run(self) -> None:
        end = time.monotonic() + 2 * PATIENCE
        while (process := self.begun()) is None:
            assert time.monotonic() < end, "the job to hit never began"
            time.sleep(0.01)
        worker, raylet = process.parents()[:2]
        (node,) = (n for n in self.cluster.worker_nodes if n.all_processes["raylet"][0].process.pid == raylet.pid)
        worker.suspend()  # it would otherwise notice that its raylet is gone and end its child in good order
        self.cluster.remove_node(node, allow_graceful=False)
        worker.kill()
        self.happened = True


# The first attempt writes its pid and hangs; the second says whether the first is still alive.
HANGS_ONCE = """
attempts = pathlib.Path("attempts")
before = attempts.read_text().split() if attempts.exists() else []
alive = [p for p in before if os.path.exists(f"/proc/{p}/stat") and open(f"/proc/{p}/stat").read().split()[2] != "Z"]
with attempts.open("a") as file:
    file.write(f"{os.getpid()} ")
if not before:
    pathlib.Path("pid.part").write_text(str(os.getpid()))
    os.rename("pid.part", "pid")
    time.sleep(600)
open("verdict", "w").write(f"{len(before)} before, {len(alive)} alive")
"""


@pytest.mark.slow
@linux
def test_ray_runs_a_lost_nodes_job_again_and_never_beside_its_orphan(folder, cluster):
    jobs = [note("first"), job("hangs", HANGS_ONCE, "first"), note("last", "hangs"), note("aside", "first")]
    jobs += [job("bad", "sys.exit(3)", "first"), note("child", "bad"), note("grandchild", "child")]
    pid = folder / "pid"
    outage = Outage(cluster, lambda: psutil.Process(int(pid.read_text())) if pid.exists() else None)
    outcomes = run_ray(Ledger(folder / "q", jobs), cluster.address)
    outage.join()
    assert outage.happened
    expected = {j.name: "done" for j in jobs} | {"bad": "failed", "child": "not run", "grandchild": "not run"}
    assert states(outcomes) == expected
    assert (folder / "verdict").read_text() == "1 before, 0 alive"
    assert sorted((folder / "order").read_text().split()) == ["aside", "first", "last"]
    assert (folder / "q" / "hangs.log").read_text().count("$ ") == 2, "the log has both attempts"
    # What ray has finished the local back end keeps.
    again = states(run_local(Ledger(folder / "q", jobs)))
    assert [again[n] for n in ("first", "hangs", "last", "bad", "child")] == ["kept"] * 3 + ["failed", "not run"]


@linux
def test_a_job_that_takes_its_worker_with_it_fails_and_the_rest_goes_on(folder):
    pytest.importorskip("ray", reason="the ray back end needs the extra `ray`")
    jobs = [job("fatal", "os.kill(os.getppid(), 9)"), note("child", "fatal"), note("fine")]
    outcomes = run_ray(Ledger(folder / "q", jobs), retries=0)
    assert states(outcomes) == {"fatal": "failed", "child": "not run", "fine": "done"}
    assert outcomes[0].problem.startswith("lost by ray: ")


def test_an_address_without_a_cluster_is_refused_at_once(folder):
    pytest.importorskip("ray", reason="the ray back end needs the extra `ray`")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "127.0.0.1:port"):
        with pytest.raises(ws.WsError, match=f"no ray cluster at '{address}'.*ray start"):
            run_ray(Ledger(folder / "q", [note("a")]), address)


def test_a_reservation_that_no_machine_can_meet_is_refused():
    from ws.sweep.backends import _check_fits

    _check_fits({"CPU": 2.0}, {"CPU": 2.0, "GPU": 0.0})
    with pytest.raises(ws.WsError, match="wants 0.5 GPUs and this machine has 0; lower `gpus_per_job` or"):
        _check_fits({"CPU": 2.0}, {"CPU": 2.0, "GPU": 0.5})


CELLS = replace(TINY, adapters=("lora",), evals=("airisk", "tinymfv_airisk"), n_bootstrap=100, train_args="--split dev")


@linux
@pytest.mark.slow
def test_a_sweep_has_the_same_results_here_and_on_a_cluster_that_loses_a_node(folder, cluster, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = replace(CELLS, eval_args="--limit 6 --n-think 6", out=Path("here"), workers=2)
    assert set(states(run_queue(config, sweep_jobs(config))).values()) == {"done"}
    config = replace(config, out=Path("there"), backend="ray", address=cluster.address)

    def training() -> psutil.Process | None:
        begun = (folder / "there/honesty/lora/.pos.work").exists()
        found = (
            p for p in psutil.process_iter(["cmdline"]) if {"ws.replicate", "lora"} <= set(p.info["cmdline"] or ())
        )
        return next(found, None) if begun else None

    outage = Outage(cluster, training)
    assert set(states(run_queue(config, sweep_jobs(config))).values()) == {"done"}
    assert outage.happened
    assert (folder / "there/honesty/queue/train-lora.log").read_text().count("$ ") == 2
    tables = {f.relative_to(folder / "here"): f.read_text() for f in (folder / "here").rglob("*.csv")}
    assert {"airisk_truthfulness_per_row.csv", "readme_airisk_table.csv"} <= {f.name for f in tables}
    assert tables == {f.relative_to(folder / "there"): f.read_text() for f in (folder / "there").rglob("*.csv")}
