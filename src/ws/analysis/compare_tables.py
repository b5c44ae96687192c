"""The table and the picture of `ws compare`, from the cells that it measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from tabulate import tabulate

from ws.analysis.controls import NULLS as NULLS
from ws.analysis.controls import beats_random, empirical_p
from ws.analysis.profile_tables import label, selectivity
from ws.errors import WsError
from ws.eval.capability import Capability
from ws.eval.confounds import agreement_verdict
from ws.eval.evaluation import Rows
from ws.eval.prompts import check_same, notes_by_score
from ws.eval.readable import FLAG, LEVEL, MARK, NATS, WRONGNESS, Readability, rounding_notes, star, worst
from ws.eval.readable import notes as mark_notes
from ws.eval.suite import floors_text, has_own_floor, headline, headlines
from ws.options.shared import WEIGHT
from ws.stats import N_BOOTSTRAP, Estimate, columns_of, estimate_over_seeds, estimate_text, holm

COSTS = tuple(score.key for score in Capability.scores)
# What a part of a row is the difference of, as signs of strengths; 0 is the base.
PARTS = {"-1u": (-1, 0), "+1u": (1, 0), "span": (1, -1)}

BySign = Mapping[int, Float[np.ndarray, "_"]]
Readable = Mapping[str, Mapping[int, Readability]]
# Scores, but those of claims, that are of the behaviour itself: it is meant to raise them.
_UPWARD = ("preference", "statements", "judged_trait")


@dataclass(frozen=True)
class Cell:
    """One intervention of one run at both of its strengths.

    Attributes:
        intervention: its name; see `ws.intervene.interventions`.
        adapter, seed: the run; an intervention that needs none stands under its own name.
        matched: whether its strengths are those that cost the target divergence.
        alphas: the strengths by sign; a sign whose calibration did not converge is missing.
        divergence: what they cost on other prompts, in nats.
        scores: headline scores per item, by name and sign; 0 is the base.
        nulls: the same of the vectors trained as nulls, by kind.
        random: mean shifts under random vectors of the same size, `[draws]` by score and sign.
        readable: how well the items of a score were answered, by name and sign; without scores that are no choices.
        null_readable: the same of the vectors trained as nulls, by kind.
        detail: such as the layer.
        questions: what the strengths were solved for on; see `Calibration.questions`.
        dtype: of the model.
        asked: of a score, the `brief` of its evaluation (`ws.eval.evaluation.Evaluation`): its items and words.
        board: of every trait of a board, its items' standardised changes against the base, by sign (`ws profile`).
        targets: which of those traits the behaviour is meant to move.
    """

    intervention: str
    adapter: str
    seed: int
    matched: bool
    alphas: Mapping[int, float]
    divergence: Mapping[int, float]
    scores: Mapping[str, BySign]
    nulls: Mapping[str, Mapping[str, BySign]] = field(default_factory=dict)
    random: Mapping[str, BySign] = field(default_factory=dict)
    readable: Readable = field(default_factory=dict)
    null_readable: Mapping[str, Readable] = field(default_factory=dict)
    detail: str = ""
    questions: str = ""
    dtype: str = ""
    asked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    board: Mapping[str, BySign] = field(default_factory=dict)
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The seeds of one intervention and adapter."""

    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> list[Group]:
        """Cells by intervention and adapter, in the order in which they come."""
        keys = dict.fromkeys((c.intervention, c.adapter) for c in cells)
        return [cls(tuple(c for c in cells if (c.intervention, c.adapter) == key)) for key in keys]

    @property
    def first(self) -> Cell:
        """Any of the cells, for what they have in common."""
        return self.cells[0]

    def shifts(self, score: str, part: str) -> Float[np.ndarray, "seeds items"] | None:
        """Paired differences per seed and item; None when a seed lacks a strength or the score."""
        return _stacked([c.scores.get(score) for c in self.cells], part)

    def null_shifts(self, null: str, score: str, part: str) -> Float[np.ndarray, "seeds items"] | None:
        """The same of vectors trained as nulls; None when a seed lacks its own, or when a null cannot be read."""
        known = _worst([c.null_readable.get(null, {}).get(score, {}) for c in self.cells], part)
        if known is not None and known.problem:
            return None
        return _stacked([c.nulls.get(null, {}).get(score) for c in self.cells], part)

    def readability(self, score: str, part: str) -> Readability | None:
        """The worst of all seeds at the strengths that a part compares; None for scores that are no choices."""
        return _worst([c.readable.get(score, {}) for c in self.cells], part)

    def random_shifts(self, score: str, part: str) -> Float[np.ndarray, "draws"] | None:
        """Mean shifts under random vectors, draw by draw over all seeds; None when there are none."""
        shifts = _stacked([c.random.get(score) for c in self.cells], part, base=0.0)
        return None if shifts is None else shifts.mean(axis=0)

    def selectivity(self, part: str, n_boot: int) -> Estimate | None:
        """How much further the targets move than all other traits of the board; None without one."""
        moved = {t: _stacked([c.board.get(t) for c in self.cells], part) for t in self.first.board}
        known = {t: values for t, values in moved.items() if values is not None}
        return selectivity(known, self.first.targets, [t for t in known if t not in self.first.targets], n_boot)

    def mean(self, what: str, sign: int) -> float | None:
        """The mean over seeds of `alphas` or `divergence`; None when a seed lacks that strength."""
        values = [getattr(c, what).get(sign) for c in self.cells]
        return None if any(v is None for v in values) else float(np.mean(values))


