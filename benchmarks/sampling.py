"""Sampling the answers of contrast pairs on a real model: tokens per second of `ws.lm.sampling` and of `generate`.

`uv run python -m benchmarks.sampling` asks SmolLM2 the questions of `tradition_care` under a persona of either side,
with the temperature, top-p, top-k and limit that `ws data` would use, on one thread, in rounds of other questions:

- A: `ws.lm.sampling.sample_rows`, the rows of a round at once: sorted, ended rows leave, others take their places;
- B: transformers' `generate`, eight rows at a time in the order of the file.

Only tokens up to and with the end of an answer count. Who goes first changes from round to round. The ratio is of
tokens per second of the clock; beside it stands that of CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import ws
from benchmarks import harness
from ws.lm.batches import left_pad
from ws.lm.models import encode, end_ids, render_prompt
from ws.lm.sampling import SamplingSettings, sample_rows, sampling_settings
from ws.options.make import DataConfig

Rows = list[list[int]]
BATCH = 8


@torch.inference_mode()
def by_generate(
    model: PreTrainedModel, pad_id: int, ends: Sequence[int], settings: SamplingSettings, limit: int, prompts: Rows
) -> Rows:
    """Answers in batches of eight, in the order given, each up to and with its end."""
    torch.manual_seed(0)
    answers = Rows()
    for start in range(0, len(prompts), BATCH):
        ids, mask = left_pad(prompts[start : start + BATCH], pad_id, model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            eos_token_id=list(ends),
            pad_token_id=pad_id,
            do_sample=True,
            **settings.values,
        )
        for row in out[:, ids.shape[1] :].tolist():
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            answers.append(row[:stop])
    return answers


def timed(run: Callable[[Rows], Rows], prompts: Rows) -> tuple[float, float, list[int]]:
    """Tokens per second of the clock and of CPU time, and the lengths of the answers."""
    start, cpu = time.perf_counter(), time.process_time()
    lengths = [len(row) for row in run(prompts)]
    return sum(lengths) / (time.perf_counter() - start), sum(lengths) / (time.process_time() - cpu), lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=32, help="pairs a round, two answers each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tok = ws.load_model("smollm2", device="cpu")
    behavior, limit = ws.load_behavior("tradition_care"), DataConfig().max_new_tokens
    settings, ends = sampling_settings(model), end_ids(model, tok)
    sides = [behavior.positive[0], behavior.negative[0]]
    prompts = [encode(tok, render_prompt(tok, q, system=side)) for q in behavior.questions for side in sides]
    size = 2 * options.pairs
    assert len(prompts) >= size * options.rounds, "the behaviour has fewer questions"

    def ours(rows: Rows) -> Rows:
        return sample_rows(model, tok.pad_token_id, rows, range(len(rows)), limit, ends, settings)

    def usual(rows: Rows) -> Rows:
        return by_generate(model, tok.pad_token_id, ends, settings, limit, rows)

    runs: list[tuple[str, Callable[[Rows], Rows]]] = [("ours", ours), ("generate", usual)]
    rounds, lengths = list[dict[str, float]](), dict[str, list[int]](ours=[], generate=[])
    for number in range(options.rounds):
        part = prompts[number * size : (number + 1) * size]
        speed = dict[str, float]()
        for name, run in runs if number % 2 == 0 else runs[::-1]:
            speed[name], speed[f"{name}_cpu"], made = timed(run, part)
            lengths[name] += made
        speed |= {f"ratio{x}": speed[f"ours{x}"] / speed[f"generate{x}"] for x in ("", "_cpu")}
        rounds.append(speed)
        print(speed, flush=True)
    results: dict[str, Any] = {
        "settings": dict(settings.values) | {"max_new_tokens": limit},
        "answers_a_round": size,
        "rounds": rounds,
        "median": {name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
        "answer_tokens": {name: spread(made, limit) for name, made in lengths.items()},
    }
    sys.argv = [sys.argv[0]]
    harness.record("sampling", results)


def spread(lengths: Sequence[int], limit: int) -> dict[str, float]:
    """How long answers are, the token that ends them included."""
    low, middle, high = statistics.quantiles(lengths, n=4)
    cut = sum(n >= limit for n in lengths) / len(lengths)
    return {"mean": statistics.fmean(lengths), "q1": low, "median": middle, "q3": high, "at_the_limit": cut}


if __name__ == "__main__":
    main()
