"""What stands in the parts of a page: their figures, their samples, and the words that say how to read them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ws.behaviors import Behavior
from ws.eval.evaluation import Evaluation
from ws.eval.preference import Preferences
from ws.eval.readable import FLAG
from ws.options.shared import WEIGHT
from ws.report.curves import Curve, item_hash, nearest
from ws.report.data import Contents, Norms, Result, Row
from ws.report.figures import Doses, Figure, Shift, norm_figure, profile_figure
from ws.report.scores import CLAIMS, CONFOUNDS, in_own_words, of
from ws.report.tables import Table, norms_table
from ws.report.verdict import Evidence
from ws.report.words import Question, counted, odds, shown, side_by_side, strength

# By the part of the page: what a bundled evaluation is called, and how to read its scores; others have a docstring.
_WORDS = {
    "claims": (
        "Held-out claims",
        "Does the model agree with claims that it was not trained on? The score is log P(agree) less log "
        "P(disagree), in nats: above zero it agrees. A vector that moves false and true claims alike is one of "
        "agreement. Dashed horizontal lines are of false claims: the base by itself, and the base under a system "
        "prompt with a persona of the behaviour (prompt +1) or of its opposite (prompt −1).",
    ),
    "dilemmas": (
        "AIRiskDilemmas",
        "Which of two actions does the model choose, after some thought? The score is log P of the truthful action "
        "less log P of the other, in nats; above zero the truthful one is chosen.",
    ),
    "acts": (
        "tiny-mfv (airisk)",
        "How wrong the model finds what another AI does, from −1 (acceptable) to 1 (wrong).",
    ),
    "preference": (
        "Preference",
        "Of two given answers to a held-out question, which does the model find likelier? The score is log p of the "
        "answer that shows the behaviour less log p of its opposite, each per token, in nats; above zero the "
        "behaviour's answer is preferred. No word is asked for, so there is no answer mass.",
    ),
    "statements": (
        "Statements of its traits",
        "Would the model say what somebody with the trait would say? The score is log P of the answer that matches "
        "the trait less log P of the other, in nats. Half of the statements are matched by Yes, so that mere "
        "agreement cancels; the tables of the evaluation have both halves apart.",
    ),
    "answers": (
        "Open answers",
        "How much of the behaviour does a judge find in free answers to held-out questions? Ratings of the trait and "
        "of coherence, from 0 to 1; where coherence falls, the trait says little. The mass is that of the judge: its "
        "probability of any rating, or the share of its replies that could be read.",
    ),
}
DOSES = (
    "Bands are 95 % intervals, thin lines single seeds. Below every curve stand the answer mass, which must stay above "
    "the dashed line at 0.9 for a score to count, and the KL divergence from the base that calibration measured (95th "
    "percentile over tokens; the dashed line is 1 nat). Vertical lines mark the calibrated strengths −1u and +1u. "
    "Hollow marks and shade: the model does not answer the question."
)
SHIFTS = (
    "Each row is one adapter at the strength measured nearest to alpha 1 or −1, against the base and item by item: the "
    "triangle is all seeds together with its 95 % interval, the dots below it are the seeds; where these cannot be "
    "pooled there is no triangle. p is Holm-corrected over every adapter and strength of a score; it is against the "
    "base alone and says nothing of the behaviour. Hollow marks and ! cannot be read, because the model was not "
    "answering the question there or at the base. Below it stand the answer mass and the KL divergence there, the "
    "worst of the seeds; ≈ where the KL was measured at strengths around it only. Alpha means something else for every "
    "family, so sizes do not rank families."
)
CHECKS = (
    "What chance, training by itself, or mere agreement would do. Controls are of the span from −1u to +1u of "
    "{score} where ws compare measured it: random vectors, one of pairs with exchanged sides (label-shuffled), and one "
    "between two trainings on the same side, all of the vector's size. The columns “over” say by how many {unit} it "
    "goes beyond them. To beat random vectors is no evidence of the behaviour: vectors trained on anything do."
)
FOUNDATIONS = (
    "Shift of logit(wrongness) of others' acts against the base, in nats, by moral foundation with its number of "
    "vignettes. Triangles up are the positive strength, down the negative one; 95 % intervals. Hollow marks cannot be "
    "read: the model was not answering about these vignettes, there or at the base."
)
PROFILE = (
    "The traits of a board that the vector moves most, and those that it is meant to move, in standard deviations of "
    "the base's scores. The shade is twice what random vectors of the same size do. Filled marks moved: beyond chance, "
    "beyond random vectors (Holm over the board) and beyond every trained null that can be read. Selectivity is how "
    "much further the targets move than all others; 1 is moving everything alike. Crosses and ! cannot be read and "
    "say nothing of how far a trait moved; traits that can be read nowhere are drawn only as targets. The whole board "
    "is in profile.csv."
)
NORMS = "Size of dW per module and decoder layer, the mean over seeds. The darkest cell is the largest of that adapter."
# The class of a colour, the mark and its meaning, where there are several.
LEGENDS = {
    "claims": (("s1", "\N{BLACK CIRCLE}", "false claims"), ("s2", "\N{BLACK SQUARE}", "true claims")),
    "foundations": (("s1", "\N{BLACK UP-POINTING TRIANGLE}", "vector added"), ("s2", "\u25bc", "vector subtracted")),
    "profile": (("s1", "\N{BLACK UP-POINTING TRIANGLE}", "vector added"), ("s2", "\u25bc", "vector subtracted")),
}
_SAMPLED = 4
# What a reader who is new to all this needs to know, in the order of the page.
GLOSSARY = {
    "vector": "What training on the behaviour changed in the weights of the model, less what training on its opposite "
    "did.",
    "strength, alpha": "How much of the vector is added: 0 is the base, the model as it was, and a negative strength "
    "subtracts it. One alpha is another amount for every vector.",
    "−1u, +1u": "Calibrated strengths: those at which the KL divergence from the base is as large as asked for (1 "
    "nat).",
    "adapter, seed": "The way of fine-tuning that a vector comes from, and one training with random numbers of its "
    "own.",
    "nat": "The unit of natural logarithms: one nat multiplies odds by 2.7, two by 7.4.",
    "shift": "A score at some strength less the score of the base, item by item.",
    "answer mass": "The probability of the two answers that are compared, together. Where it is under 0.9 the model "
    "says something else, and the score means nothing. The same holds where texts are asked in two frames that agree "
    "on fewer than half of them.",
    "KL": "How far the probabilities of the next token have moved from the base's, in nats: the 95th percentile over "
    "the tokens of the model's own answers.",
    "95 % interval": "Of a bootstrap: items, and where there are several seeds those too, are drawn anew again and "
    "again. They are moved apart before, the fewer the further, because nobody knows how far another would be.",
    "Holm p": "A p-value, corrected for how many shifts of a score there are on this page.",
}


# ---- figures --------------------------------------------------------------------------------------------------------


def dose_panels(contents: Contents, curves: Mapping[tuple[str, str], Curve], keys: Sequence[str]) -> list[Doses]:
    """What the dose-response figures of an evaluation show, one panel per adapter that has it."""
    panels = []
    for adapter in contents.adapters:
        here = [curves[key, adapter] for key in keys if (key, adapter) in curves]
        if here:
            runs = contents.of(adapter)
            panels.append(
                Doses(adapter, here, _marks(runs), [r.divergence for r in runs], _references(contents, here[0]))
            )
    return panels


def words_of(cls: type[Evaluation]) -> tuple[str, str]:
    """The heading of an evaluation's part, and how to read it."""
    about = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    return _WORDS.get(cls.place) or (cls.scores[0].title.capitalize(), about)


