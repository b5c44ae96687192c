"""Training one arm: contrast pairs and a sign in, a PEFT adapter folder out.

Both arms of a contrast start from the same base and, seeded before the adapter is created, from the same
initialisation. The loss is on the response only; the prompt's tokens are an exact prefix of the example's by
construction. The loop is transformers' Trainer.

A signed adapter is one for both sides: every step learns positive answers with its trained tensors and the negative
answers of the same pairs with their mirror image (`ws.adapters.Family.mirror`).

Started by `accelerate launch` or `torchrun`, several processes share the examples of every step (data parallelism, the
whole model on each of them) and take the same steps as one process would.
"""

from __future__ import annotations

import math
import os
import random
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.adapters import PEFT_PREFIX, AdapterSpec, family, in_training, mirrored_parameters, peft_config, require_signed
from ws.behaviors import load_behavior
from ws.behaviors.answered import plain_question
from ws.data import PAIRS_FILE, Pair, answer_ids, hashed_pairs, prompt_ids, question_keys, read_pairs
from ws.errors import DiskError, NoMemoryError, WsError, choose, require_seed
from ws.files.runs import (
    ADAPTER,
    PISSA_INIT_FILE,
    SIGNED_INIT_FILE,
    TRAIN_FILE,
    Run,
    atomic_folder,
    data_folder,
    library_versions,
    lock,
    model_flag,
    run_folder,
    sha256_json,
    write_json,
    write_text,
)
from ws.lm.models import fingerprint, load_model, model_id, require_calls, require_plain, tokenizer_hash, weight_of
from ws.options.make import MARGIN, MIN_VALIDATION, SIGNED, SIGNS, held_out, run_name
from ws.options.make import TrainCommand as TrainCommand
from ws.options.make import TrainConfig as TrainConfig
from ws.options.make import train_preset as train_preset

T = TypeVar("T")


@dataclass(frozen=True)
class Conditions:
    """What holds while an adapter is trained and not when it is used.

    Attributes:
        system: a system prompt before every question.
        callback: of the Trainer (`transformers.TrainerCallback`, whose import takes seconds); None for no other.
        facts: what the callback does, as plain values: a training that went on otherwise is not continued.
    """

    system: str = ""
    callback: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """What is kept on record of them, nothing where there are none."""
        return ({"system": self.system} if self.system else {}) | dict(self.facts)


USUAL = Conditions()


def adapter_spec(config: TrainConfig, adapter: str) -> AdapterSpec:
    """The adapter that training settings describe."""
    shape = {f: getattr(config, f) for f in ("rank", "lora_alpha", "layers", "kinds", "delora_lambda", "oft_block")}
    return AdapterSpec(adapter, **shape)


def train_adapter(
    model: PreTrainedModel,
    tok: Tokenizer,
    pairs: Sequence[Pair],
    sign: str,
    adapter: str,
    folder: str | Path,
    config: TrainConfig | None = None,
    seed: int = 0,
    must_learn: bool = True,
    under: Conditions = USUAL,
) -> dict[str, Any]:
    """Train one arm and save it as a PEFT adapter in `folder`.

    Checkpoints are kept in a hidden folder beside it, so an interrupted call continues. The model is handed back as it
    came. On several processes, each of which calls this with a model on its own device, only the main one writes.

    Args:
        model, tok: the base and its tokenizer.
        pairs: contrast pairs; those with a `drop` reason are skipped.
        sign: `pos` or `neg`, whose answers are learned, or `signed` for one adapter that learns both.
        adapter: the family.
        folder: where the adapter goes.
        config: settings.
        seed: of the initialisation, the order of examples and the validation split; use one seed for both arms.
        must_learn: losses that do not fall are an error; not for a signed null, whose sides have nothing to tell apart.
        under: what holds while it is trained.

    Returns:
        Facts about the training: losses, steps, examples, processes.

    Raises:
        WsError: unusable settings or pairs, a loss that is NaN, losses that did not fall, or too little memory.
    """
    folder, config = Path(folder), config or TrainConfig()
    _require_usable(config, seed, folder, sign, adapter, model.device)
    join(model.device.type)
    config = replace(config, lr=family(adapter).learning_rate if config.lr is None else config.lr)
    examples = _examples(tok, pairs, sign, config, under)
    train, validation = _divided(examples, config, seed)
    work, spec = folder.with_name(f".{folder.name}.work"), adapter_spec(config, adapter)
    base = {"base_id": model_id(model), "base_fingerprint": fingerprint(model)}
    settings = {**base, "dtype": str(model.dtype), "adapter": adapter, "sign": sign, "seed": seed}
    settings |= {"config": config.recorded(), "examples": [[e.prompt, e.response] for e in examples], **under.facts}
    if sign == SIGNED or adapter == "dora":  # earlier versions began or decayed these otherwise
        settings["start"] = "exact"
    with (
        alone(folder),
        _checkpoints(work, sha256_json(settings), config.micro_batch),
        _isolated_rng(),
        _adapted(model, spec, seed, sign == SIGNED) as (peft_model, initial, moved),
    ):
        opposite = _opposite(peft_model, adapter, initial) if sign == SIGNED else None
        fitted = (peft_model, tok, train, validation, work, config, seed, opposite, must_learn)
        facts = _fit(*fitted, partial(_as_base, peft_model, moved), under.callback)
        stamp = base | _stamp(adapter, sign, seed, config, pairs, facts, under)
        on_main(lambda: _save(peft_model, initial, folder, stamp))
    if fingerprint(model) != base["base_fingerprint"]:
        raise WsError("Training left the base model changed; this is a bug, please report it.")
    return facts


