"""Sampled answers: with which settings, and many at once.

A model's own settings count. Where it brings none, as a GGUF file does, transformers would sample at temperature 1
without a word; here a default is used that is stated.

Every row draws from random numbers of its own,

    token = the first v with  sum_{w <= v} p_w > u        u ~ U[0, 1), one number per row and token

(inversion; p are the warped probabilities, tokens in the order of their ids), so an answer depends on its prompt and
its seed and not on the rows beside it, up to the rounding of a batch's arithmetic. Rows that have ended leave the batch
and others take their places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ws.errors import WsError
from ws.lm.batches import in_groups, left_pad, takes_cache, takes_masks, with_batch_size
from ws.lm.generation import PLAIN, continue_from
from ws.lm.refill import RowBatch

DEFAULT_TEMPERATURE, DEFAULT_TOP_P = 0.7, 0.9
# What a model may advise besides that makes some tokens more probable than others; `generate` would follow it, too.
_ADVICE = (
    *("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "min_length", "min_new_tokens"),
    "exponential_decay_length_penalty",
)
START_BATCH = 64
# Bytes of keys and values that are held at once on a CPU, where too much ends the process instead of a batch.
_CACHE_BUDGET = 2**30
# The share of ended rows (one in so many) at which a batch is put together anew, which copies the whole cache.
_TURNOVER = 8


# ---- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingSettings:
    """What answers are sampled with.

    Attributes:
        values: by the names that `generate` knows them by: `temperature`, `top_k` (so many most probable tokens are
            drawn from; 0 is all), `top_p` (of those the most probable that together reach this probability; 1 is all),
            and what else the model's `generation_config` advises, such as a `repetition_penalty`.
        sources: where each value comes from: `model`, `option` or `default`.
    """

    values: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def card(self) -> dict[str, dict[str, Any]]:
        """Every value with where it comes from, as the data card has it."""
        return {name: {"value": value, "from": self.sources[name]} for name, value in self.values.items()}


def describe_settings(card: Mapping[str, Mapping[str, Any]]) -> str:
    """`temperature 0.7 (default), top-p 0.9 (default), top-k 50 (default)`, from `SamplingSettings.card`."""
    return ", ".join(f"{name.replace('_', '-')} {x['value']} ({x['from']})" for name, x in card.items())


def sampling_settings(
    model: PreTrainedModel, temperature: float | None = None, top_p: float | None = None
) -> SamplingSettings:
    """What a model's answers are sampled with: options, else its own settings, else the stated default.

    A model whose `generation_config` says none of `do_sample`, `temperature` and `top_p` brings no settings. One that
    says some of them is sampled as transformers would sample it. A temperature of 0, by which some say that they are
    greedy, says nothing of how to sample.
    """
    given = {name: value for name, value in {"temperature": temperature, "top_p": top_p}.items() if value is not None}
    said = _said(model)
    brings = bool(model.generation_config.do_sample) or not said.keys().isdisjoint(("temperature", "top_p"))
    stated = {} if brings else {"temperature": DEFAULT_TEMPERATURE, "top_p": DEFAULT_TOP_P}
    values = generate_settings(model) | stated | given
    sources = {name: "model" if name in said else "default" for name in values}
    return SamplingSettings(values, sources | dict.fromkeys(given, "option"))


def generate_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What transformers' `generate` would sample with by itself: the model's settings, else its own."""
    usual, said = GenerationConfig()._get_default_generation_params(), _said(model)
    values = {name: said.get(name, usual.get(name)) for name in ("temperature", "top_p", "top_k", *_ADVICE)}
    return {n: v for n, v in values.items() if n not in _ADVICE or (v is not None and v != usual.get(n))}


def _said(model: PreTrainedModel) -> dict[str, Any]:
    """What the model itself says about sampling; no sampling is at temperature 0."""
    names = ("temperature", "top_p", "top_k", *_ADVICE)
    said = {name: getattr(model.generation_config, name, None) for name in names}
    return {n: v for n, v in said.items() if v is not None and not (n == "temperature" and v == 0)}


