"""Training an arm on a model of Qwen3-0.6B's exact shape: memory and tokens per second against a plain Trainer.

`uv run python -m benchmarks.training` makes the model (random weights, float32) and pairs in a temporary folder.
Questions have 10 to 60 words, answers a log-normal number of tokens (median 148), and every fourth fills an example up
to 512 tokens. Each side then runs in a process of its own, in turns, with the same examples in the same steps:

- plain: transformers' Trainer on PEFT's LoRA with the same settings, and its own collator, loss and all else;
- arm: `ws.train_adapter`, with what `--recompute` says;
- kl: the same with `--kl 0.1`;
- signed: one adapter on both answers of half as many pairs, so on as many examples a step.

Memory is the peak of the whole process, weights and libraries included. Time is that of the training, by the clock and
of the CPU, which other work on the machine disturbs less; what is made ready for it and checkpoints, which only ours
writes, are part of it.
Tokens are those of the examples: what is padded costs time and counts for nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Qwen3Config, Trainer, TrainingArguments

import ws
from benchmarks import harness
from benchmarks.vector import QWEN3_06B
from ws.adapters import family, peft_config
from ws.data import Pair, read_pairs
from ws.lm import trainer
from ws.lm.models import load_tokenizer, tiny_random
from ws.options.make import TrainConfig
from ws.train import adapter_spec, build_examples

LENGTH = 512
SIDES = ("plain", "arm", "kl", "signed")


def settings(steps: int, batch: int, recompute: str, epochs: int = 1) -> TrainConfig:
    """Defaults of real models, but for the number of steps, of all passes over the examples together."""
    rate = family("lora").learning_rate
    return TrainConfig(
        lr=rate, batch=batch, max_steps=steps, epochs=epochs, max_length=LENGTH, validation=0.0, recompute=recompute
    )


def prepare(folder: Path, examples: int, layers: int, tiny: bool = False) -> None:
    """Write the base and the pairs; a tiny base says whether it runs, and nothing else."""
    torch.manual_seed(0)
    config = tiny_random().config if tiny else QWEN3_06B
    shape = config.to_dict() | {"num_hidden_layers": layers, "layer_types": None}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**shape), dtype=torch.float32)
    model.save_pretrained(folder / "base")
    tok = load_tokenizer("pocket")
    tok.save_pretrained(folder / "base")
    draw, pairs = random.Random(0), list[Pair]()
    empty = len(build_examples(tok, [Pair("", "", "a", "a", 1, 1)] * 2, "pos", LENGTH)[0].features()["input_ids"])
    for i in range(examples):
        asked = draw.randint(10, 60)
        most = LENGTH - empty - asked - 8
        said = [most if i % 4 == 0 else min(most, int(draw.lognormvariate(5.0, 0.7))) for _ in range(2)]
        question, pos, neg = (
            " ".join([word] * n) for word, n in zip(("is", "red", "blue"), (asked, *said), strict=True)
        )
        pairs.append(Pair(f"q{i}", f"{i} {question}", pos, neg, *said))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in pairs), encoding="utf-8")
    print(json.dumps({"prepared": examples}))


def plain(model: Any, tok: Any, rows: Sequence[dict[str, list[int]]], config: TrainConfig, folder: Path) -> Any:
    """What one would write by hand with transformers and PEFT; the trained model comes back."""
    peft_model = get_peft_model(model, peft_config(model, adapter_spec(config, "lora")))
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        use_cpu=model.device.type == "cpu",
        max_steps=config.max_steps or -1,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.batch // config.micro_batch,
        learning_rate=config.lr or 0.0,
        weight_decay=config.weight_decay,
        save_strategy="no",
        seed=0,
        data_seed=0,
    )
    collator = DataCollatorForSeq2Seq(tok)
    Trainer(model=peft_model, args=arguments, train_dataset=list(rows), data_collator=collator).train()
    return peft_model


def train(side: str, folder: Path, config: TrainConfig, device: str, dtype: str) -> dict[str, float]:
    """One side; in a process of its own, where its memory is to be told."""
    spent, positions = dict[str, float](), [0]

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            start, cpu = time.perf_counter(), time.process_time()
            done = run(*args, **kwargs)
            spent.update(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
            return done

        return measured

    def count(module: Any, args: Any) -> None:
        positions[0] += args[0].numel()

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    for p in model.parameters():
        p.detach().amax()  # a file that is only mapped would not count
    model.to(device)
    tok = load_tokenizer(str(folder / "base"))
    model.get_input_embeddings().register_forward_pre_hook(count)
    pairs = read_pairs(folder / "pairs.jsonl")
    if side == "signed":
        half = config.batch // 2
        pairs, config = pairs[: len(pairs) // 2], replace(config, batch=half, micro_batch=min(config.micro_batch, half))
    rows = [e.features() for e in build_examples(tok, pairs, side if side == "signed" else "pos", LENGTH)]
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if side == "plain":
        timed(plain)(model, tok, rows, config, folder)
    else:
        config, fit = replace(config, kl=0.1 if side == "kl" else 0.0), trainer.fit
        trainer.fit = timed(fit)
        try:
            ws.train_adapter(model, tok, pairs, side if side == "signed" else "pos", "lora", folder / side, config)
        finally:
            trainer.fit = fit
    # Every step takes as many examples, and each is taken once in every pass.
    passes = int(config.epochs)
    assert len(rows) * passes == config.batch * (config.max_steps or 0) * (2 if side == "signed" else 1)
    tokens = passes * sum(len(row["input_ids"]) for row in rows)
    answers = passes * sum(label != -100 for row in rows for label in row["labels"])
    facts = {"loaded_mib": loaded, "tokens": tokens, "answer_tokens": answers, "positions": positions[0], **spent}
    if device != "cpu":
        facts["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=1, help="passes over the examples, a divisor of the steps")
    parser.add_argument("--recompute", default="cheap")
    parser.add_argument("--layers", type=int, default=QWEN3_06B.num_hidden_layers, help="fewer for a quick look")
    parser.add_argument("--tiny", action="store_true", help="a base of four small layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--part", choices=("prepare", *SIDES))
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    config = settings(options.steps, options.batch, options.recompute, options.epochs)
    if options.part == "prepare":
        prepare(options.folder, options.steps * options.batch // options.epochs, options.layers, options.tiny)
        return
    if options.part:
        print(json.dumps(train(options.part, options.folder, config, options.device, options.dtype)))
        return
    rounds = list[dict[str, dict[str, float]]]()
    with tempfile.TemporaryDirectory() as name:
        shape = [
            f"--{k}={getattr(options, k)}"
            for k in ("steps", "batch", "epochs", "recompute", "layers", "device", "dtype")
        ]
        part = ["-m", "benchmarks.training", "--folder", name, *shape, "--part"]
        harness.fresh_process([*part, "prepare"])
        for number in range(options.rounds):
            sides = list(options.sides)[:: 1 if number % 2 == 0 else -1]
            made = {side: harness.fresh_process([*part, side]) for side in sides}
            rounds.append({side: done.output | {"peak_mib": done.peak_mib} for side, done in made.items()})
            print(json.dumps(rounds[-1], indent=2), flush=True)
    harness.record(
        "training", {"settings": asdict(config), "layers": options.layers, "rounds": rounds, **ratios(rounds)}
    )


def ratios(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Each side against the plain Trainer, and kl and signed against an arm; time is that of a token."""

    def numbers(side: str, of: str) -> list[float]:
        return [r[side][of] / (1 if of == "peak_mib" else r[side]["tokens"]) for r in rounds]

    found = dict[str, Any]()
    for side, against in (("arm", "plain"), ("kl", "arm"), ("signed", "arm")):
        if side in rounds[0] and against in rounds[0]:
            for name, of in (("time", "seconds"), ("cpu_time", "cpu_seconds"), ("peak", "peak_mib")):
                ratio = harness.Spread.ratio(numbers(side, of), numbers(against, of))
                found[f"{name}_{side}_over_{against}"] = ratio
    for side, measured in rounds[0].items():
        found[f"padded_{side}"] = measured["positions"] / measured["tokens"] - 1
    return found


if __name__ == "__main__":
    main()
