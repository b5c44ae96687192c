"""Manifests, atomic writes and resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import ws
from ws.errors import WsError
from ws.files.runs import (
    Run,
    atomic_folder,
    data_folder,
    lock,
    model_name,
    run_folder,
    slug,
    write_csv,
    write_json,
    write_text,
)


def finish(folder, config, inputs=None):
    stage = Run(folder).stage("s", config, inputs)
    assert stage is not None
    stage.done([write_text(folder / "a.txt", "x")], note=1)


def test_layout(tmp_path):
    assert slug("Qwen/Qwen3-0.6B") == "Qwen--Qwen3-0.6B"
    assert data_folder(tmp_path, "pocket", "honesty") == tmp_path / "data" / "pocket" / "honesty"
    assert run_folder(tmp_path, "honesty", "lora") == tmp_path / "honesty" / "lora"
    assert run_folder(tmp_path, "honesty", "lora", 2) == tmp_path / "honesty" / "lora" / "seed-2"


def test_a_finished_stage_is_skipped_and_an_unfinished_one_is_not(tmp_path):
    assert Run(tmp_path).stage("s", {"a": 1}) is not None
    finish(tmp_path, {"a": 1})
    assert Run(tmp_path).stage("s", {"a": 1}) is None
    assert Run(tmp_path).facts("s")["note"] == 1


def test_a_changed_setting_or_input_stops_with_its_name(tmp_path):
    finish(tmp_path, {"rank": 8, "lr": 0.1}, {"pairs": "aaaa"})
    with pytest.raises(ws.WsError, match=r"rank: 8 -> 16\); use --fresh"):
        Run(tmp_path).stage("s", {"rank": 16, "lr": 0.1}, {"pairs": "aaaa"})
    with pytest.raises(ws.WsError, match="input pairs"):
        Run(tmp_path).stage("s", {"rank": 8, "lr": 0.1}, {"pairs": "bbbb"})


@pytest.mark.parametrize("damage", ["delete", "alter"])
def test_lost_or_altered_outputs_are_made_again(tmp_path, damage):
    finish(tmp_path, {"a": 1})
    (tmp_path / "a.txt").unlink() if damage == "delete" else (tmp_path / "a.txt").write_text("y")
    assert Run(tmp_path).stage("s", {"a": 1}) is not None


def test_fresh_forgets_what_was_recorded_and_nothing_else(tmp_path):
    finish(tmp_path, {"a": 1})
    (tmp_path / "mine.txt").write_text("keep")
    run = Run(tmp_path, fresh=True)
    assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert run.stage("s", {"a": 2}) is not None


def test_a_damaged_manifest_is_explained(tmp_path):
    finish(tmp_path, {"a": 1})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ws.WsError, match="damaged"):
        Run(tmp_path).stage("s", {"a": 1})
    with pytest.raises(ws.WsError, match="damaged"):
        Run(tmp_path).facts("s")
    assert Run(tmp_path, fresh=True).stage("s", {"a": 1}) is not None


def test_atomic_folders_appear_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f") as part:
        (part / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "f") as part:
        (part / "whole").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ws.WsError, match="NaN in b"):
        write_csv(tmp_path / "t.csv", [{"a": 1.0, "b": float("nan")}])
    with pytest.raises(ws.WsError, match="no rows"):
        write_csv(tmp_path / "t.csv", [])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "t.json", {"a": float("nan")})
    with pytest.raises(ValueError, match="fields"):
        write_csv(tmp_path / "t.csv", [{"a": 1}, {"b": 2}])
    assert not list(tmp_path.iterdir())


def test_manifests_hold_versions_and_no_absolute_path(tmp_path):
    finish(tmp_path, {"a": 1})
    record = json.loads((tmp_path / "manifest.json").read_text())["stages"]["s"]
    assert {"torch", "transformers", "peft", "python"} <= set(record["versions"])
    assert len(record["config_sha256"]) == 64
    assert str(tmp_path) not in json.dumps(record["outputs"])


# ---- side by side ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["ws demo", "--model", "pocket"], "ws demo --model pocket"),
        (["/opt/bin/ws eval sycophancy", "--out", "my out"], "ws eval sycophancy --out 'my out'"),
        (["/opt/my script.py", "--fast"], "'my script.py' --fast"),
        (["ipykernel_launcher.py", "-f", "x"], ""),
    ],
)
def test_the_command_on_record_can_be_typed_again(tmp_path, monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    Run(tmp_path).restart("pos", {}).done([])
    assert Run(tmp_path).facts("pos")["command"] == command


def test_a_lock_keeps_others_out_and_not_its_holder(tmp_path, capsys):
    inside, order = threading.Event(), []

    def other():
        inside.wait()
        with lock(tmp_path / "x"):
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with lock(tmp_path / "x"), lock(tmp_path / "x"):
        inside.set()
        deadline = time.monotonic() + 30
        while "waiting for another process that is working on" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        order.append("holder")
    thread.join()
    assert order == ["holder", "other"]
    assert capsys.readouterr().err == "", "nobody waits for what is free"


def test_a_lock_that_is_taken_can_stop_instead(tmp_path):
    with lock(tmp_path / "x"), ThreadPoolExecutor(1) as pool:

        def ask():
            with lock(tmp_path / "x", wait=False):
                pass

        with pytest.raises(ws.WsError, match=r"Another process is working on .*x; let it finish"):
            pool.submit(ask).result()
    pool_free = ThreadPoolExecutor(1)
    assert pool_free.submit(ask).result() is None


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "mine").touch()
    (tmp_path / "f").symlink_to(tmp_path / "far")
    with atomic_folder(tmp_path / "f") as part:
        (part / "new").touch()
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["new"]
    assert [p.name for p in (tmp_path / "far").iterdir()] == ["mine"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "file"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "far", "file"]


def test_of_many_writers_one_whole_result_stays(tmp_path):
    def write(number: int) -> None:
        for _ in range(20):
            with atomic_folder(tmp_path / "f") as part:
                for name in "abc":
                    (part / name).write_text(str(number))
            write_text(tmp_path / "t.txt", str(number) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "t.txt"]
    assert len({f.read_text() for f in (tmp_path / "f").iterdir()}) == 1
    assert sorted(f.name for f in (tmp_path / "f").iterdir()) == ["a", "b", "c"]
    assert len(set((tmp_path / "t.txt").read_text())) == 1


def test_what_a_killed_writer_left_goes_and_what_another_writes_stays(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with atomic_folder(tmp_path / "f") as part:
        dead = part.with_name(part.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-"))
        dead.mkdir()
        elsewhere = part.with_name(".f.part-another.machine-1-abc")
        elsewhere.mkdir()
        with atomic_folder(tmp_path / "f") as second:
            assert part.is_dir(), "this very process is still at it"
            assert not dead.exists()
            (second / "new").touch()
        (part / "newer").touch()
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["newer"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [elsewhere.name, "f"]


def test_fresh_takes_nothing_from_a_process_at_work(tmp_path):
    run, inside, left = Run(tmp_path), threading.Event(), []

    def work():
        with run.alone("pos"):
            (tmp_path / ".pos.work").mkdir()
            inside.set()
            time.sleep(0.3)
            left.append((tmp_path / ".pos.work").is_dir())

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    Run(tmp_path, fresh=True)
    thread.join()
    assert left == [True]
    assert not (tmp_path / ".pos.work").exists()


@pytest.fixture
def spellings(tmp_path, monkeypatch):
    """A model's folder `m`, in which the process stands beside, and ways to write it."""
    (tmp_path / "models" / "m" / "parts").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "m")
    monkeypatch.chdir(tmp_path / "models")
    monkeypatch.setenv("HOME", str(tmp_path))
    whole = os.path.realpath(tmp_path / "models" / "m")
    written = ["m", "./m", "m/", "m/.", "m//", "m/parts/..", "../models/m", "../link", "~/models/m", "~/link/", whole]
    return whole, written


