"""The numbers of `ws profile`: how far every trait of a board moved, whether beyond its nulls, and how selectively.

Of one intervention at one strength, with `x_i` the change of an item's score against the base, `m_yes` and `m_no` the
means over the items of a trait that Yes and No match, and `s` the standard deviation of the base's scores within the
halves,

    shift = (m_yes + m_no) / 2          agreement = (m_yes - m_no) / 2          z = shift / s

so a liking for Yes is in the agreement and not in the shift, and a trait's own shift not in the agreement, also where
the halves differ in size. A trait counts as moved when four things hold: the shift is not chance over its items, it is
beyond what random vectors of the same size do, it is as large as the floor of its score, and it is beyond every null
that was trained and can be read there. The first two are p-values,

    p_items     of the mean over items (Student's t, one degree of freedom less for each of the means of the halves); of
                several seeds of their mean, and 1 where they differ in sign
    p_random    2 P(T > |z| / r), Student's t, with r the standard deviation of z under random vectors (`moderated`)

The larger of the two is corrected over the board (Holm), and 0.05 is the limit.

    selectivity = sqrt(mean over the targets of z^2) / sqrt(mean over all other traits of z^2)

is 1 for a vector that moves everything alike, and for one that moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import digamma, polygamma, stdtr, stdtrit
from tabulate import tabulate

from ws.analysis.controls import NULLS
from ws.eval.boards import Board
from ws.eval.evaluation import Rows
from ws.eval.readable import FLAG, LEVEL, MARK, NATS, Readability, worst
from ws.eval.readable import notes as mark_notes
from ws.stats import (
    Estimate,
    columns_of,
    estimate_mean,
    estimate_over_seeds,
    estimate_text,
    holm,
    p_value,
    resampled_means,
    widened,
)

LISTED = 5  # traits that the headlines name
SHOWN = 12  # rows of a table in the terminal
MOST_PRIOR = 10.0  # degrees of freedom that the other traits lend one; see `moderated`

Items = Float[np.ndarray, "seeds items"]


@dataclass(frozen=True)
class Shot:
    """The board under one intervention at one strength, all seeds together.

    Attributes:
        adapter, seeds, intervention: what was done.
        strength: what was asked for, such as `+1u` or `-0.5`.
        alpha: the mean over the seeds.
        shift: of every item, its change against the base.
        readable: of every seed, how well the items of every trait were answered.
        nulls: by trained null (`shuffled`, `same-side`), the changes under it at the same size.
        random: by draw, the changes under a random vector of the same size.
        vectors: what identifies the vectors.
        null_readable: by trained null, what `readable` is of the vectors.
    """

    adapter: str
    seeds: tuple[int, ...]
    intervention: str
    strength: str
    alpha: float
    shift: Items
    readable: Sequence[Mapping[str, Readability]]
    nulls: Mapping[str, Items] = field(default_factory=dict)
    random: Sequence[Items] = ()
    vectors: str = ""
    null_readable: Mapping[str, Sequence[Mapping[str, Readability]]] = field(default_factory=dict)


# ---- one trait ------------------------------------------------------------------------------------------------------


def balanced(values: Items, yes: Float[np.ndarray, "items"], is_alone: bool = True) -> Items:
    """The values moved so that their mean is that of the two halves' means, and has its uncertainty.

    With `s` the standard deviation within the halves, the same of both, the variance of the mean becomes

        s^2 / 4 (1 / n_yes + 1 / n_no)

    so nothing of what moves both halves apart (a liking for Yes) is taken for uncertainty, and a half of few items is
    as uncertain as it is. Unchanged where there are no halves, or two items.

    Args:
        values: of the items of one trait.
        yes: of every item, whether Yes shows the trait.
        is_alone: whether a 95 % interval is made of these items alone. `s` then has one degree of freedom less than
            the `n - 1` that `ws.stats` counts, and they are moved apart further, by the quotient of Student's t.
    """
    first, n = yes == 1, values.shape[1]
    n_yes = int(first.sum())
    if _fitted(yes) == 1:
        return values
    by_half = np.where(
        first, values[:, first].mean(axis=1, keepdims=True), values[:, ~first].mean(axis=1, keepdims=True)
    )
    middle = (values[:, first].mean(axis=1) + values[:, ~first].mean(axis=1)) / 2
    wider = n / (2 * np.sqrt(n_yes * (n - n_yes))) * np.sqrt((n - 1) / (n - 2))
    if is_alone:
        wider *= stdtrit(n - 2, 0.975) / stdtrit(n - 1, 0.975)
    moved: Items = middle[:, None] + (values - by_half) * wider
    return moved


def _fitted(yes: Float[np.ndarray, "items"]) -> int:
    """How many means `balanced` takes out of the items of a trait: those of two halves, or one."""
    return 2 if len(yes) > 2 and _has_halves(yes) else 1


def _has_halves(yes: Float[np.ndarray, "items"]) -> bool:
    return not np.isnan(yes).any() and 0 < int((yes == 1).sum()) < len(yes)


def spread(base: Float[np.ndarray, "items"], yes: Float[np.ndarray, "items"]) -> float:
    """The standard deviation of the base's scores within the halves; NaN where all items score the same."""
    halves = [half for half in (base[yes == 1], base[yes != 1]) if len(half)]
    squares, freedom = sum(float(((half - half.mean()) ** 2).sum()) for half in halves), len(base) - len(halves)
    sd = float(np.sqrt(squares / freedom)) if freedom else 0.0
    return sd if sd > 1e-9 else float("nan")