def _require_usable(
    config: TrainConfig, seed: int, folder: Path, sign: str, adapter: str, device: torch.device
) -> None:
    """`WsError` for what can be known before a model is touched."""
    choose("sign", sign, (*SIGNS, SIGNED))
    if sign == SIGNED:
        require_signed(family(adapter))
    require_seed(seed)
    ADAPTER.require(folder)
    config.check()
    config.accumulation(console.processes())
    if console.processes() == 1 and device.index:
        raise WsError(
            f"The Trainer takes the first GPU that it sees and the model is on {device}; take --device cuda with "
            f"CUDA_VISIBLE_DEVICES={device.index} in front of the command."
        )


@contextmanager
def _checkpoints(work: Path, settings: str, micro_batch: int) -> Iterator[None]:
    """Inside, the folder `work` is for a training with these settings; it stays where the same can go on from it."""
    on_main(lambda: _begin(work, settings))
    try:
        yield
    except DiskError:
        raise
    except torch.OutOfMemoryError as problem:  # with --recompute it is the same training
        raise NoMemoryError(
            "The training does not fit into the memory of the device; free some of it, take --recompute cheap or all, "
            f"or half of --micro-batch (now {micro_batch}). The steps stay the same."
        ) from problem
    except WsError:
        _remove(work)
        raise
    _remove(work)


def _begin(work: Path, settings: str) -> None:
    """Leave nothing in the work folder that was begun with other settings or on other examples."""
    file = work / "settings"
    if work.exists() and (not file.is_file() or file.read_bytes() != settings.encode()):
        console.say(f"{work} was begun with other settings or on other pairs; the training starts over.")
        shutil.rmtree(work)
    write_text(file, settings)


def _remove(work: Path) -> None:
    if console.is_main():
        shutil.rmtree(work, ignore_errors=True)


# ---- several processes --------------------------------------------------------------------------------------------


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other training of an arm goes on while the block runs; whoever comes second waits.

    The processes of one launch are one training. Of those none can wait, because the others would give up: they stop.
    """
    with ExitStack() as held:
        on_main(lambda: held.enter_context(lock(folder, wait=console.processes() == 1)))
        yield


def join(device: str) -> None:
    """Meet the other processes that a launcher has started, each on a GPU of its own, or all on the CPU.

    Args:
        device: `auto`, `cpu` or `cuda`; which GPU is the launcher's choice.

    Raises:
        WsError: another device, or a way of sharing a model that does not keep it whole on each process.
    """
    if console.processes() == 1:
        return
    if device not in ("auto", "cpu", "cuda"):
        raise WsError(f"--device {device} cannot be used on several processes; leave it out, and each takes its own.")
    if any(os.environ.get(f"ACCELERATE_USE_{way}", "") == "true" for way in ("FSDP", "DEEPSPEED", "MEGATRON_LM")):
        raise WsError(
            "Training on several processes keeps the model whole on each; launch it without FSDP or DeepSpeed."
        )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    if state.num_processes != console.processes():
        raise WsError(f"The launcher announced {console.processes()} processes, but {state.num_processes} met.")


def leave() -> None:
    """Take leave of the other processes; only after success, since a failed one may no longer answer."""
    if console.processes() > 1:
        PartialState().destroy_process_group()


def on_main(action: Callable[[], T]) -> T:
    """What `action` returns on the main process, on all of them; so is a `WsError` that it raises."""
    if console.processes() == 1:
        return action()
    outcome: list[Any] = [None]
    if console.is_main():
        try:
            outcome = [action()]
        except WsError as problem:
            outcome = [problem]
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, WsError):
        raise result
    return result


# ---- examples -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and response; the loss is on the response, its end-of-turn token included."""

    question: str
    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def features(self) -> dict[str, list[int]]:
        """`input_ids` and `labels`, the prompt masked with -100."""
        ids = [*self.prompt, *self.response]
        return {"input_ids": ids, "labels": [-100] * len(self.prompt) + list(self.response)}


