"""One behaviour, one adapter, end to end: pairs, two arms, the vector, and a first reading on what is held out.

`python -m ws.replicate --model Qwen/Qwen3-0.6B --behavior honesty --adapter lora` writes `out/honesty/lora/`. Running
it again skips what is finished and continues what is not.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from jaxtyping import Float
from tabulate import tabulate
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.adapters import family, peft_config, require_signed
from ws.analysis.controls import exchange_half, same_side
from ws.behaviors import Behavior, behavior_name, brought_or_named, load_behavior
from ws.data import (
    PAIRS_FILE,
    Pair,
    count_pairs,
    generate_pairs,
    hashed_pairs,
    pair_lines,
    pairs_settings,
    sample_answers,
    work_of_pairs,
)
from ws.diff import CALIBRATION, VECTOR_FILES, SteeringVector, vector_digest
from ws.errors import WsError, choose, require_resamples, require_seed, require_strength
from ws.eval.before import require_readable
from ws.eval.confounds import agreement_verdict
from ws.eval.context import EvalContext
from ws.eval.evaluation import Evaluation
from ws.eval.preference import Preferences
from ws.eval.readable import (
    MARK,
    NATS,
    PER_TOKEN,
    Readability,
    mass_text,
    notes,
    remedy,
    rounding_notes,
    worst,
)
from ws.eval.sycophancy import ClaimScores, Sycophancy, claim_shift, summary_row
from ws.files.reading import read_json
from ws.files.runs import Run, data_folder, read_values, sha256_file, tune_folder, write_json, write_text
from ws.lm.cost import PROMPT_TOKENS, Work, require_space
from ws.lm.models import chat_format, linear_size, load_model, render_prompt, tokenizer_hash
from ws.options.make import CONTRASTS, SIGNED, SIGNS, UNRECORDED, DataCommand, TrainConfig, TuneOptions
from ws.options.make import ReplicateConfig as ReplicateConfig
from ws.options.measure import PreferenceOptions, SycophancyOptions
from ws.options.shared import EvalOptions, RunOptions, require_steered, shared_with
from ws.stats import N_BOOTSTRAP, Estimate, estimate_mean, estimate_text
from ws.steer import steer
from ws.train import adapter_spec, arm_settings, train_stage

CONTROLS = ("none", "shuffled", "same-side")
SECOND = "second"  # the folder of the other pairs of a `same-side` null, below that of the pairs
CHOICE_FILE, CHOICE_FORMAT = "choice.json", 1  # what `ws tune` has chosen
NOT_KNOWN = (
    "Whether it is the behaviour that moves it is not known before nulls are trained (--control shuffled and --control "
    "same-side, then ws compare)."
)
# Where both arms of a null learn the very same answers, the second is initialised and ordered by another seed.
SECOND_TRAINING = 1000


@dataclass(frozen=True)
class Sample:
    """A question and the answer at one strength."""

    alpha: float
    question: str
    answer: str


@dataclass(frozen=True)
class Reading:
    """What `replicate` found.

    Attributes:
        folder: the run's folder.
        pairs: the folder of the contrast pairs.
        vector: the steering vector.
        false_claims, true_claims: scores by alpha; empty for a behaviour without claims.
        preference: the margins of the held-out questions by alpha, in nats per token (`ws.eval.preference`); empty for
            a behaviour without.
        span: the mean paired difference between `span_alphas`: of log ratios on false claims, or of preference where
            there are no claims.
        span_alphas: the lower and the upper strength compared, of either sign the one nearest to -1 or +1; 0, the base,
            for a sign that was not asked for.
        effect: the sign that is expected of it.
        samples: one question of the pool answered greedily at every strength.
        control: which null the vector is, `none` for a vector of the behaviour.
    """

    folder: Path
    pairs: Path
    vector: SteeringVector
    false_claims: Mapping[float, ClaimScores]
    true_claims: Mapping[float, ClaimScores]
    span: Estimate
    span_alphas: tuple[float, float]
    effect: int
    samples: tuple[Sample, ...]
    control: str = "none"
    preference: Mapping[float, Float[np.ndarray, "questions"]] = field(default_factory=dict)

    @property
    def lowest_mass(self) -> float | None:
        """The smallest mean answer mass at base and at the two strengths compared; None without claims."""
        return min(
            (float(self.false_claims[a].pmass.mean()) for a in (0.0, *self.span_alphas) if self.false_claims),
            default=None,
        )

    @property
    def base(self) -> Readability:
        """How well the base answers about the claims; of preference nothing is asked."""
        return Readability(float(self.false_claims[0.0].pmass.mean()) if self.false_claims else None)

    @property
    def moves(self) -> bool:
        """The span is more than chance and no smaller than the floor, and the model was answering the question."""
        is_readable = not Readability(self.lowest_mass).problem
        floor = NATS if self.false_claims else PER_TOKEN
        return is_readable and self.span.excludes_zero and abs(self.span.mean) >= floor

    @property
    def as_expected(self) -> bool:
        """The span moves to the expected side; whether the behaviour moves it is for trained nulls to say."""
        return self.moves and math.copysign(1, self.span.mean) == self.effect


def replicate(config: ReplicateConfig) -> Reading:
    """Run every stage that is not finished yet, and read the result.

    Raises:
        WsError: bad settings, or results on disk that were made with other settings.
    """
    stages, config = console.Stages(1), as_tuned(config)
    context = make_vector(config, stages)
    stages.begin("first reading", f"of what is held out ({config.split})")
    reading = _read(context, config)
    stages.end()
    console.say(str(stages))
    return reading


def make_vector(config: ReplicateConfig, stages: console.Stages) -> EvalContext:
    """Run every stage up to the vector that is not finished yet; what comes back is ready for evaluations.

    Args:
        config: what to make.
        stages: those that come after; these are added.

    Raises:
        WsError: see `replicate`.
    """
    _check(config)
    family(config.adapter)
    behavior = load_behavior(config.behavior, config.model)
    if behavior.claims is not None:
        behavior.claims.select(config.split, is_true=False)
    elif not behavior.held_out(config.split):
        raise WsError(f"The behaviour {behavior.name} has nothing held out in the split {config.split!r} to read.")
    console.say(f"{behavior.name} x {config.adapter} on {config.model}")
    model, tok = load_model(config.model, config.device, config.dtype)
    console.say(f"{model.device}, {str(model.dtype)[6:]}, {chat_format(tok).describe()}")
    before_anything(model, tok, behavior, config)
    stages.total += 2 + len(CONTRASTS[config.contrast])
    stages.begin("contrast pairs", f"in {data_folder(config.out, config.model, behavior.name)}")
    pairs_file = make_pairs(model, tok, behavior, config)
    run = Run(config.run_folder(behavior.name), config.fresh)
    if config.control != "none":
        pairs_file = _control_pairs(behavior, config, pairs_file, run)
    vector = train_vector(model, tok, behavior, config, pairs_file, run, stages)
    return EvalContext(eval_options(config), model, tok, vector, run)


def train_vector(
    model: PreTrainedModel,
    tok: Tokenizer,
    behavior: Behavior,
    config: ReplicateConfig,
    pairs_file: Path,
    run: Run,
    stages: console.Stages,
) -> SteeringVector:
    """Train what a vector is made of, and the vector, in the folder of a run; what is finished is taken as it is."""
    for sign in CONTRASTS[config.contrast]:
        stages.begin(f"train {sign}", f"in {run.folder / sign}", as_long_as=f"train {SIGNS[0]}")
        seed = _arm_seed(behavior, config, sign)
        must_learn = sign != SIGNED or config.control == "none"  # what the sides of a null share cancels
        train_stage(model, tok, pairs_file, sign, run, config.adapter, config.train, seed, must_learn)
    stages.begin("vector", f"in {run.folder / 'vector'}")
    return _vector(model, run, behavior, config)


class _Choice(msgspec.Struct):
    """What is read of the `choice.json` of `ws tune`."""

    model: str
    behavior_sha256: str
    start: TrainConfig
    train: TrainConfig
    contrast: str


def tuned_file(config: ReplicateConfig) -> Path:
    """Where the choice of `ws tune` is that a run takes with `--tuned`."""
    return tune_folder(config.out, behavior_name(config.behavior), config.adapter) / CHOICE_FILE


def as_tuned(config: ReplicateConfig) -> ReplicateConfig:
    """The same with the settings that `ws tune` has chosen, where `--tuned` asks for them.

    Raises:
        WsError: nothing was chosen, or for another model or behaviour, or settings are given besides that the search
            did not have and the adapter depends on.
    """
    if not config.tuned:
        return config
    file, usual = tuned_file(config), TuneOptions.preset(config.model, config.adapter)
    search = replace(usual, behavior=config.behavior, out=config.out)
    command = console.command_line("ws tune", search, always=("model", "behavior", "adapter"))
    if not file.is_file():
        raise WsError(f"--tuned: there is no {file}; make it with `{command}`.")
    choice = read_json(file, _Choice, f"make it again with `{command} --fresh`", CHOICE_FORMAT)
    if choice.model != config.model:
        raise WsError(f"--tuned: {file} was chosen for {choice.model}, not for {config.model}; use another --out.")
    if choice.behavior_sha256 != load_behavior(config.behavior, config.model).digest:
        sampled = shared_with(DataCommand, config, fresh=True)
        anew = console.command_line("ws data", sampled, always=("model", "behavior"))
        raise WsError(
            f"--tuned: {file} was chosen for another version of the behaviour, on what may be held out no more; sample "
            f"pairs of this one with `{anew}`, and choose again with `{command}`."
        )
    if config.train.recorded() not in [train.recorded() for train in (usual.train, choice.start, choice.train)]:
        raise WsError(
            f"--tuned takes the settings of the training from {file}; leave out those that are given beside it."
        )
    if config.contrast not in ("arms", choice.contrast):
        raise WsError(
            f"--tuned takes --contrast {choice.contrast} from {file}; leave out --contrast {config.contrast}."
        )
    free = {name: getattr(config.train, name) for name in UNRECORDED}
    given = {name: value for name, value in free.items() if value != getattr(usual.train, name)}
    return replace(config, train=replace(choice.train, **given), contrast=choice.contrast)


def _check(config: ReplicateConfig) -> None:
    for alpha in config.alphas:
        require_strength(alpha, "Each of --alphas")
    require_steered(config.alphas)
    require_seed(config.seed)
    require_resamples(config.n_bootstrap)
    choose("control", config.control, CONTROLS)
    choose("contrast", config.contrast, CONTRASTS)
    config.train.check()


# ---- before anything ----------------------------------------------------------------------------------------------


def before_anything(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: ReplicateConfig) -> None:
    """Find what can be known to be wrong before the first stage, in seconds; what the base samples is looked at there.

    Raises:
        WsError: settings that no adapter can be made with, a stage on record that was made with others, too little
            space on disk, or a base that answers nothing of what is read at the end.
    """
    names = require_settings(model, tok, behavior, config)
    if (Run(config.run_folder(behavior.name)).folder / "vector").is_dir() and not config.fresh:
        return  # it is read again, and nothing is left to be spared
    sizes = [linear_size(m) for n, m in model.named_modules() if n in names]
    work = _work(behavior, config, sum(map(sum, filter(None, sizes))))
    require_space(config.out, work.disk)
    console.say(work.estimate(model))
    context = EvalContext.of_base(eval_options(config), model, tok)
    require_readable(context, read_at_the_end(context, behavior, config), config.data.anyway)


def require_settings(
    model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: ReplicateConfig
) -> frozenset[str]:
    """The names of the modules that are adapted.

    Raises:
        WsError: settings that no adapter can be made with, or a stage of the run, or its pairs, on record with others.
    """
    if config.contrast == SIGNED:
        require_signed(family(config.adapter))
        if config.control == "same-side" and behavior.pairs:
            raise WsError(
                "--control same-side has one positive answer to a question where pairs were brought, and a signed "
                "adapter learns nothing from that with both signs; use --control shuffled, or --contrast arms."
            )
    names = peft_config(model, adapter_spec(config.train, config.adapter)).target_modules
    _require_record(model, tok, behavior, config)
    return frozenset(names or ())


def _require_record(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: ReplicateConfig) -> None:
    pairs, run = data_folder(config.out, config.model, behavior.name), Run(config.run_folder(behavior.name))
    if not (config.fresh and config.fresh_data):
        Run(pairs).require_same("pairs", pairs_settings(model, tok, behavior, pairs, config.data))
    if config.fresh:
        return
    if config.control != "none":
        run.require_same("control", _control_settings(config))
    for sign in CONTRASTS[config.contrast]:
        seed = _arm_seed(behavior, config, sign)
        run.require_same(sign, arm_settings(model, tok, config.adapter, config.train, seed))


def _work(behavior: Behavior, config: ReplicateConfig, places: int) -> Work:
    """What there is to do, at most; `places` are the inputs and outputs of all modules that are adapted."""
    train, n = config.train, count_pairs(behavior, config.data)
    example = PROMPT_TOKENS + config.data.max_new_tokens // 2
    steps = train.max_steps or math.ceil(math.ceil(n / train.batch) * train.epochs)
    claims = len(behavior.claims.claims) if behavior.claims else 0
    read = claims * PROMPT_TOKENS + 2 * len(behavior.held_out(config.split)) * example
    return replace(
        work_of_pairs(behavior, config.data),
        trained=len(SIGNS) * steps * train.batch * example,
        read=read * len(_alphas(config)),
        numbers=places * max(train.rank, train.oft_block // 2),
    )


# ---- stages -------------------------------------------------------------------------------------------------------


def make_pairs(model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, config: ReplicateConfig) -> Path:
    """The file of a behaviour's pairs; for a `same-side` null as many are sampled with another data seed, too."""
    folder, fresh = data_folder(config.out, config.model, behavior.name), config.fresh and config.fresh_data
    generate_pairs(model, tok, behavior, folder, config.data, fresh)
    if _has_second(behavior, config):
        other = replace(config.data, data_seed=config.data.data_seed + 1)
        generate_pairs(model, tok, behavior, folder / SECOND, other, fresh)
    return folder / PAIRS_FILE