@dataclass(frozen=True)
class _Trait:
    """What is known of one trait in one shot."""

    name: str
    estimate: Estimate
    p_items: float
    sd: float
    z: Float[np.ndarray, "seeds items"]
    halves: tuple[float, float] | None
    p_random: float | None
    null_z: Mapping[str, float]
    margins: Mapping[str, Estimate]
    readable: Readability


@dataclass(frozen=True)
class RandomScale:
    """How far random vectors move the traits of a board.

    Attributes:
        of: by trait, the standard deviation of `z` under a random vector.
        freedom: its degrees of freedom.
        overall: the root mean square of `z` over all traits and draws.
    """

    of: Mapping[str, float]
    freedom: float
    overall: float

    def p(self, trait: str, z: float) -> float | None:
        """Two-sided p-value of a standardised shift; None of a trait of which nothing is known."""
        return float(2 * stdtr(self.freedom, -abs(z) / self.of[trait])) if trait in self.of else None


def random_scale(shot: Shot, board: Board, base: Float[np.ndarray, "items"]) -> RandomScale | None:
    """What random vectors do to the traits of a board; None where there are no random vectors."""
    sds = {t: spread(base[items], board.yes[items]) for t, items in board.items_of.items()}
    known = [t for t, sd in sds.items() if np.isfinite(sd)]
    if not (len(shot.random) and known):
        return None
    z = np.array([[_mean(drawn, board, t) / sds[t] for t in known] for drawn in shot.random])
    scales, freedom = moderated(z)
    return RandomScale(dict(zip(known, scales.tolist(), strict=True)), freedom, float(np.sqrt((z**2).mean())))


def _mean(values: Items, board: Board, trait: str) -> float:
    items = board.items_of[trait]
    return float(balanced(values[:, items], board.yes[items]).mean())


def moderated(z: Float[np.ndarray, "draws traits"]) -> tuple[Float[np.ndarray, "traits"], float]:
    """Standard deviations of draws around zero, trait by trait, each drawn towards what the others have.

    A few draws say little of one trait, and much of what is usual. With `d` draws, `v_t` their mean square, and `v_0`
    and `d_0` fitted to the spread of all `log v_t` (Smyth 2004, Statistical Applications in Genetics and Molecular
    Biology 3, article 3),

        scale_t^2 = (d_0 v_0 + d v_t) / (d_0 + d)          degrees of freedom: d_0 + d

    `d_0` is 10 at most: with few draws a board on which no two traits are alike may look like one on which all are, and
    more would then raise false alarms above their rate (simulated, 13 and 135 traits).
    """
    d = len(z)
    v = np.maximum((z**2).mean(axis=0), 1e-24)
    logs = np.log(v) - digamma(d / 2) + np.log(d / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, d / 2)) if len(v) > 2 else 0.0
    half = _inverse_trigamma(excess) if excess > 0 else np.inf
    usual = float(np.exp(logs.mean() + digamma(half) - np.log(half))) if 2 * half < MOST_PRIOR else float(v.mean())
    half = min(half, MOST_PRIOR / 2)
    return np.sqrt((2 * half * usual + d * v) / (2 * half + d)), float(2 * half + d)


