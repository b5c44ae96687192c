"""The usual procedure, written plainly, as the fair opponent of ours.

A vector is what merging each arm into a checkpoint in the model's dtype and subtracting leaves: dense matrices.
Steering clones the weights, adds alpha times them, evaluates, and puts the clones back, once per strength. Scoring
takes the prompts in the order of the file, computes the logits of every position and reads the last; a chain of thought
is generated first, and then the prompt, the thought and the answer's opener go through the model again to be scored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.lm.batches import left_pad
from ws.lm.choice import Choice, choice_variants
from ws.lm.models import chat_format, encode, end_ids
from ws.lm.rollout import thinking_prompt


def merged_state(base: PreTrainedModel, adapter: Path) -> dict[str, Tensor]:
    """The weights of the base with an adapter merged in, in the base's dtype."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter))
    return model.merge_and_unload().state_dict()


def merge_and_subtract(base: PreTrainedModel, pos: Path, neg: Path) -> dict[str, Tensor]:
    """Dense `theta_pos - theta_neg` of every tensor, from two rounded checkpoints."""
    a, b = merged_state(base, pos), merged_state(base, neg)
    return {name: a[name] - b[name] for name in a}


@contextmanager
def dense_steering(model: PreTrainedModel, change: Mapping[str, Tensor], alpha: float) -> Iterator[None]:
    """The model with `alpha * change` added to its weights in its own dtype; clones are put back afterwards."""
    weights = dict(model.named_parameters())
    kept = {name: weights[name].detach().clone() for name in change}
    try:
        with torch.no_grad():
            for name, dense in change.items():
                weights[name].add_(alpha * dense.to(weights[name].dtype))
        yield
    finally:
        with torch.no_grad():
            for name, clone in kept.items():
                weights[name].copy_(clone)


@torch.inference_mode()
def score(
    model: PreTrainedModel, tok: Tokenizer, rows: Sequence[list[int]], choices: Sequence[Choice], batch_size: int
) -> Tensor:
    """Log-probabilities of the choices behind each row of tokens, `[n, k]`: file order, all positions' logits."""
    variants = choice_variants(tok, choices, model.device)
    found = []
    for start in range(0, len(rows), batch_size):
        tokens, mask = left_pad(rows[start : start + batch_size], tok.pad_token_id, model.device)
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        logp = logits[:, -1].float().log_softmax(-1)
        found.append(torch.stack([logp[:, v].logsumexp(-1) for v in variants], dim=1))
    return torch.cat(found)


@torch.inference_mode()
def think_and_score(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    choices: Sequence[Choice],
    anchor: str,
    n_think: int,
    batch_size: int,
) -> Tensor:
    """Generate thoughts batch by batch, cut them at the block's end, append the anchor, and score from the start."""
    close, ends = chat_format(tok).think_close_id, end_ids(model, tok)
    prompts = [encode(tok, thinking_prompt(tok, q)) for q in questions]
    rows = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        tokens, mask = left_pad(part, tok.pad_token_id, model.device)
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=n_think,
            do_sample=False,
            eos_token_id=[close, *ends],
            pad_token_id=tok.pad_token_id,
        )
        for prompt, new in zip(part, out[:, tokens.shape[1] :].tolist(), strict=True):
            stop = next((i for i, t in enumerate(new) if t == close or t in ends), len(new))
            closed = stop < len(new) and new[stop] == close
            shut = [] if closed else encode(tok, "\n")
            rows.append([*prompt, *new[:stop], *shut, close, *encode(tok, f"\n\n{anchor}")])
    return score(model, tok, rows, choices, batch_size)
