"""What the commands that measure a finished run can be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from ws.behaviors import SPLITS, behavior_name
from ws.errors import WsError, choose, require_count, require_distinct, require_resamples, require_seed
from ws.files.runs import DEFAULT_OUT
from ws.options.shared import (
    INTERVENTIONS,
    N_PROMPTS,
    N_TOKENS,
    WEIGHT,
    CalibrationConfig,
    EvalOptions,
    NamesModel,
    RunOptions,
    require_steered,
    shared_with,
)

# Configurations of the published sets.
DILEMMAS, VIGNETTES = "model_eval", "airisk"
# Capability: of each text, and of each answer to a neutral question.
TEXT_TOKENS, ANSWER_TOKENS = 512, 128
# Arithmetic: of an answer that is to be a number alone, and of the thought before the other one.
NUMBER_TOKENS, SOLUTION_TOKENS = 32, 256
NO_PERSONA = "A plain text of the harness has no place for a persona: --interventions prompt needs --chat."


def _require_own(dataset: str | None, split: str, items: str) -> None:
    """`WsError` where a split is asked for of items that are not the behaviour's own."""
    if dataset is not None and split != "report":
        raise WsError(f"--split {split}: only a behaviour's own {items} are split; leave it out with --dataset.")


@dataclass(frozen=True)
class SycophancyOptions(EvalOptions):
    """Measure agreement with held-out false and true claims.

    Attributes:
        split: which of the behaviour's held-out claims: `report`, or `dev` for making choices on.
    """

    split: str = "report"

    def check(self) -> None:
        """`WsError` for numbers that make no sense, and for a split of what has none."""
        super().check()
        _require_own(self.dataset, self.split, "claims")


@dataclass(frozen=True)
class AiriskOptions(EvalOptions):
    """Measure which action a model takes in AIRiskDilemmas, by the values behind it.

    Attributes:
        value_class: which of the 16 classes of values labels the dilemmas.
        protocol: `explicit`, or `alone`, the published arrangement, in our words unless `--prompts` gives others.
        config: of the data set: `model_eval`, or another that has its columns, such as `full`.
        revision: of the data set on the hub: a branch, tag or commit; the pinned one unless given.
    """

    value_class: str = "Truthfulness"
    protocol: str = "explicit"
    config: str = DILEMMAS
    revision: str | None = None


@dataclass(frozen=True)
class TinymfvOptions(EvalOptions):
    """Measure how wrong a model finds what somebody does (tiny-mfv, airisk).

    Attributes:
        config: which vignettes: `airisk`, or what its successor publishes, `classic`, `scifi` and `ai-actor`.
        revision: of the data set on the hub: a branch, tag or commit; the main branch unless given.
    """

    config: str = VIGNETTES
    revision: str | None = None


@dataclass(frozen=True)
class PreferenceOptions(EvalOptions):
    """Measure which of two given answers is likelier, on held-out questions.

    Attributes:
        split: which of the held-out questions: `report`, or `dev` for making choices on.
    """

    split: str = "report"

    def check(self) -> None:
        """`WsError` for numbers that make no sense, and for what a given answer has no place for."""
        super().check()
        if self.n_think:
            raise WsError(f"--n-think {self.n_think}: nothing is thought before an answer that is given.")
        if self.prompts:
            raise WsError("--prompts: a preference is asked for in the question's own words; there are no others.")


@dataclass(frozen=True)
class StatementOptions(EvalOptions):
    """Measure whether a model would say what somebody with a trait would (model-written evals).

    Attributes:
        traits: whose statements, by the names of their files, such as `agreeableness`; those that the behaviour names
            in `[statements]` unless given.
        revision: of the data set on the hub: a branch, tag or commit; the main branch unless given.
    """

    traits: tuple[str, ...] = ()
    revision: str | None = None


