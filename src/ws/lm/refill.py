"""Rows that join a batch and leave it at any step, each behind what the cache holds of it.

A row's tokens stand at the right of its columns, behind masked ones where others are longer. So a row joins with masked
columns on its left, or the others get some, and it leaves as an index does; either copies the cache, a step does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ws.lm.batches import left_pad, next_logits

Row = TypeVar("Row")
_ROOM = 64  # columns that a cache grows by
_SHORTEST = 16  # tokens that are worth remembering


class _Layer(DynamicLayer):
    """Keys and values with some columns to spare: transformers' own copies all of them for every token."""

    keys: Tensor
    values: Tensor
    rooms: list[Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "rows heads length d"], Float[Tensor, "rows heads length d"]]:
        """Put new columns behind the others; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [key_states[..., :0, :], value_states[..., :0, :]]
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if new > self.rooms[0].shape[-2]:
            self.rooms = [
                pad(x, (0, 0, 0, new + _ROOM - old)) for x in ((self.keys, self.values) if old else self.rooms)
            ]
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., old:new, :] = states
        self.keys, self.values = (room[..., :new, :] for room in self.rooms)
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these instead; the room is made with the next token."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.rooms = [keys, values]


class Prefix(NamedTuple):
    """The first tokens of a prompt, and for every layer their keys and values `[1, heads, length, d]`."""

    tokens: Sequence[int]
    states: Sequence[tuple[Tensor, Tensor]]

    def beginning(self, length: int) -> Prefix:
        """Of the first tokens only; shares the memory."""
        return Prefix(self.tokens[:length], [(k[..., :length, :], v[..., :length, :]) for k, v in self.states])


class Prefixes:
    """Prompts that were read lately, so that another one which begins alike need not be read from its start.

    A cache depends on how the model was steered: only what was read under an equal `key` is shared.

    Args:
        most: tokens that are held; those that were of no use for longest go first. With 0 nothing is held.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = list[tuple[Hashable, Prefix]]()  # the one that was of use last stands last

    def __len__(self) -> int:
        return sum(len(prefix.tokens) for _, prefix in self._held)

    def clear(self) -> None:
        """Forget all of them."""
        self._held.clear()

    def longest(self, key: Hashable, tokens: Sequence[int]) -> Prefix | None:
        """The longest beginning of a prompt, without its last token, that is known; None where a few tokens are all."""
        shared = [(_common(p.tokens, tokens[:-1]), i) for i, (known, p) in enumerate(self._held) if known == key]
        length, place = max(shared, default=(0, 0))
        if length < _SHORTEST:
            return None
        self._held.append(self._held.pop(place))
        return self._held[-1][1].beginning(length)

    def hold(self, key: Hashable, batch: RowBatch[Any], place: int, tokens: Sequence[int]) -> None:
        """Remember what a batch has just read of one row's prompt, in place of beginnings of it."""
        tokens = tokens[: self.most]
        shared = [_common(p.tokens, tokens) if known == key else 0 for known, p in self._held]
        if len(tokens) < _SHORTEST or max(shared, default=0) == len(tokens):
            return
        self._held = [entry for entry, n in zip(self._held, shared, strict=True) if n < len(entry[1].tokens)]
        self._held.append((key, batch.prefix(place, tokens)))
        while len(self) > self.most:
            self._held.pop(0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class RowBatch(Generic[Row]):
    """Rows that are written together: their cache holds all but the last token of each, on the right.

    Only for models that overlook masked columns in their cache (`ws.lm.batches.takes_masks`) wherever rows join or
    leave; a batch that stays as it begins works with every model that `takes_cache`.

    Attributes:
        rows: whatever the rows are to whoever writes them.
        mask: 1 for the columns of a row's own tokens.
        cache: keys and values of these columns.
    """

    rows: list[Row]
    mask: Int[Tensor, "rows columns"]
    cache: DynamicCache

    @classmethod
    def begin(
        cls,
        model: PreTrainedModel,
        pad_id: int,
        rows: list[Row],
        prompts: Sequence[Sequence[int]],
        prefixes: Sequence[Prefix | None] = (),
    ) -> tuple[RowBatch[Row], Float[Tensor, "rows vocabulary"]]:
        """Read the rows' prompts; also gives the logits of their first tokens.

        Args:
            prefixes: by row, what is known of its prompt, shorter than that; only where rows may join and leave.
        """
        cache = DynamicCache(config=model.config)
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            cache.layers = [_Layer() for _ in cache.layers]
        lengths = [0 if prefix is None else len(prefix.tokens) for prefix in prefixes] or [0] * len(rows)
        new = [ids[n:] for ids, n in zip(prompts, lengths, strict=True)]
        tokens, mask = left_pad(new, pad_id, model.device)
        batch = cls(rows, mask, cache)
        if any(lengths):
            # A row's columns are then its prefix, and its other tokens: masked ones may stand between them.
            batch.mask = torch.cat([batch._put(prefixes, lengths), mask], dim=1)
        return batch, next_logits(model, tokens, batch.mask, cache)

    def _put(self, prefixes: Sequence[Prefix | None], lengths: Sequence[int]) -> Int[Tensor, "rows columns"]:
        """Fill the empty cache with prefixes, on the right of as many columns as the longest has; gives their mask."""
        known = next(prefix for prefix in prefixes if prefix is not None)
        whole = [known.beginning(0) if prefix is None else prefix for prefix in prefixes]
        for number, layer in enumerate(self._layers):
            sides = zip(*(prefix.states[number] for prefix in whole), strict=True)
            padded = ([pad(x, (0, 0, max(lengths) - x.shape[-2], 0)) for x in side] for side in sides)
            layer.replace(*(torch.cat(side) for side in padded))
        return left_pad([[0] * n for n in lengths], 0, self.mask.device)[1]

    def prefix(self, place: int, tokens: Sequence[int]) -> Prefix:
        """What the cache holds of a row's first tokens, as a copy."""
        columns = self.mask[place].nonzero()[: len(tokens), 0]
        row = ((layer.keys[place : place + 1], layer.values[place : place + 1]) for layer in self._layers)
        return Prefix(tokens, [(k.index_select(-2, columns), v.index_select(-2, columns)) for k, v in row])

    def step(self, model: PreTrainedModel, tokens: Sequence[int]) -> Float[Tensor, "rows vocabulary"]:
        """The logits behind one more token of every row."""
        column = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)
        return next_logits(model, column, self.mask, self.cache)

    def only(self, places: Sequence[int]) -> RowBatch[Row] | None:
        """The rows at these places, as often as they are named, without columns of others alone; None without any."""
        if not places:
            return None
        chosen = torch.tensor(places, device=self.mask.device)
        mask = self.mask[chosen]
        first = int(mask.any(dim=0).int().argmax())
        for layer in self._layers:
            layer.replace(*(x.index_select(0, chosen)[..., first:, :] for x in (layer.keys, layer.values)))
        return RowBatch([self.rows[i] for i in places], mask[:, first:], self.cache)

    def joined(self, other: RowBatch[Row]) -> RowBatch[Row]:
        """Both batches' rows in one, the shorter ones with more masked columns on the left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        masks = [pad(b.mask, (width - b.mask.shape[1], 0)) for b in (self, other)]
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            both = ((mine.keys, theirs.keys), (mine.values, theirs.values))
            mine.replace(*(torch.cat([pad(x, (0, 0, width - x.shape[-2], 0)) for x in pair]) for pair in both))
        return RowBatch(self.rows + other.rows, torch.cat(masks), self.cache)

    @property
    def _layers(self) -> list[_Layer]:
        layers = [layer for layer in self.cache.layers if isinstance(layer, _Layer)]
        if len(layers) < len(self.cache.layers):
            raise TypeError("Rows neither join nor leave a batch whose cache holds a state or a window.")
        return layers