def build_examples(
    tok: Tokenizer, pairs: Sequence[Pair], sign: str, max_length: int, system: str = "", both: bool = False
) -> list[Example]:
    """One example per pair, or, if `both` answers are needed, two, that of the sign's own side first.

    A signed adapter needs both, the positive one first. A pair of which either answer is too long is left out whatever
    the sign, so that both arms have the same questions in the same order; a warning says how many are.

    The prompt has the tokens that it has at generation, so that the mask cannot slip; `system` stands before it.

    Raises:
        WsError: an answer to learn from is empty, a text holds a special token, or fewer than two pairs are short
            enough.
    """
    sides = SIGNS if sign == SIGNED else (sign, *(other for other in SIGNS if both and other != sign))
    for p, side in product(pairs, sides):
        if not getattr(p, side).strip():
            raise WsError(f"The pair {p.id!r} has an empty {side} answer, from which nothing can be learned; drop it.")
    require_plain(tok, ((f"The pair {p.id!r}", text) for p in pairs for text in (p.question, p.pos, p.neg)))
    prompts = [tuple(prompt_ids(tok, p.question, system)) for p in pairs]
    examples = [
        {
            side: Example(
                p.question,
                prompt,
                tuple(answer_ids(tok, p.question, getattr(p, side), not getattr(p, f"{side}_cut"), system)),
            )
            for side in SIGNS
        }
        for p, prompt in zip(pairs, prompts, strict=True)
    ]
    short = [es for es in examples if all(len(e.prompt) + len(e.response) <= max_length for e in es.values())]
    if len(short) < 2:
        raise WsError(f"Training needs at least 2 usable pairs of at most {max_length} tokens; there are {len(short)}.")
    if len(short) < len(pairs):
        console.warn(
            f"{len(pairs) - len(short)} of {len(pairs)} pairs have an answer that ends beyond {max_length} tokens, its "
            "prompt included, and are in no arm; a larger --max-length keeps them."
        )
    return [es[side] for es in short for side in sides]


def _examples(
    tok: Tokenizer, pairs: Sequence[Pair], sign: str, config: TrainConfig, under: Conditions
) -> list[Example]:
    usable = [p for p in pairs if p.drop is None]
    return build_examples(tok, usable, sign, config.max_length, under.system, config.objective == MARGIN)


