"""Guided chain of thought: think, close the block, force the answer's opener and read the choice, in one pass.

A logits processor keeps a small state per row of one greedy generation:

    think  ->  close the block by token id  ->  force the anchor  ->  record the choices' log-probabilities  ->  end

so nothing is generated, sliced and run through the model a second time. Models whose template has no think block think
in plain text at the start of their answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError
from ws.eval.choice import Choice, ChoiceScores, choice_variants, left_pad, score_choices
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
    progress: Callable[[int], None] | None = None,
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
        scores = score_choices(model, tok, prompts, choices, batch_size, progress)
        return Rollouts(scores, ("",) * len(prompts), nothing, nothing.astype(bool))
    if not questions:
        raise WsError("There are no questions to ask.")
    asked = zip(questions, anchors, strict=True)
    rows = [_Row(encode(tok, thinking_prompt(tok, q)), _closing(tok, a)) for q, a in asked]
    variants = choice_variants(tok, choices, model.device)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))

    def run(batch_size: int) -> None:
        for row in rows:
            row.reset()
        for start in range(0, len(order), batch_size):
            part = [rows[i] for i in order[start : start + batch_size]]
            _think_and_answer(model, tok, part, variants, n_think)
            if progress:
                progress(len(part))

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
    """One question on its way: which token comes next, and what there is to record."""

    prompt: list[int]
    closing: _Closing
    thought: list[int] = field(default_factory=list)
    forced: bool = False
    logp: Tensor | None = None
    queue: list[int] | None = None

    def reset(self) -> None:
        """Forget everything but the question, for another try with a smaller batch."""
        self.thought, self.forced, self.logp, self.queue = [], False, None, None

    @property
    def at_answer(self) -> bool:
        """The anchor is written and the answer not read yet."""
        return self.queue == [] and self.logp is None

    def next(self, best: int, n_think: int, ends: frozenset[int], end: int) -> int:
        """The token to write, where the model on its own would write `best`."""
        if self.queue:
            return self.queue.pop(0)
        if self.queue is not None:
            return end
        close = self.closing
        if close.close_id is not None and best == close.close_id:
            self.queue = list(close.anchor)
            return best
        wants_to_end = best in ends
        if len(self.thought) < n_think and not wants_to_end:
            self.thought.append(best)
            return best
        self.forced = close.close_id is not None or not wants_to_end
        shut = [] if close.close_id is None else [*close.cut, close.close_id]
        self.queue = [*shut, *close.anchor]
        return self.queue.pop(0)


class _Guide(LogitsProcessor):
    """Decides every token of a batch of rows, and reads the choices where a row has come to its answer."""

    def __init__(
        self, rows: Sequence[_Row], variants: Sequence[Tensor], n_think: int, ends: frozenset[int], end: int
    ) -> None:
        self.rows, self.variants, self.n_think, self.ends, self.end = rows, variants, n_think, ends, end

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "b vocab"]) -> Float[Tensor, "b vocab"]:
        ready = [i for i, row in enumerate(self.rows) if row.at_answer]
        if ready:
            logp = scores[ready].float().log_softmax(dim=-1)
            choices = torch.stack([logp[:, v].logsumexp(dim=-1) for v in self.variants], dim=1)
            for i, values in zip(ready, choices, strict=True):
                self.rows[i].logp = values
        best = scores.argmax(dim=-1).tolist()
        pairs = zip(self.rows, best, strict=True)
        written = [row.next(token, self.n_think, self.ends, self.end) for row, token in pairs]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(written, device=scores.device)[:, None], 0.0)


def _think_and_answer(
    model: PreTrainedModel, tok: Tokenizer, rows: Sequence[_Row], variants: Sequence[Tensor], n_think: int
) -> None:
    """One greedy generation for a batch; it ends as soon as the last row has answered."""
    ids, mask = left_pad([row.prompt for row in rows], tok.pad_token_id, model.device)
    end = chat_format(tok).end_of_turn_id
    guide = _Guide(rows, variants, n_think, frozenset(end_ids(model, tok)), end)
    tail = max(len(row.closing.cut) + len(row.closing.anchor) for row in rows) + 2
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([guide]),
        max_new_tokens=n_think + tail,
        eos_token_id=end,
        pad_token_id=tok.pad_token_id,
        **PLAIN,
        **fixed_cache(model, ids.shape[1] + n_think + tail),
    )


def fixed_cache(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Keys and values for the whole length at once, where the model takes them so.

    A cache that grows is copied whole at every token, which costs more than the token itself on a CPU.
    """
    fixed = getattr(model, "_can_compile_fullgraph", False)
    return {"past_key_values": StaticCache(model.config, max_cache_len=length)} if fixed else {}
