"""What a sweep costs, as arithmetic: 6 families x 5 seeds x 5 evaluations on 0.6, 8 and 70 billion parameters.

`uv run python -m benchmarks.growth` runs nothing. Models are built on torch's `meta` device, which has shapes and no
numbers; from them, the defaults of the commands and the items of the behaviour come parameters, adapters, keys and
values, activations and tokens. What no code knows is an assumption, named in `Assumptions`.

Time of what reads many tokens at once is `FLOPs / (peak x utilisation)`; of a decoding step it is the longest of
arithmetic, of reading weights, keys and values from memory, and of starting the operations one by one from Python.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

import ws
from benchmarks.vector import QWEN3_06B
from ws.adapters import peft_config
from ws.behaviors import Behavior
from ws.data import count_pairs
from ws.files.runs import write_csv
from ws.lm.models import layer_of, linear_size, parse_layers
from ws.lm.sampling import START_BATCH
from ws.options.make import SweepConfig, TrainConfig, held_out
from ws.options.measure import ANSWER_TOKENS
from ws.options.shared import ADAPTERS
from ws.train import adapter_spec

# The model cards' shapes: Qwen3-8B (Qwen3 technical report, arXiv 2505.09388), Llama 3 70B (arXiv 2407.21783, table 3).
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
LLAMA3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
MODELS: dict[str, PreTrainedConfig] = {"Qwen3-0.6B": QWEN3_06B, "Qwen3-8B": QWEN3_8B, "Llama-3-70B": LLAMA3_70B}
EVALUATIONS = ("sycophancy", "preference", "airisk", "tinymfv_airisk", "answers")
SEEDS = 5
RESULTS = Path(__file__).parents[1] / "docs" / "results"


@dataclass(frozen=True)
class Assumptions:
    """What is not in the code. Each can be given as an option.

    Attributes:
        peak: dense bfloat16 FLOP/s of an H100 SXM, without sparsity (NVIDIA's data sheet of the H100).
        memory: its bytes of memory, and `bandwidth` in bytes/s (the same sheet).
        bandwidth: see `memory`.
        utilisation: share of `peak` where many tokens are read at once; 0.38 to 0.43 is reported for training Llama 3
            (arXiv 2407.21783, table 4) with far larger batches and compiled kernels.
        read: share of `bandwidth` that decoding reaches.
        launch: seconds to start one operation from Python; what an uncompiled model waits for in a decoding step.
        usable: share of `memory` that tensors can have.
        price: of an hour of one GPU, in dollars.
        answer_tokens: of a sampled answer with its end, on average; half of what is allowed, as `ws data` estimates.
        thought_tokens: of a thought before a dilemma; all that is allowed.
        template_tokens: that a chat template adds to a question.
        per_char: tokens per character of a prompt; 0.18 (dilemmas) to 0.25 (vignettes) with SmolLM2's tokenizer.
        dilemmas: in AIRiskDilemmas' `model_eval`, and characters of a question about one: the mean of 400 of them.
        dilemma_chars: see `dilemmas`.
        vignettes: in tiny-mfv's `airisk`, each in two persons and two frames, and the mean characters of a question.
        vignette_chars: see `vignettes`.
        score_bytes: of a score on disk.
        disk: bytes/s at which a job reads the model's weights.
    """

    peak: float = 989e12
    memory: float = 80e9
    bandwidth: float = 3.35e12
    utilisation: float = 0.3
    read: float = 0.6
    launch: float = 8e-6
    usable: float = 0.92
    price: float = 2.5
    answer_tokens: float = 128.0
    thought_tokens: float = 128.0
    template_tokens: float = 30.0
    per_char: float = 0.2
    dilemmas: int = 3000
    dilemma_chars: float = 763.0
    vignettes: int = 131
    vignette_chars: float = 241.0
    score_bytes: float = 100.0
    disk: float = 2e9

    def prompt(self, characters: float) -> float:
        """Tokens of a question."""
        return self.template_tokens + self.per_char * characters


# ---- what a model is -------------------------------------------------------------------------------------------------


class _Counting(TorchDispatchMode):
    """Counts operations that start something on a GPU: all but views and what makes an empty tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or "empty" in str(function))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Shape:
    """What is read off a model without numbers.

    Attributes:
        parameters: how many there are.
        multiplied: weights that every token is multiplied by: linear layers, and the output's once.
        head: those of the output alone.
        attention: FLOPs of attention per token and token before it: `4 x layers x heads x head size`.
        cache: bytes of keys and values per token, in bfloat16.
        operations: started in a decoding step.
        backward: share of the linear layers' work that a gradient has to pass: from the first adapted layer up.
    """

    parameters: int
    multiplied: int
    head: int
    attention: int
    cache: int
    operations: int
    backward: float

    @classmethod
    def of(cls, model: PreTrainedModel, layers: str) -> Shape:
        """Of a model on the `meta` device in bfloat16."""
        config = model.config
        sizes = {n: math.prod(size) for n, m in model.named_modules() if (size := linear_size(m))}
        first = min(parse_layers(layers, config.num_hidden_layers))
        passed = sum(n for name, n in sizes.items() if (at := layer_of(name)) is None or at >= first)
        ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
        with torch.no_grad():
            kept = model(input_ids=ids, use_cache=True).past_key_values
            cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
            with _Counting() as counting:
                model(input_ids=ids, past_key_values=kept, use_cache=True)
        head = math.prod(model.get_output_embeddings().weight.shape)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * width
        multiplied = sum(sizes.values())
        counts = (sum(p.numel() for p in model.parameters()), multiplied, head, attention, cache, counting.count)
        return cls(*counts, passed / multiplied)

    @property
    def weights(self) -> int:
        """Bytes of the model in bfloat16."""
        return 2 * self.parameters

    def reading(self, tokens: float, length: float) -> float:
        """FLOPs to read so many tokens in texts of a length, of which only the last needs the vocabulary's scores."""
        return tokens * (2 * (self.multiplied - self.head) + self.attention * length / 2)

    def training(self, tokens: float, length: float, numbers: float) -> float:
        """FLOPs to train an adapter on so many tokens: forward, back to the first adapted layer, and the adapter's own.

        The frozen weights need no gradients of theirs, so back costs what forward does.
        """
        forward = 2 * self.multiplied + self.attention * length / 2
        return tokens * (forward * (1 + self.backward) + 6 * numbers)

    def decoding(self, rows: float, length: float, a: Assumptions) -> float:
        """Seconds of one step in which so many rows, of a mean length, each write a token."""
        arithmetic = rows * (2 * self.multiplied + self.attention * length) / (a.peak * a.utilisation)
        moved = (2 * self.multiplied + rows * length * self.cache) / (a.bandwidth * a.read)
        return max(arithmetic, moved, self.operations * a.launch)


