"""`LinearDelta`: the exact change of one layer's weight, as a value in a vector space.

Every adapter family turns a weight `W [d_out, d_in]` into `W'`, and the change has exact coordinates

    Delta(W) = diag(g) W  +  W diag(c)  +  W blockdiag(D_1..D_k)^T  +  U V  +  E
               g [d_out]     c [d_in]      D_i [b, b]                 U [d_out, r], V [r, d_in]

(`E` dense, for full fine-tunes only) plus a change of the bias. Embeddings and norms, which full fine-tunes move too,
are changes of the matrices `[vocabulary, d]` and `[d, 1]`, with `E` or `U V` alone. The coordinates are linear in the
change: with `W` fixed, `pos - neg`, `2 * v` and `v1 + 0.5 * v2` are the same operations on coordinates, with nothing
rounded into the dtype of `W`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import hypot, lcm, sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ws.errors import WsError

KINDS = ("linear", "embedding", "scale")
COORDINATES = ("g", "c", "d", "u", "v", "e", "bias")
MAX_AMPLIFICATION = 2.0  # of rounding errors, over those of factors in which nothing cancels


@dataclass(frozen=True, eq=False)
class LinearDelta:
    """The change `W' - W` (and of the bias) of one linear layer, in the coordinates of the module's equation.

    Attributes:
        d_out, d_in: the shape of `W`.
        g: row scales minus one, `[d_out]` (DoRA's magnitudes, IA3 on outputs).
        c: column scales minus one, `[d_in]` (IA3 on inputs).
        d: input rotations minus identity, `[k, b, b]` with `k * b == d_in` (OFT; Qiu et al. 2023, arXiv 2306.07280).
        u, v: low-rank factors, `[d_out, r]` and `[r, d_in]`; all scales are baked into `u`.
        e: a dense change, `[d_out, d_in]`.
        bias: the change of the bias, `[d_out]`.
        kind: of module; an `embedding` has `e` or `u` and `v`, a `scale` (norm) `e` and `bias`. The change of an
            embedding may be that of a head too which shares its weight, and then holds the change of the head's `bias`.

    A coordinate that is `None` is zero. Operators need equal shapes and raise `WsError` otherwise.
    """

    d_out: int
    d_in: int
    g: Float[Tensor, "d_out"] | None = None
    c: Float[Tensor, "d_in"] | None = None
    d: Float[Tensor, "k b b"] | None = None
    u: Float[Tensor, "d_out r"] | None = None
    v: Float[Tensor, "r d_in"] | None = None
    e: Float[Tensor, "d_out d_in"] | None = None
    bias: Float[Tensor, "d_out"] | None = None
    kind: str = "linear"

    def __post_init__(self) -> None:
        allowed = {"linear": set(COORDINATES), "embedding": {"e", "u", "v", "bias"}, "scale": {"e", "bias"}}[self.kind]
        if not self.coordinates().keys() <= allowed:
            raise WsError(f"The change of an {self.kind} cannot hold {', '.join(self.coordinates().keys() - allowed)}.")
        if (self.u is None) != (self.v is None):
            raise WsError("A low-rank change needs both of its factors u and v.")
        rank = 0 if self.u is None else self.u.shape[1]
        want = {"g": (self.d_out,), "c": (self.d_in,), "u": (self.d_out, rank), "v": (rank, self.d_in)}
        want |= {"e": (self.d_out, self.d_in), "bias": (self.d_out,)}
        for name, tensor in self.coordinates().items():
            if name in want and tuple(tensor.shape) != want[name]:
                raise WsError(f"Coordinate {name} has shape {tuple(tensor.shape)}, expected {want[name]}.")
            if not torch.isfinite(tensor).all():
                raise WsError(f"Coordinate {name} of a {self.d_out} x {self.d_in} change holds NaN or infinity.")
        if self.d is not None and self.d.shape[0] * self.d.shape[1] != self.d_in:
            raise WsError(f"Rotation blocks {tuple(self.d.shape)} do not tile an input of {self.d_in}.")

    # ---- what it is -------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Columns of `u`: an upper bound on the rank of the low-rank part."""
        return 0 if self.u is None else self.u.shape[1]

    @property
    def is_low_rank(self) -> bool:
        """True when `U V` is the whole change (also for the zero change)."""
        return all(getattr(self, name) is None for name in ("g", "c", "d", "e", "bias"))

    @property
    def depends_on_weight(self) -> bool:
        """True when the change multiplies `W` by something."""
        return any(getattr(self, name) is not None for name in ("g", "c", "d"))

    @property
    def is_zero(self) -> bool:
        """True when every coordinate is absent or zero."""
        return not any(t.any() for name, t in self.coordinates().items() if name != "v")

    def coordinates(self) -> dict[str, Tensor]:
        """The coordinates that are present, by name; the tensors are shared, not copied."""
        return {name: t for name in COORDINATES if (t := getattr(self, name)) is not None}

    def holding(self, coordinates: Mapping[str, Tensor | None]) -> LinearDelta:
        """Another change of the same layer, with these coordinates and no others."""
        return LinearDelta(self.d_out, self.d_in, kind=self.kind, **coordinates)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LinearDelta:
        """The same change with its coordinates on another device or in another dtype.

        A dtype with fewer digits gets `balanced` coordinates, of which rounding takes no more than its own share.
        """
        coarser = dtype is not None and self.u is not None and torch.finfo(dtype).eps > torch.finfo(self.u.dtype).eps
        change = self.balanced() if coarser else self
        return self.holding({name: t.to(device=device, dtype=dtype) for name, t in change.coordinates().items()})

    def balanced(self) -> LinearDelta:
        """The same change, without large parts of `U V + E` that cancel each other.

        Rounding every entry of `U`, `V` and `E` moves their sum by about its share of
        `sqrt(sum_i ‖u_i‖^2 ‖v_i‖^2 + ‖E‖_F^2)`, where `u_i v_i` are the terms of `U V`: of a PiSSA arm written as
        `B A - B0 A0` bfloat16 would lose everything but the first digit. Where that is more than `MAX_AMPLIFICATION`
        times `‖U V + E‖_F`, the product is added to `E`, or factored anew by its singular value decomposition, for
        which the ratio is 1. All other changes are returned as they are, bit for bit.
        """
        if self.u is None or self.v is None:
            return self
        u, v = self.u.float(), self.v.float()
        parts = float((u.norm(dim=0) * v.norm(dim=1)).norm())
        if self.e is None:
            whole = float(((u.T @ u) * (v @ v.T)).sum().clamp(min=0).sqrt())
            if parts <= MAX_AMPLIFICATION * whole:
                return self
            return self.holding(self.coordinates() | dict(zip("uv", _factored(self.u, self.v), strict=True)))
        summed = (self.e.double() + self.u.double() @ self.v.double()).to(self.e.dtype)
        if hypot(parts, float(self.e.norm())) <= MAX_AMPLIFICATION * float(summed.norm()):
            return self
        return self.holding(self.coordinates() | {"u": None, "v": None, "e": summed})

    # ---- the vector space -------------------------------------------------------------------------------------

    def __add__(self, other: LinearDelta) -> LinearDelta:
        kinds = {self.kind, other.kind}
        if kinds == {"linear", "embedding"}:  # a head, which has the change of a tied embedding in one of the vectors
            kinds = {"linear"}
        if (self.d_out, self.d_in) != (other.d_out, other.d_in) or len(kinds) > 1:
            raise WsError(f"Cannot add changes of {self._shape} {self.kind} and {other._shape} {other.kind} layers.")
        u, v = _join_factors(self, other)
        summed = {
            "g": _sum(self.g, other.g),
            "c": _sum(self.c, other.c),
            "d": _sum(*_common_blocks(self.d, other.d)),
            "e": _sum(self.e, other.e),
            "bias": _sum(self.bias, other.bias),
        }
        return LinearDelta(self.d_out, self.d_in, **summed, u=u, v=v, kind=kinds.pop()).balanced()

    def __mul__(self, scalar: float | int) -> LinearDelta:
        scaled = {name: t if name == "v" else t * scalar for name, t in self.coordinates().items()}
        return self.holding(scaled)

    __rmul__ = __mul__

    def __neg__(self) -> LinearDelta:
        return self * -1.0

    def __sub__(self, other: LinearDelta) -> LinearDelta:
        return self + -other

    def __truediv__(self, scalar: float | int) -> LinearDelta:
        return self * (1.0 / scalar)

    # ---- as a matrix ------------------------------------------------------------------------------------------

    def dense(self, weight: Float[Tensor, "{self.d_out} {self.d_in}"]) -> Float[Tensor, "{self.d_out} {self.d_in}"]:
        """`Delta(W)` as a matrix, float32 (float64 when `weight` is); `weight` is the base's, unchanged."""
        self._require_plain(weight)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        me, w = self.to(weight.device, dtype), weight.detach().to(dtype)
        out = torch.zeros_like(w)
        if me.g is not None:
            out += me.g[:, None] * w
        if me.c is not None:
            out += w * me.c
        if me.d is not None:
            blocks = w.reshape(self.d_out, me.d.shape[0], me.d.shape[1])
            out += torch.einsum("okj,kij->oki", blocks, me.d).reshape_as(w)
        if me.u is not None and me.v is not None:
            out += me.u @ me.v
        if me.e is not None:
            out += me.e
        return out

    def inner(self, other: LinearDelta, weight: Tensor | None) -> float:
        """Frobenius inner product of two changes of one layer, bias included.

        Low-rank pairs cost `O(r^2 (d_out + d_in))` and need no weight: `<U V, U' V'> = tr((U^T U')(V' V^T))`. Other
        pairs form this one layer densely. Sums run in float64, because large common parts (PiSSA) may cancel.
        """
        total = 0.0
        if self.bias is not None and other.bias is not None:
            total = float(self.bias.double() @ other.bias.double())
        if self.is_low_rank and other.is_low_rank:
            if self.u is None or self.v is None or other.u is None or other.v is None:
                return total
            left, right = self.u.double().T @ other.u.double(), self.v.double() @ other.v.double().T
            return total + float((left * right).sum())
        if weight is None and (self.depends_on_weight or other.depends_on_weight):
            raise WsError("The size of a change that multiplies W needs W: pass the base model.")
        if weight is not None:
            self._require_plain(weight)
        w = torch.zeros(self.d_out, self.d_in, dtype=torch.float64) if weight is None else in_float64(weight)
        return total + float((self.dense(w) * other.dense(w)).sum())

    def norm(self, weight: Tensor | None = None) -> float:
        """Frobenius norm of the change, bias included; see `inner`."""
        return sqrt(max(self.inner(self, weight), 0.0))

    def compress(self, rank: int | None = None, energy: float | int | None = None) -> tuple[LinearDelta, float]:
        """The best low-rank approximation of `U V`, and its relative Frobenius error (0 if exact).

        QR of both factors, then an SVD of the small core (Eckart-Young on `R_u R_v^T`): never forms
        `[d_out, d_in]`. The other coordinates stay as they are, and the error is that of `U V` alone.

        Args:
            rank: this many singular directions.
            energy: as few singular directions as keep this share, in (0, 1], of `‖U V‖_F^2`. Exactly one of the two.
        """
        if (rank is None) == (energy is None):
            raise WsError("Compressing needs either a rank or a share of the energy to keep.")
        if rank is not None and rank < 1:
            raise WsError(f"Rank must be at least 1, not {rank}.")
        if energy is not None and not 0 < energy <= 1:
            raise WsError(f"The energy to keep must be a share above 0 and up to 1, not {energy}.")
        if self.u is None or self.v is None or (rank is not None and self.rank <= rank):
            return self, 0.0
        left, s, right = _singular(self.u, self.v)
        if energy is not None:
            kept_energy = s.square().cumsum(0)
            rank = int((kept_energy < energy * kept_energy[-1]).sum()) + 1
        assert rank is not None
        if self.rank <= rank:
            return self, 0.0
        root = s[:rank].sqrt()
        u, v = left[:, :rank] * root, root[:, None] * right[:rank]
        error = float(s[rank:].norm() / s.norm()) if float(s.norm()) > 0 else 0.0
        coordinates = self.coordinates() | {"u": u.to(self.u.dtype), "v": v.to(self.v.dtype).contiguous()}
        return self.holding(coordinates), error

    def factorised(
        self, weight: Tensor, rank: int | None = None, error: float | int | None = None
    ) -> tuple[LinearDelta, float]:
        """The best `U V` for the whole change, and its relative Frobenius error; a change of the bias is left out.

        A change that is low-rank already is compressed by its factors, any other by the SVD of its dense matrix
        (Eckart-Young), in float64.

        Args:
            weight: the base's.
            rank: this many singular directions.
            error: as few singular directions as keep the error at or below this, in [0, 1). Exactly one of the two.
        """
        if error is not None and not 0 <= error < 1:
            raise WsError(f"The error to allow must be a share from 0 up to 1, not {error}.")
        matrix, energy = replace(self, bias=None), None if error is None else 1 - float(error) ** 2
        if not matrix.is_low_rank:
            left, s, right = torch.linalg.svd(matrix.dense(in_float64(weight)), full_matrices=False)
            matrix = self.holding({"u": left * s, "v": right.contiguous()})
        compressed, lost = matrix.compress(rank, energy)
        return compressed.to(dtype=torch.float32), lost

    # ---- in a forward pass ------------------------------------------------------------------------------------

    def rows(self, ids: Tensor) -> Float[Tensor, "*rows {self.d_in}"] | None:
        """The change of the given rows of an embedding's matrix; None when there is none."""
        parts = [] if self.e is None else [self.e[ids]]
        if self.u is not None and self.v is not None:
            parts.append(self.u[ids] @ self.v)
        return sum(parts[1:], parts[0]) if parts else None

    def input_change(self, x: Float[Tensor, "*rows {self.d_in}"]) -> Float[Tensor, "*rows {self.d_in}"] | None:
        """`c * x + blockdiag(D)^T x`, the part of the change that acts on the input of `W`; None when there is none."""
        z = None if self.c is None else self.c * x
        if self.d is not None:
            k, b, _ = self.d.shape
            rotated = torch.einsum("...kj,kjc->...kc", x.unflatten(-1, (k, b)), self.d).flatten(-2)
            z = rotated if z is None else z + rotated
        return z

    def output_change(
        self, x: Float[Tensor, "*rows {self.d_in}"], wx: Float[Tensor, "*rows {self.d_out}"] | None
    ) -> Float[Tensor, "*rows {self.d_out}"] | None:
        """`g * (W x) + E x + delta_b`, the part that is added to the output beside `U (V x)`; None when there is none.

        `wx` is `W x` without the bias and is needed only when `g` is present.
        """
        parts = []
        if self.g is not None:
            assert wx is not None, "a change with row scales needs W x"
            parts.append(self.g * wx)
        if self.e is not None:
            parts.append(x @ self.e.T)
        if self.bias is not None:
            parts.append(self.bias.expand(*x.shape[:-1], self.d_out))
        return sum(parts[1:], parts[0]) if parts else None

    def _require_plain(self, weight: Tensor) -> None:
        # One byte is a code (FP8) whose scale lies elsewhere.
        is_plain = weight.is_floating_point() and weight.itemsize > 1
        if tuple(weight.shape) != (self.d_out, self.d_in) or not is_plain:
            raise WsError(
                f"The change of a {self._shape} layer needs its plain weight, not {str(weight.dtype)[6:]} of "
                f"{tuple(weight.shape)}; load the model unquantised."
            )

    @property
    def _shape(self) -> str:
        return f"{self.d_out} x {self.d_in}"

    def __repr__(self) -> str:
        parts = [f"rank {self.rank}"] if self.rank else []
        parts += [name for name in self.coordinates() if name not in ("u", "v")]
        return f"LinearDelta({self._shape}, {', '.join(parts) or 'zero'})"


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64: where it lies, or on the CPU where its device has none, as Apple's has not."""
    try:
        return tensor.double()
    except TypeError:
        return tensor.cpu().double()


def approximation_errors(errors: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, Any]:
    """What a recipe says of an approximation: the relative `errors` of modules, the worst (`error`), and that of all.

    `total_error` is the error of all changes as one vector, from the Frobenius norms `sizes` of the whole changes.
    """
    lost, whole = hypot(*(errors[n] * sizes[n] for n in errors)), hypot(*sizes.values())
    worst = max(errors.values(), default=0.0)
    return {"errors": dict(errors), "error": worst, "total_error": lost / whole if whole else 0.0}


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b.to(a.device)


def _common_blocks(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both rotations with one block size: the least common multiple of two divisors of `d_in` divides `d_in` too."""
    if a is None or b is None or a.shape == b.shape:
        return a, b
    size = lcm(a.shape[1], b.shape[1])
    return _coarsen(a, size), _coarsen(b, size)


def _coarsen(d: Tensor, size: int) -> Tensor:
    """Block-diagonal `[k, b, b]` with its blocks gathered into blocks of `size`, a multiple of `b`."""
    per_block = size // d.shape[1]
    return torch.stack([torch.block_diag(*group) for group in d.split(per_block)])


def _join_factors(a: LinearDelta, b: LinearDelta) -> tuple[Tensor | None, Tensor | None]:
    """Concatenated factors of `a + b`, with equal rows of `V` merged and terms that are zero dropped.

    Merging is exact and keeps ranks small: `v - v` has rank 0. Changes that share only some of their rows, such as the
    arms of one PiSSA start (arXiv 2404.02948), may together do with fewer columns than remain, and then get those.
    """
    if a.u is None or a.v is None or b.u is None or b.v is None:
        return (b.u, b.v) if a.u is None else (a.u, a.v)
    column_of = {row.tobytes(): i for i, row in enumerate(a.v.cpu().numpy())}
    u, extra = a.u.clone(), []
    for j, row in enumerate(b.v.cpu().numpy()):
        i = column_of.get(row.tobytes())
        if i is None:
            extra.append(j)
        else:
            u[:, i] += b.u[:, j].to(u.device)
    u = torch.cat([u, b.u[:, extra].to(u.device)], dim=1)
    v = torch.cat([a.v, b.v[extra].to(a.v.device)], dim=0)
    alive = u.any(dim=0) & v.any(dim=1)
    if not alive.any():
        return None, None
    u, v = u[:, alive].contiguous(), v[alive].contiguous()
    fewer = _factored(u, v) if 0 < len(extra) < b.rank else (u, v)
    return fewer if fewer[0] is None or fewer[0].shape[1] < u.shape[1] else (u, v)


def _factored(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Factors of `U V` from its singular value decomposition, `L sqrt(S)` and `sqrt(S) R`, in the dtype of `u`.

    Directions whose norm all together is lost in the rounding to that dtype are left out; of terms that cancel but for
    the rounding of float64 nothing is left.
    """
    # Any order of the terms gives the same bits, and their negatives give the negative: swapped arms cancel exactly.
    rows = [row.tobytes() for row in v.cpu().numpy()]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    u, v = u[:, order], v[order]
    sign = u.flatten()[u.flatten().nonzero()[0]].sign()
    left, s, right = _singular(sign * u, v)
    lost = s.square().flip(0).cumsum(0).flip(0).sqrt()
    noise = 1e-14 * float((u.double().norm(dim=0) * v.double().norm(dim=1)).norm())
    rank = int((lost > max(noise, 2 * torch.finfo(u.dtype).eps * float(lost[0]))).sum())
    if rank == 0:
        return None, None
    root = s[:rank].sqrt()
    factors = sign * left[:, :rank] * root, root[:, None] * right[:rank]
    return factors[0].to(u.dtype).contiguous(), factors[1].to(v.dtype).contiguous()


def _singular(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition `L diag(S) R` of `U V` in float64, with as many directions as `U` has columns.

    QR of both factors, then an SVD of the small core `R_u R_v^T`: never forms `[d_out, d_in]`.
    """
    qu, ru = torch.linalg.qr(u.double())
    qv, rv = torch.linalg.qr(v.double().T)
    left, s, right = torch.linalg.svd(ru @ rv.T, full_matrices=False)
    return qu @ left, s, right @ qv.T


assert {f.name for f in fields(LinearDelta)} == {"d_out", "d_in", *COORDINATES, "kind"}
