"""The scores on a page, and what the tables of their evaluations must hold for it."""

from __future__ import annotations

from collections.abc import Mapping

from ws.eval.airisk import Airisk
from ws.eval.confounds import ConfoundChecks
from ws.eval.evaluation import Evaluation, HeadlineScore
from ws.eval.prompts import OWN
from ws.eval.suite import evaluations
from ws.eval.sycophancy import Sycophancy
from ws.eval.tinymfv_airisk import TinymfvAirisk
from ws.options.make import DEFAULT_EVALS

CLAIMS, DILEMMAS, ACTS, CONFOUNDS = (cls.stage for cls in (Sycophancy, Airisk, TinymfvAirisk, ConfoundChecks))


def shown_scores() -> list[HeadlineScore]:
    """The headline scores of all evaluations, in the order of a page."""
    return [score for cls in evaluations().values() for score in cls.scores]


def evaluation_at(stage: str) -> type[Evaluation] | None:
    """The evaluation whose tables' names start with this; None for confounds."""
    return next((cls for cls in evaluations().values() if cls.stage == stage), None)


def of(score: HeadlineScore) -> type[Evaluation]:
    """The evaluation of a score on a page."""
    assert score.evaluation is not None, "every score on a page is one of an evaluation"
    return score.evaluation


def in_own_words(row: Mapping[str, str]) -> bool:
    """Whether a row of claims was asked in the behaviour's own words, as those of before words were on record were."""
    return row.get("words") in (None, "", OWN)


def is_extra(cls: type[Evaluation]) -> bool:
    """Whether a page does without it where no run was put to it: not every behaviour brings the items of these."""
    return cls.name not in DEFAULT_EVALS


def pooled_name(score: HeadlineScore) -> str | None:
    """What its columns in `sweep_pooled.csv` start with; None where it is not there."""
    return of(score).name if of(score).scores[0].key == score.key else None


def pooled_numbers(score: HeadlineScore) -> list[str]:
    """The columns of `sweep_pooled.csv` that hold its numbers, where it is there."""
    name = pooled_name(score)
    parts = [f"{column}{end}" for column in ("level", score.shift) for end in ("", "_ci_lo", "_ci_hi", "_p")]
    return [f"{name}_{part}" for part in (*parts, "n", "mass")] if name else []


def needed_texts(score: HeadlineScore) -> dict[str, set[str]]:
    """The columns with texts that its tables must have, by use."""
    return {"summary": {"eval_hash"}, "items": {of(score).item}}


def needed_numbers(score: HeadlineScore) -> dict[str, set[str]]:
    """The columns with numbers that its tables must have, by use."""
    ends = [f"{name}ci_{end}" for name in (score.level_ci, f"{score.shift}_") for end in ("lo", "hi")]
    mine = {score.level, score.shift, f"{score.shift}_p", score.n, *ends, *filter(None, (score.mass, score.low))}
    return {"summary": {"alpha", *mine}, "items": {"alpha", score.value}}
