"""What several commands take: which run, which vector, which items, and the names that they are given by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_origin, get_type_hints

import msgspec
import tyro

from ws.behaviors import behavior_name, bundled_behaviors
from ws.console import command_line
from ws.errors import WsError, choose, did_you_mean, require_count, require_resamples, require_strength
from ws.files.reading import convert
from ws.files.runs import DEFAULT_OUT, DEMO_OUT, model_name, run_folder

# Adapter families, in the order of tables; `ws.adapters` knows how each is trained.
ADAPTERS = ("ia3", "oft", "dora", "lora", "pissa", "delora")
# What can be done to a model; `ws.intervene.interventions` knows how.
BASE, WEIGHT = "base", "weight"
INTERVENTIONS = (
    *(WEIGHT, "finetune", "positive-only", "negative-only", "gradient", "gradient-low-rank", "prompt"),
    *("activation", "activation-everywhere", "activation-layers", "activation-layers-everywhere"),
)
# Headline scores that are looked at unless others are named.
HEADLINES = ("false_claims", "true_claims", "wrongness", "choices")
# Of calibrations: questions that strengths are solved for on, where a behaviour has as many, the same number for every
# command; tokens of an answer; and the quantile of their divergences.
N_PROMPTS, N_TOKENS, QUANTILE = 100, 50, 0.95
# Tokens of guided thought before a dilemma is answered.
N_THINK = 128


Target = TypeVar("Target")


def shared_with(target: type[Target], source: Any, **others: Any) -> Target:
    """Options of one command made from those of another: the fields that both have, and what only the new one needs.

    A field means the same wherever it stands, and is never copied by a list of names, which would forget the next one.
    """
    both = {f.name for f in fields(target)} & {f.name for f in fields(source)}  # type: ignore[arg-type]
    return target(**{name: getattr(source, name) for name in both} | others)


def read_options(options: type[Target], given: Mapping[str, Any], what: str, strict: bool = True) -> Target:
    """Options from values by the names of their fields, as other programs' commands and configurations give them.

    Args:
        given: one text is a list of one, where a list is wanted.
        what: a value is called, such as "model argument".
        strict: a number is a number; otherwise its text is, too.

    Raises:
        WsError: a name that is not known, or a value of another type.
    """
    hints, values = get_type_hints(options), dict[str, Any]()
    for name, value in given.items():
        choose(what, name, [f.name for f in fields(options)])  # type: ignore[arg-type]
        is_single = get_origin(hints[name]) is tuple and isinstance(value, str)
        values[name] = [value] if is_single else str(value) if isinstance(value, Path) else value
    try:
        return convert(values, options, strict=strict, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, TypeError) as problem:
        raise WsError(f"The {what}s are not understood: {problem}.") from problem


def folder_with_vector(
    out: Path, behavior: str, adapter: str, seed: int, otherwise: str = "", model: str | None = None
) -> Path:
    """A run's folder; `WsError` with the command that makes its vector, and with another way out, when it has none."""
    name = behavior_name(behavior)
    folder = run_folder(out, name, adapter, seed)
    if not (folder / "vector").is_dir():
        known = [*bundled_behaviors(), *(p.name for p in out.glob("*") if p.is_dir())]
        if name == behavior and name not in known:
            raise WsError(f"There is no vector in {folder}, nor a behaviour {name!r}.{did_you_mean(name, known)}")
        options = RunOptions(model=model, behavior=behavior, adapter=adapter, seed=seed, out=out)
        made = command_line("ws replicate", options, always=("behavior", "adapter"))
        raise WsError(
            f"There is no vector in {folder}; make it with `{made}`{_of_demo(name, adapter, seed)}{otherwise}."
        )
    return folder


def _of_demo(behavior: str, adapter: str, seed: int) -> str:
    """Where `ws demo` has left such a vector, or would leave one, for a sentence."""
    places = (DEMO_OUT, DEMO_OUT / "smollm2")
    made = [out for out in places if (run_folder(out, behavior, adapter, seed) / "vector").is_dir()]
    if made:
        return f", or take that of `ws demo` with --out {made[0]}"
    return f" (`ws demo` makes one on the bundled model, for --out {DEMO_OUT})"


def require_steered(alphas: Sequence[float | str]) -> None:
    """`WsError` where a command is to show shifts and has nothing but the base to show."""
    if not any(alpha != 0 for alpha in alphas):
        raise WsError("--alphas must hold a strength other than 0; at 0 nothing shifts.")


class NamesModel:
    """Options that name a model: one folder has one name, however its path is written."""

    model: str | None

    def __post_init__(self) -> None:
        if self.model is not None:
            object.__setattr__(self, "model", model_name(self.model))