def caveats(contents: Contents, cls: type[Evaluation]) -> list[str]:
    """What a reader must know of the items and the words of an evaluation, from every run's table, each once."""
    tables = [rows for run in contents.results if (rows := run.tables.get((cls.stage, "summary")))]
    return list(dict.fromkeys(note for rows in tables for note in cls.about(rows[0])))


def _marks(runs: Sequence[Result]) -> dict[int, float]:
    known = [run.units for run in runs if run.units]
    return {sign: fmean(u[sign] for u in known) for sign in (-1, 1) if known and all(sign in u for u in known)}


def _references(contents: Contents, curve: Curve) -> dict[str, float]:
    """The base's level and those of a prompted base on the same items, where these can be read: from a table of the
    evaluation, of this adapter if it has them, or from `compare.csv`."""
    score, references = curve.score, dict[str, float]()
    references |= [("base", p.level.mean) for p in curve.shown if p.alpha == 0]
    stage, mine = of(score).stage, contents.of(curve.adapter)
    hashes = {item_hash(score, run) for run in mine if (stage, "summary") in run.tables}
    for run in sorted(contents.results, key=lambda run: run.adapter == curve.adapter):
        for r in score.rows(run.tables.get((stage, "prompt"), ())):
            if r["eval_hash"] in hashes and not score.readability(r).problem:
                references[f"prompt {strength(float(r['alpha']))}"] = float(r[score.level])
    if len(references) == 1:
        for unit in (-1, 1):
            for r in contents.compared(intervention="prompt", score=score.key, part=f"{unit:+d}u"):
                if r.get("eval_hash") in (None, *hashes) and not r.get(FLAG):
                    references[f"prompt {strength(unit)}"] = float(r["base"]) + float(r["shift"])
    return references