def _has_second(behavior: Behavior, config: ReplicateConfig) -> bool:
    return config.control == "same-side" and not behavior.pairs


def _control_pairs(behavior: Behavior, config: ReplicateConfig, pairs: Path, run: Run) -> Path:
    """The pairs of a control, made of the behaviour's own (and for `same-side` of as many with another data seed).

    Brought pairs have one positive answer to a question: there both arms learn that one, by two training seeds.
    """
    file = run.folder / PAIRS_FILE
    originals, digest = hashed_pairs(pairs)
    inputs = {"pairs": digest}
    if _has_second(behavior, config):
        others, inputs["second"] = hashed_pairs(pairs.parent / SECOND / PAIRS_FILE)
    with run.alone("control"):
        stage = run.stage("control", _control_settings(config), inputs)
        if stage is not None:
            if config.control == "shuffled":
                made = exchange_half(originals, config.seed)
            else:
                made = same_side(originals, others) if "second" in inputs else [_doubled(p) for p in originals]
            write_text(file, pair_lines(made))
            stage.done([file], kept=sum(p.drop is None for p in made))
    return file


def _control_settings(config: ReplicateConfig) -> dict[str, Any]:
    return {"control": config.control, "seed": config.seed}


def _arm_seed(behavior: Behavior, config: ReplicateConfig, sign: str) -> int:
    twice = config.control == "same-side" and bool(behavior.pairs) and sign == SIGNS[1]
    return config.seed + SECOND_TRAINING * twice


