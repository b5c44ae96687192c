"""What the commands that make pairs, adapters and vectors can be told, and the defaults for known models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from ws.behaviors import SPLITS, behavior_file
from ws.errors import (
    MOST,
    WsError,
    choose,
    require_count,
    require_distinct,
    require_resamples,
    require_seed,
    require_strength,
    shortened,
)
from ws.files.runs import DEFAULT_MODEL, DEFAULT_OUT, DEMO_OUT, run_folder
from ws.options.shared import (
    ADAPTERS,
    N_PROMPTS,
    N_THINK,
    N_TOKENS,
    CalibrationConfig,
    EvalOptions,
    NamesModel,
    RunOptions,
    require_steered,
    shared_with,
)

SIGNS, SIGNED = ("pos", "neg"), "signed"
CONTRASTS = {"arms": SIGNS, SIGNED: (SIGNED,)}  # what is trained for each
LIKELIHOOD, MARGIN = OBJECTIVES = ("likelihood", "margin")
# Ways to learn from examples that hold an unwanted trait.
PLAIN, WAYS = "plain", ("vector", "subtract", "prompt")
BACKENDS = ("local", "pueue", "ray")
# Whom losses are reported to, each with the packages of which transformers needs one.
REPORTERS = {"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}
# Strengths of a first reading.
ALPHAS = (-2.0, -1.0, 0.0, 1.0, 2.0)
# What sweeps do by themselves; the others need items that not every behaviour brings.
DEFAULT_EVALS = ("sycophancy", "airisk", "tinymfv_airisk")
UNRECORDED = ("recompute", "report_to")  # settings of a training that the adapter does not depend on
MIN_VALIDATION = 8  # with fewer examples a loss that rises says nothing
# What `ws tune` can vary; `ws.sweep.tune` knows the values of each.
TUNABLE = ("lr", "rank", "layers", "delora_lambda", "kl", "objective", "contrast")
# One question in so many is not sampled unless asked for: strengths are calibrated on what no vector was trained on.
RESERVE = 5


def questions_asked(available: int) -> int:
    """How many of a behaviour's questions are sampled by default: all but every fifth."""
    return available - available // RESERVE


def held_out(n: int, share: float) -> int:
    """How many of `n` questions are held out for validation: a share of them, or none where that is all or nothing."""
    held = round(share * n)
    return 0 if held == n else held


class _OfBehavior(NamesModel):
    """Options of a command that starts from a behaviour."""

    behavior: str
    model: str

    def require(self) -> None:
        """`WsError` unless there is a file of the behaviour, or pairs are brought that make one."""
        if getattr(self, "pairs", None) is None:
            behavior_file(self.behavior, self.model)


@dataclass(frozen=True)
class DataConfig:
    """How many pairs to sample, and how.

    Attributes:
        n_topics: questions to use, evenly spread over the pool. Unless given, or with more than there are, every fifth
            is left out for calibration and its audit; the exact number of all questions leaves none.
        n_personas: persona pairs to use; all unless given.
        n_samples: answers per question and persona, on each side.
        max_new_tokens: tokens of an answer; those that have not ended by then are dropped as truncated.
        temperature: of the sampling; the model's own unless given, or 0.7 where it brings none.
        top_p: share of probability that tokens are drawn from; the model's own unless given, or 0.9 where it brings
            none.
        data_batch: so many pairs at once by `generate`, from one stream of random numbers; unless given the size is
            found, and answers depend on the data seed, the pair and the side alone.
        data_seed: seed of the sampling.
        judge: drop pairs in which the model itself does not find more of the behaviour in the positive answer.
        min_margin: drop pairs in which an answer gains less than so many nats per token from its own persona.
        keep_truncated: train on answers that have not ended, without an end of turn, instead of dropping them.
        anyway: go on where the base cannot do what the behaviour asks of it.
    """

    n_topics: int | None = None
    n_personas: int | None = None
    n_samples: int = 4
    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    data_batch: int | None = None
    data_seed: int = 0
    judge: bool = False
    min_margin: float | None = None
    keep_truncated: bool = False
    anyway: bool = False


def data_preset(model: str) -> DataConfig:
    """The defaults for a model; the bundled ones answer in a few tokens and need fewer samples."""
    if model == "tiny-random":
        return DataConfig(n_topics=16, n_samples=1, max_new_tokens=64, data_batch=8, anyway=True)
    if model == "pocket":
        return DataConfig(n_topics=400, n_samples=2, max_new_tokens=64, data_batch=200)
    if model == "smollm2":
        return DataConfig(n_topics=96, n_samples=1, max_new_tokens=64)
    return DataConfig()


