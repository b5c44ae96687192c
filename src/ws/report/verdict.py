"""The verdict: a sentence never stronger than the numbers, three figures, a row of checks, and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ws.analysis.controls import beats_random, empirical_p
from ws.eval.confounds import AGREEMENT, MIXED, TRUE_ONLY, UNDECIDED, AgreementVerdict, agreement_verdict
from ws.eval.evaluation import HeadlineScore
from ws.eval.preference import Preferences
from ws.eval.readable import FLAG, LEVEL, Readability, remedy, rounding_notes, worst
from ws.eval.suite import headline
from ws.lm.models import BUNDLED
from ws.options.shared import WEIGHT
from ws.report.curves import Curve, Point, nearest, simultaneous
from ws.report.data import Contents, Result
from ws.report.scores import CLAIMS, CONFOUNDS, in_own_words, of, shown_scores
from ws.report.words import counted, divergence_text, odds, p_text, shown, strength
from ws.stats import Estimate

# From the weakest to the strongest: what a page says at its top. Those from `AGAINST` on need nulls that were trained.
NOTHING, NO_CONCLUSION, NO_EFFECT, UNKNOWN = "No verdict", "No conclusion", "No effect shown", "Cause not known"
NOT_ESTABLISHED, AGAINST, FIRST, SUPPORTED = (
    "Not established",
    "Against the prediction",
    "First indication",
    "Supported",
)
# What a check can have found.
GOOD, CAUTION, BAD, MISSING = "good", "caution", "against it", "missing"
COST, AFFORDABLE = "Cost", 1.0  # nats: the divergence that calibrated strengths have


@dataclass(frozen=True)
class Evidence:
    """What is known of one adapter's shift of a score.

    Attributes:
        score, adapter, n_seeds: of what, and whose.
        point: at the positive strength nearest to 1.
        base: how well the base answered.
        interval: of that shift, wide enough to be named out of all adapters; see `ws.report.curves.simultaneous`.
        among: how many adapters these are.
        real: whether it beats random, label-shuffled and same-side vectors; None when one of them is missing.
        p_random: among random vectors, which is no evidence for a vector that was trained; None without draws.
        n_draws: how many these are; None where that is not on record.
        other_seeds: the seeds that were held against the nulls, as words, where the shift is of others; else empty.
        agreement: of false claims, against the shift on true ones; None without at least two of either kind.
        strong: further confounds that `ws check confounds` calls strong at that strength; None where there are none and
            it was not run on every seed.
    """

    score: HeadlineScore
    adapter: str
    n_seeds: int
    point: Point
    base: Readability
    interval: Estimate
    among: int
    real: bool | None
    p_random: float | None
    n_draws: int | None
    other_seeds: str
    agreement: AgreementVerdict | None
    strong: tuple[str, ...] | None

    @property
    def has_few_draws(self) -> bool:
        """All random vectors are beaten, but they are too few for that to say anything."""
        return self.p_random is not None and beats_random(self.p_random, self.n_draws) is None

    @property
    def is_sure(self) -> bool:
        """The interval excludes zero, p survives the correction for all rows of the page, and it is no tiny effect."""
        shift, least = self.point.shift, self.score.floor
        return shift.excludes_zero and (self.point.p_holm or 0.0) < LEVEL and abs(shift.mean) >= least


@dataclass(frozen=True)
class Selection:
    """The shifts that a verdict is on.

    Attributes:
        all: one per adapter.
        readable, sure, expected: those whose answers can be read, of those the sure ones, and of those the ones on the
            side that the behaviour file predicts.
        named: the one that the verdict names, whose interval stays farthest from zero: of those that beat trained nulls
            where there are such. None when none can be read.
    """

    all: tuple[Evidence, ...]
    readable: tuple[Evidence, ...]
    sure: tuple[Evidence, ...]
    expected: tuple[Evidence, ...]
    named: Evidence | None


@dataclass(frozen=True)
class Check:
    """One thing that speaks for or against a shift: `GOOD`, `CAUTION`, `BAD` or `MISSING`, and why."""

    name: str
    grade: str
    text: str


@dataclass(frozen=True)
class Headline:
    """A figure to be read from afar: what it is, the figure, and what a reader must know of it."""

    name: str
    figure: str
    note: str


@dataclass(frozen=True)
class Verdict:
    """What stands at the top of a page.

    Attributes:
        kind: one of the kinds above.
        sentence: that as a sentence.
        claims: the shifts that it is on.
        shown: the shift that the figures and the checks are of: the one that the verdict names, or else one of another
            score that can be read. None where nothing is.
        headlines, checks: of that shift.
    """

    kind: str
    sentence: str
    claims: Selection
    shown: Evidence | None
    headlines: tuple[Headline, ...] = ()
    checks: tuple[Check, ...] = ()


# ---- the evidence ---------------------------------------------------------------------------------------------------


def select(contents: Contents, curves: Mapping[tuple[str, str], Curve], key: str = "false_claims") -> Selection:
    """The shifts of a score at the positive strength nearest to 1, and which of them count."""
    mine = [curves[key, adapter] for adapter in contents.adapters if (key, adapter) in curves]
    candidates = [(curve, point) for curve in mine if (point := nearest(curve.pooled, 1.0))]
    shifts = tuple(_evidence(contents, curves, curve, point, len(candidates)) for curve, point in candidates)
    effect = contents.effect if key == judged_by(contents) else None
    readable = tuple(e for e in shifts if e.point.is_readable)
    sure = tuple(e for e in readable if e.is_sure)
    expected = tuple(e for e in sure if np.sign(e.point.shift.mean) == effect)
    named = tuple(e for e in expected if e.real) or expected or sure or readable
    return Selection(shifts, readable, sure, expected, max(named, key=_distance, default=None))


def _distance(e: Evidence) -> float:
    """How far the interval of a shift stays from zero."""
    return e.interval.ci_lo if e.interval.mean > 0 else -e.interval.ci_hi


def _evidence(
    contents: Contents, curves: Mapping[tuple[str, str], Curve], curve: Curve, point: Point, among: int
) -> Evidence:
    runs, key = contents.of(curve.adapter), curve.score.key
    true = curves.get(("true_claims", curve.adapter)) if key == "false_claims" else None
    return Evidence(
        curve.score,
        curve.adapter,
        len(curve.seeds),
        point,
        _base(curve),
        simultaneous(curve, point, among),
        among,
        *_controls(contents, runs, curve),
        _agreement(curve, true, point, contents) if true else None,
        _strong([r for r in runs if r.seed in curve.seeds], point.alpha),
    )


def _base(curve: Curve) -> Readability:
    return worst(p.read for points in curve.seeds.values() for p in points if p.alpha == 0)


def _controls(
    contents: Contents, runs: Sequence[Result], curve: Curve
) -> tuple[bool | None, float | None, int | None, str]:
    """From `compare.csv`, whose spans are held against all three nulls; else random vectors alone, from the runs."""
    if row := contents.against_nulls(runs[0].adapter, curve.score.key):
        seeds = str(row["seed"]).split()
        others = "" if {*seeds} == {*map(str, curve.seeds)} else f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"
        return row["real"], row["p_random"], row.get("n_draws"), others
    known = [among for run in runs if (among := _among_random(run, curve.score)) is not None]
    worst_p = max(known, key=lambda among: (beats_random(*among) is False, among[0]), default=(None, None))
    return None, *worst_p, ""


def _among_random(run: Result, score: HeadlineScore) -> tuple[float, int] | None:
    """The p-value of a run's shift among its random vectors, at the positive strength nearest to 1, and how many."""
    table = run.tables.get((of(score).stage, "summary"))
    rows = [r for r in run.controls if r["score"] == score.key and float(r["alpha"]) > 0]
    rows = [r for r in rows if table and r["eval_hash"] == table[0]["eval_hash"]]
    alpha = min({float(r["alpha"]) for r in rows}, key=lambda a: abs(a - 1), default=None)
    shifts = {
        kind: [float(r["shift"]) for r in rows if r["control"] == kind and float(r["alpha"]) == alpha]
        for kind in ("vector", "random")
    }
    if len(shifts["vector"]) != 1 or not shifts["random"]:
        return None
    return empirical_p(shifts["vector"][0], np.array(shifts["random"])), len(shifts["random"])