def _inverse_trigamma(value: float) -> float:
    """The `x` with `trigamma(x) = value`, which falls from infinity to 0."""
    low, high = 1e-3, 1e6
    if value >= polygamma(1, low):
        return low
    return high if value <= polygamma(1, high) else float(brentq(lambda x: polygamma(1, x) - value, low, high))


def _trait(shot: Shot, board: Board, base: np.ndarray, name: str, scale: RandomScale | None, n_boot: int) -> _Trait:
    items, yes = board.items_of[name], board.yes[board.items_of[name]]
    sd, values = spread(base[items], yes), balanced(shot.shift[:, items], yes)
    first, raw = yes == 1, shot.shift[:, items].mean(axis=0)
    nulls = {
        null: balanced(changes[:, items], yes)
        for null, changes in shot.nulls.items()
        if not worst(seed[name] for seed in shot.null_readable.get(null, ())).problem
    }
    whole = values.mean(axis=0)  # of these very vectors: seeds that one did not train are no part of the question
    margins = {
        null: estimate_mean(_outward(whole) - _outward(other.mean(axis=0)), n_boot) for null, other in nulls.items()
    }
    return _Trait(
        name,
        estimate_over_seeds(values, n_boot),
        _p_items(shot.shift[:, items], yes),
        sd,
        values / sd,
        (float(raw[first].mean()), float(raw[~first].mean())) if _has_halves(yes) else None,
        scale.p(name, float(values.mean() / sd)) if scale else None,
        {null: float(other.mean() / sd) for null, other in nulls.items()} if np.isfinite(sd) else {},
        margins,
        worst(seed[name] for seed in shot.readable),
    )


def _p_items(shift: Items, yes: Float[np.ndarray, "items"]) -> float:
    """Two-sided p-value of a trait's shift; see the module. Of a single item it is 1."""
    values, n = balanced(shift, yes, is_alone=False), shift.shape[1]
    by_seed, whole = np.sign(values.mean(axis=1)), values.mean(axis=0)
    if n < 2 or (by_seed != by_seed[0]).any():
        return 1.0
    return p_value(float(whole.mean()), [(float(whole.var(ddof=1) / n), n - _fitted(yes))])


def _outward(values: np.ndarray) -> np.ndarray:
    return values if values.mean() >= 0 else -values


def standardised(
    board: Board,
    by_sign: Mapping[int, Float[np.ndarray, "items"]],
    readable: Mapping[int, Mapping[str, Readability]],
) -> dict[str, dict[int, np.ndarray]]:
    """Of every trait, its items' changes against the base in standard deviations of the base, by sign; 0 is the base.

    Without traits whose items the base scores alike, and signs at which a trait cannot be read.

    Args:
        readable: by sign, how well the items of every trait were answered; without those that are not to be looked at.
    """
    base, found = by_sign[0], dict[str, dict[int, np.ndarray]]()
    for trait, items in board.items_of.items():
        yes = board.yes[items]
        read = {s: x for s, x in by_sign.items() if not (s in readable and readable[s][trait].problem)}
        if np.isfinite(sd := spread(base[items], yes)) and 0 in read:
            found[trait] = {s: balanced((x - base)[None, items], yes)[0] / sd for s, x in read.items()}
    return found


# ---- rows -----------------------------------------------------------------------------------------------------------


