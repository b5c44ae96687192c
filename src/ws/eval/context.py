"""What every evaluation command shares: the model, the vector of a run, the strengths, base scores, the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws.behaviors import behavior_name
from ws.calibrate import calibration_of, parse_alphas
from ws.console import say
from ws.diff import SteeringVector
from ws.errors import WsError
from ws.finished import open_run
from ws.models import BUNDLED, fingerprint
from ws.runs import DEFAULT_OUT, Run, lock, read_csv, sha256_json, slug, write_csv, write_json
from ws.steer import steer

Scores = Mapping[str, np.ndarray]
ByAlpha = Mapping[float, Scores]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class EvalOptions:
    """The options every evaluation takes.

    Attributes:
        model: None for the base that the vector was made for.
        behavior, adapter, seed: which run below `out`.
        out: where runs and results are.
        alphas: steering strengths; 0, the base, is always included. In calibrated units as `+1u`, and `calibrated` for
            -1u and +1u, where the vector is calibrated (`ws calibrate`).
        batch_size: prompts per forward pass, found automatically when None.
        n_think: tokens of guided chain of thought before the answer; None for the evaluation's own number.
        limit: only the first so many items.
        dataset: a hub id, a local folder or file, or `pocket`; None for the published set (`pocket` on the bundled
            models).
        prompts: a TOML file that replaces the instruction texts.
        n_bootstrap: resamples per interval.
        device, dtype: see `ws.load_model`.
    """

    model: str | None = None
    behavior: str = "honesty"
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT
    alphas: tuple[float | str, ...] = (-1.0, 0.0, 1.0)
    batch_size: int | None = None
    n_think: int | None = None
    limit: int | None = None
    dataset: str | None = None
    prompts: Path | None = None
    n_bootstrap: int = 10_000
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """`WsError` for numbers that make no sense, before anything is loaded."""
        for flag, value, least in (
            ("--batch-size", self.batch_size, 1),
            ("--limit", self.limit, 1),
            ("--n-think", self.n_think, 0),
            ("--n-bootstrap", self.n_bootstrap, 100),
        ):
            if value is not None and value < least:
                raise WsError(f"{flag} must be at least {least}, not {value}.")
        for alpha in self.alphas:
            if not isinstance(alpha, str) and not np.isfinite(alpha):
                raise WsError(f"--alphas must be finite numbers, not {alpha}.")


@dataclass(frozen=True)
class Evaluation:
    """A set of items with its protocol: what to ask a model, and what to write of its answers.

    Attributes:
        name: of the tables, `<name>_<table>.csv`.
        version: raised when the protocol's code changes what the numbers mean.
        items: everything the scores depend on besides the model (items, prompts, settings), as plain values.
        facts: columns that every row of every table ends with, besides the evaluation's identity.
        ask: scores the model as it stands.
        tables: rows per table from the scores by alpha; one table is called `summary`.
        example: one worked example to read by eye.
        render: the summary's rows, as text, as a table for people.
    """

    name: str
    version: int
    items: Any
    ask: Callable[[], Scores]
    tables: Callable[[ByAlpha], Mapping[str, Rows]]
    example: Callable[[ByAlpha], str]
    render: Callable[[Sequence[Mapping[str, str]]], str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identifies the items and the protocol: equal digests mean comparable numbers."""
        return sha256_json([self.name, self.version, self.items])[:12]

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that say which evaluation a row is of."""
        return {"eval": self.name, "eval_version": self.version, "eval_hash": self.digest, **self.facts}


@dataclass(frozen=True)
class EvalContext:
    """A loaded model with the vector to steer it and the folder its results go to."""

    options: EvalOptions
    model: PreTrainedModel
    tok: Tokenizer
    vector: SteeringVector
    run: Run

    @property
    def key(self) -> dict[str, Any]:
        """The first columns of every table."""
        name = behavior_name(self.options.behavior)
        return {"behavior": name, "adapter": self.options.adapter, "seed": self.options.seed}

    @property
    def alphas(self) -> list[float]:
        """The strengths in order, base included."""
        return sorted({0.0, *map(float, self.options.alphas)})

    def source(self, hub_id: str) -> str:
        """Where the items come from: what was asked for, else the published set, or ours on a bundled model."""
        return self.options.dataset or ("pocket" if self.model.name_or_path in BUNDLED else hub_id)

    def carry_out(self, evaluation: Evaluation) -> str:
        """Evaluate unless exactly that is on disk, write the tables, and return the text to print."""
        stage = self.run.refresh(evaluation.name, self._settings(evaluation), self._inputs())
        if stage is not None:
            scores = self.measure(evaluation)
            stage.done(self._write(evaluation, scores), example=evaluation.example(scores))
        summary = read_csv(self.run.folder / f"{evaluation.name}_summary.csv")
        example = self.run.facts(evaluation.name)["example"]
        return f"{example}\n\n{evaluation.render(summary)}\n\nin {self.run.folder}"

    def record(self, evaluation: Evaluation, scores: ByAlpha) -> None:
        """Write the tables of scores that were measured already, in place of what is on disk."""
        stage = self.run.restart(evaluation.name, self._settings(evaluation), self._inputs())
        stage.done(self._write(evaluation, scores), example=evaluation.example(scores))

    def measure(self, evaluation: Evaluation) -> dict[float, Scores]:
        """Scores at every strength; the base's depend on no vector and are computed once per model."""
        results = {}
        for alpha in self.alphas:
            say(f"{evaluation.name} at alpha {alpha:+g}")
            if alpha == 0:
                results[alpha] = self._base_scores(evaluation)
                continue
            with steer(self.model, self.vector, alpha):
                results[alpha] = evaluation.ask()
        return results

    def _settings(self, evaluation: Evaluation) -> dict[str, Any]:
        return {"alphas": self.alphas, "n_bootstrap": self.options.n_bootstrap, **evaluation.identity}

    def _inputs(self) -> dict[str, str]:
        return {"vector": sha256_json(dict(self.vector.recipe))}

    def _write(self, evaluation: Evaluation, scores: ByAlpha) -> list[Path]:
        tables = evaluation.tables(scores).items()
        folder, identity = self.run.folder, evaluation.identity
        return [write_csv(folder / f"{evaluation.name}_{n}.csv", [r | identity for r in rows]) for n, rows in tables]

    def _base_scores(self, evaluation: Evaluation) -> Scores:
        model = str(self.model.name_or_path)
        mark = f"{fingerprint(self.model)}-{str(self.model.dtype)[6:]}"
        file = self.options.out / "base" / slug(model) / f"{evaluation.name}-{evaluation.digest}-{mark}.json"
        with lock(file):  # runs side by side need the same scores: one computes them, the others wait
            if file.is_file():
                return {k: np.array(v) for k, v in json.loads(file.read_text(encoding="utf-8")).items()}
            scores = evaluation.ask()
            write_json(file, {k: np.asarray(v).tolist() for k, v in scores.items()})
        return scores


def open_context(options: EvalOptions) -> EvalContext:
    """Load what an evaluation needs; `WsError` when the run has no vector, or the vector is of another base."""
    options.check()
    o = options
    opened = open_run(o.out, o.behavior, o.adapter, o.seed, o.model, o.device, o.dtype)
    in_units = any(isinstance(alpha, str) for alpha in o.alphas)
    alphas = parse_alphas(o.alphas, calibration_of(opened) if in_units else None)
    return EvalContext(replace(o, alphas=alphas), opened.model, opened.tok, opened.vector, opened.run)