def _agreement(false: Curve, true: Curve, point: Point, contents: Contents) -> AgreementVerdict | None:
    """The verdict of `ws.eval.confounds` on the shifts of the seeds' mean."""
    f, t = (curve.moved(point.alpha).mean(axis=0) for curve in (false, true))
    other = true.at(point.alpha)
    if contents.effect is None or other is None or min(len(f), len(t)) < 2:
        return None
    read, zeros = worst([point.read, other.read]), np.zeros_like
    return agreement_verdict(
        zeros(f), f, zeros(t), t, contents.effect, least_mass=read.mass, behavior=contents.name, flag=read.flag
    )


def _strong(runs: Sequence[Result], alpha: float) -> tuple[str, ...] | None:
    """Confounds but agreement that any seed's table calls strong; None where none is and some seed has no table."""
    tables = [[r for r in run.tables.get((CONFOUNDS, "summary"), ()) if float(r["alpha"]) == alpha] for run in runs]
    names = dict.fromkeys(name for rows in tables for r in rows for name in r["strong"].split(", ") if name)
    strong = tuple(name for name in names if name != "agreement")
    return strong if strong or all(tables) else None


# ---- the verdict ----------------------------------------------------------------------------------------------------


def judged_by(contents: Contents) -> str:
    """The score that the behaviour file predicts a sign for: preference where it has no claims, such as a style's.

    Where that file is not at hand, what the runs were put to says whether it has claims.
    """
    if contents.behavior is not None:
        no_claims = contents.behavior.claims is None
    else:
        asked = {stage for run in contents.results for stage in run.stages}
        no_claims = CLAIMS not in asked and Preferences.stage in asked
    return "preference" if no_claims else "false_claims"


