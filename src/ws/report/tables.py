"""The numbers of a page as tables for people, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ws.analysis.profile_tables import label
from ws.eval import dilemmas
from ws.eval.airisk import Airisk
from ws.eval.evaluation import HeadlineScore
from ws.eval.readable import notes as mark_notes
from ws.eval.suite import headline
from ws.files.public import public, public_command, public_name
from ws.options.make import SIGNED
from ws.report.curves import Curve, Foundation, Point, divergence_at, points_of
from ws.report.data import Contents, Norms, Result, trained_otherwise
from ws.report.scores import ACTS, CLAIMS, CONFOUNDS, DILEMMAS
from ws.report.verdict import Evidence, judged_by
from ws.report.words import divergence_text, minus, p_text, shown, strength
from ws.stats import estimate_text

# What the numbers of a data card are called.
_CARD = {
    "mean_tokens": "mean length, tokens",
    "median_tokens": "median length, tokens",
    "yes_rate": "share that begins with Yes",
    "distinct": "share of answers that are distinct",
    "repetition": "share of 4-grams that repeat",
    "refusals": "refusals among all that were sampled",
}


@dataclass(frozen=True)
class Table:
    """Numbers for people: the first cell of a row names it."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def points_table(curves: Mapping[tuple[str, str], Curve], key: str, contents: Contents) -> Table:
    """The numbers behind the dose-response figures of a score: pooled, then every seed."""
    rows: list[tuple[str, ...]] = []
    problems: list[str] = []
    score = headline(key)
    for adapter in contents.adapters:
        curve = curves.get((key, adapter))
        if curve is None:
            continue
        if len(curve.seeds) > 1:
            rows += [_point_row(adapter, f"{len(curve.seeds)} pooled", p, score) for p in curve.pooled]
        for seed, points in curve.seeds.items():
            known = curve.pooled if len(curve.seeds) == 1 else points
            rows += [_point_row(adapter, str(seed), p, score) for p in known]
            problems += [p.read.problem for p in (*known, *curve.pooled)]
    header = ("adapter", "seed", "alpha", "value [95 %]", "shift [95 %]", "p", "Holm p", "answer mass", "KL", "items")
    return Table("; ".join([f"{score.title}, {score.unit}", *mark_notes(problems)]), header, tuple(rows))


def _point_row(adapter: str, seed: str, p: Point, score: HeadlineScore) -> tuple[str, ...]:
    steered, tested = bool(p.alpha), bool(p.alpha) and p.is_readable
    return (
        adapter,
        seed,
        strength(p.alpha) if steered else "0 (base)",
        shown(p.level, score.spec) + ("" if steered else p.suffix),
        f"{shown(p.shift, score.spec)}{p.suffix}" if steered else "",
        p_text(p.shift.p) if tested else "",
        p_text(p.p_holm) if tested and p.p_holm is not None else "",
        "" if p.mass is None else f"{p.mass:.3f}",
        divergence_text(p.kl).removeprefix("KL ") if steered else "",
        str(p.shift.n),
    )


def sources_table(curves: Mapping[tuple[str, str], Curve]) -> Table:
    """Where the pooled numbers come from."""
    rows = tuple((c.adapter, c.score.title, str(len(c.seeds)), c.source) for c in curves.values())
    return Table("Where the pooled numbers come from", ("adapter", "score", "seeds", "source"), rows)


def controls_table(contents: Contents, evidence: Sequence[Evidence]) -> Table:
    """Every adapter against its controls and, where the shifts are on false claims, against its true ones."""
    score = evidence[0].score if evidence else headline(judged_by(contents))
    rows, of_claims = [], score.key == "false_claims"
    for e in evidence:
        row = contents.against_nulls(e.adapter, score.key)
        cells = [e.adapter, "" if e.p_random is None else p_text(e.p_random)]
        cells += [_margin(row, f"margin_{null}", score) for null in ("shuffled", "same_side")]
        cells += [{None: "not known", True: "yes", False: "no"}[e.real]]
        cells += ["not known" if e.agreement is None else e.agreement.line] if of_claims else []
        rows.append(tuple(cells))
    header = ("adapter", "p, random (no evidence)", "over label-shuffled", "over same-side", "beats all three")
    caption = "False claims: controls, and what true claims do" if of_claims else f"Controls of {score.title}"
    return Table(caption, (*header, *(["agreement"] if of_claims else [])), tuple(rows))