@cache
def on_meta(name: str) -> PreTrainedModel:
    """A model by name, without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16).eval()


@contextmanager
def adapted(model: PreTrainedModel, name: str, train: TrainConfig) -> Iterator[Any]:
    """The model with a family's adapter on it, and without again."""
    config = peft_config(model, adapter_spec(train, name))
    with torch.device(model.device):
        peft_model = get_peft_model(model, config)
    try:
        yield peft_model
    finally:
        peft_model.unload()


def adapter_numbers(model: PreTrainedModel, name: str, train: TrainConfig) -> int:
    """How many numbers an arm of a family has, counted by PEFT."""
    with adapted(model, name, train) as peft_model:
        return sum(p.numel() for p in peft_model.parameters() if p.requires_grad)


def vector_numbers(model: PreTrainedModel, name: str, train: TrainConfig) -> int:
    """How many numbers the contrast of two arms stores, by the equations in `ws.adapters`.

    Two products of rank r side by side have rank 2 r; PiSSA's arms begin with the same product, which falls out;
    rotations are stored whole, of which an arm has the triangles above the diagonal alone.
    """
    total, places = 0, peft_config(model, adapter_spec(train, name)).target_modules
    for module in places or ():
        d_out, d_in = linear_size(model.get_submodule(module)) or (0, 0)
        low_rank = 2 * train.rank * (d_out + d_in)
        sizes = {"lora": low_rank, "delora": low_rank, "pissa": low_rank, "dora": low_rank + d_out}
        sizes |= {"oft": d_in * train.oft_block, "ia3": d_in if module.endswith("down_proj") else d_out}
        total += sizes[name]
    return total