def _worst(by_seed: Sequence[Mapping[int, Readability]], part: str) -> Readability | None:
    known = [of[sign] for of in by_seed for sign in PARTS[part] if sign in of]
    return worst(known) if known else None


def _stacked(
    by_seed: Sequence[BySign | None], part: str, base: float | None = None
) -> Float[np.ndarray, "seeds values"] | None:
    """Differences of one part per seed; `base` stands for a base that is not stored because it is a constant."""
    plus, minus = PARTS[part]
    rows = []
    for scores in by_seed:
        known = dict(scores or {})
        if base is not None and known:
            known[0] = np.full_like(next(iter(known.values())), base)
        if plus not in known or minus not in known:
            return None
        rows.append(known[plus] - known[minus])
    return np.stack(rows)


# ---- the nulls ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reality:
    """A shift against its three nulls.

    Attributes:
        p_random: among random vectors; None without draws.
        n_draws: how many random vectors these are.
        margins: by null, the mean of |shift| - |shift of the null|, item by item; without those that were not trained.
    """

    p_random: float | None
    n_draws: int | None
    margins: Mapping[str, Estimate]

    @property
    def is_real(self) -> bool | None:
        """Whether all three are beaten; None when one of them is missing, or random vectors are too few to tell."""
        beaten = beats_random(self.p_random, self.n_draws)
        if beaten is None or len(self.margins) < len(NULLS):
            return None
        return beaten and all(m.excludes_zero and m.mean > 0 for m in self.margins.values())


def reality(group: Group, score: str, part: str, n_boot: int = N_BOOTSTRAP) -> Reality:
    """Compare the shift of a group with its nulls; see `ws.analysis.compare`.

    Signs are taken from the means, the null's too, which makes the null look larger than it is and never smaller.
    """
    shifts, null = group.shifts(score, part), group.random_shifts(score, part)
    if shifts is None:
        return Reality(None, None, {})
    p = None if null is None else empirical_p(float(shifts.mean()), null)
    margins = {}
    for name in NULLS:
        other = group.null_shifts(name, score, part)
        if other is not None:
            margins[name] = estimate_over_seeds(_towards_mean(shifts) - _towards_mean(other), n_boot)
    return Reality(p, None if null is None else len(null), margins)


def _towards_mean(values: np.ndarray) -> np.ndarray:
    return values if values.mean() >= 0 else -values


# ---- rows -----------------------------------------------------------------------------------------------------------


def group_rows(key: Mapping[str, Any], groups: Sequence[Group], effect: int, n_boot: int = N_BOOTSTRAP) -> Rows:
    """Rows of `compare.csv`: one per intervention, adapter, score and part; `p_holm` is over all effects of a part.

    Args:
        key: the first columns.
        groups: what was measured.
        effect: the sign that the behaviour gives to the span on false claims.
        n_boot: resamples per interval.

    Mass and agreement of the frames are the lowest over the seeds at the strengths that a row compares; what they are
    too low for is never real and gets no verdict.

    Raises:
        WsError: nothing could be measured, or cells were asked other items or in other words.
    """
    cells = {f"{c.intervention} of {c.adapter} seed {c.seed}": c for group in groups for c in group.cells}
    for score in headlines():
        check_same({name: cell.asked[score] for name, cell in cells.items() if score in cell.asked})
    rows = Rows()
    for group in groups:
        ratios = {part: columns_of(group.selectivity(part, n_boot), "selectivity", "ci_lo", "ci_hi") for part in PARTS}
        rows += [
            _row(key, group, score, part, effect, n_boot) | ratios[part]
            for score in (*headlines(), *COSTS)
            for part in PARTS
            if group.shifts(score, part) is not None
        ]
    if not rows:
        raise WsError("No intervention could be measured at a calibrated strength; see the notes above.")
    for part in PARTS:
        tested = [r for r in rows if r["score"] not in COSTS and r["part"] == part]
        if tested:
            for row, p in zip(tested, holm(np.array([r["p"] for r in tested])), strict=True):
                row["p_holm"] = float(p)
    return rows


