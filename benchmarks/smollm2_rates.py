"""Which learning rate (for delora, which lambda) does each family want on SmolLM2? Chosen on `dev` questions.

`uv run python -m benchmarks.smollm2_rates` trains the vector of `truthfulness`, one seed, with every family at
multiples of its default (upwards until it costs too much, or downwards until it does not) and reads how far the
preference between the true and the false answer moves at alpha -2, -1, 1 and 2, and what it costs at -1 and +1 in
divergence on the same questions. A strength multiplies a vector, so a higher rate alone proves nothing; chosen is the
one whose smaller shift at -1 and +1 is largest among those that are monotone over [-2, 2] and cost at most one nat at
-1 and +1, so that a strength of 1 is about as strong as it can usefully be. The choice stands in
`ws.train.train_preset`. Writes `docs/results/smollm2_rates.csv` and `benchmarks/results/smollm2_rates.json`.
Everything resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import ws
from benchmarks import harness
from ws.adapters import FAMILIES, family
from ws.behaviors import Behavior
from ws.data import PAIRS_FILE, generate_pairs
from ws.diff import SteeringVector
from ws.eval.preference import evaluate_preference, margins
from ws.files.runs import Run, sha256_file, write_csv
from ws.lm.divergence import divergence
from ws.lm.models import render_prompt
from ws.options.make import SIGNS, TrainConfig, data_preset, train_preset
from ws.steer import steer
from ws.train import train_stage

MODEL, BEHAVIOR = "smollm2", "truthfulness"
ALPHAS = (-2.0, -1.0, 1.0, 2.0)
DOCS = Path(__file__).parents[1] / "docs" / "results"
FACTORS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
N_PROMPTS, N_TOKENS = 16, 24


def measure(
    model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, adapter: str, out: Path, factor: float
) -> dict[str, Any]:
    """One family at one rate: its shift in nats per token and its divergence in nats, at every strength."""
    rate, bound = family(adapter).learning_rate, TrainConfig.delora_lambda
    run = Run(out / f"{adapter}-{factor:g}")
    # DeLoRA's change has the norm that its lambda says, whatever the rate.
    factors = (1.0, factor) if adapter == "delora" else (factor, 1.0)
    varied = {"lr": factors[0] * rate, "delora_lambda": factors[1] * bound}
    config = replace(train_preset(MODEL, adapter), **varied)
    for sign in SIGNS:
        train_stage(model, tok, out / "data" / PAIRS_FILE, sign, run, adapter, config, 0)
    trained = {sign: sha256_file(run.folder / sign / "adapter_model.safetensors") for sign in SIGNS}
    stage = run.refresh("shifts", {"alphas": list(ALPHAS), "prompts": N_PROMPTS, "tokens": N_TOKENS}, trained)
    if stage is not None:
        arms = [SteeringVector.from_adapter(run.folder / sign, model) for sign in SIGNS]
        vector, items = arms[0] - arms[1], behavior.held_out("dev")
        prompts = [render_prompt(tok, p.question) for p in items[:: len(items) // N_PROMPTS]][:N_PROMPTS]
        base, found = margins(items, evaluate_preference(model, tok, items)), dict[str, float]()
        for alpha in ALPHAS:
            with steer(model, vector, alpha):
                found[f"shift_{alpha:+g}"] = float(
                    (margins(items, evaluate_preference(model, tok, items)) - base).mean()
                )
            if abs(alpha) == 1:
                condition = partial(steer, model, vector, alpha)
                found[f"nats_{alpha:+g}"] = divergence(model, tok, prompts, condition, N_TOKENS).at()
        stage.done([], found=found)
    return {"adapter": adapter, "factor": factor, **varied} | run.facts("shifts")["found"]


def may_be_chosen(row: dict[str, Any]) -> bool:
    """Monotone over all strengths, and no dearer than one nat at -1 and +1."""
    shifts = [row[f"shift_{a:+g}"] for a in ALPHAS]
    return sorted(shifts) == shifts and shifts[1] < 0 < shifts[2] and max(row["nats_-1"], row["nats_+1"]) <= 1.0


def search(at: Callable[[float], dict[str, Any]], start: float) -> list[dict[str, Any]]:
    """Rows of the factors that are tried: upwards as long as one may be chosen, or else downwards until one may."""
    first, tried = FACTORS.index(start), [at(start)]
    for factor in FACTORS[first + 1 :] if may_be_chosen(tried[0]) else FACTORS[:first][::-1]:
        tried.append(at(factor))
        if may_be_chosen(tried[-1]) != may_be_chosen(tried[0]):
            break
    return sorted(tried, key=lambda row: row["factor"])


def choose(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The rate of one family with the largest smaller shift; None where no rate may be chosen."""
    return max(filter(may_be_chosen, rows), key=lambda r: min(-r["shift_-1"], r["shift_+1"]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/smollm2_rates"))
    parser.add_argument("--dry", action="store_true", help="print, but write no result files")
    o = parser.parse_args()
    model, tok = ws.load_model(MODEL, device="cpu")
    behavior = ws.load_behavior(BEHAVIOR, MODEL)
    generate_pairs(model, tok, behavior, o.out / "data", data_preset(MODEL))
    rows = list[dict[str, Any]]()
    for adapter in o.adapters:
        tried = search(partial(measure, model, tok, behavior, adapter, o.out), 0.1 if adapter == "delora" else 1.0)
        chosen = choose(tried)
        rows += [row | {"chosen": row is chosen} for row in tried]
        print(tabulate(rows, headers="keys", floatfmt="+.3f"), flush=True)
    if not o.dry:
        write_csv(DOCS / "smollm2_rates.csv", rows)
        harness.record(
            "smollm2_rates", {"behavior": BEHAVIOR, "questions": len(behavior.held_out("dev")), "rows": rows}
        )


if __name__ == "__main__":
    main()
