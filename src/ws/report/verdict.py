"""The verdict in one sentence, never stronger than the numbers, and the warnings that stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ws.analysis.compare_tables import NULLS
from ws.analysis.controls import empirical_p
from ws.eval.confounds import AGREEMENT, MIXED, UNDECIDED, AgreementVerdict, agreement_verdict
from ws.eval.context import rounding_notes
from ws.eval.readable import FLAG, LEVEL, NATS, worst
from ws.lm.models import BUNDLED
from ws.options.shared import WEIGHT
from ws.report.curves import Curve, Interval, Point, simultaneous
from ws.report.data import Contents, Result
from ws.report.scores import CLAIMS, CONFOUNDS
from ws.report.words import cost_text, interval_text, number, odds, p_text, strength

# From the weakest to the strongest: what a page says at its top. Those from `AGAINST` on need nulls that were trained.
NOTHING, NO_CONCLUSION, NO_EFFECT, UNKNOWN = "No verdict", "No conclusion", "No effect shown", "Cause not known"
NOT_ESTABLISHED, AGAINST, FIRST, SUPPORTED = (
    "Not established",
    "Against the prediction",
    "First indication",
    "Supported",
)


@dataclass(frozen=True)
class Verdict:
    """A heading of one of the kinds above, and the sentence with the numbers."""

    kind: str
    sentence: str


@dataclass(frozen=True)
class Evidence:
    """What is known of one adapter's shift on false claims.

    Attributes:
        adapter, n_seeds: whose.
        point: at the positive strength nearest to 1.
        interval: of that shift, wide enough to be named out of all adapters; see `ws.report.curves.simultaneous`.
        real: whether it beats random, label-shuffled and same-side vectors; None when one of them is missing.
        p_random: among random vectors, which is no evidence for a vector that was trained; None without draws.
        agreement: against the shift on true claims; None without at least two of either kind.
        strong: further confounds that `ws confounds` calls strong at that strength; None where it was not run.
    """

    adapter: str
    n_seeds: int
    point: Point
    interval: Interval
    real: bool | None
    p_random: float | None
    agreement: AgreementVerdict | None
    strong: tuple[str, ...] | None

    @property
    def is_sure(self) -> bool:
        """The interval excludes zero, p survives the correction for all rows of the page, and it is no tiny effect."""
        shift = self.point.shift
        return shift.excludes_zero and (self.point.p_holm or 0.0) < LEVEL and abs(shift.mean) >= NATS

    def is_expected(self, effect: int) -> bool:
        """Whether the shift has the sign that the behaviour file gives it."""
        return bool(np.sign(self.point.shift.mean) == effect)

    @property
    def is_agreement(self) -> bool:
        """Whether true claims move along."""
        return self.agreement is not None and self.agreement.kind in (AGREEMENT, MIXED)


def evidence_of(contents: Contents, curves: Mapping[tuple[str, str], Curve]) -> list[Evidence]:
    """One entry per adapter whose claims were evaluated at a positive strength."""
    candidates = []
    for adapter in contents.adapters:
        curve = curves.get(("false_claims", adapter))
        point = curve.nearest(1.0) if curve else None
        if curve is not None and point is not None:
            candidates.append((curve, point))
    found = []
    for curve, point in candidates:
        runs, interval = contents.of(curve.adapter), simultaneous(curve, point, len(candidates))
        true = curves.get(("true_claims", curve.adapter))
        agreement = _agreement(curve, true, point, contents) if true else None
        known = *_controls(contents, runs), agreement, _strong(runs, point.alpha)
        found.append(Evidence(curve.adapter, len(curve.seeds), point, interval, *known))
    return found


def _controls(contents: Contents, runs: Sequence[Result]) -> tuple[bool | None, float | None]:
    """From `compare.csv`, whose spans are held against all three nulls; else random vectors alone, from the runs."""
    if row := contents.against_nulls(runs[0].adapter):
        return row["real"], row["p_random"]
    found = [p for run in runs if (p := _random_p(run)) is not None]
    return None, max(found) if found else None


def _random_p(run: Result) -> float | None:
    """The p-value of a run's shift among its random vectors, at the positive strength nearest to 1."""
    table = run.tables.get((CLAIMS, "summary"))
    rows = [r for r in run.controls if r["score"] == "false_claims" and float(r["alpha"]) > 0]
    rows = [r for r in rows if table and r["eval_hash"] == table[0]["eval_hash"]]
    if not rows:
        return None
    alpha = min({float(r["alpha"]) for r in rows}, key=lambda a: abs(a - 1))
    by_kind = {
        kind: [float(r["shift"]) for r in rows if r["control"] == kind and float(r["alpha"]) == alpha]
        for kind in ("vector", "random")
    }
    if len(by_kind["vector"]) != 1 or not by_kind["random"]:
        return None
    return empirical_p(by_kind["vector"][0], np.array(by_kind["random"]))


