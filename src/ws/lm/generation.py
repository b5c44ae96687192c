"""Answers written by transformers' `generate`: the one place that calls it, and the settings under which it is greedy.

`sampling` writes rows with random numbers of their own and hands on to here what it cannot refill; `rollout` thinks
behind prompts that share a start. The chat's engine alone has a loop of its own, because it shows every token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from ws.lm.batches import in_groups, keeps_state, left_pad

# The argmax at every step, for all greedy generation: whatever a model's generation_config advises besides (beams,
# penalties, bans, least lengths, other stops and caches) is switched off by name, because `generate` takes from there
# what it is not told. Hooks are not compiled.
_OFF: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
            *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "constraints"),
            *("forced_bos_token_id", "forced_eos_token_id", "force_words_ids", "exponential_decay_length_penalty"),
            *("guidance_scale", "watermarking_config", "penalty_alpha", "dola_layers", "diversity_penalty"),
            *("num_beam_groups", "stop_strings", "max_time", "prompt_lookup_num_tokens", "assistant_early_exit"),
            *("min_new_tokens", "cache_implementation", "cache_config"),
        )
    ),
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "token_healing": False,
    "use_mtp": False,
    "use_cache": True,
    "return_dict_in_generate": False,
    "disable_compile": True,
}
PLAIN = {name: value for name, value in _OFF.items() if hasattr(GenerationConfig(), name)}  # versions differ in names


class Generated(NamedTuple):
    """One answer.

    Attributes:
        tokens: up to and including the one that ends it.
        logits: of every step, raw and in float32, where they were asked for; else empty.
    """

    tokens: list[int]
    logits: Sequence[Float[Tensor, "vocabulary"]] = ()


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    pad_id: int,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    ends: Collection[int],
    options: Mapping[str, Any] = PLAIN,
    fixed_cache: bool = True,
    with_logits: bool = False,
) -> list[Generated]:
    """Continue rows of tokens, all in one batch where the model takes padding.

    Args:
        prompts: tokens, one list per answer.
        max_new_tokens: at most so many per answer.
        ends: tokens that end one.
        options: of transformers' `generate`; greedy as they are.
        fixed_cache: make room for the whole length at once (`new_cache`) instead of letting the cache grow. It is
            faster, and rounds in another way: whoever has stored answers stays with what they were written with.
        with_logits: keep the logits of every step.
    """

    def run(part: Sequence[list[int]]) -> list[Generated]:
        ids, mask = left_pad(part, pad_id, model.device)
        cache = new_cache(model, ids.shape[1] + max_new_tokens) if fixed_cache else None
        chosen = {**options, "return_dict_in_generate": True, "output_logits": True} if with_logits else options
        return continue_from(model, pad_id, ids, mask, cache, max_new_tokens, ends, chosen)

    return in_groups(model, prompts, run)


def continue_from(
    model: PreTrainedModel,
    pad_id: int,
    ids: Int[Tensor, "b width"],
    mask: Int[Tensor, "b width"],
    cache: Cache | None,
    max_new_tokens: int,
    ends: Collection[int],
    options: Mapping[str, Any] = PLAIN,
) -> list[Generated]:
    """The same behind one padded batch, a part of which the cache may hold already; None for transformers' own."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        past_key_values=cache,
        **options,
    )
    tokens, logits = (out, ()) if isinstance(out, Tensor) else (out.sequences, out.logits)
    written = list[Generated]()
    for number, row in enumerate(tokens[:, ids.shape[1] :].tolist()):
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        written.append(Generated(row[:length], [step[number] for step in logits[:length]]))
    return written


def without_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """An answer without the token that ended it, if one did."""
    return list(tokens[:-1] if tokens and tokens[-1] in ends else tokens)


def new_cache(model: PreTrainedModel, length: int) -> Cache | None:
    """An empty cache for `generate`, with room for the whole length at once where the model takes it so.

    A cache that grows is copied whole at every token, which costs more than the token itself on a CPU. None for models
    with a state, several of which know a cache of their own only.
    """
    if keeps_state(model):
        return None
    fixed = getattr(model, "_can_compile_fullgraph", False) and not getattr(model.config, "alibi", False)
    return StaticCache(model.config, max_cache_len=length) if fixed else DynamicCache(config=model.config)