def test_a_folder_has_one_name_however_its_path_is_written(spellings, tmp_path, monkeypatch):
    whole, written = spellings
    assert {model_name(name) for name in written} == {whole}
    assert {slug(name) for name in written} == {"m"}
    monkeypatch.chdir("m/parts")
    assert (model_name(".."), slug(".."), slug("."), slug("/")) == (whole, "m", "parts", "root")


def test_names_that_are_no_folder_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    for name in ("Qwen/Qwen3-0.6B", "gpt2", "pocket", "tiny-random", "smollm2", "", "~nobody-of-this-name/m", "a\0b"):
        assert model_name(name) == name
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.touch()
    (tmp_path / "m.gguf").symlink_to(blob)
    (tmp_path / "n.GGUF").symlink_to(tmp_path / "m.gguf")
    assert model_name("./m.gguf") == os.path.realpath(tmp_path) + "/m.gguf"
    assert slug("./n.GGUF") == "n"


def test_a_stage_on_record_by_another_spelling_is_the_same(spellings, tmp_path):
    whole, written = spellings
    run = Run(tmp_path / "run")
    for name in written:
        run.restart("pos", {"model": name, "rank": 2}).done([])
        assert run.is_finished("pos", {"model": whole, "rank": 2})
        assert run.refresh("pos", {"model": whole, "rank": 2}, {}) is None
    with pytest.raises(WsError, match="rank: 2 -> 3"):
        run.is_finished("pos", {"model": whole, "rank": 3})
    with pytest.raises(WsError, match="model: "):
        run.is_finished("pos", {"model": str(tmp_path), "rank": 2})
