"""What is written: whole and on the disk, or not at all.

A file or folder is filled under a hidden name beside its place, `.<name>.part-<machine>-<process>-<random>`, flushed to
the disk, and put in its place in one step. So a kill, a full disk or a power loss leaves what was there before; what it
leaves beside it is cleared away by the next writer in that folder. An operating system that refuses is a `DiskError`.
"""

from __future__ import annotations

import csv
import ctypes
import errno
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock, Timeout

from ws import console
from ws.errors import WsError, disk_errors
from ws.files.places import FolderKind

_ABANDONED = 7 * 24 * 3600.0  # seconds after which what another machine began to write is not being written any more
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


# ---- all at once --------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name beside a file to write to; it takes the file's place when the block ends well.

    The name is nobody else's, so of several writers the last one's whole file stays. A link is written through.

    Raises:
        DiskError: the operating system refuses.
    """
    with disk_errors(file):
        file = _behind_links(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(file, "part")
        try:
            yield part
            flush(part)
            part.replace(file)
            _sync(file.parent)
        finally:
            delete(part)


@contextmanager
def atomic_folder(folder: Path, kind: FolderKind | None = None) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the place of `folder` when the block ends well and vanishes when not.

    A link is written through: what it leads to is replaced, and the link stays.

    Args:
        folder: the place.
        kind: what is written; files of somebody's own in a folder of this kind stay there.

    Raises:
        DiskError: the operating system refuses.
        WsError: something of another kind is there.
    """
    with disk_errors(folder):
        if kind is not None:
            kind.require(folder)
        folder = folder.resolve() if folder.name in ("", "..") else _behind_links(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = _beside(folder, "part")
        part.mkdir()
        try:
            yield part
            flush(part)
            if kind is not None and folder.is_dir() and kind.others(folder, [path.name for path in part.iterdir()]):
                _replace_ours(folder, part, kind)
            else:
                _put(part, folder)
            _sync(folder.parent)
        finally:
            delete(part)  # nothing, what was not finished, or what was in this place before


def _behind_links(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path


def _put(part: Path, folder: Path) -> None:
    """Let a folder take another's place; what was there may be found under the name `part`."""
    while not (_moved(part, folder) or _exchange(part, folder)):
        old = _beside(folder, "old")
        try:
            with suppress(FileNotFoundError):  # another writer did it first
                folder.rename(old)
            if _moved(part, folder):
                return
        finally:
            _settle(old, folder, "old")


def _replace_ours(folder: Path, part: Path, kind: FolderKind) -> None:
    """Put the files of `part` in the place of ours, file by file: what is somebody's own is never moved.

    The markers are the first to go and the last to come, so that half of it is not taken for the whole.
    """
    new = sorted(part.iterdir(), key=lambda path: path.name in kind.markers)
    others = {path.name for path in kind.others(folder, [path.name for path in new])}
    ours = [path for path in folder.iterdir() if path.name not in others]
    for path in sorted(ours, key=lambda path: path.name not in kind.markers):
        delete(path)
    for path in new:
        path.rename(folder / path.name)


def _moved(part: Path, folder: Path) -> bool:
    """Whether a folder could be given its name, which it cannot while that is another's."""
    try:
        part.rename(folder)
    except OSError as problem:
        if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchange(a: Path, b: Path) -> bool:
    """Whether two folders have exchanged their places in one step, as Linux can on most file systems."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    return swap is not None and swap(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk and not only in memory."""
    for inner in path.iterdir() if path.is_dir() else ():
        flush(inner)
    _sync(path)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # where a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(handle)


# ---- what killed processes left -----------------------------------------------------------------------------------

_LEFT = re.compile(r"\.(?P<name>.+)\.(?P<kind>part|old)-(?P<machine>[A-Za-z0-9]*)-(?P<process>\d+)-[0-9a-f]{8}")


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside a path that only this call uses; the folder is cleared of what killed processes left."""
    recover(path.parent)
    for legacy in ("old", "part"):  # so versions without machine and process called them
        _settle(path.with_name(f".{path.name}.{legacy}"), path, legacy)
    return path.with_name(f".{path.name}.{kind}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}")


def recover(folder: Path) -> None:
    """Clear a folder of what killed processes left half written, and put back what one had only just moved aside."""
    with suppress(OSError):  # a folder that is not there, or may only be read, needs no clearing
        for left in sorted(folder.iterdir()):
            name = _LEFT.fullmatch(left.name)
            if name is not None and _is_abandoned(left, name["machine"], int(name["process"])):
                _settle(left, left.with_name(name["name"]), name["kind"])


def _settle(left: Path, place: Path, kind: str) -> None:
    """Delete what is left beside a place; but put it there if it was moved aside and nothing came in its stead."""
    if kind == "old" and not place.exists():
        with suppress(FileNotFoundError):
            left.rename(place)
    else:
        delete(left)


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())


def _is_abandoned(left: Path, machine: str, process: int) -> bool:
    if machine == _machine() and not _is_running(process):
        return True
    with suppress(FileNotFoundError):
        return time.time() - left.lstat().st_mtime > _ABANDONED
    return False


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there is no harmless way to ask; the rest of a killed run stays
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def delete(path: Path) -> None:
    """Delete a folder with all in it, or a file, or a link and not what it leads to; as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


# ---- one at a time ------------------------------------------------------------------------------------------------


@contextmanager
def lock(file: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes and threads that ask for the same lock out while the block runs.

    The operating system takes it from a process that ends, however that ends. Who holds a lock may ask for it again.

    Args:
        file: what is worked on; the lock is a hidden file beside it.
        wait: for the other to finish, and say so; else a lock that is taken is a `WsError`.
    """
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(file.with_name(f".{file.name}.lock"), is_singleton=True)
        try:
            held.acquire(blocking=False)
        except Timeout as taken:
            if not wait:
                raise WsError(f"Another process is working on {file}; let it finish, or take another --out.") from taken
            console.say(f"waiting for another process that is working on {file}")
            held.acquire()
    try:
        yield
    finally:
        held.release()


# ---- texts, JSON and tables ---------------------------------------------------------------------------------------


def write_text(file: Path, text: str) -> Path:
    """Write a text file all at once."""
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")
    return file


def write_json(file: Path, value: Any) -> Path:
    """Write strict JSON all at once; NaN is refused rather than written."""
    return write_text(file, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the columns of the first; floats keep all their digits, NaN and ragged rows are refused."""
    if not rows:
        raise WsError(f"There are no rows to write to {file}.")
    lines = list[str]()
    # Before Python 3.13 a lone \r is quoted only where it is a part of the line's end, and it ends lines for readers.
    writer = csv.DictWriter(SimpleNamespace(write=lines.append), fieldnames=list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        if odd := row.keys() ^ rows[0].keys():
            raise WsError(f"Refusing to write rows of different columns ({', '.join(sorted(odd))}) to {file}.")
        bad = [k for k, v in row.items() if isinstance(v, Real) and v != v]
        if bad:
            raise WsError(f"Refusing to write NaN in {', '.join(bad)} to {file}.")
        writer.writerow(row)
    return write_text(file, "".join(line.removesuffix("\r\n") + "\n" for line in lines))
