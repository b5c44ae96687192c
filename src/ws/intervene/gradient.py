"""Gradients of what a model says in its weights, and that of the contrast as a vector: steering without training.

With `L+` and `L-` the mean loss of a response token over the positive and the negative answers of contrast pairs, as
training has it (`ws.train`), and `W_m` the weight of a linear layer that the adapters would train,

    G_m = - d(L+ - L-) / dW_m            at the base

so that `W + alpha G` makes positive answers likelier than negative ones, by `alpha ||G||_F^2` nats a token at first.
It is what full fine-tuning arrives at in one step: two arms that take one step of gradient descent over all of their
examples, at rate `eta`, differ by exactly `eta G` (of task vectors: Zhou et al. 2025, arXiv 2508.16082). Its best
approximation of rank `r` in the Frobenius norm (Eckart & Young 1936), `sum_(i <= r) s_i u_i v_i^T` of the singular
value decomposition of every `G_m`, has the size of a LoRA.
Biases, norms and embeddings are not touched.

No parameter has to require a gradient, and of the pairs only sums are kept: 4 bytes per weight of the layers of one
pass, of which there are several where a model is large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.console import progress
from ws.data import Pair, question_keys
from ws.delta import LinearDelta, approximation_errors
from ws.diff import SteeringVector
from ws.errors import WsError, choose
from ws.files.runs import sha256_json
from ws.lm.batches import with_batch_size
from ws.lm.likelihood import answer_logp, most_at_once
from ws.lm.models import (
    fingerprint,
    is_packed,
    layer_count,
    linear_size,
    model_id,
    require_calls,
    require_gradients,
    weight_of,
)
from ws.options.make import CONTRASTS, SIGNED, TrainConfig
from ws.steer import uncompiled

Answer = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens of a prompt and of the response to it
START_BATCH = 32
# Bytes of float32 gradients that are held at once; layers that need more are done in several passes.
_BUDGET = 4 * 2**30


# ---- of any mean score ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanScore:
    """The mean of a differentiable score over `n` items.

    Attributes:
        name: what is averaged.
        n: the number of items.
        parts: given a batch size, yields scalars with their graphs whose sum is the mean.
    """

    name: str
    n: int
    parts: Callable[[int], Iterator[Float[Tensor, ""]]]


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of a mean score in one linear layer, float32 (float64 in a float64 model).

    Attributes:
        weight: in `W`, `[d_out, d_in]`.
        bias: in the bias, whether or not the layer has one, `[d_out]`.
    """

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, "d_out"]


@dataclass(frozen=True)
class ScoreGradients:
    """A mean score of the model as it stands, and its gradients.

    Attributes:
        value: the mean score.
        by_module: per module name.
    """

    value: float
    by_module: Mapping[str, WeightGradient]