def profile_rows(
    key: Mapping[str, Any],
    board: Board,
    base: Float[np.ndarray, "items"],
    base_readable: Mapping[str, Readability],
    shots: Sequence[Shot],
    n_boot: int,
) -> tuple[Rows, Rows]:
    """Rows of `profile.csv`, one per trait, and of `profile_summary.csv`, one per shot.

    Args:
        key: the first columns.
        board: the items.
        base: their scores without steering.
        base_readable: how well those of every trait were answered without steering.
        shots: what was measured.
        n_boot: resamples per interval.
    """
    rows, summary = Rows(), Rows()
    for shot in shots:
        scale = random_scale(shot, board, base)
        traits = [_trait(shot, board, base, name, scale, n_boot) for name in board.traits]
        here = [_row(key, shot, board, t, base, base_readable[t.name], scale) for t in traits]
        _decide(here, board)
        rows += sorted(here, key=lambda r: -abs(r["z"] or 0.0))
        summary.append(_summary(key, shot, board, traits, here, scale, n_boot))
    return rows, summary


def _first_columns(key: Mapping[str, Any], shot: Shot, board: Board) -> dict[str, Any]:
    seeds = " ".join(map(str, shot.seeds))
    row = {**key, "board": board.name, "adapter": shot.adapter, "seed": seeds, "intervention": shot.intervention}
    return row | {"strength": shot.strength, "alpha": shot.alpha, "vectors": shot.vectors}


def _row(
    key: Mapping[str, Any],
    shot: Shot,
    board: Board,
    t: _Trait,
    base: np.ndarray,
    base_readable: Readability,
    scale: RandomScale | None,
) -> dict[str, Any]:
    items, z = board.items_of[t.name], float(t.z.mean())
    known = worst([base_readable, t.readable])
    yes, no = t.halves or (None, None)
    problems = [known.problem, "" if np.isfinite(z) else "the base scores all items alike"]
    sizes = dict(zip(("z", "z_ci_lo", "z_ci_hi"), (z, t.estimate.ci_lo / t.sd, t.estimate.ci_hi / t.sd), strict=True))
    brief = board.briefs[t.name]
    return {
        **_first_columns(key, shot, board),
        "trait": t.name,
        "group": board.groups[t.name],
        "role": board.role(t.name),
        **t.estimate.columns("shift", "ci_lo", "ci_hi"),
        "unit": board.scores[t.name].unit,
        **(sizes if np.isfinite(z) else dict.fromkeys(sizes)),
        "base": float(balanced(base[None, items], board.yes[items]).mean()),
        "p_items": t.p_items,
        "p_random": t.p_random,
        "p_holm": None,
        "z_random": scale.of.get(t.name) if scale else None,
        **{f"z_{null.replace('-', '_')}": t.null_z.get(null) for null in NULLS},
        "beyond_trained": all(m.ci_lo > 0 for m in t.margins.values()) if t.margins else None,
        "moved": None,
        "shift_yes": yes,
        "shift_no": no,
        "agreement": None if yes is None or no is None else (yes - no) / 2,
        "mass": known.mass,
        "n": t.estimate.n,
        "n_seeds": len(shot.seeds),
        "n_draws": len(shot.random),
        FLAG: "; ".join(filter(None, problems)) or None,
        **{name: brief.get(name) for name in ("eval", "eval_hash", "dataset", "words", "drawn")},
    }


def _decide(rows: Rows, board: Board) -> None:
    """Fill in the corrected p-values of a shot, and which traits it moved."""
    tested = [r for r in rows if r["p_random"] is not None and not r[FLAG]]
    if not tested:
        return
    corrected = holm(np.array([max(r["p_items"], r["p_random"]) for r in tested]))
    for row, p in zip(tested, corrected, strict=True):
        row["p_holm"] = float(p)
        is_large = abs(row["shift"]) >= board.scores[row["trait"]].floor
        row["moved"] = bool(p < LEVEL and is_large and row["beyond_trained"] is not False)


