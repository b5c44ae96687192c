"""Open answers: what a vector does to free text, rated by judges.

The model answers held-out questions at every strength, and a judge (`ws.eval.judges`) rates every answer on two scales,
how much of the behaviour's trait it shows and how coherent it is. With a rating r from 1 to k,

    score = (r - 1) / (k - 1)          0 for none of the trait, 1 for all of it

and shifts are paired with the base, question by question. Where pairs are asked for, the judge also sees the answer
beside the base's own, in both orders,

    pairs = (v_1 + v_2) / 2            v = +1 where it takes the steered answer and -1 where it takes the base's

(of a local judge v is the difference of their probabilities), and the share of verdicts that flip with the order is
reported; an answer that steering leaves as it was counts 0 and is not asked about. Length, repetition and refusals are
counted without a judge, and the sentiment by TextBlob's lexicon for whoever asks for the judge `lexical`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors import Behavior
from ws.behaviors.answered import plain_question
from ws.behaviors.rubric import OPPOSITE, TRAIT, KnownAnswer, Rubric, with_incoherent
from ws.behaviors.tables import draw, draw_fact
from ws.errors import MOST, WsError
from ws.eval.capability import load_questions
from ws.eval.confounds import free_answers, questions_of
from ws.eval.context import EvalContext, open_context
from ws.eval.evaluation import SHIFT, ByAlpha, Evaluation, HeadlineScore, Rows, Scores
from ws.eval.judges import (
    KEY_NAME,
    LEXICAL,
    EndpointJudge,
    Judge,
    Trial,
    Verdict,
    open_judge,
    pair_prompt,
    rating_prompt,
    ratings,
    require_known,
    require_passed,
    try_judge,
)
from ws.eval.preference import held_out
from ws.eval.prompts import OWN, notes_on
from ws.eval.readable import FLAG, MARK, Readability, mass_text, notes, worst
from ws.lm.models import render_prompt
from ws.options.measure import AnswerOptions as AnswerOptions
from ws.stats import LOW_MASS, estimate_mean, estimate_text, rank_correlation

NAME, VERSION = "answers", 1
FLOOR = 0.05  # of the scale from 0 to 1; a smaller shift is called none
SCALES = ("trait", "coherence")
ORDERS = ("steered first", "base first")
# What is counted without a judge: the columns of a table, and of `free_answers`.
COUNTED = {"tokens": "tokens", "ended": "ended", "refusals": "refusal", "repetition": "repetition"}
COST = ("prompt_tokens", "completion_tokens", "seconds")


@dataclass(frozen=True)
class OpenQuestion:
    """One question to answer freely.

    Attributes:
        id: unique among those that are asked.
        text: the user's message.
        kind: what sort of question it is; empty where none is said.
    """

    id: str
    text: str
    kind: str = ""


# ---- items ----------------------------------------------------------------------------------------------------------


def questions_of_behavior(context: EvalContext, split: str) -> tuple[OpenQuestion, ...]:
    """The behaviour's held-out questions: of its preferences, or else those that its pairs leave out."""
    if not context.behavior.preferences:
        texts = questions_of(context, MOST)
        return tuple(OpenQuestion(f"q{n:04d}", text) for n, text in enumerate(texts, start=1))
    known = dict[str, OpenQuestion]()
    for p in held_out(context.behavior, split):
        known.setdefault(plain_question(p.question), OpenQuestion(p.id, p.question, p.kind))
    return tuple(known.values())


def known_answers(behavior: Behavior) -> tuple[KnownAnswer, ...]:
    """Answers of known kind: those of the rubric, else the pairs of the held-out split `dev`; with incoherent ones."""
    known = list(behavior.rubric.known)
    if not known:
        for p in behavior.held_out("dev"):
            known += [KnownAnswer(p.question, p.positive, TRAIT), KnownAnswer(p.question, p.negative, OPPOSITE)]
    return with_incoherent(known)


# ---- scores ---------------------------------------------------------------------------------------------------------


