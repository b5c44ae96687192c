"""Sums of rows: the products of a few tokens with several matrices, as exact as a product in bfloat16 is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ws.lm.row_sums import FEW, RowSums

SIZES = st.integers(1, 9)


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=4), st.integers(1, FEW), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_they_are_the_products_side_by_side_rounded_once(shapes, n, seed):
    rng = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(k, m, generator=rng).bfloat16() for k, m in shapes]
    a = torch.randn(n, sum(k for k, _ in shapes), generator=rng).bfloat16()
    sums = RowSums(matrices)
    parts = a.double().split([k for k, _ in shapes], dim=1)
    wanted = torch.cat([part @ m.double() for part, m in zip(parts, matrices, strict=True)], dim=1)
    # Added up in float32, and then half a unit in the last of 8 digits.
    size = torch.cat([part.abs() @ m.double().abs() for part, m in zip(parts, matrices, strict=True)], dim=1)
    with torch.no_grad():
        given_sums = sums(a)
        assert torch.equal(sums(a.T.contiguous().T), given_sums), "as a layer of Mamba is handed its tokens"
        assert torch.equal(sums(torch.cat([a, a], dim=1)[:, : a.shape[1]]), given_sums)
    assert given_sums.dtype == torch.bfloat16
    assert ((given_sums.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5 * size).all()


def test_the_matrices_go_on_living_in_one_table():
    matrices = [torch.randn(3, 8).bfloat16(), torch.randn(2, 4).bfloat16()]
    sums = RowSums(matrices)
    assert all(torch.equal(m, given) for m, given in zip(matrices, sums.matrices, strict=True))
    assert all(m.is_contiguous() for m in sums.matrices)
    assert len({m.untyped_storage().data_ptr() for m in sums.matrices}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_they_are_for_bfloat16_on_the_cpu(dtype):
    assert RowSums.suits(torch.zeros(1, dtype=torch.bfloat16))
    assert not RowSums.suits(torch.zeros(1, dtype=dtype))
    assert not RowSums.suits(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
