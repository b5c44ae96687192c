"""Geometry of steering vectors: cosines between any number of them, and what the two arms of a pair have in common.

Everything comes from Frobenius inner products, parameter by parameter, summed in float64. Low-rank changes are never
formed as matrices: `<U V, U' V'> = sum((U^T U') * (V V'^T))`. Where a change multiplies `W`, all vectors are formed for
a block of rows of one layer at a time, as many rows as together hold no more numbers than that layer's `W`.

**A pair.** With `tau+ = theta_pos - base` and `tau- = theta_neg - base`, the contrast is
`b = (tau+ - tau-) / 2 = dW / 2` and the common drift `M = (tau+ + tau-) / 2`, so that `tau+ = M + b` and
`tau- = M - b`. `M` is what training does to a model whatever the side; it cancels in `dW`.

**A null for cosines.** Let both vectors be turned at random, module by module and on both sides: `A -> Q A R` with `Q`
and `R` uniform (Haar) orthogonal matrices, which keeps all singular values. Flipping signs of rows and columns and
permuting them changes nothing in the law of `Q A R`, so its entries are uncorrelated and of one variance,
`||A||^2 / (d_out d_in)`, and exactly

    E cos = 0        Var cos = sum_l ||A_l||^2 ||B_l||^2 / (d_out d_in)_l  /  (||A||^2 ||B||^2)

The null is easy to beat: in so many dimensions, directions without any relation are almost orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from ws.console import progress
from ws.delta import COORDINATES, LinearDelta
from ws.diff import MANIFEST, NATIVE_WEIGHTS, PEFT_WEIGHTS, SteeringVector, VectorManifest, deltas_from_tensors
from ws.errors import WsError
from ws.files.reading import read_json
from ws.files.tensors import open_tensors
from ws.lm.models import layer_of, require_base, weight_of, weight_size

Rows = list[dict[str, Any]]

# A squared norm that is this small a part of what it is a difference of is rounding.
_ROUNDING = 1e-12


# ---- vectors that stay on disk --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredVector:
    """A saved vector of which a few modules at a time are read.

    Attributes:
        file: its safetensors.
        base_id, base_fingerprint, info: as in `SteeringVector`.
        sizes: module name to `(d_out, d_in)`.
        shared: modules whose change is stored as that of an earlier one, whose weight they share.
        is_low_rank: every change is `U V`.
    """

    file: Path
    base_id: str
    base_fingerprint: str | None
    info: Mapping[str, Any]
    sizes: Mapping[str, tuple[int, int]]
    shared: Mapping[str, str]
    is_low_rank: bool

    def read(self, names: Iterable[str]) -> dict[str, LinearDelta]:
        """The changes of those of the named modules that the vector has."""
        deltas: dict[str, LinearDelta] = {}
        with open_tensors(self.file, "make the vector again") as stored:
            present = set(stored.keys())
            for name in names:
                first = self.shared.get(name, name)
                keys = [key for key in _keys_of(first) if key in present]
                if keys and first not in deltas:
                    tensors = {key: stored.get_tensor(key).float() for key in keys}
                    deltas |= deltas_from_tensors({first: self.sizes[first]}, tensors, self.file.parent)
                if keys:
                    deltas[name] = deltas[first]
        return deltas


Vector = SteeringVector | StoredVector


def _keys_of(name: str) -> list[str]:
    peft = [f"base_model.model.{name}.{which}.weight" for which in ("lora_A", "lora_B")]
    return [*(f"{name}:{coordinate}" for coordinate in COORDINATES), *peft]


def open_vector(folder: str | Path) -> Vector:
    """A vector's folder, or that of a run with `vector/` in it, checked in full; its numbers stay on disk.

    A PEFT LoRA of somebody else's, which has no manifest, is held in memory.

    Raises:
        WsError: see `SteeringVector.load`.
    """
    folder = Path(folder)
    folder = folder / "vector" if (folder / "vector").is_dir() else folder
    vector = SteeringVector.load(folder)
    if not (folder / MANIFEST).is_file():
        return vector
    file = next(f for n in (PEFT_WEIGHTS, NATIVE_WEIGHTS) if (f := folder / n).is_file())
    sizes = {name: (d.d_out, d.d_in) for name, d in vector.deltas.items()}
    about = (vector.base_id, vector.base_fingerprint, vector.info)
    shared = read_json(folder / MANIFEST, VectorManifest).shared  # which of them the file holds it under
    return StoredVector(file, *about, sizes, shared, vector.is_low_rank)


def _sizes(vector: Vector) -> Mapping[str, tuple[int, int]]:
    if isinstance(vector, StoredVector):
        return vector.sizes
    return {name: (d.d_out, d.d_in) for name, d in vector.deltas.items()}


def _read(vector: Vector, names: Sequence[str]) -> Mapping[str, LinearDelta]:
    if isinstance(vector, StoredVector):
        return vector.read(names)
    return {name: vector.deltas[name] for name in names if name in vector.deltas}


# ---- inner products -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Products:
    """The inner products of `n` vectors in one parameter.

    Attributes:
        parameter: its name, such as `model.layers.0.mlp.up_proj.weight`.
        layer: its decoder layer, None outside the layers.
        size: how many numbers it has.
        matrix: `[n, n]`, symmetric.
    """

    parameter: str
    layer: int | None
    size: int
    matrix: Float[np.ndarray, "n n"]


def inner_products(vectors: Sequence[Vector], model: nn.Module | None = None) -> list[Products]:
    """All inner products of the vectors, parameter by parameter.

    Args:
        vectors: of one base.
        model: that base; needed unless every vector is low-rank.

    Raises:
        WsError: fewer than one vector, different bases or shapes, another model, or one that is missing.
    """
    _check_common_base(vectors, model)
    names = dict.fromkeys(name for v in vectors for name in _sizes(v))
    groups: dict[int | None, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of(name), []).append(name)
    products = []
    for group in progress(groups.values(), desc="inner products", unit="layer"):
        held = [_read(v, group) for v in vectors]
        changes = dict[tuple[int, ...], str]()
        for name in [n for n in group if any(n in h for h in held)]:
            # What modules with a tied weight share counts once, where all vectors change them alike.
            changes.setdefault(tuple(id(h.get(name)) for h in held), name)
        for name in changes.values():
            products += _of_module(name, [h.get(name) for h in held], model)
    return products


def _check_common_base(vectors: Sequence[Vector], model: nn.Module | None) -> None:
    if not vectors:
        raise WsError("There are no vectors to compare.")
    bases = {v.base_fingerprint: v.base_id for v in vectors if v.base_fingerprint}
    if len(bases) > 1:
        named = ", ".join(f"{name} ({digest})" for digest, name in bases.items())
        raise WsError(f"The vectors have different bases, {named}; compare those of one base.")
    if model is not None:
        for digest, name in bases.items():
            require_base(model, name, digest, "The vectors were made for")
    sizes: dict[str, tuple[int, int]] = {}
    for vector in vectors:
        for name, size in _sizes(vector).items():
            if sizes.setdefault(name, size) != size:
                raise WsError(f"The vectors change {name} as a layer of {sizes[name]} and of {size}.")


def _of_module(name: str, deltas: Sequence[LinearDelta | None], model: nn.Module | None) -> list[Products]:
    """The products in a module's weight, and in its bias where a vector changes that."""
    d = next(d for d in deltas if d is not None)
    layer, shape = layer_of(name), (d.d_out, d.d_in)
    weights = [None if d is None else replace(d, bias=None) for d in deltas]
    if all(d is None or d.is_low_rank for d in weights):
        matrix = _factor_products(weights)
    else:
        matrix = _dense_products(weights, _weight(name, shape, model))
    products = [Products(f"{name}.weight", layer, d.d_out * d.d_in, matrix)]
    biases = [None if d is None else d.bias for d in deltas]
    if any(b is not None for b in biases):
        rows = torch.stack([torch.zeros(d.d_out).double() if b is None else b.double().cpu() for b in biases])
        products.append(Products(f"{name}.bias", layer, d.d_out, (rows @ rows.T).numpy()))
    return products


