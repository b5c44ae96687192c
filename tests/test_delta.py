"""The algebra of one layer's change, as properties over random coordinates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ws.delta import LinearDelta
from ws.errors import WsError

D_OUT, D_IN = 10, 12
COORDINATE_SETS = st.sets(st.sampled_from(["g", "c", "d", "uv", "e", "bias"]), min_size=1)
SEEDS = st.integers(0, 2**31)
SCALARS = st.floats(-8, 8, allow_nan=False, width=32).filter(lambda s: abs(s) > 1e-3)


def random_delta(seed: int, present: set[str], block: int = 3) -> LinearDelta:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    parts = {"g": draw(D_OUT), "c": draw(D_IN), "d": draw(D_IN // block, block, block), "e": draw(D_OUT, D_IN)}
    parts |= {"bias": draw(D_OUT), "u": draw(D_OUT, 2), "v": draw(2, D_IN)}
    chosen = {k: v for k, v in parts.items() if k in present or (k in "uv" and "uv" in present)}
    return LinearDelta(D_OUT, D_IN, **chosen)


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(delta: LinearDelta) -> torch.Tensor:
    """The dense change with the bias change as a last column, in float64."""
    bias = torch.zeros(D_OUT, 1) if delta.bias is None else delta.bias[:, None]
    return torch.cat([delta.dense(weight()), bias.double()], dim=1)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * (1 + max(a.norm(), b.norm())))


@settings(max_examples=60)
@given(SEEDS, SEEDS, COORDINATE_SETS, COORDINATE_SETS, SCALARS, SCALARS)
def test_dense_is_linear_in_the_change(s1, s2, p1, p2, x, y):
    a, b = random_delta(s1, p1), random_delta(s2, p2)
    assert close(whole(a * x + b * y), x * whole(a) + y * whole(b))
    assert close(whole(a - b), -whole(b - a))
    assert close(whole(a / x), whole(a) / x)


@settings(max_examples=40)
@given(SEEDS, SEEDS, COORDINATE_SETS, COORDINATE_SETS)
def test_addition_commutes_and_negation_cancels(s1, s2, p1, p2):
    a, b = random_delta(s1, p1), random_delta(s2, p2)
    assert close(whole(a + b), whole(b + a))
    assert (a - a).is_zero
    assert (a - a).rank == 0


@settings(max_examples=40)
@given(SEEDS, SEEDS, COORDINATE_SETS, COORDINATE_SETS)
def test_inner_product_is_that_of_the_dense_matrices(s1, s2, p1, p2):
    a, b = random_delta(s1, p1), random_delta(s2, p2)
    want = float((whole(a) * whole(b)).sum())
    assert a.inner(b, weight()) == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert a.norm(weight()) == pytest.approx(float(whole(a).norm()), rel=1e-6)


@settings(max_examples=40)
@given(SEEDS, COORDINATE_SETS)
def test_forward_terms_equal_the_dense_product(seed, present):
    delta, w = random_delta(seed, present), weight().float()
    x = torch.randn(4, 5, D_IN, generator=torch.Generator().manual_seed(seed))
    y = torch.zeros(4, 5, D_OUT)
    if (z := delta.input_change(x)) is not None:
        y = y + z @ w.T
    if (shift := delta.output_change(x, x @ w.T)) is not None:
        y = y + shift
    if delta.u is not None:
        y = y + (x @ delta.v.T) @ delta.u.T
    want = x @ delta.dense(w).T + (0 if delta.bias is None else delta.bias)
    assert close(y, want)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (4, 6), (3, 12), (4, 4)])
def test_rotations_of_different_block_sizes_add(first, second):
    a, b = random_delta(1, {"d"}, first), random_delta(2, {"d"}, second)
    assert close(whole(a + b), whole(a) + whole(b))


def test_shared_rows_of_v_are_merged_not_repeated():
    a = random_delta(1, {"uv"})
    b = LinearDelta(D_OUT, D_IN, u=random_delta(2, {"uv"}).u, v=a.v)
    assert (a + b).rank == a.rank
    assert close(whole(a + b), whole(a) + whole(b))
    assert (a + b - b).rank == a.rank


# ---- large parts that cancel ----------------------------------------------------------------------------------------


def moved(delta: LinearDelta, seed: int, share: float) -> LinearDelta:
    """A change beside this one: every entry of its factors moved by about that share of itself."""
    rng = torch.Generator().manual_seed(seed)
    u, v = (t * (1 + share * torch.randn(t.shape, generator=rng)) for t in (delta.u, delta.v))
    return LinearDelta(D_OUT, D_IN, u=u, v=v)


def error(delta: LinearDelta, exact: torch.Tensor) -> float:
    return float((whole(delta) - exact).norm() / exact.norm())


def coarse(delta: LinearDelta) -> LinearDelta:
    """What bfloat16 leaves of the coordinates."""
    return delta.to(dtype=torch.bfloat16).to(dtype=torch.float32)


@settings(max_examples=60)
@given(SEEDS, st.sampled_from([2**-3, 2**-6, 2**-9, 2**-12]), st.booleans())
def test_what_is_left_of_large_parts_survives_bfloat16(seed, share, third):
    a, b = random_delta(seed, {"uv"}), random_delta(seed + 1, {"uv"}) * (share if third else 0.0)
    near = moved(a, seed + 2, share)
    exact = whole(a) + whole(b) - whole(near)
    for left in (a + b - near, b - (near - a), -(near - (b + a))):
        assert error(left, exact) < 2e-6
        assert error(coarse(left), exact) < 0.012
        assert left.rank <= 6
    assert ((a - near) + (near - a)).rank == 0, "swapped, the difference is its exact negative"


@settings(max_examples=30)
@given(SEEDS, st.sampled_from([2**-3, 2**-6, 2**-9, 2**-12]))
def test_a_dense_change_takes_in_the_product_that_cancels_it(seed, share):
    low = random_delta(seed, {"uv"})
    full = LinearDelta(D_OUT, D_IN, e=(low.u @ low.v) * (1 + share * random_delta(seed + 1, {"e"}).e))
    exact = whole(full) - whole(low)
    for left in (full - low, -(low - full)):
        assert error(left, exact) < 1e-6
        assert error(coarse(left), exact) < 0.012


def test_factors_that_do_not_cancel_stay_as_they_are():
    a, b = random_delta(1, {"uv", "g"}), random_delta(2, {"uv", "e"})
    total = a - 0.5 * b
    assert torch.equal(total.u, torch.cat([a.u, -0.5 * b.u], dim=1))
    assert torch.equal(total.v, torch.cat([a.v, b.v]))
    assert torch.equal(total.to(dtype=torch.bfloat16).u, total.u.bfloat16())
    assert total.balanced() is total


def test_factors_that_came_cancelling_are_made_anew_before_they_are_rounded():
    """As in a PiSSA adapter that was turned into a LoRA: `B A` and `-B0 A0` side by side."""
    a = random_delta(1, {"uv"})
    b = moved(a, 2, 2**-9)
    raw = LinearDelta(D_OUT, D_IN, u=torch.cat([a.u, -b.u], dim=1), v=torch.cat([a.v, b.v]))
    exact = whole(raw)
    assert float(((raw.u.bfloat16() @ raw.v.bfloat16()).double() - exact[:, :-1]).norm() / exact.norm()) > 0.3
    assert error(coarse(raw), exact) < 0.01
    assert torch.equal(raw.to(dtype=torch.float32).u, raw.u), "float32 keeps them bit for bit"


def test_terms_that_cancel_without_having_a_row_in_common_leave_nothing():
    a = random_delta(1, {"uv"})
    b = LinearDelta(D_OUT, D_IN, u=2 * a.u, v=a.v / 2)
    assert (a - b).is_zero
    assert (a - b).rank == 0
    assert (a - b + a).rank == a.rank


def test_related_changes_get_no_more_columns_than_their_sum_needs():
    """Both hold the rows of one start, and their difference is a product of rank 4 in six columns."""
    rng = torch.Generator().manual_seed(3)
    start, first, second = (torch.randn(2, D_IN, generator=rng) for _ in range(3))
    left, right = (torch.randn(D_OUT, 2, generator=rng) for _ in range(2))
    a, b = (
        LinearDelta(D_OUT, D_IN, u=torch.cat([u, u], dim=1), v=torch.cat([v, start]))
        for u, v in ((left, first), (right, second))
    )
    assert (a - b).rank == 4
    assert error(a - b, whole(a) - whole(b)) < 1e-6


def test_compress_is_exact_at_full_rank_and_optimal_below():
    a = random_delta(1, {"uv"}) + random_delta(2, {"uv"}) + random_delta(3, {"uv"})
    same, error = a.compress(6)
    assert error == 0.0
    assert close(whole(same), whole(a))
    two, error = a.compress(2)
    s = torch.linalg.svdvals(whole(a))
    assert two.rank == 2
    assert error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
    assert float((whole(two) - whole(a)).norm() / whole(a).norm()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        {"g": torch.ones(D_IN)},
        {"u": torch.ones(D_OUT, 2)},
        {"u": torch.ones(D_OUT, 2), "v": torch.ones(3, D_IN)},
        {"d": torch.ones(5, 3, 3)},
        {"e": torch.full((D_OUT, D_IN), float("nan"))},
        {"bias": torch.full((D_OUT,), float("inf"))},
    ],
    ids=["wrong shape", "u alone", "rank mismatch", "blocks do not tile", "nan", "inf"],
)
def test_impossible_coordinates_are_refused(parts):
    with pytest.raises((WsError, TypeError)):
        LinearDelta(D_OUT, D_IN, **parts)


@pytest.mark.parametrize("coordinate", ["g", "c", "d", "uv", "e", "bias"])
def test_a_change_in_any_one_coordinate_is_not_zero(coordinate):
    delta = random_delta(1, {coordinate})
    assert not delta.is_zero
    assert (delta * 0.0).is_zero
    assert whole(delta).norm() > 1


def test_layers_of_different_shapes_do_not_add():
    with pytest.raises(WsError, match="Cannot add"):
        random_delta(1, {"g"}) + LinearDelta(3, 4)