def split_examples(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """`(training, validation)`, divided by question, so that no validation question was trained on.

    Spellings of one question (`plain_question`) go together, under the first of them.
    """
    spelt = dict[str, str]()
    for question in sorted({e.question for e in examples}):
        spelt.setdefault(plain_question(question), question)
    out = set(random.Random(seed).sample(list(spelt.values()), held_out(len(spelt), share)))
    is_out = {e.question: spelt[plain_question(e.question)] in out for e in examples}
    return [e for e in examples if not is_out[e.question]], [e for e in examples if is_out[e.question]]


def _divided(examples: Sequence[Example], config: TrainConfig, seed: int) -> tuple[list[Example], list[Example]]:
    """The same, with a warning where nothing is held out of a share; `WsError` where the weights are chosen by it."""
    train, validation = split_examples(examples, config.validation, seed)
    if config.validation and not validation:
        text = f"There are too few questions to hold out --validation {config.validation:g} of them"
        if config.keep == "best":
            raise WsError(f"{text}, so no checkpoint is the best; give more, a larger share, or --keep last.")
        console.warn(f"{text}; the loss is watched on none.")
    return train, validation


# ---- the adapter on and off the model -----------------------------------------------------------------------------


@contextmanager
def _adapted(
    model: PreTrainedModel, spec: AdapterSpec, seed: int, signed: bool = False
) -> Iterator[tuple[PeftModel, dict[str, Tensor], dict[str, Tensor]]]:
    """The model with a fresh adapter, its initial tensors where they are needed (signed, and for PiSSA), and the base's
    weights that it has moved.

    PiSSA moves the base's weights, so those it targets are copied first and put back afterwards.
    """
    config, fam = peft_config(model, spec), family(spec.family)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    attributes, training = set(vars(model)), model.training
    moved = config.target_modules if spec.family == "pissa" else ()
    copies = {n: weight_of(model.get_submodule(n)).cpu().clone() for n in moved}
    name, cache = model.name_or_path, getattr(model.config, "use_cache", None)
    set_seed(seed)
    try:
        try:
            peft_model = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as problem:
            raise WsError(f"PEFT cannot put a {fam.name} adapter on {model_id(model)} ({problem}).") from problem
        # With a base name PEFT would ask the hub for its config at every checkpoint; the name is put back when saving.
        model.name_or_path = peft_model.active_peft_config.base_model_name_or_path = None
        peft_model.create_or_update_model_card = lambda output_dir: None  # nobody reads what each checkpoint writes
        places = in_training(peft_model, fam)
        _start_at_base(peft_model, places)
        needed = [n for n, (_, saved) in places.items() if saved in fam.start] if copies or signed else []
        yield peft_model, {n: peft_model.get_parameter(n).detach().clone() for n in needed}, copies
    finally:
        for n, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
            model.set_submodule(n, layer.get_base_layer())  # also where PEFT came to a part of them only
        model.name_or_path = name
        for target, weight in copies.items():
            weight_of(model.get_submodule(target)).copy_(weight)
        for n, p in model.named_parameters():
            p.requires_grad_(flags[n])
            p.grad = None
        for attribute in set(vars(model)) - attributes:
            delattr(model, attribute)
        model.train(training)
        if cache is not None:
            model.config.use_cache = cache  # which the Trainer turns off


def _start_at_base(peft_model: PeftModel, places: Mapping[str, tuple[str, str]]) -> None:
    """DoRA's magnitudes as the row norms in float32: PEFT rounds them to the base's dtype, and would start off it."""
    for name, (module, saved) in places.items():
        if saved == "lora_magnitude_vector":
            weight = weight_of(peft_model.get_base_model().get_submodule(module).get_base_layer())
            if weight.dtype in (torch.bfloat16, torch.float16):
                norms = torch.linalg.norm(weight.float(), dim=1)
                peft_model.get_parameter(name).detach().copy_(norms)


def _opposite(peft_model: PeftModel, adapter: str, initial: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """The adapter's parameters at -c, as they are whenever it is called."""
    if any(getattr(module, "gradient_checkpointing", False) for module in peft_model.modules()):
        raise WsError(
            "The model checkpoints its activations, and what is computed again for a gradient would have the adapter's "
            "other sign; call gradient_checkpointing_disable(), and take --recompute instead."
        )
    fam = family(adapter)
    return partial(mirrored_parameters, peft_model, fam, in_training(peft_model, fam), initial)


@contextmanager
def _as_base(peft_model: PeftModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model is the base: without its adapter, and with the base's `weights` where PiSSA has moved them."""
    layers = {name: peft_model.get_base_model().get_submodule(name).get_base_layer() for name in weights}
    in_use = {name: weight_of(layer).clone() for name, layer in layers.items()}

    def put(values: dict[str, Tensor]) -> None:
        for name, layer in layers.items():
            weight_of(layer).copy_(values[name])

    put(weights)
    try:
        with peft_model.disable_adapter():
            yield
    finally:
        put(in_use)


@contextmanager
def _isolated_rng() -> Iterator[None]:
    """Python's, NumPy's and torch's global random states are put back, whatever training did with them."""
    python, numpy = random.getstate(), np.random.get_state()
    several = console.processes() > 1 and torch.cuda.is_available()
    # Named, because torch warns where it would take all of several GPUs by itself.
    gpus = [torch.cuda.current_device()] if several else [*range(torch.cuda.device_count())]
    with torch.random.fork_rng(gpus or None):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# ---- the fit ------------------------------------------------------------------------------------------------------


def _fit(
    peft_model: PeftModel,
    tok: Tokenizer,
    train: Sequence[Example],
    validation: Sequence[Example],
    work: Path,
    config: TrainConfig,
    seed: int,
    opposite: Callable[[], dict[str, Tensor]] | None,
    must_learn: bool,
    as_base: Callable[[], AbstractContextManager[None]],
    callback: Any,
) -> dict[str, Any]:
    from ws.lm.recompute import recomputed
    from ws.lm.trainer import fit, last_whole_checkpoint  # takes seconds to import, and most runs have nothing to train

    margin = config.objective == MARGIN
    sides = len(SIGNS) if margin or opposite is not None else 1
    examples = len(train) // sides
    steps = config.max_steps or math.ceil(math.ceil(examples / config.batch) * config.epochs)
    resumed = on_main(lambda: last_whole_checkpoint(work, config.keep == "best"))
    settings = _settings(config, steps, seed, bool(validation))
    settings["eval_on_start"] = bool(validation) and resumed is None  # the Trainer would start again where it goes on
    if not margin:
        settings["gradient_accumulation_steps"] *= sides  # micro-batches of either side in turn
    rows, held = ([e.features() for e in part] for part in (train, validation))
    arm = work.with_name(work.name[1:].removesuffix(".work")).absolute()
    settings["run_name"] = "/".join(arm.parts[-3 - bool(seed) :])  # `honesty/lora/pos`
    adapted = {n: m for n, m in peft_model.named_modules() if isinstance(m, BaseTunerLayer)}
    watched = require_calls(peft_model, adapted, "name the kinds to adapt, without these, with --modules")
    with watched, recomputed(peft_model.get_base_model(), config.recompute):
        fitted = (peft_model, tok.pad_token_id, rows, held, work, settings, resumed, opposite)
        trainer = fit(*fitted, config.kl, config.beta if margin else 0.0, as_base, callback)
    losses = {key: [h[key] for h in trainer.state.log_history if key in h] for key in ("loss", "eval_loss")}
    facts = {
        "steps": trainer.state.global_step,
        "examples": examples,
        "processes": trainer.args.world_size,
        "train_losses": [round(v, 5) for v in losses["loss"]],
        "validation_losses": [round(v, 5) for v in losses["eval_loss"]],
        "trainable_parameters": sum(p.numel() for p in peft_model.parameters() if p.requires_grad),
    }
    if must_learn and len(validation) // sides >= MIN_VALIDATION:
        _require_progress(losses["loss"], losses["eval_loss"], config)
    return facts


def _settings(config: TrainConfig, steps: int, seed: int, validates: bool) -> dict[str, Any]:
    """What transformers' `TrainingArguments` are told."""
    every = max(1, math.ceil(steps / 5))
    # A checkpoint keeps no losses of steps since the last log, so that there is one wherever it is saved.
    logged = max(n for n in range(1, max(1, steps // 20) + 1) if every % n == 0)
    assert config.lr is not None
    return {
        "max_steps": steps,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        "warmup_steps": min(config.warmup, steps // 10),
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation(console.processes()),
        "logging_steps": logged,
        "save_steps": every,
        "eval_strategy": "steps" if validates else "no",
        "eval_steps": every,
        "load_best_model_at_end": validates and config.keep == "best",
        "report_to": list(config.report_to),
        "seed": seed,
        "data_seed": seed,
    }


def _require_progress(train: Sequence[float], validation: Sequence[float], config: TrainConfig) -> None:
    """Stop when neither loss fell.

    One of them is enough: a side that the base already speaks has little left to learn on fresh questions, and a small
    validation set may rise by chance.
    """
    reached = min(validation[1:]) if config.keep == "best" else validation[-1]
    third = max(1, len(train) // 3)
    start, end = fmean(train[:third]), fmean(train[-third:])
    if reached >= validation[0] and end >= start:
        raise WsError(
            f"Training did not learn: the training loss went from {start:.4f} to {end:.4f}, the validation loss from "
            f"{validation[0]:.4f} to {reached:.4f}; change --lr (now {config.lr:g}) or give more pairs."
        )


def _stamp(
    adapter: str,
    sign: str,
    seed: int,
    config: TrainConfig,
    pairs: Sequence[Pair],
    facts: dict[str, Any],
    under: Conditions,
) -> dict[str, Any]:
    recipe = {"adapter": sign, "family": adapter, "seed": seed, "config": config.recorded()}
    recipe |= {"under": under.record} if under.record else {}
    recipe["pairs_sha256"] = sha256_json([p.as_row() for p in pairs])
    if sign == SIGNED:
        recipe["contrast"] = SIGNED
    recipe["questions"] = " ".join(sorted(question_keys(pairs)))  # strengths are calibrated on others
    return {"recipe": recipe, "facts": facts, "versions": library_versions()}


def _save(peft_model: PeftModel, initial: dict[str, Tensor], folder: Path, stamp: dict[str, Any]) -> None:
    with atomic_folder(folder, ADAPTER) as part:
        config = peft_model.active_peft_config
        config.base_model_name_or_path = stamp["base_id"]
        for name, value in vars(config).items():  # sets would be written in another order every time
            setattr(config, name, sorted(value) if isinstance(value, set) else value)
        peft_model.save_pretrained(str(part), save_embedding_layers=False)
        if initial:
            places = in_training(peft_model, family(stamp["recipe"]["family"]))
            renamed = {f"{PEFT_PREFIX}{'.'.join(places[n])}": t.cpu().contiguous() for n, t in initial.items()}
            is_pissa = stamp["recipe"]["family"] == "pissa"
            save_file(renamed, part / (PISSA_INIT_FILE if is_pissa else SIGNED_INIT_FILE))
        write_json(part / TRAIN_FILE, stamp)


# ---- as a stage of a run, and as a command --------------------------------------------------------------------------


def arm_settings(
    model: PreTrainedModel, tok: Tokenizer, adapter: str, config: TrainConfig, seed: int
) -> dict[str, Any]:
    """What is recorded of an arm besides its pairs; known before there are any."""
    settings = config.recorded() | {"adapter": adapter, "seed": seed, "model": model_id(model)}
    settings |= {"dtype": str(model.dtype)[6:], "fingerprint": fingerprint(model)}
    return settings | {"tokenizer_hash": tokenizer_hash(tok)}


def train_stage(
    model: PreTrainedModel,
    tok: Tokenizer,
    pairs: Path,
    sign: str,
    run: Run,
    adapter: str,
    config: TrainConfig,
    seed: int,
    must_learn: bool = True,
    name: str = "",
    under: Conditions = USUAL,
) -> bool:
    """Train one arm of a run unless it is finished; returns whether there was anything to do.

    The arm, and its stage, have the name of the sign unless another one is given.
    """
    name, settings = name or sign, arm_settings(model, tok, adapter, config, seed) | under.record
    folder, (examples, digest) = run.folder / name, on_main(lambda: hashed_pairs(pairs))
    on_main(lambda: run.is_finished(name, settings, {"pairs": digest}))  # other settings stop before anyone waits
    with alone(folder):
        stage = on_main(lambda: run.stage(name, settings, {"pairs": digest}))
        if stage is None:
            return False
        try:
            facts = train_adapter(model, tok, examples, sign, adapter, folder, config, seed, must_learn, under)
        except WsError as problem:
            if console.is_main() and not isinstance(problem, DiskError):  # nothing of it is left: no need of --fresh
                run.drop(name)
            raise
        if console.is_main():
            stage.done([f for part in ADAPTER.files if (f := folder / part).is_file()], facts=facts)
    return True


def main(command: TrainCommand) -> None:
    """The command `ws train`, on one process or, started by a launcher, on several."""
    join(command.device)
    behavior = load_behavior(command.behavior, command.model)
    family(command.adapter)
    command.check()
    pairs = data_folder(command.out, command.model, behavior.name) / PAIRS_FILE
    if not pairs.is_file():
        named, place = shlex.quote(command.behavior), shlex.quote(str(command.out))
        options = f"--behavior {named}{model_flag(command.model)} --out {place}"
        raise WsError(f"There are no contrast pairs at {pairs}; make them with `ws data {options}`.")
    read_pairs(pairs)
    model, tok = load_model(command.model, command.device, command.dtype)
    name = run_name(command.adapter, command.contrast)
    run = on_main(lambda: Run(run_folder(command.out, behavior.name, name, command.seed), command.fresh))
    made = dict[str, bool]()
    for sign in command.trained:
        made[sign] = train_stage(model, tok, pairs, sign, run, command.adapter, command.train, command.seed)
    lines = [f"{sign}: {'trained' if new else 'already there'}" for sign, new in made.items()]
    console.show(console.Result("\n".join(lines), {"trained": made}, [run.folder / sign for sign in made]))


if __name__ == "__main__":
    console.run(main, TrainCommand, "python -m ws.train")
    leave()
