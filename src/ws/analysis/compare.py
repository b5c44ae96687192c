"""`ws compare`: every way of steering at the same cost, on the same items, beside what chance and training alone do.

Each intervention (`ws.intervene.interventions`) is measured at the two strengths that cost the target divergence, -1u
and +1u: they are solved for on one half of the questions that nothing was trained on, and the divergence that is
reported comes from the other half. Strengths that `ws calibrate` has stored are taken as they are, and the table says
what they were solved for on; those of another divergence are refused, not replaced.
The block after which activations are steered is chosen on the `dev` claims; the claims that are reported are others. A
system prompt and the fine-tuned arms have no dial: they come as they are, with the divergence they happen to have.

Per item the effect is the span, `score(+1u) - score(-1u)`, and the shifts of either side against the base. Seeds of one
adapter are pooled by a hierarchical bootstrap. A weight vector's span is called real only when it beats three nulls at
the same Frobenius norm:

    random      p <= 0.05 among random vectors (19 at least) with its coordinates and per-module norms; vectors trained
                on anything pass this one, so it is no evidence of the behaviour by itself
    shuffled    the 95 % interval of |span| - |span of the null| lies above zero, for a vector trained on pairs half of
                which were exchanged (`ws replicate --control shuffled`)
    same-side   the same for a vector both of whose arms were trained on positive answers (`--control same-side`)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from ws import console
from ws.analysis.compare_tables import Cell, Group, comparison_rows, effects, group_rows, render
from ws.analysis.controls import measure_controls
from ws.analysis.profile import read_board
from ws.analysis.profile_tables import standardised
from ws.analysis.side_by_side import OpenedRun, opened_runs
from ws.behaviors import load_behavior
from ws.eval.boards import Board, open_board
from ws.eval.capability import Capability
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation, Scores
from ws.eval.readable import FLAG, Readability
from ws.eval.suite import asked_of, evaluation_named, headline, measured_of, set_notes
from ws.files.plots import save_svg
from ws.files.runs import lock, write_csv
from ws.intervene.interventions import OF_A_RUN, Intervention
from ws.options.check import ControlOptions
from ws.options.measure import CompareOptions as CompareOptions
from ws.options.measure import ProfileOptions
from ws.options.shared import WEIGHT, shared_with

_Scored: TypeAlias = dict[str, dict[int, np.ndarray]]
_Read: TypeAlias = dict[str, dict[int, Readability]]


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bench:
    """One run on the shared model, and what is asked of it."""

    options: CompareOptions
    context: EvalContext
    run: OpenedRun

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Those that were asked for, and capability."""
        o, c = self.options, self.context
        evaluations = [asked_of(evaluation_named(name), c, o.split, o.traits, o.judges) for name in o.evals]
        if o.capability:  # on its own texts, whatever data set the others take
            evaluations.append(Capability.of_run(replace(c, options=replace(c.options, dataset=None))))
        return evaluations

    def cell(self, name: str) -> Cell:
        """One intervention at both of its strengths."""
        chosen, o = self.context.intervention(name), self.options
        asked = self.asked  # opens the items, so that what cannot be read is said before strengths are solved for
        key, calibration = self.run.key(chosen), self.run.calibrated(chosen)
        alphas = self.run.usable(chosen, calibration)
        sides = {sign: calibration.side(sign) for sign in alphas}
        scored, read = self.measured(chosen, alphas)
        nulls = self.trained_nulls(alphas) if name == WEIGHT else {}
        return Cell(
            intervention=name,
            adapter=str(key["adapter"]),
            seed=int(key["seed"]),
            matched=chosen.has_dial,
            detail=chosen.detail,
            questions=calibration.questions,
            dtype=str(self.context.model.dtype)[6:],
            alphas=alphas,
            divergence={sign: s.divergence if s.audit is None else s.audit for sign, s in sides.items()},
            scores=scored,
            readable=read,
            asked=asked,
            nulls={null: null_scores for null, (null_scores, _) in nulls.items()},
            null_readable={null: null_read for null, (_, null_read) in nulls.items()},
            random=self.random_null(alphas, scored) if name == WEIGHT and o.n_draws else {},
            board=self.on_board(chosen, alphas),
            targets=self.board.targets if self.board else (),
        )

    @cached_property
    def board(self) -> Board | None:
        """What selectivity is measured on; None where it is not asked for."""
        if self.options.board is None:
            return None
        # `traits` are those of `statements`, and none of the board's.
        options = shared_with(ProfileOptions, self.options, interventions=(WEIGHT,), traits=())
        return open_board(self.context, options, self.options.split)

    def on_board(self, chosen: Intervention, alphas: Mapping[int, float]) -> dict[str, dict[int, np.ndarray]]:
        """The standardised changes of every trait's items by trait and sign."""
        if self.board is None:
            return {}
        read = read_board(self.context, self.board, chosen, list(alphas.values()))
        by_sign = {sign: read[alpha] for sign, alpha in ({0: 0.0} | dict(alphas)).items()}
        readable = {sign: known for sign, (_, known) in by_sign.items()}
        return standardised(self.board, {sign: values for sign, (values, _) in by_sign.items()}, readable)

    @cached_property
    def asked(self) -> dict[str, Mapping[str, Any]]:
        """Which items and words the headline scores are of."""
        chosen = self.evaluations[: len(self.options.evals)]  # capability comes last and has no words
        return {score.key: evaluation.brief for evaluation in chosen for score in evaluation.scores}

    def measured(self, chosen: Intervention, alphas: Mapping[int, float]) -> tuple[_Scored, _Read]:
        """Headline scores and how well their items were answered, by name and sign; 0 is the base."""
        scored, read = _Scored(), _Read()
        for evaluation in self.evaluations:
            for sign, scores in self._scores(evaluation, chosen, alphas).items():
                for name, values in evaluation.headlines(scores).items():
                    scored.setdefault(name, {})[sign] = values
                for name, known in evaluation.readability(scores).items():
                    read.setdefault(name, {})[sign] = known
        return scored, read

    def _scores(self, evaluation: Evaluation, chosen: Intervention, alphas: Mapping[int, float]) -> dict[int, Scores]:
        by_alpha = self.context.scores(evaluation, chosen, [0.0, *alphas.values()])
        return {sign: by_alpha[alpha] for sign, alpha in ({0: 0.0} | dict(alphas)).items()}

    def trained_nulls(self, alphas: Mapping[int, float]) -> dict[str, tuple[_Scored, _Read]]:
        """What the label-shuffled and the same-side vector of this run give, at equal norms of the change."""
        nulls = {}
        for null, (context, ratio) in self.run.trained_nulls().items():
            scaled = {sign: alpha * ratio for sign, alpha in alphas.items()}
            nulls[null] = replace(self, context=context).measured(context.intervention(), scaled)
        return nulls

    def random_null(self, alphas: Mapping[int, float], scored: Collection[str]) -> dict[str, dict[int, np.ndarray]]:
        """Mean shifts of every headline score under random vectors of the same size, `[draws]` by score and sign.

        Args:
            alphas: the strengths by sign; without any there are no draws.
            scored: the scores that there are on these items; those of them that need a thought have no draws.
        """
        o, key = self.options, self.context.key
        asked = tuple(s for s in _scores(o) if s in scored and not _thinks(s))
        if not (asked and alphas):
            return {}
        options = shared_with(
            ControlOptions,
            o,
            adapter=str(key["adapter"]),
            seed=int(key["seed"]),
            scores=asked,
            n_draws=o.n_draws,
            alphas=tuple(alphas.values()),
        )
        context = replace(self.context, options=replace(self.context.options, alphas=options.alphas))
        rows = [r for r in measure_controls(context, options) if r["control"] == "random"]
        draws: dict[str, dict[int, np.ndarray]] = {}
        for score in options.scores:
            for sign, alpha in alphas.items():
                here = [r for r in rows if r["score"] == score and float(r["alpha"]) == alpha]
                shifts = {int(r["draw"]): float(r["shift"]) for r in here}
                draws.setdefault(score, {})[sign] = np.array([shifts[i] for i in range(o.n_draws)])
        return draws