def _row(key: Mapping[str, Any], group: Group, score: str, part: str, effect: int, n_boot: int) -> dict[str, Any]:
    shifts, first = group.shifts(score, part), group.first
    assert shifts is not None, "rows are made of what was measured"
    estimate = estimate_over_seeds(shifts, n_boot)
    sides = {sign: group.mean("divergence", sign) for sign in (-1, 1)}
    row = {
        **key,
        "adapter": first.adapter,
        "seed": " ".join(str(c.seed) for c in group.cells),
        "alpha": None if part == "span" else group.mean("alphas", PARTS[part][0]),
        "intervention": first.intervention,
        "part": part,
        "score": score,
        **estimate.columns("shift", "ci_lo", "ci_hi"),
        "base": float(np.mean([c.scores[score][0].mean() for c in group.cells])),
        "p": estimate.p,
        "p_holm": None,
        "n": estimate.n,
        "n_seeds": len(group.cells),
        "divergence_minus": sides[-1],
        "divergence_plus": sides[1],
        "matched": first.matched,
        "detail": first.detail,
        **_read_columns(group.readability(score, part)),
        **{name: first.asked.get(score, {}).get(name) for name in ("eval_hash", "words", "drawn")},
        "calibrated_on": "; ".join(dict.fromkeys(c.questions for c in group.cells)),
        "dtype": first.dtype,
    }
    return row | _null_columns(group, score, part, n_boot) | _verdict_columns(group, score, part, effect, n_boot)


def _read_columns(known: Readability | None) -> dict[str, Any]:
    return dict.fromkeys(Readability(1.0).columns()) if known is None else known.columns()


def _null_columns(group: Group, score: str, part: str, n_boot: int) -> dict[str, Any]:
    known = group.readability(score, part)
    tested = group.first.intervention == WEIGHT and score not in COSTS and not (known and known.problem)
    evidence = reality(group, score, part, n_boot) if tested else Reality(None, None, {})
    row: dict[str, Any] = {"p_random": evidence.p_random, "n_draws": evidence.n_draws}
    for name in NULLS:
        row |= columns_of(evidence.margins.get(name), f"margin_{name.replace('-', '_')}", "ci_lo", "ci_hi")
    return row | {"real": evidence.is_real}


def _verdict_columns(group: Group, score: str, part: str, effect: int, n_boot: int) -> dict[str, Any]:
    """What kind of shift it is on the claims, from its seeds' mean: see `ws.eval.confounds`."""
    false, true = (group.shifts(name, part) for name in ("false_claims", "true_claims"))
    if score != "false_claims" or false is None or true is None or min(false.shape[1], true.shape[1]) < 2:
        return {"verdict": None, "verdict_line": None}
    f, t = false.mean(axis=0), true.mean(axis=0)
    sign = -effect if part == "-1u" else effect
    known = [r for name in ("false_claims", "true_claims") if (r := group.readability(name, part)) is not None]
    read = worst(known) if known else Readability(1.0)
    verdict = agreement_verdict(np.zeros_like(f), f, np.zeros_like(t), t, sign, n_boot, read.mass, flag=read.flag)
    return {"verdict": verdict.kind, "verdict_line": verdict.line}


def comparison_rows(key: Mapping[str, Any], groups: Sequence[Group], effect: int, n_boot: int = N_BOOTSTRAP) -> Rows:
    """Rows of `compare_pairs.csv`: the span of every weight vector minus that of every other intervention, paired.

    Spans count in the direction of the behaviour where it has one (`effect` on false claims, up on `_UPWARD`), so that
    more is better, and elsewhere by their size, each towards its own mean. A vector is compared with what is made of
    its own adapter and with what needs none; `p_holm` is over the whole table. Nobody wins by less than the floor of a
    score (`ws.eval.evaluation.HeadlineScore`), nor where one of the two cannot be read.
    """
    rows: Rows = []
    for ours, theirs, score in _contests(groups):
        mine, other = ours.shifts(score, "span"), theirs.shifts(score, "span")
        if mine is None or other is None:
            continue
        mine, other = (_counted(score, span, effect) for span in (mine, other))
        difference = estimate_over_seeds(mine - other, n_boot)
        row = {
            **key,
            "adapter": ours.first.adapter,
            "seed": " ".join(str(c.seed) for c in ours.cells),
            "baseline": theirs.first.intervention,
            "score": score,
            "weight": float(mine.mean()),
            "other": float(other.mean()),
            **difference.columns("difference", "ci_lo", "ci_hi"),
            "p": difference.p,
            "matched": theirs.first.matched,
            "n": difference.n,
            "n_seeds": len(ours.cells),
        }
        known = [r for g in (ours, theirs) if (r := g.readability(score, "span")) is not None]
        rows.append(row | _read_columns(worst(known) if known else None))
    for row, p in zip(rows, holm(np.array([r["p"] for r in rows])) if rows else (), strict=True):
        row["p_holm"] = float(p)
        row["winner"] = _winner(row)
    return rows