@dataclass(frozen=True)
class DataCommand(_OfBehavior):
    """Sample contrast pairs for a behaviour, into `<out>/data/<model>/<behavior>/`.

    Attributes:
        model: a hub id, a local folder, a GGUF file, `pocket`, `smollm2` or `tiny-random`.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        pairs: bring the pairs: a JSONL, CSV or Parquet file, or a hub id, with a question and an answer of either side.
        columns: what the columns of `--pairs` are called, as `question:prompt positive:good negative:bad`.
        out: the folder of all runs and results.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        fresh: start over, forgetting what is on disk.
        data: how many pairs, and how.
    """

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    pairs: str | None = None
    columns: tuple[str, ...] = ()
    out: Path = DEFAULT_OUT
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    data: DataConfig = field(default_factory=DataConfig)

    @classmethod
    def preset(cls, model: str = DEFAULT_MODEL) -> DataCommand:
        """The defaults for a model."""
        return cls(model=model, data=data_preset(model))


@dataclass(frozen=True)
class TrainConfig:
    """How an arm is trained.

    Attributes:
        rank: columns of lora, dora, pissa and delora; oft and ia3 have none.
        lora_alpha: LoRA's own scale is `lora_alpha / rank`; it is baked into the vector and is not the steering
            strength.
        layers: decoder layers to train: a part of the depth (`0.3:0.8`), numbers (`4:12`, `3,4,5`) or `all`.
        kinds: modules to train, by their last names, such as `q_proj v_proj`; the family's default unless given.
        delora_lambda: bound on the relative size of a DeLoRA change.
        oft_block: size of OFT's rotation blocks; it must divide the input size of every module.
        lr: peak learning rate, linear decay to zero after the warm-up; the family's own unless given.
        weight_decay: of AdamW.
        warmup: steps, never more than a tenth of all steps.
        batch: examples per optimiser step, all processes together.
        micro_batch: examples per pass of a process, at most; times the number of processes it must divide `batch`.
        epochs: passes over the training examples.
        max_steps: optimiser steps; overrides `epochs`, except that a preset's give way to `epochs` that are asked for.
        max_length: tokens of an example; a pair with a longer one is left out of both arms, never cut.
        validation: share of the questions held out to watch the loss.
        objective: `likelihood` of the side's own answer, or the `margin` between the two answers of a pair (DPO).
        beta: how steeply the loss falls with the margin, per nat of an answer.
        kl: weight of a penalty on the divergence from the base, in nats per token of an answer; 0 for none.
        keep: the checkpoint with the `best` validation loss, or the `last`.
        recompute: of a layer's activations, keep all (`none`), drop what is `cheap` to compute again for the gradients,
            or drop `all`: less memory, the same adapter.
        report_to: who is told of the losses: `trackio`, `wandb`, `tensorboard`.
    """

    rank: int = 32
    lora_alpha: float = 64.0
    layers: str = "0.3:0.8"
    kinds: Annotated[tuple[str, ...] | None, tyro.conf.arg(name="modules")] = None
    delora_lambda: float = 15.0
    oft_block: int = 32
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: int = 5
    batch: int = 16
    micro_batch: int = 4
    epochs: float = 1.0
    max_steps: int | None = None
    max_length: int = 1024
    validation: float = 0.1
    objective: str = LIKELIHOOD
    beta: float = 0.1
    kl: float = 0.0
    keep: str = "last"
    recompute: str = "none"
    report_to: tuple[str, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """The settings as a run has them on record.

        Those that came later are left out while they do nothing, so that what was trained before them is not taken for
        something else; so are those that the adapter does not depend on, which may change when a training goes on.
        """
        later = {"objective": LIKELIHOOD, "kl": 0.0, **{name: getattr(self, name) for name in UNRECORDED}}
        later |= {"beta": self.beta} if self.objective == LIKELIHOOD else {}
        return {name: value for name, value in asdict(self).items() if later.get(name, ...) != value}

    def check(self) -> None:
        """Raise `WsError` for settings that cannot be trained with."""
        positive = {"--batch": self.batch, "--micro-batch": self.micro_batch, "--epochs": self.epochs}
        positive |= {"--lr": 1.0 if self.lr is None else self.lr, "--max-length": self.max_length, "--beta": self.beta}
        positive |= {"--max-steps": 1 if self.max_steps is None else self.max_steps}
        positive |= {"--lora-alpha": self.lora_alpha, "--delora-lambda": self.delora_lambda}
        for flag, value in positive.items():
            if not 0 < value <= MOST:
                raise WsError(f"{flag} must be positive and at most {MOST}, not {shortened(value)}.")
        if self.batch % self.micro_batch:
            raise WsError(f"--micro-batch {self.micro_batch} must divide --batch {self.batch}.")
        for flag, value in {"--kl": self.kl, "--weight-decay": self.weight_decay, "--warmup": self.warmup}.items():
            if not 0 <= value <= MOST:
                raise WsError(f"{flag} must be 0 or positive and at most {MOST}, not {shortened(value)}.")
        if not 0 <= self.validation < 1:
            raise WsError(f"--validation must be in [0, 1), not {self.validation}.")
        choose("--objective", self.objective, OBJECTIVES)
        choose("--keep", self.keep, ("best", "last"))
        if self.keep == "best" and not self.validation:
            raise WsError("--keep best goes by the validation loss; give --validation a share, or --keep last.")
        choose("--recompute", self.recompute, ("none", "cheap", "all"))
        for name in self.report_to:
            packages = REPORTERS[choose("--report-to", name, REPORTERS)]
            if not any(find_spec(package) for package in packages):
                raise WsError(f"--report-to {name} needs the package {packages[0]}, which is not installed.")

    def at_rank(self, rank: int) -> TrainConfig:
        """The same with another rank and LoRA's own scale, `lora_alpha / rank`, as it is."""
        return replace(self, rank=rank, lora_alpha=self.lora_alpha * rank / self.rank)

    def accumulation(self, processes: int) -> int:
        """Forward passes of each process per optimiser step: `batch / (micro_batch * processes)`.

        Raises:
            WsError: that is not a whole number; the message names the largest `micro_batch` for which it is.
        """
        if self.batch % (self.micro_batch * processes) == 0:
            return self.batch // (self.micro_batch * processes)
        share, rest = divmod(self.batch, processes)
        what = f"--batch {self.batch} is not a multiple of {processes} processes x --micro-batch {self.micro_batch}"
        if rest:
            raise WsError(f"{what}; use a number of processes that divides {self.batch}, or another --batch.")
        fits = max(m for m in range(1, min(self.micro_batch, share) + 1) if share % m == 0)
        raise WsError(f"{what}; use --micro-batch {fits}.")


# Chosen on the pocket model's dev claims: every family is monotone in alpha over [-2, 2] with these.
_POCKET = TrainConfig(
    rank=8, lora_alpha=16.0, layers="all", delora_lambda=1.0, batch=32, micro_batch=32, epochs=2.0, lr=5e-4
)
_POCKET_RATES = {"pissa": 3e-4, "oft": 2e-4, "ia3": 7e-3, "delora": 1e-3}
# Twelve steps are what a laptop has time for. Rates were chosen on dev questions (`just bench smollm2_rates`).
_SMOLLM2 = TrainConfig(batch=8, micro_batch=8, max_steps=12, delora_lambda=0.15)
_SMOLLM2_RATES = {"ia3": 2.5e-2, "oft": 1.25e-4, "dora": 4e-4, "lora": 4e-4, "pissa": 1e-4}
_SMOKE = replace(_POCKET, rank=4, lora_alpha=8.0, batch=4, micro_batch=4, max_steps=6, lr=5e-3, oft_block=16)


def train_preset(model: str, adapter: str, epochs: float | str | None = None) -> TrainConfig:
    """The defaults for a model: the bundled ones are far smaller than real models and have presets of their own.

    Where `epochs` are asked for, no steps are counted: those of a preset would override them.
    """
    preset = TrainConfig()
    if model == "tiny-random":
        preset = replace(_SMOKE, lr=2e-2) if adapter == "ia3" else _SMOKE
    elif model == "pocket":
        preset = replace(_POCKET, lr=_POCKET_RATES.get(adapter, _POCKET.lr))
    elif model == "smollm2":
        preset = replace(_SMOLLM2, lr=_SMOLLM2_RATES.get(adapter))
    return preset if epochs is None else replace(preset, max_steps=None)


@dataclass(frozen=True)
class TrainCommand(_OfBehavior):
    """Train the arms of a contrast on pairs made by `ws data`, into `<out>/<behavior>/<adapter>/{pos,neg}`.

    With `--contrast signed` it is one adapter, in `<out>/<behavior>/<adapter>-signed/signed`.

    Attributes:
        model: a hub id, a local folder, a GGUF file, `pocket`, `smollm2` or `tiny-random`.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapter: the adapter family: `ia3`, `oft`, `dora`, `lora`, `pissa`, `delora`, or one that you have registered.
        signs: which arms: `pos`, `neg` or both.
        contrast: `arms`, two adapters, or `signed`, one whose change is learned with +1 on positive answers and with -1
            on negative ones.
        out: the folder of all runs and results.
        seed: of initialisation, order and validation split; the same for both arms.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        fresh: start over, forgetting what is on disk.
        train: how an arm is trained.
    """

    former: ClassVar[Mapping[str, str]] = {"--kinds": "--modules"}

    several_processes: ClassVar[bool] = True

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    adapter: str = "lora"
    signs: tuple[str, ...] = SIGNS
    contrast: str = "arms"
    out: Path = DEFAULT_OUT
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def preset(
        cls, model: str = DEFAULT_MODEL, adapter: str = "lora", epochs: float | str | None = None
    ) -> TrainCommand:
        """The defaults for a model and an adapter; `epochs` as in `train_preset`."""
        return cls(model=model, adapter=adapter, train=train_preset(model, adapter, epochs))

    def check(self) -> None:
        """`WsError` for arms or contrasts that do not exist, or do not go together."""
        for sign in self.signs:
            choose("sign", sign, SIGNS)
        choose("contrast", self.contrast, CONTRASTS)
        if self.contrast == SIGNED and self.signs != SIGNS:
            raise WsError("--contrast signed trains one adapter on both sides of the pairs; leave out --signs.")
        self.train.check()

    @property
    def trained(self) -> tuple[str, ...]:
        """What is trained: arms, or the signed adapter."""
        return self.signs if self.contrast == "arms" else CONTRASTS[self.contrast]


@dataclass(frozen=True)
class ReplicateConfig(_OfBehavior):
    """Train one vector, of one behaviour with one adapter, from pairs to a first reading.

    Attributes:
        model: a hub id, a local folder, a GGUF file, `pocket`, `smollm2` or `tiny-random`.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        pairs: bring the pairs: a JSONL, CSV or Parquet file, or a hub id, with a question and an answer of either side.
        columns: what the columns of `--pairs` are called, as `question:prompt positive:good negative:bad`.
        adapter: the adapter family: `ia3`, `oft`, `dora`, `lora`, `pissa`, `delora`, or one that you have registered.
        out: the folder of all runs and results.
        seed: of both arms' initialisation and order.
        alphas: steering strengths of the first reading; 0 is always included.
        split: which held-out claims and questions: `report`, or `dev` for making choices on.
        n_bootstrap: resamples per interval.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        fresh: start over, forgetting what is on disk.
        fresh_data: whether `--fresh` also samples the pairs again.
        control: `shuffled` or `same-side` makes a null vector instead, in the folder of an adapter `<adapter>-shuffled`
            or `<adapter>-same-side`, which every evaluation takes by that name.
        contrast: `arms`, two adapters, or `signed`, one whose change is learned with +1 on positive answers and with -1
            on negative ones, in the folder of an adapter `<adapter>-signed`.
        tuned: train with the settings that `ws tune` has chosen for this behaviour and adapter.
        data: how many pairs, and how.
        train: how an arm is trained.
    """

    former: ClassVar[Mapping[str, str]] = {"--kinds": "--modules"}

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    pairs: str | None = None
    columns: tuple[str, ...] = ()
    adapter: str = "lora"
    out: Path = DEFAULT_OUT
    seed: int = 0
    alphas: tuple[float, ...] = ALPHAS
    split: str = "report"
    n_bootstrap: int = 2000
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    fresh_data: bool = True
    control: str = "none"
    contrast: str = "arms"
    tuned: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def preset(
        cls, model: str = DEFAULT_MODEL, adapter: str = "lora", epochs: float | str | None = None
    ) -> ReplicateConfig:
        """The defaults for a model and an adapter; `epochs` as in `train_preset`."""
        return cls(model=model, adapter=adapter, data=data_preset(model), train=train_preset(model, adapter, epochs))

    @property
    def run_name(self) -> str:
        """The name of the adapter's folder, and of the adapter in every table."""
        name = run_name(self.adapter, self.contrast)
        return name if self.control == "none" else f"{name}-{self.control}"

    def run_folder(self, behavior: str) -> Path:
        """Where the run of a behaviour of that name goes."""
        return run_folder(self.out, behavior, self.run_name, self.seed)


@dataclass(frozen=True)
class TuneOptions(_OfBehavior):
    """Search for the training settings of an adapter on `dev` items, into `<out>/<behavior>/<adapter>/tune/`.

    The settings that are given here, or the preset, are where the search starts, and one of its candidates.

    Attributes:
        model: a hub id, a local folder, a GGUF file, `pocket`, `smollm2` or `tiny-random`.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapter: the adapter family: `ia3`, `oft`, `dora`, `lora`, `pissa`, `delora`, or one that you have registered.
        vary: what is searched, of those that the family has: `lr`, `rank` (with `lora_alpha` in proportion), `layers`,
            `delora_lambda`, `kl`, `objective`, `contrast`.
        budget: so many trainings of full length, at most, all short ones together counted by their steps.
        contrast: what the search starts from: `arms`, two adapters, or `signed`, one for both sides.
        n_prompts: questions that the strengths of a candidate are solved for on, at most; as many others check them.
        target: the divergence at which candidates are compared, in nats.
        out: the folder of all runs and results.
        seed: of the draw of candidates, and of initialisation and order of every training.
        n_bootstrap: resamples per interval.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        fresh: start over, forgetting what was measured; the pairs stay.
        data: how many pairs, and how.
        train: how an arm is trained.
    """

    former: ClassVar[Mapping[str, str]] = {"--kinds": "--modules"}

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    adapter: str = "lora"
    vary: tuple[str, ...] = TUNABLE
    budget: int = 10
    contrast: str = "arms"
    n_prompts: int = 32
    target: float = 1.0
    out: Path = DEFAULT_OUT
    seed: int = 0
    n_bootstrap: int = 2000
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def preset(
        cls, model: str = DEFAULT_MODEL, adapter: str = "lora", epochs: float | str | None = None
    ) -> TuneOptions:
        """The defaults for a model and an adapter; `epochs` as in `train_preset`."""
        return cls(model=model, adapter=adapter, data=data_preset(model), train=train_preset(model, adapter, epochs))

    def check(self) -> None:
        """`WsError` for names and numbers that make no sense."""
        if not self.vary:
            raise WsError(f"--vary must name at least one of {', '.join(TUNABLE)}.")
        for name in self.vary:
            choose("setting to vary", name, TUNABLE)
        # One for the settings that it starts from, and one for each of three lengths.
        require_count("--budget", self.budget, 4, 1000)
        choose("contrast", self.contrast, CONTRASTS)
        require_seed(self.seed)
        require_resamples(self.n_bootstrap)
        self.calibration.check()
        self.train.check()

    @property
    def calibration(self) -> CalibrationConfig:
        """How the strengths of a candidate are solved for."""
        return CalibrationConfig(n_prompts=self.n_prompts, target=self.target)

    def candidate(self, train: TrainConfig, contrast: str) -> ReplicateConfig:
        """One candidate as a run to make, to be read on `dev` items."""
        return shared_with(ReplicateConfig, self, train=train, contrast=contrast, split="dev")


def run_name(adapter: str, contrast: str) -> str:
    """The name of an adapter's folder, and of the adapter in every table: signed ones stand beside the arms."""
    return adapter if contrast == "arms" else f"{adapter}-{contrast}"


def _check_grid(adapters: Sequence[str], seeds: Sequence[int], alphas: Sequence[float]) -> None:
    if not (adapters and seeds):
        raise WsError("--adapters and --seeds must each name at least one.")
    require_distinct("--adapters", adapters)
    require_distinct("--seeds", seeds)
    for seed in seeds:
        require_seed(seed, "Each of --seeds")
    for alpha in alphas:
        require_strength(alpha, "Each of --alphas")
    require_steered(alphas)


@dataclass(frozen=True)
class SweepConfig(_OfBehavior):
    """Train and measure many vectors: adapters x seeds x evaluations on one set of pairs.

    With `--backend local`, `pueue` or `ray` it is a graph of jobs, which has options of its own
    (`ws sweep --backend local --help`).

    Attributes:
        model: a hub id, a local folder, a GGUF file, `pocket`, `smollm2` or `tiny-random`.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapters: adapter families.
        seeds: of initialisation and order; the pairs are shared by all.
        evals: evaluations of every run: `sycophancy`, `airisk`, `tinymfv_airisk`, `preference`, `statements`,
            `answers`, `truthfulqa`, `arithmetic`.
        traits: traits whose statements are asked, such as `agreeableness`; the behaviour's own unless given.
        judges: who rates free answers, one or two, as `ws eval answers` takes them; needed for those alone.
        controls: nulls to train beside every vector, `shuffled` and `same-side`; they are read on what is held out and
            stay out of the tables.
        contrast: `arms`, two adapters per vector, or `signed`, one whose change is learned with +1 on positive answers
            and with -1 on negative ones, in the folders of adapters `<adapter>-signed`.
        out: the folder of all runs and results.
        alphas: steering strengths; 0, the base, is always included.
        split: which held-out claims and questions: `report`, or `dev` for making choices on.
        dataset: where published sets come from: a hub id, a local folder or file, or `pocket`; the published ones
            unless given.
        n_think: tokens of chain of thought before the answer to a dilemma or a sum.
        limit: at most so many items of every evaluation but `sycophancy`, a draw by a fixed seed, even over groups; all
            unless given.
        batch_size: prompts per forward pass; as many as fit unless given.
        n_bootstrap: resamples per interval.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        fresh: start over, forgetting what is on disk.
        data: how many pairs, and how.
        train: settings for every family; each takes its own learning rate unless one is given.
    """

    former: ClassVar[Mapping[str, str]] = {"--kinds": "--modules"}

    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    adapters: tuple[str, ...] = ADAPTERS
    seeds: tuple[int, ...] = (0,)
    evals: tuple[str, ...] = DEFAULT_EVALS
    traits: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    contrast: str = "arms"
    out: Path = DEFAULT_OUT
    alphas: tuple[float, ...] = (-1.0, 0.0, 1.0)
    split: str = "report"
    dataset: str | None = None
    n_think: int = N_THINK
    limit: int | None = None
    batch_size: int | None = None
    n_bootstrap: int = 10_000
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def check(self) -> None:
        """`WsError` for names and numbers that make no sense, before the pairs are sampled."""
        _check_grid(self.adapters, self.seeds, self.alphas)
        shared_with(EvalOptions, self).check()
        choose("split", self.split, SPLITS)
        choose("contrast", self.contrast, CONTRASTS)
        self.train.check()

    @classmethod
    def preset(cls, model: str = DEFAULT_MODEL, epochs: float | str | None = None) -> SweepConfig:
        """The defaults for a model; `epochs` as in `train_preset`."""
        train = replace(train_preset(model, "lora", epochs), lr=None)
        return cls(model=model, data=data_preset(model), train=train)


@dataclass(frozen=True)
class QueueConfig(_OfBehavior):
    """Run a sweep as a graph of jobs: here, in pueue or on a ray cluster.

    Attributes:
        backend: `local` worker threads, a `ray` cluster, or `pueue`, which runs the jobs after this command has ended.
        model: a hub id, a local folder, a GGUF file, `pocket`, `smollm2` or `tiny-random`.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapters: adapter families.
        seeds: of initialisation and order; the pairs are shared by all.
        evals: evaluations of every run; `sycophancy` is part of a training job, and a job of its own only without one.
        traits: traits whose statements are asked, such as `agreeableness`; the behaviour's own unless given.
        judges: who rates free answers, one or two, as `ws eval answers` takes them; needed for those alone.
        out: the folder of all runs and results.
        alphas: steering strengths; 0, the base, is always included.
        dataset: where published sets come from: a hub id, a local folder or file, or `pocket`; the published ones
            unless given.
        n_bootstrap: resamples per interval.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        train_args: further options of `ws replicate`, in one string: `--train-args="--n-samples 50 --rank 16"`.
        eval_args: further options of the evaluations, in one string: `--eval-args="--limit 50"`.
        eval_only: only evaluate runs that are finished.
        dry_run: only print the jobs; for pueue a bash script.
        fresh: carry out finished jobs again, as after a change of a data set or of the model's files; what they have on
            disk they still skip, unless `--train-args=--fresh`.
        workers: local: jobs at a time; one per GPU of `--gpus` unless given, or one.
        gpus: local: GPU numbers that the workers take turns in.
        group: pueue: the group, made if it is missing.
        address: ray: a cluster's address, or `auto`; one is started on this machine unless given.
        cpus_per_job: ray: CPU cores that a job reserves.
        gpus_per_job: ray: GPUs that a job reserves; parts of one are possible.
        retries: ray: how often a job whose worker or node is lost runs again.
    """

    backend: str = "local"
    model: str = DEFAULT_MODEL
    behavior: str = "honesty"
    adapters: tuple[str, ...] = ADAPTERS
    seeds: tuple[int, ...] = (0,)
    evals: tuple[str, ...] = ("airisk", "tinymfv_airisk")
    traits: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    out: Path = DEFAULT_OUT
    alphas: tuple[float, ...] = (-1.0, 0.0, 1.0)
    dataset: str | None = None
    n_bootstrap: int = 10_000
    device: str = "auto"
    dtype: str = "auto"
    train_args: str = ""
    eval_args: str = ""
    eval_only: bool = False
    dry_run: bool = False
    fresh: bool = False
    workers: int | None = None
    gpus: tuple[int, ...] = ()
    group: str = "ws"
    address: str | None = None
    cpus_per_job: float = 1.0
    gpus_per_job: float = 0.0
    retries: int = 3

    def check(self) -> None:
        """`WsError` for a back end that does not exist and numbers out of range."""
        choose("back end", self.backend, BACKENDS)
        _check_grid(self.adapters, self.seeds, self.alphas)
        require_count("--workers", self.workers, 1)
        require_count("--cpus-per-job", self.cpus_per_job, 0)
        require_count("--gpus-per-job", self.gpus_per_job, 0)
        require_count("--retries", self.retries, 0)
        require_resamples(self.n_bootstrap)


@dataclass(frozen=True)
class DemoConfig(_OfBehavior):
    """Steer a model that is at hand offline, end to end, in a few minutes.

    Attributes:
        model: `pocket`, made for this project (a minute); or `smollm2`, a small real one (ten minutes).
        adapter: an adapter family, or `all` for the six.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        n_topics: questions to train on; the default of `ws data` unless given.
        out: the folder of its runs and results, apart from those of other commands.
        seed: of both arms.
        fresh: start over, forgetting what is on disk.
    """

    model: str = "pocket"
    adapter: str = "lora"
    behavior: str = "honesty"
    n_topics: int | None = None
    out: Path = DEMO_OUT
    seed: int = 0
    fresh: bool = False

    @classmethod
    def preset(cls, model: str = "pocket") -> DemoConfig:
        """The defaults for a model."""
        if model == "smollm2":
            return cls(model=model, behavior="truthfulness", out=DEMO_OUT / model)
        return cls(model=model)


@dataclass(frozen=True)
class InitOptions:
    """Write a commented file for your own behaviour.

    Attributes:
        name: of the behaviour: lower-case letters, digits, - and _.
        to: the file; `NAME.toml` here unless given.
        style: for a way of answering, which no claim is true or false of: measured by held-out answers in a second file
            beside it, `NAME.jsonl`.
    """

    name: tyro.conf.Positional[str]
    to: Path | None = None
    style: bool = False


@dataclass(frozen=True)
class DiffOptions:
    """Write the vector between any two full fine-tunes of one base.

    Attributes:
        pos: the fine-tune that shows the behaviour, a folder or hub id.
        neg: the fine-tune that shows its opposite; with the base itself the vector is `theta_pos - base`.
        to: the vector's folder.
        base: what both were fine-tuned from, so that the vector refuses other models.
        rank: keep so many singular directions of every matrix, and store the errors; whole matrices unless given.
        kinds: only modules with these last names, such as `q_proj`; all unless given.
        behavior: what the vector is about, for tables and cards: a bundled behaviour by its name, or the path of a TOML
            file.
    """

    former: ClassVar[Mapping[str, str]] = {"--kinds": "--modules"}

    pos: str
    neg: str
    to: Path
    base: str | None = None
    rank: int | None = None
    kinds: Annotated[tuple[str, ...] | None, tyro.conf.arg(name="modules")] = None
    behavior: str | None = None


@dataclass(frozen=True)
class ComposeOptions(NamesModel):
    """Add vectors up, and measure what they do to each other: `ws compose "honesty*1.0 + sycophancy*-0.5"`.

    Attributes:
        expression: terms `name*number` joined by + and -, where a name is a behaviour, `behavior/adapter/seed-1` or the
            path of a vector's folder, and `1u` counts the vector's calibrated units. One that begins with - comes last,
            after `--`.
        adapter: of the terms that name a behaviour alone.
        seed: of the terms that name a behaviour alone, and of the new run.
        out: the folder of all runs and results.
        to: the new run's name, for `--adapter` of every evaluation; made from the terms unless given.
        behavior: the behaviour that the new run is filed under, whose claims measure it; the first term's unless given.
        report: also measure the interference of the terms, on the claims of every term's behaviour.
        behaviors: with `--report`, the behaviours to measure instead, as names or TOML files.
        model: with `--report`, the model to steer; by default the base that the vectors were made for.
        split: with `--report`, which held-out claims and questions: `report`, or `dev` for making choices on.
        n_prompts: with `--report`, questions per behaviour that divergence is measured on, at most.
        n_tokens: with `--report`, tokens of each answer that divergence is measured over, at most.
        batch_size: prompts per forward pass; as many as fit unless given.
        limit: at most so many claims of either kind, a draw by a fixed seed; all unless given.
        n_bootstrap: resamples per interval.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        fresh: replace a run that `ws compose` made under this name with other settings.
    """

    former: ClassVar[Mapping[str, str]] = {"--to": "--name"}

    expression: tyro.conf.Positional[str]
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT
    to: Annotated[str | None, tyro.conf.arg(name="name")] = None
    behavior: str | None = None
    report: bool = False
    behaviors: tuple[str, ...] = ()
    model: str | None = None
    split: str = "report"
    n_prompts: int = N_PROMPTS
    n_tokens: int = N_TOKENS
    batch_size: int | None = None
    limit: int | None = None
    n_bootstrap: int = 10_000
    device: str = "auto"
    dtype: str = "auto"
    fresh: bool = False

    def check(self) -> None:
        """`WsError` for numbers that make no sense, and for what is only for a report where none is asked for."""
        require_count("--n-prompts", self.n_prompts, 1)
        require_count("--n-tokens", self.n_tokens, 1)
        shared_with(EvalOptions, self).check()
        choose("split", self.split, SPLITS)
        for name in ("behaviors", "model", "split", "n_prompts", "n_tokens"):
            if not self.report and getattr(self, name) != getattr(ComposeOptions, name):
                raise WsError(f"--{name.replace('_', '-')} is for a report; add --report, or leave it out.")

    def eval_options(self, behavior: str, name: str) -> EvalOptions:
        """The new run for an evaluation at strength 1."""
        return shared_with(EvalOptions, self, behavior=behavior, adapter=name, alphas=(1.0,))


@dataclass(frozen=True)
class TrimOptions(NamesModel):
    """Make a smaller vector, of fewer layers, modules or columns, or with a depth profile: `ws trim --rank 4`.

    Attributes:
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapter: the run to take: an adapter family, or the name that another command has given it.
        seed: the seed that the run was trained with.
        out: the folder of all runs and results.
        model: the model to steer; by default the base that the vector was made for.
        layers: only these decoder layers: `0.3:0.8` (of the depth), `4:12` or `3,4,5`.
        modules: only modules with these last names, such as `q_proj v_proj`.
        depth_scale: factors of the first and of the last decoder layer, linear in between.
        rank: so many columns per module, in the low-rank part.
        energy: share of the low-rank part's squared norm to keep per module, with as few columns as possible.
        to: the new run's name, for `--adapter` of every evaluation; made from the settings unless given.
        fresh: replace a run that `ws trim` made under this name with other settings.
    """

    former: ClassVar[Mapping[str, str]] = {"--to": "--name"}

    behavior: str = "honesty"
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT
    model: str | None = None
    layers: str | None = None
    modules: tuple[str, ...] = ()
    depth_scale: tuple[float, float] | None = None
    rank: int | None = None
    energy: float | None = None
    to: Annotated[str | None, tyro.conf.arg(name="name")] = None
    fresh: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, without what was not."""
        asked = {name: getattr(self, name) for name in ("layers", "modules", "depth_scale", "rank", "energy")}
        return {name: value for name, value in asked.items() if value not in (None, ())}

    @property
    def name(self) -> str:
        """The new run's name, such as `lora_layers-0.3-0.8_rank-4` when none is given."""
        parts = [self.adapter]
        for name, value in self.settings.items():
            values = value if isinstance(value, tuple) else (value,)
            parts.append(
                "-".join([name.split("_")[0], *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)])
            )
        return self.to or re.sub(r"[^\w.+-]+", "-", "_".join(parts))

    def check(self) -> None:
        """`WsError` for options that make no sense, before anything is loaded."""
        if not self.settings:
            raise WsError("There is nothing to trim: give --layers, --modules, --depth-scale, --rank or --energy.")
        if self.rank is not None and self.energy is not None:
            raise WsError("Give either --rank or --energy, not both.")


