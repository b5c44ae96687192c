"""Where `dW` lies: its size, its rank, and its energy in the strong and weak directions of `W` and of the unembedding.

For a change `A = dW [d_out, d_in]` of one layer and `k` orthonormal directions `B [d_out, k]` of its output space,

    share = ||B^T A||_F^2 / ||A||_F^2          and  ||A B||_F^2 / ||A||_F^2  for directions of its input space

With `W = U S V^T` the directions are the first `k` columns of `U` (`left_top`) or of `V` (`right_top`), the last `k`
(`left_bottom`, `right_bottom`) of the `min(d_out, d_in)` that there are, and, for modules that write to the residual
stream, the `k` right singular vectors of the unembedding with the smallest singular values (`readout_weak`): what is
written there is hardly read out.

**The null** keeps the singular values `s_i` of `A` and turns its directions at random: `A -> Q A` (or `A Q`) with `Q`
uniform (Haar) over the orthogonal matrices of dimension `d = d_out` (or `d_in`). Then `share = sum_i w_i a_i` with
`w_i = s_i^2 / sum_j s_j^2`, and `a_i`, the energy of one column of a random orthonormal frame in a fixed subspace of
dimension `k`, is `Beta(k/2, (d-k)/2)`: mean `k/d`, variance `v = 2 k (d-k) / (d^2 (d+2))`. The `a_i` of all `d` columns
sum to `k` and are exchangeable, so any two have covariance `-v / (d-1)`, and exactly

    E share = k / d        Var share = v (d sum_i w_i^2 - 1) / (d - 1)

p-values are two-sided from the Beta distribution with these moments. For `A` of rank 1 it is the exact one; beyond, it
is an approximation (checked by simulation). A dense Gaussian `A` has `Beta(k d'/2, (d-k) d'/2)` exactly, with `d'` the
other dimension; that is narrower, and a low-rank change must not be compared with it: it has fewer directions to
average over. Shares of several modules are averaged with their energies as weights, means and variances likewise.

**What a small p says**: that the directions of `dW` are not random with respect to `W`. Families that multiply `W`
(ia3, oft, dora) or start from its singular vectors (pissa) are so by construction, whatever they were trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from safetensors.torch import save_file
from scipy.stats import beta
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel

from ws import console
from ws.analysis.geometry import (
    Cosines,
    Rows,
    Vector,
    cosine_rows,
    cosines,
    heat_map,
    inner_products,
    labels,
    open_vector,
    pair_rows,
    plain_weight,
)
from ws.delta import LinearDelta
from ws.diff import PEFT_WEIGHTS, SteeringVector, vector_digest
from ws.errors import DamagedError, WsError
from ws.files.plots import save_svg
from ws.files.reading import kept
from ws.files.runs import atomic_file, finished_runs, lock, read_csv, read_values, sha256_file, slug, write_csv
from ws.files.tensors import read_tensors
from ws.lm.models import fingerprint, layer_of, load_model
from ws.options.make import SIGNED
from ws.options.use import SubspaceOptions as SubspaceOptions
from ws.run import FinishedRun, open_options

SHARES = ("left_top", "left_bottom", "right_top", "right_bottom", "readout_weak")
# What modules that write to the residual stream are called in transformers.
WRITERS = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2")


# ---- one matrix -----------------------------------------------------------------------------------------------------


def singular_values(delta: LinearDelta, weight: Tensor) -> Float[Tensor, "n"]:
    """The singular values of the change of `W`, largest first, float64; of the small core where it is low-rank."""
    if delta.is_low_rank and delta.u is not None and delta.v is not None and delta.rank < min(delta.d_out, delta.d_in):
        left, right = (torch.linalg.qr(t.double())[1] for t in (delta.u, delta.v.T))
        return torch.linalg.svdvals(left @ right.T)
    return torch.linalg.svdvals(delta.dense(weight)).cpu().double()


def effective_rank(s: Float[Tensor, "n"]) -> float:
    """`exp(-sum_i w_i log w_i)` with `w_i = s_i^2 / sum_j s_j^2`: the number of equal directions of the same entropy.

    Roy & Vetterli (2007, "The effective rank") normalise the singular values; this variant normalises their squares,
    the energies, and is never larger. 0 for a zero matrix.
    """
    if not s.any():
        return 0.0
    w = s.double().square() / s.double().square().sum()
    return float(torch.special.entr(w).sum().exp())


def stable_rank(s: Float[Tensor, "n"]) -> float:
    """`||A||_F^2 / ||A||_2^2`, 0 for a zero matrix."""
    return float(s.double().square().sum() / s.double().square().max()) if s.any() else 0.0


@dataclass(frozen=True)
class Share:
    """A share of energy beside its null.

    Attributes:
        value: between 0 and 1.
        null_mean, null_sd: of the null of the module's docstring.
    """

    value: float
    null_mean: float
    null_sd: float

    @property
    def z(self) -> float:
        """Standard deviations from the null's mean; 0 where the null has no spread."""
        return (self.value - self.null_mean) / self.null_sd if self.null_sd > 0 else 0.0

    @property
    def p(self) -> float:
        """Two-sided; see `beta_p`."""
        return float(beta_p(np.array([self.value]), self.null_mean, self.null_sd)[0])