def _doubled(pair: Pair) -> Pair:
    return replace(pair, neg=pair.pos, neg_tokens=pair.pos_tokens, neg_cut=pair.pos_cut)


def _vector(model: PreTrainedModel, run: Run, behavior: Behavior, config: ReplicateConfig) -> SteeringVector:
    arms, folder = {sign: run.folder / sign for sign in CONTRASTS[config.contrast]}, run.folder / "vector"
    with run.alone("vector"):
        stage = run.stage("vector", {"format": 1}, _arms(run, arms))
        if stage is None:
            return SteeringVector.load(folder)
        sides = {sign: SteeringVector.from_adapter(arm, model) for sign, arm in arms.items()}
        if config.contrast == SIGNED:  # the change at +c and the one at -c
            sides = {"pos": sides[SIGNED], "neg": SteeringVector.from_adapter(arms[SIGNED], model, mirrored=True)}
        vector = sides["pos"] - sides["neg"]
        info = dict(vector.info) | {"behavior": behavior.name, "behavior_sha256": behavior.digest, "seed": config.seed}
        info |= {"control": config.control} if config.control != "none" else {}
        info |= {"contrast": SIGNED} if config.contrast == SIGNED else {}
        info |= {"tuned": "on dev", "tuned_sha256": sha256_file(tuned_file(config))} if config.tuned else {}
        vector = SteeringVector(vector.deltas, config.model, vector.base_fingerprint, vector.recipe, info)
        if vector.is_zero:
            raise WsError("Both arms came out identical, so the vector is zero; give more pairs or a higher --lr.")
        vector.save(folder)
        geometry = _geometry(sides, vector, model)
        # A calibration, which may have come along from a damaged vector, is not part of it.
        stage.done([f for n in VECTOR_FILES if n != CALIBRATION and (f := folder / n).is_file()], geometry=geometry)
    return vector