@dataclass(frozen=True)
class AnswerOptions(EvalOptions):
    """Measure what a vector does to free answers to held-out questions, by judges.

    Attributes:
        judges: who rates the answers, one or two of: a local model (a folder, a hub id, `pocket`, `smollm2`),
            `MODEL@URL` for an OpenAI-compatible address; and `lexical`, which counts instead of rating.
        pairwise: also show the judges every answer beside the base's, in both orders.
        anyway: use a judge that does not tell answers of known kind apart; the tables say so.
        split: which of the behaviour's held-out questions: `report`, or `dev` for making choices on.
        max_new_tokens: tokens after which an answer is cut off.
        temperature: of the answers; 0 takes the most probable token of every step.
        sample_seed: of the random numbers at temperatures above 0, the same ones at every strength.
        judge_max_tokens: room for a reply of a judge behind an address; one that thinks needs more.
    """

    judges: tuple[str, ...] = ("lexical",)
    pairwise: bool = False
    anyway: bool = False
    split: str = "report"
    max_new_tokens: int = ANSWER_TOKENS
    temperature: float = 0.0
    sample_seed: int = 0
    judge_max_tokens: int = 16

    def check(self) -> None:
        """`WsError` for numbers that make no sense, and for options that have no meaning here."""
        super().check()
        require_count("--max-new-tokens", self.max_new_tokens, 1)
        require_count("--judge-max-tokens", self.judge_max_tokens, 1)
        require_seed(self.sample_seed, "--sample-seed")
        choose("split", self.split, SPLITS)
        _require_own(self.dataset, self.split, "questions")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise WsError(f"--temperature must be 0 or more, not {self.temperature}.")
        raters = [name for name in self.judges if name != "lexical"]
        if not self.judges or len(set(self.judges)) != len(self.judges) or len(raters) > 2:
            raise WsError(f"--judges must name one or two judges, each once, not {' '.join(self.judges) or 'none'}.")
        if self.pairwise and not raters:
            raise WsError("--pairwise needs a judge that rates; `lexical` only counts.")
        if self.n_think or self.prompts:
            raise WsError("Open answers take neither --n-think nor --prompts; the behaviour's [rubric] has the words.")


@dataclass(frozen=True)
class TruthfulqaOptions(EvalOptions):
    """Measure how much of the probability lies on true answers (TruthfulQA, MC1 and MC2).

    Attributes:
        config: of the data set on the hub: `multiple_choice`, or `generation`, which has categories.
        revision: of the data set on the hub: a branch, tag or commit; the main branch unless given.
    """

    config: str = "multiple_choice"
    revision: str | None = None

    def check(self) -> None:
        """`WsError` for numbers that make no sense, and for what a given answer has no place for."""
        super().check()
        if self.n_think:
            raise WsError(f"--n-think {self.n_think}: nothing is thought before an answer that is given.")


@dataclass(frozen=True)
class ArithmeticOptions(EvalOptions):
    """Measure how often a sum or a word problem is solved, at once and after a thought (GSM8K, or plain sums).

    Attributes:
        n_tokens: tokens of an answer, at most; of a thought there are `--n-think`, 256 unless given.
        revision: of the data set on the hub: a branch, tag or commit; the main branch unless given.
    """

    n_tokens: int = NUMBER_TOKENS
    revision: str | None = None

    def check(self) -> None:
        """`WsError` for numbers that make no sense."""
        super().check()
        require_count("--n-tokens", self.n_tokens, 1)
        if self.n_think == 0:
            raise WsError("--n-think 0: the answer without a thought is asked for anyway; give a thought some tokens.")


@dataclass(frozen=True)
class CapabilityOptions(EvalOptions):
    """Measure what steering costs on neutral text and neutral questions.

    Attributes:
        questions: a file of neutral questions, one per line, or a table with the column `question`; ours unless given.
        max_tokens: tokens of each text, at most.
        n_tokens: tokens of each answer, at most.
        config: of a hub data set given as `--dataset`.
        split: of a hub data set given as `--dataset`.
    """

    former: ClassVar[Mapping[str, str]] = {"--config": "--dataset-config", "--split": "--dataset-split"}

    questions: str | None = None
    max_tokens: int = TEXT_TOKENS
    n_tokens: int = ANSWER_TOKENS
    config: Annotated[str, tyro.conf.arg(name="dataset-config")] = "default"
    split: Annotated[str, tyro.conf.arg(name="dataset-split")] = "test"

    def check(self) -> None:
        """`WsError` for numbers that make no sense and for options that have no meaning here."""
        super().check()
        require_count("--max-tokens", self.max_tokens, 2)
        require_count("--n-tokens", self.n_tokens, 1)
        if self.n_think or self.prompts:
            raise WsError("The capability evaluation takes neither --n-think nor --prompts; it asks plain questions.")


