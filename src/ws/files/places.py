"""Places that names mean, and whose what lies there is.

A name that was read from a file is data: somebody else may have written it. One function makes a path of it, below a
folder that the user has named, or refuses; and a folder that is there is replaced only where it is of the kind that is
written, without the files in it that are somebody's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ws.errors import WsError

# Windows takes these for devices, with any ending, and strips dots and spaces from the end of a name.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_plain_name(name: Any) -> bool:
    """Whether a name is that of one file or folder on every system, and of nothing else."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not re.search(r"[/\\:]", name)
        and name == name.rstrip(". ")
        and name != ""
        and _DEVICE.fullmatch(name) is None
    )


def plain_name(name: Any, what: str) -> str:
    """`name`, if it is that of one folder; otherwise a `WsError` that says `what` it was to name."""
    if not is_plain_name(name):
        raise WsError(f"{name!r} cannot name {what}: it must be the name of one folder, such as honesty-2.")
    return str(name)


def place_below(folder: Path, name: Any, source: str | Path) -> Path:
    """The file below `folder` that a name such as `vector/ws.json` means.

    Args:
        folder: where it lies, whatever it says.
        name: as it was read from a file.
        source: that file, for the error.

    Raises:
        WsError: a name that leads elsewhere: an absolute one, `..`, a drive, a device, or through a link.
    """
    parts = name.split("/") if isinstance(name, str) else [name]
    if not all(map(is_plain_name, parts)):
        raise WsError(f"{source} names {name!r}, which is no place below {folder}; mend that name, or delete the file.")
    path = folder
    for part in parts[:-1]:
        path = path / part
        require_no_link(path)
    return path / parts[-1]


def require_no_link(path: Path) -> None:
    """`WsError` for a link: what it leads to is somebody's own."""
    if path.is_symlink():
        raise WsError(
            f"{path} is a link, and what it leads to is not touched; move the link away, or take another place."
        )


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that is written here, and how it is recognised.

    Attributes:
        what: is said of any other folder, such as `not a steering vector`.
        markers: the files by which one of its kind is known.
        files: patterns of the names that are given to files in it; all others are somebody's own.
    """

    what: str
    markers: tuple[str, ...]
    files: tuple[str, ...]

    def require(self, folder: Path) -> None:
        """`WsError` unless one may be written there: where nothing is, in an empty folder, or over one of its kind."""
        if not (folder.exists() or folder.is_symlink()):
            return
        is_own = all((folder / marker).is_file() for marker in self.markers)
        if not is_own and not (folder.is_dir() and not any(folder.iterdir())):
            raise WsError(f"{folder} exists and is {self.what}; choose another place, or move it away.")

    def others(self, folder: Path, new: Iterable[str] = ()) -> list[Path]:
        """What lies in a folder and is somebody's own: neither of its kind nor replaced by a `new` file."""
        ours = {*self.markers, *new}
        return [
            path
            for path in sorted(folder.iterdir())
            if path.name not in ours and not any(fnmatchcase(path.name, pattern) for pattern in self.files)
        ]
