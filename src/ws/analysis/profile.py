"""`ws profile`: what else a vector moves, on a board of traits, at the strength that people would use.

Every trait of the board (`ws.eval.boards`) is read at the base and at every strength, and beside it what vectors of
the same size do that know nothing of the behaviour: random ones, and those that were trained as nulls. What counts as
moved, and how selective a vector is, stands in `ws.analysis.profile_tables`.

Random vectors are read at the largest of the strengths, on the side of +: they have no sign of their own, and smaller
strengths move less, so none of them is made to look too small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from ws import console
from ws.analysis.controls import draw_seed, random_like
from ws.analysis.profile_tables import Shot, examples, plot, profile_rows, render
from ws.analysis.side_by_side import OpenedRun, opened_runs
from ws.behaviors import behavior_name
from ws.diff import vector_digest
from ws.errors import WsError
from ws.eval.boards import Board, open_board
from ws.eval.context import EvalContext
from ws.eval.readable import Readability, rounding_notes
from ws.eval.suite import set_notes
from ws.files.plots import save_svg
from ws.files.reading import kept, read_csv
from ws.files.runs import lock, sha256_json, write_csv
from ws.intervene.interventions import OF_A_RUN, Intervention
from ws.lm.trunk import shared_trunk
from ws.options.measure import ProfileOptions as ProfileOptions
from ws.options.shared import WEIGHT
from ws.steer import steer

TABLE, SUMMARY = "profile.csv", "profile_summary.csv"


def read_board(
    context: EvalContext, board: Board, chosen: Intervention, alphas: Sequence[float]
) -> dict[float, tuple[Float[np.ndarray, "items"], dict[str, Readability]]]:
    """The scores of a board's items and how well every trait was answered, by strength, 0 among them; what is on record
    is not asked."""
    strengths = sorted({0.0, *alphas})
    by_part = [context.scores(part.evaluation, chosen, strengths) for part in board.parts]
    return {alpha: board.read([scores[alpha] for scores in by_part]) for alpha in strengths}


@dataclass
class _Reading:
    """One intervention of one run at one strength: the scores of all items, and how well every trait was answered, by
    itself and of its trained nulls; of random vectors the scores."""

    adapter: str
    seed: int
    intervention: str
    strength: str
    alpha: float
    values: np.ndarray
    readable: dict[str, Readability]
    nulls: dict[str, tuple[np.ndarray, dict[str, Readability]]] = field(default_factory=dict)
    random: list[np.ndarray] = field(default_factory=list)
    vector: str = ""


@dataclass(frozen=True)
class _Bench:
    """One run, and the board that it is asked."""

    run: OpenedRun
    board: Board
    options: ProfileOptions

    def readings(self, name: str) -> Iterator[_Reading]:
        """One intervention at all of its strengths."""
        chosen = self.run.context.intervention(name)
        alphas = self.strengths(chosen)
        if not alphas:
            return
        scored = read_board(self.run.context, self.board, chosen, list(alphas.values()))
        key = self.run.key(chosen)
        nulls, draws = self.nulls(alphas) if name == WEIGHT else {}, []
        if name == WEIGHT:
            draws = self.random(max(abs(a) for a in alphas.values()))
        for strength, alpha in alphas.items():
            yield _Reading(
                adapter=str(key["adapter"]),
                seed=int(key["seed"]),
                intervention=name,
                strength=strength,
                alpha=alpha,
                values=scored[alpha][0],
                readable=scored[alpha][1],
                nulls={null: by_strength[strength] for null, by_strength in nulls.items()},
                random=draws,
                vector=chosen.digest[:12],
            )

    def strengths(self, chosen: Intervention) -> dict[str, float]:
        """What is asked for, by how it is called; `calibrated` without a sign that could not be solved for."""
        words = [w for a in self.options.alphas for w in (("-1u", "+1u") if a == "calibrated" else (a,))]
        known = dict[str, float]()
        if any(isinstance(word, str) for word in words):
            calibration = self.run.calibrated(chosen)
            if "calibrated" in self.options.alphas:
                usable = self.run.usable(chosen, calibration)
                words = [w for w in words if w not in ("-1u", "+1u") or (1 if w == "+1u" else -1) in usable]
        for word in words:
            (alpha,) = set(chosen.strengths([word], self.run.context.model)) - {0.0} or {0.0}
            if alpha:
                known[word if isinstance(word, str) else f"{word:+g}"] = alpha
        return known

    def nulls(self, alphas: Mapping[str, float]) -> dict[str, dict[str, tuple[np.ndarray, dict[str, Readability]]]]:
        """What is read under the vectors that were trained as nulls, by null and strength, at equal norms."""
        nulls = {}
        for null, (context, ratio) in self.run.trained_nulls().items():
            scored = read_board(context, self.board, context.intervention(), [a * ratio for a in alphas.values()])
            nulls[null] = {strength: scored[alpha * ratio] for strength, alpha in alphas.items()}
        return nulls

    def random(self, alpha: float) -> list[np.ndarray]:
        """The scores under random vectors of the size of the run's, draw by draw."""
        context = self.run.context
        of, scored = vector_digest(context.vector), list[np.ndarray]()
        with shared_trunk(context.model):  # of all draws: each is read at one strength
            for draw in range(self.options.n_draws):
                vector = random_like(context.vector, context.model, draw_seed(0, draw))
                chosen = Intervention(
                    name=f"random vector {draw + 1} of {self.options.n_draws}",
                    at=partial(steer, context.model, vector),
                    digest=sha256_json(["random_like", of, draw]),
                    run=context.run,
                )
                scored.append(read_board(context, self.board, chosen, [alpha])[alpha][0])
        return scored


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What a board showed.

    Attributes:
        board: the board.
        base: of every item, its score without steering.
        base_readable: of every trait, how well its items were answered without steering.
        shots: every intervention at every strength, seeds together.
        dtype: of the model.
    """

    board: Board
    base: np.ndarray
    base_readable: Mapping[str, Readability]
    shots: tuple[Shot, ...]
    dtype: str


def profile(options: ProfileOptions) -> Profile:
    """Read the board under all that the options name; what is on record is not read again.

    Raises:
        WsError: no finished run, no such board, or nothing that has a strength.
    """
    options.check()
    readings, board, base, dtype = list[_Reading](), None, None, ""
    for run in opened_runs(options):
        board = board or open_board(run.context, options)
        bench = _Bench(run, board, options)
        base = base or read_board(run.context, board, run.context.intervention(), [])[0.0]
        dtype = str(run.context.model.dtype)[6:]
        readings += [r for name in run.interventions for r in bench.readings(name)]
    if board is None or base is None or not readings:
        raise WsError("No intervention has a strength to be profiled at; see the notes above.")
    return Profile(board, *base, tuple(_shots(readings, base[0])), dtype)


def _shots(readings: Sequence[_Reading], base: np.ndarray) -> Iterator[Shot]:
    """The readings with their seeds put together, what needs no adapter last."""
    groups = dict[tuple[str, str, str], list[_Reading]]()
    for r in sorted(readings, key=lambda r: r.intervention not in OF_A_RUN):
        groups.setdefault((r.adapter, r.intervention, r.strength), []).append(r)
    for (adapter, intervention, strength), seeds in groups.items():
        nulls = [null for null in seeds[0].nulls if all(null in r.nulls for r in seeds)]
        yield Shot(
            adapter=adapter,
            seeds=tuple(r.seed for r in seeds),
            intervention=intervention,
            strength=strength,
            alpha=float(np.mean([r.alpha for r in seeds])),
            shift=np.stack([r.values - base for r in seeds]),
            readable=[r.readable for r in seeds],
            nulls={null: np.stack([r.nulls[null][0] - base for r in seeds]) for null in nulls},
            random=[np.stack(draw) - base for draw in zip(*(r.random for r in seeds), strict=True)],
            vectors=" ".join(r.vector for r in seeds),
            null_readable={null: [r.nulls[null][1] for r in seeds] for null in nulls},
        )


def main(options: ProfileOptions) -> None:
    """The command `ws profile`."""
    found = profile(options)
    key = {"behavior": behavior_name(options.behavior)}
    rows, summary = profile_rows(key, found.board, found.base, found.base_readable, found.shots, options.n_bootstrap)
    with lock(options.folder / "profile"):  # the files are of one profile
        files = [_with_others(options, name, part) for name, part in ((TABLE, rows), (SUMMARY, summary))]
        drawn = dict.fromkeys((r["adapter"], r["intervention"]) for r in rows if r["z"] is not None)
        for adapter, intervention in drawn:
            name = "_".join(dict.fromkeys(("profile", found.board.name, adapter, intervention)))
            files.append(save_svg(plot(rows, adapter, intervention), options.folder / f"{name}.svg"))
    text = render(rows, summary, examples(found.board, found.shots))
    about = set_notes({"score": s.key, **found.board.briefs[t]} for t, s in found.board.scores.items())
    text = "\n\n".join([text, *about, *rounding_notes([found.dtype])])
    console.show(console.Result(text, {"rows": rows, "summary": summary}, files))


def _with_others(options: ProfileOptions, name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Write the rows of a table, and keep what it has of other boards, runs and interventions."""
    file = options.folder / name
    there = kept(file, _read_rows, "its boards are to be profiled again") or []
    new = {_key(r) for r in rows}
    whole = [*(r for r in there if _key(r) not in new), *rows]
    columns = dict.fromkeys(column for row in whole for column in row)
    return write_csv(file, [{column: row.get(column) for column in columns} for row in whole])


def _read_rows(file: Any) -> list[dict[str, str]]:
    return read_csv(file, ("board", "adapter", "intervention", "strength"))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["board"], row["adapter"], row["intervention"]


if __name__ == "__main__":
    console.run(main, ProfileOptions, "ws profile")