def _subject(contents: Contents) -> tuple[str, str, float, str]:
    """Of that score: what it is of, what moves, its floor and the unit of that."""
    score = headline(judged_by(contents))
    if score.key == "false_claims":
        return "held-out claims", "agreement with held-out false claims", score.floor, score.unit
    return "held-out questions", f"{score.title} to held-out questions", score.floor, score.unit


def judge(contents: Contents, curves: Mapping[tuple[str, str], Curve]) -> Verdict:
    """The verdict on the score for which the behaviour file predicts a sign, such as agreement with false claims."""
    claims = select(contents, curves, judged_by(contents))
    others = (select(contents, curves, score.key).named for score in shown_scores() if score.key != "true_claims")
    e = claims.named or next(filter(None, others), None)
    checks = tuple(_checks(contents, e)) if e else ()
    parted = [c for (key, _), c in curves.items() if key == judged_by(contents) and c.parted]
    kind, sentence = _conclusion(contents, claims, checks, parted)
    if e and e.score.key != judged_by(contents):
        sentence += f"; what can be read is below: {e.score.title}"
    return Verdict(kind, f"{sentence}.", claims, e, tuple(_headlines(contents, e)) if e else (), checks)


def _conclusion(
    contents: Contents, claims: Selection, checks: Sequence[Check], parted: Sequence[Curve]
) -> tuple[str, str]:
    """The kind of a verdict and its sentence; `parted` are the curves whose seeds cannot be pooled at any strength."""
    items, what, floor, unit = _subject(contents)
    if not claims.all and parted:
        why = "; ".join(f"{curve.adapter}: {curve.parted}" for curve in parted)
        return NOTHING, f"no shift on {items} is of all seeds of an adapter ({why}), and single seeds get no verdict"
    if not claims.all:
        why = f"no vector of {contents.name} has been put to the {items} at a positive strength yet"
        return NOTHING, f"{why}, so nothing is known of what it does to them"
    if claims.named is None:
        best = max(claims.all, key=lambda e: e.point.mass or 0.0)
        problem = f"the model is not answering ({best.point.read.problem} at best), so its scores mean nothing"
        return NO_CONCLUSION, f"asked about {items}, {problem}; {remedy(best.base)}"
    if contents.effect is None:
        why = f"the behaviour file of {contents.name} is not at hand, so the direction that it predicts is unknown"
        return NO_CONCLUSION, f"{why}{_uncounted(claims)}"
    moves = f"{what} moves beyond chance"
    count = f"in {len(claims.sure)} of {counted(len(claims.all), 'adapter')}"
    if not claims.sure:
        return NO_EFFECT, f"{moves} by {floor} {unit} or more {count}{_uncounted(claims)}"
    doubts = [f"; but {c.name.lower()}: {c.text}" for c in checks if c.grade == BAD]
    if claims.named.real is None:
        nulls = f"trained nulls{' and more random vectors' if claims.named.has_few_draws else ''}"
        cause = f"whether that is {contents.name} is not known without {nulls}: any training moves such a score"
        kind, head = UNKNOWN, f"{moves} {count} ({_seeds(claims.sure)}); {cause}"
    elif not claims.expected:
        kind, head = AGAINST, f"{moves} {count}, the wrong way"
    else:
        kind, head = _supported(contents, claims)
        kind = FIRST if any(c.grade == CAUTION and c.name != COST for c in checks) else kind
    return NOT_ESTABLISHED if doubts else kind, f"{head}{_uncounted(claims)}{''.join(doubts)}"


