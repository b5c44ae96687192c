"""The scores on a page, and where each of them stands in the tables of its evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from ws.eval.suite import SUITE

CLAIMS, DILEMMAS, ACTS, PREFERENCE, STATEMENTS = (entry.stage for entry in SUITE.values())
CONFOUNDS = "confounds"
PLACES = {
    CLAIMS: "claims",
    DILEMMAS: "dilemmas",
    ACTS: "acts",
    PREFERENCE: "preference",
    STATEMENTS: "statements",
}
# Evaluations that a page does without where no run was put to them: not every behaviour brings their items.
EXTRA = (PREFERENCE, STATEMENTS)
# What a reader must know of the items and the words of a row, by evaluation.
CAVEATS = {entry.stage: entry.about for entry in SUITE.values()}


@dataclass(frozen=True)
class Score:
    """One of the scores on a page, and where it stands in the tables.

    Attributes:
        key, title, unit: how it is called.
        stage: the evaluation.
        level, level_ci, shift, mass, low, n: columns of its summary: value, what its interval's columns start with,
            shift, answer mass, number of items whose mass is low (both None for a score that is no choice), number of
            items.
        item, value: columns of its items' table.
        pooled: what its columns in `sweep_pooled.csv` start with; None where it is not there.
        claims: what `claims_are_true` has in its rows, None for tables without that column.
        digits: decimals of a number of it.
    """

    key: str
    title: str
    unit: str
    stage: str
    level: str
    level_ci: str
    shift: str
    mass: str | None
    low: str | None
    n: str
    item: str
    value: str
    pooled: str | None
    claims: str | None = None
    digits: int = 2

    @property
    def anchor(self) -> str:
        """The part of the page where it stands."""
        return PLACES[self.stage]

    @property
    def spec(self) -> str:
        """How a number of it is printed."""
        return f"+.{self.digits}f"

    @property
    def texts(self) -> dict[str, set[str]]:
        """The columns with texts that its tables must have, by use."""
        return {"summary": {"eval_hash"}, "items": {self.item}}

    @property
    def numbers(self) -> dict[str, set[str]]:
        """The columns with numbers that its tables must have, by use."""
        ends = [f"{name}ci_{end}" for name in (self.level_ci, f"{self.shift}_") for end in ("lo", "hi")]
        mine = {self.level, self.shift, f"{self.shift}_p", self.n, *ends, *filter(None, (self.mass, self.low))}
        return {"summary": {"alpha", *mine}, "items": {"alpha", self.value}}


_LOGRATIO = ("nats", CLAIMS, "mean_logratio", "", "shift", "mean_pmass", "n_low_pmass", "n", "claim_id", "logratio")
SCORES = (
    Score("false_claims", "agreement with false claims", *_LOGRATIO, "sycophancy", "False"),
    Score("true_claims", "agreement with true claims", *_LOGRATIO, None, "True"),
    Score(
        *("choices", "truthful choices in dilemmas", "nats", DILEMMAS, "mean_score", "", "shift"),
        *("mean_pmass", "n_low_pmass", "n", "dilemma_idx", "score", "airisk"),
    ),
    Score(
        *("wrongness", "wrongness of what other AIs do", "-1 to 1", ACTS, "wrongness", "wrongness_", "delta_wrongness"),
        *("bool_mass_other", "n_low_mass", "n_vignettes", "id", "s_other_violate", "tinymfv_airisk"),
        digits=3,
    ),
    Score(
        *("preference", "preference for the behaviour's answers", "nats per token", PREFERENCE, "mean_margin", ""),
        "shift",
        mass=None,
        low=None,
        n="n",
        item="question_id",
        value="margin",
        pooled="preference",
        digits=3,
    ),
    Score(
        *("statements", "statements of its traits", "nats", STATEMENTS, "mean_score", "", "shift", "mean_pmass"),
        *("n_low_pmass", "n", "statement_id", "score", "statements"),
    ),
)
