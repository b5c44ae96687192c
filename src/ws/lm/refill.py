"""Rows that join a batch and leave it at any step, each behind what the cache holds of it.

A row's tokens stand at the right of its columns, behind masked ones where others are longer. So a row joins with masked
columns on its left, or the others get some, and it leaves as an index does; either copies the cache, a step does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ws.lm.batches import left_pad, next_logits

Row = TypeVar("Row")
_ROOM = 64  # columns that a cache grows by


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
        self.keys, self.values = keys, values
        self.rooms = [keys, values]


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
        cls, model: PreTrainedModel, pad_id: int, rows: list[Row], prompts: Sequence[Sequence[int]]
    ) -> tuple[RowBatch[Row], Float[Tensor, "rows vocabulary"]]:
        """Read the rows' prompts; also gives the logits of their first tokens."""
        cache = DynamicCache(config=model.config)
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            cache.layers = [_Layer() for _ in cache.layers]
        tokens, mask = left_pad(prompts, pad_id, model.device)
        return cls(rows, mask, cache), next_logits(model, tokens, mask, cache)

    def step(self, model: PreTrainedModel, tokens: Sequence[int]) -> Float[Tensor, "rows vocabulary"]:
        """The logits behind one more token of every row."""
        column = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)
        return next_logits(model, column, self.mask, self.cache)

    def only(self, places: Sequence[int]) -> RowBatch[Row] | None:
        """The rows at these places, without columns that only others used; None without any."""
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