def _arms(run: Run, arms: Mapping[str, Path]) -> dict[str, str]:
    """The hashes of both arms' weights; `WsError` unless they are there and were trained on one set of pairs."""
    files = {sign: folder / "adapter_model.safetensors" for sign, folder in arms.items()}
    trained = {run.manifest["stages"].get(sign, {}).get("inputs", {}).get("pairs") for sign in arms}
    if not all(file.is_file() for file in files.values()) or len(trained) > 1:
        raise WsError(
            f"The arms in {run.folder} are gone, or not of the same pairs: another process has started over there "
            "meanwhile. Run this again when it has finished."
        )
    return {sign: sha256_file(file) for sign, file in files.items()}


def _geometry(sides: Mapping[str, SteeringVector], vector: SteeringVector, model: PreTrainedModel) -> dict[str, float]:
    """How the two arms relate: a contrast that means something does not move both the same way."""
    return {
        "norm": vector.norm(model),
        "norm_pos": sides["pos"].norm(model),
        "norm_neg": sides["neg"].norm(model),
        "cosine_pos_neg": sides["pos"].cosine(sides["neg"], model),
        "rank": float(vector.max_rank),
    }


# ---- the first reading --------------------------------------------------------------------------------------------


def _read(context: EvalContext, config: ReplicateConfig) -> Reading:
    model, tok, vector, run, behavior = context.model, context.tok, context.vector, context.run, context.behavior
    alphas = _alphas(config)
    low, high = _nearest(alphas, -1.0), _nearest(alphas, 1.0)
    false, true, margins = _measured(context, read_at_the_end(context, behavior, config))
    with steer(model, vector, 0.0) as dial:
        samples = _samples(model, tok, behavior, dial, alphas, config.data.max_new_tokens)
    span = (
        claim_shift(false[high], false[low], config.n_bootstrap)
        if false
        else estimate_mean(margins[high] - margins[low], config.n_bootstrap)
    )
    pairs = data_folder(config.out, config.model, behavior.name)
    compared, effect = (low, high), behavior.effect
    reading = Reading(run.folder, pairs, vector, false, true, span, compared, effect, samples, config.control, margins)
    _record(reading, run, tokenizer_hash(tok))
    return reading


