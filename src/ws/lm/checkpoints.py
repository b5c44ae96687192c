"""Full checkpoints, read one tensor at a time: the difference of two fine-tunes, and the identity of a base.

A checkpoint is a folder of safetensors with a `config.json`. The architecture comes from the config as a model on the
meta device, which says what every parameter is without holding any.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ws.console import progress
from ws.delta import LinearDelta, approximation_errors
from ws.errors import WsError, choose
from ws.files.gguf import gguf_file
from ws.files.tensors import DTYPES, open_tensors, weight_files
from ws.lm.hub import find
from ws.lm.models import (
    AGAIN,
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

# What a checkpoint's folder may hold besides weights; weights in other formats stay where they are.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


# A file and the name of a tensor in it.
Place = tuple[Path, str]
_ROWS = 8192  # of tied weights that are compared at a time


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors checkpoint whose tensors stay on disk.

    A weight that the architecture ties to another (an embedding and the head) is one parameter with two names. Files
    may hold it under either name or under both, and what they hold twice may differ: then it is no longer tied. `model`
    is tied as transformers ties it when it loads these files.

    Attributes:
        name: by which it was opened.
        folder: where it is.
        files: those with weights.
        stored: parameter name to where the files hold it; a tied weight has as many of them as it was stored times.
        values: parameter name, every one of a tied weight too, to where its value is read.
        model: the architecture, on the meta device.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    stored: Mapping[str, Place]
    values: Mapping[str, Place]
    model: PreTrainedModel

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """A checkpoint by folder, bundled name or hub id.

        Raises:
            WsError: not there, without safetensors, or no model of transformers.
        """
        folder = _folder_of(name)
        files = weight_files(folder, AGAIN)
        keys = {key: file for file in files for key in _keys(file)}
        model = _architecture(folder, files[0])
        stored = _stored(model, keys)
        return cls(name, folder, files, stored, _tie(model, stored), model)

    @property
    def in_parts(self) -> list[str]:
        """Parameters that the files lack, or keep in parts which transformers puts together (experts)."""
        return [n for n, _ in self.model.named_parameters() if n not in self.values]

    def require_whole(self) -> Checkpoint:
        """Itself, if every parameter is one tensor of the files; otherwise a `WsError`."""
        if missing := self.in_parts:
            raise WsError(
                f"The checkpoint {self.name} lacks {len(missing)} weights of its architecture, or keeps them in parts "
                f"({', '.join(missing[:3])}, ...); it cannot be read tensor by tensor."
            )
        return self

    @cached_property
    def _names(self) -> dict[int, list[str]]:
        names = dict[int, list[str]]()
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return names

    def copies(self, parameter: str) -> list[Place]:
        """Everywhere that the files hold a parameter, under its own name or one that it is tied to."""
        names = self._names[id(self.model.get_parameter(parameter))]
        return [self.stored[n] for n in names if n in self.stored]

    def place(self, parameter: str) -> Place:
        """Where a parameter's value is read; `WsError` when it is nowhere as one tensor."""
        if parameter not in self.values:
            raise WsError(f"The checkpoint {self.name} does not hold {parameter} as one tensor.")
        return self.values[parameter]

    def tensor(self, parameter: str) -> Tensor:
        """A parameter's value as it is stored; it is mapped from the file and freed with the tensor.

        Raises:
            WsError: it is nowhere as one tensor, of another shape than configured, or a quantised weight's codes.
        """
        value, wanted = _read(self.place(parameter)), self.model.get_parameter(parameter).shape
        if not value.is_floating_point() or value.itemsize == 1:
            raise WsError(
                f"The checkpoint {self.name} holds {parameter} as codes of a quantised weight ({value.dtype}), not as "
                "numbers; save what they expand to (`model.dequantize()`, `save_pretrained`) and name that folder."
            )
        if value.shape != wanted:
            raise WsError(
                f"The checkpoint {self.name} holds {parameter} as {tuple(value.shape)}, but its configuration asks for "
                f"{tuple(wanted)}."
            )
        return value

    @property
    def untied(self) -> list[str]:
        """Weights that the configuration ties to others, and that have values of their own in the files."""
        pairs = self.model.all_tied_weights_keys.items()
        return [t for t, s in pairs if self.model.get_parameter(t) is not self.model.get_parameter(s)]

    def untie(self) -> Checkpoint:
        """The same values, but every weight a parameter of its own; not all of them are `stored` then."""
        model = deepcopy(self.model)
        for target in model.all_tied_weights_keys:
            _untie(model, target)
        return replace(self, model=model)

    def fingerprint(self, copied_to: torch.dtype | None = None) -> str:
        """That of the model which this checkpoint loads as; see `ws.lm.models.fingerprint`."""
        if self.in_parts:  # then only transformers knows how to put them together
            return fingerprint(load_model(self.name, device="cpu")[0], copied_to)
        parameters = self.model.named_parameters()
        return fingerprint_of(((n, p.shape, partial(self.tensor, n)) for n, p in parameters), copied_to)


