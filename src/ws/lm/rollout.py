"""Guided chain of thought: think, close the block, force the answer's opener, read the choice; nothing is run twice.

    think  ->  close the block by token id  ->  append the anchor  ->  read the choices' log-probabilities

A batch thinks greedily in one generation that ends when its last row has closed its block. What is missing up to the
answer position, the close of a thought that was cut off and the anchor, then goes through the model in one pass behind
the same keys and values. Models whose template has no think block think in plain text at the start of their answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, StoppingCriteria
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError
from ws.lm.batches import in_batches, in_groups, left_pad, next_logits, positions_of, takes_masks, written_from
from ws.lm.choice import (
    Choice,
    ChoiceScores,
    choice_logp,
    choice_variants,
    score_choices,
    score_rows,
    share_prefixes,
    with_each_token,
)
from ws.lm.generation import PLAIN, Generated, continue_from, generate, new_cache, without_end
from ws.lm.models import chat_format, decode_answer, encode, encode_after, end_ids, render_prompt

START_BATCH = 32
# Put behind the question where there is no think block: a model that is asked for a choice alone writes nothing else.
REASONS = "\n\nGive your reasons first, in two or three sentences. End with your answer."


@dataclass(frozen=True)
class Rollouts:
    """What `n` questions were answered after thinking.

    Attributes:
        scores: the choices' log-probabilities at the answer position.
        thoughts: what was thought, without the block's marks, up to the choice that a model without a block has stated
            itself, if it has; empty when thinking was off.
        n_tokens: the length of every thought, in tokens that stand before the answer (a choice stated itself does not).
        forced: True where the thought was cut off, because its budget was spent or the model wanted to end its turn
            inside the block.
        n_think: the budget; 0 when thinking was off.
    """

    scores: ChoiceScores
    thoughts: tuple[str, ...]
    n_tokens: Int[np.ndarray, "n"]
    forced: Bool[np.ndarray, "n"]
    n_think: int = 0

    @property
    def record(self) -> dict[str, np.ndarray]:
        """`n_tokens` and `forced` for the scores of an evaluation; nothing when thinking was off."""
        return {"n_tokens": self.n_tokens, "forced": self.forced} if self.n_think else {}


@torch.inference_mode()
def roll_out(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    choices: Sequence[Choice],
    anchors: Sequence[str],
    n_think: int = 0,
    batch_size: int | None = None,
    reasons: str = REASONS,
) -> Rollouts:
    """Ask every question (a user's turn), let the model think greedily, and score the choices behind the anchor.

    Args:
        questions: `n` texts, rendered here with the tokenizer's chat template.
        choices: see `score_choices`.
        anchors: the start of the answer that is put into the model's mouth, one per question.
        n_think: at most so many tokens of thought; 0 turns thinking off and needs no generation at all.
        batch_size: rows at a time; None starts at 32 and takes fewer while memory does not suffice.
        reasons: what is put behind the question of a model that has no think block and is to think.

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
    rows = [_Row(encode(tok, thinking_prompt(tok, q, reasons)), _closing(tok, a, choices)) for q, a in asked]
    variants = with_each_token(choice_variants(tok, choices, model.device))
    answer = partial(_think_and_answer, model, tok, variants, n_think)
    logp = in_batches(rows, answer, batch_size, START_BATCH, length=len, desc="thoughts", unit="question")
    scores = ChoiceScores.checked(choices, torch.stack(logp))
    thoughts = tuple(row.text for row in rows)
    lengths = np.array([len(row.thought) for row in rows])
    return Rollouts(scores, thoughts, lengths, np.array([row.forced for row in rows]), n_think)


@dataclass(frozen=True)
class Written:
    """What `n` questions were answered in words, as tokens without those that end a thought or a turn.

    Attributes:
        thoughts: what was thought inside the block.
        forced: True where the thought was cut off, as in `Rollouts`.
        answers: what was written behind the closed block.
    """

    thoughts: tuple[list[int], ...]
    forced: Bool[np.ndarray, "n"]
    answers: tuple[list[int], ...]


@torch.inference_mode()
def write_out(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    n_think: int,
    n_tokens: int,
    batch_size: int | None = None,
    anchor: str = "",
) -> Written:
    """Let a model with a think block think about every question greedily, close the block, and write an answer.

    Args:
        questions: `n` texts, rendered here with the tokenizer's chat template.
        n_think: at most so many tokens of thought; a longer one is closed for the model.
        n_tokens: at most so many tokens of answer.
        batch_size: rows at a time; None starts at 32 and takes fewer while memory does not suffice.
        anchor: the start of the answer that is put into the model's mouth; no part of `Written.answers`.

    Raises:
        WsError: no questions, or a model without a think block (which thinks in its answer).
    """
    if not questions or chat_format(tok).think_close_id is None:
        raise WsError("There are no questions to think about, or the model has no think block.")
    rows = [_Row(encode(tok, thinking_prompt(tok, q)), _closing(tok, anchor, ())) for q in questions]
    ends = frozenset(end_ids(model, tok))
    stops = {*ends, *(row.closing.close_id for row in rows if row.closing.close_id is not None)}

    def write(part: Sequence[_Row]) -> list[list[int]]:
        thoughts = generate(model, tok.pad_token_id, [row.prompt for row in part], n_think, stops)
        for row, thought in zip(part, thoughts, strict=True):
            row.take(tok, thought.tokens, ends)
        return [without_end(answer.tokens, ends) for answer in in_groups(model, part, go_on)]

    def go_on(part: Sequence[_Row]) -> list[Generated]:
        prompts = [[*row.prompt, *row.rest(0)] for row in part]
        with _as_written(part, model.device):
            return generate(model, tok.pad_token_id, prompts, n_tokens, ends)

    answers = in_batches(rows, write, batch_size, START_BATCH, length=len, desc="thoughts", unit="question")
    return Written(tuple(row.thought for row in rows), np.array([row.forced for row in rows]), tuple(answers))


def thinking_prompt(tok: Tokenizer, question: str, reasons: str = REASONS) -> str:
    """The rendered prompt up to the first token of thought, the opened block included where there is one."""
    block = chat_format(tok).think_close_id is not None
    text = render_prompt(tok, question if block else question + reasons, thinking=True)
    return f"{text}<think>\n" if block and not text.rstrip().endswith("<think>") else text


def thinks_aloud(tok: Tokenizer, n_think: int) -> bool:
    """Whether a model with so many tokens of thought is asked for its reasons, for want of a think block."""
    return n_think > 0 and chat_format(tok).think_close_id is None


def statements(anchor: str, choices: Sequence[Choice]) -> re.Pattern[str]:
    """Matches where a text states a choice (group 1) in the anchor's words, whatever their case and punctuation.

    The first of several words may be another: asked for "My choice", small models write "Your choice".
    """
    said = "|".join(re.escape(w) for choice in choices for w in ((choice,) if isinstance(choice, str) else choice))
    words = list(map(re.escape, re.findall(r"\w+", anchor))) or ["(?!)"]  # an anchor without words is nowhere
    start = r"\W+".join([r"\w+", *words[1:]] if len(words) > 1 else words)
    return re.compile(rf"\b{start}\W*\b({said})\b", re.IGNORECASE)


# ---- one row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Closing:
    """The tokens between a thought and the answer position.

    Attributes:
        close_id: the token that closes the block, None for models without one.
        cut: what precedes it when the thought is cut off.
        anchor: what follows it, the anchor last.
        alone: the anchor alone, for where the model has come to it by itself.
        stated: for models without a block, how the answer reads where the model gives it by itself.
    """

    close_id: int | None
    cut: tuple[int, ...]
    anchor: tuple[int, ...]
    alone: tuple[int, ...] = ()
    stated: re.Pattern[str] | None = None


def _closing(tok: Tokenizer, anchor: str, choices: Sequence[Choice]) -> _Closing:
    close = chat_format(tok).think_close_id
    after = tuple(encode_after(tok, "a thought" if close is None else "</think>", f"\n\n{anchor}"))
    if close is None:
        return _Closing(None, (), after, tuple(encode_after(tok, "a thought\n", anchor)), statements(anchor, choices))
    return _Closing(close, tuple(encode_after(tok, "a thought", "\n")), after)


@dataclass
class _Row:
    """One question on its way: what was thought, and how its thought ended."""

    prompt: list[int]
    closing: _Closing
    thought: list[int] = field(default_factory=list)
    text: str = ""
    forced: bool = False
    at_anchor: bool = False
    n_run: int = 0  # tokens of the thought that another was written behind

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, tok: Tokenizer, new: Sequence[int], ends: frozenset[int]) -> None:
        """The thought from what was generated: up to the end of the block or of the turn, or to a stated choice."""
        close = self.closing.close_id
        stop = next((i for i, token in enumerate(new) if token == close or token in ends), len(new))
        self.thought, ended = list(new[:stop]), stop < len(new)
        self.forced = not ended if close is None else not (ended and new[stop] == close)
        text = tok.decode(self.thought, skip_special_tokens=True)
        stated = self.closing.stated.search(text) if self.closing.stated else None
        self.at_anchor = False
        if stated:
            # As many tokens as make no more text than stands before it; a token may hold the end of one and the start
            # of the other.
            before = text
            while len(before) > stated.start():
                del self.thought[-1]
                before = tok.decode(self.thought, skip_special_tokens=True)
            self.at_anchor = before[-1].isspace() if before else chat_format(tok).has_template
            self.forced, text = False, text[: stated.end()]
        self.text = text.strip() if stated else decode_answer(tok, self.thought)
        self.n_run = min(len(self.thought), len(new) - 1)

    def rest(self, start: int) -> list[int]:
        """The tokens from the `start`-th of the thought to the answer position."""
        close = self.closing
        cut = close.cut if self.forced and close.close_id is not None else ()
        shut = () if close.close_id is None else (close.close_id,)
        return [*self.thought[start:], *cut, *shut, *(close.alone if self.at_anchor else close.anchor)]


