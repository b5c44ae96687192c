"""What do two vectors do to each other? Honesty and sycophancy on the bundled model, alone and added up, three seeds.

`uv run python -m benchmarks.interference` trains both behaviours with LoRA (a seed is of initialisation and order, the
pairs of a behaviour are shared), adds them up with several coefficients by `ws.analysis.compose`, and measures effects
alone and together on the held-out claims of the `report` split. As a null, the other term is also replaced by a random
vector of its norms. Writes `benchmarks/results/interference.json` and `docs/results/interference.csv`. Everything
resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import harness
from ws.analysis.compose import Composition, Conditions, carry_out, interference_rows, measure
from ws.analysis.compose import render_interference as render
from ws.analysis.controls import draw_seed, random_like
from ws.behaviors import load_behavior
from ws.eval.context import EvalContext
from ws.eval.evaluation import Rows
from ws.files.runs import run_folder, write_csv
from ws.lm.models import load_model
from ws.options.make import ComposeOptions, ReplicateConfig
from ws.replicate import replicate

EXPRESSIONS = ("honesty*1.0 + sycophancy*-0.5", "honesty*1.0 + sycophancy*0.5", "honesty*0.5 + sycophancy*0.25")
RANDOM = "random, size of sycophancy"
DOCS = Path(__file__).parents[1] / "docs" / "results"


def train(behavior: str, seed: int, out: Path) -> None:
    """A LoRA vector of a behaviour, unless it is there."""
    if not (run_folder(out, behavior, "lora", seed) / "vector").is_dir():
        replicate(replace(ReplicateConfig.preset("pocket", "lora"), behavior=behavior, seed=seed, out=out))


def one_seed(expression: str, seed: int, out: Path) -> tuple[Composition, EvalContext, ComposeOptions]:
    """The composition of one seed's vectors, ready to be measured."""
    options = ComposeOptions(expression, seed=seed, out=out, device="cpu")
    made = carry_out(options)
    model, tok = load_model("pocket", device="cpu")
    context = EvalContext(options.eval_options(made.behavior, made.name), model, tok, made.vector, made.run)
    return made, context, options


def with_random(made: Composition, context: EvalContext, seed: int) -> tuple[Composition, EvalContext]:
    """The same with the second term's vector replaced by a random one of its coordinates and norms."""
    first, second = made.operands
    noise = random_like(second.vector, context.model, draw_seed(seed, 0))
    term = replace(second.term, name=RANDOM)
    operands = (first, replace(second, term=term, vector=replace(noise, info={})))
    vector = operands[0].change + operands[1].change
    return replace(made, operands=operands, vector=vector), replace(context, vector=vector)


def pool(seeds: Sequence[Conditions]) -> Conditions:
    """The conditions of several seeds as one."""

    def joined(name: str) -> dict[str, np.ndarray]:
        return {k: np.concatenate([getattr(s, name)[k] for s in seeds]) for k in getattr(seeds[0], name)}

    names = ("logratio", "pmass", "kl", "cosine")
    return replace(seeds[0], **{name: joined(name) for name in names})


def rows_of(expression: str, seeds: Sequence[int], out: Path, null: bool) -> tuple[Rows, dict[str, list[float]]]:
    """The pooled rows of an expression, and the cosines of its two terms by seed."""
    found: dict[str, list[Conditions]] = {}
    for seed in seeds:
        made, context, options = one_seed(expression, seed, out)
        behaviors = ["honesty", "sycophancy"]
        if null:
            (made, context), behaviors = with_random(made, context, seed), ["honesty"]
        for name in behaviors:
            conditions = measure(context, made.operands, load_behavior(name, "pocket"), options)
            found.setdefault(name, []).append(conditions)
    about = {"expression": expression.replace("sycophancy", "random") if null else expression, "adapter": "lora"}
    rows = [row for c in found.values() for row in interference_rows(pool(c), about, n_boot=10_000)]
    other = next(name for name in found["honesty"][0].terms if name not in found["honesty"][0].own_terms)
    return rows, {about["expression"]: [float(c.cosine[other][0]) for c in found["honesty"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/interference"))
    parser.add_argument("--dry", action="store_true", help="print, but write no result files")
    o = parser.parse_args()
    for behavior in ("honesty", "sycophancy"):
        for seed in o.seeds:
            train(behavior, seed, o.out)
    rows, cosines = [], dict[str, list[float]]()
    for expression, null in [*((e, False) for e in EXPRESSIONS), (EXPRESSIONS[0], True)]:
        found, cosine = rows_of(expression, o.seeds, o.out, null)
        print(f"\n{next(iter(cosine))}\n\n{render(found)}")
        rows, cosines = rows + found, cosines | cosine
    print(cosines)
    if not o.dry:
        harness.record("interference", {"seeds": o.seeds, "cosine_of_the_terms": cosines, "rows": rows})
        write_csv(DOCS / "interference.csv", rows)


if __name__ == "__main__":
    main()