@dataclass(frozen=True)
class RunOptions(NamesModel):
    """Which finished run, and the model it is put into: what every command on a run takes.

    Attributes:
        model: the model to steer; by default the base that the vector was made for.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapter: the run to take: an adapter family, or the name that another command has given it.
        seed: the seed that the run was trained with.
        out: the folder of all runs and results.
        device: `cpu`, `cuda`, `mps`, `map` to spread a model over all there is, or `auto` for the best of them.
        dtype: precision of the weights: `float32`, `bfloat16`, `float16`, `8bit`, `4bit`, or `auto` for the
            checkpoint's own.
        load_in_8bit: pack the model's weights (bitsandbytes); the same as `--dtype 8bit`.
        load_in_4bit: pack the model's weights (bitsandbytes); the same as `--dtype 4bit`.
    """

    model: str | None = None
    behavior: str = "honesty"
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT
    device: str = "auto"
    dtype: str = "auto"
    load_in_8bit: bool = False
    load_in_4bit: bool = False

    def require(self) -> None:
        """`WsError` unless the run is there."""
        folder_with_vector(self.out, self.behavior, self.adapter, self.seed, model=self.model)

    @property
    def precision(self) -> str:
        """How the model's weights are stored: `dtype`, unless they are packed."""
        packed = [name for name, wanted in (("8bit", self.load_in_8bit), ("4bit", self.load_in_4bit)) if wanted]
        if packed and (len(packed) > 1 or self.dtype not in ("auto", packed[0])):
            raise WsError("Give one of --dtype, --load-in-8bit and --load-in-4bit.")
        return packed[0] if packed else self.dtype

    @property
    def key(self) -> dict[str, Any]:
        """The first columns of every table."""
        return {"behavior": behavior_name(self.behavior), "adapter": self.adapter, "seed": self.seed}


@dataclass(frozen=True)
class EvalOptions(RunOptions):
    """The options every evaluation takes: those of every command on a run, and

    Attributes:
        alphas: steering strengths; 0, the base, is always included. In calibrated units as `+1u` where the vector is
            calibrated (`ws calibrate`), and `calibrated` for both of those.
        interventions: what is done to the model: `weight` (the vector), `finetune`, `positive-only`, `negative-only`,
            `gradient`, `gradient-low-rank`, `prompt`, `activation`, `activation-everywhere`, `activation-layers`,
            `activation-layers-everywhere`.
        batch_size: prompts per forward pass; as many as fit unless given.
        n_think: tokens of guided chain of thought before the answer; the evaluation's own number unless given.
        limit: at most so many items, a draw by a fixed seed, even over groups; all unless given.
        dataset: where published sets come from: a hub id, a local folder or file, or `pocket`; the published ones
            unless given.
        prompts: a TOML file that replaces the instruction texts.
        n_bootstrap: resamples per interval.
    """

    alphas: tuple[float | str, ...] = (-1.0, 0.0, 1.0)
    interventions: tuple[str, ...] = (WEIGHT,)
    batch_size: int | None = None
    n_think: int | None = None
    limit: int | None = None
    dataset: str | None = None
    prompts: Path | None = None
    n_bootstrap: int = 10_000

    def require(self) -> None:
        """`WsError` unless the run is there, and a strength to compare the base with."""
        super().require()
        require_steered(self.alphas)

    def check(self) -> None:
        """`WsError` for numbers that make no sense, before anything is loaded."""
        require_count("--batch-size", self.batch_size, 1)
        require_count("--limit", self.limit, 1)
        require_count("--n-think", self.n_think, 0)
        require_resamples(self.n_bootstrap)
        for name in self.interventions:
            choose("intervention", name, INTERVENTIONS)
        if len(set(self.interventions)) != len(self.interventions) or not self.interventions:
            raise WsError(f"--interventions must name at least one, each once, not {list(self.interventions)}.")
        for alpha in self.alphas:
            if not isinstance(alpha, str):
                require_strength(alpha, "Each of --alphas")


@dataclass(frozen=True)
class HeadlineOptions(RunOptions):
    """A finished run, and which headline scores of it are looked at.

    Attributes:
        scores: `false_claims`, `true_claims`, `wrongness` (tiny-mfv), `choices` (AIRiskDilemmas without a thought),
            `preference` (held-out questions with both answers), `statements`, `judged_trait` and `judged_coherence`
            (free answers), `mc2` and `mc1` (TruthfulQA), `direct_accuracy` (arithmetic without a thought).
        split: which held-out claims and questions: `report`, or `dev` for making choices on.
        traits: traits whose statements are asked, such as `agreeableness`; the behaviour's own unless given.
        judges: who rates free answers, one or two, as `ws eval answers` takes them; needed for those alone.
        batch_size: prompts per forward pass; as many as fit unless given.
        limit: at most so many items, a draw by a fixed seed, even over groups; all unless given.
        dataset: where published sets come from: a hub id, a local folder or file, or `pocket`; the published ones
            unless given.
    """

    scores: tuple[str, ...] = HEADLINES
    split: str = "report"
    traits: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    batch_size: int | None = None
    limit: int | None = None
    dataset: str | None = None

    def eval_options(self, alphas: tuple[float | str, ...] = ()) -> EvalOptions:
        """The same run for `open_context`, at these strengths and the base."""
        return shared_with(EvalOptions, self, alphas=alphas)


