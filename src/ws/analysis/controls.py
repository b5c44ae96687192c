"""Controls: what a direction without meaning does at the same size, and how surprising a shift is beside that.

Three nulls of rising difficulty, and a shift is called real only against all three:

- `random_like`: a random vector with the coordinates and the per-module norms of `dW`. It costs one evaluation a draw,
  and `ws check controls` does it for a finished run. Easy to beat: hardly any random direction points anywhere, and
  a vector trained on anything does, label-shuffled ones included. To beat it is no evidence of the behaviour.
- label-shuffled (`exchange_half`): half of the pairs change sides before the training, so that what is left of the
  contrast is what the procedure itself produces: same questions, answers, arms and sizes, but no behaviour to learn.
- same-side (`same_side`): both arms are trained on positive answers, sampled with two data seeds. What this vector does
  comes from training twice on samples of one side, not from the contrast.

The two harder nulls are pair files like any other: `ws replicate --control` trains both arms on them as usual, and
`ws compare` reads all three beside the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tabulate import tabulate
from torch import Tensor, nn

from ws import console
from ws.behaviors.answered import same_answer
from ws.data import Pair
from ws.delta import LinearDelta
from ws.diff import SteeringVector, vector_digest
from ws.errors import WsError
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import Evaluation, Rows, Scores
from ws.eval.prompts import notes_by_score
from ws.eval.readable import AGREEMENT, FLAG, LEVEL, MARK, Readability, notes, rounding_notes, worst
from ws.eval.suite import asked_of, evaluations_of, headlines, scores_of, set_notes
from ws.files.reading import kept
from ws.files.runs import read_csv, write_csv
from ws.lm.models import weight_of
from ws.lm.trunk import shared_trunk
from ws.options.check import ControlOptions as ControlOptions
from ws.options.shared import HeadlineOptions as HeadlineOptions
from ws.options.shared import require_steered
from ws.stats import holm
from ws.steer import steer

TABLE = "controls.csv"
NULLS = ("shuffled", "same-side")  # those that are trained, as names of runs end in them
_PARTS = (("g",), ("c",), ("d",), ("u", "v"), ("e",), ("bias",))


# ---- random vectors -------------------------------------------------------------------------------------------------


def random_like(vector: SteeringVector, model: nn.Module, seed: int) -> SteeringVector:
    """A random vector with the coordinates of `vector` and, module by module, its Frobenius norms.

    Every coordinate is Gaussian (rotations skew-symmetric, as small rotations are) and scaled so that its own part of
    `Delta(W)` has the norm of the original's part; the whole is then scaled to the module's norm.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = {id(delta): weight_of(module) for _, delta, module in vector.matched(model)}
    deltas = vector.each(lambda delta: _random_delta(delta, weights[id(delta)], rng))
    recipe = {"op": "random_like", "seed": seed, "of": vector.recipe}
    return replace(vector, deltas=deltas, recipe=recipe)


def coordinate_parts(delta: LinearDelta) -> Iterator[LinearDelta]:
    """The change as a sum of changes in one kind of coordinate each, in the order in which `random_like` draws them."""
    for names in _PARTS:
        parts = {n: t for n, t in delta.coordinates().items() if n in names}
        if parts:
            yield delta.holding(parts)


def _random_delta(delta: LinearDelta, weight: Tensor, rng: torch.Generator) -> LinearDelta:
    total = delta.holding({})
    for part in coordinate_parts(delta):
        noise = {n: torch.randn(t.shape, generator=rng) for n, t in part.coordinates().items()}
        if "d" in noise:
            noise["d"] = noise["d"] - noise["d"].mT
        drawn, size = delta.holding(noise), part.norm(weight)
        if size:
            total = total + drawn * (size / drawn.norm(weight))
    size = total.norm(weight)
    return total * (delta.norm(weight) / size) if size else total


