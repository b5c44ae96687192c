"""How time and memory grow: with the model, the rank, the vectors, the strengths, the items and the clients.

`uv run python -m benchmarks.exponents` measures a few sizes of each. Time is taken in one process for each series, all
its sizes in turn after an uncounted round; memory is the peak of a fresh process for each size, once, above what the
libraries take, weights included. A size is compared with the smallest of its series, round by round, and

    y = c x^e        e, by least squares in logarithms, over all sizes of a round

says how it grows: 1 is in proportion, less is cheaper than that, more is worse. Models have random bfloat16 weights
and shapes on the way to Qwen3-0.6B's, which is the last; vectors are random, in all layers. Beyond that it is
arithmetic: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import ws
from benchmarks import harness
from benchmarks.serve import at_once
from benchmarks.serving import random_vector
from benchmarks.vector import QWEN3_06B
from ws.chat.batching import Scheduler
from ws.eval.context import EvalContext
from ws.eval.sycophancy import Sycophancy, evaluate_sycophancy
from ws.files.runs import Run
from ws.lm.models import encode, render_prompt
from ws.options.measure import SycophancyOptions

TOKENS, ITEMS = 128, 24
Action = Callable[[], object]
STEERED = ExitStack()  # left at the end of the process


def shaped(part: float) -> PreTrainedModel:
    """A model with a part of Qwen3-0.6B's depth, width and vocabulary, in its proportions."""
    full, width = QWEN3_06B, int(part * QWEN3_06B.hidden_size)
    assert full.num_hidden_layers
    config = Qwen3Config(
        vocab_size=int(part * full.vocab_size),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=int(part * full.num_hidden_layers),
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def prompt(model: PreTrainedModel, vectors: dict[str, ws.SteeringVector]) -> Action:
    """A steered forward pass of one prompt; the model stays steered."""
    ids = torch.randint(0, 1000, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    STEERED.enter_context(ws.steer_many(model, vectors))

    def action() -> None:
        with torch.inference_mode():
            model(ids, logits_to_keep=1)

    return action


def of_model(quarters: int) -> tuple[Action, float]:
    model = shaped(quarters / 4)
    return prompt(model, {"v": random_vector(model, "all")}), sum(p.numel() for p in model.parameters())


def of_rank(rank: int) -> tuple[Action, float]:
    model = shaped(0.5)
    return prompt(model, {"v": random_vector(model, "all", rank=rank)}), rank


def of_vectors(count: int) -> tuple[Action, float]:
    model = shaped(0.5)
    vector = random_vector(model, "all", rank=16)
    return prompt(model, {f"v{i}": vector for i in range(count)}), count


def of_strengths(count: int) -> tuple[Action, float]:
    """Held-out claims by the evaluation of a run, with nothing kept; the base is one more."""
    model, tok = ws.load_model("pocket", device="cpu")
    vector, alphas = random_vector(model, "all"), tuple(torch.linspace(0.1, 1, count).tolist())

    def action() -> None:
        with tempfile.TemporaryDirectory() as name:
            options = SycophancyOptions(out=Path(name), model="pocket", alphas=alphas, limit=ITEMS)
            context = EvalContext(options, model, tok, vector, Run(Path(name) / "run"))
            context.measure(Sycophancy.of_run(context))

    return action, count + 1


def of_items(count: int) -> tuple[Action, float]:
    model, tok = ws.load_model("pocket", device="cpu")
    behavior, vector = ws.load_behavior("honesty", "pocket"), random_vector(model, "all")
    assert behavior.claims is not None
    claims = behavior.claims.claims[:count]
    assert len(claims) == count

    def action() -> None:
        with ws.steer(model, vector):
            evaluate_sycophancy(model, tok, claims, batch_size=16)

    return action, count


def of_clients(count: int) -> tuple[Action, float]:
    """So many answers of one length by the engine below `ws serve`, each with a strength of its own."""
    model, tok = ws.load_model("pocket", device="cpu")
    questions = itertools.cycle(ws.load_behavior("truthfulness").questions)
    prompts = [encode(tok, render_prompt(tok, q)) for q in itertools.islice(questions, count)]
    scheduler = Scheduler(model, tok, {"v": random_vector(model, "all")}, max_batch=count)
    scheduler._ends = frozenset()
    return lambda: at_once(scheduler, prompts, torch.linspace(-1, 1, count).tolist(), 24), count


@dataclass(frozen=True)
class Series:
    """What grows, and the sizes at which it is measured."""

    unit: str
    sizes: tuple[int, ...]
    prepare: Callable[[int], tuple[Action, float]]


SERIES = {
    "model": Series("quarters of Qwen3-0.6B's depth, width and vocabulary", (1, 2, 3, 4), of_model),
    "rank": Series("rank", (8, 64, 512), of_rank),
    "vectors": Series("vectors of rank 16, active at once", (1, 4, 16), of_vectors),
    "strengths": Series("strengths beside the base", (1, 4, 16), of_strengths),
    "items": Series("claims", (16, 64, 256), of_items),
    "clients": Series("clients", (1, 8, 64), of_clients),
}


def memory(series: Series, size: int) -> dict[str, float]:
    """The peak of one size in this process, in MiB above what was there before, and its number."""
    numbers = list[float]()

    def once() -> None:
        action, x = series.prepare(size)
        action()
        numbers.append(x)

    return {"mib": harness.peak_above(once), "x": numbers[0]}


def times(series: Series, rounds: int) -> list[list[float]]:
    """Seconds of every size, round by round; who goes first changes."""
    actions = [series.prepare(size)[0] for size in series.sizes]
    order, seen = list(range(len(actions))), list[list[float]]()
    for number in range(-1, rounds):
        took = dict[int, float]()
        for i in order[:: -1 if number % 2 else 1]:
            took[i] = harness.seconds(actions[i])
        seen += [[took[i] for i in order]] if number >= 0 else []
    return seen


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The `e` of `y = c x^e`, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def growth(x: Sequence[float], rounds: Sequence[Sequence[float]], sizes: Sequence[int]) -> dict[str, Any]:
    """Ratios to the smallest size, which stands first, and the exponent, from one number for every size and round."""
    columns = list(zip(*rounds, strict=True))
    return {
        "median": {size: statistics.median(column) for size, column in zip(sizes, columns, strict=True)},
        "over_smallest": {
            size: harness.Spread.ratio(column, columns[0]) for size, column in zip(sizes[1:], columns[1:], strict=True)
        },
        "exponent": harness.Spread.of(exponent(x, y) for y in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--part", choices=("memory", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.part:
        series = SERIES[o.series[0]]
        with STEERED:
            print(json.dumps(memory(series, o.size) if o.part == "memory" else times(series, o.rounds)), flush=True)
        return
    results: dict[str, Any] = {"rounds": o.rounds}
    for name in o.series:
        part = ["-m", "benchmarks.exponents", "--series", name, f"--rounds={o.rounds}", "--part"]
        sizes = SERIES[name].sizes
        peaks = [harness.fresh_process([*part, "memory", f"--size={size}"]).output for size in sizes]
        x, taken = [p["x"] for p in peaks], harness.fresh_process([*part, "time"]).output
        found = {"time": growth(x, taken, sizes), "memory": growth(x, [[p["mib"] for p in peaks]], sizes)}
        results[name] = {"unit": SERIES[name].unit, "x": x, **found}
        print(json.dumps({name: found}, default=asdict), flush=True)
    harness.record("exponents", results)


if __name__ == "__main__":
    main()
