"""What makes a better vector of the same pairs? Ways to learn from them, which of them and how many, at one divergence.

`uv run python -m benchmarks.contrasts` trains LoRA vectors of honesty on the bundled model in every way (`WAYS`) and on
every number of pairs (`SIZES`), each for as many steps as all pairs take, three seeds. Each is read at -1u and +1u, one
nat per token from the base, on the held-out items of `report`; beside the two arms stand either of them alone, the
gradient of the contrast and added activations, and a vector of shuffled labels. `--model smollm2` does it with
`truthfulness`, read by the preference on held-out questions.

What a run gave is kept, item by item, in `benchmarks/results/contrasts/`, and is part of the repository; the tables,
`docs/results/contrasts_<model>.csv`, are made of all there is. `--ways` and `--seeds` do a part, `--tables` none.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import harness
from ws import console
from ws.analysis.controls import exchange_half
from ws.behaviors import Behavior, load_behavior
from ws.behaviors.acting import persona_margins
from ws.data import PAIRS_FILE, Pair, generate_pairs, pair_lines, read_pairs
from ws.eval.capability import Capability, read_texts
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation
from ws.eval.preference import Preferences
from ws.eval.sycophancy import Sycophancy
from ws.files.runs import Run, data_folder, write_csv, write_text
from ws.intervene.calibrate import calibration_for
from ws.lm.models import load_model
from ws.options.make import ReplicateConfig
from ws.options.shared import CalibrationConfig
from ws.replicate import eval_options, train_vector
from ws.stats import estimate_over_seeds, holm

BEHAVIORS = {"pocket": "honesty", "smollm2": "truthfulness"}
SIZES = (8, 16, 32, 64, 128, 256, 512)
BESIDE = ("positive-only", "negative-only", "gradient", "gradient-low-rank", "activation")  # the two arms
PROMPTS = 16  # that strengths are solved for on; as many others check them
KEPT = Path(__file__).parent / "results" / "contrasts"
DOCS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Way:
    """How a vector is made.

    Attributes:
        contrast: `arms` or `signed`.
        training: what differs from the model's preset.
        pairs: `all`; the `acted` half, whose answers gain most from their own personas; `shuffled` ones; or so many.
    """

    contrast: str = "arms"
    training: dict[str, Any] = field(default_factory=dict)
    pairs: str | int = "all"


CONTRASTS = ("arms", "signed")
WAYS = {
    "arms": Way(),
    "signed": Way("signed"),
    **{f"{c}, penalty": Way(c, {"kl": 0.1}) for c in CONTRASTS},
    **{f"{c}, margin": Way(c, {"objective": "margin"}) for c in CONTRASTS},
    **{f"{c}, acted half": Way(c, pairs="acted") for c in CONTRASTS},
    **{f"{c}, shuffled": Way(c, pairs="shuffled") for c in CONTRASTS},
    **{f"{c}, {n} pairs": Way(c, pairs=n) for n in SIZES for c in CONTRASTS},
}


class Reading(msgspec.Struct):
    """What was measured of one intervention.

    Attributes:
        way, intervention, seed, n_pairs: what it is.
        problem: why it was not measured; empty where it was.
        alphas, audit: the strengths -1u and +1u, and what they cost on other questions, in nats.
        spans: `score(+1u) - score(-1u)` of every item, by score.
        kl: the mean KL divergence from the base on neutral text, at either strength, in nats per token.
    """

    way: str
    intervention: str
    seed: int
    n_pairs: int
    problem: str = ""
    alphas: list[float] = []
    audit: list[float] = []
    spans: dict[str, list[float]] = {}
    kl: list[float] = []


class Bench:
    """A model with the pairs of a behaviour."""

    def __init__(self, name: str, out: Path) -> None:
        self.start = replace(ReplicateConfig.preset(name, "lora"), behavior=BEHAVIORS[name], out=out, device="cpu")
        self.start = replace(self.start, data=replace(self.start.data, anyway=True, keep_truncated=name == "smollm2"))
        self.model, self.tok = load_model(name, "cpu")
        self.behavior: Behavior = load_behavior(self.start.behavior, name)
        folder = data_folder(out, name, self.behavior.name)
        generate_pairs(self.model, self.tok, self.behavior, folder, self.start.data)
        self.pairs = [p for p in read_pairs(folder / PAIRS_FILE) if p.drop is None]
        train = self.start.train
        epochs = ceil(round((1 - train.validation) * len(self.pairs)) / train.batch * train.epochs)
        self.steps = train.max_steps or epochs

    def chosen(self, way: Way, seed: int) -> list[Pair]:
        """The pairs that a way learns from."""
        if way.pairs == "shuffled":
            return list(exchange_half(self.pairs, seed))
        if way.pairs == "acted":
            return self.acted()
        return self.pairs if way.pairs == "all" else random.Random(seed).sample(self.pairs, int(way.pairs))

    def acted(self) -> list[Pair]:
        """The half of the pairs whose less acted answer gains most from its own persona."""
        both = list(zip(self.behavior.positive, self.behavior.negative, strict=True))
        personas = [both[int(p.id.split("-")[1][1:])] for p in self.pairs]
        cut = [(p.pos_cut, p.neg_cut) for p in self.pairs]
        margins = persona_margins(
            self.model, self.tok, [p.question for p in self.pairs], personas, [(p.pos, p.neg) for p in self.pairs], cut
        )
        best = np.argsort(-margins.min(axis=1), kind="stable")[: len(self.pairs) // 2]
        return [self.pairs[i] for i in sorted(best)]

    def can(self, way: Way) -> bool:
        """Whether there are as many pairs, and personas where they matter."""
        few = isinstance(way.pairs, int) and way.pairs > len(self.pairs)
        return not few and (way.pairs != "acted" or bool(self.behavior.positive))

    def vector(self, name: str, seed: int) -> tuple[EvalContext, int]:
        """The run of a way and a seed, and its number of pairs."""
        way = WAYS[name]
        out = self.start.out if name == "arms" else self.start.out / name.replace(", ", "-").replace(" ", "-")
        train = replace(self.start.train, **way.training, max_steps=self.steps, validation=0.0)
        config = replace(self.start, out=out, seed=seed, contrast=way.contrast, train=train)
        run, pairs = Run(config.run_folder(self.behavior.name)), self.chosen(way, seed)
        file = run.folder / PAIRS_FILE
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, pair_lines(pairs))
        stages = console.Stages(1 + len(CONTRASTS))
        vector = train_vector(self.model, self.tok, self.behavior, config, file, run, stages)
        return EvalContext(eval_options(config), self.model, self.tok, vector, run), len(pairs)

    def read(self, context: EvalContext, reading: Reading) -> Reading:
        """An intervention of a run at -1u and +1u."""
        chosen, behavior = context.intervention(reading.intervention), self.behavior
        config = CalibrationConfig(n_prompts=PROMPTS)
        key = context.key | ({"adapter": reading.intervention, "seed": 0} if chosen.is_shared else {})
        calibration = calibration_for(chosen, context.opened, behavior, config, key, reuse=True)
        for side in (calibration.negative, calibration.positive):
            if not side.converged:
                reading.problem = side.reason
                return reading
            reading.alphas.append(side.alpha)
            reading.audit.append(side.divergence if side.audit is None else side.audit)
        kind: Any = Preferences if behavior.held_out("report") else Sycophancy
        evaluation: Evaluation = kind.of_behavior(context, behavior, "report")
        scores = context.scores(evaluation, chosen, [0.0, *reading.alphas])
        low, high = (evaluation.headlines(scores[alpha]) for alpha in reading.alphas)
        expected = 1 if kind is Preferences else behavior.effect
        reading.spans = {name: (expected * (high[name] - low[name])).round(5).tolist() for name in high}
        neutral = Capability.of_run(context)
        for alpha in reading.alphas:
            with chosen.at(alpha):
                read = read_texts(self.model, self.tok, neutral.neutral.texts, neutral.base, neutral.max_tokens)
            reading.kl.append(float(read["kl"].mean()))
        return reading

    def run(self, name: str, seed: int) -> list[Reading]:
        """All that is read of a way and a seed."""
        context, n_pairs = self.vector(name, seed)
        interventions = ("weight", *(BESIDE if name == "arms" else ()))
        return [self.read(context, Reading(name, which, seed, n_pairs)) for which in interventions]


def kept(model: str) -> dict[tuple[str, str], list[Reading]]:
    """What all runs gave, by way and intervention, seeds in order."""
    files = sorted((KEPT / model).glob("*.json"))
    found = [r for file in files for r in msgspec.json.decode(file.read_bytes(), type=list[Reading])]
    by_name: dict[tuple[str, str], list[Reading]] = {}
    for way in WAYS:
        for r in sorted((r for r in found if r.way == way), key=lambda r: r.seed):
            by_name.setdefault((way, r.intervention), []).append(r)
    return by_name


def rows_of(model: str) -> list[dict[str, Any]]:
    """One row per way, intervention and score: the span and what it is beyond that of the two arms, seed by seed."""
    groups, rows = kept(model), list[dict[str, Any]]()
    arms = {r.seed: r for r in groups.get(("arms", "weight"), [])}
    for (way, intervention), readings in groups.items():
        usable = [r for r in readings if not r.problem]
        key = {"model": model, "behavior": BEHAVIORS[model], "way": way, "intervention": intervention}
        problems = "; ".join(f"seed {r.seed}: {r.problem}" for r in readings if r.problem)
        for score in usable[0].spans if usable else ():
            spans = np.array([r.spans[score] for r in usable])
            row = key | {"score": score, "n_pairs": usable[0].n_pairs, "seeds": " ".join(str(r.seed) for r in usable)}
            row |= estimate_over_seeds(spans).columns("span", "ci_lo", "ci_hi")
            both = [r for r in usable if r.seed in arms and not arms[r.seed].problem]
            beyond = None
            if both and (way, intervention) != ("arms", "weight"):
                other = np.array([arms[r.seed].spans[score] for r in both])
                beyond = estimate_over_seeds(np.array([r.spans[score] for r in both]) - other)
            empty = dict.fromkeys(("beyond_arms", "beyond_arms_ci_lo", "beyond_arms_ci_hi", "p"))
            row |= empty if beyond is None else beyond.columns("beyond_arms", "ci_lo", "ci_hi") | {"p": beyond.p}
            row |= {"audit": float(np.mean([r.audit for r in usable])), "kl": float(np.mean([r.kl for r in usable]))}
            rows.append(row | {"p_holm": None, "problems": problems})
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm(np.array([r["p"] for r in tested])) if tested else (), strict=True):
        row["p_holm"] = float(p)
    return rows


def measure(model: str, ways: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """Make and read what is not kept yet."""
    files = {(w, s): KEPT / model / f"{w.replace(', ', '-').replace(' ', '-')}_{s}.json" for s in seeds for w in ways}
    left = {run: file for run, file in files.items() if not file.exists()}
    if not left:
        return
    bench = Bench(model, out / model)
    left = {run: file for run, file in left.items() if bench.can(WAYS[run[0]])}
    countdown = console.Countdown(len(left))
    for (way, seed), file in left.items():
        console.say(f"== {way}, seed {seed}{countdown.left}")
        write_text(file, msgspec.json.encode(bench.run(way, seed)).decode() + "\n")
        countdown.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", choices=list(BEHAVIORS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/contrasts"))
    parser.add_argument("--tables", action="store_true", help="make nothing but the tables")
    o = parser.parse_args()
    if not o.tables:
        measure(o.model, o.ways, o.seeds, o.out)
    if rows := rows_of(o.model):
        write_csv(DOCS / f"contrasts_{o.model}.csv", rows)
        harness.record(f"contrasts_{o.model}", {"rows": rows}, "contrasts")


if __name__ == "__main__":
    main()
