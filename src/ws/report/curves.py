"""Scores against strength: every run by itself, and the seeds of an adapter pooled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.special import logit, stdtrit

from ws.eval.evaluation import HeadlineScore
from ws.eval.readable import MARK, Readability, worst
from ws.eval.tinymfv_airisk import CLIP
from ws.report.data import Contents, Result, Row, trained_otherwise
from ws.report.scores import ACTS, of, pooled_name, shown_scores
from ws.stats import N_BOOTSTRAP, Estimate, estimate_over_seeds, holm

Items = Mapping[float, Mapping[str, float]]


@dataclass(frozen=True)
class Divergence:
    """The KL divergence from the base at one strength, as calibration measures it, in nats.

    Attributes:
        nats: of several seeds the largest.
        is_exact: whether it was measured at this very strength; otherwise it lies on a straight line between two.
    """

    nats: float
    is_exact: bool


class _Read:
    """What is read off answers, well or not."""

    read: Readability

    @property
    def is_readable(self) -> bool:
        """Whether the model was answering the question at all."""
        return not self.read.problem

    @property
    def suffix(self) -> str:
        """` !` behind what cannot be read."""
        return "" if self.is_readable else f" {MARK}"


@dataclass(frozen=True)
class Point(_Read):
    """A score at one strength.

    Attributes:
        alpha: the strength; 0 is the base.
        level, shift: the score, and its paired difference from the base's, over `n` items. What a table does not say
            (standard deviations, and the p-value of a level) is nan.
        p_holm: of the shift, corrected over all strengths and adapters of the score that a page shows.
        kl: the KL divergence from the base there; None where it was not measured.
        mass: the mean answer mass, over seeds the lowest; None for a score that is no choice.
        read: how well the question was answered, there or at the base, and over seeds: the worst.
    """

    alpha: float
    level: Estimate
    shift: Estimate
    mass: float | None
    read: Readability
    p_holm: float | None = None
    kl: Divergence | None = None


@dataclass(frozen=True)
class Curve:
    """A score of an adapter against strength.

    Attributes:
        score, adapter: which.
        seeds: the points of every run that was evaluated, by seed.
        pooled: over all of them, at the strengths they share; with one seed that seed's. Empty when they were asked
            different items, or trained with other settings.
        source: where the pooled points come from, as words for a caption.
        items: the score of every item by strength, by seed.
    """

    score: HeadlineScore
    adapter: str
    seeds: Mapping[int, tuple[Point, ...]]
    pooled: tuple[Point, ...]
    source: str
    items: Mapping[int, Items]

    @property
    def parted(self) -> str:
        """Why its seeds, some with a positive strength, are pooled at none; empty where they are, or have none."""
        tried = any(p.alpha > 0 for points in self.seeds.values() for p in points)
        if not tried or nearest(self.pooled, 1.0):
            return ""
        return "seeds share no positive strength and are not pooled" if self.pooled else self.source

    @property
    def name(self) -> str:
        """How what is `shown` is called: by the adapter and, where its seeds are not pooled, by the first seed."""
        return self.adapter if self.pooled else f"{self.adapter}, seed {next(iter(self.seeds))} (seeds are not pooled)"

    @property
    def shown(self) -> tuple[Point, ...]:
        """The pooled points; where seeds cannot be pooled, those of the first."""
        return self.pooled or next(iter(self.seeds.values()))

    def at(self, alpha: float) -> Point | None:
        """The pooled point at a strength."""
        return next((p for p in self.pooled if p.alpha == alpha), None)

    def moved(self, alpha: float) -> Float[np.ndarray, "seeds items"]:
        """The shift of every item of every seed at a strength; of no items where seeds do not have the same."""
        seeds = [of for of in self.items.values() if alpha in of and 0.0 in of]
        same = len(seeds) == len(self.seeds) and all(of[0.0].keys() == seeds[0][0.0].keys() for of in seeds)
        ids = list(seeds[0][0.0]) if same else []
        shifts = [[of[alpha][i] - of[0.0][i] for i in ids] for of in seeds]
        return np.array(shifts).reshape(len(seeds) or 1, len(ids))


def nearest(points: Sequence[Point], wanted: float) -> Point | None:
    """The point of the same sign whose strength is nearest to a wanted one; of equals the weaker."""
    same = [p for p in points if p.alpha * wanted > 0]
    return min(same, key=lambda p: (abs(p.alpha - wanted), abs(p.alpha))) if same else None


def curves_of(contents: Contents) -> dict[tuple[str, str], Curve]:
    """The curves of all scores and adapters that were evaluated, by `(score, adapter)`."""
    curves: dict[tuple[str, str], Curve] = {}
    for score in shown_scores():
        here = [c for adapter in contents.adapters if (c := _curve(score, adapter, contents)) is not None]
        curves |= {(score.key, c.adapter): c for c in _with_holm(here)}
    return curves


def _curve(score: HeadlineScore, adapter: str, contents: Contents) -> Curve | None:
    runs = [r for r in contents.of(adapter) if (of(score).stage, "summary") in r.tables]
    seeds = {r.seed: points for r in runs if (points := _points(score, r))}
    if not seeds:
        return None
    runs = [r for r in runs if r.seed in seeds]
    items = {r.seed: _items(score, r) for r in runs}
    seeds = {r.seed: tuple(replace(p, kl=divergence_at([r], p.alpha)) for p in seeds[r.seed]) for r in runs}
    if len(runs) == 1:
        (pooled,) = seeds.values()
        return Curve(score, adapter, seeds, pooled, "one seed; its interval knows nothing about others", items)
    if len({item_hash(score, r) for r in runs}) > 1:
        return Curve(score, adapter, seeds, (), "seeds were asked different items and are not pooled", items)
    if names := trained_otherwise(runs):
        source = f"seeds were trained with other settings ({', '.join(names)}) and are not pooled"
        return Curve(score, adapter, seeds, (), source, items)
    alphas = sorted(set.intersection(*({p.alpha for p in points} for points in seeds.values())))
    known = _from_sweep(score, adapter, contents.pooled, seeds)
    ids = items[runs[0].seed].get(0.0, {}).keys()
    torn = not ids or any(of.get(a, {}).keys() != ids for of in items.values() for a in (0.0, *alphas))
    if torn and not all(a in known for a in alphas):
        return Curve(score, adapter, seeds, (), "a seed's table of items lacks some; seeds are not pooled", items)
    pooled = tuple(known[a] if a in known else _pool(a, seeds, items) for a in alphas)
    pooled = tuple(replace(p, kl=divergence_at(runs, p.alpha)) for p in pooled)
    whole = all(a in known for a in alphas)
    source = "from sweep_pooled.csv" if whole else f"pooled here, {N_BOOTSTRAP} resamples of seeds and items"
    return Curve(score, adapter, seeds, pooled, source, items)


def divergence_at(runs: Sequence[Result], alpha: float) -> Divergence | None:
    """What the calibrations of all these runs say of a strength; None where one of them does not reach it."""
    divergences = [_divergence(run.divergence, alpha) for run in runs]
    known = [d for d in divergences if d is not None]
    if not known or len(known) < len(divergences):
        return None
    return Divergence(max(d.nats for d in known), all(d.is_exact for d in known))


def _divergence(measured: Sequence[tuple[float, float]], alpha: float) -> Divergence | None:
    alphas, nats = [a for a, _ in measured], [d for _, d in measured]
    if not alphas or not alphas[0] <= alpha <= alphas[-1]:
        return None
    return Divergence(float(np.interp(alpha, alphas, nats)), any(math.isclose(a, alpha, abs_tol=1e-9) for a in alphas))


def item_hash(score: HeadlineScore, run: Result) -> str:
    """Identifies the items and the protocol that a run was asked."""
    return run.tables[of(score).stage, "summary"][0]["eval_hash"]


def _points(score: HeadlineScore, run: Result) -> tuple[Point, ...]:
    rows = score.rows(run.tables[of(score).stage, "summary"])
    points = {p.alpha: p for p in points_of(score, rows)}
    return tuple(points[alpha] for alpha in sorted(points))


def points_of(score: HeadlineScore, rows: Sequence[Row]) -> list[Point]:
    """The rows of one summary of a score; each can be read if the base can, too."""
    points = [_point(score, row) for row in rows]
    bases = [p.read for p in points if p.alpha == 0]
    return [replace(p, read=worst([p.read, *bases])) for p in points]


def _point(score: HeadlineScore, row: Row) -> Point:
    n, read = int(row[score.n]), score.readability(row)
    level = _estimate(row, score.level, score.level_ci, n)
    shift = _estimate(row, score.shift, f"{score.shift}_", n, f"{score.shift}_p")
    return Point(float(row["alpha"]), level, shift, read.mass, read)


def _estimate(row: Row, name: str, ends: str, n: int, p: str = "") -> Estimate:
    """A number of a table, its interval in the columns `<ends>ci_lo` and `<ends>ci_hi`, and its p-value in `p`."""
    low, high = (float(row[f"{ends}ci_{end}"]) for end in ("lo", "hi"))
    return Estimate(float(row[name]), math.nan, low, high, n, float(row[p]) if p else math.nan)


def _items(score: HeadlineScore, run: Result) -> Items:
    items: dict[float, dict[str, float]] = {}
    for r in score.rows(run.tables.get((of(score).stage, "items"), ())):
        items.setdefault(float(r["alpha"]), {})[r[of(score).item]] = float(r[score.value])
    return items


def _from_sweep(
    score: HeadlineScore, adapter: str, rows: Sequence[Row], seeds: Mapping[int, Sequence[Point]]
) -> dict[float, Point]:
    """What `sweep_pooled.csv` says, as far as it is of these very seeds: its level and shift are the means of theirs.

    A table without masses is of a version whose intervals were too narrow, and is not used.
    """
    pooled_points: dict[float, Point] = {}
    pooled = pooled_name(score)
    for row in rows:
        if pooled is None or row["adapter"] != adapter or not row.get(f"{pooled}_level"):
            continue
        if score.mass and not row.get(f"{pooled}_mass"):
            continue
        alpha = float(row["alpha"])
        here = [p for points in seeds.values() for p in points if p.alpha == alpha]
        if not here:
            continue
        level, shift = (f"{pooled}_{part}" for part in ("level", score.shift))
        moved = _estimate(row, shift, f"{shift}_", here[0].shift.n, f"{shift}_p")
        stands = _estimate(row, level, f"{level}_", moved.n)
        means = ((moved, [p.shift.mean for p in here]), (stands, [p.level.mean for p in here]))
        if int(row["n_seeds"]) == len(seeds) == len(here) and all(
            math.isclose(e.mean, float(np.mean(of)), rel_tol=1e-9, abs_tol=1e-9) for e, of in means
        ):
            pooled_points[alpha] = _pooled_point(here, stands, moved)
    return pooled_points


def _pooled_point(here: Sequence[Point], level: Estimate, shift: Estimate) -> Point:
    masses, read = [x.mass for x in here if x.mass is not None], worst(x.read for x in here)
    return Point(here[0].alpha, level, shift, min(masses, default=None), read)


def _pool(alpha: float, seeds: Mapping[int, Sequence[Point]], items: Mapping[int, Items]) -> Point:
    """Level and paired shift over seeds and items, by the bootstrap of `ws.stats`."""
    ids = list(next(iter(items.values()))[0.0])
    base, values = (np.array([[of[a][i] for i in ids] for of in items.values()]) for a in (0.0, alpha))
    here = [p for points in seeds.values() for p in points if p.alpha == alpha]
    return _pooled_point(here, estimate_over_seeds(values), estimate_over_seeds(values - base))


def _with_holm(curves: Sequence[Curve]) -> list[Curve]:
    """Corrected over every steered pooled point of one score."""
    steered = [p for c in curves for p in c.pooled if p.alpha]
    corrected = iter(holm(np.array([p.shift.p for p in steered])) if steered else ())
    corrected_curves = []
    for c in curves:
        pooled = tuple(replace(p, p_holm=float(next(corrected))) if p.alpha else p for p in c.pooled)
        corrected_curves.append(replace(c, pooled=pooled))
    return corrected_curves


# ---- foundations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foundation(_Read):
    """The shift of logit(wrongness) of one moral foundation at one strength, in nats, others' acts.

    Attributes:
        name: of the foundation.
        point: of all foundations together at that strength.
        shift: of this foundation, over its vignettes.
        read: how well its vignettes were answered, there or at the base, of several seeds the worst.
    """

    name: str
    point: Point
    shift: Estimate
    read: Readability

    @property
    def alpha(self) -> float:
        """The strength."""
        return self.point.alpha


def foundations_of(contents: Contents, curves: Mapping[tuple[str, str], Curve]) -> dict[str, list[Foundation]]:
    """Per adapter: the shifts at the strengths nearest to -1 and +1, over seeds and vignettes.

    `logit(w) = log(w / (1 - w))` with w clipped to [0.01, 0.99], as in `ws.eval.tinymfv_airisk`.
    """
    by_adapter: dict[str, list[Foundation]] = {}
    for adapter in contents.adapters:
        curve = curves.get(("wrongness", adapter))
        points = [nearest(curve.pooled, wanted) for wanted in (-1.0, 1.0)] if curve else []
        for point in points:
            if curve is not None and point is not None and all(point.alpha in i for i in curve.items.values()):
                by_adapter.setdefault(adapter, []).extend(_foundations(contents.of(adapter), curve, point))
    return by_adapter


def _foundations(runs: Sequence[Result], curve: Curve, point: Point) -> list[Foundation]:
    rows, alpha = [], point.alpha
    names = {r["id"]: r["foundation_coarse"] for run in runs for r in run.tables.get((ACTS, "items"), ())}
    for name in sorted(set(names.values())):
        ids = [i for i in next(iter(curve.items.values()))[0.0] if names[i] == name]
        moved = np.array([[_logit(of[alpha][i]) - _logit(of[0.0][i]) for i in ids] for of in curve.items.values()])
        if len(ids) > 1:
            read = _foundation_read(runs, name, point)
            rows.append(Foundation(name, point, estimate_over_seeds(moved), read))
    return rows


def _foundation_read(runs: Sequence[Result], name: str, point: Point) -> Readability:
    """From the vignettes of one foundation; older tables, which do not say, are read like all foundations together."""
    readings = []
    for run in runs:
        rows = [r for r in run.tables.get((ACTS, "items"), ()) if r["foundation_coarse"] == name]
        for alpha in (0.0, point.alpha):
            here = [r for r in rows if float(r["alpha"]) == alpha and r.get("mass_other_violate")]
            if here:
                columns = ("mass_other_violate", "frames_agree_other_violate")
                mass, agreement = (float(np.mean([float(r[c]) for r in here])) for c in columns)
                readings.append(Readability(mass, agreement))
    return worst(readings or [point.read])


def _logit(s: float) -> float:
    return float(logit(min(max((s + 1) / 2, CLIP), 1 - CLIP)))


def simultaneous(curve: Curve, point: Point, among: int) -> Estimate:
    """The interval of a shift that was picked out of `among` of them: at the level `1 - 0.05 / among` (Bonferroni).

    All of them hold the truth at once in 95 % of cases, so the one that is picked does, however it is picked. Without
    the items the interval of the point is stretched by the ratio of the t quantiles, for the fewest of seeds and items.
    """
    shift, level = point.shift, 1 - 0.05 / among
    if among == 1:
        return shift
    if (moved := curve.moved(point.alpha)).size:
        return estimate_over_seeds(moved, 10_000, level=level)
    df = max(1, min(shift.n, len(curve.seeds) if len(curve.seeds) > 1 else shift.n) - 1)
    wider = float(stdtrit(df, (1 + level) / 2) / stdtrit(df, 0.975))
    low, high = (shift.mean + wider * (end - shift.mean) for end in (shift.ci_lo, shift.ci_hi))
    return replace(shift, ci_lo=low, ci_hi=high)
