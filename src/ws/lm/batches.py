"""Rows of tokens in batches: padded on the left, as many at once as memory allows, and what a model takes of that.

Padding is done here and nowhere else, whatever a tokenizer's own side is, and so is the search for a batch size.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ws.console import progress
from ws.errors import NoMemoryError, require_count
from ws.lm.trunk import forward

Row = TypeVar("Row", bound=Sized)
Item = TypeVar("Item")
Result = TypeVar("Result")
# The types of layers, in transformers' words, that read earlier tokens through a mask and remember nothing else.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
_WRITTEN: ContextVar[Tensor | None] = ContextVar("written", default=None)


# ---- as many as fit -------------------------------------------------------------------------------------------------


def with_batch_size(run: Callable[[int], Result], batch_size: int | None, start: int) -> Result:
    """`run` with this batch size; None starts at `start` and takes a tenth fewer while memory does not suffice.

    Raises:
        NoMemoryError: it does not suffice for one.
        WsError: a size below 1, at which nothing would be run.
    """
    require_count("--batch-size", batch_size, 1)
    if batch_size is not None:
        return run(batch_size)
    try:
        return find_executable_batch_size(run, starting_batch_size=start)()
    except RuntimeError as problem:
        if "No executable batch size" not in str(problem):
            raise
        raise NoMemoryError(
            "Not even one row at a time fits into memory; free some of it, take a smaller model or fewer tokens, or "
            "compute in bfloat16."
        ) from problem


def in_batches(
    items: Sequence[Item],
    run: Callable[[list[Item]], Iterable[Result]],
    batch_size: int | None,
    start: int,
    length: Callable[[Item], Any],
    desc: str,
    unit: str,
) -> list[Result]:
    """What `run` gives for each of `items`, in their order; items of similar length go together.

    Args:
        run: gets at most a batch, and gives a result for each item of it.
        batch_size, start: see `with_batch_size`.
        length: by which items are sorted.
        desc, unit: of the progress bar.
    """
    order = sorted(range(len(items)), key=lambda i: length(items[i]))

    def attempt(size: int) -> list[Result]:
        results = dict[int, Result]()
        with progress(total=len(order), desc=desc, unit=unit) as bar:
            for first in range(0, len(order), size):
                part = order[first : first + size]
                results |= zip(part, run([items[i] for i in part]), strict=True)
                bar.update(len(part))
        return [results[i] for i in range(len(items))]

    return with_batch_size(attempt, batch_size, start)


def padded_groups(model: PreTrainedModel, rows: Sequence[Sized]) -> list[list[int]]:
    """The numbers of the rows that may go through the model together: all of them, or each alone.

    Rows of one length would need no padding, but RWKV of transformers mixes the rows of a batch when it decodes.
    """
    return [list(range(len(rows)))] if takes_padding(model) else [[i] for i in range(len(rows))]


def in_groups(
    model: PreTrainedModel, rows: Sequence[Row], run: Callable[[list[Row]], Iterable[Result]]
) -> list[Result]:
    """What `run` gives for each of `rows`, such as tokens, in their order; it gets as many as may be padded at once."""
    results = dict[int, Result]()
    for group in padded_groups(model, rows):
        results |= zip(group, run([rows[i] for i in group]), strict=True)
    return [results[i] for i in range(len(rows))]


# ---- one forward pass -----------------------------------------------------------------------------------------------


def left_pad(ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(tokens, mask)`, both `[b, longest]`, with the padding on the left, whatever the tokenizer's own side."""
    width = max(len(row) for row in ids)
    tokens = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in ids], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids], device=device)
    return tokens, mask


@contextmanager
def written_from(columns: Bool[Tensor, "b width"]) -> Iterator[None]:
    """Inside, passes over tokens of this shape say in which columns tokens have been written, or will be.

    What steers there and nowhere else (`ws.intervene.activation`) takes the last column otherwise: of a thought that is
    read again it would leave all but the end as it was.
    """
    token = _WRITTEN.set(columns)
    try:
        yield
    finally:
        _WRITTEN.reset(token)


def written_columns(shape: Sequence[int]) -> Bool[Tensor, "b width"] | None:
    """What has been said of the columns of a pass over tokens of this shape; None for nothing."""
    columns = _WRITTEN.get()
    return None if columns is None or columns.shape != shape else columns


