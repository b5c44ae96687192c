"""Choice scoring: how much probability a model puts on each of a few answers at the next token.

`logP(c) = logsumexp` over every vocabulary token that decodes to the choice, in any case and with leading white space,
from a float32 log-softmax at the answer position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError
from ws.models import encode

LOW_MASS = 0.9


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of `n` prompts over `k` choices.

    Attributes:
        choices: the `k` answers.
        logp: natural-log probabilities, `[n, k]`, in the order of the prompts.
    """

    choices: tuple[str, ...]
    logp: Float[np.ndarray, "n k"]

    @property
    def mass(self) -> Float[np.ndarray, "n"]:
        """`pmass`: the probability of any of the choices, in [0, 1]; under 0.9 the score says little."""
        return np.exp(self.logp).sum(axis=1).clip(max=1.0)

    @property
    def logratio(self) -> Float[np.ndarray, "n"]:
        """`logP(first) - logP(second)`, in nats."""
        return self.logp[:, 0] - self.logp[:, 1]


@lru_cache(maxsize=256)
def choice_tokens(tok: Tokenizer, choice: str) -> tuple[int, ...]:
    """Every single token that reads as `choice`: any case, with leading spaces or newlines, no glued punctuation."""
    ids = tuple(i for i, text in _vocabulary(tok).items() if text.lstrip(" \n\t").lower() == choice.lower())
    if not ids:
        raise WsError(f"No single token of this tokenizer reads as {choice!r}; choose another answer word.")
    return ids


@lru_cache(maxsize=4)
def _vocabulary(tok: Tokenizer) -> dict[int, str]:
    """What each ordinary token decodes to on its own."""
    special = set(tok.all_special_ids)
    ids = [i for i in range(len(tok)) if i not in special]
    return dict(zip(ids, tok.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False), strict=True))


@torch.inference_mode()
def score_choices(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[str],
    choices: Sequence[str | tuple[str, ...]],
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ChoiceScores:
    """Score rendered prompts (openers included) at their next token.

    A choice may be several words that mean the same, such as `("true", "1")`; it is named by the first. Prompts are
    sorted by length and left-padded; only the last position's logits are computed. With `batch_size` None
    it starts at 64 and is halved while memory does not suffice. Scores come back in the order of `prompts`.
    """
    if not prompts:
        raise WsError("There are no prompts to score.")
    ids = [encode(tok, p) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    words = [(c,) if isinstance(c, str) else c for c in choices]
    variants = [torch.tensor([i for w in ws for i in choice_tokens(tok, w)], device=model.device) for ws in words]

    def run(batch_size: int) -> Tensor:
        rows = []
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows.append(_score_batch(model, tok, [ids[i] for i in part], variants))
            if progress:
                progress(len(part))
        return torch.cat(rows)

    scored = run(batch_size) if batch_size else find_executable_batch_size(run, starting_batch_size=64)()
    logp = np.empty((len(ids), len(choices)))
    logp[order] = scored.double().cpu().numpy()
    if np.isnan(logp).any():
        raise WsError("The model gave NaN probabilities; its weights or the steering strength are broken.")
    return ChoiceScores(tuple(w[0] for w in words), logp)


def _score_batch(
    model: PreTrainedModel, tok: Tokenizer, ids: Sequence[list[int]], variants: Sequence[Tensor]
) -> Float[Tensor, "b k"]:
    tokens, mask = left_pad(ids, tok.pad_token_id, model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
    logp = logits.float().log_softmax(dim=-1)
    return torch.stack([logp[:, v].logsumexp(dim=-1) for v in variants], dim=1)


def left_pad(ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(tokens, mask)`, both `[b, longest]`, with the padding on the left, whatever the tokenizer's own side."""
    width = max(len(row) for row in ids)
    tokens = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in ids], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids], device=device)
    return tokens, mask