def _agreement(false: Curve, true: Curve, point: Point, contents: Contents) -> AgreementVerdict | None:
    """The verdict of `ws.eval.confounds` on the shifts of the seeds' mean."""
    f, t = (_mean_shifts(curve, point.alpha) for curve in (false, true))
    other = true.at(point.alpha)
    if contents.effect is None or other is None or min(len(f), len(t)) < 2:
        return None
    read, zeros = worst([point.read, other.read]), np.zeros_like
    return agreement_verdict(
        zeros(f), f, zeros(t), t, contents.effect, least_mass=read.mass, behavior=contents.name, flag=read.flag
    )


def _mean_shifts(curve: Curve, alpha: float) -> np.ndarray:
    seeds = [of for of in curve.items.values() if alpha in of and 0.0 in of]
    ids = list(seeds[0][0.0]) if len(seeds) == len(curve.seeds) else []
    return np.array([np.mean([of[alpha][i] - of[0.0][i] for of in seeds]) for i in ids])


def _strong(runs: Sequence[Result], alpha: float) -> tuple[str, ...] | None:
    """Confounds but agreement that any seed's table calls strong."""
    rows = [r for run in runs for r in run.tables.get((CONFOUNDS, "summary"), ()) if float(r["alpha"]) == alpha]
    names = dict.fromkeys(name for r in rows for name in r["strong"].split(", ") if name)
    return tuple(name for name in names if name != "agreement") if rows else None


# ---- the sentence ---------------------------------------------------------------------------------------------------


def judge(contents: Contents, evidence: Sequence[Evidence]) -> Verdict:
    """The verdict on agreement with held-out false claims, for which the behaviour file predicts a sign."""
    if not evidence:
        why = f"no vector of {contents.name} has been put to the held-out claims at a positive strength yet"
        return Verdict(NOTHING, f"{why}, so nothing is known of what it does.")
    readable, sure, expected = _classes(contents, evidence)
    named = _named(contents, evidence)
    if named is None:
        best = max(evidence, key=lambda e: e.point.mass or 0.0).point.read
        return Verdict(
            NO_CONCLUSION,
            f"the model is not answering the question under steering ({best.problem} at best), so its scores mean "
            "nothing.",
        )
    said = f"{_named_text(named, len(evidence))}{_rest(evidence, readable)}"
    if contents.effect is None:
        text = f"the behaviour file of {contents.name} is not at hand, so the direction that it predicts is unknown; "
        return Verdict(NO_CONCLUSION, f"{text}{said}.")
    count = f"in {len(sure)} of {_families(evidence)}"
    if not sure:
        text = f"agreement with held-out false claims moves beyond chance by {NATS} nats or more {count}"
        return Verdict(NO_EFFECT, f"{text}; {said}.")
    doubts, caveats, strengths = _weigh(contents, named)
    if named.real is None:
        kind, head = UNKNOWN, f"agreement with held-out false claims moves beyond chance {count} ({_seeds(sure)})"
        caveats = [_no_nulls(contents, named), *caveats]
    elif not expected:
        kind, head = AGAINST, f"agreement with held-out false claims moves beyond chance {count}, the wrong way"
    else:
        opposed = [e for e in sure if e not in expected]
        kind, head = _supported(contents, evidence, expected, opposed)
        caveats += ["most adapters do not show it"] if 2 * len(expected) < len(readable) else []
        kind = FIRST if caveats or opposed else kind
    tail = "".join(f"; {part}" for part in [*doubts, *caveats, *strengths])
    return Verdict(NOT_ESTABLISHED if doubts else kind, f"{head}; {said}{tail}.")