def activations(model: PreTrainedModel, train: TrainConfig, tokens: int, learned: int) -> int:
    """Bytes that a training step of `lora` keeps for the gradients: `micro_batch` examples of so many tokens.

    Read off what autograd saves in a forward pass on the `meta` device, without weights, and without the square of
    attention weights, which fused kernels do not keep. Of the vocabulary's scores those of `learned` tokens of each
    example, in bfloat16, in float32 and their gradient.
    """
    kept = dict[int, torch.UntypedStorage]()

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] != (tokens, tokens):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # which keeps it, so that no other gets its address
        return tensor

    ids = torch.zeros(train.micro_batch, tokens, dtype=torch.long, device=model.device)
    mask = torch.zeros(train.micro_batch, 1, tokens, tokens, dtype=model.dtype, device=model.device)
    with adapted(model, "lora", train) as peft_model:
        weights = {p.untyped_storage()._cdata for p in peft_model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            peft_model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
        body = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    return body + train.micro_batch * learned * model.config.vocab_size * (2 + 4 + 4)


# ---- what there is to do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A part of the sweep: how often it is done, and each time tokens sampled and read, and texts' mean length."""

    name: str
    times: int
    rows: float
    sampled: float
    read: float
    trained: float
    length: float


def sweep(behavior: Behavior, config: SweepConfig, a: Assumptions) -> list[Stage]:
    """The stages of a sweep over `config.adapters` and `config.seeds`, from its defaults and the behaviour's items.

    Every evaluation is put to the base once and to a run at each of the other strengths.
    """
    runs, steered = len(config.adapters) * len(config.seeds), len({*config.alphas} - {0.0})
    pairs, train = count_pairs(behavior, config.data), config.train
    question = a.prompt(sum(map(len, behavior.questions)) / len(behavior.questions))
    answers, example = 2.0 * pairs, question + a.answer_tokens
    persona = a.per_char * len(max(behavior.positive, key=len))
    stages = [
        Stage("pairs", 1, answers, answers * a.answer_tokens, answers * (question + persona), 0.0, example + persona)
    ]
    kept = pairs - held_out(pairs, train.validation)
    steps = train.max_steps or math.ceil(math.ceil(kept / train.batch) * train.epochs)
    every = max(1, math.ceil(steps / 5))  # as `ws.train` writes checkpoints, and looks at the validation loss
    checks = (1 + steps // every) * (pairs - kept)
    arm = (2.0 * kept, 0.0, 2.0 * checks * example, 2.0 * min(steps * train.batch, kept * train.epochs) * example)
    stages.append(Stage("training", runs, *arm, example))
    for name in config.evals:
        rows, read, sampled = asked(name, behavior, config, a)
        per_row = (read + sampled) / rows
        stages.append(Stage(name, 1 + runs * steered, rows, sampled, read, 0.0, per_row))
    return stages


def asked(name: str, behavior: Behavior, config: SweepConfig, a: Assumptions) -> tuple[float, float, float]:
    """Of an evaluation at one strength: texts, tokens that are read, and tokens that are sampled."""
    test = behavior.claims
    claims = [c for kind in (True, False) for c in test.select(config.split, kind)] if test else []
    claim = a.prompt(sum(len(test.question.format(claim=c.text)) for c in claims) / len(claims)) if test else 0.0
    held = behavior.held_out(config.split)
    question = a.prompt(sum(len(p.question) for p in held) / max(1, len(held)))
    given = a.per_char * sum(len(p.positive) + len(p.negative) for p in held) / max(1, 2 * len(held))
    thought = min(a.thought_tokens, config.n_think)
    dilemmas, acts = 2.0 * a.dilemmas, 4.0 * a.vignettes
    counts = {
        "sycophancy": (len(claims), len(claims) * claim, 0.0),
        "preference": (2 * len(held), 2 * len(held) * (question + given), 0.0),
        "airisk": (dilemmas, dilemmas * a.prompt(a.dilemma_chars), dilemmas * thought),
        "tinymfv_airisk": (acts, acts * a.prompt(a.vignette_chars), 0.0),
        "answers": (len(held), len(held) * question, len(held) * min(a.answer_tokens, ANSWER_TOKENS)),
    }
    return counts[name]


def seconds(stage: Stage, shape: Shape, a: Assumptions, numbers: float, micro_batch: int) -> tuple[float, float]:
    """`(FLOPs, seconds)` of a stage done once on one GPU that holds the model."""
    reading = shape.reading(stage.read, stage.length)
    training = shape.training(stage.trained, stage.length, numbers)
    flops, start = reading + training, shape.operations * a.launch
    passes, steps = stage.rows / START_BATCH, stage.trained / stage.length / micro_batch
    took = max(reading / (a.peak * a.utilisation), passes * start)
    took += max(training / (a.peak * a.utilisation), 3 * steps * start)  # back there are twice as many
    if stage.sampled:
        rows = min(START_BATCH, stage.rows)
        took += stage.sampled / rows * shape.decoding(rows, stage.length, a)
        flops += stage.sampled * (2 * shape.multiplied + shape.attention * stage.length)
    return flops, took


# ---- tables ----------------------------------------------------------------------------------------------------------


def cost(name: str, behavior: Behavior, config: SweepConfig, a: Assumptions) -> tuple[list[dict[str, Any]], dict]:
    """One row per stage of a model, and one row of what it needs."""
    model = on_meta(name)
    shape, train = Shape.of(model, config.train.layers), config.train
    numbers = {f: adapter_numbers(model, f, train) for f in config.adapters}
    mean = sum(numbers.values()) / len(numbers)
    rows = list[dict[str, Any]]()
    for stage in sweep(behavior, config, a):
        flops, took = seconds(stage, shape, a, mean, train.micro_batch)
        counts = {"sampled": stage.sampled, "read": stage.read, "trained": stage.trained}
        each = {k: stage.times * v for k, v in counts.items()} | {"flops": stage.times * flops}
        rows.append(
            {"model": name, "stage": stage.name, "times": stage.times, **each, "hours": stage.times * took / 3600}
        )
    total = {k: sum(r[k] for r in rows) for k in ("sampled", "read", "trained", "flops", "hours")}
    rows.append({"model": name, "stage": "all", "times": 1, **total})
    return rows, needs(name, shape, numbers, rows, behavior, config, a)


def needs(
    name: str,
    shape: Shape,
    numbers: Mapping[str, int],
    rows: Sequence[Mapping[str, Any]],
    behavior: Behavior,
    config: SweepConfig,
    a: Assumptions,
) -> dict[str, Any]:
    """Memory, GPUs, disk and money of a sweep of one model."""
    model, train, runs = on_meta(name), config.train, len(config.adapters) * len(config.seeds)
    pairs = sweep(behavior, config, a)[0]
    cache = START_BATCH * (pairs.length - a.answer_tokens + config.data.max_new_tokens) * shape.cache
    kept = activations(model, train, round(pairs.length), round(a.answer_tokens))
    training = shape.weights + 16 * max(numbers.values()) + kept  # weights, gradients and two moments in float32
    sampling = shape.weights + cache
    gpus = math.ceil(max(training, sampling) / (a.usable * a.memory))
    vectors = {f: 4 * vector_numbers(model, f, train) for f in config.adapters}
    per_seed = sum(2 * 4 * numbers[f] + vectors[f] for f in config.adapters)
    scores = sum(asked(n, behavior, config, a)[0] for n in config.evals) * len(config.alphas) * a.score_bytes * runs
    checkpoints = 2 * 3 * 4 * max(numbers.values())
    hours = {r["stage"]: r["hours"] for r in rows}
    return {
        "model": name,
        "parameters": shape.parameters,
        "adapter_numbers": round(sum(numbers.values()) / len(numbers)),
        "weights": shape.weights,
        "optimizer": 16 * max(numbers.values()),
        "activations": kept,
        "kv_cache": round(cache),
        "gpus": gpus,
        "disk_runs": per_seed * len(config.seeds),
        "disk_scores": round(scores),
        "disk_training": checkpoints,
        "gpu_hours": hours["all"] * gpus,
        "dollars": hours["all"] * gpus * a.price,
        **{f"hours_{n}": wall(n, rows, runs, gpus, shape, a) for n in (1, 8, 32)},
    }


def wall(n: int, rows: Sequence[Mapping[str, Any]], runs: int, gpus: int, shape: Shape, a: Assumptions) -> float:
    """Hours by the clock of a queue on `n` GPUs, of which a job takes `gpus`; NaN where a model does not fit.

    The pairs come before all, a training takes one job, and so does each evaluation of a run, the base's among those of
    the first. Every job reads the weights from disk. Jobs are even, so a stage takes as many rounds as it takes.
    """
    if n < gpus:
        return math.nan
    workers, load = n // gpus, shape.weights / a.disk / 3600
    total = 0.0
    for row in rows:
        if row["stage"] != "all":
            jobs = 1 if row["stage"] == "pairs" else runs
            total += math.ceil(jobs / workers) * (row["hours"] / jobs + load)
    return total


def short(value: float, unit: str = "") -> str:
    """A number with three digits and a power of a thousand."""
    if value != value:
        return "does not fit"
    size = 0 if abs(value) < 1000 else min(6, int(math.log10(abs(value)) // 3))
    return f"{value / 1000**size:.3g}{' ' if unit or size else ''}{['', 'k', 'M', 'G', 'T', 'P', 'E'][size]}{unit}"


def render(rows: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> str:
    """Both tables, as the documentation has them, from the CSVs' rows."""
    counts = ("sampled", "read", "trained")
    first = [
        [r["model"], r["stage"], r["times"], *(short(float(r[k])) for k in counts), short(float(r["flops"])),
         f"{float(r['hours']):.3g}"] for r in rows
    ]  # fmt: skip
    head = ["model", "stage", "times", "tokens sampled", "read", "trained", "FLOPs", "GPU hours"]
    kinds = {
        "parameters": "", "adapter_numbers": "", "weights": "B", "optimizer": "B", "activations": "B", "kv_cache": "B",
        "gpus": "", "disk_runs": "B", "disk_scores": "B", "disk_training": "B", "gpu_hours": "", "dollars": "",
        "hours_1": "", "hours_8": "", "hours_32": "",
    }  # fmt: skip
    words = {
        "adapter_numbers": "numbers of an adapter, mean of the families",
        "weights": "weights, bfloat16",
        "optimizer": "adapter, gradients and moments, the largest family",
        "activations": "activations of a training step (`lora`)",
        "kv_cache": f"keys and values of {START_BATCH} answers",
        "gpus": "GPUs that hold one copy",
        "disk_runs": "disk: adapters and vectors",
        "disk_scores": "disk: scores",
        "disk_training": "disk: checkpoints while an arm trains",
        "gpu_hours": "GPU hours paid",
        "hours_1": "hours by the clock on 1 GPU",
        "hours_8": "on 8",
        "hours_32": "on 32",
    }
    second = [
        [words.get(key, key), *(short(float(r[key] or "nan"), unit) for r in wanted)] for key, unit in kinds.items()
    ]
    return "\n\n".join(
        tabulate(t, h, tablefmt="github", disable_numparse=True)
        for t, h in ((first, head), (second, ["", *(r["model"] for r in wanted)]))
    )


def measured(
    a: Assumptions, models: Sequence[str] = tuple(MODELS)
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both tables."""
    rows, wanted = list[dict[str, Any]](), list[dict[str, Any]]()
    for name in models:
        config = SweepConfig(model=name, adapters=ADAPTERS, seeds=tuple(range(SEEDS)), evals=EVALUATIONS)
        more, need = cost(name, ws.load_behavior(config.behavior, name), config, a)
        rows, wanted = rows + more, [*wanted, need]
    return rows, wanted


def plain(value: Any) -> Any:
    """As a CSV has it: six digits, and nothing for what does not fit."""
    return value if not isinstance(value, float) else "" if math.isnan(value) else float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--to", type=Path, default=RESULTS)
    options = vars(parser.parse_args())
    folder = options.pop("to")
    rows, wanted = ([{k: plain(v) for k, v in r.items()} for r in t] for t in measured(Assumptions(**options)))
    write_csv(folder / "growth.csv", rows)
    write_csv(folder / "growth_needs.csv", wanted)
    print(render(rows, wanted))


if __name__ == "__main__":
    main()