def _counted(score: str, span: Float[np.ndarray, "seeds items"], effect: int) -> Float[np.ndarray, "seeds items"]:
    if score == "false_claims":
        return effect * span
    return span if score in _UPWARD else _towards_mean(span)


def _winner(row: Mapping[str, Any]) -> str | None:
    """Who moves a score further, beyond chance and by the floor or more; None where that cannot be read."""
    if row[FLAG]:
        return None
    if row["p_holm"] >= LEVEL or abs(row["difference"]) < headline(row["score"]).floor:
        return "neither"
    return "weight" if row["difference"] > 0 else str(row["baseline"])


def _contests(groups: Sequence[Group]) -> Iterator[tuple[Group, Group, str]]:
    for ours in (g for g in groups if g.first.intervention == WEIGHT):
        for theirs in groups:
            comparable = theirs.first.adapter in (ours.first.adapter, theirs.first.intervention)
            if theirs.first.intervention != WEIGHT and comparable:
                yield from ((ours, theirs, score) for score in headlines() if score != "true_claims")


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], tablefmt: str = "simple") -> str:
    """The spans as one table, the verdicts, and who wins."""
    groups = dict.fromkeys((r["intervention"], r["adapter"]) for r in rows)
    scores = effects(rows)
    names = [f"span, {s.replace('_', ' ')}" for s in scores]
    mass = ["mass"] if any("mass" in r for r in rows) else []
    board = ["selectivity"] if any(r.get("selectivity") for r in rows) else []
    table = [_line([r for r in rows if (r["intervention"], r["adapter"]) == g], scores, bool(board)) for g in groups]
    header = ["intervention", "seeds", "nats at -1u, +1u", *names, *board, *mass, "cost", "p random", "real", "verdict"]
    spans = tabulate(table, header, tablefmt=tablefmt, disable_numparse=True)
    return "\n\n".join([spans, *_notes(rows), *_winners(pairs, tablefmt)])


