"""Whole answers: how much probability a model puts on every token of an answer that it is given.

    logp(t) = log p(a_t | prompt, a_1 .. a_(t-1))        in nats, from a float32 log-softmax

Several answers to one prompt go through the model in one row, which holds the prompt once: the last token of the prompt
stands at the start of every answer, so that each answer's columns predict exactly its tokens, and a mask keeps the
answers from each other. Models that take no such mask (`ws.lm.choice.takes_masks`) read every answer in a row of its
own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.console import progress
from ws.errors import WsError
from ws.lm.choice import _packed, in_groups, left_pad, takes_masks

Ids = Sequence[int]
START_BATCH = 64
# Bytes of float32 logits that are held at once: [rows, tokens of the answers, vocabulary] of a batch.
_BUDGET = 2**30


@torch.inference_mode()
def score_answers(
    model: PreTrainedModel,
    tok: Tokenizer,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    batch_size: int | None = None,
) -> list[list[Float[np.ndarray, "tokens"]]]:
    """Log-probabilities of every token of every answer, in double precision, in the order given.

    Args:
        prompts: `n` prompts as tokens.
        answers: per prompt its answers as tokens (`ws.data.answer_ids`), as many to each; none is empty.
        batch_size: prompts per forward pass; None starts at what memory is budgeted for and halves while it does not
            suffice.

    Raises:
        WsError: nothing to score, an empty answer, or probabilities that are NaN or zero.
    """
    if not prompts or not all(answer for of in answers for answer in of):
        raise WsError("There are no answers to score, or one of them has no tokens.")
    order = sorted(range(len(prompts)), key=lambda i: (max(map(len, answers[i])), len(prompts[i])))
    most = _prompts_in_budget(model, answers)

    def run(batch_size: int) -> dict[int, list[Tensor]]:
        found: dict[int, list[Tensor]] = {}
        with progress(total=len(order), desc="answers", unit="question") as bar:
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                scored = answer_logp(model, tok.pad_token_id, [prompts[i] for i in part], [answers[i] for i in part])
                found |= {i: [x.double().cpu() for x in of] for i, of in zip(part, scored, strict=True)}
                bar.update(len(part))
        return found

    if batch_size:
        found = run(min(batch_size, most))
    else:
        found = find_executable_batch_size(run, starting_batch_size=min(START_BATCH, most))()
    logp = [[x.numpy() for x in found[i]] for i in range(len(prompts))]
    if not all(np.isfinite(x).all() for of in logp for x in of):
        raise WsError("The model gave NaN or zero probabilities; its weights or the steering strength are broken.")
    return logp


def _prompts_in_budget(model: PreTrainedModel, answers: Sequence[Sequence[Ids]]) -> int:
    """How many prompts' answers fit the budget of memory at once."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    widest = max(len(of) * max(map(len, of)) for of in answers)
    return max(1, _BUDGET // (4 * vocabulary * widest))


def answer_logp(
    model: PreTrainedModel, pad_id: int, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]
) -> list[list[Float[Tensor, "tokens"]]]:
    """The same for one batch, as float32 tensors on the model's device, with their graph where gradients are wanted."""
    if takes_masks(model) and min(map(len, prompts)) > 1:
        return _packed_logp(model, pad_id, prompts, answers)
    rows = [[*prompt, *answer] for prompt, of in zip(prompts, answers, strict=True) for answer in of]
    lengths = [len(answer) for of in answers for answer in of]

    def run(part: Sequence[list[int]]) -> Tensor:
        tokens, mask = left_pad([row[:-1] for row in part], pad_id, model.device)
        positions, keep = (mask.cumsum(dim=1) - 1).clamp(min=0), min(max(lengths), tokens.shape[1])
        logits: Tensor = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
        ).logits
        return logits[:, -keep:]

    seen = in_groups(model, rows, run)
    flat = iter(_token_logp(logits[-n:], row[-n:]) for logits, row, n in zip(seen, rows, lengths, strict=True))
    return [[next(flat) for _ in of] for of in answers]


def _packed_logp(
    model: PreTrainedModel, pad_id: int, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]
) -> list[list[Tensor]]:
    start = left_pad([prompt[:-1] for prompt in prompts], pad_id, model.device)
    parts = [
        left_pad([[prompt[-1], *of[m][:-1]] for prompt, of in zip(prompts, answers, strict=True)], pad_id, model.device)
        for m in range(len(answers[0]))
    ]
    tokens, positions, mask, ends = _packed(start, parts, model.dtype)
    keep = tokens.shape[1] - start[0].shape[1]
    logits = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
    ).logits[:, -keep:]  # some models give all columns whatever they are asked for
    last = (ends - start[0].shape[1] + 1).tolist()  # where each part ends among the columns that were kept
    return [
        [_token_logp(logits[i, end - len(answer) : end], answer) for end, answer in zip(last, of, strict=True)]
        for i, of in enumerate(answers)
    ]


def _token_logp(logits: Float[Tensor, "tokens vocabulary"], answer: Ids) -> Float[Tensor, "tokens"]:
    targets = torch.tensor(answer, device=logits.device)
    return logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
