"""The change any PEFT adapter makes to a linear layer, read off the layer itself.

A linear layer with a linear adapter is an affine map, so `layer(I) - layer(0)` is its whole weight in any
family: the change against the pristine weight is exact up to float32, but dense. Layers in fewer digits are read from a
float32 copy, one at a time, because bfloat16 would round the change away. Adapters that are no affine map of a linear
layer (prompts, activations in between) are refused. One layer at a time does not show what an adapter does besides
(layers run twice, a second network), so the whole model with these changes is compared with PEFT's on a few tokens
before they are handed out; what shows on other tokens alone, `ws.adapters.check_fields` refuses by name.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ws import console
from ws.delta import LinearDelta
from ws.errors import WsError
from ws.files.tensors import open_tensors
from ws.lm.models import bias_of, linear_size, weight_of

MIN_LIKENESS = 0.1  # cosine between what an adapter has taken from the base at the start, and what training made of it
TOLERANCE = 1e-3  # of the output's size, for what a float32 layer may differ from its own matrix
WHOLE_TOLERANCE = 0.05  # of the effect on the logits, for what the base with all changes may differ from PEFT's model
# Adapters that take the base's weight apart, as precisely as they find it.
_FACTORING = ("OSF", "FROD", "ADAMSS")
_BAD_ADAPTER = (ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError)


@torch.no_grad()
def probe_adapter(folder: str | Path, config: PeftConfig, base: nn.Module) -> dict[str, LinearDelta]:
    """The dense change of every linear layer that the adapter in `folder`, of that config, adapts.

    The base may be of any dtype; it is handed back as it was.

    Raises:
        WsError: PEFT cannot load the adapter, it adapts something else than linear layers, it is not linear, or it does
            more than change these layers.
    """
    console.say(
        f"warning: the adapter in {folder} is of no family known here; its change is read off the layers and kept "
        "dense, which takes as much room as the layers themselves."
    )
    if getattr(config, "init_lora_weights", None) == "olora":
        console.warn(
            f"the adapter in {folder} takes its start from the base again, as in PEFT; its vector is right if it was "
            "trained from exactly this base."
        )
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise WsError(f"The adapter in {folder} changes no layer (a prompt or prefix?); it has no vector.")
    if config.peft_type in _FACTORING and any(p.dtype.itemsize < 4 for p in base.parameters()):
        raise WsError(
            f"The adapter in {folder} ({config.peft_type}) takes the base's weights apart, and can only be read on a "
            "base that was loaded with dtype float32."
        )
    plain = _logits(base, base)
    with _adapted(base, folder) as (model, pristine):
        layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
        others = layers.keys() - pristine.keys()
        if others or not layers:
            what = f"{min(others)}, which is no linear layer" if others else "no layer"
            raise WsError(f"The adapter in {folder} changes {what}; it has no vector.")
        _check_tensors(model, folder)
        try:
            deltas = {name: _read_off(name, layer, *pristine[name], config) for name, layer in layers.items()}
            wanted = _logits(model, base)
        except _BAD_ADAPTER as problem:
            raise WsError(f"The model with the adapter in {folder} cannot be run ({problem}).") from problem
    if plain is not None and wanted is not None:
        _check_whole(base, deltas, plain, wanted, folder)
    return deltas


def _check_tensors(model: PeftModel, folder: str | Path) -> None:
    """Every stored tensor has its place in PEFT's model, and every one of the model's is stored; PEFT only warns."""
    with open_tensors(Path(folder) / "adapter_model.safetensors") as file:
        stored = set(file.keys())
    placed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    embeddings = get_peft_model_state_dict(model, save_embedding_layers=True).keys()
    for keys, what in ((stored - embeddings, "holds a tensor that PEFT does not place"), (placed - stored, "lacks")):
        if keys:
            raise WsError(f"The adapter {folder} {what}: {min(keys)}.")


def _logits(model: nn.Module, base: nn.Module) -> Tensor | None:
    """What a model answers to a few tokens, in float32; None where `base` is nothing that takes tokens."""
    if not isinstance(base, PreTrainedModel):
        return None
    inputs = {name: t.to(base.device) for name, t in base.dummy_inputs.items()}
    training = model.training
    try:
        return model.eval()(**inputs)[0].float().cpu()
    finally:
        model.train(training)


def _check_whole(
    base: nn.Module, deltas: Mapping[str, LinearDelta], plain: Tensor, wanted: Tensor, folder: str | Path
) -> None:
    """The base with every change added to its layer's output answers as PEFT's model does."""
    hooks = [base.get_submodule(n).register_forward_hook(partial(_add, delta)) for n, delta in deltas.items()]
    try:
        steered = _logits(base, base)
    finally:
        for hook in hooks:
            hook.remove()
    assert steered is not None
    effect = max(float((x - plain).norm()) for x in (steered, wanted))
    rounding = max(1e-4, 8 * torch.finfo(next(base.parameters()).dtype).eps) * float(plain.norm())
    if float((steered - wanted).norm()) > WHOLE_TOLERANCE * effect + rounding:
        raise WsError(
            f"The adapter in {folder} does more than change linear layers, the same for every token: with these "
            "changes alone the model does not answer as PEFT's does; it has no vector."
        )


def _add(delta: LinearDelta, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    change = delta.to(output.device)
    assert change.e is not None
    return output + functional.linear(args[0].float(), change.e, change.bias).to(output.dtype)


def _read_off(name: str, layer: BaseTunerLayer, weight: Tensor, bias: Tensor | None, config: PeftConfig) -> LinearDelta:
    """`W'^T = layer(I) - layer(0)` and `b' = layer(0)`, a block of rows at a time."""
    d_out, d_in = weight.shape
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in layer.parameters()):
        layer, weight = _in_float32(name, layer, weight, config), weight.float()
    zero = layer(torch.zeros(1, d_in, dtype=weight.dtype, device=weight.device)).float()[0]
    e = torch.empty(d_out, d_in)
    for rows in torch.arange(d_in).split(1024):
        x = torch.zeros(len(rows), d_in, dtype=weight.dtype, device=weight.device)
        x[torch.arange(len(rows)), rows] = 1
        e[:, rows] = (layer(x).float() - zero).T.cpu()
    x = torch.randn(4, d_in, generator=torch.Generator().manual_seed(0)).to(weight)
    given, wanted = layer(x).float().cpu(), x.float().cpu() @ e.T + zero.cpu()
    if float((given - wanted).norm()) > TOLERANCE * float(wanted.norm()):
        raise WsError(f"The adapter of {name} is not linear in its input; it has no vector.")
    moved = weight - weight_of(layer.get_base_layer())  # what a start such as OLoRA's has taken from the base
    if moved.any():
        _check_start(name, moved.float().cpu(), e - (weight - moved).float().cpu())
    shift = zero.cpu() if bias is None else zero.cpu() - bias.float().cpu()
    return LinearDelta(d_out, d_in, e=e - weight.float().cpu(), bias=shift if shift.any() else None)


def _check_start(name: str, moved: Tensor, trained: Tensor) -> None:
    """Refuse a base that has nothing of what the adapter began as; one that training has left far behind may have."""
    if float(trained.norm()) < 3 * float(moved.norm()) and not likeness(trained, moved) > MIN_LIKENESS:
        raise WsError(
            f"The adapter of {name} takes its start from the base, and does not begin at this one; pass the base that "
            "it was trained from."
        )


def likeness(a: Tensor, b: Tensor) -> float:
    """The cosine between two matrices."""
    return float(functional.cosine_similarity(a.flatten().cpu(), b.flatten().cpu(), dim=0))


def _in_float32(name: str, layer: BaseTunerLayer, weight: Tensor, config: PeftConfig) -> BaseTunerLayer:
    """A float32 copy of an adapted layer; a start that moves the pristine `weight` does so unrounded."""
    if torch.equal(weight_of(layer.get_base_layer()), weight):
        return copy.deepcopy(layer).float()
    started = start_again(name, layer.get_base_layer(), weight, config)
    trained = {n: p for n, p in layer.named_parameters() if not n.startswith("base_layer.")}
    for parameter, value in trained.items():
        started.get_parameter(parameter).copy_(value)
    return started.eval()


@torch.no_grad()
def start_again(name: str, module: nn.Module, weight: Tensor, config: PeftConfig) -> BaseTunerLayer:
    """A float32 copy of `module` of the base, with its pristine `weight [d_out, d_in]`, as PEFT begins to train it.

    It has the first factors, and the weight that they were taken from. PEFT does the same whenever it loads an adapter
    that had such a start (PiSSA, OLoRA), because it stores neither.
    """
    place = copy.copy(config)
    for pattern in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(place, pattern, None)
    place.target_modules = {name}
    parent, _, leaf = name.rpartition(".")
    root = holder = nn.Module()
    for part in parent.split(".") if parent else ():
        holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    pristine = copy.deepcopy(module).float()
    weight_of(pristine).copy_(weight)
    holder.add_module(leaf, pristine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(place, root)
    started = root.get_submodule(name)
    assert isinstance(started, BaseTunerLayer)
    return started


@contextmanager
def _adapted(
    base: nn.Module, folder: str | Path
) -> Iterator[tuple[PeftModel, dict[str, tuple[Tensor, Tensor | None]]]]:
    """The base with the adapter on it, and the weights as they were; some families move them, so they are put back."""
    pristine = {n: (weight_of(m).clone(), bias_of(m)) for n, m in base.named_modules() if linear_size(m)}
    children = {module: dict(module._modules) for module in base.modules()}
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    attributes, training = set(vars(base)), base.training
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(base, str(folder)).eval()
        except _BAD_ADAPTER as problem:
            raise WsError(f"PEFT cannot put the adapter in {folder} on this model ({problem}).") from problem
        yield model, pristine
    finally:
        # Where PEFT stops half-way there is nothing to unload from, so its layers are taken out by hand.
        for module, before in children.items():
            module._modules.clear()
            module._modules.update(before)
        for name in vars(base).keys() - attributes:
            delattr(base, name)
        for name, (weight, _) in pristine.items():
            weight_of(base.get_submodule(name)).copy_(weight)
        for name, p in base.named_parameters():
            p.requires_grad_(flags[name])
        base.train(training)
