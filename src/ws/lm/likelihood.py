"""Whole answers: how much probability a model puts on every token of an answer that it is given.

    logp(t) = log p(a_t | prompt, a_1 .. a_(t-1))        in nats, from a float32 log-softmax

Several answers to one prompt go through the model in one row, which holds the prompt once: the last token of the prompt
stands at the start of every answer, so that each answer's columns predict exactly its tokens, and a mask keeps the
answers from each other. Models that take no such mask (`ws.lm.batches.takes_masks`) read every answer in a row of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError
from ws.lm.batches import in_batches, in_groups, packed_logits, row_logits, takes_masks

Ids = Sequence[int]
Read = TypeVar("Read")
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
        answers: per prompt its answers as tokens (`ws.lm.models.encode_answer`), at least one; none is empty.
        batch_size: prompts per forward pass; None starts at what memory is budgeted for and takes fewer while it
            does not suffice.

    Raises:
        WsError: nothing to score, an empty answer, or probabilities that are NaN or zero.
    """
    if not prompts or not all(of and all(of) for of in answers):
        raise WsError("There are no answers to score, or one of them has no tokens.")
    most = most_at_once(model, answers)

    def run(part: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[np.ndarray]]:
        scored = answer_logp(model, tok.pad_token_id, *zip(*part, strict=True))
        return [[x.cpu().double().numpy() for x in of] for of in scored]

    logp = in_batches(
        list(zip(prompts, answers, strict=True)),
        run,
        batch_size and min(batch_size, most),
        min(START_BATCH, most),
        length=lambda asked: (len(asked[1]), max(map(len, asked[1])), len(asked[0])),
        desc="answers",
        unit="question",
    )
    if not all(np.isfinite(x).all() for of in logp for x in of):
        raise WsError("The model gave NaN or zero probabilities; its weights or the steering strength are broken.")
    return logp


def most_at_once(model: PreTrainedModel, answers: Sequence[Sequence[Ids]]) -> int:
    """How many prompts with these answers may go through a model at once, for the sake of their logits."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    n_answers, longest = max(map(len, answers)), max(len(answer) for of in answers for answer in of)
    return max(1, _BUDGET // (4 * vocabulary * n_answers * longest))


def answer_logp(
    model: PreTrainedModel, pad_id: int, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]
) -> list[list[Float[Tensor, "tokens"]]]:
    """The same for one batch, as float32 tensors on the model's device, with their graph where gradients are wanted."""
    return read_answers(model, pad_id, prompts, answers, token_logp)


def read_answers(
    model: PreTrainedModel,
    pad_id: int,
    prompts: Sequence[Ids],
    answers: Sequence[Sequence[Ids]],
    read: Callable[[Float[Tensor, "tokens vocabulary"], Ids], Read],
) -> list[list[Read]]:
    """What `read` makes of the logits that predict an answer's tokens, for every answer of one batch."""
    if takes_masks(model) and min(map(len, prompts)) > 1:
        # The prompt's last token begins every part, so that a part's columns predict exactly its answer. A row with
        # fewer answers than others has that token alone in the parts that it lacks, which nothing is read from.
        asked, n_answers = list(zip(prompts, answers, strict=True)), max(map(len, answers))
        parts = [[[p[-1], *(of[m][:-1] if m < len(of) else ())] for p, of in asked] for m in range(n_answers)]
        logits, ends = packed_logits(model, pad_id, [prompt[:-1] for prompt in prompts], parts, every=True)
        stops = [end + 1 for end in ends.tolist()]
        return [
            [read(row[stop - len(answer) : stop], answer) for stop, answer in zip(stops, of, strict=False)]
            for row, of in zip(logits, answers, strict=True)
        ]
    rows = [(prompt, answer) for prompt, of in zip(prompts, answers, strict=True) for answer in of]
    found = dict[int, Read]()
    for n in {len(answer) for _, answer in rows}:  # what steers where answers are read finds nothing else in a pass
        alike = [i for i, (_, answer) in enumerate(rows) if len(answer) == n]
        inputs = [[*prompt, *answer[:-1]] for prompt, answer in (rows[i] for i in alike)]
        seen = in_groups(model, inputs, partial(row_logits, model, pad_id, keep=n))
        found |= {i: read(logits[-n:], rows[i][1]) for i, logits in zip(alike, seen, strict=True)}
    flat = (found[i] for i in range(len(rows)))
    return [[next(flat) for _ in of] for of in answers]


def token_logp(logits: Float[Tensor, "tokens vocabulary"], answer: Ids) -> Float[Tensor, "tokens"]:
    """The log-probability of every token of an answer in nats, from float32."""
    targets = torch.tensor(answer, device=logits.device)
    return logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