def _classes(contents: Contents, evidence: Sequence[Evidence]) -> tuple[list[Evidence], list[Evidence], list[Evidence]]:
    """The shifts whose answers are readable, of those the sure ones, and of those the ones that were predicted."""
    readable = [e for e in evidence if e.point.is_readable]
    sure = [e for e in readable if e.is_sure]
    effect = contents.effect
    return readable, sure, [e for e in sure if effect is not None and e.is_expected(effect)]


def _supported(
    contents: Contents, evidence: Sequence[Evidence], expected: Sequence[Evidence], opposed: Sequence[Evidence]
) -> tuple[str, str]:
    """The kind and the head of a verdict on a vector that was held against trained nulls and moves as predicted."""
    way = "raises" if contents.effect == 1 else "lowers"
    proven = sum(bool(e.real) for e in expected)
    beat = "" if proven == len(expected) else f", {proven} of which beat{'s' if proven == 1 else ''} trained nulls"
    against = f"; the other way: {_names(opposed)}" if opposed else ""
    return SUPPORTED, (
        f"adding the {contents.name} vector {way} agreement with held-out false claims, as the behaviour predicts, in "
        f"{len(expected)} of {_families(evidence)} ({_seeds(expected)}){beat}{against}"
    )


def _no_nulls(contents: Contents, named: Evidence) -> str:
    """Why nothing is known of the behaviour, and what would tell."""
    commands = [f"`ws replicate --adapter {named.adapter} --control {null}`" for null in NULLS]
    return (
        f"whether that is {contents.name} is not known: vectors trained on anything move such a score, and no trained "
        f"nulls stand beside this one ({_and(commands)}, then `ws compare`)"
    )


def _weigh(contents: Contents, named: Evidence) -> tuple[list[str], list[str], list[str]]:
    """What speaks against the shift that is named, what is not known of it, and what speaks for it."""
    doubts, caveats, strengths = [], [], []
    if named.real is False:
        doubts.append(f"it does NOT beat its controls (random{_p_text(named.p_random)}, label-shuffled, same-side)")
    elif named.real:
        strengths.append("it beats label-shuffled and same-side vectors of the same size, and random ones")
    elif named.p_random is not None and named.p_random > LEVEL:
        doubts.append(f"random vectors of the same size do as much{_p_text(named.p_random)}")
    elif named.p_random is not None:
        strengths.append(f"that it beats random vectors{_p_text(named.p_random)} is no evidence of the behaviour")
    if named.is_agreement and named.agreement is not None:
        partly = "partly " if named.agreement.kind == MIXED else ""
        doubts.append(f"true claims move along with false ones, so this is {partly}agreement, not {contents.name}")
    elif named.agreement is None or named.agreement.kind == UNDECIDED:
        caveats.append("true claims are too few to tell it from mere agreement")
    else:
        strengths.append("true claims do not move along, so it is not mere agreement")
    if named.strong:
        caveats.append(f"ws confounds finds a strong confound besides: {_and(named.strong)}")
    if "dev" in _splits(contents.of(named.adapter)):
        caveats.append("its claims are of the split dev, on which settings may have been chosen")
    if named.n_seeds == 1:
        caveats.append(
            "it rests on one seed, and another may differ much: of three trainings alike one beats the two others in a "
            "third of cases"
        )
    return doubts, caveats, strengths


def _farthest(evidence: Sequence[Evidence]) -> Evidence:
    """The shift whose interval stays farthest from zero."""
    return max(evidence, key=lambda e: e.interval.low if e.interval.mean > 0 else -e.interval.high)


