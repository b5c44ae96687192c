"""Whether a base can do what a behaviour asks of it, before anything is sampled and before anything is trained.

A vector is no better than the answers it is trained on, and those are no better than the base: one that cannot tell a
true claim from a false one has no honesty to steer, and one that answers alike under both personas gives two equal
sides. `base_findings` asks the held-out items of `dev`; `persona_margins` reads answers:

    margin(answer) = mean_t [log p(a_t | its own persona, ...) - log p(a_t | the other persona, ...)]     nats per token

Answers that were sampled under their own persona have a positive margin in the mean whatever they say (it estimates the
divergence between the two personas' answers), so it is compared with a floor and not with zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.behaviors import Behavior, Claim
from ws.errors import WsError
from ws.lm.choice import ChoiceScores, score_choices
from ws.lm.likelihood import score_answers
from ws.lm.models import encode, encode_answer, render_prompt
from ws.stats import LOW_MASS, Estimate, estimate_mean, group_difference

# Nats per token that the answers of a side must gain from their own persona to count as acted.
MARGIN_FLOOR = 0.05
_PERSONAS = 2  # pairs of personas that the base is asked as


# ---- before anything is sampled -------------------------------------------------------------------------------------


def base_findings(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior) -> tuple[list[str], list[str]]:
    """Why no effect can be expected of this behaviour on this base, and what it can merely not be measured by.

    On the items of the split `dev`, or of `report` where there are none of `dev`: the base must tell true claims from
    false ones at an answer mass of `LOW_MASS`, or the positive answers from the negative ones of held-out questions. It
    is doubtful where only one of them fails. Under the positive personas it must do better than under the negative
    ones, in those of the items that the behaviour is measured by. A behaviour without items of a sort is not asked for
    it, and claims about values have no false side to be told apart.
    """
    asked = [_claims_problem(model, tok, behavior), _answers_problem(model, tok, behavior)]
    stated, known = [problem for problem in asked if problem], [problem for problem in asked if problem is not None]
    acting = _persona_problem(model, tok, behavior)
    return (acting, stated) if "" in known else ([*stated, *acting], [])


def base_problems(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior) -> list[str]:
    """Why no effect can be expected of this behaviour on this base; empty where nothing is against it."""
    return base_findings(model, tok, behavior)[0]


def _claims(behavior: Behavior, split: str) -> tuple[Claim, ...]:
    return () if behavior.claims is None else tuple(c for c in behavior.claims.claims if c.split == split)


def _ask(
    model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, claims: Sequence[Claim], system: str = ""
) -> ChoiceScores:
    test = behavior.test
    prompts = [
        render_prompt(tok, test.question.format(claim=c.text), system=system, opener=test.opener) for c in claims
    ]
    return score_choices(model, tok, prompts, (test.agree, test.disagree))


def _claims_problem(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior) -> str | None:
    """What is wrong with the base's answers to claims, empty where nothing is; None where that cannot be asked."""
    claims = _claims(behavior, "dev") or _claims(behavior, "report")
    if not claims:
        return None
    scores = _ask(model, tok, behavior, claims)
    if (mass := float(scores.mass.mean())) < LOW_MASS:
        words = f"{behavior.test.agree} or {behavior.test.disagree}"
        return (
            f"the base answers {words} to held-out claims with a mass of {mass:.2f} only ({LOW_MASS} is needed), so "
            "they cannot be read at any strength; ask in other words (another opener, other answers), or measure "
            "preference ([preferences])"
        )
    true = np.array([c.is_true for c in claims])
    if behavior.test.about == "values" or min(true.sum(), (~true).sum()) < 2:
        return ""
    gap = group_difference(scores.logratio[true], scores.logratio[~true])
    if gap.ci_lo > 0:
        return ""
    return f"the base does not tell true from false claims ({gap} nats between them, {len(claims)} claims)"


def _answers_problem(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior) -> str | None:
    """The same of the two answers to held-out questions."""
    margins = preference_margins(model, tok, behavior, split="dev" if behavior.held_out("dev") else "report")
    if len(margins) < 2:
        return None
    e = estimate_mean(margins)
    if e.excludes_zero:
        return ""
    return f"the base does not tell positive from negative answers ({e} nats per token, {e.n} questions)"


def preference_margins(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    system: str = "",
    split: str = "dev",
    batch_size: int | None = None,
) -> Float[np.ndarray, "questions"]:
    """`log p(positive) - log p(negative)` per token, in the mean over the answers of every question of a split.

    None of them where the behaviour brings no such questions. `system` is the system prompt, by default none;
    `batch_size` is that of `ws.lm.likelihood.score_answers`.
    """
    held = behavior.held_out(split)
    if not held:
        return np.empty(0)
    asked = [(p.question, system, (p.positive, p.negative)) for p in held]
    sides = answer_margins(model, tok, asked, batch_size=batch_size)
    by_question: dict[str, list[float]] = {}
    for p, (positive, negative) in zip(held, sides, strict=True):
        by_question.setdefault(p.question, []).append(positive - negative)
    return np.array([np.mean(values) for values in by_question.values()])


