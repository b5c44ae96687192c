"""The trunk: the blocks below the first one that an intervention touches, which give the same at every strength.

Several strengths are asked the same prompts, so inside `shared_trunk` a batch's output of the trunk is kept when it is
first read, and every other strength goes on from there. Which block is the first is seen on the model itself, by its
hooks. The blocks above compute what they would have computed, from the very same numbers: on the first batch both ways
are compared, bit for bit, and a model that hands more than one tensor from block to block is read as always.

In training the trunk lies below the first block that learns, and what it makes of an example is the base's in every
step: where the base has read the examples anyway, steps go on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ws.errors import WsError
from ws.lm.models import decoder_blocks

BUDGET = 2**30  # bytes that are kept; batches beyond are read from their start
_ACTIVE: WeakKeyDictionary[nn.Module, _Trunk] = WeakKeyDictionary()
# Whether both ways were found equal, by model and depth.
_EQUAL: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


@contextmanager
def shared_trunk(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `forward` computes what no strength changes once for every batch, as far as `BUDGET` reaches."""
    try:
        trunk = None if model in _ACTIVE else _Trunk(model)
    except WsError:  # no such list of blocks, as in an encoder with a decoder
        trunk = None
    if trunk is None:
        yield
        return
    _ACTIVE[model] = trunk
    try:
        yield
    finally:
        del _ACTIVE[model]


def forward(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """`model(**inputs, use_cache=False).logits`, of a shared trunk where there is one."""
    trunk = _ACTIVE.get(model)
    if trunk is None or torch.is_grad_enabled():
        return _logits(model, inputs)
    return trunk.logits(inputs)


def _logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


class _Trunk:
    """What blocks below the first touched one gave, by batch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.blocks = model, decoder_blocks(model)
        self.inside = [list(block.modules()) for block in self.blocks]
        above = {model, model.get_output_embeddings()}
        within = {m for modules in self.inside for m in modules} | above
        self.below = [m for m in model.modules() if m not in within]
        self.depth, self.size = 0, 0
        self.kept = dict[bytes, Tensor]()

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """The same as the model gives."""
        depth = self._untouched()
        if 0 < depth < len(self.blocks) and depth != self.depth:
            self.depth, self.size = depth, 0
            self.kept.clear()
        equal = _EQUAL.setdefault(self.model, {})
        if not 0 < self.depth <= depth or not equal.get(self.depth, True):
            return _logits(self.model, inputs)
        key = _digest(inputs)
        if key not in self.kept:
            return self._read(key, inputs)
        read = partial(self._from, self.kept[key], inputs)
        if self.depth in equal:
            return read()
        whole = _logits(self.model, inputs)
        equal[self.depth] = _gives(whole, read)
        return whole

    def _untouched(self) -> int:
        """How many blocks come before the first hook."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.below):
            return 0
        touched = (any(m._forward_hooks or m._forward_pre_hooks for m in modules) for modules in self.inside)
        return next((i for i, is_touched in enumerate(touched) if is_touched), len(self.blocks))

    def _read(self, key: bytes, inputs: dict[str, Any]) -> Tensor:
        """Read a batch from its start, and keep what the trunk gave."""
        with outputs_of(self.blocks[: self.depth]) as outputs:
            logits = _logits(self.model, inputs)
        if len(outputs) == 1 and self.size + outputs[0].nbytes <= BUDGET:
            self.kept[key] = outputs[0].clone()
            self.size += outputs[0].nbytes
        return logits

    def _from(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Let the blocks of the trunk give what they gave, and the others compute."""
        with giving(self.blocks[: self.depth], hidden):
            return _logits(self.model, inputs)


def frozen_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks before the first one that learns; none where anything else learns, which might lie before them."""
    try:
        blocks = decoder_blocks(model)
    except WsError:
        return []
    learned = [{p for p in block.parameters() if p.requires_grad} for block in blocks]
    if {p for p in model.parameters() if p.requires_grad} - set().union(*learned):
        return []
    return blocks[: next((i for i, some in enumerate(learned) if some), 0)]


@torch.no_grad()
def goes_on(model: PreTrainedModel, trunk: Sequence[nn.Module], read: Callable[[], Tensor]) -> bool:
    """Whether training gives the same from what the trunk gave: nothing is dropped at random, nothing else handed on.

    `read` makes a forward pass over a few tokens, of the model without what it learns.
    """
    training = model.training
    try:
        model.eval()
        with outputs_of(trunk) as outputs:
            read()
        if len(outputs) != 1:
            return False
        model.train()
        whole = read()
        with giving(trunk, outputs[0]):
            return _gives(whole, read)
    finally:
        model.train(training)


def _gives(whole: Tensor, read: Callable[[], Tensor]) -> bool:
    """Whether `read` gives the same; blocks that also lack something else from below (keys and values) may fail."""
    try:
        return torch.equal(read(), whole)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:
        return False


@contextmanager
def outputs_of(trunk: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, every tensor that the last block of a trunk gives is put on the list; without a block nothing is."""
    outputs = list[Tensor]()

    def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    handles = [block.register_forward_hook(keep) for block in trunk[-1:]]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def giving(trunk: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Inside, the blocks of a trunk give this, and the others compute."""
    with ExitStack() as stack:
        for block in trunk:
            stack.enter_context(_giving(block, hidden))
        yield


@contextmanager
def _giving(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, the block gives this whatever it is given."""
    own = vars(block).get("forward")  # as offloading sets one
    vars(block)["forward"] = lambda *args, **kwargs: hidden.clone()
    try:
        yield
    finally:
        del vars(block)["forward"]
        if own is not None:
            vars(block)["forward"] = own


def _digest(inputs: dict[str, Any]) -> bytes:
    """Of everything that a batch is."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().cpu().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.digest()