def _supported(contents: Contents, claims: Selection) -> tuple[str, str]:
    """The kind and the sentence for vectors that were held against trained nulls and move as predicted."""
    expected, opposed = claims.expected, [e.adapter for e in claims.sure if e not in claims.expected]
    way, proven = "raises" if contents.effect == 1 else "lowers", sum(bool(e.real) for e in expected)
    most = 2 * len(expected) >= len(claims.readable)
    beat = "" if proven == len(expected) else f", {proven} of which beat{'s' if proven == 1 else ''} trained nulls"
    return SUPPORTED if most and not opposed else FIRST, (
        f"adding the {contents.name} vector {way} {_subject(contents)[1]}, as the behaviour predicts, in "
        f"{len(expected)} of {counted(len(claims.all), 'adapter')} ({_seeds(expected)}){beat}"
        f"{f'; the other way: {_and(opposed)}' if opposed else ''}"
        f"{'' if most else '; most adapters do not show it'}"
    )


def _uncounted(claims: Selection) -> str:
    """The adapters that do not count because their answers broke."""
    broken = [e.adapter for e in claims.all if e not in claims.readable]
    return f"; not counted, because the question is no longer answered there: {_and(broken)}" if broken else ""


def _seeds(evidence: Sequence[Evidence]) -> str:
    least, most = (pick(e.n_seeds for e in evidence) for pick in (min, max))
    if least < most:
        return f"{least} to {most} seeds each"
    return "one seed" if most == 1 else f"{most} seeds each"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---- figures and checks ---------------------------------------------------------------------------------------------


def _headlines(contents: Contents, e: Evidence) -> list[Headline]:
    """The score at the base and steered, its shift, and what that costs.

    Odds are `exp` of a mean log ratio: geometric means over items.
    """
    p, score = e.point, e.score
    levels, unit = [p.level.mean - p.shift.mean, p.level.mean], score.unit
    if unit == "nats":
        asked = contents.of(e.adapter)[0].tables.get((CLAIMS, "summary")) if of(score).stage == CLAIMS else None
        claims = contents.behavior.claims if contents.behavior and asked and in_own_words(asked[0]) else None
        unit = f"odds of {claims.agree} to {claims.disagree}" if claims else "odds"
    before, after = (odds(level) if score.unit == "nats" else shown(level, score.spec) for level in levels)
    way = {1: "; predicted: up", -1: "; predicted: down"}.get(contents.effect or 0, "")
    who = f"base, then {e.adapter} at alpha {strength(p.alpha)}{way if score.key == judged_by(contents) else ''}"
    over = f"{counted(p.shift.n, 'item')}, {counted(e.n_seeds, 'seed')}"
    several = f", for all {e.among} adapters at once" if e.among > 1 else ""
    holm = "" if p.p_holm is None else f"; Holm p {p_text(p.p_holm)}"
    cost = "not measured" if p.kl is None else f"{divergence_text(p.kl)} nats"
    return [
        Headline(score.title[:1].upper() + score.title[1:], f"{before} \N{RIGHTWARDS ARROW} {after}", f"{unit}: {who}"),
        Headline(f"Shift, {score.unit}", shown(e.interval, score.spec), f"95 % interval over {over}{several}{holm}"),
        Headline(f"{COST} at that strength", cost, "from the base, 95th percentile over the tokens of its answers"),
    ]


