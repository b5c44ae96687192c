"""The change any PEFT adapter makes to a linear layer, read off the layer itself.

A linear layer with a linear adapter is an affine map, so `layer(I) - layer(0)` is its whole weight in any
family: the change against the pristine weight is exact up to float32, but dense. Adapters that are no affine map of a
linear layer (prompts, activations in between) are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ws import console
from ws.delta import LinearDelta
from ws.errors import WsError
from ws.models import bias_of, linear_size, weight_of

TOLERANCE = 1e-3  # of the output's size, for what a float32 layer may differ from its own matrix


@torch.no_grad()
def probe_adapter(folder: str | Path, base: nn.Module) -> dict[str, LinearDelta]:
    """The dense change of every linear layer that the adapter in `folder` adapts.

    The base is computed with in its own dtype, so load it in float32; it is handed back as it was.

    Raises:
        WsError: PEFT cannot load the adapter, it adapts something else than linear layers, or it is not linear.
    """
    console.say(
        f"warning: the adapter in {folder} is of no family known here; its change is read off the layers and kept "
        "dense, which takes as much room as the layers themselves."
    )
    with _adapted(base, folder) as (model, pristine):
        layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
        if not layers:
            raise WsError(f"The adapter in {folder} changes no layer (a prompt or prefix?); it has no vector.")
        return {name: _read_off(name, layer, *pristine[name]) for name, layer in layers.items()}


def _read_off(name: str, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> LinearDelta:
    """`W'^T = layer(I) - layer(0)` and `b' = layer(0)`, a block of rows at a time."""
    d_out, d_in = weight.shape
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
    shift = zero.cpu() if bias is None else zero.cpu() - bias.float().cpu()
    return LinearDelta(d_out, d_in, e=e - weight.float().cpu(), bias=shift if shift.any() else None)


@contextmanager
def _adapted(
    base: nn.Module, folder: str | Path
) -> Iterator[tuple[PeftModel, dict[str, tuple[Tensor, Tensor | None]]]]:
    """The base with the adapter on it, and the weights as they were; some families move them, so they are put back."""
    kept = {n: (weight_of(m).clone(), bias_of(m)) for n, m in base.named_modules() if linear_size(m)}
    flags = {n: p.requires_grad for n, p in base.named_parameters()}
    training = base.training
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder)).eval()
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as problem:
        raise WsError(f"PEFT cannot put the adapter in {folder} on this model ({problem}).") from problem
    try:
        yield model, kept
    finally:
        if isinstance(model.base_model, BaseTuner):
            model.unload()
        for name, (weight, _) in kept.items():
            weight_of(base.get_submodule(name)).copy_(weight)
        for name, p in base.named_parameters():
            p.requires_grad_(flags[name])
        base.train(training)
