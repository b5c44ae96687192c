"""What the commands that check behaviours and results can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from ws.behaviors import behavior_file
from ws.errors import WsError, require_count, require_distinct
from ws.files.runs import DEFAULT_OUT
from ws.options.measure import SycophancyOptions
from ws.options.shared import HeadlineOptions, NamesModel, require_steered


@dataclass(frozen=True)
class CheckOptions(NamesModel):
    """List all that is wrong with a behaviour file; the exit code is 2 when it cannot be used.

    Attributes:
        file: the TOML file, or the name of a bundled behaviour.
        model: also check the texts against this model's chat template and tokenizer, whether it can do what the
            behaviour asks of a base, and how far it acts the personas.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
    """

    file: tyro.conf.Positional[str]
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def require(self) -> None:
        """`WsError` unless the file is there."""
        behavior_file(self.file)


@dataclass(frozen=True)
class ControlOptions(HeadlineOptions):
    """Compare a run's shifts with those of random vectors of the same size.

    Attributes:
        n_draws: random vectors; more can be added later.
        alphas: steering strengths other than 0; in calibrated units as `+1u`, too.
        scores: which headline scores: `false_claims`, `true_claims`, `wrongness`, `choices`, `preference`,
            `statements`, `judged_trait`, `judged_coherence`, `mc2`, `mc1`, `direct_accuracy`.
    """

    n_draws: int = 20
    alphas: tuple[float | str, ...] = (-1.0, 1.0)
    scores: tuple[str, ...] = ("false_claims", "true_claims")

    def check(self) -> None:
        """`WsError` for numbers that make no sense."""
        require_count("--n-draws", self.n_draws, 2)


@dataclass(frozen=True)
class ConfoundOptions(SycophancyOptions):
    """Look for what else could have made a run's shifts: agreement, option position, length, refusals, repetition.

    Attributes:
        n_questions: at most so many of the behaviour's questions are answered freely, of those that a calibration with
            its default settings does not use.
        max_new_tokens: tokens after which an answer is cut off.
        n_dilemmas: so many AIRiskDilemmas, drawn as with `--limit`, are asked in both orders, for the option's place; 0
            for none.
        value_class: which class of values labels the dilemmas.
    """

    n_questions: int = 30
    max_new_tokens: int = 128
    n_dilemmas: int = 40
    value_class: str = "Truthfulness"

    def check(self) -> None:
        """`WsError` for numbers that make no sense, before anything is loaded."""
        super().check()
        require_count("--n-questions", self.n_questions, 2)
        require_count("--max-new-tokens", self.max_new_tokens, 1)
        require_count("--n-dilemmas", self.n_dilemmas, 0)
        if self.n_dilemmas == 1:
            raise WsError("--n-dilemmas: one dilemma has no interval; give at least 2, or 0 for none.")
        require_steered(self.alphas)


@dataclass(frozen=True)
class SlopeOptions(HeadlineOptions):
    """Compute the slope at alpha 0 of a run's scores, from gradients alone."""


@dataclass(frozen=True)
class MonitorOptions(NamesModel):
    """Measure how far fine-tunes have moved along known behaviours, beside benign fine-tunes.

    Attributes:
        changes: adapter folders, saved vectors, or full checkpoints (folders or hub ids).
        library: folders of steering vectors of one base.
        controls: benign fine-tunes, given like the changes; without them the null is random directions.
        model: the base; the one that the library was made for unless given.
        fpr: the probability that a benign fine-tune is flagged for any behaviour.
        profile: also ask every fine-tune a board of `ws profile` (`anthropic`, `pocket`, `moral`, or a folder with a
            file of statements per trait): which traits it has moved, and how far the directions of the library say so.
        dataset: where the board's items come from: a hub id or a local folder; the published ones unless given.
        n_items: statements per trait, at most.
        out: where the tables go.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
    """

    former: ClassVar[Mapping[str, str]] = {"--controls": "--benign"}

    changes: tyro.conf.Positional[tuple[str, ...]]
    library: tuple[Path, ...]
    controls: Annotated[tuple[str, ...], tyro.conf.arg(name="benign")] = ()
    model: str | None = None
    fpr: float = 0.05
    profile: str | None = None
    dataset: str | None = None
    n_items: int = 40
    out: Path = DEFAULT_OUT / "monitor"
    dtype: str = "auto"

    def check(self) -> None:
        """`WsError` for what cannot be read."""
        if not self.changes:
            raise WsError("There is nothing to monitor; give an adapter folder, a saved vector or a checkpoint.")
        require_count("--n-items", self.n_items, 4)
        require_distinct("--benign", [_place(c) for c in self.controls])
        both = {_place(c) for c in self.changes} & {_place(c) for c in self.controls}
        if both:
            raise WsError(f"A fine-tune cannot be its own control: {', '.join(sorted(both))}.")


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name
