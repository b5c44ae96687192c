"""Full checkpoints, read one tensor at a time: the difference of two fine-tunes, and the identity of a base.

A checkpoint is a folder of safetensors with a `config.json`. The architecture comes from the config as a model on the
meta device, which says what every parameter is without holding any.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ws.console import progress
from ws.delta import LinearDelta, approximation_errors
from ws.errors import WsError, choose
from ws.gguf_base import gguf_file
from ws.hub import find
from ws.models import (
    as_matrix,
    fingerprint,
    fingerprint_of,
    layer_count,
    load_config,
    load_model,
    model_folder,
    module_kind,
    weight_size,
)

INDEX = "model.safetensors.index.json"
# What a checkpoint's folder may hold besides weights; weights in other formats stay where they are.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint whose tensors stay on disk.

    Attributes:
        name: by which it was opened.
        folder: where it is.
        places: parameter name to the file that holds it, and its name there.
        model: the architecture, on the meta device.
    """

    name: str
    folder: Path
    places: Mapping[str, tuple[Path, str]]
    model: PreTrainedModel

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """A checkpoint by folder, bundled name or hub id.

        Raises:
            WsError: not there, without safetensors, or no model of transformers.
        """
        folder = _folder_of(name)
        config = load_config(str(folder))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        files = _files_of(folder)
        keys = _keys(model, files)
        return cls(name, folder, {n: (files[key], key) for n, key in keys.items()}, model)

    @property
    def in_parts(self) -> list[str]:
        """Parameters that the files lack, or keep in parts which transformers puts together (experts)."""
        return [n for n, _ in self.model.named_parameters() if n not in self.places]

    def require_whole(self) -> Checkpoint:
        """Itself, if every parameter is one tensor of the files; otherwise a `WsError`."""
        if missing := self.in_parts:
            raise WsError(
                f"The checkpoint {self.name} lacks {len(missing)} weights of its architecture, or keeps them in parts "
                f"({', '.join(missing[:3])}, ...); it cannot be read tensor by tensor."
            )
        return self

    def stored_name(self, parameter: str) -> str:
        """The name under which a parameter is stored: for tied weights that of the first."""
        wanted = self.model.get_parameter(parameter)
        return next(n for n, p in self.model.named_parameters() if p is wanted)

    def tensor(self, parameter: str) -> Tensor:
        """A parameter's value as it is stored; it is mapped from the file and freed with the tensor."""
        if parameter not in self.places:
            raise WsError(f"The checkpoint {self.name} does not hold {parameter} as one tensor.")
        file, key = self.places[parameter]
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(key)

    def fingerprint(self) -> str:
        """That of the model which this checkpoint loads as; see `ws.models.fingerprint`."""
        if self.in_parts:  # then only transformers knows how to put them together
            return fingerprint(load_model(self.name, device="cpu")[0])
        parameters = self.model.named_parameters()
        return fingerprint_of((n, p.shape, partial(self.tensor, n)) for n, p in parameters)


def _folder_of(name: str) -> Path:
    if name == "tiny-random":
        raise WsError("tiny-random has no files; save it first (`model.save_pretrained`) and name the folder.")
    if gguf_file(name) is not None:
        raise WsError(
            f"{name} is a GGUF file, whose blocks cannot be patched or compared tensor by tensor; save what it "
            "expands to (`model.save_pretrained`) and name that folder, or make a LoRA for it (`ws export gguf-lora`)."
        )
    return find(Path(model_folder(name)).expanduser() if name == "pocket" else name, ["*.safetensors", *SIDE_FILES])