Claims = Mapping[float, ClaimScores]


def read_at_the_end(context: EvalContext, behavior: Behavior, config: ReplicateConfig) -> list[Evaluation]:
    """What a run is read by: held-out claims, and held-out questions with both answers, as far as there are any."""
    claims = [Sycophancy.of_behavior(context, behavior, config.split)] if behavior.claims else []
    held_out = behavior.held_out(config.split)
    return [*claims, *([Preferences.of_behavior(context, behavior, config.split)] if held_out else [])]


def _measured(
    context: EvalContext, asked: Sequence[Evaluation]
) -> tuple[Claims, Claims, dict[float, Float[np.ndarray, "questions"]]]:
    """The scores of false and of true claims by strength, and the margins of held-out questions; empty without."""
    claims: dict[bool, Claims] = {False: {}, True: {}}
    margins: dict[float, Float[np.ndarray, "questions"]] = {}
    for evaluation in asked:
        measured = context.measure(evaluation)
        context.record(evaluation, measured)
        if isinstance(evaluation, Sycophancy):
            scores = evaluation.claim_scores(measured)
            claims = {kind: {a: p for a, s in scores.items() if (p := s.of_kind(kind))} for kind in claims}
        else:
            margins = {alpha: evaluation.headlines(scores)["preference"] for alpha, scores in measured.items()}
    return claims[False], claims[True], margins