def _persona_problem(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior) -> list[str]:
    """Whether the positive personas do better than the negative ones in the check that the behaviour brings.

    Brought pairs were not sampled under personas, which then are for the prompt baseline alone.
    """
    if behavior.pairs:
        return []
    split = "dev" if _claims(behavior, "dev") or behavior.held_out("dev") else "report"
    false = [c for c in _claims(behavior, split) if not c.is_true]
    differences = list[np.ndarray]()
    pairs = list(zip(behavior.positive, behavior.negative, strict=True))
    for positive, negative in pairs[:_PERSONAS]:
        if false:
            pair = [_ask(model, tok, behavior, false, system).logratio for system in (positive, negative)]
            differences.append(behavior.effect * (pair[0] - pair[1]))
        else:
            pair = [preference_margins(model, tok, behavior, system, split) for system in (positive, negative)]
            differences.append(pair[0] - pair[1])
    if not differences or len(differences[0]) < 2:
        return []
    e = estimate_mean(np.mean(differences, axis=0))
    if e.ci_lo > 0:
        return []
    what = "claims" if false else "questions"
    return [f"asked as its own personas, the base does no better as the positive side ({e} nats, {e.n} {what})"]


def answer_margins(
    model: PreTrainedModel,
    tok: Tokenizer,
    asked: Sequence[tuple[str, str, tuple[str, ...]]],
    cut: Sequence[tuple[bool, ...]] = (),
    batch_size: int | None = None,
) -> list[list[float]]:
    """The mean log-probability per token of answers to `(question, system text, answers)`.

    The end of turn is one of the tokens, but for answers that are `cut`; none is unless that is given. `batch_size` is
    that of `ws.lm.likelihood.score_answers`.
    """
    prompts = [render_prompt(tok, question, system=system) for question, system, _ in asked]
    cuts = cut or [(False,) * len(texts) for _, _, texts in asked]
    answers = [
        [encode_answer(tok, prompt, text, ended=not c) for text, c in zip(texts, of, strict=True)]
        for prompt, (_, _, texts), of in zip(prompts, asked, cuts, strict=True)
    ]
    scores = score_answers(model, tok, [encode(tok, p) for p in prompts], answers, batch_size)
    return [[float(logp.mean()) for logp in of] for of in scores]


# ---- after answers were sampled -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acted:
    """How far the answers of both sides are acted.

    Attributes:
        positive, negative: the mean margin of a side's answers, by question, in nats per token.
        quartiles: of the margins of either side, `(25 %, 50 %, 75 %)`.
        preferred: the share of answers of either side that their own persona makes likelier.
    """

    positive: Estimate
    negative: Estimate
    quartiles: dict[str, tuple[float, float, float]]
    preferred: dict[str, float]

    def sides(self) -> dict[str, Estimate]:
        """The mean margin of either side."""
        return {"positive": self.positive, "negative": self.negative}

    @property
    def problem(self) -> str:
        """A sentence where the sides are not acted, or may not be; empty where they are."""
        unsure = {name: e for name, e in self.sides().items() if e.ci_lo < MARGIN_FLOOR}
        flat = {name: e for name, e in unsure.items() if e.mean < MARGIN_FLOOR}
        values = ", ".join(f"{name} {e}" for name, e in (flat or unsure).items())
        if flat:
            return (
                f"The answers gain less than {MARGIN_FLOOR} nats per token from their own persona ({values}): this "
                "model does not act these personas, and pairs that are sampled under them promise nothing."
            )
        if unsure:
            return (
                f"The answers may gain less than {MARGIN_FLOOR} nats per token from their own persona ({values}): "
                "whether this model acts these personas cannot be told from so few questions."
            )
        return ""

    def as_data(self) -> dict[str, Any]:
        """For the data card."""
        sides = {
            name: {
                "mean": round(e.mean, 4),
                "ci_lo": round(e.ci_lo, 4),
                "ci_hi": round(e.ci_hi, 4),
                "quartiles": [round(q, 4) for q in self.quartiles[name]],
                "preferred": round(self.preferred[name], 4),
            }
            for name, e in self.sides().items()
        }
        return {**sides, "questions": self.positive.n, "floor": MARGIN_FLOOR, "problem": self.problem}


def persona_margins(
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    personas: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, str]],
    cut: Sequence[tuple[bool, bool]] = (),
) -> Float[np.ndarray, "pairs 2"]:
    """How much likelier each answer is under its own persona than under the other, in nats per token.

    Args:
        questions: one a pair.
        personas: the positive and the negative system prompt of each.
        answers: the positive and the negative answer of each.
        cut: which of them were cut off before they ended; none by default.
    """
    asked = [(q, s, texts) for q, both, texts in zip(questions, personas, answers, strict=True) for s in both]
    logp = np.array(answer_margins(model, tok, asked, [c for c in cut for _ in range(2)])).reshape(
        -1, 2, 2
    )  # pair, persona, answer
    return np.stack([logp[:, 0, 0] - logp[:, 1, 0], logp[:, 1, 1] - logp[:, 0, 1]], axis=1)


def acted(questions: Sequence[str], margins: Float[np.ndarray, "pairs 2"]) -> Acted:
    """What margins say of both sides; pairs of one question are averaged first, because they are no two questions."""
    if len(set(questions)) < 2:
        raise WsError("How far personas are acted needs answers to at least 2 questions.")
    rows = [[i for i, q in enumerate(questions) if q == name] for name in dict.fromkeys(questions)]
    by_question = np.array([margins[i].mean(axis=0) for i in rows])
    names = ("positive", "negative")
    return Acted(
        estimate_mean(by_question[:, 0]),
        estimate_mean(by_question[:, 1]),
        {n: tuple(np.quantile(margins[:, side], (0.25, 0.5, 0.75)).tolist()) for side, n in enumerate(names)},
        {n: float((margins[:, side] > 0).mean()) for side, n in enumerate(names)},
    )