def _checks(contents: Contents, e: Evidence) -> list[Check]:
    """What speaks for a shift, against it, and what nobody has looked at."""
    kl, mass, single_seed = e.point.kl, e.point.mass, e.n_seeds == 1
    seeds = "one, and another training may differ" if single_seed else f"{e.n_seeds}, pooled"
    if e.strong is None:
        confounds = MISSING, "not looked for" if single_seed else "not looked for in every seed"
    else:
        confounds = (CAUTION, _and(e.strong)) if e.strong else (GOOD, "none is strong")
    cost = MISSING, "not measured"
    if kl is not None:
        cost = GOOD if kl.nats <= AFFORDABLE else CAUTION, f"{divergence_text(kl)} nats"
    checks = [
        Check("True claims", *_beside_true_claims(contents, e)),
        Check("Controls", *_beside_nulls(e)),
        Check("Seeds", CAUTION if single_seed else GOOD, seeds),
        Check("Answer mass", GOOD, "not needed" if mass is None else f"{mass:.3f}"),
        Check(COST, *cost),
        Check("Confounds", *confounds),
    ]
    dev = Check("Split", CAUTION, "dev, on which settings may have been chosen")
    return [*checks, dev] if "dev" in _splits(contents.of(e.adapter), of(e.score).stage) else checks


def _beside_true_claims(contents: Contents, e: Evidence) -> tuple[str, str]:
    if e.score.key != "false_claims":
        return MISSING, "none that can be read" if judged_by(contents) == "false_claims" else "the behaviour has none"
    kind = UNDECIDED if e.agreement is None else e.agreement.kind
    return {
        AGREEMENT: (BAD, f"move along, so this is agreement, not {contents.name}"),
        MIXED: (BAD, f"move along in part, so this is partly agreement, not {contents.name}"),
        TRUE_ONLY: (CAUTION, "only they move"),
        UNDECIDED: (CAUTION, "too few to tell it from agreement"),
    }.get(kind, (GOOD, "do not move along"))


def _beside_nulls(e: Evidence) -> tuple[str, str]:
    if e.real is not None:
        text = f"{'all' if e.real else 'NOT all'} beaten (label-shuffled, same-side, random)"
        text += f", of {e.other_seeds}, where the shift is of {counted(e.n_seeds, 'seed')}" if e.other_seeds else ""
        return (CAUTION if e.other_seeds else GOOD) if e.real else BAD, text
    if e.p_random is None:
        return MISSING, "no trained nulls"
    if e.has_few_draws:
        return MISSING, f"{e.n_draws} random vectors are too few to tell: it takes 19, and trained nulls"
    if e.p_random > LEVEL:
        return BAD, f"random vectors of the same size do as much (p {p_text(e.p_random)})"
    return MISSING, f"no trained nulls; beating random vectors (p {p_text(e.p_random)}) is no evidence"


# ---- warnings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caution:
    """A sentence, and the part of the page (its anchor) that it is about."""

    text: str
    anchor: str


def warnings_of(
    contents: Contents, curves: Mapping[tuple[str, str], Curve], evidence: Sequence[Evidence]
) -> list[Caution]:
    """Everything that a reader should know before believing a number on the page."""
    cautions = [*_unreadable(curves), *_confounds(contents, evidence), *_prompt(contents)]
    cautions += [*_pairs(contents), *_calibrations(contents), *_rounding(contents)]
    bases = dict.fromkeys((r.base, r.fingerprint) for r in contents.results)
    if len(bases) > 1:
        cautions.append(
            Caution(f"The runs are of {len(bases)} different bases, so they cannot be compared.", "provenance")
        )
    for curve in curves.values():
        if why := curve.parted if curve.pooled else curve.source:
            text = f"{curve.adapter}, {curve.score.title}: {why}."
            cautions.append(Caution(text, of(curve.score).place))
    if any(r.base in BUNDLED for r in contents.results):
        text = "The bundled models have such behaviours built into their training data: what is measured on them shows "
        cautions.append(Caution(f"{text}that the pipeline works, and says nothing about large models.", "provenance"))
    return cautions