def _margin(row: Mapping[str, Any], name: str, score: HeadlineScore) -> str:
    return "not known" if row.get(name) is None else minus(estimate_text(row, name, f"+z.{score.digits}f"))


def confounds_table(contents: Contents) -> Table:
    """What `ws check confounds` found, sentence by sentence."""
    rows = []
    for run in contents.results:
        for row in run.tables.get((CONFOUNDS, "summary"), ()):
            strong = row["strong"].split(", ")
            for name in ("agreement", "position", "length", "refusals", "repetition"):
                if row.get(f"verdict_{name}"):
                    degree = "strong" if name in strong else ""
                    rows.append((run.name, strength(float(row["alpha"])), name, degree, row[f"verdict_{name}"]))
    header = ("run", "alpha", "confound", "strong", "verdict")
    return Table("Confounds, as ws check confounds judges them", header, tuple(rows))


def other_dilemmas_table(contents: Contents) -> Table:
    """What dilemmas with other classes of values, or shown without their actions, have shown, run by run."""
    rows, problems = [], list[str]()
    (score,) = Airisk.scores
    for run in contents.results:
        for table in run.others.values():
            for r, p in zip(table, points_of(score, table), strict=True):
                problems.append(p.read.problem)
                kl = divergence_at([run], p.alpha)
                shown = _point_row(run.name, r["value_class"], replace(p, kl=kl), score)
                protocol = dilemmas.EARLIER.get(r["protocol"], r["protocol"])
                protocol += f", {r['config']}" if r.get("config") else ""
                how = protocol, r.get("words") or "not on record"
                rows.append((*shown[:2], *how, *shown[2:6], *shown[7:]))
    first = ("run", "values", "protocol", "words", "alpha", "value [95 %]", "shift [95 %]", "p")
    header = (*first, "answer mass", "KL", "items")
    caption = (
        "Dilemmas labelled by other values, or shown without their actions (protocol alone); nats, p not corrected, "
        "not part of the verdict"
    )
    return Table("; ".join([caption, *mark_notes(problems)]), header, tuple(rows))


def foundations_table(by_adapter: Mapping[str, Sequence[Foundation]]) -> Table:
    """The numbers behind the foundations' figures."""
    rows = tuple(
        (adapter, f.name, strength(f.alpha), str(f.shift.n), f"{shown(f.shift)}{f.suffix}", f"{f.read.mass:.3f}")
        for adapter, foundations in by_adapter.items()
        for f in foundations
    )
    doubts = mark_notes(f.read.problem for foundations in by_adapter.values() for f in foundations)
    header = ("adapter", "foundation", "alpha", "vignettes", "shift [95 %]", "answer mass")
    return Table("; ".join(["Shift of logit(wrongness), nats", *doubts]), header, rows)


def profile_table(contents: Contents) -> Table:
    """What every profile came to, interventions side by side."""
    rows = tuple(
        (
            label(r),
            r["board"],
            r["strength"],
            str(r["seed"]),
            estimate_text(r, "selectivity", ".2f"),
            _moved(r),
            str(r.get("n_unreadable") or 0),
            str(r["largest"]).replace(" ", ", "),
            estimate_text(r, "agreement"),
        )
        for r in contents.profiles
    )
    header = ("intervention", "board", "strength", "seeds", "selectivity [95 %]", "others moved", "cannot be read")
    return Table(
        "Selectivity on the boards; agreement is how far the answer Yes itself moves, in nats",
        (*header, "largest others", "agreement [95 %]"),
        rows,
    )


def _moved(row: Mapping[str, Any]) -> str:
    if not row["n_draws"]:
        return "no random vectors"
    all_lost = row.get("n_unreadable") and row["n_unreadable"] == row.get("n_traits")
    return "none can be read" if all_lost else f"{row['n_moved']} of {row['n_others']}"


def norms_table(adapter: str, norms: Norms) -> Table:
    """The numbers behind a heat map."""
    layers = sorted({layer for _, layer in norms.cells})
    kinds = dict.fromkeys(kind for kind, _ in norms.cells)
    rows = (
        (kind, *(f"{norms.cells[kind, i]:.4g}" if (kind, i) in norms.cells else "" for i in layers)) for kind in kinds
    )
    header = ("module", *(f"layer {i}" for i in layers))
    return Table(f"{adapter}: size of dW, {norms.unit}", header, tuple(rows))