def _named_text(e: Evidence, among: int) -> str:
    corrected = "" if e.point.p_holm is None else f", Holm p {p_text(e.point.p_holm)}"
    wide = f", an interval that holds for all {among} at once" if among > 1 else ""
    return (
        f"farthest from zero is {e.adapter} at alpha {strength(e.point.alpha)}, {interval_text(e.interval)} nats "
        f"over {e.point.n} claims{wide}{corrected}"
    )


def _families(evidence: Sequence[Evidence]) -> str:
    n = len(evidence)
    return f"{n} adapter{'' if n == 1 else 's'}"


def _seeds(evidence: Sequence[Evidence]) -> str:
    counts = sorted({e.n_seeds for e in evidence})
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds each"
    return "one seed" if counts[0] == 1 else f"{counts[0]} seeds each"


def _rest(evidence: Sequence[Evidence], readable: Sequence[Evidence]) -> str:
    """The adapters that do not count because their answers broke."""
    broken = [e for e in evidence if e not in readable]
    return f"; not counted, because the question is no longer answered there: {_names(broken)}" if broken else ""


def _names(evidence: Sequence[Evidence]) -> str:
    return _and([e.adapter for e in evidence])


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _p_text(p: float | None) -> str:
    return "" if p is None else f" (p {p_text(p)})"


def _named(contents: Contents, evidence: Sequence[Evidence]) -> Evidence | None:
    """The shift that the verdict names, if it names one: of those that beat trained nulls where there are such."""
    readable, sure, expected = _classes(contents, evidence)
    chosen = [e for e in expected if e.real] or expected or sure or readable
    return _farthest(chosen) if chosen else None


def best_adapter(contents: Contents, evidence: Sequence[Evidence]) -> str | None:
    """The adapter that the verdict names, if it names one."""
    found = _named(contents, evidence)
    return found.adapter if found else None


def plain_words(contents: Contents, evidence: Sequence[Evidence]) -> str:
    """The shift that the verdict names, in odds instead of nats, and what it costs; nothing without a shift to name.

    The odds are `exp` of a mean log ratio: geometric means over claims.
    """
    e = _named(contents, evidence)
    if e is None:
        return ""
    test, p = contents.behavior.claims if contents.behavior else None, e.point
    answers = f"{test.agree} rather than {test.disagree}" if test else "that it agrees rather than that it does not"
    base = p.level.mean - p.shift.mean
    wanted = {1: " The behaviour file expects higher odds.", -1: " The behaviour file expects lower odds."}
    return (
        f"In plain words: asked about a false claim, the base model answers {answers} with odds of {odds(base)}; with "
        f"the {e.adapter} vector at alpha {strength(p.alpha)} the odds are {odds(p.level.mean)} (geometric means over "
        f"{p.n} claims).{wanted.get(contents.effect or 0, '')} At that strength: {cost_text(p)}."
    )


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
    found = [*_unreadable(curves), *_one_seed(contents), *_confounds(contents, evidence), *_prompt(contents)]
    found += [*_pairs(contents), *_calibrations(contents), *_rounding(contents)]
    bases = dict.fromkeys((r.base, r.fingerprint) for r in contents.results)
    if len(bases) > 1:
        found.append(
            Caution(f"The runs are of {len(bases)} different bases, so they cannot be compared.", "provenance")
        )
    for curve in curves.values():
        if not curve.pooled:
            text = f"{curve.adapter}: seeds were asked different items about {curve.score.title} and are not pooled."
            found.append(Caution(text, curve.score.anchor))
    if any(r.base in BUNDLED for r in contents.results):
        text = "The bundled models have such behaviours built into their training data: what is measured on them shows "
        found.append(Caution(f"{text}that the pipeline works, and says nothing about large models.", "provenance"))
    if "dev" in _splits(contents.results):
        found.append(Caution("Some claims are of the split `dev`, which settings may have been chosen on.", "claims"))
    return found


def _splits(runs: Sequence[Result]) -> set[str | None]:
    """Which held-out claims some runs were put to."""
    return {r.get("split") for run in runs for r in run.tables.get((CLAIMS, "summary"), ())}


