"""The loss of training, from the final hidden states of the tokens that have one: no logits of prompts, few at a time.

With `h_t` the hidden state behind which token `y_t` of a response comes, and `p = softmax(head(h_t))`, a batch costs

    sum_t  -log p(y_t)  +  w KL(p_base || p)        KL(p || q) = sum_v p(v) (log p(v) - log q(v)),  in nats per token

or, with the margin between the two answers of a pair as its objective, the preferred one first,

    -log sigmoid(beta ((s(y1) - r(y1)) - (s(y2) - r(y2))))        s(y) = sum_t log p(y_t),  r(y) of a reference model

(DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7). The reference is the base, or the adapter at its other sign.

The body runs once over the whole batch. The head, and whatever else the model does to its logits, runs over a part of
the response tokens at a time, and the gradient of `h` is taken at once: of a vocabulary of 150,000 no more than one
part's logits exist at any time. In the logits that of the first equation is `(1 + w) p - onehot(y_t) - w p_base`. The
base's logits are made again from its hidden states, which are kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

# Bytes of float32 logits that are held at once, [tokens, vocabulary]; their gradient takes a few times as much.
_BUDGET = 2**27
_LIKE = 1e-5  # relative difference between our loss and the model's own, when they are the same sum in another order


class Head:
    """The output head of a causal language model, apart from its body."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.body = model, _body(model)
        self.arguments = inspect.signature(model.forward).parameters
        self.kind: type[ModelOutput] | None = None  # of what the body returns, once it has been seen

    @contextmanager
    def states(self) -> Iterator[list[Tensor]]:
        """Inside, the final hidden states of every forward pass of the model are put on the list."""
        states: list[Tensor] = []

        def keep(body: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, ModelOutput) and isinstance(output.get("last_hidden_state"), Tensor):
                self.kind = type(output)
                states.append(output["last_hidden_state"])

        handle = self.body.register_forward_hook(keep)
        try:
            yield states
        finally:
            handle.remove()

    def run_body(self, run: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Float[Tensor, "rows tokens width"]:
        """The hidden states of a batch; `run` calls the model, as it is wrapped."""
        # By its index, not as a number of columns: with a number some bodies give the states of these columns alone.
        least = {"logits_to_keep": torch.tensor([-1], device=self.model.device), "use_cache": False}
        with self.states() as states:
            run(**inputs, **{name: value for name, value in least.items() if name in self.arguments})
        return states[0]

    def logits(self, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n vocabulary"]:
        """The logits of final hidden states, by the model's own forward pass with these in place of its body's."""
        assert self.kind is not None
        given, replaced = self.kind(last_hidden_state=hidden[None]), vars(self.body).get("forward")
        self.body.forward = lambda *args, **kwargs: given
        try:
            return self.model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits[0]
        finally:
            if replaced is None:
                del self.body.forward
            else:  # what spreads a model over devices replaces it, too
                self.body.forward = replaced


def _body(model: PreTrainedModel) -> torch.nn.Module:
    body = model.get_decoder()
    return getattr(model, "model", model) if body is model else body


def head_of(model: PreTrainedModel, ids: list[int], sums: bool) -> tuple[Head | None, bool]:
    """A model's head, and whether its own loss is the plain one, so that it can be had from the head.

    `sums`: the model takes the number of tokens to divide by; one that does not has a loss of its own.

    Both are tried out on a few tokens. There is no head where the logits do not follow from the final hidden states; a
    loss is a model's own where it has further terms (a mixture's balance) or is averaged otherwise.
    """
    if "logits_to_keep" not in (head := Head(model)).arguments or head.body is model:
        return None, False
    tokens, training = torch.tensor([ids], device=model.device), model.training
    model.eval()
    try:
        with torch.no_grad(), head.states() as states:
            scale = {"num_items_in_batch": torch.tensor(2.0)} if sums else {}
            whole = model(input_ids=tokens, labels=tokens, **scale)
            if len(states) != 1:
                return None, False
            logits = head.logits(states[0][0])
            loss = functional.cross_entropy(logits[:-1].float(), tokens[0, 1:].to(logits.device), reduction="sum") / 2
    finally:
        model.train(training)
    same = torch.allclose(logits, whole.logits[0].to(logits.device), rtol=1e-3, atol=1e-3)
    plain = sums and bool((whole.loss.to(loss.device) - loss).abs() <= _LIKE * loss)
    return (head, plain) if same else (None, False)


def predicting(labels: Int[Tensor, "rows tokens"]) -> tuple[Tensor, Int[Tensor, "n"]]:
    """Where the tokens with a label are predicted, a mask `[rows, tokens]`, and these tokens."""
    following = functional.pad(labels[:, 1:], (0, 1), value=-100)
    return (mask := following != -100), following[mask]


def response_loss(
    head: Head,
    hidden: Float[Tensor, "n width"],
    tokens: Int[Tensor, "n"],
    base: Float[Tensor, "n width"] | None = None,
    kl: float = 0.0,
    likelihood: bool = True,
) -> Float[Tensor, "n"]:
    """Both terms of the module's first equation at every token, added up; without `likelihood` the second alone."""

    def of_part(rows: slice, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both terms, added up, and their gradient in the logits, if `hidden` has one."""
        logp = logits.log_softmax(dim=-1)
        values, weight, before = torch.zeros(len(logp), device=logp.device), float(likelihood), None
        if base is not None and kl:
            gaps = head.logits(base[rows].to(hidden.device)).float().log_softmax(dim=-1)
            before = gaps.exp()
            values, weight = kl * gaps.sub_(logp).mul_(before).sum(dim=1), weight + kl
        own = tokens[rows].to(logp.device)[:, None]
        if likelihood:
            values = values - logp.gather(1, own)[:, 0]
        if not hidden.requires_grad:
            return values, None
        gradient = logp.exp_().mul_(weight)
        if before is not None:
            gradient.sub_(before, alpha=kl)
        if likelihood:
            gradient.scatter_add_(1, own, gradient.new_full(own.shape, -1.0))
        return values, gradient

    vocabulary = int(head.model.config.get_text_config().vocab_size)
    return _InParts.apply(hidden, head, of_part, max(1, _BUDGET // (4 * vocabulary)))


class _InParts(torch.autograd.Function):
    """A number for every row, part by part; the gradient of a part is taken before the next one is computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        of_part: Callable[[slice, Tensor], tuple[Tensor, Tensor | None]],
        size: int,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        values, gradients = [hidden.new_zeros(0, dtype=torch.float32)], [hidden[:0]]
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part = hidden[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = head.logits(part)
            value, gradient = of_part(rows, logits.detach().float())
            if gradient is not None:
                gradients += torch.autograd.grad(logits, part, gradient.to(logits.dtype))
            values.append(value.to(hidden.device))
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * upstream[0][:, None]).to(gradients.dtype), None, None, None


def margin_loss(
    logp: Float[Tensor, "n"], reference: Float[Tensor, "n"], rows: Int[Tensor, "n"], n_rows: int, beta: float
) -> Float[Tensor, "pairs"]:
    """The module's second equation for every pair of rows `(0, 1), (2, 3), ...`; pairs without tokens are left out.

    Args:
        logp, reference: of every response token.
        rows: that the tokens are of.
        n_rows: in the batch, twice the number of pairs.
        beta: how steeply the loss falls with the margin, per nat.
    """
    gains = torch.zeros(n_rows, device=logp.device).index_add(0, rows, logp - reference).view(-1, 2)
    filled = torch.bincount(rows, minlength=n_rows).view(-1, 2).sum(1) > 0
    return -functional.logsigmoid(beta * (gains[:, 0] - gains[:, 1]))[filled]