def eval_options(config: ReplicateConfig) -> EvalOptions:
    """The run as an evaluation takes it."""
    return shared_with(EvalOptions, config, adapter=config.run_name)


def _alphas(config: ReplicateConfig) -> list[float]:
    return sorted({0.0, *map(float, config.alphas)})


def _nearest(alphas: Sequence[float], wanted: float) -> float:
    """The strength of the same sign that is nearest to a wanted one, of equals the weaker; 0 where there is none."""
    same = [a for a in alphas if a * wanted > 0]
    return min(same, key=lambda a: (abs(a - wanted), abs(a)), default=0.0)


def _samples(
    model: PreTrainedModel, tok: Tokenizer, behavior: Behavior, dial: Any, alphas: Sequence[float], max_new_tokens: int
) -> tuple[Sample, ...]:
    """One question answered greedily at every strength: in one batch with one alpha per row, where layers have rows."""
    question = behavior.questions[0]
    prompt = render_prompt(tok, question)
    try:
        dial.alpha = torch.tensor(alphas)
        answers = sample_answers(model, tok, [prompt] * len(alphas), max_new_tokens)
    except WsError:  # OPT's fc1 and a mixture's shared experts see none: one strength after the other
        answers = []
        for alpha in alphas:
            dial.alpha = alpha
            answers += sample_answers(model, tok, [prompt], max_new_tokens)
    return tuple(Sample(a, question, x.text) for a, x in zip(alphas, answers, strict=True))


def _record(reading: Reading, run: Run, tokenizer: str) -> None:
    span = asdict(reading.span) | {"alphas": list(reading.span_alphas)}
    inputs = {"vector": vector_digest(reading.vector)}
    facts = {"control": reading.control, "expected_sign": reading.effect, "as_expected": reading.as_expected}
    settings = {"alphas": sorted(reading.false_claims or reading.preference), "tokenizer_hash": tokenizer}
    with run.alone("reading"):
        stage = run.restart("reading", settings, inputs)
        files = [write_json(run.folder / "samples.json", [asdict(s) for s in reading.samples])]
        stage.done(files, span=span, **facts)


# ---- what a person sees -------------------------------------------------------------------------------------------


def render(reading: Reading, n_boot: int = N_BOOTSTRAP) -> str:
    """The reading as text: the dose-response tables, a small plot, and the verdict in a sentence or two."""
    claims = [_claims_table(reading, n_boot)] if reading.false_claims else []
    preferences = [_preference_table(reading, n_boot)] if reading.preference else []
    said = [verdict(reading), *agreement(reading, n_boot)] if reading.false_claims else []
    said += preference_verdict(reading, n_boot)
    return "\n\n".join([*claims, *preferences, plot(reading), answers(reading), *said])


def _preference_table(reading: Reading, n_boot: int) -> str:
    rows = []
    for alpha, margins in sorted(reading.preference.items()):
        level, shift = (estimate_mean(x, n_boot) for x in (margins, margins - reading.preference[0.0]))
        rows.append([f"{alpha:+g}", f"{level:+.3f}", f"{shift:+.3f}", f"{(margins > 0).mean():.0%}"])
    header = ["alpha", "log p(positive) - log p(negative), per token", "shift", "prefers positive"]
    return tabulate(rows, header, disable_numparse=True)


def _claims_table(reading: Reading, n_boot: int) -> str:
    rows, problems = [], list[str]()
    for alpha, scores in sorted(reading.false_claims.items()):
        row = summary_row({}, alpha, scores, reading.false_claims[0.0], n_boot)
        true = reading.true_claims.get(alpha)
        problems += [_problem(reading.false_claims, alpha), _problem(reading.true_claims, alpha)]
        rows.append(
            [
                f"{alpha:+g}",
                estimate_text(row, "mean_logratio", ends=""),
                estimate_text(row, "shift"),
                ""
                if true is None
                else f"{_shift(reading.true_claims, alpha):+.2f}{f' {MARK}' if problems[-1] else ''}",
                mass_text(row["mean_pmass"], row["n_low_pmass"], problems[-2]),
            ]
        )
    header = ["alpha", "log P(Yes)/P(No), false claims", "shift", "shift, true claims", "answer mass"]
    return "\n\n".join([tabulate(rows, header, disable_numparse=True), *notes(problems)])