def _weight(name: str, shape: tuple[int, int], model: nn.Module | None) -> Tensor:
    if model is None:
        raise WsError(f"The size of a change that multiplies W needs W, as that of {name}: pass the base model.")
    modules = dict(model.named_modules())
    if name not in modules or weight_size(modules[name]) != shape:
        raise WsError(f"The vectors change {name} {shape}, which this model does not have; load their base.")
    return plain_weight(name, modules[name])


def plain_weight(name: str, module: nn.Module) -> Tensor:
    """The weight of a linear module; `WsError` when it is quantised."""
    weight = weight_of(module)
    if not weight.is_floating_point() or tuple(weight.shape) != weight_size(module):
        raise WsError(
            f"The geometry of a change needs plain weights, but {name} stores {str(weight.dtype)[6:]} of shape "
            f"{tuple(weight.shape)}; load the model unquantised."
        )
    return weight


def _factor_products(deltas: Sequence[LinearDelta | None]) -> Float[np.ndarray, "n n"]:
    """`<U_i V_i, U_j V_j> = sum((U_i^T U_j) * (V_i V_j^T))`, all factors side by side."""
    matrix = np.zeros((len(deltas), len(deltas)))
    known = {i: (d.u, d.v) for i, d in enumerate(deltas) if d is not None and d.u is not None and d.v is not None}
    factors = {i: (u, v) for i, (u, v) in known.items() if u.shape[1]}  # `reduceat` takes no empty part
    if not factors:
        return matrix
    u = torch.cat([u for u, _ in factors.values()], dim=1).double()
    v = torch.cat([v for _, v in factors.values()]).double()
    here, starts = list(factors), np.cumsum([0, *(v.shape[0] for _, v in factors.values())])
    for n, i in enumerate(here):
        mine, rest = slice(starts[n], starts[n + 1]), slice(starts[n], None)
        sums = ((u[:, mine].T @ u[:, rest]) * (v[mine] @ v[rest].T)).sum(dim=0).numpy()
        matrix[i, here[n:]] = matrix[here[n:], i] = np.add.reduceat(sums, starts[n:-1] - starts[n])
    return matrix