def _splits(runs: Sequence[Result], stage: str) -> set[str]:
    """Which held-out items of an evaluation some runs were put to."""
    return {r.get("split", "") for run in runs for r in run.tables.get((stage, "summary"), ())}


def _unreadable(curves: Mapping[tuple[str, str], Curve]) -> list[Caution]:
    """One warning per score: where the model no longer answers the question."""
    by_score: dict[str, list[str]] = {}
    anchors, bases = dict[str, str](), dict[str, list[Readability]]()
    for curve in curves.values():
        points = curve.pooled or tuple(p for seed in curve.seeds.values() for p in seed)
        low = {p.alpha: p.read for p in points if not p.is_readable}
        if low:
            where = f"{curve.adapter} at alpha {', '.join(map(strength, low))} ({worst(low.values()).problem})"
            by_score.setdefault(curve.score.title, []).append(where)
            anchors[curve.score.title] = of(curve.score).place
            bases.setdefault(curve.score.title, []).append(_base(curve))
    return [
        Caution(
            f"Not to be read, {title}: {'; '.join(where)}, the worst there or at the base. The model is not answering "
            f"the question, and the score supports no conclusion: {remedy(worst(bases[title]))}.",
            anchors[title],
        )
        for title, where in by_score.items()
    ]


def _confounds(contents: Contents, evidence: Sequence[Evidence]) -> list[Caution]:
    cautions = []
    for e in evidence:
        if e.agreement is not None and e.agreement.kind in (AGREEMENT, MIXED, UNDECIDED) and e.point.is_readable:
            cautions.append(
                Caution(
                    f"{e.adapter} at alpha {strength(e.point.alpha)}: {e.agreement.line.removesuffix('.')}.", "checks"
                )
            )
    for run in contents.results:
        for row in run.tables.get((CONFOUNDS, "summary"), ()):
            for name in filter(None, row["strong"].split(", ")):
                alpha = strength(float(row["alpha"]))
                cautions.append(
                    Caution(f"{run.name} at alpha {alpha}: {row.get(f'verdict_{name}') or name}.", "checks")
                )
    return cautions


def _prompt(contents: Contents) -> list[Caution]:
    """Whether telling the model does more than any vector: the spans of `compare.csv` of the verdict's score."""
    spans: dict[str, list[float]] = {}
    score = headline(judged_by(contents))
    for row in contents.compared(part="span", score=score.key):
        if not row.get(FLAG):
            spans.setdefault(row["intervention"], []).append(float(row["shift"]))
    prompt, ours = (max(spans.get(name, []), key=abs, default=0.0) for name in ("prompt", WEIGHT))
    if not ours or abs(prompt) <= abs(ours):
        return []
    further, most = (shown(value, score.spec) for value in (prompt, ours))
    text = f"A system prompt moves {score.title} further (by {further} {score.unit}) "
    return [Caution(f"{text}than any vector does from −1u to +1u (at most {most}).", "checks")]


def _calibrations(contents: Contents) -> list[Caution]:
    """Runs whose strengths were solved for on questions that their vectors have, or may have, seen."""
    by_questions: dict[str, list[str]] = {}
    for run in contents.results:
        if run.calibration is not None and not run.calibration.held_out:
            by_questions.setdefault(run.calibration.questions, []).append(run.name)
    return [
        Caution(f"−1u and +1u of {', '.join(runs)} are solved for on {what}.", "claims")
        for what, runs in by_questions.items()
    ]


def _rounding(contents: Contents) -> list[Caution]:
    stages = {name for name, _ in (key for run in contents.results for key in run.tables)}
    configs = [run.stages.get(name, {}).get("config", {}) for run in contents.results for name in sorted(stages)]
    return [Caution(text, "shifts") for text in rounding_notes(str(c.get("dtype", "")) for c in configs)]


def _pairs(contents: Contents) -> list[Caution]:
    lines = contents.card.get("confounds", []) if contents.card else []
    return [Caution(f"In the pairs: {line}", "data") for line in lines if isinstance(line, str)]
