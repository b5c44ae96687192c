"""After a kill at any file operation, a full disk, or a refusal of the operating system there is the old or the new.

Each case runs in a process of its own, which ends itself, as SIGKILL would, just before its n-th file operation.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ws
from ws.data import Pair
from ws.errors import DiskError, WsError, disk_errors
from ws.files import writing
from ws.files.runs import Run, atomic_file, atomic_folder, write_json, write_text
from ws.lm.trainer import last_whole_checkpoint
from ws.train import train_adapter, train_preset

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def forked(action: Callable[[], None]) -> int:
    """The exit code of a child that does this and nothing else; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            action()
            code = 0
        except WsError as problem:
            os.write(2, f"{problem}\n".encode())
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(number: int, below: Path, action: Callable[[], None]) -> int:
    """The same, killed just before its n-th file operation below a folder; flushing and exchanging are such, too."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def listen(event: str, arguments: tuple[object, ...]) -> None:
        named = [a for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
        if event in EVENTS and any(os.fsdecode(a).startswith(str(below)) for a in named):
            count()

    def child() -> None:
        sync, exchange = writing._sync, writing._exchange
        writing._sync = lambda path: (count(), sync(path))[1]  # type: ignore[assignment, func-returns-value]
        writing._exchange = lambda a, b: (count(), exchange(a, b))[1]  # type: ignore[assignment]
        sys.addaudithook(listen)
        action()

    return forked(child)


def at_every_operation(folder: Path, action: Callable[[], None], check: Callable[[Path], None]) -> int:
    """Kill `action` at each of its operations in turn, and check what it leaves; returns how many there are."""
    for number in range(1, 200):
        code = killed_before(number, folder, action)
        check(folder)
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL
    raise AssertionError("it never came to its end")


def fill(place: Path, word: str) -> None:
    with atomic_folder(place) as part:
        for name in ("a", "b"):
            (part / name).write_text(word)


def read(place: Path) -> set[str]:
    return (
        {f.read_text(encoding="utf-8") for f in place.iterdir()}
        if place.is_dir()
        else {place.read_text(encoding="utf-8")}
    )


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(kind, exchange, tmp_path, monkeypatch):
    """With two steps a kill in between leaves nothing in the place, until the next one who looks puts it back."""
    place, write = tmp_path / "x", write_text if kind == "file" else fill
    if not exchange:
        monkeypatch.setattr(writing, "_exchange", lambda a, b: False)
    write(place, "old")

    def check(folder: Path) -> None:
        writing.recover(folder)
        assert read(place) in ({"old"}, {"new"})
        assert [p.name for p in folder.iterdir()] == ["x"], "nothing is left beside it"
        if kind == "folder":
            assert sorted(p.name for p in place.iterdir()) == ["a", "b"]
        write(place, "old")

    assert at_every_operation(tmp_path, lambda: write(place, "new"), check) >= 4


def test_a_kill_while_a_stage_is_recorded_leaves_a_manifest_that_can_be_read(tmp_path):
    def work() -> None:
        stage = Run(tmp_path).restart("s", {"a": 1})
        stage.done([write_text(tmp_path / "out.txt", "x")])

    def check(folder: Path) -> None:
        Run(folder).is_finished("s", {"a": 1})
        assert {p.name for p in folder.iterdir() if not p.name.endswith(".lock")} <= {"manifest.json", "out.txt"}

    assert at_every_operation(tmp_path, work, check) > 8
    assert Run(tmp_path).is_finished("s", {"a": 1})


def test_what_was_moved_aside_is_put_back(tmp_path):
    gone = 2**22 + 1  # larger than any process's number
    for name in (
        ".x.old",
        f".y.old-{writing._machine()}-{gone}-0123abcd",
        f".y.part-{writing._machine()}-{gone}-0123abcd",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name[:6])
    Run(tmp_path)
    assert (tmp_path / "y" / "f").read_text() == ".y.old"
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "x"):
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_what_another_machine_left_goes_after_a_week(tmp_path):
    left = [tmp_path / f".x.part-elsewhere-{n}-0123abcd" for n in (1, 2)]
    for file in left:
        file.touch()
    long_ago = time.time() - 8 * 24 * 3600
    os.utime(left[0], (long_ago, long_ago))
    write_text(tmp_path / "y", "")
    assert [f.exists() for f in left] == [False, True]


# ---- refusals -----------------------------------------------------------------------------------------------------


def refuse(kind: str, folder: Path) -> Path:
    """A place in which nothing can be written, for that reason."""
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "inside").touch()
    (folder / "circle").symlink_to(folder / "circle")
    return {
        "below a file": folder / "file" / "x",
        "a folder": folder / "full",
        "a long name": folder / ("n" * 300),
        "a circle": folder / "circle" / "x",
    }[kind]


@pytest.mark.parametrize("kind", ["below a file", "a folder", "a long name", "a circle"])
def test_a_place_that_cannot_be_used_is_one_sentence(kind, tmp_path):
    place = refuse(kind, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DiskError, match=r"cannot be used \(.*\): .*\.$") as problem:
        write_json(place, {})
    assert place.name in str(problem.value) or place.parent.name in str(problem.value)
    if kind != "a folder":
        with pytest.raises(DiskError), atomic_folder(place):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_is_finished_on_a_full_disk_is_not_to_be_started_over(code):
    with pytest.raises(DiskError, match="run the same again without `fresh`"), disk_errors():
        raise OSError(code, "Full", "x")


def test_a_folder_cannot_take_a_files_place(tmp_path):
    (tmp_path / "f").write_text("mine")
    with (
        pytest.raises(DiskError, match=r"/f cannot be used \(Not a directory\): it is a file"),
        atomic_folder(tmp_path / "f"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that takes no new files")
def test_a_place_that_takes_no_new_files_is_one_sentence():
    with pytest.raises(DiskError, match=r"/proc/x cannot be used .*choose another place"):
        write_text(Path("/proc/x"), "")
    with (
        pytest.raises(DiskError, match=r"/proc/x cannot be used .*choose another place"),
        atomic_folder(Path("/proc/x")),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DiskError, match=r"locked/x cannot be used \(Permission denied\): change the permissions"):
        write_text(tmp_path / "locked" / "x", "")


def limited(action: Callable[[], None], size: int = 2000) -> int:
    """The exit code when no file may grow beyond so many bytes, which fails as a full disk does."""

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    return forked(child)


def half_a_file(place: Path) -> None:
    with atomic_file(place) as part:
        part.write_bytes(b"0" * 4000)


def tensors(place: Path) -> None:
    from safetensors.torch import save_file

    with atomic_folder(place) as part:
        save_file({"x": torch.zeros(4000)}, part / "x.safetensors")


def pickled(place: Path) -> None:
    with atomic_folder(place) as part:
        torch.save({"x": torch.zeros(4000)}, part / "x.pt")


def numbers(place: Path) -> None:
    with atomic_file(place) as part, part.open("wb") as file:  # as the package gguf does
        np.zeros(4000).tofile(file)


@pytest.mark.parametrize("write", [half_a_file, tensors, pickled, numbers])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(write, tmp_path, capfd):
    (write_text if write in (half_a_file, numbers) else fill)(tmp_path / "x", "old")
    assert limited(lambda: write(tmp_path / "x")) == 2
    assert f"{tmp_path / 'x'} cannot be used (" in capfd.readouterr().err
    assert read(tmp_path / "x") == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# ---- training -----------------------------------------------------------------------------------------------------

PAIRS = [Pair(f"p{i}", f"Is {i} a number?", f"Yes, {i} is one.", f"No, {i} is none.", 5, 5) for i in range(12)]


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    model, tok = ws.load_model("tiny-random", device="cpu")
    config = ws.train.replace(train_preset("tiny-random", "lora"), max_steps=5, batch=4, micro_batch=2, validation=0.0)
    train_adapter(model, tok, PAIRS, "pos", "lora", folder / "pos", config)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pos" / "adapter_model.safetensors")


def test_a_full_disk_while_training_is_one_sentence_from_which_it_goes_on(tmp_path, capfd):
    (tmp_path / "a").mkdir()
    assert limited(lambda: train(tmp_path / "a"), size=60_000) == 2
    assert "cannot be used (" in capfd.readouterr().err
    assert (tmp_path / "a" / ".pos.work").is_dir(), "what is finished stays"
    for name in ("a", "b"):
        assert forked(lambda name=name: train(tmp_path / name)) == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.slow
def test_a_training_killed_anywhere_goes_on_to_the_same_bits(tmp_path):
    """Every twelfth file operation of a training, each of them followed by a run to the end."""
    (tmp_path / "whole").mkdir()
    assert forked(lambda: train(tmp_path / "whole")) == 0
    whole, number, resumed = weights(tmp_path / "whole"), 1, 0
    folder = tmp_path / "torn"
    while True:
        folder.mkdir()
        code = killed_before(number, folder, lambda: train(folder))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        work = folder / ".pos.work"
        resumed += work.is_dir() and last_whole_checkpoint(work, False) is not None
        assert forked(lambda: train(folder)) == 0
        again = weights(folder)
        assert all(torch.equal(t, again[name]) for name, t in whole.items()), f"killed before operation {number}"
        assert {p.name for p in folder.iterdir()} == {"pos", ".pos.lock"}
        shutil.rmtree(folder)
        number += 12
    assert resumed > 3