@dataclass(frozen=True)
class VectorOptions:
    """Which vector.

    Attributes:
        vector: a vector's folder or its repository on the hub; that of the run below unless given.
        behavior: a bundled behaviour by its name, or the path of a TOML file.
        adapter: the run to take: an adapter family, or the name that another command has given it.
        seed: the seed that the run was trained with.
        out: the folder of all runs and results.
    """

    vector: str | None = None
    behavior: str = "honesty"
    adapter: str = "lora"
    seed: int = 0
    out: Path = DEFAULT_OUT

    def require(self) -> None:
        """`WsError` unless the run is there, or another vector is named."""
        if not self.vector:
            folder_with_vector(self.out, self.behavior, self.adapter, self.seed, ", or name one with --vector")

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that the vector is of, None when a vector is named."""
        name = behavior_name(self.behavior)
        return None if self.vector else run_folder(self.out, name, self.adapter, self.seed)

    @property
    def name(self) -> str:
        """A short name for what is exported: `honesty-lora`, or that of the named vector."""
        if self.vector:
            return Path(self.vector).name
        seed = f"-seed-{self.seed}" if self.seed else ""
        return f"{behavior_name(self.behavior)}-{self.adapter}{seed}"


@dataclass(frozen=True)
class ExportOptions(VectorOptions):
    """Which vector, how strong, and where to.

    Attributes:
        alpha: the strength that is written into the export: a number, or calibrated units such as `+1u`.
        to: the folder or file to write; one under the run's `exports/` unless given.
    """

    alpha: str = "1"
    to: Path | None = None

    def target(self, name: str) -> Path:
        """Where the export goes: `to`, or else `<run>/exports/<name>`; `WsError` when neither is known."""
        if self.to is not None:
            return self.to
        if self.run_folder is None:
            raise WsError("Say where the export of a named vector goes with --to.")
        return self.run_folder / "exports" / name


@dataclass(frozen=True)
class VectorsOptions(RunOptions):
    """Which vectors, of a finished run or by name.

    Attributes:
        vectors: several vectors instead of the run's: behaviours (their run with `--adapter` and `--seed`),
            `behavior/adapter/seed-1` below `--out`, folders, or repositories on the hub.
    """

    vectors: tuple[str, ...] = ()

    def require(self) -> None:
        """`WsError` unless the run is there, or other vectors are named."""
        if not self.vectors:
            folder_with_vector(
                self.out, self.behavior, self.adapter, self.seed, ". Or name some with --vectors", self.model
            )


@dataclass(frozen=True)
class EngineOptions(VectorsOptions):
    """Which vectors, and how answers are drawn.

    Attributes:
        alpha: the strength to begin with, of every vector: a number, or calibrated units such as `+1u`.
        temperature: of the sampling; 0 takes the most probable token of every step.
        max_tokens: at most so many tokens per answer.
        sample_seed: of the random numbers at temperatures above 0.
    """

    former: ClassVar[Mapping[str, str]] = {"--max-tokens": "--max-new-tokens"}

    alpha: str = "1"
    temperature: float = 0.0
    max_tokens: Annotated[int, tyro.conf.arg(name="max-new-tokens")] = 128
    sample_seed: int = 0


@dataclass(frozen=True)
class CalibrationConfig:
    """What is measured, and what counts as calibrated.

    Attributes:
        n_prompts: questions of the behaviour at most, evenly spread over those that nothing was trained on; as many
            others audit the result (see `split_questions`).
        n_tokens: at most so many tokens of each answer.
        target: the divergence to reach, in nats.
        quantile: of the per-token divergences over all positions.
        tolerance: relative; the divergence at a calibrated strength is within it of the target, at the edge of a jump
            within three times it.
        max_evaluations: measurements per sign; with the one of the audit ten by default.
        batch_size: answers at a time; None starts at what memory is budgeted for, and takes fewer where that is
            too little.
    """

    n_prompts: int = N_PROMPTS
    n_tokens: int = N_TOKENS
    target: float = 1.0
    quantile: float = QUANTILE
    tolerance: float = 0.05
    max_evaluations: int = 9
    batch_size: int | None = None

    def check(self) -> None:
        """`WsError` for numbers that make no sense, before anything is loaded."""
        require_count("--n-prompts", self.n_prompts, 1)
        require_count("--n-tokens", self.n_tokens, 1)
        require_count("--batch-size", self.batch_size, 1)
        require_count("max_evaluations", self.max_evaluations, 2)
        if not (math.isfinite(self.target) and self.target > 0):
            raise WsError(f"--target must be a positive number of nats, not {self.target}.")
        for name, share in (("quantile", self.quantile), ("tolerance", self.tolerance)):
            if not 0 < share < 1:
                raise WsError(f"{name} must lie between 0 and 1, not {share}.")

    @property
    def settings(self) -> dict[str, Any]:
        """What the result depends on; the batch size is not part of it."""
        return {k: v for k, v in asdict(self).items() if k != "batch_size"}