def _folder_of(name: str) -> Path:
    if name == "tiny-random":
        raise WsError("tiny-random has no files; save it first (`model.save_pretrained`) and name the folder.")
    if gguf_file(name) is not None:
        raise WsError(
            f"{name} is a GGUF file, whose blocks cannot be patched or compared tensor by tensor; save what it "
            "expands to (`model.save_pretrained`) and name that folder, or make a LoRA for it (`ws export gguf-lora`)."
        )
    return find(model_folder(name), ["*.safetensors", *SIDE_FILES])


def _keys(file: Path) -> list[str]:
    with open_tensors(file, AGAIN) as stored:
        return list(stored.keys())


def _read(place: Place) -> Tensor:
    file, key = place
    with open_tensors(file, AGAIN) as stored:
        return stored.get_tensor(key)


def _architecture(folder: Path, first: Path) -> PreTrainedModel:
    """The model on the meta device, in the dtype in which transformers loads it."""
    config = load_config(str(folder))
    if config.dtype is None:
        with open_tensors(first, AGAIN) as stored:
            dtypes = [DTYPES.get(stored.get_slice(key).get_dtype()) for key in _keys(first)]
        config.dtype = next((d for d in dtypes if d is not None and d.is_floating_point), torch.float32)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # values that make no sense come out of transformers as errors of any kind
        raise WsError(
            f"The config.json in {folder} describes no model of transformers ({problem}); {AGAIN}."
        ) from problem


def _stored(model: PreTrainedModel, files: Mapping[str, Path]) -> dict[str, Place]:
    """Parameter name to where it is in the files, where transformers only renames it; what it fuses is left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    shapes, prefix = model.state_dict(), model.base_model_prefix
    stored = dict[str, Place]()
    for key in sorted(files, key=dot_natural_key):  # as in transformers: of two keys for one parameter the first counts
        name, converter = rename_source_key(key, renamings, converters, prefix, shapes)
        if name not in shapes and key in shapes:
            name, converter = rename_source_key(key, [], [], prefix, shapes)
        if converter is None and name in shapes:
            stored.setdefault(name, (files[key], key))
    return stored


def _tie(model: PreTrainedModel, stored: Mapping[str, Place]) -> dict[str, Place]:
    """Tie the model as `PreTrainedModel.tie_weights` of transformers does when it loads the files; where values are.

    Of two weights that the architecture ties the stored one gives its value to the other. Where both are stored they
    are tied if they are equal in the dtype of the model, and otherwise each keeps its own value.
    """
    values = dict(stored)
    for target, source in model.all_tied_weights_keys.items():
        if target not in values:
            continue
        if source not in values:
            values[source] = values[target]
        elif not _equal(values[source], values[target], model.get_parameter(source).dtype):
            _untie(model, target)
    for target, source in model.all_tied_weights_keys.items():
        if source in values:
            values.setdefault(target, values[source])
    return values


def _equal(a: Place, b: Place, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are equal once they are cast."""
    x, y = _read(a), _read(b)
    parts = zip(x.split(_ROWS), y.split(_ROWS), strict=False)
    return x.shape == y.shape and all(torch.equal(p.to(dtype), q.to(dtype)) for p, q in parts)