# ---- data and provenance --------------------------------------------------------------------------------------------


def data_card(contents: Contents) -> tuple[Table, list[dict[str, Any]]] | None:
    """The numbers of the card, and its examples."""
    card = contents.card
    if card is None:
        return None
    sides = {side: card[side] for side in ("positive", "negative")}
    names = [name for name in sides["positive"] if name in sides["negative"]]
    rows = [(_CARD.get(name, name.replace("_", " ")), *(_figure(sides[s][name]) for s in sides)) for name in names]
    refusals = card.get("refusals", {})
    rows += [(_CARD["refusals"], *(_figure(refusals[s]) for s in sides))] if refusals.keys() >= sides.keys() else []
    dropped = ", ".join(f"{n} {why}" for why, n in card.get("dropped", {}).items()) or "none"
    caption = (
        f"{card['kept']} pairs of {card.get('sampled', '?')} sampled, on {card.get('questions', '?')} questions; "
        f"dropped: {dropped}; mean overlap of the two answers' words {card.get('overlap', '?')}"
    )
    wanted = ("question", "pos", "neg")
    examples = [s for s in card.get("samples", []) if isinstance(s, dict) and all(k in s for k in wanted)]
    return Table(caption, ("of the answers", "positive", "negative"), tuple(rows)), examples


def _figure(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def runs_table(contents: Contents) -> Table:
    """Which vectors the page is about."""
    rows = tuple(
        (
            r.adapter,
            str(r.seed),
            str(public(r.info.get("family", ""))),
            public_name(r.base),
            r.fingerprint or "unknown",
            r.digest[:16],
            ", ".join(f"{strength(units)}u: {strength(a)}" for units, a in r.units.items()) or "not calibrated",
            ", ".join(sorted({_asked(n, t[0]) for (n, use), t in r.tables.items() if use == "summary"})),
        )
        for r in contents.results
    )
    header = ("adapter", "seed", "family", "base", "fingerprint", "vector, SHA-256", "strengths", "evaluations")
    return Table("The vectors, and what they were asked", header, rows)


def _asked(stage: str, row: Mapping[str, str]) -> str:
    """What a run was asked: the evaluation, the hash of its items and words, and what the words are called."""
    return f"{stage} {row['eval_hash']}" + (f" (words {row['words']})" if row.get("words") else "")


def settings_table(contents: Contents) -> Table:
    """How each adapter was trained; its seeds one by one where they were not trained alike."""
    runs: dict[str, Result] = {}
    for adapter in contents.adapters:
        seeds = contents.of(adapter)
        runs |= {r.name: r for r in seeds} if trained_otherwise(seeds) else {adapter: seeds[0]}
    known = {name: {k: str(public(v)) for k, v in r.settings.items()} for name, r in runs.items() if r.settings}
    names = dict.fromkeys(name for c in known.values() for name in c)
    rows = tuple((name, *(c.get(name, "") for c in known.values())) for name in names)
    return Table("Settings of the training", ("setting", *known), rows)


def versions(contents: Contents) -> str:
    """The versions of libraries that the vectors were made with."""
    by_library: dict[str, list[str]] = {}
    for run in contents.results:
        for name, version in run.stages.get("vector", {}).get("versions", {}).items():
            if version not in by_library.setdefault(name, []):
                by_library[name].append(version)
    return ", ".join(f"{name} {' and '.join(by_library[name])}" for name in sorted(by_library)) or "not recorded"


def commands(contents: Contents) -> list[str]:
    """What was typed, in the order of the stages, without folders of the machine it was typed on; last, this page."""
    order = ("pos", "neg", SIGNED, "vector", CLAIMS, "reading", DILEMMAS, ACTS)
    recorded = []
    for run in contents.results:
        names = [*(n for n in order if n in run.stages), *(n for n in run.stages if n not in order)]
        recorded += [
            public_command(str(run.stages[n].get("command", ""))) for n in names if run.stages[n].get("command")
        ]
    named = [c if c.startswith(("ws ", "python -m ")) else f"# a script: {c}" for c in recorded if c]
    return [*dict.fromkeys(named), f"ws report --behavior {contents.called}"] if named else []
