"""Guided chain of thought: think, close the block, force the answer's opener, read the choice; nothing is run twice.

    think  ->  close the block by token id  ->  append the anchor  ->  read the choices' log-probabilities

A batch thinks greedily in one generation that ends when its last row has closed its block. What is missing up to the
answer position, the close of a thought that was cut off and the anchor, then goes through the model in one pass behind
the same keys and values. Models whose template has no think block think in plain text at the start of their answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.console import progress
from ws.errors import WsError
from ws.eval.choice import (
    Choice,
    ChoiceScores,
    choice_variants,
    left_pad,
    score_choices,
    share_prefixes,
    takes_masks,
)
from ws.models import chat_format, encode, end_ids, render_prompt

START_BATCH = 32
# Greedy, and nothing of the model's own sampling advice may touch the scores that are read; hooks are not compiled.
PLAIN: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "disable_compile": True,
}


@dataclass(frozen=True)
class Rollouts:
    """What `n` questions were answered after thinking.

    Attributes:
        scores: the choices' log-probabilities at the answer position.
        thoughts: what was thought, without the block's marks; empty when thinking was off.
        n_tokens: the length of every thought.
        forced: True where the thought was cut off, because its budget was spent or the model wanted to end its turn
            inside the block.
    """

    scores: ChoiceScores
    thoughts: tuple[str, ...]
    n_tokens: Int[np.ndarray, "n"]
    forced: Bool[np.ndarray, "n"]


@torch.inference_mode()
def roll_out(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    choices: Sequence[Choice],
    anchors: Sequence[str],
    n_think: int = 0,
    batch_size: int | None = None,
) -> Rollouts:
    """Ask every question (a user's turn), let the model think greedily, and score the choices behind the anchor.

    Args:
        questions: `n` texts, rendered here with the tokenizer's chat template.
        choices: see `score_choices`.
        anchors: the start of the answer that is put into the model's mouth, one per question.
        n_think: at most so many tokens of thought; 0 turns thinking off and needs no generation at all.
        batch_size: rows at a time; None starts at 32 and halves while memory does not suffice.

    Raises:
        WsError: no questions, a negative budget, or probabilities that are NaN.
    """
    if n_think < 0:
        raise WsError(f"--n-think must be 0 or more tokens, not {n_think}.")
    if len(anchors) != len(questions):
        raise WsError(f"There are {len(questions)} questions but {len(anchors)} anchors.")
    if n_think == 0:
        prompts = [render_prompt(tok, q, opener=a) for q, a in zip(questions, anchors, strict=True)]
        nothing = np.zeros(len(prompts), dtype=np.int64)
        scores = score_choices(model, tok, prompts, choices, batch_size)
        return Rollouts(scores, ("",) * len(prompts), nothing, nothing.astype(bool))
    if not questions:
        raise WsError("There are no questions to ask.")
    asked = zip(questions, anchors, strict=True)
    rows = [_Row(encode(tok, thinking_prompt(tok, q)), _closing(tok, a)) for q, a in asked]
    variants = choice_variants(tok, choices, model.device)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))

    def run(batch_size: int) -> None:
        with progress(total=len(order), desc="thoughts", unit="question") as bar:
            for start in range(0, len(order), batch_size):
                part = [rows[i] for i in order[start : start + batch_size]]
                _think_and_answer(model, tok, part, variants, n_think)
                bar.update(len(part))

    if batch_size:
        run(batch_size)
    else:
        find_executable_batch_size(run, starting_batch_size=START_BATCH)()
    logp = torch.stack([row.logp for row in rows if row.logp is not None])
    scores = ChoiceScores.checked(choices, logp)
    thoughts = tuple(tok.decode(row.thought, skip_special_tokens=True).strip() for row in rows)
    lengths = np.array([len(row.thought) for row in rows])
    return Rollouts(scores, thoughts, lengths, np.array([row.forced for row in rows]))


def thinking_prompt(tok: Tokenizer, question: str) -> str:
    """The rendered prompt up to the first token of thought, the opened block included where there is one."""
    text = render_prompt(tok, question, thinking=True)
    return f"{text}<think>\n" if has_think_block(tok) and not text.rstrip().endswith("<think>") else text


@lru_cache(maxsize=16)
def has_think_block(tok: Tokenizer) -> bool:
    """Whether answers start with a think block: the template can switch it on, or always opens one.

    The mere tokens are not enough: some vocabularies have them for models that never learned to use them.
    """
    form = chat_format(tok)
    if not form.has_template or form.think_open_id is None or form.think_close_id is None:
        return False
    return form.thinking_switch or render_prompt(tok, "Q", thinking=True).rstrip().endswith("<think>")


# ---- one row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Closing:
    """The tokens between a thought and the answer position.

    Attributes:
        close_id: the token that closes the block, None for models without one.
        cut: what precedes it when the thought is cut off.
        anchor: what follows it, the anchor last.
    """

    close_id: int | None
    cut: tuple[int, ...]
    anchor: tuple[int, ...]


def _closing(tok: Tokenizer, anchor: str) -> _Closing:
    after = tuple(encode(tok, f"\n\n{anchor}"))
    if not has_think_block(tok):
        return _Closing(None, (), after)
    return _Closing(chat_format(tok).think_close_id, tuple(encode(tok, "\n")), after)


@dataclass
class _Row:
    """One question on its way: what was thought, and what there is to record."""

    prompt: list[int]
    closing: _Closing
    thought: list[int] = field(default_factory=list)
    forced: bool = False
    logp: Tensor | None = None

    def take(self, new: Sequence[int], ends: frozenset[int]) -> None:
        """The thought from the tokens that were generated: up to the block's end, the turn's end, or all of them."""
        close = self.closing.close_id
        stop = next((i for i, token in enumerate(new) if token == close or token in ends), len(new))
        self.thought = list(new[:stop])
        ended = stop < len(new)
        self.forced = not ended if close is None else not (ended and new[stop] == close)

    def rest(self, kept: int) -> list[int]:
        """The tokens from the `kept`-th of the thought to the answer position."""
        close = self.closing
        cut = close.cut if self.forced and close.close_id is not None else ()
        shut = () if close.close_id is None else (close.close_id,)
        return [*self.thought[kept:], *cut, *shut, *close.anchor]


# ---- one batch ------------------------------------------------------------------------------------------------------


def _think_and_answer(
    model: PreTrainedModel, tok: Tokenizer, rows: Sequence[_Row], variants: Sequence[Tensor], n_think: int
) -> None:
    """Let a batch think, and read its answers behind the same keys and values; nothing is run twice.

    The thinking ends as soon as the last row has closed its block. Then every row gets what is left up to its answer
    position in one further pass; what others generated meanwhile, and its own padding, are masked.
    """
    ends = frozenset(end_ids(model, tok))
    tail = max(len(r.closing.cut) + len(r.closing.anchor) for r in rows) + 3
    ids, mask, cache = _begin(model, tok.pad_token_id, rows, n_think + tail)
    closers = sorted({*ends, *(r.closing.close_id for r in rows if r.closing.close_id is not None)})
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=n_think,
        eos_token_id=closers,
        pad_token_id=tok.pad_token_id,
        past_key_values=cache,
        **PLAIN,
    )
    width = ids.shape[1]
    run = int(cache.get_seq_length()) - width  # the last token generated was not run
    kept = []
    for row, new in zip(rows, out[:, width:].tolist(), strict=True):
        row.take(new, ends)
        kept.append(min(len(row.thought), run))
    thoughts = torch.arange(run, device=ids.device)[None] < torch.tensor(kept, device=ids.device)[:, None]
    last, real = left_pad([r.rest(k) for r, k in zip(rows, kept, strict=True)], tok.pad_token_id, model.device)
    seen = torch.cat([mask, thoughts.to(mask.dtype), real], dim=1)
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)[:, -last.shape[1] :]
    logits = model(
        input_ids=last, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits[:, -1]
    logp = logits.float().log_softmax(dim=-1)
    choices = torch.stack([logp[:, v].logsumexp(dim=-1) for v in variants], dim=1)
    for row, values in zip(rows, choices, strict=True):
        row.logp = values


def _begin(model: PreTrainedModel, pad_id: int, rows: Sequence[_Row], room: int) -> tuple[Tensor, Tensor, Cache]:
    """`(tokens, mask, cache)` of the prompts.

    A start that several share, such as a dilemma asked in both orders, is run once here, and its keys and values are
    handed to all of them; a prompt on its own is cut anywhere then.
    """
    families = share_prefixes([r.prompt for r in rows]) if takes_masks(model) else []
    if not any(f.prefix for f in families):
        ids, mask = left_pad([r.prompt for r in rows], pad_id, model.device)
        return ids, mask, new_cache(model, ids.shape[1] + room)
    cuts = [f.prefix or f.suffixes[0][: len(f.suffixes[0]) // 2] for f in families]
    start, start_mask = left_pad(cuts, pad_id, model.device)
    positions = (start_mask.cumsum(dim=1) - 1).clamp(min=0)
    nothing = torch.empty(0, dtype=torch.long, device=model.device)  # no position of this pass is read for a next token
    known = model(
        input_ids=start, attention_mask=start_mask, position_ids=positions, use_cache=True, logits_to_keep=nothing
    ).past_key_values
    home = {row: number for number, family in enumerate(families) for row in family.rows}
    of = torch.tensor([home[i] for i in range(len(rows))], device=model.device)
    rest, rest_mask = left_pad([r.prompt[len(cuts[home[i]]) :] for i, r in enumerate(rows)], pad_id, model.device)
    cache = new_cache(model, start.shape[1] + rest.shape[1] + room)
    for number, layer in enumerate(known.layers):
        cache.update(layer.keys[of], layer.values[of], number)
    return torch.cat([start[of], rest], dim=1), torch.cat([start_mask[of], rest_mask], dim=1), cache


def new_cache(model: PreTrainedModel, length: int) -> Cache:
    """An empty cache, with room for the whole length at once where the model takes it so.

    A cache that grows is copied whole at every token, which costs more than the token itself on a CPU.
    """
    fixed = getattr(model, "_can_compile_fullgraph", False)
    return StaticCache(model.config, max_cache_len=length) if fixed else DynamicCache(config=model.config)