def selectivity(
    z: Mapping[str, Float[np.ndarray, "seeds items"]], targets: Sequence[str], others: Sequence[str], n_boot: int
) -> Estimate | None:
    """The root mean square of the targets' `z` over that of the others, with a bootstrap interval; None without either.

    Seeds are drawn once for all traits, items trait by trait. A resampled `z^2` is too large by the variance of `z`, so
    the draws are scaled to lie around the estimate.
    """
    parts = {
        name: [t for t in names if t in z and np.isfinite(z[t]).all()]
        for name, names in (("targets", targets), ("others", others))
    }
    if not all(parts.values()):
        return None
    squares, point, number = {}, {}, {t: i for i, t in enumerate(z)}
    for name, chosen in parts.items():
        draws = np.stack([resampled_means(widened(z[t])[None], n_boot, 0, number[t])[0] for t in chosen])
        drawn = (draws**2).mean(axis=0)
        point[name] = float(np.mean([z[t].mean() ** 2 for t in chosen]))
        squares[name] = drawn * point[name] / max(float(drawn.mean()), 1e-12)
    ratio = np.sqrt(squares["targets"] / np.clip(squares["others"], 1e-12, None))
    low, high = np.quantile(ratio, [0.025, 0.975])
    value = float(np.sqrt(point["targets"] / max(point["others"], 1e-12)))
    return Estimate(value, float(ratio.std(ddof=1)), float(low), float(high), len(z), 1.0)


def _summary(
    key: Mapping[str, Any],
    shot: Shot,
    board: Board,
    traits: Sequence[_Trait],
    rows: Rows,
    scale: RandomScale | None,
    n_boot: int,
) -> dict[str, Any]:
    # What cannot be read says nothing of how far it moved.
    readable = [r for r in rows if not r[FLAG]]
    z = {t.name: t.z for t in traits if t.name in {r["trait"] for r in readable}}
    others = [t for t in board.traits if t not in board.targets]
    far = [t for t in others if not board.role(t)]
    chosen = {"selectivity": others, "selectivity_far": far}
    ratios = {name: selectivity(z, board.targets, part, n_boot) for name, part in chosen.items()}
    row = _first_columns(key, shot, board) | {"targets": " ".join(board.targets)}
    for name, ratio in ratios.items():
        row |= columns_of(ratio, name, "ci_lo", "ci_hi")
    known = [r for r in readable if r["z"] is not None]
    moved = [r for r in known if r["moved"]]
    row |= {"z_target": rms([r["z"] for r in known if r["role"] == "target"])}
    row |= {"z_others": rms([r["z"] for r in known if r["role"] != "target"])}
    row |= {"z_random": scale.overall if scale else None}
    row |= {"n_traits": len(rows), "n_others": len(others), "n_moved": sum(r["role"] != "target" for r in moved)}
    halved = [r for r in readable if r["agreement"] is not None]
    row |= {"target_moved": any(r["role"] == "target" for r in moved)}
    row |= _agreement(shot, board, [r["trait"] for r in halved], n_boot)
    row |= {"rms_shift": rms([r["shift"] for r in halved])}
    largest = [r for r in moved if r["role"] != "target"] or [r for r in known if r["role"] != "target"]
    largest = sorted(largest, key=lambda r: -abs(r["z"]))[:LISTED]
    masses = [r["mass"] for r in rows if r["mass"] is not None]
    row |= {"largest": " ".join(r["trait"] for r in largest), "mass": min(masses, default=None)}
    row |= {"n_unreadable": sum(bool(r[FLAG]) for r in rows), "n_draws": len(shot.random)}
    nulls = [null for null in shot.nulls if any(null in t.margins for t in traits)]
    return row | {"nulls": " ".join(nulls), "n_seeds": len(shot.seeds)}


def rms(values: Sequence[float] | np.ndarray) -> float | None:
    """The root mean square; None of nothing."""
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else None


