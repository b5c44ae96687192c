"""The algebra of one layer's change, as properties over random coordinates."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ws.delta import LinearDelta, approximation_errors
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


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


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


def test_what_is_impossible_is_named_with_its_numbers():
    with pytest.raises(WsError, match=r"scale .*\bg\b"):
        LinearDelta(D_OUT, 1, g=torch.ones(D_OUT), kind="scale")
    with pytest.raises(WsError, match=r"\bu\b.*\(10, 2\).*\(9, 2\)"):
        LinearDelta(9, D_IN, u=torch.ones(D_OUT, 2), v=torch.ones(2, D_IN))
    with pytest.raises(WsError, match=r"\bv\b.*\(3, 12\).*\(2, 12\)"):
        LinearDelta(D_OUT, D_IN, u=torch.ones(D_OUT, 2), v=torch.ones(3, D_IN))
    shapes = {"g": (D_OUT,), "c": (D_IN,), "e": (D_OUT, D_IN), "bias": (D_OUT,)}
    for name, shape in shapes.items():
        wrong = tuple(n + 1 for n in shape)
        with pytest.raises(WsError, match=rf"\b{name}\b.*{re.escape(str(wrong))}.*{re.escape(str(shape))}\.$"):
            LinearDelta(D_OUT, D_IN, **{name: torch.zeros(wrong)})
    with pytest.raises(WsError, match=r"^The change of an? scale cannot hold (g, c|c, g)\.$"):
        LinearDelta(D_OUT, 1, g=torch.ones(D_OUT), c=torch.ones(1), kind="scale")
    with pytest.raises(WsError, match=r"\be\b.* 10 x 12 "):
        LinearDelta(D_OUT, D_IN, e=torch.full((D_OUT, D_IN), float("nan")))
    with pytest.raises(WsError, match=r"\(3, 3, 3\).* 12\b"):
        LinearDelta(D_OUT, D_IN, d=torch.zeros(3, 3, 3))
    with pytest.raises(WsError, match=r"^A low-rank .* u and v\.$"):
        LinearDelta(D_OUT, D_IN, v=torch.ones(2, D_IN))
    with pytest.raises(WsError, match=r"10 x 12 linear and 10 x 12 embedding|10 x 1 scale"):
        LinearDelta(D_OUT, 1, e=torch.ones(D_OUT, 1)) + LinearDelta(D_OUT, 1, e=torch.ones(D_OUT, 1), kind="scale")
    for other in (LinearDelta(D_OUT, 4), LinearDelta(3, D_IN)):
        with pytest.raises(WsError, match=f"10 x 12 linear and {other.d_out} x {other.d_in} linear"):
            random_delta(1, {"g"}) + other


@pytest.mark.parametrize("coordinate", ["g", "c", "d", "uv", "e", "bias"])
def test_what_a_change_is_of(coordinate):
    delta = random_delta(1, {coordinate})
    assert delta.is_low_rank is (coordinate == "uv")
    assert delta.depends_on_weight is (coordinate in ("g", "c", "d"))
    assert delta.rank == (2 if coordinate == "uv" else 0)
    assert repr(delta) == f"LinearDelta(10 x 12, {'rank 2' if coordinate == 'uv' else coordinate})"
    assert LinearDelta(D_OUT, D_IN).is_low_rank
    assert repr(random_delta(1, {"uv", "e", "bias"})) == "LinearDelta(10 x 12, rank 2, e, bias)"
    assert repr(LinearDelta(D_OUT, D_IN)) == "LinearDelta(10 x 12, zero)"


def test_the_kind_of_a_change_stays_and_a_tied_heads_is_linear():
    low = random_delta(1, {"uv"})
    embedding = LinearDelta(D_OUT, D_IN, u=low.u, v=low.v, bias=torch.ones(D_OUT), kind="embedding")
    assert (
        (2 * embedding).kind == (embedding + embedding).kind == (-embedding).to(dtype=torch.float64).kind == "embedding"
    )
    for total in (embedding + low, low + embedding):
        assert total.kind == "linear"
        assert close(whole(total), whole(low) + whole(replace(embedding, kind="linear")))
    scale = LinearDelta(D_OUT, 1, e=torch.ones(D_OUT, 1), bias=torch.ones(D_OUT), kind="scale")
    assert (scale + scale).kind == "scale"


# ---- exactly how much may cancel ------------------------------------------------------------------------------------


def along(*sizes: float) -> LinearDelta:
    """Terms of the given sizes, all in one entry but the last, which stands in an entry of its own."""
    u, v = torch.zeros(D_OUT, len(sizes)), torch.zeros(len(sizes), D_IN)
    u[0, :-1], u[1, -1] = 1.0, 1.0
    v[:-1, 0], v[-1, 1] = torch.tensor(sizes[:-1]), sizes[-1]
    return LinearDelta(D_OUT, D_IN, u=u, v=v)


@pytest.mark.parametrize("size", [1.0, 2**-20, 2**20])
def test_factors_are_made_anew_where_they_are_more_than_twice_what_is_left(size):
    """Pairs of 1, 1 and 2 cancel, and 2 is left: the sizes of the terms are 4 together, which is twice that."""
    at, beyond = along(1, -1, 1, -1, 2, -2, 2) * size, along(1, -1, 1, -1, 2.01, -2.01, 2) * size
    at, beyond = (LinearDelta(D_OUT, D_IN, u=d.u / size, v=d.v * size) for d in (at, beyond))
    assert at.balanced() is at
    assert beyond.balanced().rank == 1
    assert error(beyond.balanced(), whole(beyond)) < 1e-6
    root = float(beyond.balanced().v.norm())
    assert (root, float(beyond.balanced().u.norm())) == pytest.approx((root, root)), "both factors have one size"
    assert beyond.balanced().u.dtype == beyond.balanced().v.dtype == torch.float32
    assert beyond.to(dtype=torch.bfloat16).rank == 1
    assert beyond.to(dtype=torch.float32).rank == beyond.to("cpu").rank == 7
    assert beyond.to(dtype=torch.float64).u.dtype == torch.float64


@pytest.mark.parametrize("size", [1.0, 2**-20, 2**20])
def test_a_product_joins_the_dense_change_where_both_are_more_than_twice_their_sum(size):
    """A product of size 6 and a dense change of size 8 are 10 together, and leave 5."""
    low, e = along(6, 0), torch.zeros(D_OUT, D_IN)
    e[0, 0], e[2, :4] = -6.25, torch.tensor([4.75, 1.5, 0.25, 0.25])
    at = LinearDelta(D_OUT, D_IN, u=low.u, v=low.v * size, e=e * size)
    assert at.balanced() is at
    less = e.clone()
    less[2, 0] -= 0.1
    beyond = LinearDelta(D_OUT, D_IN, u=low.u, v=low.v * size, e=less * size)
    assert beyond.balanced().rank == 0
    assert torch.equal(beyond.balanced().e, (less + low.u @ low.v) * size)
    assert beyond.balanced().e.dtype == torch.float32


def test_rows_that_two_changes_share_are_found_on_either_side():
    rng = torch.Generator().manual_seed(4)
    u, v = torch.randn(D_OUT, 5, generator=rng), torch.randn(5, D_IN, generator=rng)
    a = LinearDelta(D_OUT, D_IN, u=u[:, :3], v=v[:3])
    b = LinearDelta(D_OUT, D_IN, u=u[:, 2:], v=v[2:])
    joined = a + b
    assert joined.rank == 5, "one row is common to both"
    assert torch.equal(joined.u, torch.cat([u[:, :2], 2 * u[:, 2:3], u[:, 3:]], dim=1))
    assert torch.equal(joined.v, v)
    gone = LinearDelta(D_OUT, D_IN, u=-u[:, 1:2], v=v[1:2])
    assert torch.equal((a + gone).v, v[[0, 2]]), "a term that is zero is dropped"
    for zero in (LinearDelta(D_OUT, D_IN, u=0 * u[:, 3:], v=v[3:]), LinearDelta(D_OUT, D_IN, u=u[:, 3:], v=0 * v[3:])):
        assert torch.equal((a + zero).u, a.u)
        assert torch.equal((zero + a).v, a.v)
    assert torch.equal((LinearDelta(D_OUT, D_IN) + a).u, a.u)
    assert torch.equal((a + LinearDelta(D_OUT, D_IN)).v, a.v)
    one = LinearDelta(D_OUT, D_IN, u=torch.cat([-u[:, :1], torch.eye(D_OUT)[:, :1]], dim=1), v=v[[0, 4]])
    assert (LinearDelta(D_OUT, D_IN, u=u[:, :1], v=v[:1]) + one).rank == 1
    assert a.u.shape == (D_OUT, 3), "what is added stays"


def test_columns_become_fewer_only_where_changes_share_some_of_their_rows():
    u, v = draw(D_OUT, 2), draw(6, D_IN)
    a, apart = LinearDelta(D_OUT, D_IN, u=u, v=v[:2]), LinearDelta(D_OUT, D_IN, u=u, v=v[2:4])
    assert (a + apart).rank == 4, "none in common"
    turned = LinearDelta(D_OUT, D_IN, u=u[:, [1, 0]], v=v[:2])
    assert (a + turned).rank == 2, "all in common, and of rank 1"
    first, second = (LinearDelta(D_OUT, D_IN, u=u[:, [i, i]], v=torch.stack([v[i], v[5]])) for i in range(2))
    assert (first - second).rank == 2, "one in common and one of their own"
    assert error(first - second, whole(first) - whole(second)) < 1e-6


@pytest.mark.parametrize("size", [1.0, 2**-20, 2**20])
def test_a_product_that_is_made_anew_does_not_depend_on_the_order_of_its_terms(size):
    a = random_delta(1, {"uv"})
    near = moved(a, 2, 2**-9)
    u, v = torch.cat([a.u, -near.u], dim=1) * size, torch.cat([a.v, near.v])
    made = LinearDelta(D_OUT, D_IN, u=u, v=v).balanced()
    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        other = LinearDelta(D_OUT, D_IN, u=-u[:, order], v=v[order]).balanced()
        assert torch.equal(other.u, -made.u)
        assert torch.equal(other.v, made.v)
    same = LinearDelta(D_OUT, D_IN, u=a.u * size, v=a.v)
    assert (same - LinearDelta(D_OUT, D_IN, u=same.u * 2, v=same.v / 2)).rank == 0
    assert (same - LinearDelta(D_OUT, D_IN, u=same.u / 4, v=same.v * 4)).rank == 0


def test_a_double_that_is_lost_in_single_precision_is_no_direction():
    """Of terms that cancel, what is below twice the rounding of their dtype is left out, and what is above stays."""
    for share, rank in ((1.9, 1), (2.1, 2)):
        small = share * torch.finfo(torch.float32).eps
        u, v = torch.zeros(D_OUT, 4), torch.zeros(4, D_IN)
        u[0, :3], u[1, 3] = torch.tensor([3.0, -3.0, 1.0]), small
        v[:3, 0], v[3, 1] = 1.0, 1.0
        assert LinearDelta(D_OUT, D_IN, u=u, v=v).balanced().rank == rank


# ---- products and approximations ------------------------------------------------------------------------------------


def test_inner_products_without_a_weight():
    a, b = random_delta(1, {"uv", "bias"}), random_delta(2, {"uv", "bias"})
    dense, other = random_delta(3, {"e", "bias"}), random_delta(4, {"uv"})
    for x, y in ((a, b), (a, dense), (dense, b), (dense, dense), (other, dense), (other, other), (other, a)):
        assert x.inner(y, None) == pytest.approx(float((whole(x) * whole(y)).sum()), rel=1e-6)
    assert a.norm() == pytest.approx(float(whole(a).norm()), rel=1e-6)
    assert other.inner(random_delta(5, {"uv"}), None) == pytest.approx(
        float((whole(other) * whole(random_delta(5, {"uv"}))).sum()), rel=1e-6
    )
    nothing = LinearDelta(D_OUT, D_IN)
    assert nothing.norm() == nothing.inner(a, None) == a.inner(nothing, None) == other.inner(nothing, None) == 0
    only = LinearDelta(D_OUT, D_IN, bias=torch.full((D_OUT,), 0.5))
    assert (only.norm(), only.inner(dense, None)) == pytest.approx((0.5 * D_OUT**0.5, 0.5 * float(dense.bias.sum())))


def test_inner_products_are_summed_in_double_precision():
    e = torch.tensor([[1e7, 1.0, 1e7, 3.0]])
    dense, flipped = LinearDelta(1, 4, e=e), LinearDelta(1, 4, e=torch.tensor([[1e7, 1.0, -1e7, 3.0]]))
    assert dense.inner(flipped, None) == 10
    u, v = torch.ones(1, 1), LinearDelta(1, 4, u=torch.ones(1, 1), v=torch.tensor([[1e7, 1.0, -1e7, 3.0]]))
    assert LinearDelta(1, 4, u=u, v=e).inner(v, None) == 10
    bias = LinearDelta(4, 1, bias=e[0]), LinearDelta(4, 1, bias=torch.tensor([1e7, 1.0, -1e7, 3.0]))
    assert bias[0].inner(bias[1], None) == 10
    assert LinearDelta(1, 4, e=torch.full((1, 4), 1e-4)).norm() == pytest.approx(2e-4)


@pytest.mark.parametrize("coordinate", ["g", "c", "d"])
def test_the_size_of_what_multiplies_a_weight_needs_the_weight(coordinate):
    delta, plain = random_delta(1, {coordinate}), random_delta(2, {"e"})
    for pair in ((delta, plain), (plain, delta), (delta, delta)):
        with pytest.raises(WsError, match=r"^The size .* needs W\b.*base model\.$"):
            pair[0].inner(pair[1], None)
    for wrong in (torch.zeros(D_IN, D_OUT), torch.zeros(D_OUT, D_IN, dtype=torch.int8)):
        for use in (lambda w: delta.inner(plain, w), lambda w: plain.dense(w), lambda w: delta.norm(w)):
            with pytest.raises(
                WsError, match=rf"10 x 12 .* {str(wrong.dtype)[6:]} .*\({wrong.shape[0]}, {wrong.shape[1]}\)"
            ):
                use(wrong)


def test_a_dense_change_is_in_single_precision_whatever_the_weight():
    delta = random_delta(1, {"g", "c", "d", "uv", "e"})
    rough = weight().bfloat16()
    assert delta.dense(rough).dtype == torch.float32
    assert torch.equal(delta.dense(rough), delta.dense(rough.float()))
    assert delta.dense(rough.double()).dtype == torch.float64
    assert (delta.dense(rough.double()) - delta.dense(rough.float())).norm() < 1e-5 * delta.dense(rough).norm()


def low_rank(*sizes: float) -> LinearDelta:
    """A product with the given singular values, in columns that are not orthogonal."""
    rng = torch.Generator().manual_seed(6)
    left, right = (torch.linalg.qr(torch.randn(n, len(sizes), generator=rng).double())[0] for n in (D_OUT, D_IN))
    turn = torch.linalg.qr(torch.randn(len(sizes), len(sizes), generator=rng).double())[0]
    stretch = torch.arange(1.0, len(sizes) + 1).double()
    u = left * torch.tensor(sizes).double() @ turn * stretch
    return LinearDelta(D_OUT, D_IN, u=u.float(), v=((turn / stretch).T @ right.T).float())


@pytest.mark.parametrize(
    ("asked", "rank"),
    [
        ({"rank": 1}, 1), ({"rank": 2}, 2), ({"rank": 4}, 4), ({"rank": 9}, 4), ({"energy": 0.6}, 1),
        ({"energy": 0.66}, 2), ({"energy": 0.87}, 2), ({"energy": 0.89}, 3), ({"energy": 1}, 4), ({"energy": 1e-9}, 1),
    ],
    ids=str,
)  # fmt: skip
def test_a_product_is_kept_by_rank_or_by_energy(asked, rank):
    """Singular values whose squares are 64, 24, 10 and 2 of 100."""
    delta = replace(low_rank(8, 24**0.5, 10**0.5, 2**0.5), g=torch.ones(D_OUT), bias=torch.ones(D_OUT))
    small, lost = delta.compress(**asked)
    assert (small is delta) is (rank == 4)
    assert small.rank == rank
    wanted = {1: 0.6, 2: 12**0.5 / 10, 3: 2**0.5 / 10, 4: 0}[rank]
    assert lost == pytest.approx(wanted, abs=1e-5)
    assert small.u.dtype == small.v.dtype == torch.float32
    assert small.u.is_contiguous()
    assert small.v.is_contiguous()
    assert torch.equal(small.g, delta.g)
    assert torch.equal(small.bias, delta.bias)
    gone = (small.u.double() @ small.v.double() - delta.u.double() @ delta.v.double()).norm() / 10
    assert float(gone) == pytest.approx(wanted, abs=1e-5)
    if rank < 4:
        assert (small.u.norm(dim=0) / small.v.norm(dim=1)).numpy() == pytest.approx(1, rel=1e-5), "of one size"


def test_what_cannot_be_kept_is_named():
    delta = low_rank(2, 1)
    for both in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(WsError, match=r"^Compressing .* rank or .*energy to keep\.$"):
            delta.compress(**both)
    for rank in (0, -1):
        with pytest.raises(WsError, match=rf"at least 1, not {rank}\b"):
            delta.compress(rank)
    for energy in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(WsError, match=rf"above 0 and up to 1, not {energy}"):
            delta.compress(energy=energy)
    dense = random_delta(1, {"e"})
    assert dense.compress(1) == (dense, 0.0)
    assert dense.compress(energy=0.5) == (dense, 0.0)
    nothing = LinearDelta(D_OUT, D_IN, u=torch.zeros(D_OUT, 3), v=torch.ones(3, D_IN))
    small, lost = nothing.compress(1)
    assert (small.rank, lost) == (1, 0.0)
    assert small.is_zero
    assert (low_rank(2, 1) * 1e-4).compress(1)[1] == pytest.approx(0.2**0.5)


@pytest.mark.parametrize("coordinate", ["g", "c", "d", "e", "uv"])
def test_the_best_product_for_a_whole_change(coordinate):
    delta, w = random_delta(1, {coordinate, "bias"}), weight().float()
    exact = delta.dense(w.double())
    s = torch.linalg.svdvals(exact)
    for asked in ({"rank": 1}, {"error": 0.8}):
        low, lost = delta.factorised(w, **asked)
        assert low.is_low_rank
        assert (low.u.dtype, low.v.dtype) == (torch.float32, torch.float32)
        assert lost == pytest.approx(float(s[low.rank :].norm() / s.norm()), abs=1e-6)
        assert float((low.dense(w.double()) - exact).norm() / exact.norm()) == pytest.approx(lost, abs=1e-6)
        if "rank" in asked:
            assert low.rank == 1
        else:
            assert lost <= 0.8
            assert float(s[low.rank - 1 :].norm() / s.norm()) > 0.8, "one column less would lose more"
    assert delta.factorised(w, error=0)[1] == pytest.approx(0, abs=1e-6)
    if coordinate == "uv":
        assert torch.equal(delta.factorised(torch.empty(0), 1)[0].u, delta.factorised(w, 1)[0].u), "from its factors"
    for error in (-0.1, 1, 1.5):
        with pytest.raises(WsError, match=rf"from 0 up to 1, not {error}"):
            delta.factorised(w, error=error)


def test_the_error_of_a_recipe_is_that_of_all_modules_as_one_vector():
    errors, sizes = {"a": 0.5, "b": 0.1}, {"a": 3.0, "b": 4.0}
    kept = approximation_errors(errors, sizes)
    assert kept == {"errors": errors, "error": 0.5, "total_error": pytest.approx(((1.5**2 + 0.4**2) / 25) ** 0.5)}
    assert kept["errors"] is not errors
    assert approximation_errors({}, {}) == {"errors": {}, "error": 0.0, "total_error": 0.0}
    assert approximation_errors({"a": 0.0}, {"a": 0.0})["total_error"] == 0.0


# ---- in a forward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("present", ["uv", "e", "uv e", ""])
def test_rows_of_an_embedding(present):
    table = replace(random_delta(1, set(present.split())), kind="embedding")
    ids = torch.tensor([[3, 0, 9], [3, 1, 2]])
    if not present:
        assert table.rows(ids) is None
        return
    assert torch.allclose(table.rows(ids), replace(table, kind="linear").dense(weight())[ids].float(), atol=1e-6)


def test_what_acts_on_input_and_output_in_rows_of_any_shape():
    bias = random_delta(1, {"bias"})
    x = torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bias.output_change(x, None), bias.bias.expand(2, 3, D_OUT))
    assert bias.output_change(x[0, 0], None).shape == (D_OUT,)
    assert bias.input_change(x) is None
    assert random_delta(1, {"uv"}).output_change(x, None) is None
    with pytest.raises(AssertionError, match=r"^a .* W x$"):
        random_delta(1, {"g"}).output_change(x, None)
    assert random_delta(1, {"d"}).input_change(x[0, 0]).shape == (D_IN,)