class _Tap:
    """Records a linear module's inputs, and adds a zero to its outputs whose gradient is that of the output.

    `dscore/dW = sum over positions of dscore/dy x^T`, so no parameter has to require a gradient, sums run in float32
    whatever the model's dtype, and a weight that two modules share is told apart.
    """

    def __init__(self, module: nn.Module) -> None:
        weight, (d_out, d_in) = weight_of(module), _size(module)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.weight = torch.zeros(d_out, d_in, dtype=dtype, device=weight.device)
        self.bias = torch.zeros(d_out, dtype=dtype, device=weight.device)
        self.inputs: list[Tensor] = []
        self.probes: list[Tensor] = []
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probe = torch.zeros_like(output, requires_grad=True)
        self.inputs.append(args[0].detach())
        self.probes.append(probe)
        return output + probe

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Add what one backward pass gave for the probes, and forget the pass."""
        for x, gradient in zip(self.inputs, gradients, strict=True):
            if gradient is not None:
                g = gradient.flatten(0, -2).to(self.weight.dtype)
                self.weight += g.T @ x.flatten(0, -2).to(self.weight.dtype)
                self.bias += g.sum(dim=0)
        self.inputs, self.probes = [], []


@contextmanager
def _tapped(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Tap]]:
    modules, taps = dict(model.named_modules()), dict[str, _Tap]()
    advice = "their gradients are unknown; leave them out, with `vector.select` or --modules in training"
    try:
        for name in names:
            taps[name] = _Tap(modules[name])
        with uncompiled(), require_calls(model, {name: modules[name] for name in names}, advice):
            yield taps
    finally:
        for tap in taps.values():
            tap.handle.remove()


def score_gradients(
    model: PreTrainedModel, names: Sequence[str], score: MeanScore, batch_size: int | None = None
) -> ScoreGradients:
    """The mean score and its gradients in the named linear modules, over as many batches as needed.

    Nothing in the model changes: no `requires_grad`, no `.grad`, no weight. Inside `ws.steer` the gradients are those
    at that strength. Needs 4 bytes per weight of the named modules, and the activations of one batch.

    Args:
        batch_size: prompts at a time; None starts at 32 and takes fewer while memory does not suffice.

    Raises:
        WsError: a model that torch has no gradient for, or a score or gradient that is not finite.
    """

    def run(batch_size: int) -> ScoreGradients:
        value = 0.0
        watched = require_gradients(model, "take modules that lie behind it"), _tapped(model, names)
        with torch.inference_mode(False), torch.enable_grad(), watched[0], watched[1] as taps:
            for part in score.parts(batch_size):
                value += float(part.detach())
                probes = [p for tap in taps.values() for p in tap.probes]
                grads = iter(torch.autograd.grad(part, probes, allow_unused=True))
                for tap in taps.values():
                    tap.take([next(grads) for _ in tap.probes])
        return ScoreGradients(value, {n: WeightGradient(t.weight, t.bias) for n, t in taps.items()})

    gradients = with_batch_size(run, batch_size, START_BATCH)
    if not np.isfinite(gradients.value) or not all(
        torch.isfinite(g.weight).all() for g in gradients.by_module.values()
    ):
        raise WsError(f"The score {score.name} or its gradient is NaN or infinite; the model's weights are broken.")
    return gradients


def groups_of(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The named linear modules in order, in groups whose gradients fit into the budget."""
    groups, size = list[list[str]](), _BUDGET
    for name in names:
        d_out, d_in = _size(model.get_submodule(name))
        size += 4 * d_out * d_in
        if size > _BUDGET:
            groups.append([])
            size = 4 * d_out * d_in
        groups[-1].append(name)
    return groups


def _size(module: nn.Module) -> tuple[int, int]:
    size = linear_size(module)
    assert size is not None, "whoever asks has seen that the module is linear"
    return size


# ---- of the contrast ------------------------------------------------------------------------------------------------


def contrast_gradient(
    model: PreTrainedModel,
    tok: Tokenizer,
    pairs: Sequence[Pair],
    modules: Sequence[str],
    config: TrainConfig | None = None,
    seed: int = 0,
    contrast: str = "arms",
    rank: int | None = None,
    batch_size: int | None = None,
) -> SteeringVector:
    """`G` of the module's equation as a vector: one pass over the examples that training would learn from.

    Args:
        model: the base.
        tok: its tokenizer.
        pairs: contrast pairs; those with a `drop` reason are skipped.
        modules: names of the linear layers, such as those of a trained vector's `deltas`.
        config, seed, contrast: of the training whose examples are taken (`ws.train.train_adapter`): those of its
            validation questions and those that are too long are left out.
        rank: keep so many singular directions of every layer; the recipe records the errors. Whole matrices unless
            given, of 4 bytes per weight.
        batch_size: answers per forward pass; None starts at 32 and takes fewer while memory does not suffice.

    Raises:
        WsError: no usable pairs, the same answers on both sides, a module that is not linear, a model that torch has no
            gradient for, or a gradient that is not finite.
    """
    choose("contrast", contrast, CONTRASTS)
    if rank is not None and rank < 1:
        raise WsError(f"Rank must be at least 1, not {rank}.")
    known = dict(model.named_modules())
    for name in modules:
        if name not in known or linear_size(known[name]) is None:
            raise WsError(f"{name} is no linear layer of this model; the gradient of the contrast is taken in those.")
    config = config or TrainConfig()
    positive, negative = _examples(tok, pairs, config, seed)
    if sorted(positive) == sorted(negative):
        raise WsError("The positive and the negative answers are the same, so their contrast has no gradient.")
    score = _contrast(model, tok, positive, negative)
    value, deltas, approximation = _directions(model, modules, score, rank, batch_size)
    recipe = {"gradient": "of the contrast at the base", "contrast": contrast, "value": value, "seed": seed}
    recipe |= {"examples": score.n, "validation": config.validation, "max_length": config.max_length}
    recipe |= {"pairs_sha256": sha256_json([p.as_row() for p in pairs])}
    recipe |= {"questions": " ".join(sorted(question_keys(pairs)))}  # strengths are calibrated on others
    recipe |= approximation
    base_fingerprint = None if is_packed(model) else fingerprint(model)
    info = {"family": "gradient", "depth": layer_count(model)}
    vector = SteeringVector(deltas, model_id(model), base_fingerprint, recipe, info)
    if vector.is_zero:
        raise WsError("No gradient of the contrast arrives at any of these modules; take modules that lie behind them.")
    return vector


