"""What makes a better vector of the same pairs? Ways to learn from them, which of them and how many, at one divergence.

`uv run python -m benchmarks.contrasts` trains LoRA vectors of honesty on the bundled model in every way (`WAYS`) and on
every number of pairs (`SIZES`), each for as many steps as all pairs take, and the other families in both contrasts,
three seeds. Each is read at -1u and +1u, one nat per token from the base, on the held-out items of `report`; beside the
two arms of LoRA stand either of them alone, the gradient of the contrast and added activations, and vectors of shuffled
labels. `--model smollm2` does it with `truthfulness`, read by the preference on held-out questions, and, with the real
data at hand (WS_REAL_DATA), by how selective it is among every third trait of model-written evals.

What a run gave is kept, item by item, in `benchmarks/results/contrasts/`, and is part of the repository; the tables,
`docs/results/contrasts_<model>.csv` and `..._beyond_arms.csv`, are made of all there is. `--ways` and `--seeds` do a
part, `--tables` none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import harness
from benchmarks.smollm2 import Row, keep, read_kept
from ws import console
from ws.adapters import FAMILIES
from ws.analysis.compare import compare
from ws.analysis.compare_tables import COSTS, Cell, Group, group_rows, nats_text
from ws.analysis.controls import exchange_half
from ws.behaviors import Behavior, load_behavior
from ws.behaviors.acting import persona_margins
from ws.data import PAIRS_FILE, Pair, generate_pairs, pair_lines, read_pairs
from ws.eval.statements import COLUMNS, draw_statements, load_statements
from ws.files.runs import Run, data_folder, write_csv, write_text
from ws.lm.models import load_model
from ws.options.make import CONTRASTS as SIDES
from ws.options.make import ReplicateConfig
from ws.options.measure import CompareOptions
from ws.options.shared import WEIGHT
from ws.replicate import train_vector
from ws.stats import estimate_over_seeds, estimate_text, holm

BEHAVIORS = {"pocket": "honesty", "smollm2": "truthfulness"}
SIZES = (8, 16, 32, 64, 128, 256, 512)
ONE_SIDED = ("positive-only", "negative-only")  # of the two arms
# No seed has a part in them, so that one is enough where they cost hours; `benchmarks.smollm2` has added activations.
UNTRAINED = {"pocket": ("gradient", "gradient-low-rank", "activation"), "smollm2": ("gradient", "gradient-low-rank")}
PROMPTS = {"pocket": 100, "smollm2": 16}  # that strengths are solved for on, at most; as many others check them
EVERY, STATEMENTS = 3, 8  # trait of model-written evals, and statements of each: all of them would take half an hour
KEPT = Path(__file__).parent / "results" / "contrasts"
DOCS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Way:
    """How a vector is made.

    Attributes:
        contrast: `arms` or `signed`.
        training: what differs from the model's preset.
        pairs: `all`; the `acted` half, whose answers gain most from their own personas; `shuffled` ones; or so many.
        adapter: the family.
    """

    contrast: str = "arms"
    training: dict[str, Any] = field(default_factory=dict)
    pairs: str | int = "all"
    adapter: str = "lora"


WAYS = {
    "arms": Way(),
    "signed": Way("signed"),
    **{f"{c}, penalty": Way(c, {"kl": 0.1}) for c in SIDES},
    **{f"{c}, margin": Way(c, {"objective": "margin"}) for c in SIDES},
    **{f"{c}, acted half": Way(c, pairs="acted") for c in SIDES},
    **{f"{c}, shuffled": Way(c, pairs="shuffled") for c in SIDES},
    **{f"{c}, {n} pairs": Way(c, pairs=n) for n in SIZES for c in SIDES},
    **{f"{c}, {a}": Way(c, adapter=a) for a in FAMILIES if a != "lora" for c in SIDES},
}


def board(model: str, out: Path) -> str | None:
    """The folder of statements that selectivity is measured on; None where claims tell, or without the real data."""
    source = os.environ.get("WS_REAL_DATA")
    if model == "pocket" or not source:
        return None
    for file in sorted((Path(source) / "anthropic-evals" / "persona").iterdir())[::EVERY]:
        drawn = draw_statements(load_statements({file.stem: file}), STATEMENTS)
        rows = [(s.question, s.text, s.matching, "No" if s.matching == "Yes" else "Yes") for s in drawn]
        lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows]
        write_text(out / "board" / file.name, "".join(f"{line}\n" for line in lines))
    return str(out / "board")


class Bench:
    """A model with the pairs of a behaviour."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out, self.board = name, out, board(name, out)
        self.model, self.tok = load_model(name, "cpu")
        self.behavior: Behavior = load_behavior(BEHAVIORS[name], name)
        self.data = data_folder(out, name, self.behavior.name)
        start = self.start("lora")
        generate_pairs(self.model, self.tok, self.behavior, self.data, start.data)
        self.pairs = [p for p in read_pairs(self.data / PAIRS_FILE) if p.drop is None]
        train = start.train
        epochs = ceil(round((1 - train.validation) * len(self.pairs)) / train.batch * train.epochs)
        self.steps = train.max_steps or epochs

    def start(self, adapter: str) -> ReplicateConfig:
        """The preset of a family, which ways depart from."""
        preset = ReplicateConfig.preset(self.name, adapter)
        data = replace(preset.data, anyway=True, keep_truncated=self.name == "smollm2")
        return replace(preset, behavior=BEHAVIORS[self.name], out=self.out, device="cpu", data=data)

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
        """Whether there are as many pairs, and answers of personas where they matter."""
        few = isinstance(way.pairs, int) and way.pairs > len(self.pairs)
        return not few and (way.pairs != "acted" or not self.behavior.pairs)

    def beside(self, seed: int) -> tuple[str, ...]:
        """What stands beside two arms of LoRA."""
        return (*ONE_SIDED, *(UNTRAINED[self.name] if self.name == "pocket" or seed == 0 else ()))

    def run(self, name: str, seed: int) -> list[Cell]:
        """The vector of a way and a seed, and what stands beside it, at -1u and +1u."""
        way, o = WAYS[name], self.start(WAYS[name].adapter)
        out = o.out if name == "arms" else o.out / slug(name)
        if name != "arms":  # strengths are solved for on what is in no pair: of all of them, whatever a way takes
            shutil.copytree(self.data, data_folder(out, self.name, self.behavior.name), dirs_exist_ok=True)
        train = replace(o.train, **way.training, max_steps=self.steps, validation=0.0)
        config = replace(o, out=out, seed=seed, contrast=way.contrast, train=train)
        run = Run(config.run_folder(self.behavior.name))
        file = run.folder / PAIRS_FILE
        write_text(file, pair_lines(self.chosen(way, seed)))
        stages = console.Stages(1 + len(SIDES[way.contrast]))
        train_vector(self.model, self.tok, self.behavior, config, file, run, stages)
        beside = self.beside(seed) if name == "arms" else ()
        evals = ("preference",) if self.behavior.held_out("report") else ("sycophancy",)
        options = CompareOptions(
            model=o.model, behavior=o.behavior, adapters=(config.run_name,), seeds=(seed,), out=out, device="cpu",
            interventions=(WEIGHT, *beside), evals=evals, board=self.board, n_prompts=PROMPTS[self.name], n_draws=0,
        )  # fmt: skip
        return compare(options)


