"""Carrying an evaluation out on a run: the model, the interventions, the strengths, the scores on disk, the tables.

Every row of every table names its `intervention` (see `ws.intervene.interventions`): `base` at alpha 0, else what was
done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.behaviors import Behavior, load_behavior
from ws.console import Countdown, Result, say
from ws.delta import LinearDelta
from ws.diff import SteeringVector
from ws.errors import DamagedError, WsError
from ws.eval.evaluation import ByAlpha, Evaluation, Rows, Scores
from ws.eval.readable import rounding_notes, select
from ws.files.reading import kept, read_json
from ws.files.runs import Run, lock, read_csv, slug, typed, write_csv, write_json
from ws.intervene.interventions import Intervention, intervention
from ws.lm.models import BUNDLED, fingerprint, model_id, tokenizer_hash
from ws.lm.trunk import shared_trunk
from ws.options.shared import BASE, WEIGHT, shared_with
from ws.options.shared import EvalOptions as EvalOptions
from ws.run import FinishedRun, open_options

TABLES_VERSION = 5  # raised when the same scores make other tables, which are then written anew, and nothing is asked


Options = TypeVar("Options", bound=EvalOptions)


@dataclass(frozen=True)
class EvalContext:
    """A loaded model with the vector to steer it and the folder its results go to."""

    options: EvalOptions
    model: PreTrainedModel
    tok: Tokenizer
    vector: SteeringVector
    run: Run

    @classmethod
    def of_base(cls, options: EvalOptions, model: PreTrainedModel, tok: Tokenizer) -> EvalContext:
        """The base alone, before there is a vector; its own changes nothing, and what is asked is kept for the runs."""
        nothing = SteeringVector({"nothing": LinearDelta(1, 1)}, model_id(model), fingerprint(model))
        return cls(options, model, tok, nothing, Run(options.out))

    @property
    def key(self) -> dict[str, Any]:
        """The first columns of every table."""
        return self.options.key

    @property
    def opened(self) -> FinishedRun:
        """The run that is evaluated."""
        return FinishedRun(self.run, self.vector, self.model, self.tok, self.options.out)

    @cached_property
    def behavior(self) -> Behavior:
        """The behaviour of the run, as it is written for the model."""
        return load_behavior(self.options.behavior, self.options.model or self.vector.base_id)

    def intervention(self, name: str = WEIGHT) -> Intervention:
        """An intervention by name, ready to be switched on."""
        return intervention(name, self.opened, self.behavior)

    def options_as(self, kind: type[Options]) -> Options:
        """The options as those of one evaluation. Where they are of a command on several, what only this evaluation
        knows is at its default."""
        if isinstance(self.options, kind):
            return self.options
        return shared_with(kind, shared_with(EvalOptions, self.options))  # two evaluations' `config` are two things

    @property
    def alphas(self) -> list[float]:
        """The strengths of the vector in order, base included."""
        return self.intervention().strengths(self.options.alphas, self.model)

    def source(self, hub_id: str) -> str:
        """Where the items come from: what was asked for, else the published set, or ours on a bundled model."""
        return self.options.dataset or ("pocket" if self.model.name_or_path in BUNDLED else hub_id)

    def carry_out(self, evaluation: Evaluation) -> Result:
        """Evaluate unless exactly that is on disk, write the tables, and return what to show."""
        with self.run.alone(evaluation.table_name):
            return self._carry_out(evaluation, [self.intervention(name) for name in self.options.interventions])

    def _carry_out(self, evaluation: Evaluation, chosen: Sequence[Intervention]) -> Result:
        stage = self.run.refresh(evaluation.table_name, self._settings(evaluation, chosen), _inputs(chosen))
        if stage is not None:
            scores = {i.name: self.scores(evaluation, i, self._strengths(i)) for i in chosen}
            files = self._write(evaluation, scores)
            stage.done(files, example=evaluation.example(self.tok, scores[chosen[0].name]))
        table = self.run.folder / f"{evaluation.table_name}_summary.csv"
        example, summary = self.run.fact(evaluation.table_name, "example", str), read_csv(table)
        parts = [_heading(i, chosen) + evaluation.render(select(summary, i.name), self.run.folder) for i in chosen]
        parts += rounding_notes([str(self.model.dtype)[6:]])
        data = {"evaluation": evaluation.identity, "example": example, "rows": typed(summary)}
        return Result("\n\n".join([example, *parts]), data, self.run.outputs(evaluation.table_name))

    def record(self, evaluation: Evaluation, scores: ByAlpha) -> None:
        """Write the tables of the vector's scores that were measured already, in place of what is on disk."""
        chosen = [self.intervention()]
        with self.run.alone(evaluation.table_name):
            stage = self.run.restart(evaluation.table_name, self._settings(evaluation, chosen), _inputs(chosen))
            stage.done(self._write(evaluation, {WEIGHT: scores}), example=evaluation.example(self.tok, scores))

    def measure(self, evaluation: Evaluation) -> dict[float, Scores]:
        """The vector's scores at every strength."""
        return self.scores(evaluation, self.intervention(), self.alphas)

    def scores(
        self, evaluation: Evaluation, intervention: Intervention, alphas: Sequence[float]
    ) -> dict[float, Scores]:
        """Scores at given strengths of an intervention. All are kept; the base's, and those of what needs no adapter,
        serve every run of the model."""
        stem, by_alpha, countdown = self._stem(evaluation), dict[float, Scores](), Countdown(len(alphas))
        with shared_trunk(self.model):
            for alpha in sorted(alphas, key=lambda a: a == 0):  # a strength shows where the trunk ends
                say(f"{evaluation.table_name}, {intervention.name} at alpha {alpha:+g} ({countdown})")
                file = intervention.run.folder / "scores" / f"{stem}-{intervention.digest[:12]}-{alpha!r}.json"
                file = file if alpha else self._base_file(evaluation)
                known = file.is_file()
                with intervention.at(alpha):
                    by_alpha[alpha] = _kept(file, evaluation, partial(evaluation.ask, self.model, self.tok))
                countdown.step(quick=known)
        return {alpha: by_alpha[alpha] for alpha in alphas}

    def base_scores(self, evaluation: Evaluation) -> Scores:
        """The scores of the base, which are kept for every run of the model."""
        return _kept(self._base_file(evaluation), evaluation, partial(evaluation.ask, self.model, self.tok))

    def _base_file(self, evaluation: Evaluation) -> Path:
        return self.options.out / "base" / slug(str(self.model.name_or_path)) / f"{self._stem(evaluation)}.json"

    def _stem(self, evaluation: Evaluation) -> str:
        """What scores are kept under: the evaluation, the model and how it reads."""
        return "-".join([evaluation.table_name, evaluation.digest, *self.reading.values()])

    @property
    def reading(self) -> dict[str, str]:
        """How the model reads, which every number hangs on: its weights, their dtype and its tokenizer."""
        dtype = str(self.model.dtype)[6:]
        return {"fingerprint": fingerprint(self.model), "dtype": dtype, "tokenizer_hash": tokenizer_hash(self.tok)}

    def _strengths(self, chosen: Intervention) -> list[float]:
        return chosen.strengths(self.options.alphas, self.model)

    def _settings(self, evaluation: Evaluation, chosen: Sequence[Intervention]) -> dict[str, Any]:
        strengths = {i.name: self._strengths(i) for i in chosen}
        settings = {"alphas": strengths, "n_bootstrap": self.options.n_bootstrap, "dtype": str(self.model.dtype)[6:]}
        settings |= {"tables": TABLES_VERSION, "tokenizer_hash": tokenizer_hash(self.tok)}
        return settings | evaluation.identity

    def _write(self, evaluation: Evaluation, scores: Mapping[str, ByAlpha]) -> list[Path]:
        """The tables of all interventions, one below the other, with the base's rows once."""
        tables: dict[str, Rows] = {}
        for number, (name, by_alpha) in enumerate(scores.items()):
            for table, rows in evaluation.tables(self.key, by_alpha, self.options.n_bootstrap).items():
                new_rows = [r for r in rows if r["alpha"] != 0 or number == 0]
                named = [r | {"intervention": name if r["alpha"] else BASE} | evaluation.identity for r in new_rows]
                tables.setdefault(table, []).extend(named)
        return [write_csv(self.run.folder / f"{evaluation.table_name}_{t}.csv", rows) for t, rows in tables.items()]


