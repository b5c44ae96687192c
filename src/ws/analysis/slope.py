"""The slope test: how a mean score begins to move with alpha, from gradients alone, and whether that is chance.

With `G_l` the gradient of the mean score in the steered weight `W_l`, and `h_l` that in its bias,

    d score / d alpha = sum_l <G_l, dW_l> + <h_l, db_l>          at alpha = 0

so one backward pass over the items replaces all steered runs, and says which modules carry the effect. The inner
products are taken with the coordinates of `dW_l` (see `ws.delta`), one module at a time:

    <G, diag(g) W> = sum_i g_i (G*W)_i.     <G, W diag(c)> = sum_j c_j (G*W)_.j     <G, U V> = sum (G V^T) * U
    <G, W blockdiag(D)^T> = sum_k <G_k^T W_k, D_k>                                  <G, E> = sum G * E

**The null** is the slope along `ws.analysis.controls.random_like`: random directions with the same coordinates and
norms. Their parts are independent and symmetric, so the slope has mean 0 and its variance is a sum over modules and
coordinates. For a part `R` of norm 1 that is made of independent standard normal `n_i`,

    <G, R> = sum_i a_i n_i / sqrt(sum_i w_i n_i^2)          Var <G, R> = sum_i a_i^2 E[n_i^2 / sum_j w_j n_j^2]

    coordinate    a                                w
    g             (G*W)_i.                         ||W_i.||^2
    c             (G*W)_.j                         ||W_.j||^2
    D (skew)      sqrt(2) (A - A^T)_ij, i < j      2 (l_i + l_j)
    bias          h_i                              1

with `A = G_k^T W_k` in the eigenbasis of `W_k^T W_k`, whose eigenvalues are `l`. The law of a random `U V` does not
change when either side is rotated, so its entries are uncorrelated and of one size, as those of a dense `E` are:
`Var = ||G||_F^2 / (d_out d_in)` at any rank. A sum over many modules is close to Gaussian, which gives z and p. Where
one low-rank module has most of the variance the tails are heavier: 6 draws in 1,000 beyond |z| = 3.3 at rank 8, where
a Gaussian has 1.

**This null is easy to beat.** Whatever was trained on text has more to do with a gradient than noise has. A small p
says that the vector is not noise, not that it does what it is named after; for that there are the harder nulls of
`ws.analysis.controls`. And a slope is local: it does not know where the dose-response curve bends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import quad
from scipy.stats import norm
from tabulate import tabulate
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.analysis.controls import coordinate_parts, headline_evaluations
from ws.delta import LinearDelta, in_float64
from ws.diff import SteeringVector, vector_digest
from ws.errors import WsError
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import MeanOfAnswers, MeanOfChoices, Rows
from ws.eval.prompts import notes_by_score
from ws.eval.suite import scores_of, set_notes
from ws.files.runs import read_csv, read_values, write_csv
from ws.intervene.gradient import MeanScore, WeightGradient, groups_of, score_gradients
from ws.lm.choice import _batches, _families, _score_batch, choice_variants
from ws.lm.likelihood import answer_logp
from ws.lm.models import encode, layer_of, linear_size, render_prompt, weight_of
from ws.options.check import SlopeOptions as SlopeOptions

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---- scores that can be differentiated ------------------------------------------------------------------------------


def mean_score(model: PreTrainedModel, tok: Tokenizer, mean: MeanOfChoices | MeanOfAnswers) -> MeanScore:
    """A headline score's mean as its evaluation describes it (`Evaluation.means`), over batches.

    Raises:
        WsError: it is over nothing.
    """
    if not mean.weights:
        raise WsError(f"There are no items to take the slope of {mean.key} over.")
    parts = _choice_parts(model, tok, mean) if isinstance(mean, MeanOfChoices) else _answer_parts(model, tok, mean)
    return MeanScore(mean.key, mean.n, parts)


def _choice_parts(
    model: PreTrainedModel, tok: Tokenizer, mean: MeanOfChoices
) -> Callable[[int], Iterator[Float[Tensor, ""]]]:
    families = _families(model, [encode(tok, render_prompt(tok, q, opener=o)) for q, o in mean.asked])
    families.sort(key=lambda f: f.longest())
    variants = choice_variants(tok, mean.choices, model.device)

    def parts(batch_size: int) -> Iterator[Tensor]:
        for batch in _batches(families, batch_size):
            logp = _score_batch(model, tok.pad_token_id, batch, variants)
            weights = [mean.weights[i] for f in batch for i in f.rows]
            share = torch.tensor(weights, device=logp.device, dtype=logp.dtype)
            yield (share * mean.transform(logp[:, 0] - logp[:, 1])).sum()

    return parts


def _answer_parts(
    model: PreTrainedModel, tok: Tokenizer, mean: MeanOfAnswers
) -> Callable[[int], Iterator[Float[Tensor, ""]]]:
    prompts, answers = mean.prompts, mean.answers
    order = sorted(range(len(prompts)), key=lambda i: max(map(len, answers[i])))

    def parts(batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            scored = answer_logp(model, tok.pad_token_id, [prompts[i] for i in part], [answers[i] for i in part])
            margins = torch.stack([first.mean() - second.mean() for first, second in scored])
            share = torch.tensor([mean.weights[i] for i in part], device=margins.device, dtype=margins.dtype)
            yield (share * margins).sum()

    return parts


# ---- the test -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleSlope:
    """One module's part of the slope.

    Attributes:
        module: its name.
        layer: its decoder layer, None outside the layers.
        slope: the part.
        share: of the sum of all parts' absolute values; keeps the part's sign.
        std: the null's standard deviation.
    """

    module: str
    layer: int | None
    slope: float
    share: float
    std: float


@dataclass(frozen=True)
class SlopeTest:
    """The slope of a mean score in alpha at 0, beside that of random directions of the same size.

    Attributes:
        score: the name of the score.
        n: over how many items.
        value: the mean score itself, without steering.
        slope: `d score / d alpha` at 0, in the score's unit per unit of alpha.
        std: the null's standard deviation (its mean is 0).
        z, p: `slope / std` and its two-sided Gaussian p-value. The null is easy to beat; see the module's docstring.
        per_module: the parts.
    """

    score: str
    n: int
    value: float
    slope: float
    std: float
    z: float
    p: float
    per_module: tuple[ModuleSlope, ...]

    @property
    def per_layer(self) -> dict[int | None, float]:
        """The slope by decoder layer."""
        layers = dict.fromkeys(m.layer for m in self.per_module)
        return {layer: sum(m.slope for m in self.per_module if m.layer == layer) for layer in layers}


def slope_test(
    model: PreTrainedModel, vector: SteeringVector, score: MeanScore, batch_size: int | None = None
) -> SlopeTest:
    """Test the slope of `score` along `vector`; see the module's docstring and `ws.intervene.gradient`.

    Raises:
        WsError: a vector that is zero or of another base, quantised weights, or a score that no changed module affects.
    """
    if vector.is_zero:
        raise WsError("The steering vector is zero: its slope is zero for any score.")
    changed = [name for name, delta, _ in vector.matched(model) if not delta.is_zero]  # one of zero has no slope
    for name in changed:
        _check_plain(name, model.get_submodule(name))
    value, slopes = 0.0, dict[str, tuple[float, float]]()
    for group in groups_of(model, changed):
        gradients = score_gradients(model, group, score, batch_size)
        value = gradients.value
        slopes |= module_slopes(model, {n: vector.deltas[n] for n in group}, gradients.by_module)
    return _tested(score, value, slopes)


def module_slopes(
    model: PreTrainedModel, deltas: Mapping[str, LinearDelta], gradients: Mapping[str, WeightGradient]
) -> dict[str, tuple[float, float]]:
    """`(slope, null variance)` of every change; the gradients may serve any number of vectors."""
    return {n: _of_module(delta, gradients[n], weight_of(model.get_submodule(n))) for n, delta in deltas.items()}


def _tested(score: MeanScore, value: float, slopes: Mapping[str, tuple[float, float]]) -> SlopeTest:
    slope, std = sum(s for s, _ in slopes.values()), sqrt(sum(v for _, v in slopes.values()))
    if std == 0:
        raise WsError(f"The score {score.name} does not depend on any module that the vector changes.")
    whole = sum(abs(s) for s, _ in slopes.values()) or 1.0
    rows = [ModuleSlope(name, layer_of(name), s, s / whole, sqrt(v)) for name, (s, v) in slopes.items()]
    z = slope / std
    return SlopeTest(score.name, score.n, value, slope, std, z, float(2 * norm.sf(abs(z))), tuple(rows))


def _check_plain(name: str, module: nn.Module) -> None:
    if linear_size(module) is None:
        raise WsError(f"The slope is that of linear layers, and the vector changes {name}; leave it out with `select`.")
    weight = weight_of(module)
    if weight.dtype not in _PLAIN_DTYPES or tuple(weight.shape) != linear_size(module):
        raise WsError(
            f"The slope needs plain weights, but {name} stores {str(weight.dtype)[6:]} of shape {tuple(weight.shape)}; "
            "load the model unquantised."
        )


# ---- one module -----------------------------------------------------------------------------------------------------


def _of_module(delta: LinearDelta, gradient: WeightGradient, weight: Tensor) -> tuple[float, float]:
    """`<G, dW>` and its variance under `random_like`, bias included.

    The draw's parts have the norms of the original's; the whole is then scaled to its norm, which the parts' inner
    products make differ from the root of the sum of squares. Those of a random draw vanish but for `O(1 / d)`.
    """
    g, h, w = map(in_float64, (gradient.weight, gradient.bias, weight))
    whole = delta.to(w.device, torch.float64)
    slope = variance = squares = 0.0
    for part in coordinate_parts(whole):
        along, spread = _of_part(part, g, h, w)
        square = part.inner(part, w)
        slope, variance, squares = slope + along, variance + square * spread, squares + square
    return slope, variance * whole.inner(whole, w) / squares if squares else 0.0


def _of_part(part: LinearDelta, g: Tensor, h: Tensor, w: Tensor) -> tuple[float, float]:
    """`<G, part>`, and the variance of `<G, R>` over random parts `R` of this kind with norm 1."""
    if part.g is not None:
        along = (g * w).sum(dim=1)
        return float(along @ part.g), _ratio_variance(along, w.square().sum(dim=1))
    if part.c is not None:
        along = (g * w).sum(dim=0)
        return float(along @ part.c), _ratio_variance(along, w.square().sum(dim=0))
    if part.d is not None:
        return _of_rotations(part.d, g, w)
    if part.bias is not None:
        return float(h @ part.bias), float(h.square().mean())
    if part.e is not None:
        return float((g * part.e).sum()), float(g.square().mean())
    assert part.u is not None, "a part has coordinates of one kind"
    assert part.v is not None, "factors come in pairs"
    return float(((g @ part.v.T) * part.u).sum()), float(g.square().mean())


def _of_rotations(d: Float[Tensor, "k b b"], g: Tensor, w: Tensor) -> tuple[float, float]:
    """The two numbers of `_of_part` for `W blockdiag(D)^T`.

    A Gaussian skew matrix has the same law in any orthonormal basis, and in the eigenbasis of `W_k^T W_k` the norm of
    `W_k D_k^T` is a weighted sum of squares: the table in the module's docstring.
    """
    k, b, _ = d.shape
    g_blocks, w_blocks = g.unflatten(1, (k, b)), w.unflatten(1, (k, b))
    a = torch.einsum("oki,okj->kij", g_blocks, w_blocks)
    values, basis = torch.linalg.eigh(torch.einsum("oki,okj->kij", w_blocks, w_blocks))
    turned = basis.mT @ a @ basis
    i, j = torch.triu_indices(b, b, offset=1, device=d.device)
    along = sqrt(2) * (turned - turned.mT)[:, i, j]
    return float((a * d).sum()), _ratio_variance(along.flatten(), 2 * (values[:, i] + values[:, j]).flatten())


def _ratio_variance(a: Float[Tensor, "n"], weights: Float[Tensor, "n"]) -> float:
    """`sum_i a_i^2 E[n_i^2 / sum_j w_j n_j^2]` for independent standard normal `n`, the variance of `a.n / ||n||_w`.

    From `1 / S = int_0^inf exp(-t S) dt`, with the Gaussian integrals done and `t = e^s`:

        int e^s  sum_i a_i^2 / (1 + 2 t w_i)  prod_j (1 + 2 t w_j)^(-1/2)  ds
    """
    squares, w = a.square().cpu().numpy(), weights.clamp(min=0).cpu().numpy()
    size, scale = float(squares.sum()), float(w.sum())
    if size == 0 or scale == 0:
        return 0.0
    squares, w = squares / size, w / scale

    def integrand(s: float) -> float:
        t = 2 * exp(s) * w
        return float((squares / (1 + t)).sum() * exp(s - 0.5 * float(np.log1p(t).sum())))

    return quad(integrand, -30, 60, points=[0.0], limit=500, epsabs=0)[0] * size / scale


# ---- the command ----------------------------------------------------------------------------------------------------


def carry_out(context: EvalContext, options: SlopeOptions) -> console.Result:
    """Test every score unless exactly that is on disk, write both tables, and return what to show."""
    options = replace(options, scores=scores_of(options.scores, context.behavior))
    evaluations = headline_evaluations(context, options)
    settings = {"scores": list(options.scores), "evaluations": [e.identity for e in evaluations]}
    settings |= context.reading
    files = [context.run.folder / f"{name}.csv" for name in ("slope", "slope_per_module")]
    with context.run.alone("slope"):
        stage = context.run.refresh("slope", settings, {"vector": vector_digest(context.vector)})
        if stage is not None:
            rows, parts = Rows(), Rows()
            for evaluation in evaluations:
                for mean in evaluation.means(context.tok, options.scores):
                    score = mean_score(context.model, context.tok, mean)
                    console.say(f"slope of {score.name}, {score.n} items")
                    test = slope_test(context.model, context.vector, score, options.batch_size)
                    rows.append(summary_row(context.key, test) | evaluation.brief)
                    parts += [row | evaluation.brief for row in per_module_rows(context.key, test)]
            tables = zip(files, (with_every_column(rows), with_every_column(parts)), strict=True)
            stage.done([write_csv(file, table) for file, table in tables])
        return console.Result(render(*map(read_csv, files)), {"rows": read_values(files[0])}, files)


def with_every_column(rows: Rows) -> Rows:
    """The rows with the columns of all of them, empty where a row has none: evaluations say different facts."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [columns | row for row in rows]