def slug(way: str) -> str:
    """The name of a way in files."""
    return way.replace(", ", "-").replace(" ", "-")


def place(model: str, way: str, seed: int) -> Path:
    """Where the cells of a run are kept."""
    return KEPT / model / f"{slug(way)}_{seed}.json"


def kept(model: str) -> list[Group]:
    """What all runs gave, by way and intervention, under the name of the way."""
    files = [(way, place(model, way, seed)) for way in WAYS for seed in range(10)]
    return Group.of([replace(c, adapter=way) for way, file in files if file.exists() for c in read_kept(file)])


def beyond_arms(key: dict[str, Any], groups: Sequence[Group], effect: int) -> list[dict[str, Any]]:
    """The span of every vector beyond its family's two arms, paired by seed and item; `p_holm` is over the table.

    Spans on false claims count in the direction of the behaviour, so that more is better.
    """
    rows, arms = list[dict[str, Any]](), {(c.adapter, c.seed): c for g in groups for c in g.cells if is_arms(c)}
    for group in groups:
        both = [c for c in group.cells if (arms_of(c.adapter), c.seed) in arms and not is_arms(c)]
        if not both:
            continue
        other = Group(tuple(arms[arms_of(c.adapter), c.seed] for c in both))
        for score in both[0].scores:
            mine, theirs = Group(tuple(both)).shifts(score, "span"), other.shifts(score, "span")
            if score in COSTS or mine is None or theirs is None:
                continue
            difference = estimate_over_seeds((effect if score == "false_claims" else 1) * (mine - theirs))
            row = key | {"way": both[0].adapter, "intervention": both[0].intervention, "score": score}
            row |= {"seeds": " ".join(str(c.seed) for c in both), **difference.columns("beyond_arms", "ci_lo", "ci_hi")}
            rows.append(row | {"p": difference.p})
    for row, p in zip(rows, holm(np.array([r["p"] for r in rows])) if rows else (), strict=True):
        row["p_holm"] = float(p)
    return rows