def null_distribution(
    model: nn.Module,
    vector: SteeringVector,
    score: Callable[[], float | Float[np.ndarray, "..."]],
    n_draws: int = 20,
    seed: int = 0,
    alpha: float = 1.0,
) -> Float[np.ndarray, "n_draws ..."]:
    """The shifts of a score under random vectors of the size of `vector`, one per draw.

    Args:
        model: the base, which `score` reads as it stands.
        vector: whose coordinates and norms the draws share; see `random_like`.
        score: a number, or several at once as an array.
        n_draws: how many; draw `i` is the same whatever their number.
        seed: of all draws.
        alpha: the strength they are steered with.
    """
    if n_draws < 1:
        raise WsError(f"A null distribution needs at least 1 draw, not {n_draws}.")
    base = np.asarray(score(), dtype=np.float64)
    shifts = []
    for draw in range(n_draws):
        with steer(model, random_like(vector, model, draw_seed(seed, draw)), alpha):
            shifts.append(np.asarray(score(), dtype=np.float64) - base)
    return np.stack(shifts)


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one draw: draws of different seeds have nothing in common."""
    return int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])


def empirical_p(shift: float, null: Float[np.ndarray, "n"]) -> float:
    """Two-sided p-value `(1 + #{|null| >= |shift|}) / (n + 1)` (Davison & Hinkley 1997, equation 4.11).

    The shift itself counts as one of the draws, so the p-value is valid at any `n` and never below `1 / (n + 1)`: 20
    draws cannot say more than p = 0.048.
    """
    values = np.asarray(null, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all() or not np.isfinite(shift):
        raise WsError("An empirical p-value needs a finite shift and at least one finite draw of the null.")
    return float((1 + (np.abs(values) >= abs(shift)).sum()) / (values.size + 1))


def beats_random(p: float | None, n_draws: int | None) -> bool | None:
    """Whether a shift goes beyond random vectors; None without draws, and where it does but they are too few to say so.

    Fewer than 19 draws give no p of 0.05, whatever the shift.

    Args:
        p: of `empirical_p`.
        n_draws: of how many; None where that is not on record, which counts as enough.
    """
    if p is None or p <= LEVEL:
        return None if p is None else True
    is_least = n_draws is not None and p * (n_draws + 1) < 1.5
    return None if is_least else False


# ---- the harder nulls, as pairs -------------------------------------------------------------------------------------


def exchange_half(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The same pairs with the two answers exchanged in a random half (rounded down) of those that are trained on.

    Ids, questions and order stay, as do the pairs that are left out of training.
    """
    usable = [i for i, p in enumerate(pairs) if p.drop is None]
    if len(usable) < 2:
        raise WsError(f"Exchanging half of the pairs needs at least 2 usable ones, not {len(usable)}.")
    chosen = set(np.random.default_rng(seed).permutation(usable)[: len(usable) // 2].tolist())
    return [_exchanged(p) if i in chosen else p for i, p in enumerate(pairs)]


def _exchanged(pair: Pair) -> Pair:
    return replace(
        pair,
        pos=pair.neg,
        neg=pair.pos,
        pos_tokens=pair.neg_tokens,
        neg_tokens=pair.pos_tokens,
        pos_cut=pair.neg_cut,
        neg_cut=pair.pos_cut,
    )


def same_side(pairs_a: Sequence[Pair], pairs_b: Sequence[Pair]) -> list[Pair]:
    """Pairs of two positive answers: `pos` is that of `pairs_a`, `neg` the positive answer of its partner in `pairs_b`.

    Partners have the same id (question, persona and sample) and question; both files come from one behaviour and
    differ in `--data.data-seed`. Pairs without a usable partner and those with two identical answers are left out.
    """
    partners = {(p.id, p.question): p for p in pairs_b if p.drop is None}
    made = []
    for a in pairs_a:
        b = partners.get((a.id, a.question))
        if a.drop is None and b is not None and not same_answer(a.pos, b.pos):
            made.append(replace(a, neg=b.pos, neg_tokens=b.pos_tokens, neg_cut=b.pos_cut))
    if not made:
        raise WsError(
            "No pair of one file has a partner with another positive answer in the other; sample both from one "
            "behaviour with different data seeds."
        )
    return made


# ---- the headline scores --------------------------------------------------------------------------------------------


def headline_evaluations(context: EvalContext, options: HeadlineOptions) -> list[Evaluation]:
    """The evaluations that the headline scores of the options are read from; `WsError` when there are none."""
    if not options.scores:
        raise WsError(f"There are no scores to read; choose from {', '.join(headlines())}.")
    # Without a thought: what a gradient can follow, and what 20 draws can afford.
    quick = replace(context, options=replace(context.options, n_think=0))
    chosen = {cls: quick if cls.thinks else context for cls in evaluations_of(options.scores)}
    return [asked_of(cls, where, options.split, options.traits, options.judges) for cls, where in chosen.items()]


def headline_means(evaluation: Evaluation, scores: Scores) -> dict[str, tuple[float, int]]:
    """The mean and the number of items of every headline score of an evaluation, in the score's unit."""
    return {name: (float(v.mean()), len(v)) for name, v in evaluation.headlines(scores).items()}


# ---- the command ----------------------------------------------------------------------------------------------------


def measure_controls(context: EvalContext, options: ControlOptions) -> Rows:
    """The rows of `controls.csv` that belong to the options: the vector's own shifts and those of every draw.

    What the file already holds for this vector, read by the same model, is not measured again; the rest is added to it
    draw by draw, so an interrupted run goes on where it stopped.
    """
    alphas = [alpha for alpha in context.alphas if alpha != 0]
    require_steered(alphas)
    with context.run.alone("controls"):
        return _measure_controls(context, options, alphas)


def _measure_controls(context: EvalContext, options: ControlOptions, alphas: Sequence[float]) -> Rows:
    recorded = context.run.manifest["stages"].get("controls", {}).get("config", {})
    if any(recorded.get(name) != value for name, value in context.reading.items()):
        (context.run.folder / TABLE).unlink(missing_ok=True)  # its numbers are of another reading
    table = _Table(context.run.folder / TABLE, vector_digest(context.vector)[:12])
    evaluations = headline_evaluations(context, options)
    settings = {"evaluations": [e.identity for e in evaluations]} | context.reading
    stage = context.run.restart("controls", settings, {"vector": table.digest})
    wanted = [("vector", 0), *(("random", draw) for draw in range(options.n_draws))]
    for evaluation in evaluations:
        base = context.scores(evaluation, context.intervention(), [0.0])[0.0]
        _require_all(evaluation, base, options.scores)
        with shared_trunk(context.model):
            for control, draw in console.progress(wanted, desc=evaluation.table_name, unit="vector"):
                missing = [alpha for alpha in alphas if not table.has(evaluation, control, draw, alpha)]
                if missing:
                    table.add(_control_rows(context, evaluation, base, control, draw, missing))
    stage.done([table.file])
    digests = {e.digest for e in evaluations}
    mine = [r for r in table.rows if r["eval_hash"] in digests and r["score"] in options.scores]
    return [r for r in mine if (r["control"], int(r["draw"])) in wanted and float(r["alpha"]) in alphas]


def _require_all(evaluation: Evaluation, base: Scores, wanted: Sequence[str]) -> None:
    """`WsError` where an evaluation lacks one of its wanted scores here, such as one that comes after a thought."""
    there = evaluation.headlines(base)
    for score in evaluation.scores:
        if score.key in wanted and score.key not in there:
            raise WsError(
                f"There is no {score.key} ({score.title}) on these items, or none without a thought, which controls "
                f"cannot afford; {evaluation.name} has {', '.join(there)} here."
            )


def _read_controls(file: Path) -> list[dict[str, str]]:
    return read_csv(file, ("vector", "control", "eval_hash", "score"), ("draw", "alpha", "shift"))


class _Table:
    """`controls.csv` of one vector: rows of another vector in the same folder are forgotten."""

    def __init__(self, file: Path, digest: str) -> None:
        self.file, self.digest = file, digest
        rows = kept(file, _read_controls, "its vectors are measured again") or []
        self.rows: Rows = [dict(r) for r in rows if r["vector"] == digest and FLAG in r]  # older: no masses

    def has(self, evaluation: Evaluation, control: str, draw: int, alpha: float) -> bool:
        """Whether a shift is on record."""
        key = (evaluation.digest, control, draw, alpha)
        return any((r["eval_hash"], r["control"], int(r["draw"]), float(r["alpha"])) == key for r in self.rows)

    def add(self, rows: Rows) -> None:
        """Append rows and write the whole file."""
        whole = [*self.rows, *(row | {"vector": self.digest} for row in rows)]
        columns = dict.fromkeys(column for row in whole for column in row)  # an earlier version had fewer
        self.rows = [{column: row.get(column) for column in columns} for row in whole]
        write_csv(self.file, self.rows)


def _control_rows(
    context: EvalContext, evaluation: Evaluation, base: Scores, control: str, draw: int, alphas: Sequence[float]
) -> Rows:
    vector = context.vector
    if control == "random":
        vector = random_like(vector, context.model, draw_seed(0, draw))
    rows, before, read = [], headline_means(evaluation, base), evaluation.readability(base)
    free = Readability(None)  # of a score that is no choice
    for alpha in alphas:
        with steer(context.model, vector, alpha):
            scores = evaluation.ask(context.model, context.tok)
        for score, (mean, n) in headline_means(evaluation, scores).items():
            row = context.key | {"control": control, "draw": draw, "alpha": alpha, "shift": mean - before[score][0]}
            known = worst([read.get(score, free), evaluation.readability(scores).get(score, free)])
            rows.append(row | {"score": score, "n": n, **known.columns()} | evaluation.brief)
    return rows


def summarize_controls(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """One row per score and strength: the vector's shift beside the draws' mean, sd and range, with `empirical_p`.

    `p_holm` is over all of them. Mass, agreement of the frames, and whether they are too low, are the vector's, at its
    strength or at the base.
    """
    summary = []
    for score, alpha in dict.fromkeys((r["score"], float(r["alpha"])) for r in rows):
        here = [r for r in rows if r["score"] == score and float(r["alpha"]) == alpha]
        (vector_row,) = (r for r in here if r["control"] == "vector")
        shift = float(vector_row["shift"])
        null = np.array([float(r["shift"]) for r in here if r["control"] == "random"])
        summary.append(
            {
                "score": score,
                "alpha": alpha,
                "shift": shift,
                "null_mean": float(null.mean()),
                "null_std": float(null.std(ddof=1)),
                "null_min": float(null.min()),
                "null_max": float(null.max()),
                "p": empirical_p(shift, null),
                "n_draws": len(null),
                **{name: vector_row[name] for name in ("mass", AGREEMENT, FLAG)},
                **{name: here[0].get(name) for name in ("words", "drawn", "dataset")},
            }
        )
    for row, p in zip(summary, holm(np.array([r["p"] for r in summary])) if summary else (), strict=True):
        row["p_holm"] = float(p)
    order = list(headlines())
    return sorted(summary, key=lambda r: (order.index(r["score"]), r["alpha"]))


def render_controls(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary as a table for people."""
    rows = [
        [
            r["score"],
            f"{r['alpha']:+g}",
            f"{r['shift']:+.3f}{MARK if r[FLAG] else ''}",
            f"{r['null_mean']:+.3f}",
            f"{r['null_std']:.3f}",
            f"{r['null_min']:+.3f} to {r['null_max']:+.3f}",
            *("" if r[FLAG] else f"{r[name]:.3f}" for name in ("p", "p_holm")),
            "" if r["mass"] in (None, "") else f"{float(r['mass']):.3f}",
        ]
        for r in summary
    ]
    header = ["score", "alpha", "shift", "random: mean", "sd", "range", "p", "Holm p", "mass"]
    n = summary[0]["n_draws"]
    note = (
        f"{n} random vectors of the same size; with so many, p cannot be below {1 / (n + 1):.3f}. A small p is no "
        "evidence of the behaviour: vectors trained on anything beat random ones. What is, are nulls that were trained "
        "(`ws replicate --control shuffled` and `--control same-side`, then `ws compare`)."
    )
    doubts = [*notes(r[FLAG] for r in summary), *set_notes(summary)]
    return "\n\n".join([tabulate(rows, header, disable_numparse=True), note, *doubts, *notes_by_score(summary)])


def main(options: ControlOptions) -> None:
    """The command `ws check controls`."""
    options.check()
    context = open_context(options.eval_options(options.alphas))
    options = replace(options, scores=scores_of(options.scores, context.behavior))
    summary = summarize_controls(measure_controls(context, options))
    text = "\n\n".join([render_controls(summary), *rounding_notes([str(context.model.dtype)[6:]])])
    console.show(console.Result(text, {"rows": summary}, [context.run.folder / TABLE]))


if __name__ == "__main__":
    console.run(main, ControlOptions, "ws check controls")