def _agreement(shot: Shot, board: Board, traits: Sequence[str], n_boot: int) -> dict[str, Any]:
    """How far the answer Yes itself moves, over all statements of some traits that have both halves.

    With the other sign for what No matches the halves' means are `m_yes` and `-m_no`, so the trait's own shift drops
    out, trait by trait: of unequal halves it would be left over.
    """
    raw, parts = shot.shift.mean(axis=0, keepdims=True), list[np.ndarray]()
    for items in (board.items_of[t] for t in traits):
        yes = board.yes[items]
        parts.append(balanced(np.where(yes == 1, 1.0, -1.0) * raw[:, items], yes, is_alone=len(traits) == 1)[0])
    return columns_of(estimate_mean(np.concatenate(parts), n_boot) if parts else None, "agreement", "ci_lo", "ci_hi")


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> str:
    """The tables and the headlines of all shots.

    Args:
        texts: by trait and shot (see `examples`), an item that shows what moved.
    """
    parts = []
    for row in summary:
        here = [r for r in rows if _of(r) == _of(row)]
        parts += [_table(here, row), "\n".join(f"- {s}" for s in [*headlines(row), *_examples(row, here, texts)])]
    notes = [
        "z is the shift in standard deviations of the base's scores within a trait. * moved: beyond chance over the "
        "items and beyond random vectors (Holm over the board, p < 0.05), at least the floor of its score, and beyond "
        "every trained null that can be read.",
        *mark_notes(r[FLAG] for r in rows),
    ]
    return "\n\n".join([*parts, *notes])


def _of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["adapter"], row["intervention"], row["strength"]


def headlines(row: Mapping[str, Any]) -> list[str]:
    """What a shot did, in sentences: selectivity, how many others moved, agreement, and what cannot be said."""
    targets = row["targets"].replace(" ", ", ")
    lines = []
    if row["selectivity"] is not None:
        lines.append(
            f"Selectivity {estimate_text(row, 'selectivity', '.2f')}: {targets} moves by {row['z_target']:.2f} "
            f"standard deviations, the others by {row['z_others']:.2f} (root mean square)."
        )
    if row["z_random"] is not None:
        unread = f" ({row['n_unreadable']} traits cannot be read and are left out)" if row["n_unreadable"] else ""
        nulls = ", ".join(["random vectors", *(f"the {n} null" for n in row["nulls"].split())])
        lines.append(
            f"{row['n_moved']} of {row['n_others']} others moved beyond {nulls}{unread}; random vectors move "
            f"a trait by {row['z_random']:.2f}."
        )
    elif row["intervention"] == "weight" and not row["n_draws"]:
        lines.append("No random vectors were asked for (--n-draws 0), so no trait counts as moved.")
    if is_agreement(row):
        lines.append(
            f"The answer Yes itself moves by {estimate_text(row, 'agreement')} nats, further than the traits "
            f"({row['rms_shift']:.2f}): this is agreement, whatever is asked."
        )
    return lines


def is_agreement(row: Mapping[str, Any]) -> bool:
    """Whether a shot moves the answer Yes itself, surely and further than it moves the traits."""
    if row["agreement"] is None or row["rms_shift"] is None:
        return False
    sure = row["agreement_ci_lo"] > 0 or row["agreement_ci_hi"] < 0
    return sure and abs(row["agreement"]) > max(NATS, row["rms_shift"])