def _dense_products(deltas: Sequence[LinearDelta | None], weight: Tensor) -> Float[np.ndarray, "n n"]:
    """The products of changes that multiply `W`, from blocks of rows that together are no larger than `W`."""
    n, d_out = len(deltas), weight.shape[0]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    step = max(1, d_out // n)
    for start in range(0, d_out, step):
        rows = slice(start, start + step)
        w = weight[rows].cpu().double()
        dense = torch.stack([torch.zeros_like(w) if d is None else _rows_of(d, rows).dense(w) for d in deltas])
        flat = dense.flatten(1)
        matrix += flat @ flat.T
    return matrix.numpy()


def _rows_of(delta: LinearDelta, rows: slice) -> LinearDelta:
    """The change of a block of output rows, which is one of the same form."""
    cut = {name: t[rows] if name in ("g", "u", "e") else t for name, t in delta.coordinates().items()}
    count = len(range(*rows.indices(delta.d_out)))
    return LinearDelta(count, delta.d_in, kind=delta.kind, **cut)


# ---- cosines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cosines:
    """The cosines of `n` vectors.

    Attributes:
        norms: their Frobenius norms, `[n]`.
        cosine: `[n, n]`, ones on the diagonal; NaN where a vector has nothing in these parameters.
        random_sd: the standard deviation of the cosine of two vectors with these singular values and random
            directions, whose mean is 0; see the module's docstring. NaN like `cosine`.
    """

    norms: Float[np.ndarray, "n"]
    cosine: Float[np.ndarray, "n n"]
    random_sd: Float[np.ndarray, "n n"]


def cosines(products: Sequence[Products]) -> Cosines:
    """The cosines over all the given parameters; give those of one layer for the cosines there."""
    total = np.sum([p.matrix for p in products], axis=0)
    squares = np.array([np.diag(p.matrix) for p in products]).clip(min=0)
    norms = np.sqrt(squares.sum(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (total / np.outer(norms, norms)).clip(-1, 1)
        sizes = np.array([p.size for p in products], dtype=np.float64)[:, None]
        random_sd = np.sqrt((squares / sizes).T @ squares) / np.outer(norms, norms)
    np.fill_diagonal(cosine, np.where(norms > 0, 1.0, np.nan))
    return Cosines(norms, cosine, random_sd)


def cosine_matrix(vectors: Sequence[Vector], model: nn.Module | None = None) -> Cosines:
    """The cosines of any number of vectors of one base; `WsError` for a zero vector, and see `inner_products`."""
    matrix = cosines(inner_products(vectors, model))
    if not matrix.norms.all():
        raise WsError(f"Vector {int(np.argmin(matrix.norms)) + 1} of {len(vectors)} is zero; it has no cosine.")
    return matrix


def by_layer(products: Sequence[Products]) -> dict[str | int, Sequence[Products]]:
    """The products of every decoder layer, in order."""
    layers = sorted({p.layer for p in products if p.layer is not None})
    return {layer: [p for p in products if p.layer == layer] for layer in layers}


def labels(vectors: Sequence[Vector], folders: Sequence[Path]) -> list[str]:
    """`honesty/lora/seed-0` by what the vectors say of themselves, or their folders where that is not unique."""
    names = ["/".join(_identity(v)) for v in vectors]
    unique = len(set(names)) == len(names) and not any("?" in name for name in names)
    return names if unique else [str(folder) for folder in folders]


def _identity(vector: Vector) -> tuple[str, str, str]:
    behavior, family, seed = (str(vector.info.get(key, "?")) for key in ("behavior", "family", "seed"))
    return behavior, family, f"seed-{seed}"


def cosine_rows(vectors: Sequence[Vector], names: Sequence[str], products: Sequence[Products], layers: bool) -> Rows:
    """Rows of `cosines.csv`: one per pair, over all parameters, and per decoder layer where that is asked for."""
    parts: dict[str | int, Sequence[Products]] = {"all": products}
    if layers:
        parts |= by_layer(products)
    rows = Rows()
    for layer, part in parts.items():
        matrix = cosines(part)
        for i in range(len(vectors)):
            for j in range(i + 1, len(vectors)):
                if np.isfinite(matrix.cosine[i, j]):
                    numbers = {"cosine": float(matrix.cosine[i, j]), "random_sd": float(matrix.random_sd[i, j])}
                    rows.append(_key(vectors[i], names[i]) | _other(vectors[j], names[j]) | {"layer": layer} | numbers)
    return rows


def _key(vector: Vector, name: str) -> dict[str, Any]:
    info = vector.info
    mine = {"behavior": info.get("behavior"), "adapter": info.get("family"), "seed": info.get("seed")}
    return mine | {"alpha": 1.0, "vector": name}


def _other(vector: Vector, name: str) -> dict[str, Any]:
    return {f"other_{key}": value for key, value in _key(vector, name).items() if key != "alpha"}


# ---- the two arms of a pair -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairGeometry:
    """What the two arms of a pair have in common; see the module's docstring for `M` and `b`.

    Attributes:
        norm_pos, norm_neg, norm_dw: `||tau+||`, `||tau-||`, `||dW||`.
        cos_opposed: `cos(tau+, -tau-)`: 1 where the arms move in opposite directions, -1 where they move together.
        norm_ratio: `||tau+|| / ||tau-||`.
        drift_ratio: `||M|| / ||b||`: 0 for pure contrast, 1 for orthogonal arms, large where both arms drift together.
        cos_drift: `|cos(dW, M)|`: how much of the drift is left in `dW`; 0 for arms of equal norm.
        random_sd: the standard deviation of `cos_opposed` for arms without relation; see `Cosines`.

    A quantity that is not defined, such as a ratio to an arm that changes nothing, is None.
    """

    norm_pos: float
    norm_neg: float
    norm_dw: float
    cos_opposed: float | None
    norm_ratio: float | None
    drift_ratio: float | None
    cos_drift: float | None
    random_sd: float | None


def pair_geometry(products: Sequence[Products]) -> PairGeometry:
    """The diagnostics of a pair from the products of `[tau+, tau-]`.

    All of them follow from `p = ||tau+||^2`, `n = ||tau-||^2` and `x = <tau+, tau->`: `4 ||M||^2 = p + n + 2 x`,
    `||dW||^2 = 4 ||b||^2 = p + n - 2 x` and `<dW, M> = (p - n) / 2`.
    """
    (p, x), (_, n) = np.sum([part.matrix for part in products], axis=0).tolist()
    least = _ROUNDING * (p + n)
    drift, contrast = (square if square > least else 0.0 for square in (p + n + 2 * x, p + n - 2 * x))
    both = p > 0 and n > 0
    return PairGeometry(
        norm_pos=sqrt(p),
        norm_neg=sqrt(n),
        norm_dw=sqrt(contrast),
        cos_opposed=min(1.0, max(-1.0, -x / sqrt(p * n))) if both else None,
        norm_ratio=sqrt(p / n) if n > 0 else None,
        drift_ratio=sqrt(drift / contrast) if contrast else None,
        cos_drift=min(1.0, abs(p - n) / sqrt(contrast * drift)) if contrast and drift else None,
        random_sd=float(cosines(products).random_sd[0, 1]) if both else None,
    )


def pair_rows(key: Mapping[str, Any], products: Sequence[Products]) -> Rows:
    """Rows of `geometry.csv`: the pair as a whole, then layer by layer."""
    parts: dict[str | int, Sequence[Products]] = {"all": products}
    parts |= by_layer(products)
    return [{**key, "layer": layer} | vars(pair_geometry(part)) for layer, part in parts.items()]


# ---- pictures -------------------------------------------------------------------------------------------------------


def heat_map(
    values: Float[np.ndarray, "rows columns"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    style: str = "{:.2f}",
    diverging: bool = False,
) -> Figure:
    """A labelled heat map, with its numbers written in while they are few; NaN cells stay empty.

    `diverging` colours from -1 to 1 around white, otherwise colours go from 0 to the largest value.
    """
    height, width = values.shape
    cell_w, cell_h = (0.62, 0.42) if values.size <= 500 else (0.3, 0.3)
    left = 0.085 * max(map(len, rows)) + 0.4
    size = (left + cell_w * width + 1.3, 0.075 * max(map(len, columns)) + 0.9 + cell_h * height)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    top = 1.0 if diverging else float(np.nanmax(values)) or 1.0
    low = -1.0 if diverging else 0.0
    image = axes.imshow(values, cmap="RdBu_r" if diverging else "Blues", vmin=low, vmax=top, aspect="auto")
    axes.set_xticks(range(width), columns, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(height), rows, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    if values.size <= 500:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = abs(value) > 0.6 * top
                axes.text(j, i, style.format(value), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    return figure
