"""Which way of fine-tuning keeps an unwanted trait out? Plain, with the vector active, subtracted, and prompted.

`uv run python -m benchmarks.prevention` fine-tunes the bundled model on answers that all begin with "Of course.", which
is the task; half of them, of other questions, are dishonest, which is the trait nobody asked for. `--model smollm2`
does the same with the true and the false answers of the bundled pairs of `truthfulness`. The vector of every seed is
trained on other questions than the fine-tunes are, and calibrated; the strength is -1u, one nat per token from the
base. The pairs and the examples are those of all seeds, which differ in initialisation and order, of vector and
fine-tunes.

Writes `benchmarks/results/prevention_<model>.json` and `docs/results/prevention_<model>.csv`. Everything resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ws
from benchmarks import harness
from ws.analysis.prevention import Measured, prevent, render, rows_of
from ws.console import Stages
from ws.data import question_key as key_of
from ws.data import question_keys, read_pairs, sample_answers
from ws.files.runs import data_folder, write_csv, write_text
from ws.intervene.calibrate import calibration_for
from ws.intervene.interventions import intervention
from ws.lm.models import render_prompt
from ws.options.make import PreventOptions, ReplicateConfig
from ws.options.measure import CalibrateOptions
from ws.replicate import make_vector
from ws.run import open_options

DOCS = Path(__file__).parents[1] / "docs" / "results"
STYLE, MAX_NEW_TOKENS = "Of course. ", 64


@dataclass(frozen=True)
class Setting:
    """What is done with one model.

    Attributes:
        behavior: whose negative side is the trait.
        topics, personas: questions that the vector is trained on, and pairs of personas that answer them.
        examples: questions of the fine-tunes, half of them with the trait.
        prompts: questions that strengths are solved for on, at most.
        limit: items of an evaluation, at most.
        training: what differs from the model's preset, under which twelve steps learn next to nothing of the trait.
    """

    behavior: str
    topics: int
    personas: int | None
    examples: int
    prompts: int
    limit: int
    training: Mapping[str, Any]


SETTINGS = {
    "pocket": Setting("honesty", 200, 1, 240, 24, 48, {"lr": 3e-3, "epochs": 5.0}),
    "smollm2": Setting("truthfulness", 96, None, 152, 16, 44, {"epochs": 2.0}),
}


def make(model: str, seed: int, out: Path) -> str:
    """The vector of a seed, calibrated, and the examples; returns the name of their file."""
    setting, start = SETTINGS[model], ReplicateConfig.preset(model, "lora")
    data = replace(start.data, n_topics=setting.topics, n_personas=setting.personas, anyway=True)
    config = replace(start, behavior=setting.behavior, seed=seed, out=out, device="cpu", data=data)
    stages = Stages(0)
    make_vector(config, stages)
    stages.end()
    options = CalibrateOptions(
        behavior=setting.behavior, adapter="lora", seed=seed, out=out, device="cpu", n_prompts=setting.prompts
    )
    opened, behavior = open_options(options), ws.load_behavior(setting.behavior, model)
    calibration_for(intervention("weight", opened, behavior), opened, behavior, options.config, options.key)
    file = out / "examples.jsonl"
    if not file.is_file():
        rows = examples(opened.model, opened.tok, behavior, data_folder(out, model, behavior.name), setting.examples)
        write_text(file, "".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def examples(model: Any, tok: Any, behavior: ws.Behavior, pairs: Path, count: int) -> list[dict[str, str]]:
    """Questions that no pair of the vector has, in turn with an answer of the task alone and one with the trait."""
    seen = question_keys(read_pairs(pairs))
    brought = {p.question: (p.positive, p.negative) for p in behavior.pairs}
    pool = [q for q in (brought or behavior.questions) if key_of(q) not in seen]
    asked = [pool[i * len(pool) // count] for i in range(min(count, len(pool)))]
    if brought:
        answers = [brought[q][i % 2] for i, q in enumerate(asked)]
    else:
        systems = ["" if i % 2 == 0 else behavior.negative[0] for i in range(len(asked))]
        prompts = [render_prompt(tok, q, system=s) for q, s in zip(asked, systems, strict=True)]
        answers = [a.text if a.ended else "" for a in sample_answers(model, tok, prompts, MAX_NEW_TOKENS, seed=0)]
    return [
        {"question": question, "answer": STYLE + answer, "kind": ("task", "trait")[i % 2]}
        for i, (question, answer) in enumerate(zip(asked, answers, strict=True))
        if answer
    ]


def pooled(by_seed: Sequence[Sequence[Measured]]) -> list[Measured]:
    """The scores of several seeds as one; what cannot be read at one of them cannot be read."""
    return [
        replace(
            of[0],
            values={way: np.concatenate([m.values[way] for m in of]) for way in of[0].values},
            problems={way: next((p for m in of if (p := m.problems[way])), "") for way in of[0].problems},
        )
        for of in zip(*by_seed, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--strength", default="-1u")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/prevention"))
    parser.add_argument("--dry", action="store_true", help="print, but write no result files")
    o = parser.parse_args()
    setting, by_seed = SETTINGS[o.model], []
    for seed in o.seeds:
        file = make(o.model, seed, o.out / o.model)
        options = PreventOptions(
            examples=file, strength=o.strength, behavior=setting.behavior, seed=seed, out=o.out / o.model, device="cpu",
            limit=setting.limit, **setting.training,
        )  # fmt: skip
        by_seed.append(prevent(options)[1])
    key = {"name": o.model, "behavior": setting.behavior, "adapter": "lora", "strength": o.strength}
    rows = rows_of(pooled(by_seed), key, 10_000)
    print(render(rows, "github"))
    if not o.dry:
        write_csv(DOCS / f"prevention_{o.model}.csv", rows)
        harness.record(f"prevention_{o.model}", {"seeds": o.seeds, "rows": rows}, "prevention")


if __name__ == "__main__":
    main()