def summary_row(key: Mapping[str, Any], test: SlopeTest) -> dict[str, Any]:
    """One row of `slope.csv`; `base` is the score without steering."""
    numbers = {"slope": test.slope, "null_std": test.std, "z": test.z, "p": test.p, "n": test.n, "base": test.value}
    return {**key, "score": test.score} | numbers


def per_module_rows(key: Mapping[str, Any], test: SlopeTest) -> Rows:
    """Rows of `slope_per_module.csv`."""
    return [
        {
            **key,
            "score": test.score,
            "module": m.module,
            "layer": m.layer,
            "slope": m.slope,
            "share": m.share,
            "null_std": m.std,
        }
        for m in test.per_module
    ]


def render(summary: Sequence[Mapping[str, str]], parts: Sequence[Mapping[str, str]]) -> str:
    """Both tables, read from their files, for people: the tests, and the slopes by layer."""
    numbers = ("base", "slope", "null_std", "z")
    rows = [[r["score"], r["n"], *(f"{float(r[k]):+.4g}" for k in numbers), _p_text(float(r["p"]))] for r in summary]
    tests = tabulate(rows, ["score", "n", "base", "slope", "null sd", "z", "p"], disable_numparse=True)
    layers = dict.fromkeys(r["layer"] for r in parts)
    names = [r["score"] for r in summary]
    by_layer = [[layer, *(_layer_sum(parts, name, layer) for name in names)] for layer in layers]
    table = tabulate(by_layer, ["layer", *names], disable_numparse=True)
    note = "The null, random vectors of the same size, is easy to beat: a small p says no more than `not noise`."
    return "\n".join([tests, "", "Slope by layer:", "", table, "", note, *notes_by_score(summary), *set_notes(summary)])


def _p_text(p: float) -> str:
    """Far out in its tails the null is no longer Gaussian, so nothing smaller is claimed."""
    return "< 1e-09" if p < 1e-9 else f"{p:.2g}"


def _layer_sum(parts: Sequence[Mapping[str, str]], score: str, layer: str) -> str:
    return f"{sum(float(r['slope']) for r in parts if r['score'] == score and r['layer'] == layer):+.4g}"


def main(options: SlopeOptions) -> None:
    """The command `ws check slope`."""
    console.show(carry_out(open_context(options.eval_options()), options))


if __name__ == "__main__":
    console.run(main, SlopeOptions, "ws check slope")