def check_settings(temperature: float | None, top_p: float | None) -> None:
    """`WsError` for options that make no sense."""
    if temperature is not None and not 0 < temperature < float("inf"):
        raise WsError(f"--temperature must be a positive number, not {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise WsError(f"--top-p must be above 0 and at most 1, not {top_p}.")


# ---- the next token -------------------------------------------------------------------------------------------------

# These look at a row's scores alone, so that they can be asked about its most probable tokens; the others of
# transformers' processors look at the text or at the ids of tokens.
_WARPERS = (
    *(TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper),
    *(TypicalLogitsWarper, EpsilonLogitsWarper, EtaLogitsWarper),
)
# More candidates than top-k asks for: tokens as probable as the last of them are drawn from as well.
_TIES = 64


@dataclass
class _Row:
    """One answer on its way."""

    prompt: list[int]
    random: np.random.Generator
    rules: LogitsProcessorList
    most: int
    ends: frozenset[int]
    written: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def done(self) -> bool:
        """Whether the answer has ended, or has no room left."""
        return len(self.written) >= self.most or (bool(self.written) and self.written[-1] in self.ends)

    def score(self, scores: Float[Tensor, "1 vocabulary"]) -> Float[Tensor, "1 vocabulary"]:
        """The scores after what depends on the text so far."""
        return self.rules(torch.tensor([self.prompt + self.written], device=scores.device), scores)


def _begin_rows(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    most: int,
    ends: Sequence[int],
    settings: SamplingSettings,
) -> tuple[list[_Row], LogitsProcessorList]:
    """The rows, and the warpers that are the same for all of them: transformers' own, in its order."""
    options = {**PLAIN, "do_sample": True, **settings.values}
    config = GenerationConfig(**options, eos_token_id=list(ends))
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    rows, warpers = list[_Row](), LogitsProcessorList()
    for prompt, seed in zip(prompts, seeds, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long, device=model.device)
        every = model._get_logits_processor(
            config, input_ids_seq_length=len(prompt), device=str(model.device), model_kwargs={"attention_mask": mask}
        )
        warpers = LogitsProcessorList([p for p in every if isinstance(p, _WARPERS)])
        rules = LogitsProcessorList([p for p in every if not isinstance(p, _WARPERS)])
        rows.append(_Row(prompt, np.random.default_rng(seed), rules, most, frozenset(ends)))
    return rows, warpers


def _draw(rows: Sequence[_Row], warpers: LogitsProcessorList, logits: Float[Tensor, "rows vocabulary"]) -> list[int]:
    """The next token of every row; see the head of this module."""
    scores = logits.float()
    if bool(scores.isnan().any()):
        raise WsError("The model gave NaN; its weights or the steering strength are broken.")
    if any(row.rules for row in rows):
        scores = torch.cat([row.score(scores[i : i + 1]) for i, row in enumerate(rows)])
    ids, scores = _candidates(scores, warpers)
    p = scores.softmax(dim=-1).cpu().double()
    u = torch.tensor([[row.random.random()] for row in rows], dtype=torch.float64)
    below = p.cumsum(dim=-1)
    # Rounding must not let u reach behind the last token that has a probability.
    reached = below.masked_fill(below >= below[:, -1:], torch.inf) <= u * below[:, -1:]
    tokens: list[int] = ids.cpu().gather(1, reached.sum(dim=-1, keepdim=True))[:, 0].tolist()
    return tokens


def _candidates(
    scores: Float[Tensor, "rows vocabulary"], warpers: LogitsProcessorList
) -> tuple[Int[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Token ids in rising order, and their scores after warping.

    Top-p sorts what it is given, which for a whole vocabulary takes as long as the model itself. Behind a top-k the
    rest of the vocabulary cannot be drawn, so only the candidates are warped, with the same result.
    """
    top_k = next((w.top_k for w in warpers if isinstance(w, TopKLogitsWarper)), None)
    if top_k is not None and top_k + _TIES < scores.shape[-1]:
        few, ids = scores.topk(top_k + _TIES, dim=-1)
        warped = warpers(ids, few)
        if bool((few[:, top_k - 1] > few[:, -1]).all()):  # else more tokens tie with the last than there is room for
            ids, order = ids.sort(dim=-1)
            return ids, warped.gather(1, order)
    ids = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return ids, warpers(ids, scores)


# ---- many answers at once -------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample_rows(
    model: PreTrainedModel,
    pad_id: int,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    ends: Sequence[int],
    settings: SamplingSettings,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Sample an answer to every prompt; an answer depends on its prompt and its seed alone, up to rounding.

    Args:
        prompts: tokens, one list per answer.
        seeds: one per answer, whole numbers from 0.
        max_new_tokens: at most so many tokens per answer.
        ends: tokens that end an answer.
        settings: see `sampling_settings`.
        batch_size: rows at a time; None starts at 64, on a CPU at fewer where their keys and values take more than
            1 GiB, and takes fewer while memory does not suffice.

    Returns:
        The tokens of every answer, the one that ends it included.

    Raises:
        WsError: logits that are NaN.
    """
    if not prompts:
        return []
    refills = takes_masks(model) and takes_cache(model)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))

    def run(batch_size: int) -> list[list[int]]:
        rows, warpers = _begin_rows(model, prompts, seeds, max_new_tokens, ends, settings)
        if refills:
            _refilled(model, pad_id, [rows[i] for i in order], warpers, batch_size)
        else:
            for start in range(0, len(order), batch_size):
                _generated(model, pad_id, [rows[i] for i in order[start : start + batch_size]], warpers)
        return [row.written for row in rows]

    start = START_BATCH
    if refills and not batch_size:
        start = min(start, _rows_in_budget(model, len(prompts[order[-1]]) + max_new_tokens))
    return with_batch_size(run, batch_size, start)


def _rows_in_budget(model: PreTrainedModel, length: int) -> int:
    """How many rows' keys and values fit the budget; not more than the batch starts with where there is none."""
    if model.device.type != "cpu":
        return START_BATCH
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    layers = model(input_ids=token, use_cache=True).past_key_values.layers
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return max(1, _CACHE_BUDGET // (size * length))


class _Draws(LogitsProcessor):
    """Lets `generate`, which takes the most probable token, write what is drawn here."""

    def __init__(self, rows: Sequence[_Row], warpers: LogitsProcessorList) -> None:
        self.rows, self.warpers = rows, warpers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = _draw(self.rows, self.warpers, scores)
        for row, token in zip(self.rows, tokens, strict=True):
            row.written += [] if row.done else [token]
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _generated(model: PreTrainedModel, pad_id: int, rows: Sequence[_Row], warpers: LogitsProcessorList) -> None:
    """Write the rows' answers by `generate`, for layers with a state or a window, whose caches are of many kinds."""

    def run(part: Sequence[_Row]) -> Sequence[_Row]:
        ids, mask = left_pad([row.prompt for row in part], pad_id, model.device)
        options = {**PLAIN, "logits_processor": LogitsProcessorList([_Draws(part, warpers)])}
        continue_from(model, pad_id, ids, mask, None, part[0].most, part[0].ends, options)
        return part

    in_groups(model, rows, run)


def _refilled(
    model: PreTrainedModel, pad_id: int, rows: Sequence[_Row], warpers: LogitsProcessorList, size: int
) -> None:
    """Write the rows' answers; those that have ended make room for the next ones."""

    def write(batch: RowBatch[_Row], logits: Tensor) -> RowBatch[_Row]:
        """What an ended row is given is thrown away."""
        for row, token in zip(batch.rows, _draw(batch.rows, warpers, logits), strict=True):
            row.written += [] if row.done else [token]
        return batch

    waiting, batch = deque(rows), None
    while waiting or batch is not None:
        if batch is not None:
            ended = sum(row.done for row in batch.rows)
            if ended * _TURNOVER < len(batch.rows):
                write(batch, batch.step(model, [row.written[-1] for row in batch.rows]))
                continue
            batch = batch.only([i for i, row in enumerate(batch.rows) if not row.done])
        free = size - (0 if batch is None else len(batch.rows))
        if fresh := [waiting.popleft() for _ in range(min(free, len(waiting)))]:
            more = write(*RowBatch.begin(model, pad_id, fresh, [row.prompt for row in fresh]))
            batch = more if batch is None else batch.joined(more)
