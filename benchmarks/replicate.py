"""`ws replicate` on the bundled model against a plain script that does the same by hand with transformers and PEFT.

`uv run python -m benchmarks.replicate` takes honesty and LoRA on `pocket`, with the settings of its preset and one
answer of either side to every question, in rounds in which who goes first changes. Every run is a fresh process:

- ours: `ws replicate` into an empty folder;
- plain: `generate`, eight prompts at a time; transformers' Trainer on PEFT's LoRA, once for each side; both adapters
  merged and subtracted; and for every strength the weights cloned, changed, scored on held-out claims and put back.

What only ours does (it asks the base first, describes the pairs, keeps what is needed to go on, reads held-out
questions, gives intervals) counts as its time. Beside time and memory stand both spans of the log ratio; they are of
different samples, and must be alike in sign for both to have done the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import ws
from benchmarks import harness, reference
from benchmarks.sampling import by_generate
from benchmarks.training import plain as train_plainly
from ws.behaviors.tables import evenly
from ws.data import Pair
from ws.eval.sycophancy import prompts_of
from ws.lm.models import encode, end_ids, render_prompt
from ws.lm.sampling import sampling_settings
from ws.options.make import SIGNS, ReplicateConfig
from ws.replicate import replicate
from ws.train import build_examples

BATCH = 32


def settings(questions: int, folder: Path) -> ReplicateConfig:
    """The preset, without a share for validation: both sides learn from every pair."""
    usual = ReplicateConfig.preset("pocket")
    data = replace(usual.data, n_topics=questions, n_samples=1)
    return replace(usual, out=folder, data=data, train=replace(usual.train, validation=0.0), device="cpu")


def ours(config: ReplicateConfig) -> float:
    """The span of the false claims."""
    return replicate(config).span.mean


def plain(config: ReplicateConfig) -> float:
    """The same span, by hand."""
    model, tok = ws.load_model(config.model, device="cpu")
    behavior, ends, torch_seed = ws.load_behavior(config.behavior, config.model), end_ids(model, tok), config.seed
    questions = evenly(behavior.questions, config.data.n_topics or 0)

    answers = dict[str, list[str]]()
    for side, persona in zip(SIGNS, (behavior.positive[0], behavior.negative[0]), strict=True):
        prompts = [encode(tok, render_prompt(tok, q, system=persona)) for q in questions]
        limit = config.data.max_new_tokens
        made = by_generate(model, tok.pad_token_id, ends, sampling_settings(model), limit, prompts)
        answers[side] = [tok.decode(row, skip_special_tokens=True).strip() or "-" for row in made]
    both = zip(questions, *answers.values(), strict=True)
    pairs = [Pair(f"q{i}", question, pos, neg, 1, 1) for i, (question, pos, neg) in enumerate(both)]

    for side in SIGNS:
        torch.manual_seed(torch_seed)
        rows = [e.features() for e in build_examples(tok, pairs, side, config.train.max_length)]
        trained = train_plainly(model, tok, rows, config.train, config.out)
        trained.save_pretrained(str(config.out / side))
        model = trained.unload()
    change = reference.merge_and_subtract(model, *(config.out / side for side in SIGNS))
    change = {name: change[name] for name, _ in model.named_parameters()}

    assert behavior.claims is not None
    words, means = prompts_of(behavior.claims), dict[float, float]()
    for alpha in config.alphas:
        with reference.dense_steering(model, change, alpha):
            for is_true in (True, False):
                claims = behavior.claims.select(config.split, is_true)
                asked = (render_prompt(tok, words.question.format(claim=c.text), opener=words.opener) for c in claims)
                prompts = [encode(tok, text) for text in asked]
                logp = reference.score(model, tok, prompts, (words.agree, words.disagree), BATCH)
                means[alpha] = float((logp[:, 0] - logp[:, 1]).mean())  # that of the false ones stays
    return means[1.0] - means[-1.0]


SIDES = {"ours": ours, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--part", choices=SIDES)
    options = parser.parse_args()
    if options.part:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({"span": SIDES[options.part](settings(options.questions, Path(folder)))}))
        return
    part = ["-m", "benchmarks.replicate", f"--questions={options.questions}", "--part"]
    mine, other = harness.in_turns({side: [*part, side] for side in SIDES}, options.rounds).values()
    results = {"questions": options.questions}
    results |= {
        f"{what}_ours_over_plain": harness.Spread.ratio(*([getattr(p, what) for p in side] for side in (mine, other)))
        for what in ("seconds", "cpu_seconds", "peak_mib")
    }
    results["spans"] = {"ours": [p.output["span"] for p in mine], "plain": [p.output["span"] for p in other]}
    harness.record("replicate", results)


if __name__ == "__main__":
    main()