def _directions(
    model: PreTrainedModel, modules: Sequence[str], score: MeanScore, rank: int | None, batch_size: int | None
) -> tuple[float, dict[str, LinearDelta], dict[str, Any]]:
    """The score, its gradients as changes on the CPU, and what the recipe says of a rank.

    One group of modules after the other: of an approximation there is never more than a group as whole matrices.
    """
    value, deltas, errors, sizes = 0.0, dict[str, LinearDelta](), dict[str, float](), dict[str, float]()
    for group in groups_of(model, modules):
        found = score_gradients(model, group, score, batch_size)
        value = found.value
        for name, gradient in found.by_module.items():
            d_out, d_in = gradient.weight.shape
            deltas[name] = LinearDelta(d_out, d_in, e=gradient.weight.float().cpu())
            if rank is not None:
                sizes[name] = deltas[name].norm()
                deltas[name], errors[name] = deltas[name].factorised(gradient.weight.cpu(), rank)
    return value, deltas, {} if rank is None else {"rank": rank, **approximation_errors(errors, sizes)}


def _examples(
    tok: Tokenizer, pairs: Sequence[Pair], config: TrainConfig, seed: int
) -> tuple[list[Answer], list[Answer]]:
    """The positive and the negative answers that training with these settings learns from, whatever the contrast."""
    from ws.train import build_examples, split_examples  # peft takes seconds, and most interventions need none of it

    usable = [p for p in pairs if p.drop is None]
    train, _ = split_examples(build_examples(tok, usable, SIGNED, config.max_length), config.validation, seed)
    answers = [(e.prompt, e.response) for e in train]  # of either side in turn
    return answers[::2], answers[1::2]


def _contrast(
    model: PreTrainedModel, tok: Tokenizer, positive: Sequence[Answer], negative: Sequence[Answer]
) -> MeanScore:
    """`L- - L+` as a score: the log-probability of a token of the positive answers minus that of the negative ones."""
    rows = list[tuple[Answer, float]]()
    for answers, sign in ((positive, 1), (negative, -1)):
        share = sign / sum(len(response) for _, response in answers)
        rows += [(answer, share) for answer in answers]
    rows.sort(key=lambda row: (len(row[0][1]), len(row[0][0])))
    most = most_at_once(model, [[response] for (_, response), _ in rows])

    def parts(batch_size: int) -> Iterator[Tensor]:
        size = min(batch_size, most)
        with progress(total=len(rows), desc="gradient", unit="answer") as bar:
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                prompts, responses = zip(*(answer for answer, _ in part), strict=True)
                scored = answer_logp(model, tok.pad_token_id, prompts, [[response] for response in responses])
                yield torch.stack([share * logp.sum() for (_, share), (logp,) in zip(part, scored, strict=True)]).sum()
                bar.update(len(part))

    return MeanScore("contrast", len(rows), parts)