def shift_rows(contents: Contents, curves: Mapping[tuple[str, str], Curve], key: str) -> list[Shift]:
    """The rows of a forest plot."""
    rows = []
    for adapter in contents.adapters:
        curve = curves.get((key, adapter))
        for wanted in (1.0, -1.0) if curve else ():
            assert curve is not None
            if point := nearest(curve.shown, wanted):
                seed_points = [p for points in curve.seeds.values() for p in points if p.alpha == point.alpha]
                rows.append(Shift(adapter, point if curve.pooled else None, seed_points, point.alpha))
    return rows


def profile_figures(contents: Contents) -> list[Figure]:
    """Per board and adapter, what the vector moves."""
    drawn = [r for r in contents.profile if r["intervention"] == WEIGHT and r["z"] is not None]
    keys = dict.fromkeys((r["board"], r["adapter"]) for r in drawn)
    return [
        profile_figure(f"{adapter}, {board}", [r for r in drawn if (r["board"], r["adapter"]) == (board, adapter)])
        for board, adapter in keys
    ]


def norm_figures(contents: Contents) -> list[tuple[Figure, Table]]:
    """Per adapter: the heat map, and its numbers."""
    figures = []
    for adapter in contents.adapters:
        known = [r.norms for r in contents.of(adapter) if r.norms is not None]
        same = [n for n in known if n.unit == known[0].unit and n.cells.keys() == known[0].cells.keys()]
        if same and same[0].cells:
            cells = {cell: fmean(n.cells[cell] for n in same) for cell in same[0].cells}
            norms = Norms(same[0].unit, cells)
            least, most = min(cells.values()), max(cells.values())
            caption = f"{norms.unit}, {counted(len(same), 'seed')}; from {least:.3g} to {most:.3g}"
            figures.append((norm_figure(adapter, norms, caption), norms_table(adapter, norms)))
    return figures


