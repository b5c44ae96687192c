"""safetensors files, written, patched and added to one tensor at a time.

The library writes a file from tensors that are all in memory. The format itself is simple: eight bytes with the length
of a JSON header, the header with every tensor's dtype, shape and place, then the tensors, so a file can be filled in as
its tensors come, and one tensor can be replaced by another of its shape
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ws.errors import WsError

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

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        length = int.from_bytes(handle.read(8), "little")
        self._entries: Mapping[str, dict[str, list[int]]] = json.loads(handle.read(length))
        self._start = 8 + length

    def dtype(self, name: str) -> torch.dtype:
        """In which a tensor is stored."""
        dtype = str(self._entries[name]["dtype"])
        if dtype not in DTYPES:
            raise WsError(f"{name} is stored as {dtype}, which cannot be written; take a checkpoint in another dtype.")
        return DTYPES[dtype]

    def replace(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor."""
        entry, data = self._entries[name], _bytes(tensor)
        begin, end = entry["data_offsets"]
        if (entry["dtype"], entry["shape"]) != (_NAMES[tensor.dtype], list(tensor.shape)):
            raise WsError(f"{name} is {entry['dtype']} of {entry['shape']} and can only be replaced by its like.")
        assert len(data) == end - begin
        self._handle.seek(self._start + begin)
        self._handle.write(data)


def copy_with_room(source: Path, target: Path, extra: Mapping[str, str]) -> None:
    """Copy a safetensors file, with room for more tensors at its end, whose values are not written yet.

    Args:
        source, target: the file and its copy.
        extra: names of the tensors that are added, each with that of one in the file whose dtype and shape it has.
    """
    with source.open("rb") as old, target.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        for name, like in extra.items():
            begin, stop = header[like]["data_offsets"]
            header[name] = header[like] | {"data_offsets": [end, end + stop - begin]}
            end += stop - begin
        text = json.dumps(header).encode()
        text = text.ljust(len(text) + -len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new)
        new.truncate(8 + len(text) + end)


@contextmanager
def tensor_patcher(file: Path) -> Iterator[TensorPatcher]:
    """An existing safetensors file to change in place."""
    with file.open("r+b") as handle:
        yield TensorPatcher(handle)


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
