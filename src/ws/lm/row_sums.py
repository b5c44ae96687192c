"""Products of one token with small matrices on the CPU in bfloat16, as sums of a table's rows.

At one token a product with `[64, 1024]` takes oneDNN two to three times as long as reading the matrix does, and layers
that are handed one token need several. `embedding_bag` adds rows of a table up with weights, in float32, and rounds
once, as a product does; one call of it has a sum for every piece of several matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEW = 4  # tokens up to which sums are faster than products (`just bench serving`)


class _Plan(NamedTuple):
    """For `embedding_bag`: which rows of the table are in which sum, and which entries of `a` are their weights."""

    rows: Int[Tensor, "terms"]
    weights: Int[Tensor, "terms"] | None  # None where they are all of them, in order
    starts: Int[Tensor, "sums"]


class RowSums:
    """`[a_1 M_1, a_2 M_2, ..]` for `a [.., k_1 + k_2 + ..]` of `n <= FEW` rows in all, and matrices `M_j [k_j, m_j]`.

    Attributes:
        matrices: the given ones, as contiguous views of one table, which takes their place.
    """

    def __init__(self, matrices: Sequence[Float[Tensor, "k m"]]) -> None:
        self._shapes = tuple((m.shape[0], m.shape[1]) for m in matrices)
        self._width = gcd(*(m for _, m in self._shapes))
        self._table = torch.cat([m.reshape(-1, self._width) for m in matrices])
        self._plans = {n: _plan(self._shapes, self._width, n) for n in range(1, FEW + 1)}
        pieces = self._table.split([k * m // self._width for k, m in self._shapes])
        self.matrices = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    @staticmethod
    def suits(like: Tensor) -> bool:
        """True on the device and in the dtype where sums are faster."""
        return like.device.type == "cpu" and like.dtype == torch.bfloat16

    def __call__(self, a: Float[Tensor, "*n k"]) -> Float[Tensor, "*n m"]:
        """The products, side by side; not differentiable."""
        if torch.compiler.is_compiling():  # written out, it becomes one loop with what stands around it
            columns = a.float()[..., None].split([k for k, _ in self._shapes], dim=-2)
            sums = [(part * m.float()).sum(dim=-2) for part, m in zip(columns, self.matrices, strict=True)]
            return torch.cat(sums, dim=-1).to(a.dtype)
        shape = a.shape
        rows, weights, starts = self._plans[a.numel() // shape[-1]]
        a = a.reshape(-1) if weights is None else a.reshape(-1).index_select(0, weights)
        return torch.embedding_bag(self._table, rows, starts, False, 0, False, a, False)[0].view(*shape[:-1], -1)


@cache
def _plan(shapes: tuple[tuple[int, int], ...], width: int, n: int) -> _Plan:
    """The matrices of all layers have a few shapes, whose plans stay in the processor's cache."""
    rows, weights, row, column = list[Tensor](), list[Tensor](), 0, 0
    total = sum(k for k, _ in shapes)
    with torch.inference_mode(False):
        for k, m in shapes:
            pieces = m // width
            for piece in range(pieces):
                rows.append(row + piece + pieces * torch.arange(k))
                weights.append(column + torch.arange(k))
            row, column = row + k * pieces, column + k
        lengths = torch.tensor([len(r) for r in rows] * n)
        chosen = torch.cat([total * i + w for i in range(n) for w in weights])
        is_all = torch.equal(chosen, torch.arange(n * total))
        starts = lengths.cumsum(0) - lengths
        return _Plan(torch.cat(rows * n).int(), None if is_all else chosen.int(), starts.int())
