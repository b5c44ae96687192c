"""Training with less memory: what the forward pass of a layer made is dropped, and made again for the gradients.

torch's activation checkpointing, with three things of its own. Layers before the first adapter are left alone, as no
gradient goes there. A layer is computed again with the parameters that it was computed with, which signed training
puts in place of the model's own for the length of one forward pass. And on a CPU, what was dropped goes back to the
system: between tensors that are kept it would leave holes in glibc's heap, which the larger ones of other layers do not
fit into.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn, ops
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ws.errors import WsError

Held = list[tuple[nn.Module, dict[str, Any]]]  # modules, each with its parameters by name
# A product over fewer terms, such as LoRA's second one, takes less time to repeat than its result takes memory.
TERMS = 256
_TRIM: Any = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None)
_EVERY = 4  # layers on the way back, where more comes and goes, and new pages have to be zeroed
_FACTOR = {ops.aten.mm.default: 0, ops.aten.addmm.default: 1, ops.aten.bmm.default: 0}  # which argument has the terms


@contextmanager
def recomputed(model: PreTrainedModel, what: str) -> Iterator[None]:
    """While the block runs, training drops activations of the layers and computes them again for the gradients.

    Args:
        model: with an adapter on its layers.
        what: `none`; `cheap`, all but the results of large products and of attention; `all` but a layer's input.

    Raises:
        WsError: the model has no layers that could be computed again.
    """
    if what == "none":
        yield
        return
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        kind = type(model).__name__
        raise WsError(
            f"A {kind} has no layers that can be computed again; leave out --recompute, or halve --micro-batch."
        )
    learned = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = learned.index(True) if any(learned) else 0
    on_cpu = _TRIM is not None and model.device.type == "cpu"
    contexts = partial(create_selective_checkpoint_contexts, _policy) if what == "cheap" else noop_context_fn
    before, config = [dict(vars(layer)) for layer in layers], model.config.get_text_config()
    cache = getattr(config, "use_cache", False)
    try:
        config.use_cache = False  # a layer that is computed again would add its keys and values once more
        for i, layer in enumerate(layers[first:]):
            holders = [m for m in layer.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
            trims = (on_cpu, on_cpu and i % _EVERY == 0)
            layer._gradient_checkpointing_func = partial(_checkpoint, holders, contexts, trims)
            layer.gradient_checkpointing = True
        yield
    finally:
        config.use_cache = cache
        for layer, attributes in zip(layers, before, strict=True):
            for name in ("_gradient_checkpointing_func", "gradient_checkpointing"):
                vars(layer).pop(name, None)
                vars(layer).update({name: attributes[name]} if name in attributes else {})


def _checkpoint(
    holders: list[nn.Module],
    contexts: Callable[[], Any],
    trims: tuple[bool, bool],
    layer: Callable[..., Any],
    *args: Any,
) -> Any:
    """The output of a layer, of which little is kept; it is computed again with the parameters of now.

    `trims`: whether what was freed goes back to the system before, on the way there and on the way back.
    """
    now, due = _parameters(holders), iter(trims)

    def run(*args: Any) -> Any:
        if next(due, False):
            _TRIM(0)
        later = _parameters(holders)
        _put(now)
        try:
            return layer(*args)
        finally:
            _put(later)

    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


def _parameters(modules: list[nn.Module]) -> Held:
    return [(m, dict(m._parameters)) for m in modules]


def _put(parameters: Held) -> None:
    for module, tensors in parameters:
        module._parameters.update(tensors)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what takes long to compute: products over many terms, and attention."""
    factor = args[_FACTOR[op]] if op in _FACTOR else None
    long = isinstance(factor, Tensor) and factor.shape[-1] >= TERMS
    attention = "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if long or attention else CheckpointPolicy.PREFER_RECOMPUTE