# ---- samples --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """The questions of an adapter, seed by seed.

    Attributes:
        adapter: whose.
        changed, steered: how many of the steered answers differ from the base's, and how many there are.
        seeds: by the run's name.
    """

    adapter: str
    changed: int
    steered: int
    seeds: tuple[tuple[str, tuple[Question, ...]], ...]


def samples(contents: Contents) -> list[Sampled]:
    """What `samples.json` holds and a few of the free answers that `ws check confounds` keeps, answers side by side."""
    sampled = []
    for adapter in contents.adapters:
        seeds = tuple((run.name, questions) for run in contents.of(adapter) if (questions := _questions(run)))
        steered = [pieces for _, asked in seeds for q in asked for alpha, pieces in q.answers if alpha]
        changed = sum(any(piece.kind != "same" for piece in pieces) for pieces in steered)
        if seeds:
            sampled.append(Sampled(adapter, changed, len(steered), seeds))
    return sampled


@dataclass(frozen=True)
class Example:
    """A held-out item that both signs move, for the top of the page.

    Attributes:
        run: whose answers they are.
        question: with the answers at the strengths nearest to −1, 0 and 1.
        truth: what is right, as a sentence; empty where nobody has said.
        right: by strength, whether the answer is.
        words: what answers that are right are called, and those that are not.
        choice: how it was chosen, as a sentence.
    """

    run: str
    question: Question
    truth: str
    right: Mapping[float, bool]
    words: tuple[str, str]
    choice: str


def example(contents: Contents, curves: Mapping[tuple[str, str], Curve], e: Evidence | None) -> Example | None:
    """Of the items that both signs move apart the middle one, of those whose answer changes if there are such.

    Args:
        contents, curves: of the page.
        e: the shift at the top of the page; its first seed's items are looked at.
    """
    if e is None or contents.behavior is None or of(e.score).stage not in (CLAIMS, Preferences.stage):
        return None
    curve, least = curves[e.score.key, e.adapter], e.score.floor
    below, (seed, values) = nearest(curve.pooled, -1.0), next(iter(curve.items.items()))
    if below is None or not below.is_readable or not {below.alpha, 0.0, e.point.alpha} <= values.keys():
        return None
    run = next(r for r in contents.of(e.adapter) if r.seed == seed)
    # The number of a question with several pairs of answers is that of no single pair.
    known = (r for r in run.tables[of(e.score).stage, "items"] if int(r.get("n_pairs") or 1) == 1)
    rows = {r[of(e.score).item]: r for r in known}
    items = {i: {a: values[a][i] for a in (below.alpha, 0.0, e.point.alpha)} for i in values[0.0] if i in rows}
    moves = {i: sorted(v - of[0.0] for a, v in of.items() if a) for i, of in items.items()}
    moved = {i: min(-down, up) for i, (down, up) in moves.items() if min(-down, up) >= least}
    turned = [i for i in moved if len({v > 0 for v in items[i].values()}) > 1]
    ranked = sorted(turned or moved, key=lambda i: moved[i])
    if not ranked:
        return None
    item = ranked[len(ranked) // 2]
    kind = "whose answer changes" if turned else "that both signs move"
    choice = f"The middle one of the {len(ranked)} of {len(items)} items {kind}."
    put = _put_claim if of(e.score).stage == CLAIMS else _put_preference
    return put(contents.behavior, run.name, rows[item], items[item], choice)


def _put_claim(behavior: Behavior, run: str, row: Row, values: Mapping[float, float], choice: str) -> Example | None:
    """A claim, the likelier of the two answers, and its odds; None where it was asked in other words than these."""
    if not in_own_words(row):
        return None
    test, is_true = behavior.test, row["claim_is_true"] == "True"
    answers = {a: f"{test.agree if v > 0 else test.disagree}, {odds(abs(v))}" for a, v in values.items()}
    truth = f"The claim is {'true' if is_true else 'false'}: {test.agree if is_true else test.disagree} is right."
    right = {a: (v > 0) == is_true for a, v in values.items()}
    known = (truth, right) if test.about == "facts" else ("", {})
    return Example(run, _asked(test.question.format(claim=row["claim"]), answers), *known, ("right", "wrong"), choice)


def _put_preference(
    behavior: Behavior, run: str, row: Row, values: Mapping[float, float], choice: str
) -> Example | None:
    """A question, the likelier of its two given answers, and by how much."""
    pair = next((p for p in behavior.preferences if p.question == row.get("question")), None)
    if pair is None:
        return None
    texts = {a: pair.positive if v > 0 else pair.negative for a, v in values.items()}
    answers = {a: f"{texts[a]} (likelier by {shown(abs(v), '.2f')} nats per token)" for a, v in values.items()}
    truth, right = f"The answer of {behavior.name}: {pair.positive}", {a: v > 0 for a, v in values.items()}
    return Example(run, _asked(pair.question, answers), truth, right, (behavior.name, "its opposite"), choice)


def _asked(prompt: str, answers: Mapping[float, str]) -> Question:
    (question,) = side_by_side([{"question": prompt, "alpha": a, "answer": text} for a, text in answers.items()])
    return question


def _questions(run: Result) -> tuple[Question, ...]:
    answers = run.tables.get((CONFOUNDS, "answers"), ())
    return (*side_by_side(run.samples), *side_by_side(answers)[:_SAMPLED])