def _untie(model: PreTrainedModel, parameter: str) -> None:
    """Make a parameter on the meta device one of its own."""
    module, _, leaf = parameter.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(torch.empty_like(model.get_parameter(parameter))))


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
        """The modules that differ, with their change, or with the name of an earlier module that has the same one."""
        groups, changes, differ = self._by_weight(), dict[str, LinearDelta | str](), False
        for name, _ in progress(self.modules, desc="difference", unit="module"):
            changes |= self._changes(groups[name]) if name in groups else {}
            if name in changes:
                differ = True
                yield name, changes.pop(name)
        if not differ:
            raise WsError(f"{self.pos.name} and {self.neg.name} are equal in every module; there is no vector in them.")

    def collect(self, rank: int | None = None) -> tuple[dict[str, LinearDelta], dict[str, Any]]:
        """The changes by module, and facts for a recipe.

        Args:
            rank: the best approximation of every matrix with this many singular directions; norms and biases stay. The
                facts are `errors` of each matrix, `error` of the worst, and `total_error` of all of them as one vector.
        """
        deltas, errors, sizes = dict[str, LinearDelta](), dict[str, float](), dict[str, float]()
        for name, change in self:
            if isinstance(change, str):
                deltas[name] = deltas[change]
                continue
            deltas[name] = change
            if rank is not None and change.kind != "scale" and change.e is not None:
                sizes[name] = float(change.e.float().norm())
                low, errors[name] = change.factorised(change.e, rank)
                deltas[name] = change.holding({"u": low.u, "v": low.v, "bias": change.bias})
        facts: dict[str, Any] = {"modules": len(deltas), "equal": len(self.modules) - len(deltas)}
        if rank is not None:
            facts |= {"rank": rank} | approximation_errors(errors, sizes)
        return deltas, facts

    def _parameter(self, module: str, leaf: str) -> Hashable:
        """The same for two leaves exactly if they are one parameter in both checkpoints."""
        return tuple(id(c.model.get_submodule(module).get_parameter(leaf)) for c in (self.pos, self.neg))

    def _by_weight(self) -> dict[str, list[str]]:
        """The modules that share their weight in both checkpoints, by the first of them: they have one change.

        A change holds one bias, so where more than one of them has its own they stay apart.
        """
        groups = dict[Hashable, list[str]]()
        for name, module in self.modules:
            shared = self._parameter(name, "weight") if module_kind(module) else name
            groups.setdefault(shared, []).append(name)
        split = list[list[str]]()
        for names in groups.values():
            biases = {self._parameter(n, "bias") for n in names if len(names) > 1 and self._has_bias(n)}
            split += [names] if len(biases) < 2 else [[n] for n in names]
        return {names[0]: names for names in split}

    def _has_bias(self, module: str) -> bool:
        return isinstance(getattr(self.pos.model.get_submodule(module), "bias", None), nn.Parameter)

    def _changes(self, names: Sequence[str]) -> dict[str, LinearDelta | str]:
        """The change of modules that share their weight, by the name of the first, whose name the others get."""
        parts = {(n, leaf): part for n, leaf, part in self._parts(names) if part.any()}
        modules = {n: self.pos.model.get_submodule(n) for n in names}
        plain = {n for n in names if module_kind(modules[n])}
        if odd := sorted(f"{n}.{leaf}" for n, leaf in parts if n not in plain or leaf not in ("weight", "bias")):
            raise WsError(
                f"The fine-tunes differ in {', '.join(odd)}, which is in no linear layer, embedding or norm; take only "
                "modules of certain kinds to leave it out (--modules)."
            )
        if not parts:
            return {}
        by_leaf = {leaf: part for (_, leaf), part in parts.items()}
        changed = list(names) if "weight" in by_leaf else [n for n in names if self._has_bias(n)]
        kinds = [str(module_kind(modules[n])) for n in changed]
        size = weight_size(modules[changed[0]])
        assert size is not None
        e = as_matrix(modules[changed[0]], by_leaf["weight"]).contiguous() if "weight" in by_leaf else None
        kind = "embedding" if "embedding" in kinds else kinds[0]
        delta = LinearDelta(*size, e=e, bias=by_leaf.get("bias"), kind=kind)
        return {n: delta if n == changed[0] else changed[0] for n in changed}

    def _parts(self, names: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
        """`(module, leaf, difference)` of every parameter of some modules, once where they share it."""
        model, parameters = self.pos.model, dict[Hashable, tuple[str, str]]()
        for name in names:
            for leaf, _ in model.get_submodule(name).named_parameters(recurse=False):
                parameters.setdefault(self._parameter(name, leaf), (name, leaf))
        for name, leaf in parameters.values():
            parameter = f"{name}.{leaf}" if name else leaf
            if self._is_bias_of_another(name, leaf):
                continue
            part = self.pos.tensor(parameter).float() - self.neg.tensor(parameter).float()
            if not torch.isfinite(part).all():
                raise WsError(f"{parameter} of {self.pos.name} or {self.neg.name} holds NaN or infinity.")
            yield name, leaf, part

    def _is_bias_of_another(self, module: str, leaf: str) -> bool:
        """Whether a parameter that is in no linear layer or norm is tied to the bias of one, as in BERT's head."""
        if module_kind(self.pos.model.get_submodule(module)):
            return False
        mine = self._parameter(module, leaf)
        return any(module_kind(m) and self._has_bias(n) and self._parameter(n, "bias") == mine for n, m in self.modules)


def _require_same_shape(ours: Checkpoint, theirs: Checkpoint) -> None:
    both = (ours, theirs)
    shapes = [{n: tuple(p.shape) for n, p in c.model.named_parameters(remove_duplicate=False)} for c in both]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise WsError(f"{ours.name} and {theirs.name} are not of one architecture: they differ in {odd[0][0]}.")


def _chosen(model: PreTrainedModel, kinds: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """The modules to compare, each with parameters of its own."""
    with_parameters = [(n, m) for n, m in model.named_modules() if list(m.parameters(recurse=False))]
    known = {name.rsplit(".", 1)[-1] for name, _ in with_parameters}
    for kind in kinds or ():
        choose("module kind", kind, known)
    return [(n, m) for n, m in with_parameters if kinds is None or n.rsplit(".", 1)[-1] in kinds]