def _files_of(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.is_file():
        files = {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({f.name for f in files.values() if not f.is_file()})
        if absent:
            raise WsError(f"The checkpoint {folder} lacks {', '.join(absent)}; download it again.")
        return files
    whole = folder / "model.safetensors"
    if not whole.is_file():
        raise WsError(
            f"The folder {folder} has no safetensors weights; pickled checkpoints are never loaded, convert it first."
        )
    try:
        with safe_open(whole, framework="pt") as stored:
            return dict.fromkeys(stored.keys(), whole)
    except SafetensorError as problem:
        raise WsError(f"The weights in {whole} are damaged ({problem}); download them again.") from problem


def _keys(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Parameter name to the name in the files, where transformers only renames it; what it fuses is left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    shapes = model.state_dict()
    found = {}
    for key in stored:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if converter is None:
            found[name] = key
    return found


# ---- the difference of two -------------------------------------------------------------------------------------------


class Difference:
    """What two full fine-tunes of one architecture differ in, `theta_pos - theta_neg`, one module at a time."""

    def __init__(self, pos: str, neg: str, kinds: Sequence[str] | None = None) -> None:
        self.pos, self.neg = (Checkpoint.open(name).require_whole() for name in (pos, neg))
        _require_same_shape(self.pos, self.neg)
        self.modules = _chosen(self.pos.model, kinds)

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return layer_count(self.pos.model)

    def __iter__(self) -> Iterator[tuple[str, LinearDelta | str]]:
        """The modules that differ, with their change, or with the name of an earlier module that shares the weight."""
        first: dict[int, str] = {}
        equal = set[str]()
        for name, module in progress(self.modules, desc="difference", unit="module"):
            owner = first.setdefault(id(next(module.parameters(recurse=False))), name)
            if owner != name:
                if owner not in equal:
                    yield name, owner
                continue
            delta = _change(name, module, self.pos, self.neg)
            if delta is None:
                equal.add(name)
            else:
                yield name, delta
        if len(equal) == len(first):
            raise WsError(f"{self.pos.name} and {self.neg.name} are equal in every module; there is no vector in them.")

    def collect(self, rank: int | None = None) -> tuple[dict[str, LinearDelta], dict[str, Any]]:
        """The changes by module, and facts for a recipe.

        Args:
            rank: the best approximation of every matrix with this many singular directions; norms and biases stay. The
                facts are `errors` of each module, `error` of the worst, and `total_error` of all of them as one vector.
        """
        deltas, errors, sizes = dict[str, LinearDelta](), dict[str, float](), dict[str, float]()
        for name, change in self:
            if isinstance(change, str):
                deltas[name] = deltas[change]
                continue
            deltas[name] = change
            if rank is not None and change.kind != "scale" and change.e is not None:
                sizes[name] = change.norm()
                low, errors[name] = change.factorised(change.e, rank)
                deltas[name] = change.holding({"u": low.u, "v": low.v, "bias": change.bias})
        facts: dict[str, Any] = {"modules": len(deltas), "equal": len(self.modules) - len(deltas)}
        if rank is not None:
            facts |= {"rank": rank} | approximation_errors(errors, sizes)
        return deltas, facts


def _require_same_shape(ours: Checkpoint, theirs: Checkpoint) -> None:
    shapes = [{n: tuple(p.shape) for n, p in c.model.named_parameters()} for c in (ours, theirs)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise WsError(f"{ours.name} and {theirs.name} are not of one architecture: they differ in {odd[0][0]}.")


def _chosen(model: PreTrainedModel, kinds: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules to compare, each with parameters of its own."""
    own = [(n, m) for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    known = {name.rsplit(".", 1)[-1] for name, _ in own}
    for kind in kinds or ():
        choose("module kind", kind, known)
    return [(n, m) for n, m in own if kinds is None or n.rsplit(".", 1)[-1] in kinds]


def _change(name: str, module: nn.Module, ours: Checkpoint, theirs: Checkpoint) -> LinearDelta | None:
    """The change of one module, None when both are equal there."""
    parts = {leaf: part for leaf, part in _parts(name, module, ours, theirs) if part.any()}
    if not parts:
        return None
    kind = module_kind(module)
    held = {"embedding": {"weight"}}.get(kind or "", {"weight", "bias"}) if kind else set[str]()
    odd = sorted(f"{name}.{leaf}" for leaf in parts.keys() - held)
    if odd:
        raise WsError(
            f"The fine-tunes differ in {', '.join(odd)}, which is in no linear layer, embedding or norm; take only "
            "modules of certain kinds to leave it out (--kinds)."
        )
    size = weight_size(module)
    assert size is not None
    e = as_matrix(module, parts["weight"]).contiguous() if "weight" in parts else None
    return LinearDelta(*size, e=e, bias=parts.get("bias"), kind=str(kind))


def _parts(name: str, module: nn.Module, ours: Checkpoint, theirs: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for leaf, _ in module.named_parameters(recurse=False):
        parameter = ours.stored_name(f"{name}.{leaf}" if name else leaf)
        part = ours.tensor(parameter).float() - theirs.tensor(parameter).float()
        if not torch.isfinite(part).all():
            raise WsError(f"{parameter} of {ours.name} or {theirs.name} holds NaN or infinity.")
        yield leaf, part