def _unreadable(curves: Mapping[tuple[str, str], Curve]) -> list[Caution]:
    """One warning per score: where the model no longer answers the question."""
    found: dict[str, list[str]] = {}
    anchors: dict[str, str] = {}
    for curve in curves.values():
        points = curve.pooled or tuple(p for seed in curve.seeds.values() for p in seed)
        low = [f"{strength(p.alpha)} ({p.read.problem})" for p in points if not p.is_readable]
        if low:
            found.setdefault(curve.score.title, []).append(f"{curve.adapter} at alpha {', '.join(low)}")
            anchors[curve.score.title] = curve.score.anchor
    return [
        Caution(
            f"Not to be read, {title}: {'; '.join(where)}, there or at the base. The model is not answering the "
            "question, and the score supports no conclusion.",
            anchors[title],
        )
        for title, where in found.items()
    ]


def _one_seed(contents: Contents) -> list[Caution]:
    single = [adapter for adapter in contents.adapters if len(contents.of(adapter)) == 1]
    if not single:
        return []
    text = f"One seed only: {', '.join(single)}. Trainings differ; intervals over items do not show by how much."
    return [Caution(text, "shifts")]


def _confounds(contents: Contents, evidence: Sequence[Evidence]) -> list[Caution]:
    found = []
    for e in evidence:
        if e.agreement is not None and e.agreement.kind in (AGREEMENT, MIXED, UNDECIDED):
            found.append(Caution(f"{e.adapter} at alpha {strength(e.point.alpha)}: {e.agreement.line}.", "checks"))
    for run in contents.results:
        for row in run.tables.get((CONFOUNDS, "summary"), ()):
            for name in filter(None, row["strong"].split(", ")):
                alpha = strength(float(row["alpha"]))
                found.append(Caution(f"{run.name} at alpha {alpha}: {row.get(f'verdict_{name}') or name}.", "checks"))
    return found


def _prompt(contents: Contents) -> list[Caution]:
    """Whether telling the model does more than any vector: the spans of `compare.csv` on false claims."""
    spans: dict[str, list[float]] = {}
    for row in contents.compare:
        if row["part"] == "span" and row["score"] == "false_claims" and not row.get(FLAG):
            spans.setdefault(row["intervention"], []).append(float(row["shift"]))
    told, ours = (max(spans.get(name, []), key=abs, default=0.0) for name in ("prompt", WEIGHT))
    if not ours or abs(told) <= abs(ours):
        return []
    text = f"A system prompt moves agreement with false claims further (by {number(told, 2, True)} nats) "
    return [Caution(f"{text}than any vector does from −1u to +1u (at most {number(ours, 2, True)}).", "checks")]


def _calibrations(contents: Contents) -> list[Caution]:
    """Runs whose strengths were solved for on questions that their vectors have, or may have, seen."""
    found: dict[str, list[str]] = {}
    for run in contents.results:
        if run.calibration is not None and not run.calibration.held_out:
            found.setdefault(run.calibration.questions, []).append(run.name)
    return [
        Caution(f"−1u and +1u of {', '.join(runs)} are solved for on {what}.", "claims") for what, runs in found.items()
    ]


def _rounding(contents: Contents) -> list[Caution]:
    stages = {name for name, _ in (key for run in contents.results for key in run.tables)}
    configs = [run.stages.get(name, {}).get("config", {}) for run in contents.results for name in sorted(stages)]
    return [Caution(text, "shifts") for text in rounding_notes(str(c.get("dtype", "")) for c in configs)]


def _pairs(contents: Contents) -> list[Caution]:
    lines = contents.card.get("confounds", []) if contents.card else []
    return [Caution(f"In the pairs: {line}", "data") for line in lines if isinstance(line, str)]


def missing_nulls(contents: Contents) -> list[str]:
    """The trained nulls that no adapter of the page has."""
    return [null for null in NULLS if not any(name.endswith(f"-{null}") for name in contents.nulls)]