def _examples(row: Mapping[str, Any], here: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> list[str]:
    by_trait = {r["trait"]: r for r in here}
    lines = []
    for trait in row["largest"].split():
        text = texts.get(f"{trait} {_of(row)}", "")
        lines.append(f"{trait} ({by_trait[trait]['z']:+.2f}): {text}")
    return [f"largest other: {line}" for line in lines]


def examples(board: Board, shots: Sequence[Shot]) -> dict[str, str]:
    """By trait and shot, the item that moved most in the direction of its trait, with its change."""
    texts, known = dict[str, str](), board.texts
    for shot in shots:
        raw = shot.shift.mean(axis=0)
        for trait, items in board.items_of.items():
            toward = 1 if balanced(shot.shift[:, items], board.yes[items]).mean() >= 0 else -1
            item = items[np.argmax(toward * raw[items])]
            key = (shot.adapter, shot.intervention, shot.strength)
            texts[f"{trait} {key}"] = f"“{known[item]}” {raw[item]:+.2f} {board.scores[trait].unit}"
    return texts


def label(row: Mapping[str, Any]) -> str:
    """What a row is called: its intervention, with the run's adapter where it is made from one."""
    name: str = row["intervention"]
    return name if row["adapter"] == name else f"{name}, {row['adapter']}"


def _table(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
    shown = [r for i, r in enumerate(rows) if i < SHOWN or r["role"] == "target"]
    cells = [
        [
            f"{r['trait']} ({r['role']})" if r["role"] else r["trait"],
            r["group"],
            f"{estimate_text(r, 'shift')}{MARK if r[FLAG] else '*' if r['moved'] else ''}",
            "" if r["z"] is None else f"{r['z']:+.2f}",
            *("" if r[f"z_{n}"] is None else f"{r[f'z_{n}']:+.2f}" for n in ("shuffled", "same_side")),
            "" if r["p_holm"] is None else f"{r['p_holm']:.3f}",
        ]
        for r in shown
    ]
    header = ["trait", "about", "shift", "z", "z, shuffled", "z, same side", "Holm p"]
    keep = [i for i in range(len(header)) if i < 4 or any(c[i] for c in cells)]
    table = tabulate([[c[i] for i in keep] for c in cells], [header[i] for i in keep], disable_numparse=True)
    more = f"; {len(rows) - len(shown)} more in profile.csv" if len(rows) > len(shown) else ""
    return f"{label(row)} at {row['strength']} (alpha {row['alpha']:+.3g}), {row['board']}{more}\n\n{table}"


def plot(rows: Sequence[Mapping[str, Any]], adapter: str, intervention: str) -> Figure:
    """Every trait of the board by group, with its standardised shift at every strength; the band is random vectors."""
    here = [r for r in rows if (r["adapter"], r["intervention"]) == (adapter, intervention) and r["z"] is not None]
    strengths = sorted({(r["alpha"], r["strength"]) for r in here})
    first = {r["group"] for r in here if r["role"] == "target"}
    groups = sorted(dict.fromkeys(r["group"] for r in here), key=lambda g: g not in first)
    order = [t for g in groups for t in dict.fromkeys(r["trait"] for r in here if r["group"] == g)]
    place, n = {trait: i for i, trait in enumerate(order)}, len(order)
    figure = Figure(figsize=(9, 1.6 + 0.16 * n), layout="constrained")
    axes = figure.subplots()
    marks = ("v", "^", "s", "D", "o")
    if here[0]["z_random"] is not None:
        width = [2 * next(r["z_random"] or 0 for r in here if r["trait"] == t) for t in order]
        axes.barh(
            range(n), np.multiply(width, 2), 1.0, np.negative(width), color="0.88", label="2 sd of random vectors"
        )
    for number, (_, strength) in enumerate(strengths):
        style: dict[str, Any] = {
            "fmt": marks[number % len(marks)],
            "ms": 4,
            "lw": 0.8,
            "mew": 0.8,
            "color": f"C{number}",
        }
        for r in (r for r in here if r["strength"] == strength):
            ends = [[r["z"] - r["z_ci_lo"]], [r["z_ci_hi"] - r["z"]]]
            face = style["color"] if r["moved"] else "white"
            axes.errorbar(r["z"], place[r["trait"]], xerr=ends, mfc=face, **style)
        axes.plot([], [], style["fmt"], color=style["color"], ms=4, label=strength)
    targets = {r["trait"] for r in here if r["role"] == "target"}
    axes.set_yticks(range(n), [f"{t} (target)" if t in targets else t for t in order], fontsize=6.5)
    sizes = [len({r["trait"] for r in here if r["group"] == group}) for group in groups]
    for group, size, end in zip(groups, sizes, np.cumsum(sizes), strict=True):
        axes.axhline(end - size - 0.5, color="0.8", lw=0.6)
        middle = end - (size + 1) / 2
        axes.text(1.01, middle, group, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_ylim(n - 0.5, -0.5)
    axes.set_xlabel("shift in standard deviations of the base's scores; filled: moved beyond the nulls", fontsize=8)
    figure.legend(fontsize=7, loc="outside upper center", ncols=len(strengths) + 1)
    return figure