def effects(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headline scores of some rows, in the order of tables; last those that no evaluation here has."""
    present = dict.fromkeys(r["score"] for r in rows if r["score"] not in COSTS)
    return [s for s in dict.fromkeys((*headlines(), *present)) if s in present]


def _line(rows: Sequence[Mapping[str, Any]], scores: Sequence[str], has_board: bool = False) -> list[str]:
    """One intervention."""
    first = rows[0]
    span = {r["score"]: r for r in rows if r["part"] == "span"}
    head = next((span[s] for s in scores if s in span), {"p_random": None, "real": None, "verdict": None})
    masses = [m for s in scores if s in span and (m := span[s].get("mass")) is not None]
    costs = [r["shift"] for r in rows if r["score"] == "nll" and r["part"] != "span"]
    return [
        label(first) + ("" if first["matched"] else " *"),
        str(first["n_seeds"]),
        nats_text(first),
        *(_interval(span[s]) if s in span else "" for s in scores),
        *([estimate_text(next(iter(span.values()), {"selectivity": None}), "selectivity", ".2f")] if has_board else []),
        *([f"{min(masses):.3f}" if masses else ""] if "mass" in first else []),
        f"{max(costs):+.2f}" if costs else "",
        "" if head["p_random"] is None else f"{head['p_random']:.3f}",
        {None: "", True: "yes", False: "no"}[head["real"]],
        head["verdict"] or "",
    ]


_SIDES = ("minus", "plus")


def nats_text(row: Mapping[str, Any]) -> str:
    """The divergence at -1u and at +1u of a row, as it was made or read from its file; empty for a side it lacks."""
    sides = (row[f"divergence_{side}"] for side in _SIDES)
    return ", ".join("" if nats in (None, "") else f"{float(nats):.2f}" for nats in sides)


def _interval(row: Mapping[str, Any]) -> str:
    return estimate_text(row, "shift", headline(row["score"]).spec) + (MARK if row.get(FLAG) else "")


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table does not say."""
    counts = {r["score"].replace("_", " "): r["n"] for r in rows if r["score"] not in COSTS}
    over = ", ".join(f"{n} items of {s}" for s, n in counts.items())
    notes = [
        f"Spans from -1u to +1u over {over}, 95 % intervals; mass is the lowest mean answer mass of a row; "
        "cost is the larger rise of the negative log-likelihood of neutral text, in nats per token; `p random`, `real` "
        "and `verdict` are of the first score. `verdict` says what moved and `real` whether it comes from the "
        "behaviour; `p random` is no evidence for that, because vectors trained on anything beat random ones."
    ]
    spans = [r for r in rows if r["part"] == "span" and r["score"] not in COSTS]
    notes += [*_significant(spans), *mark_notes(r.get(FLAG) for r in spans)]
    notes += [*_calibrated_on(rows), *rounding_notes(r.get("dtype") or "float32" for r in rows)]
    if any(r.get("selectivity") for r in rows):
        notes.append(
            "Selectivity is how much further the span of the behaviour's own traits goes than that of all others on "
            "the board (root mean squares of standardised shifts, `ws profile`): 1 is moving everything alike."
        )
    if not all(r["matched"] for r in rows):
        notes.append("* has no dial and stands at the divergence it happens to have.")
    if any(r["divergence_minus"] is None or r["divergence_plus"] is None for r in rows):
        notes.append("Where a side is empty, its calibration did not converge (for one seed at least): no span there.")
    ours = [r for r in rows if r["intervention"] == WEIGHT and r["score"] not in COSTS]
    unknown = {r["adapter"] for r in ours if r["real"] is None}
    if unknown:
        notes.append(
            f"`real` is empty for {', '.join(sorted(unknown))}, so nothing is known there of the behaviour: it needs "
            "19 random draws or more, both trained nulls (`ws replicate --control shuffled` and `--control same-side`, "
            "same adapter and seeds), and answers that can be read."
        )
    return [*notes, *notes_by_score(rows)]


def _calibrated_on(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What strengths were solved for on, in one sentence where that is the same for all."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        what = row.get("calibrated_on") or ""  # tables of earlier versions do not say
        name, known = label(row), groups.setdefault(what, [])
        if what and name not in known:
            known.append(name)
    parts = [
        f"{what}{f' ({chr(44).join(names)})' if len(groups) > 1 else ''}" for what, names in groups.items() if what
    ]
    return [f"Strengths are solved for on {'; '.join(parts)}; the nats are of other questions."] if parts else []


def _significant(spans: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the spans are more than chance, and which are not."""
    if not spans:
        return []
    others = [r for r in spans if star(r["shift"], r["p_holm"], headline(r["score"]).floor, r.get(FLAG)) != "*"]
    named = ", ".join(f"{label(r)} on {r['score'].replace('_', ' ')}" for r in others)
    survive = (
        f"{len(spans) - len(others)} of {len(spans)} spans differ from zero after Holm's correction over all of them, "
        f"by {floors_text(headline(s) for s in dict.fromkeys(r['score'] for r in spans))} or more"
    )
    return [f"{survive}{f'; not {named}' if others else ''}."]


def _winners(pairs: Sequence[Mapping[str, Any]], tablefmt: str) -> list[str]:
    """Per score and baseline: how many adapters move it more, less, or as far, and by how much."""
    table = []
    for baseline, score in dict.fromkeys((p["baseline"], p["score"]) for p in pairs):
        here = [p for p in pairs if (p["baseline"], p["score"]) == (baseline, score)]
        here = [p for p in here if not p.get(FLAG)]
        if not here:
            continue
        counts = [sum(p["winner"] == w for p in here) for w in ("weight", baseline, "neither")]
        spread, d = [p["difference"] for p in here], headline(score).digits
        star = "" if here[0]["matched"] else " *"
        table.append([f"{baseline}{star}", score, *map(str, counts), f"{min(spread):+.{d}f} to {max(spread):+.{d}f}"])
    if not table:
        return []
    header = ["weight against", "score", "weight wins", "it wins", "neither", "difference of spans"]
    known = [headline(score) for score in dict.fromkeys(p["score"] for p in pairs)]
    others = "".join(dict.fromkeys(f" or {s.floor} {s.unit}" for s in known if has_own_floor(s)))
    text = (
        "Adapters whose weight vector moves the score further than the baseline does (paired, Holm-corrected, by "
        f"{NATS} nats or {WRONGNESS} of wrongness{others} at least; false claims, preference, statements and judged "
        "traits in the direction of the behaviour, other scores whichever way they move):"
    )
    return [text, tabulate(table, header, tablefmt=tablefmt, disable_numparse=True)]