def beta_p(shares: Float[np.ndarray, "n"], mean: float | int, sd: float | int) -> Float[np.ndarray, "n"]:
    """Two-sided p-values from the Beta distribution with these moments; 1 where there is no spread."""
    if sd <= 0:
        return np.ones_like(shares)
    total = mean * (1 - mean) / sd**2 - 1
    a, b = total * mean, total * (1 - mean)
    return np.minimum(1.0, 2 * np.minimum(beta.cdf(shares, a, b), beta.sf(shares, a, b)))


def haar_null(k: int, d: int, concentration: float) -> tuple[float, float]:
    """Mean and standard deviation of the share in `k` of `d` directions of a randomly turned matrix.

    `concentration` is `sum_i w_i^2` of its energies, 1 for rank 1 and `1 / d` for `d` equal singular values.
    """
    variance = 2 * k * (d - k) / (d**2 * (d + 2))
    return k / d, sqrt(variance * max(0.0, d * concentration - 1) / (d - 1)) if d > 1 else 0.0


# ---- the base, decomposed once --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """A thin SVD `W = u diag(s) v^T`, largest singular value first, float32."""

    u: Float[Tensor, "d_out n"]
    s: Float[Tensor, "n"]
    v: Float[Tensor, "d_in n"]


class BaseSpectra:
    """SVDs of a model's weights, computed once per model and read from disk afterwards, one module at a time.

    Args:
        model: the base.
        out: they are kept in `out/base/<model>/svd-<fingerprint>/`, a file per module: for a `[d_out, d_in]` weight
            `4 min(d_out, d_in) (d_out + d_in + 1)` bytes, between four and eight for every weight.
    """

    def __init__(self, model: PreTrainedModel, out: Path) -> None:
        self.model = model
        self.folder = out / "base" / slug(str(model.name_or_path)) / f"svd-{fingerprint(model)}"

    def of(self, name: str) -> Spectrum:
        """The SVD of a linear module's weight."""

        def decompose() -> dict[str, Tensor]:
            weight = plain_weight(name, self.model.get_submodule(name))
            u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
            return {"u": u, "s": s, "v": vh.T}

        return Spectrum(**self._kept(name, {"u", "s", "v"}, decompose))

    def readout(self) -> Float[Tensor, "hidden hidden"] | None:
        """Right singular vectors of the unembedding as columns, weakest first; None for a model without one.

        From the eigenvectors of `E^T E` in float64, which is as small as the hidden size; `E [vocabulary, hidden]`.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            return None

        def decompose() -> dict[str, Tensor]:
            parts = plain_weight("the unembedding", head).cpu().split(8192)
            gram = torch.stack([e.double().T @ e.double() for e in parts]).sum(dim=0)
            return {"v": torch.linalg.eigh(gram).eigenvectors}

        return self._kept("unembedding", {"v"}, decompose)["v"]

    def _kept(self, name: str, names: Set[str], decompose: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self.folder / f"{name}.safetensors"
        with lock(self.folder):  # runs side by side need the same ones: one computes them, the others wait
            tensors = kept(file, partial(_read_spectrum, names=names))
            if tensors is None:
                tensors = {k: t.float().cpu().contiguous() for k, t in decompose().items()}
                with atomic_file(file) as part:
                    save_file(tensors, part)
        return {k: t.to(self.model.device) for k, t in tensors.items()}


def _read_spectrum(file: Path, names: Set[str]) -> dict[str, Tensor]:
    tensors = read_tensors(file)
    if tensors.keys() != names:
        raise DamagedError(f"{file} holds other tensors than {', '.join(sorted(names))}; make it again.")
    return tensors


# ---- a vector -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleSubspace:
    """Where the change of one module's weight lies; its bias is left out.

    Attributes:
        module, layer, kind: its name, its decoder layer (None outside the layers), the last part of its name.
        k: how many directions a share counts.
        energy, weight_energy: `||dW||^2` and `||W||^2`.
        effective_rank, stable_rank: of dW.
        shares: by name, see `SHARES`; `readout_weak` only where it is defined, none at all for a zero change.
    """

    module: str
    layer: int | None
    kind: str
    k: int
    energy: float
    weight_energy: float
    effective_rank: float
    stable_rank: float
    shares: Mapping[str, Share]


def measure_subspaces(
    vector: SteeringVector, model: PreTrainedModel, spectra: BaseSpectra, k: int | None = None, part: float = 0.1
) -> list[ModuleSubspace]:
    """The measures of every changed module, one module at a time.

    Modules that share one change (tied weights) are measured once, by the first one's name.

    Args:
        k: directions per share; None for `part` of the smaller dimension of each module, at least 1.

    Raises:
        WsError: a vector of another base, a zero vector, more directions than half of what there is, quantised weights.
    """
    if vector.is_zero:
        raise WsError("The steering vector is zero: it lies nowhere.")
    single, weak = vector.single, spectra.readout()
    matched = [m for m in vector.matched(model) if m[0] in single]
    for name, delta, _ in matched:
        _count(name, min(delta.d_out, delta.d_in), k, part)
    measured = []
    for name, delta, module in console.progress(matched, desc="subspaces", unit="module"):
        kind = name.rsplit(".", 1)[-1]
        writes = weak is not None and kind in WRITERS and delta.d_out == weak.shape[0]
        readout = weak[:, : _count(name, delta.d_out, k, part)] if weak is not None and writes else None
        count = _count(name, min(delta.d_out, delta.d_in), k, part)
        weight = plain_weight(name, module)
        measured.append(_measure(name, delta, weight, spectra.of(name), count, readout))
    return measured


def _count(name: str, directions: int, k: int | None, part: float) -> int:
    count = max(1, round(part * directions)) if k is None else k
    if not 1 <= count <= max(1, directions // 2):
        wish = f"--part {part}" if k is None else f"--k {k}"
        raise WsError(
            f"{wish} is out of range for {name}, which has {directions} singular directions; take at least 1 and at "
            "most half of them, so that the strongest and the weakest do not overlap."
        )
    return count


def _measure(
    name: str, delta: LinearDelta, weight: Tensor, base: Spectrum, k: int, readout: Tensor | None
) -> ModuleSubspace:
    matrix = replace(delta, bias=None)
    s, dense = singular_values(matrix, weight), matrix.dense(weight).float()
    energy = float(s.square().sum())
    shares = {}
    if energy > 0:
        concentration = float(s.square().square().sum()) / energy**2
        sides = {"left_top": base.u[:, :k], "left_bottom": base.u[:, -k:]}
        sides |= {} if readout is None else {"readout_weak": readout}
        shares = {n: _share(b, dense, concentration) for n, b in sides.items()}
        inner = {"right_top": base.v[:, :k], "right_bottom": base.v[:, -k:]}
        shares |= {n: _share(b, dense.T, concentration) for n, b in inner.items()}
    size = float(weight.float().norm()) ** 2
    ranks = (effective_rank(s), stable_rank(s))
    return ModuleSubspace(name, layer_of(name), name.rsplit(".", 1)[-1], k, energy, size, *ranks, shares)


def _share(basis: Tensor, dense: Tensor, concentration: float) -> Share:
    """The share of the energy of `dense [d, _]` in the columns of `basis [d, k]`."""
    value = float((basis.T @ dense).norm()) ** 2 / float(dense.norm()) ** 2
    return Share(min(1.0, value), *haar_null(basis.shape[1], basis.shape[0], concentration))


# ---- tables ---------------------------------------------------------------------------------------------------------


def pooled_share(parts: Sequence[ModuleSubspace], name: str) -> Share | None:
    """The share over several modules, weighted by their energies, whose directions the null turns independently."""
    here = [m for m in parts if name in m.shares]
    if not here:
        return None
    weights = np.array([m.energy for m in here]) / sum(m.energy for m in here)
    values, means, sds = np.array(
        [(m.shares[name].value, m.shares[name].null_mean, m.shares[name].null_sd) for m in here]
    ).T
    return Share(float(weights @ values), float(weights @ means), float(np.linalg.norm(weights * sds)))


def _columns(parts: Sequence[ModuleSubspace]) -> dict[str, Any]:
    """The columns that modules and groups of modules share; ranks of a group are means over its modules."""
    energy, size = sum(m.energy for m in parts), sum(m.weight_energy for m in parts)
    columns: dict[str, Any] = {"norm": sqrt(energy), "relative_norm": sqrt(energy / size)}
    columns["effective_rank"] = float(np.mean([m.effective_rank for m in parts]))
    columns["stable_rank"] = float(np.mean([m.stable_rank for m in parts]))
    for name in SHARES:
        share = pooled_share(parts, name)
        numbers = [None] * 5 if share is None else [share.value, share.null_mean, share.null_sd, share.z, share.p]
        suffixes = ("", "_null", "_null_sd", "_z", "_p")
        columns |= {f"{name}{suffix}": x for suffix, x in zip(suffixes, numbers, strict=True)}
    return columns


def per_layer_rows(key: Mapping[str, Any], parts: Sequence[ModuleSubspace]) -> Rows:
    """Rows of `subspace_per_layer.csv`, one per module."""
    return [{**key, "layer": m.layer, "kind": m.kind, "module": m.module, "k": m.k} | _columns([m]) for m in parts]


def summary_rows(key: Mapping[str, Any], parts: Sequence[ModuleSubspace]) -> Rows:
    """Rows of `subspace_summary.csv`: the whole vector, every decoder layer, every module kind."""
    layers = sorted({m.layer for m in parts if m.layer is not None})
    groups: list[tuple[str, str | int, list[ModuleSubspace]]] = [("all", "all", list(parts))]
    groups += [("layer", layer, [m for m in parts if m.layer == layer]) for layer in layers]
    groups += [("kind", kind, [m for m in parts if m.kind == kind]) for kind in dict.fromkeys(m.kind for m in parts)]
    return [
        {**key, "scope": scope, "group": group, "n_modules": len(here)} | _columns(here)
        for scope, group, here in groups
    ]


def render_subspaces(rows: Sequence[Mapping[str, str]]) -> str:
    """`subspace_summary.csv`, read back, as a table for people."""
    head = ["", "norm", "relative", "eff. rank", "stable rank", *(name.replace("_", " ") for name in SHARES)]
    table = [
        [
            r["group"] if r["scope"] != "layer" else f"layer {r['group']}",
            f"{float(r['norm']):.3g}",
            f"{float(r['relative_norm']):.2%}",
            f"{float(r['effective_rank']):.1f}",
            f"{float(r['stable_rank']):.1f}",
            *(_share_text(r, name) for name in SHARES),
        ]
        for r in rows
    ]
    note = (
        "Shares of the energy of dW, in brackets z against random directions with the same singular values (mean\n"
        f"share {float(rows[0]['left_top_null']):.2f} of the outputs, {float(rows[0]['right_top_null']):.2f} of the "
        "inputs). Families that multiply W, or start from its SVD, are not random by construction."
    )
    return f"{tabulate(table, head, disable_numparse=True)}\n\n{note}"


def _share_text(row: Mapping[str, str], name: str) -> str:
    return f"{float(row[name]):.3f} ({float(row[f'{name}_z']):+.1f})" if row[name] else ""


def render_pair(rows: Sequence[Mapping[str, str]]) -> str:
    """`geometry.csv`, read back, as a table for people."""
    names = ("norm_pos", "norm_neg", "norm_dw", "cos_opposed", "norm_ratio", "drift_ratio", "cos_drift", "random_sd")
    head = ["layer", "|tau+|", "|tau-|", "|dW|", "cos(tau+, -tau-)", "ratio", "|M|/|b|", "|cos(dW, M)|", "random sd"]
    table = [[r["layer"], *(f"{float(r[n]):.3g}" if r[n] else "" for n in names)] for r in rows]
    return tabulate(table, head, disable_numparse=True)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_norms(parts: Sequence[ModuleSubspace], title: str) -> Figure:
    """Relative norms, layers by kinds, in percent."""
    layers = sorted({m.layer for m in parts if m.layer is not None})
    kinds = list(dict.fromkeys(m.kind for m in parts if m.layer is not None))
    values = np.full((len(kinds), len(layers)), np.nan)
    for m in parts:
        if m.layer is not None:
            values[kinds.index(m.kind), layers.index(m.layer)] = 100 * sqrt(m.energy / m.weight_energy)
    return heat_map(values, kinds, [f"layer {i}" for i in layers], title)


def draw_shares(parts: Sequence[ModuleSubspace], title: str) -> Figure:
    """The shares of every kind beside the null's mean and two standard deviations."""
    kinds = ["all", *dict.fromkeys(m.kind for m in parts)]
    figure = Figure(figsize=(11, 0.34 * len(kinds) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(SHARES), sharey=True)
    for axes, name in zip(panels, SHARES, strict=True):
        for row, kind in enumerate(kinds):
            share = pooled_share([m for m in parts if kind in ("all", m.kind)], name)
            if share is not None:
                low, high = max(0.0, share.null_mean - 2 * share.null_sd), share.null_mean + 2 * share.null_sd
                axes.barh(row, high - low, left=low, height=0.6, color="0.8", linewidth=0)
                axes.plot([share.null_mean] * 2, [row - 0.3, row + 0.3], color="0.5", linewidth=1)
                axes.plot(share.value, row, "o", color="tab:blue", markersize=5)
        axes.set_xlim(left=0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("share of the energy of dW; grey: random directions, mean and two standard deviations", fontsize=8)
    return figure


# ---- the command ----------------------------------------------------------------------------------------------------


def carry_out(options: SubspaceOptions) -> console.Result:
    """Measure a run unless exactly that is on disk, write its tables and pictures, and return what to show."""
    opened = open_options(options)
    with opened.run.alone("subspace"):
        return _carry_out(opened, options)


def _carry_out(opened: FinishedRun, o: SubspaceOptions) -> console.Result:
    folder, key = opened.run.folder, o.key
    arms = {side: folder / side for side in ("pos", "neg")}
    paired = all((arm / PEFT_WEIGHTS).is_file() for arm in arms.values())
    inputs = {"vector": vector_digest(opened.vector)}
    inputs |= {side: sha256_file(arm / PEFT_WEIGHTS) for side, arm in arms.items()} if paired else {}
    stage = opened.run.refresh("subspace", {"k": o.k, "part": o.part}, inputs)
    if stage is not None:
        written = _write_subspaces(opened, o, key | {"alpha": 1.0})
        written += _write_pair(opened, key | {"alpha": 1.0}) if paired else []
        stage.done(written)
    table, of_pair = folder / "subspace_summary.csv", folder / "geometry.csv"
    signed = opened.vector.info.get("contrast") == SIGNED
    gone = "The vector is of one signed adapter" if signed else "pos/ and neg/ are gone"
    pair = render_pair(read_csv(of_pair)) if paired else f"{gone}; nothing of the pair."
    data = {"rows": read_values(table), "pair": read_values(of_pair) if paired else []}
    text = f"{render_subspaces(read_csv(table))}\n\n{pair}"
    return console.Result(text, data, opened.run.outputs("subspace"))


def _write_subspaces(opened: FinishedRun, options: SubspaceOptions, key: Mapping[str, Any]) -> list[Path]:
    folder, spectra = opened.run.folder, BaseSpectra(opened.model, options.out)
    parts = measure_subspaces(opened.vector, opened.model, spectra, options.k, options.part)
    title = f"{key['behavior']}, {key['adapter']}, seed {key['seed']}"
    return [
        write_csv(folder / "subspace_per_layer.csv", per_layer_rows(key, parts)),
        write_csv(folder / "subspace_summary.csv", summary_rows(key, parts)),
        save_svg(draw_norms(parts, f"Size of dW in percent of W: {title}"), folder / "subspace_norms.svg"),
        save_svg(draw_shares(parts, f"Energy of dW along W: {title}"), folder / "subspace_shares.svg"),
    ]


def _write_pair(opened: FinishedRun, key: Mapping[str, Any]) -> list[Path]:
    pos, neg = (SteeringVector.from_adapter(opened.run.folder / side, opened.model) for side in ("pos", "neg"))
    rows = pair_rows(key, inner_products([pos, neg], opened.model))
    return [write_csv(opened.run.folder / "geometry.csv", rows)]


def compare_vectors(options: SubspaceOptions) -> console.Result:
    """Write `out/cosines.csv` and `cosines.svg`, and return the matrix to show."""
    folders = list(options.vectors) or finished_runs(options.out)
    if len(folders) < 2:
        where = f"below {options.out}" if options.all else "after --vectors"
        raise WsError(f"There are {len(folders)} vectors {where}; cosines need at least 2.")
    vectors: list[Vector] = [open_vector(folder) for folder in folders]
    model = None
    if not all(v.is_low_rank for v in vectors):
        model = load_model(options.model or vectors[0].base_id, options.device, options.dtype)[0]
    products, names = inner_products(vectors, model), labels(vectors, folders)
    matrix = cosines(products)
    for name, size in zip(names, matrix.norms, strict=True):
        if size == 0:
            raise WsError(f"The vector {name} is zero; it has no cosine with any other.")
    file = write_csv(options.out / "cosines.csv", cosine_rows(vectors, names, products, options.per_layer))
    picture = save_svg(
        heat_map(matrix.cosine, names, names, "Cosines of steering vectors", diverging=True), file.with_suffix(".svg")
    )
    data = {"vectors": names, "norms": matrix.norms, "cosines": matrix.cosine, "random_sd": matrix.random_sd}
    return console.Result(render_cosines(matrix, names), data, [file, picture])


def render_cosines(matrix: Cosines, names: Sequence[str]) -> str:
    """The matrix for people, with what chance gives beside it."""
    numbers = range(1, len(names) + 1)
    table = [
        [i, name, f"{size:.3g}", *(f"{x:+.2f}" for x in row)]
        for i, name, size, row in zip(numbers, names, matrix.norms, matrix.cosine, strict=True)
    ]
    off = matrix.random_sd[np.triu_indices(len(names), 1)]
    note = (
        f"Vectors of these singular values and random directions have cosines of 0, give or take {off.min():.2g} to "
        f"{off.max():.2g}\n(one standard deviation): an easy null, as unrelated directions are almost orthogonal."
    )
    return f"{tabulate(table, ['', 'vector', 'norm', *map(str, numbers)], disable_numparse=True)}\n\n{note}"


def main(options: SubspaceOptions) -> None:
    """The command `python -m ws.subspace`."""
    options.check()
    console.show(compare_vectors(options) if options.vectors or options.all else carry_out(options))


if __name__ == "__main__":
    console.run(main, SubspaceOptions, "python -m ws.subspace")