def positions_of(mask: Int[Tensor, "b width"]) -> Int[Tensor, "b width"]:
    """The position of every token among those that count."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def row_logits(
    model: PreTrainedModel, pad_id: int, rows: Sequence[Sequence[int]], keep: int | Int[Tensor, "k"] = 0
) -> Float[Tensor, "b columns vocabulary"]:
    """The logits of rows of tokens, padded together and run from their start.

    Args:
        keep: at so many of the last columns, or at these; 0 for all. Some models give all whatever they are asked for,
            so that columns are to be counted from the end.
    """
    tokens, mask = left_pad(rows, pad_id, model.device)
    return forward(model, input_ids=tokens, attention_mask=mask, position_ids=positions_of(mask), logits_to_keep=keep)


def packed_logits(
    model: PreTrainedModel,
    pad_id: int,
    starts: Sequence[Sequence[int]],
    parts: Sequence[Sequence[Sequence[int]]],
    every: bool = False,
) -> tuple[Float[Tensor, "b columns vocabulary"], Int[Tensor, "m"]]:
    """The logits of rows that hold a start and, one behind the other, `m` parts that follow it, each as if alone.

    Only for models that take masks (`takes_masks`).

    Args:
        starts: one per row.
        parts: the first of every row, the second of every row, and so on.
        every: at every token of the parts instead of the last of each.

    Returns:
        The logits, and the columns of the parts' last tokens among them.
    """
    start = left_pad(starts, pad_id, model.device)
    pieces = [start, *(left_pad(part, pad_id, model.device) for part in parts)]
    tokens, real = (torch.cat(side, dim=1) for side in zip(*pieces, strict=True))
    widths = torch.tensor([piece[0].shape[1] for piece in pieces])
    number = torch.repeat_interleave(torch.arange(len(widths)), widths).to(tokens.device)
    column = torch.arange(len(number), device=tokens.device)
    # Every part sees the start and itself, and nothing of the other parts; positions go on from the start in each.
    visible = (column[None] <= column[:, None]) & ((number[None] == 0) | (number[None] == number[:, None]))
    allowed = visible[None] & real.bool()[:, None]
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=tokens.device)
    length = start[1].sum(dim=1, keepdim=True)
    positions = torch.cat([positions_of(start[1]), *(length + positions_of(m) for _, m in pieces[1:])], dim=1)
    ends = widths.to(tokens.device).cumsum(0)[1:] - 1
    columns = column[int(widths[0]) :] if every else ends
    logits = forward(
        model,
        input_ids=tokens,
        attention_mask=mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None],
        position_ids=positions,
        logits_to_keep=len(columns) if every else columns,
    )[:, -len(columns) :]  # some models give all columns whatever they are asked for
    return logits, torch.searchsorted(columns, ends)


def next_logits(
    model: PreTrainedModel, tokens: Int[Tensor, "b new"], mask: Int[Tensor, "b width"], cache: Cache | None
) -> Float[Tensor, "b vocabulary"]:
    """The logits behind the last of `tokens`, which stand behind what the cache holds; the mask is of both."""
    logits: Tensor = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, -tokens.shape[1] :],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


# ---- what a model takes ---------------------------------------------------------------------------------------------


def takes_masks(model: PreTrainedModel) -> bool:
    """Attention over everything before a token, in an implementation that takes a mask per query and key.

    Only such a model can be told to overlook tokens that stand between others, in a row or in its cache: a state has
    taken them up, and a window or a distance counts them.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ["full_attention"])
    whole = kinds == {"full_attention"} and getattr(config, "sliding_window", None) is None
    plain = whole and not keeps_state(model) and not getattr(config, "alibi", False)  # ALiBi counts by a mask per token
    known = {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters)
    return plain and known and config._attn_implementation in ("sdpa", "eager")


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether a layer hands a state from token to token, as recurrences and short convolutions do.

    transformers says so of a model, or of its layers by their types; a type that is not known to be plain attention
    counts as one with a state.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return model._is_stateful or not kinds <= _ATTENTION


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether padding on the left, masked token by token, changes nothing.

    Attention overlooks it. Layers with a state have to set it to zero, which those of transformers do that have its
    function for it; others (RWKV, xLSTM, RecurrentGemma) take padding for text, and so may those (MiniMax) that decode
    with a cache of their own.
    """
    if not keeps_state(model):
        return True
    modules = {type(m).__module__ for m in model.modules()}
    zeroed = any(hasattr(sys.modules[m], "apply_mask_to_padding_states") for m in modules)
    return zeroed and bool(cast(Any, model)._supports_default_dynamic_cache())


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether a `DynamicCache` that is handed to forward passes carries all that the model remembers of a batch.

    Mamba, RWKV and xLSTM know caches of their own only, and overlook one that they are handed.
    """
    return takes_padding(model) and "past_key_values" in inspect.signature(model.forward).parameters
