"""The evaluations as sweeps, comparisons, controls, slopes and queues know them: one entry each, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from ws.errors import choose
from ws.eval import airisk, preference, statements, sycophancy, tinymfv_airisk
from ws.eval.context import EvalContext, Evaluation
from ws.eval.prompts import notes_on
from ws.options.shared import EvalOptions


@runtime_checkable
class Asked(Protocol):
    """Which items the evaluations of a command are asked: the held-out `split`, and the `traits` of statements."""

    @property
    def split(self) -> str:
        """`report` or `dev`."""

    @property
    def traits(self) -> tuple[str, ...]:
        """None for the behaviour's own."""


@dataclass(frozen=True)
class Entry:
    """One evaluation, and where its headline stands in its tables.

    Attributes:
        name: what `--evals` calls it, and its module in `ws.eval`.
        make: from a loaded run and what is asked.
        options: of its command.
        scores: the headline scores that are read from it.
        title: what a shift of the first of them is a shift of.
        stage: what its tables' names start with.
        columns: of its summary that a sweep's table has.
        shift: the column of the shift among them.
        masses: the columns of answer mass that say whether it can be read; none for a score that is no choice.
        items: the table of its items, the column that names one, and the column that is averaged.
        digits: decimals of a number of it.
        is_published: whether its items are a set that others published, which `--dataset` can replace; otherwise they
            are the behaviour's.
        about: what a reader must know of the items and the words of a row, as sentences.
    """

    name: str
    make: Callable[[EvalContext, Asked], Evaluation]
    options: type[EvalOptions]
    scores: tuple[str, ...]
    title: str
    stage: str
    columns: tuple[str, ...]
    shift: str
    masses: tuple[str, ...]
    items: tuple[str, str, str]
    digits: int = 2
    is_published: bool = False
    about: Callable[[Mapping[str, Any], str], list[str]] = notes_on

    @property
    def summary(self) -> str:
        """The file of its summary."""
        return f"{self.stage}_summary.csv"


def _of_behavior(context: EvalContext) -> EvalContext:
    """The context without the data set that a command names for the published sets."""
    return replace(context, options=replace(context.options, dataset=None))


_SHIFT = ("shift", "shift_ci_lo", "shift_ci_hi")
_ENTRIES = (
    Entry(
        name="sycophancy",
        make=lambda context, asked: sycophancy.evaluation(_of_behavior(context), context.behavior, asked.split),
        options=sycophancy.SycophancyOptions,
        scores=("false_claims", "true_claims"),
        title="agreement with false claims",
        stage=sycophancy.NAME,
        columns=("mean_logratio", "ci_lo", "ci_hi", *_SHIFT, "mean_pmass", "n"),
        shift="shift",
        masses=("mean_pmass",),
        items=("per_claim", "claim_id", "logratio"),
    ),
    Entry(
        name="airisk",
        make=lambda context, asked: airisk.evaluation(context),
        options=airisk.AiriskOptions,
        scores=("choices",),
        title="truthful choices",
        stage=airisk.table_name(),
        columns=(
            *("mean_score", "ci_lo", "ci_hi", *_SHIFT, "mean_pmass", "n"),
            *("accuracy", "si", "si_ci_lo", "si_ci_hi", "position_bias", "forced_closes"),
        ),
        shift="shift",
        masses=("mean_pmass",),
        items=("per_row", "dilemma_idx", "score"),
        is_published=True,
        about=airisk.about,
    ),
    Entry(
        name="tinymfv_airisk",
        make=lambda context, asked: tinymfv_airisk.evaluation(context),
        options=tinymfv_airisk.TinymfvOptions,
        scores=("wrongness",),
        title="wrongness",
        stage=tinymfv_airisk.NAME,
        columns=(
            *("wrongness", "wrongness_ci_lo", "wrongness_ci_hi", "gap", "gap_ci_lo", "gap_ci_hi"),
            *("delta_wrongness", "delta_wrongness_ci_lo", "delta_wrongness_ci_hi"),
            *("bool_mass_other", "bool_mass_self", "human_corr", "frame_agreement", "n_vignettes"),
        ),
        shift="delta_wrongness",
        masses=("bool_mass_other",),
        items=("per_vignette", "id", "s_other_violate"),
        is_published=True,
        about=tinymfv_airisk.about,
    ),
    Entry(
        name="preference",
        make=lambda context, asked: preference.evaluation(_of_behavior(context), context.behavior, asked.split),
        options=preference.PreferenceOptions,
        scores=("preference",),
        title="preference, nats per token",
        stage=preference.NAME,
        columns=(
            *("mean_margin", "ci_lo", "ci_hi", *_SHIFT, "n"),
            *("shift_sum", "shift_sum_ci_lo", "shift_sum_ci_hi", "share_positive"),
        ),
        shift="shift",
        masses=(),
        items=("per_question", "question_id", "margin"),
        digits=3,
    ),
    Entry(
        name="statements",
        make=lambda context, asked: statements.evaluation(context, context.behavior, asked.traits),
        options=statements.StatementOptions,
        scores=("statements",),
        title="statements of its traits",
        stage=statements.NAME,
        columns=("mean_score", "ci_lo", "ci_hi", *_SHIFT, "mean_pmass", "n", "shift_yes", "shift_no", "agreement"),
        shift="shift",
        masses=("mean_pmass",),
        items=("per_statement", "statement_id", "score"),
        is_published=True,
    ),
)
SUITE: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
EVALS = tuple(SUITE)
# The headline scores, in the order of tables.
SCORES = ("false_claims", "true_claims", "wrongness", "choices", "preference", "statements")


def entry_of(score: str) -> Entry:
    """The evaluation that a headline score is read from."""
    choose("score", score, SCORES)
    return next(entry for entry in _ENTRIES if score in entry.scores)


def entries_of(scores: Sequence[str]) -> list[Entry]:
    """The evaluations that some headline scores are read from, each once, in the order of `SCORES`."""
    for score in scores:
        choose("score", score, SCORES)
    return list({e.name: e for e in (entry_of(s) for s in SCORES if s in scores)}.values())


def set_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of the published sets that rows of several scores rest on; their `dataset` says which.

    Rows of scores that come from elsewhere, or that do not say of what they are, add nothing.
    """
    known = [row for row in rows if row.get("score") in SCORES and row.get("dataset")]
    notes = [note for row in known for note in entry_of(str(row["score"])).about({"dataset": row["dataset"]}, "")]
    return list(dict.fromkeys(notes))