class _Stated(StoppingCriteria):
    """Ends a row's generation once it states a choice; what it would write behind it is cut off anyway."""

    def __init__(self, tok: Tokenizer, rows: Sequence[_Row], width: int) -> None:
        self.tok, self.stated, self.width = tok, [row.closing.stated for row in rows], width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Bool[Tensor, "b"]:
        texts = self.tok.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        ended = [bool(stated and stated.search(text)) for stated, text in zip(self.stated, texts, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


# ---- one batch ------------------------------------------------------------------------------------------------------


def _think_and_answer(
    model: PreTrainedModel, tok: Tokenizer, variants: Sequence[Tensor], n_think: int, rows: Sequence[_Row]
) -> Float[Tensor, "b k"]:
    """Let a batch think, and read its answers: the choices' log-probabilities.

    Where the model takes masks the answers are read behind the same keys and values, and nothing is run twice. Layers
    with a state or a window cannot overlook what other rows generated meanwhile; there every row is run from its start.
    """
    if takes_masks(model):
        return choice_logp(_answer_logits(model, tok, rows, *_think(model, tok, n_think, rows)), variants)
    in_groups(model, rows, lambda part: [_think(model, tok, n_think, part)] * len(part))

    def answer(part: Sequence[_Row]) -> Float[Tensor, "part k"]:
        with _as_written(part, model.device):
            return score_rows(model, tok.pad_token_id, [[*row.prompt, *row.rest(0)] for row in part], variants)

    return torch.stack(in_groups(model, rows, answer))


def _as_written(rows: Sequence[_Row], device: torch.device) -> AbstractContextManager[None]:
    """For rows that are read again: behind which columns their thoughts were written, and their answers will be."""
    lengths = [len(row.prompt) + len(row.rest(0)) for row in rows]
    columns = [
        [len(row.prompt) - 1 <= i < len(row.prompt) + row.n_run or i == length - 1 for i in range(length)]
        for row, length in zip(rows, lengths, strict=True)
    ]
    return written_from(left_pad(columns, 0, device)[0].bool())


def _think(
    model: PreTrainedModel, tok: Tokenizer, n_think: int, rows: Sequence[_Row]
) -> tuple[Int[Tensor, "b width"], Cache | None]:
    """Fill in the rows' thoughts, in one generation that ends when the last row has closed its block.

    Returns:
        The mask of the prompts, and the keys and values of them and of what was generated behind them.
    """
    ends = frozenset(end_ids(model, tok))
    tail = max(len(r.closing.cut) + len(r.closing.anchor) for r in rows) + 3
    ids, mask, cache = _begin(model, tok.pad_token_id, rows, n_think + tail)
    stops = ends | {r.closing.close_id for r in rows if r.closing.close_id is not None}
    stated = [_Stated(tok, rows, ids.shape[1])] if rows[0].closing.stated else None
    options = {**PLAIN, "stopping_criteria": stated}
    written = continue_from(model, tok.pad_token_id, ids, mask, cache, n_think, stops, options)
    for row, new in zip(rows, written, strict=True):
        row.take(tok, new.tokens, ends)
    return mask, cache


def _answer_logits(
    model: PreTrainedModel, tok: Tokenizer, rows: Sequence[_Row], mask: Int[Tensor, "b width"], cache: Cache | None
) -> Float[Tensor, "b vocabulary"]:
    """The logits at every row's answer position, from one pass over what is left up to it.

    What others generated meanwhile, and the row's own padding, are masked.
    """
    assert cache is not None  # a model that takes masks has one
    run = int(cache.get_seq_length()) - mask.shape[1]  # the last token generated was not run
    n_cached = [min(len(row.thought), run) for row in rows]
    thoughts = torch.arange(run, device=mask.device)[None] < torch.tensor(n_cached, device=mask.device)[:, None]
    last, real = left_pad([r.rest(k) for r, k in zip(rows, n_cached, strict=True)], tok.pad_token_id, model.device)
    seen = torch.cat([mask, thoughts.to(mask.dtype), real], dim=1)
    return next_logits(model, last, seen, cache)


def _begin(model: PreTrainedModel, pad_id: int, rows: Sequence[_Row], room: int) -> tuple[Tensor, Tensor, Cache | None]:
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
    nothing = torch.empty(0, dtype=torch.long, device=model.device)  # no position of this pass is read for a next token
    known = model(
        input_ids=start,
        attention_mask=start_mask,
        position_ids=positions_of(start_mask),
        use_cache=True,
        logits_to_keep=nothing,
    ).past_key_values
    family_of = {row: number for number, family in enumerate(families) for row in family.rows}
    of = torch.tensor([family_of[i] for i in range(len(rows))], device=model.device)
    rest, rest_mask = left_pad([r.prompt[len(cuts[family_of[i]]) :] for i, r in enumerate(rows)], pad_id, model.device)
    cache = new_cache(model, start.shape[1] + rest.shape[1] + room)
    assert cache is not None  # a model that takes masks has one
    for number, layer in enumerate(known.layers):
        cache.update(layer.keys[of], layer.values[of], number)
    return torch.cat([start[of], rest], dim=1), torch.cat([start_mask[of], rest_mask], dim=1), cache