def evaluate_answers(
    model: PreTrainedModel,
    tok: Tokenizer,
    items: Sequence[OpenQuestion],
    judges: Sequence[Judge] = (),
    rubric: Rubric | None = None,
    base_answers: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    sample_seed: int = 0,
    with_sentiment: bool = False,
    batch_size: int | None = None,
) -> Scores:
    """Let the model, as it stands, answer the questions, and have the answers judged.

    Args:
        items: the questions.
        judges: one or two; the second's arrays end in `_2`.
        rubric: what they rate; needed with judges.
        base_answers: what every answer is compared with in both orders; None for no pairs.
        max_new_tokens: of an answer.
        temperature, sample_seed: see `ws.eval.confounds.free_answers`; greedy at 0.
        with_sentiment: also the lexicon's `sentiment`, from -1 to 1.
        batch_size: answers at a time; 32 unless given.

    Returns:
        `answer`, `tokens`, `ended`, `refusal` and `repetition`, all `[n]`. Of a judge `trait` and `coherence`, ratings
        from 0 to 1, in which 0.5 stands for a verdict that could not be read; and `pairs` `[n, 2]` from -1 to 1, of
        either order. For each of these `<name>_mass`, `<name>_reply`, `<name>_rating` (as it was given, -1 for none)
        and `<name>_cost` `[..., 3]`: tokens of prompt and reply, and seconds.

    Raises:
        WsError: nothing to ask, or a judge that cannot be asked.
    """
    if not items:
        raise WsError("There are no questions to answer.")
    texts = [q.text for q in items]
    scores = dict(free_answers(model, tok, texts, max_new_tokens, batch_size, temperature, sample_seed))
    answers = [str(a) for a in scores["answer"]]
    if with_sentiment:
        scores["sentiment"] = sentiments(answers)
    for number, judge in enumerate(judges):
        judged = judge_answers(judge, rubric or Rubric(), texts, answers, base_answers)
        scores |= {f"{name}{_suffix(number)}": values for name, values in judged.items()}
    return scores


def _suffix(number: int) -> str:
    """What the names of a judge's arrays and columns end in."""
    return f"_{number + 1}" if number else ""


def of_judge(scores: Scores, number: int) -> Scores:
    """The arrays of one judge by the names that `judge_answers` gives them."""
    suffix = _suffix(number)
    return {name.removesuffix(suffix): values for name, values in scores.items() if name.endswith(suffix)}