@dataclass(frozen=True)
class PreventOptions(RunOptions):
    """Train on your own examples in ways that are to keep an unwanted trait out, and measure what each has learned.

    Attributes:
        examples: a JSONL, CSV or Parquet file, or a hub id, with a `question` and an `answer`, and perhaps the `kind`
            of each. Every fifth question is held out.
        strength: of the run's vector that is active in training, or subtracted afterwards, with the sign that shows the
            unwanted trait: a number, or calibrated units such as `+1u`.
        ways: how the examples are learned, besides `plain`: with the `vector` active, plain and the vector then
            `subtract`ed, and behind a system `prompt` that asks for the trait.
        columns: what the columns are called, as `question:prompt answer:reply kind:topic`.
        to: the name that the fine-tunes are filed under; that of the file unless given.
        rank: of the fine-tunes, which are LoRAs, at the preset's own scale; the model's preset unless given.
        lr: their peak learning rate; the model's preset unless given.
        epochs: passes over the examples; the model's preset unless given.
        split: which held-out claims and questions: `report`, or `dev` for making choices on.
        batch_size: prompts per forward pass; as many as fit unless given.
        limit: at most so many items, a draw by a fixed seed, even over groups; all unless given.
        n_bootstrap: resamples per interval.
        fresh: start over, forgetting what is on disk.
    """

    former: ClassVar[Mapping[str, str]] = {"--to": "--name"}

    examples: tyro.conf.Positional[str] = field(kw_only=True)
    strength: str = field(kw_only=True)
    ways: tuple[str, ...] = WAYS
    columns: tuple[str, ...] = ()
    to: Annotated[str | None, tyro.conf.arg(name="name")] = None
    rank: int | None = None
    lr: float | None = None
    epochs: float | None = None
    split: str = "report"
    batch_size: int | None = None
    limit: int | None = None
    n_bootstrap: int = 10_000
    fresh: bool = False

    def check(self) -> None:
        """`WsError` for ways that do not exist, and numbers that make no sense."""
        for way in self.ways:
            choose("way", way, (PLAIN, *WAYS))
        choose("split", self.split, SPLITS)
        self.eval_options.check()
        self.training(self.model or DEFAULT_MODEL).check()

    @property
    def asked(self) -> tuple[str, ...]:
        """The ways in their order, plain training first: it is what the others are compared with."""
        return (PLAIN, *(way for way in WAYS if way in self.ways))

    def training(self, model: str) -> TrainConfig:
        """How the fine-tunes of a model are trained, all alike; another rank keeps the LoRA's own scale."""
        preset = train_preset(model, "lora", self.epochs)
        given = {name: value for name in ("rank", "lr", "epochs") if (value := getattr(self, name)) is not None}
        if self.rank is not None and self.rank > 0:
            preset = preset.at_rank(self.rank)
        return replace(preset, **given)

    @property
    def eval_options(self) -> EvalOptions:
        """The same run for evaluations; a fine-tune is asked at strength 1."""
        return shared_with(EvalOptions, self, alphas=(1.0,))