@dataclass(frozen=True)
class LmEvalOptions(EvalOptions):
    """Run tasks of lm-evaluation-harness at every strength.

    Attributes:
        tasks: names of tasks, groups or tags of the harness.
        include_path: a folder with tasks of your own, which come before the harness's.
        num_fewshot: examples in the prompt; each task's own number unless given.
        chat: put the prompts into the model's chat template, as everywhere else: thinking off, and without a template a
            plain transcript.
    """

    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    num_fewshot: int | None = None
    chat: bool = False

    def require(self) -> None:
        """`WsError` unless the run is there; a table of the base alone says something, too."""
        RunOptions.require(self)

    def check(self) -> None:
        """`WsError` for options that make no sense, before anything is loaded."""
        super().check()
        if not self.tasks:
            raise WsError("--tasks must name at least one task of the harness; `lm-eval ls tasks` lists them.")
        if len(set(self.tasks)) != len(self.tasks):
            raise WsError(f"--tasks names a task twice: {' '.join(self.tasks)}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise WsError(f"--num-fewshot must be 0 or more, not {self.num_fewshot}.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise WsError(f"--include-path: there is no folder {self.include_path}.")
        if "prompt" in self.interventions and not self.chat:
            raise WsError(NO_PERSONA)
        if self.n_think or self.prompts or self.dataset:
            raise WsError("A harness task brings its own data and prompts: leave --dataset, --prompts, --n-think out.")


@dataclass(frozen=True)
class CalibrateOptions(RunOptions):
    """Find the strengths that cost a given divergence, and store them with the vector.

    Attributes:
        intervention: what is calibrated: `weight`, the vector, or a baseline such as `activation` (`ws compare --help`
            names them); of those without a dial the divergence is reported.
        n_prompts: questions that strengths are solved for on, at most; as many others check the result.
        n_tokens: tokens of each answer that divergence is measured over, at most.
        target: the divergence to reach, in nats.
        batch_size: answers at a time; as many as fit unless given.
        fresh: measure again and replace what is stored, also where it was made with other settings.
    """

    intervention: str = WEIGHT
    n_prompts: int = N_PROMPTS
    n_tokens: int = N_TOKENS
    target: float = 1.0
    batch_size: int | None = None
    fresh: bool = False

    @property
    def config(self) -> CalibrationConfig:
        """The settings of the calibration."""
        return CalibrationConfig(self.n_prompts, self.n_tokens, self.target, batch_size=self.batch_size)


@dataclass(frozen=True)
class SideBySideOptions(NamesModel):
    """Several runs of a behaviour, and what stands beside them: what commands on interventions take.

    Attributes:
        model: the model to steer; by default the base that the vector was made for.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapters: adapter families, signed runs as `<adapter>-signed`; all that have a finished run unless given.
        seeds: of the runs; each adapter must have them all.
        out: the folder of all runs and results.
        interventions: what stands side by side: `weight` (the vector), `finetune`, `positive-only`, `negative-only`,
            `gradient`, `gradient-low-rank`, `prompt`, `activation`, `activation-everywhere`, `activation-layers`,
            `activation-layers-everywhere`.
        n_prompts: of calibrations that are not stored yet: questions that strengths are solved for on, at most; as many
            others check the result.
        target: of calibrations that are not stored yet: the divergence to reach, in nats.
        n_draws: random vectors per run; 0 for none.
        batch_size: prompts per forward pass; as many as fit unless given.
        dataset: where published sets come from: a hub id, a local folder or file, or `pocket`; the published ones
            unless given.
        n_bootstrap: resamples per interval.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
    """

    model: str | None = None
    behavior: str = "honesty"
    adapters: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    out: Path = DEFAULT_OUT
    interventions: tuple[str, ...] = INTERVENTIONS
    n_prompts: int = N_PROMPTS
    target: float = 1.0
    n_draws: int = 20
    batch_size: int | None = None
    dataset: str | None = None
    n_bootstrap: int = 10_000
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """`WsError` for names and numbers that make no sense."""
        for name in self.interventions:
            choose("intervention", name, INTERVENTIONS)
        require_count("--n-draws", self.n_draws, 0)
        require_count("--batch-size", self.batch_size, 1)
        require_resamples(self.n_bootstrap)
        if not (self.interventions and self.seeds):
            raise WsError("--interventions and --seeds must each name at least one.")
        for option in ("interventions", "adapters", "seeds"):
            require_distinct(f"--{option}", getattr(self, option))
        self.calibration.check()

    @property
    def calibration(self) -> CalibrationConfig:
        """How strengths are matched."""
        return CalibrationConfig(n_prompts=self.n_prompts, target=self.target, batch_size=self.batch_size)

    @property
    def folder(self) -> Path:
        """Where the tables go."""
        return self.out / behavior_name(self.behavior)

    def eval_options(self, adapter: str, seed: int) -> EvalOptions:
        """One run, for an `EvalContext`."""
        single_run = {"adapter": adapter, "seed": seed, "alphas": ("calibrated",), "interventions": (WEIGHT,)}
        return shared_with(EvalOptions, self, **single_run)


@dataclass(frozen=True)
class CompareOptions(SideBySideOptions):
    """Compare every way of steering at the same cost, beside its nulls.

    Attributes:
        evals: `sycophancy`, `tinymfv_airisk`, `airisk`, `preference`, `statements`, `answers`, `truthfulqa`,
            `arithmetic`.
        traits: traits whose statements are asked, such as `agreeableness`; the behaviour's own unless given.
        judges: who rates free answers, one or two, as `ws eval answers` takes them; needed for those alone.
        board: also how selective everything is on a board of `ws profile`: `anthropic`, `pocket`, `moral`, or a folder
            with a file of statements per trait. The targets are the behaviour's own.
        capability: also measure what it costs on neutral text.
        split: which held-out claims and questions: `report`, or `dev` for making choices on.
        limit: at most so many items, a draw by a fixed seed, even over groups; all unless given.
    """

    evals: tuple[str, ...] = ("sycophancy", "tinymfv_airisk")
    traits: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    board: str | None = None
    capability: bool = True
    split: str = "report"
    limit: int | None = None

    def check(self) -> None:
        """`WsError` for names and numbers that make no sense."""
        super().check()
        require_count("--limit", self.limit, 1)
        choose("split", self.split, SPLITS)
        if not self.evals:
            raise WsError("--evals must name at least one.")


@dataclass(frozen=True)
class ProfileOptions(SideBySideOptions):
    """Show what else a vector moves: a board of traits, each beside what random and shuffled vectors do to it.

    Attributes:
        board: `anthropic` (the 135 traits of model-written evals, from `--dataset` or the hub), `pocket` (bundled, for
            the bundled model), `moral` (the foundations of tiny-mfv), or a folder with a file of statements per trait;
            `pocket` on a bundled model and `anthropic` on others unless given.
        traits: the traits of the board that the vector is meant to move; those that the behaviour names in
            `[statements]`, or else its own held-out items, unless given.
        n_items: statements per trait, at most: half of them matched by Yes, where the set has as many.
        alphas: steering strengths; 0, the base, is always included. In calibrated units as `+1u`, which are solved for
            where they are not on record, and `calibrated` for both of those.
        interventions: what is profiled: `weight` (the vector), `finetune`, `positive-only`, `negative-only`,
            `gradient`, `gradient-low-rank`, `prompt`, `activation`, `activation-everywhere`, `activation-layers`,
            `activation-layers-everywhere`.
        n_draws: random vectors per run; 0 for none, and then no trait counts as moved.
        prompts: a TOML file that replaces the words around a statement, such as the published ones.
        revision: of the data set on the hub: a branch, tag or commit; the main branch unless given.
    """

    board: str | None = None
    traits: tuple[str, ...] = ()
    n_items: int = 40
    alphas: tuple[float | str, ...] = ("calibrated",)
    interventions: tuple[str, ...] = (WEIGHT,)
    n_draws: int = 5
    prompts: Path | None = None
    revision: str | None = None

    def check(self) -> None:
        """`WsError` for names and numbers that make no sense."""
        super().check()
        require_count("--n-items", self.n_items, 4)
        require_steered(self.alphas)
