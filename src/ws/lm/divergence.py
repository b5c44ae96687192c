"""The divergence of a condition: how surprised the base model is by the answers of the steered one.

Let `y` be the greedy answer of the model under a condition (a steering strength, a system prompt) to a prompt `x`. Then

    KL(x, t) = sum_v p_steered(v | x, y_<t) (log p_steered(v | x, y_<t) - log p_base(v | x, y_<t))       in nats

at every position `t` of the answer, its end of turn included and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError, require_count
from ws.lm.batches import in_batches, in_groups, row_logits
from ws.lm.generation import generate, without_end
from ws.lm.models import decode_answer, encode, end_ids, render_prompt

QUANTILE, N_TOKENS = 0.95, 50  # the defaults of `ws.options.shared`, too
START_BATCH = 64
# Bytes of float32 logits that are held at once: [rows, tokens, vocabulary] of a batch of answers.
_BUDGET = 2**30


class BrokenError(WsError):
    """The model gave NaN where probabilities were to be."""


@dataclass(frozen=True)
class Divergence:
    """Per-token KL divergences along the greedy answers to `n` prompts.

    Attributes:
        kl: nats at every position of every answer, the end of turn included and nothing after it.
        answers: their texts.
    """

    kl: tuple[Float[np.ndarray, "_"], ...]
    answers: tuple[str, ...]

    @property
    def n_positions(self) -> int:
        """How many positions there are over all prompts."""
        return sum(map(len, self.kl))

    def at(self, quantile: float = QUANTILE) -> float:
        """The quantile over all prompts and positions (linear interpolation), in nats."""
        return float(np.quantile(np.concatenate(self.kl), quantile))


@torch.inference_mode()
def divergence(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[str],
    condition: Callable[[], AbstractContextManager[Any]],
    n_tokens: int = N_TOKENS,
    batch_size: int | None = None,
    base_prompts: Sequence[str] | None = None,
) -> Divergence:
    """Let the model answer under a condition, and say how surprised the model without it is at every token.

    The steered side is read off while it generates, so what acts on the last position of a forward pass only is
    measured as it is used; the base reads every answer once. A bfloat16 model's two ways of computing the same logits
    differ by its rounding, which is far below the targets of use.

    Args:
        prompts: `n` rendered prompts, the steered side's.
        condition: makes the context in which the model is steered; entered once per batch.
        n_tokens: at most so many tokens of each answer.
        batch_size: answers at a time; None starts at what memory is budgeted for and takes fewer while it does not
            suffice.
        base_prompts: the base side's prompts where they differ, as for a system prompt; the answers are aligned.

    Raises:
        WsError: no prompts, prompts without a partner, or a budget of tokens below 1 or beyond memory.
        BrokenError: probabilities that are NaN.
    """
    others = prompts if base_prompts is None else base_prompts
    if not prompts or len(others) != len(prompts):
        raise WsError(f"There are {len(prompts)} prompts and {len(others)} for the base; give as many, at least one.")
    ids, base_ids = ([encode(tok, p) for p in texts] for texts in (prompts, others))
    most, ends = _rows_in_budget(model, n_tokens), end_ids(model, tok)

    def run(part: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[np.ndarray, str]]:
        rows, base_rows = zip(*part, strict=True)
        with condition():
            answers = generate(model, tok.pad_token_id, rows, n_tokens, ends, with_logits=True)
        base = _base_logits(model, tok, base_rows, [tokens for tokens, _ in answers], most)
        for (tokens, steps), seen in zip(answers, base, strict=True):
            kl = token_kl(torch.stack(list(steps)), seen).cpu().double().numpy()
            yield kl, decode_answer(tok, without_end(tokens, ends))

    measured = in_batches(
        list(zip(ids, base_ids, strict=True)),
        run,
        batch_size and min(batch_size, most),
        min(START_BATCH, most),
        length=lambda pair: len(pair[0]),
        desc="answers",
        unit="answer",
    )
    kl, answers = zip(*measured, strict=True)
    if not all(np.isfinite(row).all() for row in kl):
        raise BrokenError("The model gave NaN probabilities; its weights or the steering strength are broken.")
    return Divergence(kl, answers)


def token_kl(steered: Float[Tensor, "n vocab"], base: Float[Tensor, "n vocab"]) -> Float[Tensor, "n"]:
    """`KL(softmax(steered) || softmax(base))` in nats per row, from float32 log-softmax.

    A token that the steered side rules out (a logit of -inf) adds nothing; NaN stays NaN.
    """
    p, q = steered.float().log_softmax(dim=-1), base.float().log_softmax(dim=-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(dim=-1).clamp(min=0.0)


def prompt_divergence(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    system: str,
    n_tokens: int = N_TOKENS,
    quantile: float = QUANTILE,
) -> float:
    """`D` of a prompt baseline: the model under a system prompt against the same model without it, in nats."""
    prompts = [render_prompt(tok, q, system=system) for q in questions]
    plain = [render_prompt(tok, q, system="") for q in questions]
    return divergence(model, tok, prompts, nullcontext, n_tokens, base_prompts=plain).at(quantile)


def _rows_in_budget(model: PreTrainedModel, n_tokens: int) -> int:
    """How many answers' logits fit the budget of memory at once."""
    require_count("--n-tokens", n_tokens, 1)
    vocabulary = int(model.config.get_text_config().vocab_size)
    most = _BUDGET // (4 * vocabulary)
    if n_tokens > most:
        raise WsError(f"--n-tokens must be at most {most} for a vocabulary of {vocabulary}, not {n_tokens}.")
    return most // n_tokens


def _base_logits(
    model: PreTrainedModel, tok: Tokenizer, prompts: Sequence[list[int]], answers: Sequence[list[int]], most: int
) -> Iterator[Float[Tensor, "n vocab"]]:
    """The model's logits at the positions of every answer, row by row; a quarter of the budget at a time."""
    size = max(1, most // 4)

    for start in range(0, len(prompts), size):
        part = answers[start : start + size]
        rows = [p + a[:-1] for p, a in zip(prompts[start : start + size], part, strict=True)]
        read = partial(row_logits, model, tok.pad_token_id, keep=max(map(len, part)))
        seen = in_groups(model, rows, read)
        for row, answer in zip(seen, part, strict=True):
            yield row[-len(answer) :]
