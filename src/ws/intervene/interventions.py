"""Interventions: everything that can be done to a model to change its answers, behind one switch with a dial.

A table is only a comparison when its rows went through the same evaluation. An intervention is therefore a context that
a model (or its tokenizer) is in while it is evaluated, and a name that every row carries:

    weight                       W + alpha dW
    finetune                     the two arms themselves: theta_pos at +1, theta_neg at -1
    positive-only                W + alpha (theta_pos - W)
    negative-only                W + alpha (W - theta_neg)
    gradient                     W + alpha G, the gradient of the contrast at the base (see `ws.intervene.gradient`)
    gradient-low-rank            W + alpha G_r, its best approximation of the rank that the adapter was trained with
    prompt                       a persona of the behaviour as system prompt: the positive at +1, the negative at -1
    activation                   alpha a^l after one block, at the last position (see `ws.intervene.activation`)
    activation-everywhere        the same at every position
    activation-layers            alpha (a^l - a^(l-1)) after every block but the last, at the last position
    activation-layers-everywhere the same at every position

The model as it came is `base`, at alpha 0 of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.behaviors import Behavior
from ws.behaviors.tables import evenly
from ws.data import PAIRS_FILE, hashed_pairs
from ws.diff import CALIBRATION, SteeringVector, vector_digest
from ws.errors import WsError, choose
from ws.files.runs import Run, data_folder, sha256_json, write_csv
from ws.intervene.activation import ActivationVector, activation_steer, activation_vector, choose_layer
from ws.intervene.calibration import (
    Calibration,
    load_calibration,
    parse_alpha,
    parse_alphas,
    prompts_hash,
    solve,
    split_questions,
)
from ws.intervene.gradient import contrast_gradient
from ws.intervene.prompt import prompting
from ws.lm.divergence import Divergence, divergence
from ws.lm.models import fingerprint, layer_count, render_prompt, tokenizer_hash
from ws.options.make import SIGNED, TrainConfig
from ws.options.shared import INTERVENTIONS, WEIGHT, CalibrationConfig, read_options
from ws.run import FinishedRun
from ws.steer import steer

ARMS = ("finetune", "positive-only", "negative-only")
GRADIENTS = ("gradient", "gradient-low-rank")
OF_A_RUN = (WEIGHT, *ARMS, *GRADIENTS)
ACTIVATIONS = {
    "activation": ("one", "last"),
    "activation-everywhere": ("one", "all"),
    "activation-layers": ("all", "last"),
    "activation-layers-everywhere": ("all", "all"),
}
# Blocks are compared at the strengths that cost this divergence on this many of the questions. So many are tried at
# most, evenly spread: next to one another they do much the same, and on a real model each takes minutes.
_CHOICE = CalibrationConfig(n_prompts=10, tolerance=0.2)
_BLOCKS = 12
# How activations are steered; 1 left all but the last token of given answers as they were, 2 of thoughts read again.
_ACTING = 3


@dataclass(frozen=True)
class Intervention:
    """One way to change what a model answers.

    Attributes:
        name: one of `INTERVENTIONS`; the key of its rows.
        at: the context in which it acts with a strength.
        digest: changes when what it does at a strength changes.
        run: the one that its files belong to: of the vector, or shared by all adapters.
        has_dial: False where there are only the strengths -1 and +1.
        detail: what a reader may want to know besides, such as the layer.
        tokenizer: hash of the tokenizer that its calibration must be of; None leaves that unchecked.
    """

    name: str
    at: Callable[[float], AbstractContextManager[Any]]
    digest: str
    run: Run
    has_dial: bool = True
    detail: str = ""
    tokenizer: str | None = None

    @property
    def is_shared(self) -> bool:
        """True when it depends on no adapter, so that its scores serve all runs of a behaviour."""
        return self.name not in OF_A_RUN

    @property
    def calibration_file(self) -> Path:
        """Where its calibration is."""
        if self.name == WEIGHT:
            return self.run.folder / "vector" / CALIBRATION
        return self.run.folder / f"calibration_{self.name}.json"

    def calibration(self, model: PreTrainedModel) -> Calibration | None:
        """The stored calibration, None when there is none; see `ws.intervene.calibration.load_calibration`."""
        file = self.calibration_file
        return load_calibration(file.parent, self.digest, fingerprint(model), file.name, self.tokenizer)

    def strengths(self, alphas: Sequence[float | int | str], model: PreTrainedModel) -> list[float]:
        """The strengths in order, the base's 0 included, from numbers and calibrated units.

        Without a dial a unit is a strength: the persona, or the arm, as it is.

        Raises:
            WsError: units without a calibration that converged, or another strength than -1, 0 and +1 without a dial.
        """
        if self.has_dial:
            in_units = any(isinstance(a, str) for a in alphas)
            return sorted({0.0, *parse_alphas(alphas, self.calibration(model) if in_units else None)})
        words = [a for w in alphas for a in (("-1", "1") if w == "calibrated" else (w,))]
        plain = {parse_alpha(str(word).removesuffix("u")) for word in words}
        if plain - {-1.0, 0.0, 1.0}:
            raise WsError(
                f"The intervention {self.name} has no dial: its strengths are -1 and +1, not {sorted(plain)}."
            )
        return sorted({0.0, *plain})


def divergence_of(
    intervention: Intervention,
    model: PreTrainedModel,
    tok: Tokenizer,
    questions: Sequence[str],
    alpha: float,
    config: CalibrationConfig | None = None,
) -> Divergence:
    """How surprised the base is by the answers of the model under an intervention; see `ws.lm.divergence`."""
    settings, at = config or CalibrationConfig(), partial(intervention.at, alpha)
    with at():
        prompts = [render_prompt(tok, q) for q in questions]
    plain = [render_prompt(tok, q) for q in questions]
    return divergence(model, tok, prompts, at, settings.n_tokens, settings.batch_size, plain)


# ---- making them ----------------------------------------------------------------------------------------------------


def intervention(name: str, opened: FinishedRun, behavior: Behavior) -> Intervention:
    """An intervention by name, for the behaviour and the model of a finished run.

    Raises:
        WsError: an unknown name, or a run that lacks what it is made from (the arms, or the behaviour's pairs).
    """
    return replace(_intervention(name, opened, behavior), tokenizer=tokenizer_hash(opened.tok))


def _intervention(name: str, opened: FinishedRun, behavior: Behavior) -> Intervention:
    choose("intervention", name, INTERVENTIONS)
    if name == "prompt":
        return _prompt(opened, behavior)
    if name in ACTIVATIONS:
        return _activation(name, opened, behavior)
    if name == WEIGHT:
        return _weight(name, opened, opened.vector)
    if name == "finetune":
        return _finetune(opened)
    if name in GRADIENTS:
        return _gradient(name, opened, behavior)
    return _weight(name, opened, arm(opened, "pos") if name == "positive-only" else -arm(opened, "neg"))


def _weight(name: str, opened: FinishedRun, vector: SteeringVector) -> Intervention:
    return Intervention(name, partial(steer, opened.model, vector), vector_digest(vector), opened.run)


def _finetune(opened: FinishedRun) -> Intervention:
    arms = {1.0: arm(opened, "pos"), -1.0: arm(opened, "neg")}

    def at(alpha: float) -> AbstractContextManager[Any]:
        return nullcontext() if alpha == 0 else steer(opened.model, arms[alpha], 1.0)

    digest = sha256_json([vector_digest(v) for v in arms.values()])
    return Intervention("finetune", at, digest, opened.run, has_dial=False)


def arm(opened: FinishedRun, sign: str) -> SteeringVector:
    """`theta - base` of one arm of a run; `WsError` when the run has no arms, as a composed vector's."""
    folder = opened.run.folder / sign
    if (opened.run.folder / SIGNED).is_dir():
        raise WsError(
            f"{opened.run.folder} has one signed adapter and no arms, so there is no finetune, positive-only or "
            "negative-only of it; leave these out of --interventions."
        )
    if not folder.is_dir():
        raise WsError(f"There is no trained arm in {folder}; only a run of `ws replicate` has arms.")
    return SteeringVector.from_adapter(folder, opened.model)


def _gradient(name: str, opened: FinishedRun, behavior: Behavior) -> Intervention:
    vector = gradient_of(name, opened, behavior)
    detail = f"rank {vector.max_rank}" if vector.is_low_rank else ""
    return replace(_weight(name, opened, vector), detail=detail)


def gradient_of(name: str, opened: FinishedRun, behavior: Behavior) -> SteeringVector:
    """`gradient` or `gradient-low-rank` for the modules and the examples of a run; kept in the run's folder."""
    recipe, pairs = opened.training(behavior)
    config = read_options(TrainConfig, recipe["config"], "training setting")
    contrast, seed = recipe.get("contrast", "arms"), recipe["seed"]
    rank = config.rank if name == "gradient-low-rank" else None
    model, tok, run, folder = opened.model, opened.tok, opened.run, opened.run.folder / name
    modules = list(opened.vector.deltas)
    settings = {"format": 1, "tokenizer_hash": tokenizer_hash(tok), "rank": rank, "contrast": contrast, "seed": seed}
    settings |= {"validation": config.validation, "max_length": config.max_length, "dtype": str(model.dtype)[6:]}
    inputs = {"pairs": recipe["pairs_sha256"], "model": fingerprint(model), "modules": sha256_json(sorted(modules))}
    with run.alone(name):
        stage = run.refresh(name, settings, inputs)
        if stage is not None:
            console.say(f"{name}: the gradient of the contrast in {len(modules)} modules, in {folder}")
            contrast_gradient(model, tok, pairs, modules, config, seed, contrast, rank).save(folder)
            stage.done([f for f in folder.iterdir() if f.is_file()])
        return SteeringVector.load(folder)


def _prompt(opened: FinishedRun, behavior: Behavior) -> Intervention:
    if not behavior.positive:
        raise WsError(
            f"The behaviour {behavior.name} has no personas to prompt with; give its file a table [personas], or leave "
            "the prompt out."
        )
    personas = {1.0: behavior.positive[0], -1.0: behavior.negative[0]}

    def at(alpha: float) -> AbstractContextManager[Any]:
        return nullcontext() if alpha == 0 else prompting(opened.tok, personas[alpha])

    run = Run(_shared_folder(opened, behavior, "prompt"))
    return Intervention("prompt", at, sha256_json(list(personas.values())), run, False, personas[1.0])


def _shared_folder(opened: FinishedRun, behavior: Behavior, name: str) -> Path:
    """`out/<behavior>/<name>`, beside the adapters' folders."""
    return opened.out / behavior.name / name


def _activation(name: str, opened: FinishedRun, behavior: Behavior) -> Intervention:
    span, position = ACTIVATIONS[name]
    vector, run = activation_of(opened, behavior)
    layers = "all" if span == "all" else chosen_layer(opened, behavior, vector, run, position)
    detail = "every block but the last" if layers == "all" else f"after block {layers}"
    at = partial(activation_steer, opened.model, vector, layers=layers, position=position)
    return Intervention(name, at, sha256_json([_ACTING, vector.digest, layers, position]), run, detail=detail)


def _reading(opened: FinishedRun) -> dict[str, str]:
    """How the model reads, beside its weights: what is made from its activations hangs on that."""
    return {"dtype": str(opened.model.dtype)[6:], "tokenizer_hash": tokenizer_hash(opened.tok)}


def activation_of(opened: FinishedRun, behavior: Behavior) -> tuple[ActivationVector, Run]:
    """The activation vector of a behaviour's pairs and the run it is kept in; made once for all adapters."""
    pairs_file = data_folder(opened.out, opened.vector.base_id, behavior.name) / PAIRS_FILE
    if not pairs_file.is_file():
        raise WsError(f"There are no pairs in {pairs_file} to read activations from; `ws data` samples them.")
    run = Run(_shared_folder(opened, behavior, "activation"))
    folder = run.folder / "vector"
    with run.alone("activation"):
        pairs, digest = hashed_pairs(pairs_file)
        inputs = {"pairs": digest, "model": fingerprint(opened.model)}
        stage = run.refresh("vector", {"format": 1} | _reading(opened), inputs)
        if stage is not None:
            console.say(f"activation vector in {folder}")
            activation_vector(opened.model, opened.tok, pairs, behavior.name).save(folder)
            stage.done([f for f in folder.iterdir() if f.is_file()])
        return ActivationVector.load(folder), run


def chosen_layer(opened: FinishedRun, behavior: Behavior, vector: ActivationVector, run: Run, position: str) -> int:
    """The one block to steer after, chosen on the `dev` claims at strengths that cost every block one nat."""
    name, file = f"layer {position}", run.folder / f"layers_{position}.csv"
    with run.alone("activation"):
        settings = {"choice": _CHOICE.settings, "behavior": behavior.digest, "acting": _ACTING}
        # Questions that no pair uses, where the behaviour has some.
        split = split_questions(behavior.questions, _CHOICE.n_prompts, opened.unseen(behavior))
        prompts = [render_prompt(opened.tok, q) for q in split.calibration]
        settings |= _reading(opened)
        stage = run.refresh(name, settings, {"vector": vector.digest, "prompts": prompts_hash(prompts, ())})
        if stage is not None:
            console.say(f"choosing the block to steer after ({position} position), on the dev claims")
            matched = _matched_strengths(opened, prompts, vector, position)
            choice = choose_layer(opened.model, opened.tok, vector, behavior, position=position, strengths=matched)
            stage.done([write_csv(file, choice.rows())], layer=choice.best.layer)
        return run.fact(name, "layer", int)


def _matched_strengths(
    opened: FinishedRun, prompts: Sequence[str], vector: ActivationVector, position: str
) -> dict[int, tuple[float, float]]:
    """Negative and positive strength per block at the target divergence; blocks that cannot reach it are left out.

    The search at a block begins where that of the block before has ended.
    """
    model, tok, strengths, start = opened.model, opened.tok, {}, 1.0
    blocks = [i for i in range(layer_count(model)) if vector.norms[i] > 0]
    for layer in console.progress(evenly(blocks, min(_BLOCKS, len(blocks))), desc="blocks", unit="block"):
        steerable = partial(activation_steer, model, vector, layers=layer, position=position)

        def measure(alpha: float, steerable: Callable[..., Any] = steerable) -> float:
            return divergence(model, tok, prompts, partial(steerable, alpha), _CHOICE.n_tokens).at(_CHOICE.quantile)

        minus = solve(measure, -1, _CHOICE, start)
        plus = solve(measure, 1, _CHOICE, abs(minus.alpha) if minus.converged else start)
        if minus.converged and plus.converged:
            strengths[layer], start = (minus.alpha, plus.alpha), plus.alpha
    if not strengths:
        raise WsError(f"Steering activations after one block ({position} position) reaches 1 nat at no block.")
    return strengths
