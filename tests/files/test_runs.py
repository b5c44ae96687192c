"""Manifests, atomic writes and resume."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ws
from ws.errors import WsError
from ws.files.places import FolderKind, place_below
from ws.files.runs import (
    ADAPTER,
    VECTOR,
    Run,
    atomic_folder,
    data_folder,
    lock,
    model_name,
    read_csv,
    run_folder,
    sha256_file,
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
    with pytest.raises(ws.WsError, match=r"rank: 8 -> 16\); use `fresh`"):
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


@given(text=st.text(st.sampled_from("a,\"'\r\n\t \u2028\u00e9"), max_size=8))
def test_any_text_comes_back_from_a_table(text, tmp_path_factory):
    """Answers of a model hold what they like; a lone carriage return would end a row for whoever reads it."""
    file = tmp_path_factory.mktemp("table") / "t.csv"
    rows = [{"text": text, "n": "1"}, {"text": "b", "n": "2"}]
    write_csv(file, rows)
    assert read_csv(file) == rows
    with file.open(newline="", encoding="utf-8") as lines:
        assert list(csv.DictReader(lines)) == rows


@pytest.mark.parametrize("kind", [float, np.float32, np.float64])
def test_nan_is_never_written(kind, tmp_path):
    with pytest.raises(ws.WsError, match="NaN in b"):
        write_csv(tmp_path / "t.csv", [{"a": 1.0, "b": kind("nan")}])
    with pytest.raises(ws.WsError, match="no rows"):
        write_csv(tmp_path / "t.csv", [])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "t.json", {"a": float("nan")})
    for other, odd in (({"b": 2}, "a, b"), ({}, "a"), ({"a": 2, "b": None}, "b")):
        with pytest.raises(ws.WsError, match=rf"rows of different columns \({odd}\) to .*t\.csv"):
            write_csv(tmp_path / "t.csv", [{"a": 1}, other])
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


@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_a_link_is_written_through(tmp_path, there):
    far = tmp_path / "far"
    if there:
        far.mkdir()
        (far / "earlier").touch()
    (tmp_path / "f").symlink_to(far)
    with atomic_folder(tmp_path / "f") as part:
        (part / "new").touch()
    (tmp_path / "t").symlink_to(far / "text")
    write_text(tmp_path / "t", "x")
    assert (tmp_path / "f").is_symlink()
    assert (tmp_path / "t").is_symlink()
    assert sorted(p.name for p in far.iterdir()) == ["new", "text"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "far", "t"]


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


# ---- what must not be touched ---------------------------------------------------------------------------------------

ELSEWHERE = [
    "../precious.txt",
    "../../../precious.txt",
    "vector/../../precious.txt",
    "/etc/hostname",
    "C:/precious.txt",
    "C:\\precious.txt",
    "..\\precious.txt",
    "\\\\server\\share\\x",
    "a\0b",
    "a\nb",
    "",
    ".",
    "..",
    "vector/.",
    "vector//x",
    "vector/",
    "nul",
    "vector/CON.txt",
    "x. ",
    7,
    None,
]


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_name_from_a_file_stays_below_its_folder_or_is_refused(tmp_path, name):
    with pytest.raises(ws.WsError, match="no place below"):
        place_below(tmp_path, name, "manifest.json")


@pytest.mark.parametrize(
    "name", ["a.txt", "vector/ws.json", "scores/a-1.0.json", "größe/x.csv", "console.txt", "a b/c d"]
)
def test_a_name_from_a_file_below_its_folder_is_taken(tmp_path, name):
    assert place_below(tmp_path, name, "manifest.json") == tmp_path / name


def test_a_link_on_the_way_is_refused(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "vector").symlink_to(tmp_path / "far")
    with pytest.raises(ws.WsError, match="is a link"):
        place_below(tmp_path, "vector/ws.json", "manifest.json")


def recorded(run, outputs) -> None:
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "manifest.json", {"format": 1, "stages": {"s": {"config": {}, "inputs": {}, "outputs": outputs}}})


@pytest.mark.parametrize("name", [n for n in ELSEWHERE if isinstance(n, str)] + ["absolute"], ids=repr)
def test_fresh_deletes_nothing_that_a_manifest_names_elsewhere(tmp_path, name):
    precious, run = tmp_path / "precious.txt", tmp_path / "out" / "honesty" / "lora"
    precious.write_text("mine")
    mine = write_text(run / "a.txt", "x")
    digest = sha256_file(precious)
    recorded(run, {"a.txt": sha256_file(mine), str(precious) if name == "absolute" else name: digest})
    with pytest.raises(ws.WsError, match="no place below"):
        Run(run, fresh=True)
    assert precious.read_text() == "mine"
    assert mine.exists()
    assert (run / "manifest.json").exists()
    with pytest.raises(ws.WsError, match="no place below"):
        Run(run).outputs("s")


@pytest.mark.parametrize("name", ["vector", "pos", "scores", ".neg.work", "a.txt", "sub"])
def test_fresh_goes_through_no_link(tmp_path, name):
    far, run = tmp_path / "far", tmp_path / "run"
    for file in ("ws.json", "ws_train.json", "settings", "a.txt"):
        write_text(far / file, "mine")
    digest = sha256_file(far / "a.txt")
    recorded(run, {"a.txt": digest, "sub/a.txt": digest})
    (run / name).symlink_to(far / "a.txt" if name == "a.txt" else far)
    with pytest.raises(ws.WsError, match="is a link"):
        Run(run, fresh=True)
    assert sorted(p.name for p in far.iterdir()) == ["a.txt", "settings", "ws.json", "ws_train.json"]
    assert (run / name).is_symlink()


def test_fresh_keeps_what_is_somebodys_own(tmp_path):
    score = f"sycophancy-{'1a' * 6}-{'2b' * 8}-float32-{'3c' * 8}-{'4d' * 6}--1.5.json"
    ours = {
        "pos": ["ws_train.json", "adapter_config.json", "adapter_model.safetensors", "pissa_init.safetensors"],
        "neg": ["ws_train.json", "adapter_model.safetensors"],
        "vector": ["ws.json", "vector.safetensors", "calibration.json"],
        "scores": [score, f".{score}.lock"],
    }
    theirs = {name: ["notes.txt", "mine.json", "sub/deep.txt"] for name in ours}
    for name, files in [*ours.items(), *theirs.items()]:
        for file in files:
            write_text(tmp_path / name / file, "x")
    write_text(tmp_path / "altered.csv", "my own numbers")
    write_text(tmp_path / ".pos.work" / "checkpoint-1" / "optimizer.pt", "x")
    recorded(tmp_path, {"altered.csv": "0" * 64, "vector/ws.json": "0" * 64, "mine": "0" * 64})
    (tmp_path / "mine").mkdir()
    Run(tmp_path, fresh=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path}
    assert left == {f"{name}/{file}" for name, files in theirs.items() for file in files}
    assert (tmp_path / "altered.csv").read_text() == "my own numbers"
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / ".pos.work").exists()
    assert not (tmp_path / "manifest.json").exists()


def test_what_is_made_again_lies_among_what_is_somebodys_own(tmp_path):
    for name, kind in (("pos", ADAPTER), ("vector", VECTOR)):
        own, marker = tmp_path / name / "sub" / "notes.txt", kind.markers[0]
        write_text(own, "mine")
        with pytest.raises(ws.WsError, match="exists and is not"):
            kind.require(tmp_path / name)
        recorded(tmp_path, {})
        with atomic_folder(tmp_path / name, kind) as part:
            write_text(part / marker, "new")
        assert (own.read_text(), (tmp_path / name / marker).read_text()) == ("mine", "new")
        (tmp_path / name / marker).unlink()
        write_text(tmp_path / name / "adapter_model.safetensors", "somebody's")
        with pytest.raises(ws.WsError, match="exists and is not"):
            kind.require(tmp_path / name)
        (tmp_path / "manifest.json").unlink()


def test_fresh_leaves_no_empty_folders_and_no_adapter_that_somebody_brought(tmp_path):
    write_text(tmp_path / "vector" / "ws.json", "{}")
    write_text(tmp_path / "pos" / "adapter_model.safetensors", "somebody's")
    Run(tmp_path, fresh=True)
    assert not (tmp_path / "vector").exists()
    assert (tmp_path / "pos" / "adapter_model.safetensors").exists()


KIND = FolderKind("not a thing", ("thing.json",), ("thing.json", "part-*.bin"))


def test_a_folder_of_its_kind_is_replaced_around_what_is_somebodys_own(tmp_path):
    folder = tmp_path / "f"
    for name in ("thing.json", "part-1.bin", "part-2.bin", "notes.txt", "sub/deep.txt"):
        write_text(folder / name, "old")
    with atomic_folder(folder, KIND) as part:
        write_text(part / "thing.json", "new")
        write_text(part / "part-2.bin", "new")
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    expected = {"thing.json": "new", "part-2.bin": "new", "notes.txt": "old", "sub/deep.txt": "old"}
    assert found == expected
    assert [p.name for p in tmp_path.iterdir()] == ["f"], "nothing is left beside it"


@pytest.mark.parametrize("there", ["foreign", "file", "link", "dangling"])
def test_what_is_of_another_kind_is_refused_before_anything_is_made(tmp_path, there):
    place = tmp_path / "f"
    write_text(tmp_path / "far" / "mine.txt", "mine")
    if there == "foreign":
        write_text(place / "mine.txt", "mine")
    elif there == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / ("far" if there == "link" else "nowhere"))
    with pytest.raises(ws.WsError, match="not a thing"), atomic_folder(place, KIND):
        pytest.fail("nothing is made")
    assert (tmp_path / "far" / "mine.txt").read_text() == "mine"
    assert place.is_symlink() == (there in ("link", "dangling"))


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "f").mkdir()
    with atomic_folder(tmp_path / "f", KIND) as part:
        write_text(part / "thing.json", "new")
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["thing.json"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", "", "C:\\x", "aux", "a\0b", "\x1b[31mx"])
def test_layout_takes_no_name_that_leads_elsewhere(tmp_path, name):
    for place in (run_folder, data_folder):
        with pytest.raises(ws.WsError, match="cannot name"):
            place(tmp_path, *(("pocket", name) if place is data_folder else (name, "lora")))
    with pytest.raises(ws.WsError, match="cannot name"):
        run_folder(tmp_path, "honesty", name)


def test_a_models_folder_is_one_folder_whatever_the_model_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("..", ".", "../..", "C:\\models\\x", "\\\\server\\x", f"{tmp_path}/..", "a/../../b"):
        folder = data_folder(tmp_path / "out", name, "honesty")
        assert folder.parent.parent == tmp_path / "out" / "data", name
        assert folder.parent.name not in ("", ".", "..")