def arms_of(way: str) -> str:
    """The way of the two arms of the same family, on all pairs and with its preset."""
    adapter = WAYS[way].adapter
    return "arms" if adapter == "lora" else f"arms, {adapter}"


def is_arms(cell: Cell) -> bool:
    """Whether it is the vector that others are compared with."""
    return (cell.adapter, cell.intervention) == (arms_of(cell.adapter), WEIGHT)


def render(rows: Sequence[Row], beyond: Sequence[Row]) -> str:
    """The tables of the page, in Markdown: LoRA on all pairs and what stands beside it, numbers of pairs, families."""
    names = list(dict.fromkeys((str(r["adapter"]), str(r["intervention"])) for r in rows))
    sizes = [n for n in names if isinstance(WAYS[n[0]].pairs, int)]
    families = [n for n in names if WAYS[n[0]].adapter != "lora"]
    parts = [[n for n in names if n not in sizes + families], sizes, families]
    scores = [s for s in ("false_claims", "preference", "true_claims") if any(r["score"] == s for r in rows)]
    titles = [s.replace("_", " ") for s in scores]
    board = ["selectivity at -1u, +1u"] if any(r.get("selectivity") for r in rows) else []
    header = ["vector", "seeds", *titles, f"{titles[0]}, beyond two arms", *board, "neutral text", "nats at -1u, +1u"]
    lines = [[_line(name, rows, beyond, scores, bool(board)) for name in part] for part in parts if part]
    return "\n\n".join(tabulate(part, header, tablefmt="github", disable_numparse=True) for part in lines)


def _line(
    name: tuple[str, str], rows: Sequence[Row], beyond: Sequence[Row], scores: Sequence[str], has_board: bool
) -> list[str]:
    mine = [r for r in rows if (r["adapter"], r["intervention"]) == name]
    spans = {str(r["score"]): r for r in mine if r["part"] == "span"}
    more = [r for r in beyond if (r["way"], r["intervention"], r["score"]) == (*name, scores[0])]
    costs = [float(r["shift"]) for r in mine if r["score"] == "nll" and r["part"] != "span"]
    return [
        name[0] if name[1] == WEIGHT else f"{name[0]}: {name[1]}",
        str(mine[0]["n_seeds"]),
        *(estimate_text(spans[s], "shift") if s in spans else "" for s in scores),
        "".join(estimate_text(r, "beyond_arms") + ("*" if float(r["p_holm"]) < 0.05 else "") for r in more),
        *([_selectivity([r for r in mine if r["score"] == scores[0] and r["part"] != "span"])] if has_board else []),
        f"{max(costs):+.3f}" if costs else "",
        nats_text(mine[0]),
    ]


def _selectivity(sides: Sequence[Row]) -> str:
    """At both strengths; `!` where the board cannot be read."""
    texts = [estimate_text(r, "selectivity", ".2f") for r in sorted(sides, key=lambda r: str(r["part"]), reverse=True)]
    return ", ".join(text or "!" for text in texts)


def measure(model: str, ways: Sequence[str], seeds: Sequence[int], out: Path) -> None:
    """Make and read what is not kept yet."""
    files = {(way, seed): place(model, way, seed) for seed in seeds for way in ways}
    left = {run: file for run, file in files.items() if not file.exists()}
    if not left:
        return
    bench = Bench(model, out / model)
    left = {run: file for run, file in left.items() if bench.can(WAYS[run[0]])}
    countdown = console.Countdown(len(left))
    for (way, seed), file in left.items():
        console.say(f"== {way}, seed {seed}{countdown.left}")
        keep(file, bench.run(way, seed))
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
    if groups := kept(o.model):
        key = {"model": o.model, "behavior": BEHAVIORS[o.model]}
        effect = load_behavior(BEHAVIORS[o.model], o.model).effect
        rows, pairs = group_rows(key, groups, effect), beyond_arms(key, groups, effect)
        write_csv(DOCS / f"contrasts_{o.model}.csv", rows)
        if pairs:
            write_csv(DOCS / f"contrasts_{o.model}_beyond_arms.csv", pairs)
        harness.record(f"contrasts_{o.model}", {"vectors": sum(len(g.cells) for g in groups)}, "contrasts")
        print(render(rows, pairs))


if __name__ == "__main__":
    main()
