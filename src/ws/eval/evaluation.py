"""What an evaluation is: its items, how a model is asked, what the answers are counted as, and the tables of them.

One class per evaluation. Its attributes are the schema of its tables, which sweeps, comparisons, controls, slopes,
reports and model cards read there and nowhere else; an instance of it is one set of items with its protocol.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from tabulate import tabulate
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.errors import WsError
from ws.eval.prompts import notes_on
from ws.eval.readable import AGREEMENT, NATS, Readability, mass_text, notes, of_row, worst
from ws.files.runs import sha256_json
from ws.lm.choice import Choice
from ws.options.shared import EvalOptions
from ws.stats import LOW_MASS, estimate_mean, estimate_text

Scores = Mapping[str, np.ndarray]
ByAlpha = Mapping[float, Scores]
Rows = list[dict[str, Any]]
TableRow = TypeVar("TableRow", bound=Mapping[str, Any])

SHIFT = ("shift", "shift_ci_lo", "shift_ci_hi")
THOUGHT = ("mean_thought_tokens", "share_closed")


@dataclass(frozen=True)
class HeadlineScore:
    """A score that conclusions are drawn from, one number per item: what it is called, and where its tables have it.

    Attributes:
        key: its name in tables and for `--scores`.
        title: what it is, as words.
        unit: of a number of it.
        short: what a column of it is headed with; empty for the title.
        label: what a model card calls it, where `{column}` is filled in from its rows; empty for the title, None for a
            score that is on no card.
        meaning: what its numbers say, as a model card puts it; empty for the title.
        level, shift: columns of the summary: its mean, and the paired shift against the base. With `_ci_lo`, `_ci_hi`
            and `_p` behind it the latter names the columns of its interval and p-value.
        level_ci: what the names of the columns `ci_lo` and `ci_hi` of the mean begin with.
        mass, low: columns of the summary: the mean answer mass, and how many items have little of it; None for a score
            that is no choice of an answer.
        agreement: the column of the summary, where it has one, with the share of texts that both frames put on the same
            side.
        n: the column with the number of items.
        value: the column of the items' table that is averaged.
        where: in tables that hold rows of several scores, what those of this one have, by column.
        floor: a smaller shift is called none, in `unit`.
        digits: decimals of a number of it.
        evaluation: whose score it is; the class fills that in.
    """

    key: str
    title: str
    unit: str = "nats"
    short: str = ""
    label: str | None = ""
    meaning: str = ""
    level: str = "mean_score"
    shift: str = "shift"
    level_ci: str = ""
    mass: str | None = "mean_pmass"
    low: str | None = "n_low_pmass"
    agreement: str = AGREEMENT
    n: str = "n"
    value: str = "score"
    where: Mapping[str, str] = field(default_factory=dict, hash=False)
    floor: float = NATS
    digits: int = 2
    evaluation: type[Evaluation] | None = field(default=None, repr=False, compare=False)

    @property
    def spec(self) -> str:
        """How a number of it is printed."""
        return f"+.{self.digits}f"

    @property
    def heading(self) -> str:
        """What a column of it is headed with."""
        return self.short or self.title

    @property
    def axis(self) -> str:
        """What an axis of it is called, with the unit."""
        return self.heading if self.unit in self.heading else f"{self.heading}, {self.unit}"

    def rows(self, table: Iterable[TableRow]) -> list[TableRow]:
        """The rows of a table that are of this score."""
        return [row for row in table if all(row.get(name, value) == value for name, value in self.where.items())]

    def readability(self, row: Mapping[str, Any]) -> Readability:
        """How well the items of a row of the summary were answered."""
        return of_row(row, *filter(None, [self.mass]), agreements=(self.agreement,))


def _unchanged(logratio: Tensor) -> Tensor:
    return logratio


@dataclass(frozen=True)
class MeanOfChoices:
    """The mean of a headline score as a sum that has a gradient, answered without a thought.

    `sum_i weights[i] transform(logP(choices[0]) - logP(choices[1]))` over the questions `i`.

    Attributes:
        key: of the score.
        n: its number of items; an item may be asked several questions.
        asked: questions, each with the opener of its answer.
        choices: the two answers.
        weights: one per question.
        transform: of a log ratio in nats.
    """

    key: str
    n: int
    asked: Sequence[tuple[str, str]]
    choices: tuple[Choice, Choice]
    weights: Sequence[float]
    transform: Callable[[Tensor], Tensor] = _unchanged


@dataclass(frozen=True)
class MeanOfAnswers:
    """The same for answers that are given: `sum_i weights[i] (a_i - b_i)` with the mean log-probabilities of a token of
    either answer, in nats.

    Attributes:
        key, n, weights: see `MeanOfChoices`.
        prompts, answers: as tokens; every prompt has two answers, in the order of the difference.
    """

    key: str
    n: int
    prompts: Sequence[list[int]]
    answers: Sequence[list[list[int]]]
    weights: Sequence[float]


def thought_columns(scores: Scores, part: np.ndarray | slice = slice(None)) -> dict[str, float | None]:
    """The columns `THOUGHT` of a summary: the mean length of a thought in tokens, and the share of thoughts that the
    model ended by itself within the budget. Both are empty where nothing was thought, or nothing is on record of it.

    Args:
        scores: with `n_tokens` and `forced` (see `ws.lm.rollout.Rollouts`) where an answer came after a thought.
        part: of the items.
    """
    if "forced" not in scores:
        return dict.fromkeys(THOUGHT)
    values = float(scores["n_tokens"][part].mean()), 1 - float(scores["forced"][part].mean())
    return dict(zip(THOUGHT, values, strict=True))


def thought_notes(summary: Iterable[Mapping[str, Any]]) -> list[str]:
    """The same of a summary's rows, read from its file, as a sentence for below a table; none where nothing was
    thought."""
    known = [r for r in summary if r.get(THOUGHT[1]) not in (None, "")]
    parts = [f"alpha {float(r['alpha']):+g} {float(r[THOUGHT[0]]):.1f} ({float(r[THOUGHT[1]]):.2f})" for r in known]
    about = "Thoughts, mean tokens (and the share that ended by itself within the budget)"
    return [f"{about}: {', '.join(parts)}."] if parts else []


@dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """A set of items with its protocol: what to ask a model, and what to write of its answers.

    A subclass states those of the attributes below that differ from what stands here, and defines `of_run` and `ask`.
    The tables, the text and the example here are those of one score, with `score` and `pmass` per item from `ask`;
    whoever counts more writes `tables`, `render`, `example`, `headlines` and `readability` as well.

    How a question reads as a prompt is the tokenizer's part (`ws.lm.models.tokenizer_hash`), which is no part of
    `digest`.

    Attributes:
        name: what `--evals` calls it.
        version: raised when the code, or words in it, change what the numbers mean.
        options: of its command.
        scores: its headline scores, the most important one first.
        columns: of its summary that a sweep's table has; they are those of the first score.
        sparse: the arrays of `ask`, one-dimensional, that may hold None beside what else they hold.
        item_table, item: the table of its items, `<name>_<item_table>.csv`, and the column that names one.
        is_published: whether the items are a set that others published, which `--dataset` can replace; otherwise they
            are the behaviour's, or the evaluation's own.
        thinks: whether an answer comes after a thought unless `n_think` says otherwise; what must be quick, or have a
            gradient, is asked without.
        stage: what the names of its tables start with, unless options change it (`table_name`); `name` by default.
        summaries: a wildcard for the names of its summaries with any options; by default that of `stage`.
        place: the part of a report where it stands, `name` by default.
        items: what is asked about.
        prompts: the texts around an item, a dataclass; None where they are the code's.
        reasons: what a model without a think block is asked for before it answers, where it is to think
            (`ws.lm.rollout.thinks_aloud`).
        facts: columns that every row of every table ends with, besides the evaluation's identity; `dataset`, `n_think`,
            `words` and `drawn` are said wherever a number of it stands.
        n_think: tokens of thought before an answer.
        batch_size: prompts per forward pass, found by trying when None.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    options: ClassVar[type[EvalOptions]] = EvalOptions
    scores: ClassVar[tuple[HeadlineScore, ...]] = ()
    columns: ClassVar[tuple[str, ...]] = ("mean_score", "ci_lo", "ci_hi", *SHIFT, "mean_pmass", "n")
    sparse: ClassVar[tuple[str, ...]] = ()
    item_table: ClassVar[str] = "per_item"
    item: ClassVar[str] = "item_id"
    is_published: ClassVar[bool] = False
    thinks: ClassVar[bool] = False
    stage: ClassVar[str]
    summaries: ClassVar[str]
    place: ClassVar[str]

    items: Sequence[Any]
    prompts: Any = None
    reasons: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    n_think: int = 0
    batch_size: int | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        stated = vars(cls)
        if "name" in stated:  # otherwise it is a variant of the evaluation that it is made from
            cls.stage = stated.get("stage", cls.name)
            cls.summaries = stated.get("summaries", f"{cls.stage}_summary.csv")
            cls.place = stated.get("place", cls.name)
        cls.scores = tuple(replace(score, evaluation=cls) for score in cls.scores)

    # ---- the items ----

    @classmethod
    @abstractmethod
    def of_run(cls, context: Any) -> Evaluation:
        """The items and the protocol that a run's options describe.

        Args:
            context: a `ws.eval.context.EvalContext` whose options are of the class `options`.
        """

    @property
    def table_name(self) -> str:
        """What the names of its tables start with, and what its rows call it."""
        return self.stage

    @property
    def content(self) -> Any:
        """All that the scores depend on besides the model and `version`, as plain values: words, thought and items."""
        words = [] if self.prompts is None else [asdict(self.prompts)]
        items = [asdict(i) if is_dataclass(i) and not isinstance(i, type) else i for i in self.items]
        return [*words, self.n_think, *self.reasons, items]

    @cached_property
    def digest(self) -> str:
        """Identifies the items and the protocol: equal digests mean comparable numbers."""
        return sha256_json([self.table_name, self.version, self.content])[:12]

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that say which evaluation a row is of."""
        return {"eval": self.table_name, "eval_version": self.version, "eval_hash": self.digest, **self.facts}

    @property
    def brief(self) -> dict[str, Any]:
        """The part of `identity` that all evaluations have, for tables with rows of several."""
        shared = ("dataset", "n_think", "words", "drawn")
        return {k: v for k, v in self.identity.items() if k.startswith("eval") or k in shared}

    # ---- asking and scoring ----

    @abstractmethod
    def ask(self, model: PreTrainedModel, tok: Tokenizer) -> Scores:
        """The scores of the model as it stands, as arrays by name; `score`, and `pmass` if it is a choice, `[items]`.

        Prompts are rendered in here, by `ws.lm.models.render_prompt`: an intervention may act on them.
        """

    def headlines(self, scores: Scores) -> dict[str, np.ndarray]:
        """The headline scores by key, one number per item; without those that have no items here."""
        return {score.key: scores["score"] for score in self.scores[:1]}

    def readability(self, scores: Scores) -> dict[str, Readability]:
        """How well the items of a headline score were answered, by key; without scores that are no choices."""
        chosen = self.scores[:1] if "pmass" in scores else ()
        return {score.key: Readability(float(scores["pmass"].mean())) for score in chosen}

    def means(self, tok: Tokenizer, wanted: Sequence[str]) -> list[MeanOfChoices | MeanOfAnswers]:
        """The means of the wanted headline scores over these items as sums that have gradients, for `ws check slope`.

        Raises:
            WsError: the evaluation has none.
        """
        raise WsError(f"The evaluation {self.name} has no gradient, so there is no slope of {self.scores[0].key}.")

    # ---- tables, and what a person sees ----

    def ids(self) -> list[str]:
        """What the items' table calls every item."""
        return [str(number) for number in range(len(self.items))]

    def tables(self, key: Mapping[str, Any], scores: ByAlpha, n_bootstrap: int) -> dict[str, Rows]:
        """Rows per table from the scores by alpha; one table is called `summary`, and shifts are paired with the base.

        Args:
            key: the first columns of every row.
            scores: by strength, 0 among them.
            n_bootstrap: resamples per interval.

        Raises:
            WsError: the score says that it has an answer mass and `ask` gives none, or the other way round.
        """
        rows: dict[str, Rows] = {self.item_table: [], "summary": []}
        score = self.scores[0]
        if (score.mass is None) == ("pmass" in scores[0.0]):
            known = "gives `pmass`" if score.mass is None else "gives no `pmass`"
            raise WsError(f"`ask` of {self.name} {known}, but the `mass` of its headline is {score.mass!r}.")
        base = self.headlines(scores[0.0])[score.key]
        for alpha, asked in scores.items():
            values, mass = self.headlines(asked)[score.key], asked.get("pmass")
            for i, name in enumerate(self.ids()):
                row = {**key, "alpha": alpha, self.item: name, score.value: float(values[i])}
                rows[self.item_table].append(row | ({} if mass is None else {"pmass": float(mass[i])}))
            level, shift = estimate_mean(values, n_bootstrap), estimate_mean(values - base, n_bootstrap)
            summary = {**key, "alpha": alpha, score.level: level.mean, "ci_lo": level.ci_lo, "ci_hi": level.ci_hi}
            summary |= shift.columns(score.shift, "ci_lo", "ci_hi", "p") | {score.n: level.n}
            summary |= {"mean_pmass": None, "n_low_pmass": None}
            if mass is not None:
                summary |= {"mean_pmass": float(mass.mean()), "n_low_pmass": int((mass < LOW_MASS).sum())}
            rows["summary"].append(summary)
        return rows

    def render(self, summary: Sequence[Mapping[str, str]], folder: Path) -> str:
        """The rows of the summary of one intervention, as text from its file, as a table for people.

        Args:
            summary: its rows, the base's among them.
            folder: where the file lies, beside the other tables.
        """
        score = self.scores[0]
        read = [score.readability(row) for row in summary]
        (base,) = (x for row, x in zip(summary, read, strict=True) if float(row["alpha"]) == 0)
        problems = [worst([x, base]).problem for x in read]
        rows = [
            [
                f"{float(row['alpha']):+g}",
                estimate_text(row, score.level, score.spec, ends=score.level_ci),
                estimate_text(row, score.shift, score.spec),
                mass_text(x.mass, int(row[score.low]) if score.low else 0, problem),
            ]
            for row, x, problem in zip(summary, read, problems, strict=True)
        ]
        table = tabulate(rows, ["alpha", score.axis, "shift", "answer mass"], disable_numparse=True)
        return "\n\n".join([table, *notes(problems), *self.about(summary[-1])])

    def example(self, tok: Tokenizer, scores: ByAlpha) -> str:
        """One worked example, to read by eye."""
        values = {alpha: self.headlines(s)[self.scores[0].key][0] for alpha, s in sorted(scores.items())}
        lines = [f"  alpha {alpha:+g}  {value:{self.scores[0].spec}}" for alpha, value in values.items()]
        return "\n".join([f"Worked example ({self.ids()[0]}), {self.scores[0].axis}:", *lines])

    @staticmethod
    def about(row: Mapping[str, Any], of: str = "") -> list[str]:
        """What a reader must know of the items and the words of any of its rows, as sentences.

        Args:
            of: which items and words, where a table has rows of several evaluations.
        """
        return notes_on(row, of)

    @classmethod
    def command(cls) -> str:
        """What puts it to a finished run."""
        ours = cls.__module__.startswith("ws.")
        return f"ws eval {cls.name.replace('_', '-')}" if ours else f"python -m {cls.__module__}"
