"""Sampling the answers of contrast pairs on a real model: tokens per second of `ws.lm.sampling` and of `generate`.

`uv run python -m benchmarks.sampling` asks SmolLM2 the questions of `tradition_care` under a persona of either side,
with the temperature, top-p, top-k and limit that `ws data` would use, on one thread, in rounds of other questions:

- A: `ws.lm.sampling.sample_rows`, the rows of a round at once: sorted, ended rows leave, others take their places;
- B: transformers' `generate`, eight rows at a time in the order of the file.

Each runs in a process of its own, and who goes first changes from round to round. Only tokens up to and with the end of
an answer count. The ratio is of tokens per second of the clock; beside it stand that of CPU time, which other work on
the machine disturbs less, and that of the peak memory above the loaded model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
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
WAYS, NUMBERS = ("ours", "generate"), ("tokens_per_second", "tokens_per_cpu_second", "mib_above_model")


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


def sample(way: str, number: int, size: int) -> None:
    """One way on the prompts of one round, in a process of its own."""
    model, tok = ws.load_model("smollm2", device="cpu")
    behavior, limit = ws.load_behavior("tradition_care"), DataConfig().max_new_tokens
    settings, ends = sampling_settings(model), end_ids(model, tok)
    sides = [behavior.positive[0], behavior.negative[0]]
    prompts = [encode(tok, render_prompt(tok, q, system=side)) for q in behavior.questions for side in sides]
    part = prompts[number * size : (number + 1) * size]
    assert len(part) == size, "the behaviour has fewer questions"

    def run(rows: Rows, limit: int) -> Rows:
        if way == "ours":
            return sample_rows(model, tok.pad_token_id, rows, range(len(rows)), limit, ends, settings)
        return by_generate(model, tok.pad_token_id, ends, settings, limit, rows)

    run(part[:2], 2)  # warm-up
    answers = Rows()
    start, cpu = time.perf_counter(), time.process_time()
    above = harness.peak_above(lambda: answers.extend(run(part, limit)))
    took, lengths = (time.perf_counter() - start, time.process_time() - cpu), [len(row) for row in answers]
    numbers = dict(zip(NUMBERS, (*(sum(lengths) / seconds for seconds in took), above), strict=True))
    print(json.dumps(numbers | {"lengths": lengths, "settings": dict(settings.values) | {"max_new_tokens": limit}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=32, help="pairs a round, two answers each")
    parser.add_argument("--part", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = 2 * options.pairs
    if options.part:
        sample(options.part, options.number, size)
        return
    part = ["-m", "benchmarks.sampling", f"--pairs={options.pairs}", "--part"]
    rounds = dict[str, list[dict[str, Any]]]({way: [] for way in WAYS})
    for number in range(options.rounds):
        for way in WAYS[:: -1 if number % 2 else 1]:
            rounds[way].append(harness.fresh_process([*part, way, f"--number={number}"]).output)
            print(way, {name: rounds[way][-1][name] for name in NUMBERS}, flush=True)
    settings = rounds["ours"][0]["settings"]
    results: dict[str, Any] = {"settings": settings, "answers_a_round": size}
    for name in NUMBERS:
        numbers = {way: [r[name] for r in side] for way, side in rounds.items()}
        results[name] = numbers | {"ours_over_generate": harness.Spread.ratio(*numbers.values())}
    limit = settings["max_new_tokens"]
    results["answer_tokens"] = {
        way: spread([n for r in side for n in r["lengths"]], limit) for way, side in rounds.items()
    }
    harness.record("sampling", results)


def spread(lengths: Sequence[int], limit: int) -> dict[str, float]:
    """How long answers are, the token that ends them included."""
    low, middle, high = statistics.quantiles(lengths, n=4)
    cut = sum(n >= limit for n in lengths) / len(lengths)
    return {"mean": statistics.fmean(lengths), "q1": low, "median": middle, "q3": high, "at_the_limit": cut}


if __name__ == "__main__":
    main()