def _inputs(chosen: Sequence[Intervention]) -> dict[str, str]:
    return {i.name: i.digest for i in chosen}


def _heading(intervention: Intervention, chosen: Sequence[Intervention]) -> str:
    if len(chosen) == 1:
        return ""
    return f"{intervention.name}{f' ({intervention.detail})' if intervention.detail else ''}\n"


def _kept(file: Path, evaluation: Evaluation, ask: Callable[[], Scores]) -> Scores:
    """Scores from a file, or asked for and written there; of runs side by side one asks and the others wait."""
    with lock(file):
        scores = kept(file, partial(_read_scores, evaluation=evaluation), "the model is asked again")
        if scores is None:
            scores = ask()
            write_json(file, {k: np.asarray(v).tolist() for k, v in scores.items()})
    return scores


def _leaves(values: list[Any]) -> Iterator[Any]:
    for value in values:
        yield from _leaves(value) if isinstance(value, list) else [value]


def _read_scores(file: Path, evaluation: Evaluation) -> Scores:
    """Scores that the evaluation can count; `DamagedError` for others."""
    remedy = "delete it, and the model is asked again"
    values = read_json(file, dict[str, list[Any]], remedy)
    try:
        scores = {k: np.array(v) for k, v in values.items()}
        known = {k: [x for x in v if x is not None] if k in evaluation.sparse else v for k, v in values.items()}
        # NumPy would take a truth value among numbers for one of them.
        mixed = [k for k, v in known.items() if len(types := {type(x) for x in _leaves(v)}) > 1 and bool in types]
        if odd := [*mixed, *(k for k, v in known.items() if np.array(v).dtype == object)]:
            raise TypeError(f"{odd[0]} are no numbers or texts")
        evaluation.headlines(scores), evaluation.readability(scores)
    except (ArithmeticError, LookupError, TypeError, ValueError, WsError) as problem:
        why = f"{file} does not hold the scores of {evaluation.table_name} ({type(problem).__name__}: {problem})"
        raise DamagedError(f"{why}; {remedy}.") from problem
    return scores


def open_context(options: EvalOptions) -> EvalContext:
    """Load what an evaluation needs; `WsError` when the run has no vector, or the vector is of another base."""
    options.check()
    opened = open_options(options)
    context = EvalContext(options, opened.model, opened.tok, opened.vector, opened.run)
    for name in options.interventions:  # a missing calibration shows now
        context.intervention(name).strengths(options.alphas, opened.model)
    return context
