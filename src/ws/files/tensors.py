"""safetensors files: read, and written, patched and added to one tensor at a time.

The library writes a file from tensors that are all in memory. The format itself is simple: eight bytes with the length
of a JSON header, the header with every tensor's dtype, shape and place, then the tensors, so a file can be filled in as
its tensors come, and one tensor can be replaced by another of its shape
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ws.errors import DamagedError, WsError
from ws.files.places import place_below
from ws.files.reading import convert, disguise, parse_json, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # a checkpoint in one file, and in several
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROOM = 64  # characters of a header entry beside the tensor's name and shape


def read_tensors(file: Path, remedy: str = "make it again") -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; `DamagedError` when it is none, with the remedy."""
    with _whole(file, remedy):
        return load_file(file)


@contextmanager
def open_tensors(file: Path, remedy: str = "make it again") -> Iterator[Any]:
    """A safetensors file to read tensors from one by one (`keys`, `get_tensor`, `get_slice`); see `read_tensors`."""
    with _whole(file, remedy), safe_open(file, framework="pt") as stored:
        yield stored


@contextmanager
def _whole(file: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as problem:
        why = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        if file.is_file():
            with file.open("rb") as handle:
                why = disguise(handle.read(256)) or why
        raise DamagedError(f"The weights in {file} are damaged or missing ({why}); {remedy}.") from problem


class _Index(msgspec.Struct):
    """Which file of several holds a tensor."""

    weight_map: dict[str, str]

    def __post_init__(self) -> None:
        if not self.weight_map:
            raise ValueError("it names no tensors")
        for name in self.weight_map.values():
            if not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", name):
                raise ValueError(f"{name!r:.300} is no safetensors file beside it")


def weight_files(folder: Path, remedy: str) -> tuple[Path, ...]:
    """The files of a checkpoint that transformers reads, in its order: the one whole file before an index of shards.

    Raises:
        WsError: there are none, the index is damaged or leads elsewhere, or a file that it names is missing.
    """
    whole, index = folder / WHOLE, folder / INDEX
    if whole.is_file():
        return (whole,)
    if not index.is_file():
        raise WsError(
            f"The folder {folder} has no safetensors weights; pickled checkpoints are never loaded, convert it first."
        )
    names = sorted(set(read_json(index, _Index, remedy).weight_map.values()))
    files = tuple(place_below(folder, name, index) for name in names)
    if absent := [file.name for file in files if not file.is_file()]:
        raise WsError(f"The checkpoint {folder} lacks {', '.join(absent)}; {remedy}.")
    return files


class Entry(msgspec.Struct):
    """What the header says of one tensor: its dtype, its shape, and its first and last byte behind the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _read_header(file: Path) -> tuple[dict[str, Entry], dict[str, Any], int]:
    """The tensors of a safetensors file, its further facts, and where the first tensor begins."""
    # The library checks that every tensor is there and that none lies over another.
    with open_tensors(file), file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = parse_json(handle.read(length), file, dict[str, Any], "make it again")
    facts = header.pop("__metadata__", {})
    return convert(header, dict[str, Entry]), facts, 8 + length


class TensorWriter:
    """Writes tensors to a new safetensors file as they come; see `tensor_writer`."""

    def __init__(self, handle: BinaryIO, room: int) -> None:
        self._handle, self._room = handle, room
        self._entries: dict[str, dict[str, object]] = {}
        self._end = 0
        handle.seek(8 + room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; nothing of it is kept in memory."""
        data = _bytes(tensor)
        span = [self._end, self._end + len(data)]
        self._entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        self._handle.write(data)
        self._end = span[1]

    def close(self) -> None:
        """Write the header, padded to the room that was kept for it."""
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
        if len(header) > self._room:
            raise WsError(f"The header of {len(self._entries)} tensors does not fit into {self._room} bytes.")
        self._handle.seek(0)
        self._handle.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


@contextmanager
def tensor_writer(file: Path, names: Sequence[str]) -> Iterator[TensorWriter]:
    """A new safetensors file to add tensors to one by one.

    Args:
        file: the place.
        names: every name that may come, which says how much room the header gets; not all of them have to.
    """
    room = sum(len(json.dumps(name)) + 3 * _ROOM for name in names) + _ROOM
    with file.open("wb") as handle:
        writer = TensorWriter(handle, room + -room % 8)
        yield writer
        writer.close()


class TensorPatcher:
    """Replaces tensors of an existing safetensors file by others of the same dtype and shape."""

    def __init__(self, handle: BinaryIO, entries: Mapping[str, Entry], start: int) -> None:
        self._handle, self._entries, self._start = handle, entries, start

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored."""
        dtype = self._entries[name].dtype
        if dtype not in DTYPES:
            raise WsError(f"{name} is stored as {dtype}, which cannot be written; take a checkpoint in another dtype.")
        return DTYPES[dtype]

    def replace(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor."""
        entry, data = self._entries[name], _bytes(tensor)
        begin, end = entry.data_offsets
        if (entry.dtype, entry.shape) != (_NAMES[tensor.dtype], list(tensor.shape)):
            raise WsError(f"{name} is {entry.dtype} of {entry.shape} and can only be replaced by its like.")
        assert len(data) == end - begin
        self._handle.seek(self._start + begin)
        self._handle.write(data)


def copy_with_room(source: Path, target: Path, extra: Mapping[str, str]) -> None:
    """Copy a safetensors file, with room for more tensors at its end, whose values are not written yet.

    Args:
        source, target: the file and its copy.
        extra: names of the tensors that are added, each with that of one in the file whose dtype and shape it has.
    """
    entries, facts, start = _read_header(source)
    with source.open("rb") as old, target.open("wb") as new:
        end = max(entry.data_offsets[1] for entry in entries.values())
        for name, like in extra.items():
            begin, stop = entries[like].data_offsets
            entries[name] = msgspec.structs.replace(entries[like], data_offsets=(end, end + stop - begin))
            end += stop - begin
        text = json.dumps(({"__metadata__": facts} if facts else {}) | msgspec.to_builtins(entries)).encode()
        text = text.ljust(len(text) + -len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        old.seek(start)
        shutil.copyfileobj(old, new)
        new.truncate(8 + len(text) + end)


@contextmanager
def tensor_patcher(file: Path) -> Iterator[TensorPatcher]:
    """An existing safetensors file to change in place."""
    entries, _, start = _read_header(file)
    with file.open("r+b") as handle:
        yield TensorPatcher(handle, entries, start)


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