def _shift(claims: Mapping[float, ClaimScores], alpha: float) -> float:
    return float((claims[alpha].logratio - claims[0.0].logratio).mean())


def _problem(claims: Mapping[float, ClaimScores], alpha: float) -> str:
    """Why the shift of one kind of claims cannot be read at a strength; empty where it can, or where there are none."""
    known = [Readability(float(claims[a].pmass.mean())) for a in (0.0, alpha) if a in claims]
    return worst(known).problem if known else ""


def agreement(reading: Reading, n_boot: int = N_BOOTSTRAP) -> list[str]:
    """Whether the span is more than a span of agreement, in one sentence; nothing without true claims to tell it by."""
    (low, high), true = reading.span_alphas, reading.true_claims
    if low not in true or min(len(true[low].claims), len(reading.false_claims[low].claims)) < 2:
        return []
    false = reading.false_claims
    mass = min(float(kind[a].pmass.mean()) for kind in (false, true) for a in (0.0, low, high))
    pairs = (false[low].logratio, false[high].logratio, true[low].logratio, true[high].logratio)
    judged = agreement_verdict(*pairs, effect=reading.effect, n_boot=n_boot, least_mass=mass)
    return [f"{judged.line.removesuffix('.')}."]


def answers(reading: Reading) -> str:
    """One question of the pool with its answer at every strength, to read by eye."""
    lines = [f"  alpha {s.alpha:+4g}  {' '.join(s.answer.split())[:200]}" for s in reading.samples]
    return "\n".join([f"{reading.samples[0].question}", *lines])


def plot(reading: Reading, width: int = 41) -> str:
    """A dose-response curve in characters: one line per alpha, `o` at the mean, `|` at the base.

    Of agreement with false claims, or of preference where the model does not answer those (or there are none).
    """
    unreadable = not reading.false_claims or bool(Readability(reading.lowest_mass).problem)
    by_preference = bool(reading.preference) and unreadable
    claims = {a: s.logratio for a, s in reading.false_claims.items()}
    curve = reading.preference if by_preference else claims
    means = {a: float(values.mean()) for a, values in sorted(curve.items())}
    low, high = min(means.values()), max(means.values())
    scale = (width - 1) / (high - low) if high > low else 0.0
    base = round((means[0.0] - low) * scale)
    lines = []
    for alpha, mean in means.items():
        cells = ["."] * width
        cells[base] = "|"
        cells[round((mean - low) * scale)] = "o"
        lines.append(f"  alpha {alpha:+4g}  {''.join(cells)}  {mean:+.2f}")
    ends = ("negative", "positive") if by_preference else ("disagrees", "agrees")
    return "\n".join([*lines, f"              {ends[0]}{ends[1].rjust(width - len(ends[0]) - 1)}"])


def as_data(reading: Reading) -> dict[str, Any]:
    """The reading for scripts: the verdict with the numbers behind it, the dose-response table and the answers."""
    return {
        "verdict": verdict(reading),
        "as_expected": reading.as_expected,
        "span": {**asdict(reading.span), "alphas": reading.span_alphas},
        "lowest_mass": reading.lowest_mass,
        "control": reading.control,
        "rows": read_values(reading.folder / f"{Sycophancy.stage}_summary.csv") if reading.false_claims else [],
        "preference": read_values(reading.folder / f"{Preferences.stage}_summary.csv") if reading.preference else [],
        "samples": reading.samples,
    }


def written(reading: Reading) -> list[Path]:
    """What a replication leaves, in the order in which a reader wants it."""
    tables = [f"{Sycophancy.stage}_summary.csv"] if reading.false_claims else []
    tables += [f"{Preferences.stage}_summary.csv"] if reading.preference else []
    return [reading.folder / name for name in ("vector", *tables, "samples.json", "manifest.json")]