def judge_answers(
    judge: Judge,
    rubric: Rubric,
    questions: Sequence[str],
    answers: Sequence[str],
    base_answers: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """The arrays of one judge; see `evaluate_answers`. Both scales and orders are asked together."""
    both = list(zip(questions, answers, strict=True))
    asked = [rating_prompt(scale, *pair) for scale in (rubric, rubric.coherence) for pair in both]
    pairs, n = list(zip(questions, answers, base_answers or answers, strict=True)), len(both)
    moved = [i for i, (_, now, base) in enumerate(pairs) if now != base]
    asked += [pair_prompt(rubric, q, now, base) for q, now, base in (pairs[i] for i in moved)]
    asked += [pair_prompt(rubric, q, base, now) for q, now, base in (pairs[i] for i in moved)]
    verdicts = judge.verdicts(asked)
    arrays = dict[str, np.ndarray]()
    for name, part in zip(SCALES, (verdicts[:n], verdicts[n : 2 * n]), strict=True):
        arrays |= {name: ratings(part, rubric.points), **_arrays(name, part)}
    if base_answers is None:
        return arrays
    same = Verdict(reply="", rating=1.5, mass=1.0, prompt_tokens=0, completion_tokens=0, seconds=0.0)
    orders = [dict(zip(moved, part, strict=True)) for part in _halves(verdicts[2 * n :])]
    flat = [orders[order].get(i, same) for i in range(n) for order in (0, 1)]
    # The number of the answer that has more: 1 is the steered one in the first order, 2 in the second.
    values = 2 * ratings(flat, 2).reshape(n, 2) - 1
    shaped = {name: v.reshape(n, 2, *v.shape[1:]) for name, v in _arrays("pairs", flat).items()}
    return arrays | {"pairs": values * np.array([-1.0, 1.0]), **shaped}


def _halves(verdicts: Sequence[Verdict]) -> tuple[Sequence[Verdict], Sequence[Verdict]]:
    return verdicts[: len(verdicts) // 2], verdicts[len(verdicts) // 2 :]


def _arrays(name: str, verdicts: Sequence[Verdict]) -> dict[str, np.ndarray]:
    return {
        f"{name}_mass": np.array([v.mass for v in verdicts]),
        f"{name}_reply": np.array([v.reply for v in verdicts]),
        f"{name}_rating": np.array([-1.0 if v.rating is None else v.rating for v in verdicts]),
        f"{name}_cost": np.array([[float(getattr(v, part)) for part in COST] for v in verdicts]),
    }


def sentiments(texts: Sequence[str]) -> Float[np.ndarray, "n"]:
    """The polarity of texts from -1 to 1, by the lexicon of TextBlob, which comes inside the package.

    Raises:
        WsError: the package is not installed.
    """
    if find_spec("textblob") is None:
        raise WsError(
            "The judge lexical needs the package textblob for the sentiment; install it with `uv sync --extra judge` "
            'or `pip install "weight-steering[judge]"`.'
        )
    from textblob import TextBlob

    return np.array([float(TextBlob(text).sentiment.polarity) for text in texts])


# ---- tables ---------------------------------------------------------------------------------------------------------


def pair_values(judged: Scores) -> Float[np.ndarray, "n"]:
    """The mean over both orders; above zero the steered answer shows more of the trait."""
    return judged["pairs"].mean(axis=1)


def flips(judged: Scores) -> tuple[int, int]:
    """How many verdicts on pairs change sides with the order, and of how many; where both orders could be read."""
    values = judged["pairs"]
    sided = (judged["pairs_rating"] >= 0).all(axis=1) & (values != 0).all(axis=1)
    return int((np.sign(values[sided, 0]) != np.sign(values[sided, 1])).sum()), int(sided.sum())


def per_question_row(question: OpenQuestion, scores: Scores, i: int, n_judges: int) -> dict[str, Any]:
    """One row of `answers_per_question.csv` without its first columns."""
    row: dict[str, Any] = {"question_id": question.id, "question": question.text, "kind": question.kind}
    row |= {name: scores[array][i].item() for name, array in COUNTED.items()}
    row |= {"sentiment": float(scores["sentiment"][i])} if "sentiment" in scores else {}
    for number in range(n_judges):
        judged = of_judge(scores, number)
        mine = {"score": judged["trait"][i], "pmass": judged["trait_mass"][i]}
        mine |= {"coherence": judged["coherence"][i], "coherence_pmass": judged["coherence_mass"][i]}
        mine |= {"pairs": pair_values(judged)[i]} if "pairs" in judged else {}
        row |= {f"{name}{_suffix(number)}": float(value) for name, value in mine.items()}
    return row | {"answer": str(scores["answer"][i])}


def verdict_rows(questions: Sequence[OpenQuestion], scores: Scores, judges: Sequence[str]) -> Rows:
    """Rows of `answers_verdicts.csv` without their first columns: all that judges said, and what it took."""
    rows = Rows()
    for number, judge in enumerate(judges):
        judged = of_judge(scores, number)
        asked: list[tuple[str, str, tuple[int, ...]]] = [(name, name, ()) for name in SCALES]
        asked += [(f"pairs, {order}", "pairs", (k,)) for k, order in enumerate(ORDERS) if "pairs" in judged]
        for what, array, place in asked:
            for i, question in enumerate(questions):
                at = (i, *place)
                rating, reply = float(judged[f"{array}_rating"][at]), str(judged[f"{array}_reply"][at])
                cost = dict(zip(COST, judged[f"{array}_cost"][at].tolist(), strict=True))
                if cost["seconds"] == 0:  # it was not asked, because both answers are the same
                    continue
                row: dict[str, Any] = {"judge": judge, "asked": what, "question_id": question.id, "reply": reply}
                row |= {"rating": rating if rating >= 0 else None, "pmass": float(judged[f"{array}_mass"][at])}
                rows.append(row | cost)
    return rows


def _estimates(name: str, values: np.ndarray, base: np.ndarray, n_boot: int, suffix: str = "") -> dict[str, Any]:
    level, shift = estimate_mean(values, n_boot), estimate_mean(values - base, n_boot)
    moved = shift.columns(f"{name}_shift{suffix}", "ci_lo", "ci_hi", "p")
    return level.columns(f"{name}{suffix}", "ci_lo", "ci_hi") | moved


def judged_columns(scores: Scores, base: Scores, number: int, n_boot: int) -> dict[str, Any]:
    """The columns of one judge's scores, and of their shifts against the base, paired question by question."""
    judged, before, plain = of_judge(scores, number), of_judge(base, number), dict[str, Any]()
    row, suffix = dict[str, Any](), _suffix(number)
    for scale, name in (("trait", "pmass"), ("coherence", "coherence_pmass")):
        masses = judged[f"{scale}_mass"]
        row |= _estimates(scale, judged[scale], before[scale], n_boot, suffix)
        plain |= {f"mean_{name}": float(masses.mean()), f"n_low_{name}": int((masses < LOW_MASS).sum())}
        plain |= {f"n_unreadable_{scale}": int((judged[f"{scale}_rating"] < 0).sum())}
    if "pairs" in judged:
        row |= estimate_mean(pair_values(judged), n_boot).columns(f"pairs{suffix}", "ci_lo", "ci_hi", "p")
        n_flipped, n_sided = flips(judged)
        shown = judged["pairs_cost"][..., -1] > 0  # not where the answers are the same
        plain |= {"n_pairs": int(shown[:, 0].sum()), "n_sided": n_sided}
        plain |= {"flips": n_flipped / n_sided if n_sided else None}
        plain |= {"pairs_pmass": float(judged["pairs_mass"][shown].mean()) if shown.any() else None}
    costs = np.concatenate([judged[f"{n}_cost"].reshape(-1, len(COST)) for n in (*SCALES, "pairs") if n in judged])
    costs = costs[costs[:, -1] > 0]
    plain |= {"requests": len(costs), **dict(zip(COST, costs.sum(axis=0).tolist(), strict=True))}
    first: dict[str, str] = {}
    if not number:  # the first judge's trait is what the table is about
        first = {"trait": "mean_score", "trait_ci_lo": "ci_lo", "trait_ci_hi": "ci_hi"}
        first |= {f"trait_{name}": name for name in (*SHIFT, "shift_p")}
    row |= {f"{name}{suffix}": value for name, value in plain.items()}
    return {first.get(name, name): value for name, value in row.items()}


def summary_row(scores: Scores, base: Scores, n_judges: int, n_boot: int) -> dict[str, Any]:
    """One row of `answers_summary.csv` without its first columns."""
    row: dict[str, Any] = {}
    for number in range(n_judges):
        row |= judged_columns(scores, base, number, n_boot)
    for scale in SCALES if n_judges > 1 else ():
        agreed = rank_correlation(scores[scale], scores[f"{scale}_2"])
        names = [f"agreement_{scale}", *(f"agreement_{scale}_{end}" for end in ("ci_lo", "ci_hi"))]
        row |= agreed.columns(names[0], "ci_lo", "ci_hi") if agreed else dict.fromkeys(names)
    for name, array in (COUNTED | ({"sentiment": "sentiment"} if "sentiment" in scores else {})).items():
        row |= _estimates(name, scores[array], base[array], n_boot)
    return row | {"n": len(scores["tokens"])}


def trial_rows(trials: Sequence[Trial], used_anyway: bool) -> Rows:
    """Rows of `answers_judges.csv` without their first columns."""
    return [
        {
            "judge": t.judge,
            "scale": t.scale,
            **t.area.columns("auc", "ci_lo", "ci_hi", "p"),
            "accuracy": t.accuracy,
            "mean_pmass": t.mass,
            "n": t.n,
            "passed": t.passed,
            "used_anyway": used_anyway and not t.passed,
        }
        for t in trials
    ]


# ---- what a person sees ---------------------------------------------------------------------------------------------


def render(summary: Sequence[Mapping[str, str]], readings: Sequence[Readability]) -> str:
    """The rows of the summary table, read from its file, as a table for people.

    Args:
        summary: its rows, the base's among them.
        readings: how well the judge's verdicts could be read, the worse of both scales, row by row; empty where nobody
            judged.
    """
    (base,) = (i for i, r in enumerate(summary) if float(r["alpha"]) == 0)
    problems = [worst([x, readings[base]]).problem for x in readings]
    doubts = list(problems)
    columns = {"tokens": "+.1f", "refusals": "+.2f", "repetition": "+.2f"}
    columns |= {"sentiment": "+.2f"} if "sentiment" in summary[0] else {}
    header, rows = ["alpha"], [[f"{float(r['alpha']):+g}"] for r in summary]
    if readings:
        header += ["trait, 0 to 1", "shift", "coherence", "shift", "answer mass"]
        for row, r, x, problem in zip(rows, summary, readings, problems, strict=True):
            row += [estimate_text(r, "mean_score", ".2f", ends=""), estimate_text(r, "shift")]
            row += [estimate_text(r, "coherence", ".2f"), estimate_text(r, "coherence_shift")]
            low = "n_low_pmass" if float(r["mean_pmass"]) == x.mass else "n_low_coherence_pmass"
            row += [mass_text(x.mass, int(r[low]), problem)]
        if "pairs" in summary[0]:
            header += ["against the base", "flips"]
            for row, r in zip(rows, summary, strict=True):
                doubts.append(_problem(r, "pairs_pmass"))
                mark = f" {MARK}" if doubts[-1] else ""
                row += [estimate_text(r, "pairs") + mark, f"{float(r['flips']):.0%}" if r["flips"] else ""]
        if "agreement_trait" in summary[0]:
            header += ["trait, judge 2", "agreement"]
            for row, r in zip(rows, summary, strict=True):
                doubts.append(_problem(r, "mean_pmass_2", "mean_coherence_pmass_2"))
                cells = estimate_text(r, "trait_2", ".2f"), estimate_text(r, "agreement_trait")
                row += [f"{cell} {MARK}" if cell and doubts[-1] else cell for cell in cells]
    header += [f"{name} shift" for name in columns]
    for row, r in zip(rows, summary, strict=True):
        row += [estimate_text(r, f"{name}_shift", spec) for name, spec in columns.items()]
    return "\n\n".join([tabulate(rows, header, disable_numparse=True), *notes(doubts), *_warnings(summary)])


def _problem(row: Mapping[str, str], *masses: str) -> str:
    """Why verdicts with these mean masses support no conclusion, as words; empty where they may or there are none."""
    return Readability(min((float(row[name]) for name in masses if row[name]), default=None)).problem


def _warnings(summary: Sequence[Mapping[str, str]]) -> list[str]:
    """What a reader must know of coherence, of the judges and of what they took, as sentences."""
    last, said = summary[-1], list[str]()
    broken = [
        f"{float(r['alpha']):+g} ({estimate_text(r, 'coherence_shift')})"
        for r in summary
        if "coherence_shift" in r and float(r["coherence_shift_ci_hi"]) < 0 and float(r["coherence_shift"]) <= -FLOOR
    ]
    if broken:
        said.append(f"Coherence falls at alpha {', '.join(broken)}: read the trait there with care.")
    for s in ("", "_2"):
        if last.get(f"judged_by{s}"):
            total = {name: sum(float(r[f"{name}{s}"]) for r in summary) for name in ("requests", *COST)}
            said.append(
                f"Judge {last[f'judged_by{s}']}, on answers of known kind: {last[f'judge_trial{s}']}. "
                f"Its verdicts took {total['requests']:.0f} requests, {total['prompt_tokens']:.0f} tokens of prompts, "
                f"{total['completion_tokens']:.0f} of replies, {total['seconds']:.0f} s."
            )
    return [*said, f"{last['n']} questions ({last['dataset']}).", *notes_on(last)]


# ---- the evaluation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answers(Evaluation):
    """Free answers to held-out questions, rated by judges.

    Attributes:
        items: the questions.
        judges: who rates; none where only a lexicon is asked.
        rubric: what is rated.
        trials: what the judges made of answers of known kind.
        anyway: they were used whatever came of that.
        base_answers: what every answer is compared with, None for no pairs.
        with_sentiment: also the lexicon's sentiment.
        max_new_tokens, temperature, sample_seed: of the answers.
    """

    name = NAME
    version = VERSION
    options = AnswerOptions
    scores = (
        HeadlineScore(
            "judged_trait",
            "trait of open answers, judged",
            "of the scale",
            label="open answers, judged by {judged_by}",
            meaning="how much of the behaviour a judge finds in free answers, from 0 to 1",
            value="score",
            floor=FLOOR,
        ),
        HeadlineScore(
            "judged_coherence",
            "coherence of open answers, judged",
            "of the scale",
            label=None,
            level="coherence",
            level_ci="coherence_",
            shift="coherence_shift",
            mass="mean_coherence_pmass",
            low="n_low_coherence_pmass",
            value="coherence",
            floor=FLOOR,
        ),
    )
    columns = (*("mean_score", "ci_lo", "ci_hi", *SHIFT, "mean_pmass", "n"), "coherence", "coherence_shift")
    item_table, item = "per_question", "question_id"

    items: Sequence[OpenQuestion]
    judges: Sequence[Judge] = ()
    rubric: Rubric
    trials: Sequence[Trial] = ()
    anyway: bool = False
    base_answers: Sequence[str] | None = None
    with_sentiment: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    sample_seed: int = 0

    @classmethod
    def of_run(cls, context: EvalContext) -> Answers:
        """The questions and the judges that a run's options name; made before anything steers the context's model.

        Raises:
            WsError: a judge that fails on answers of known kind, unless it is to be used anyway.
        """
        options, behavior = context.options_as(AnswerOptions), context.behavior
        source = options.dataset
        texts = dict.fromkeys(load_questions(source)) if source else ()
        own = tuple(OpenQuestion(f"r{n:05d}", text) for n, text in enumerate(texts, start=1))
        whole = own or questions_of_behavior(context, options.split)
        items = draw(whole, options.limit, lambda q: q.kind)
        judges = judges_of(context, options)
        trials = tried(judges, behavior, options.anyway)
        facts: dict[str, Any] = {"dataset": source or f"{behavior.name} questions", "n_think": 0, "words": OWN}
        facts |= {"split": options.split} if behavior.preferences and not source else {}
        facts |= {"drawn": draw_fact(items, whole), "max_new_tokens": options.max_new_tokens}
        facts |= {"temperature": options.temperature, "sample_seed": options.sample_seed}
        for number, judge in enumerate(judges):
            mine = [str(t) + " (used anyway)" * (not t.passed) for t in trials if t.judge == judge.name]
            suffix = _suffix(number)
            facts |= {f"judged_by{suffix}": judge.public_name, f"judge_trial{suffix}": "; ".join(mine)}
        made = cls(
            items=items,
            judges=judges,
            rubric=behavior.rubric,
            trials=trials,
            anyway=options.anyway,
            with_sentiment=LEXICAL in options.judges,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            sample_seed=options.sample_seed,
            batch_size=options.batch_size,
            facts=facts,
        )
        if not (options.pairwise and judges):
            return made
        return replace(made, base_answers=[str(a) for a in context.base_scores(made)["answer"]])

    @property
    def table_name(self) -> str:
        """Without a judge there is no trait to rate, and the tables are others."""
        return NAME if self.judges else f"{NAME}_{LEXICAL}"

    @property
    def doubt(self) -> str:
        """Why the first judge's ratings support no conclusion, as words; empty where they may."""
        failed = self.judges and not all(t.passed for t in self.trials if t.judge == self.judges[0].name)
        return "the judge does not tell answers of known kind apart" if failed else ""

    @property
    def content(self) -> Any:
        """The questions, how they are answered, by whom the answers are judged, and in which words."""
        how = [self.max_new_tokens, self.temperature, self.sample_seed, self.with_sentiment, self.base_answers is None]
        shown = [rating_prompt(r, "", "").prompt for r in (self.rubric, self.rubric.coherence)]
        return [[asdict(q) for q in self.items], how, [j.identity for j in self.judges], shown if self.judges else []]

    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """See `evaluate_answers`."""
        return evaluate_answers(
            model,
            tok,
            self.items,
            self.judges,
            self.rubric,
            self.base_answers,
            self.max_new_tokens,
            self.temperature,
            self.sample_seed,
            self.with_sentiment,
            self.batch_size,
        )

    def headlines(self, scores: Scores) -> dict[str, np.ndarray]:
        """`judged_trait` and `judged_coherence` by the first judge, one number per question from 0 to 1."""
        if not self.judges:
            return {}
        return {"judged_trait": scores["trait"], "judged_coherence": scores["coherence"]}

    def readability(self, scores: Scores) -> dict[str, Readability]:
        """The judge's mean answer mass on either scale, or the share of its replies that could be read."""
        masses = {f"judged_{name}": scores[f"{name}_mass"].mean() for name in SCALES if self.judges}
        return {key: Readability(float(mass), flag=self.doubt) for key, mass in masses.items()}

    def tables(self, key: Mapping[str, Any], scores: ByAlpha, n_bootstrap: int) -> dict[str, Rows]:
        """The rows of all tables; those of verdicts and judges only where somebody judges."""
        base, n_judges, rows = scores[0.0], len(self.judges), {name: Rows() for name in ("per_question", "verdicts")}
        rows |= {
            "summary": Rows(),
            "judges": [{**key, "alpha": 0.0, **r} for r in trial_rows(self.trials, self.anyway)],
        }
        for alpha, s in scores.items():
            start = {**key, "alpha": alpha}
            rows["per_question"] += [{**start, **per_question_row(q, s, i, n_judges)} for i, q in enumerate(self.items)]
            said = verdict_rows(self.items, s, [j.name for j in self.judges])
            rows["verdicts"] += [{**start, **row} for row in said]
            row = summary_row(s, base, n_judges, n_bootstrap) | {FLAG: self.doubt or None}
            rows["summary"].append({**start, **row})
        return {name: table for name, table in rows.items() if table}

    def render(self, summary: Sequence[Mapping[str, str]], folder: Path) -> str:
        """The rows of the summary table as a table for people."""
        judged = "mean_score" in summary[0]
        readings = [worst(score.readability(r) for score in self.scores) for r in summary] if judged else []
        return render(summary, readings)

    def example(self, tok: Tokenizer, scores: ByAlpha) -> str:
        """One question with its answer and its ratings at every strength, to read by eye."""
        lines = [f"Worked example (question {self.items[0].id}):", render_prompt(tok, self.items[0].text), ""]
        for alpha, s in sorted(scores.items()):
            rated = f"trait {s['trait'][0]:.2f}, coherence {s['coherence'][0]:.2f}: " if self.judges else ""
            lines.append(f"  alpha {alpha:+g}  {rated}{' '.join(str(s['answer'][0]).split())[:200]}")
        return "\n".join(lines)


def judges_of(context: EvalContext, options: AnswerOptions) -> tuple[Judge, ...]:
    """The judges that options name, the lexicon aside; each endpoint with a key of its own."""
    made, steered = list[Judge](), (context.model, context.tok)
    folder = options.out / "judges"
    for name in options.judges:
        if name != LEXICAL:
            n_endpoints = sum(isinstance(judge, EndpointJudge) for judge in made)
            key_name = f"{KEY_NAME}{_suffix(n_endpoints)}"
            made.append(open_judge(name, folder, options.device, steered, options.judge_max_tokens, key_name))
    if len({judge.name for judge in made}) < len(made):
        raise WsError(f"--judges names the same judge twice: {' '.join(options.judges)}.")
    return tuple(made)


def tried(judges: Sequence[Judge], behavior: Behavior, anyway: bool) -> tuple[Trial, ...]:
    """What judges make of answers of known kind; `WsError` for one that fails, unless it is used anyway."""
    if not judges:
        return ()
    known, trials = known_answers(behavior), list[Trial]()
    require_known(known, f"The behaviour {behavior.name}")
    for judge in judges:
        mine = try_judge(judge, behavior.rubric, known)
        if not anyway:
            require_passed(mine)
        trials += mine
    return tuple(trials)


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: AnswerOptions) -> None:
    """The command `python -m ws.eval.answers`."""
    context = open_context(options)
    console.show(context.carry_out(Answers.of_run(context)))


if __name__ == "__main__":
    console.run(main, AnswerOptions, "python -m ws.eval.answers")