def _thinks(score: str) -> bool:
    """Whether a score comes after a thought, which many draws cannot afford and which is another score without."""
    of = headline(score).evaluation
    return of is not None and of.thinks


# ---- the command ----------------------------------------------------------------------------------------------------


def _scores(options: CompareOptions) -> tuple[str, ...]:
    """The headline scores of the evaluations that are compared."""
    return tuple(score.key for name in options.evals for score in evaluation_named(name).scores)


def compare(options: CompareOptions) -> list[Cell]:
    """Measure every cell that is not on disk yet.

    Raises:
        WsError: no finished run, a run without its arms or pairs, or runs of different bases.
    """
    options.check()
    for name in options.evals:
        evaluation_named(name)
    evals = measured_of(options.evals, load_behavior(options.behavior, options.model))
    options, cells = replace(options, evals=evals), list[Cell]()
    for run in opened_runs(options):
        bench = _Bench(options, run.context, run)
        cells += [bench.cell(name) for name in run.interventions]
    return [c for shared in (False, True) for c in cells if (c.intervention not in OF_A_RUN) == shared]


# By the first word of an intervention; the arms are gray.
_COLORS = {WEIGHT: "tab:blue", "prompt": "tab:green", "activation": "tab:orange", "gradient": "tab:purple"}


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A forest plot: one panel per score, one line per intervention with the interval of its span."""
    scores = effects(rows)
    groups = list(dict.fromkeys((r["intervention"], r["adapter"]) for r in rows))
    figure = Figure(figsize=(3 + 3 * len(scores), 1 + 0.24 * len(groups)), layout="constrained")
    panels = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for panel, score in zip(panels, scores, strict=True):
        for place, group in enumerate(groups):
            key = (*group, score, "span")
            for r in (r for r in rows if (r["intervention"], r["adapter"], r["score"], r["part"]) == key):
                ends = [[r["shift"] - r["shift_ci_lo"]], [r["shift_ci_hi"] - r["shift"]]]
                color = _COLORS.get(group[0].split("-")[0], "tab:gray")
                face = color if r["matched"] else "white"
                shape = "x" if r.get(FLAG) else "o"
                panel.errorbar(r["shift"], place, xerr=ends, fmt=shape, ms=5, color=color, mfc=face, capsize=2)
        panel.axvline(0, color="black", lw=0.8)
        panel.set_xlabel(headline(score).axis, fontsize=9)
        panel.grid(axis="x", lw=0.3)
    names = [name if name == adapter else f"{name}, {adapter}" for name, adapter in groups]
    panels[0].set_yticks(range(len(groups)), names, fontsize=8)
    panels[0].invert_yaxis()
    title = "Spans from -1u to +1u, 95 % intervals; hollow: no dial, not at matched divergence"
    doubts = "; cross: cannot be read" if any(r.get(FLAG) for r in rows if r["part"] == "span") else ""
    figure.suptitle(f"{title}{doubts}", fontsize=10)
    return figure


def main(options: CompareOptions) -> None:
    """The command `ws compare`."""
    cells = compare(options)
    groups = Group.of(cells)
    behavior = load_behavior(options.behavior, options.model)
    key, n_boot = {"behavior": behavior.name}, options.n_bootstrap
    rows = group_rows(key, groups, behavior.effect, n_boot)
    pairs = comparison_rows(key, groups, behavior.effect, n_boot)
    with lock(options.folder / "compare"):  # the files are of one comparison
        files = [write_csv(options.folder / "compare.csv", rows)]
        beside = options.folder / "compare_pairs.csv"
        if pairs:
            files.append(write_csv(beside, pairs))
        else:
            beside.unlink(missing_ok=True)
        files.append(save_svg(plot(rows), options.folder / "compare.svg"))
    sets = {score: {"score": score, **asked} for cell in cells for score, asked in cell.asked.items()}
    text = "\n\n".join([render(rows, pairs), *set_notes(sets.values())])
    console.show(console.Result(text, {"rows": rows, "pairs": pairs}, files))


if __name__ == "__main__":
    console.run(main, CompareOptions, "ws compare")