def verdict(reading: Reading) -> str:
    """One sentence on the span between two strengths: what moved, and never that the behaviour moved it."""
    if not reading.false_claims:
        return preference_verdict(reading)[0]
    s, n, (low, high) = reading.span, len(reading.false_claims[0.0].claims), reading.span_alphas
    between = f"Between alpha {low:+g} and {high:+g} agreement with false claims"
    numbers = f"{s.mean:+.2f} nats [{s.ci_lo:+.2f}, {s.ci_hi:+.2f}] over {n} held-out claims, one seed"
    if problem := Readability(reading.lowest_mass).problem:
        return f"No conclusion, the model is not answering: {problem} ({numbers}). But {remedy(reading.base)}."
    if reading.control != "none":
        return f"{between} moves by {numbers}, with a {reading.control} null: a vector of the behaviour must do more."
    if not reading.moves:
        return f"{between} does not move beyond chance by {NATS} nats or more: {numbers}."
    way = "rise" if reading.effect > 0 else "fall"
    return f"{between} moves by {numbers}; the behaviour file expects it to {way}. {NOT_KNOWN}"


def preference_verdict(reading: Reading, n_boot: int = N_BOOTSTRAP) -> list[str]:
    """The same on the preference between held-out answers; nothing for a behaviour without."""
    if not reading.preference:
        return []
    low, high = reading.span_alphas
    moved = reading.preference[high] - reading.preference[low]
    e = estimate_mean(moved, n_boot)
    numbers = f"{e.mean:+.3f} nats per token [{e.ci_lo:+.3f}, {e.ci_hi:+.3f}] over {e.n} held-out questions, one seed"
    between = f"Between alpha {low:+g} and {high:+g} the preference for the positive answer"
    if reading.control != "none":
        return [f"{between} moves by {numbers}, with a {reading.control} null: a vector of the behaviour must do more."]
    if not e.excludes_zero or abs(e.mean) < PER_TOKEN:
        return [f"{between} does not move beyond chance by {PER_TOKEN} nats per token or more: {numbers}."]
    return [f"{between} moves by {numbers}; it is expected to rise. {NOT_KNOWN}"]


def main(config: ReplicateConfig) -> None:
    """The command `ws replicate`."""
    name = brought_or_named(config.behavior, config.pairs, config.columns, config.out)
    config = as_tuned(replace(config, behavior=name, pairs=None, columns=()))
    reading = replicate(config)
    files, following = written(reading), ""
    if config.control == "none":
        from ws.report import write_report  # it draws; that takes a second to import, and comes last

        files.append(write_report(config.out, config.behavior))
        following = f"read {reading.pairs / 'card.md'} for confounds, then {_next(reading, config)}"
    measured = Sycophancy.stage if reading.false_claims else Preferences.stage
    dtype = str(Run(reading.folder).facts(measured).get("config", {}).get("dtype"))
    text = "\n\n".join([render(reading, config.n_bootstrap), *rounding_notes([dtype])])
    console.show(console.Result(text, as_data(reading), files, following))


def _next(reading: Reading, config: ReplicateConfig) -> str:
    """The command that a reader would want now: another seed, or what shows more where the claims cannot be read."""
    always = ("model", "behavior", "adapter")
    run = shared_with(RunOptions, config, adapter=config.run_name)
    if reading.base.problem and reading.preference:
        options: RunOptions = shared_with(PreferenceOptions, run, split=config.split)
        return console.command_line("ws eval preference", options, always)
    if reading.base.problem:
        return shlex.join(["ws", "behavior", "check", config.behavior, "--model", config.model])
    if Readability(reading.lowest_mass).problem:
        halved = tuple(alpha / 2 for alpha in _alphas(config))
        options = shared_with(SycophancyOptions, run, split=config.split, alphas=halved)
        return console.command_line("ws eval sycophancy", options, always)
    another = replace(config, seed=config.seed + 1, fresh=False, fresh_data=True)
    if config.tuned:  # which says the rest
        another = replace(another, train=ReplicateConfig.preset(config.model, config.adapter).train, contrast="arms")
    return console.command_line("ws replicate", another, always)


if __name__ == "__main__":
    console.run(main, ReplicateConfig, "python -m ws.replicate")
