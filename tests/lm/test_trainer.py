"""The loop: rows of like length share a micro-batch, adapters stay float32 on a bfloat16 base, losses are reported."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import ws
from ws import train
from ws.adapters import in_training
from ws.data import Pair
from ws.errors import DiskError
from ws.files.runs import Run
from ws.lm import trainer
from ws.lm.trainer import by_length
from ws.options.make import SIGNED, SweepConfig, TrainCommand, TrainConfig, train_preset
from ws.train import train_adapter, train_stage

PAIRS = [
    Pair(f"q{i}", f"What is {i}?", "It is red. " * n, "It is blue and so. " * (n + i % 2), 6, 6)
    for i, n in enumerate([1, 5, 2, 7, 3, 6, 1, 8, 2, 5, 9, 1, 7, 3, 4, 8])
]


def settings(family: str = "lora", **changes: object) -> TrainConfig:
    return replace(train_preset("tiny-random", family), max_steps=2, validation=0.0, **changes)


@pytest.fixture
def fresh_tiny():
    return ws.load_model("tiny-random", device="cpu")


# ---- rows by length -------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40), step=st.integers(1, 12))
def test_every_step_has_its_examples_from_the_longest_to_the_shortest(lengths, step):
    order = list(range(len(lengths)))[::-1]
    ordered = by_length(order, lengths, step)
    for start in range(0, len(order), step):
        block = ordered[start : start + step]
        assert sorted(block) == sorted(order[start : start + step])
        assert [lengths[i] for i in block] == sorted((lengths[i] for i in block), reverse=True)


@pytest.mark.parametrize("sign", ["pos", SIGNED])
def test_less_is_padded_and_the_steps_are_the_same(fresh_tiny, sign, tmp_path, monkeypatch):
    collate, padded = trainer._Collator.__call__, dict.fromkeys(("by_length", "as_drawn"), 0)

    def counted(self, features):
        batch = collate(self, features)
        padded[name] += int((batch["attention_mask"] == 0).sum())
        return batch

    monkeypatch.setattr(trainer._Collator, "__call__", counted)
    for name in padded:
        if name == "as_drawn":
            monkeypatch.setattr(trainer, "by_length", lambda order, lengths, step: order)
        train_adapter(*fresh_tiny, PAIRS, sign, "lora", tmp_path / name, settings(batch=8, micro_batch=2))
    assert padded["by_length"] < 0.6 * padded["as_drawn"]
    first, second = (ws.SteeringVector.from_adapter(tmp_path / name, fresh_tiny[0]) for name in padded)
    assert (first - second).norm(fresh_tiny[0]) < 1e-4 * first.norm(fresh_tiny[0])


@pytest.mark.parametrize("sign", ["pos", SIGNED])
@pytest.mark.parametrize("objective", ["likelihood", "margin"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_rows_of_unlike_lengths_take_passes_of_their_own(fresh_tiny, sign, objective, kl, tmp_path, monkeypatch):
    """Hardly two lengths are the same, and the last micro-batch of a side is filled up with what is no example."""
    model, tok = fresh_tiny
    config = settings(batch=5, micro_batch=5, objective=objective, kl=kl, layers="1:3", lr=1e-2)
    block, read, losses = model.model.layers[1], dict.fromkeys(("split", "whole"), 0), list[list[float]]()
    for name in read:
        monkeypatch.setattr(trainer, "_PASS", 0.0 if name == "split" else math.inf)

        def count(block, args, name=name):
            read[name] += args[0].shape[:2].numel() * torch.is_grad_enabled()

        hook = block.register_forward_pre_hook(count)
        losses.append(train_adapter(model, tok, PAIRS, sign, "lora", tmp_path / name, config)["train_losses"])
        hook.remove()
    assert read["split"] < 0.8 * read["whole"]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in read)
    assert all((t - second[k]).norm() <= 1e-3 * t.norm() for k, t in first.items())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("sign", ["pos", SIGNED])
def test_every_answer_that_is_held_out_counts_alike(fresh_tiny, sign, tmp_path):
    """What fills up a batch of signed training is no answer; here the last batch has one that is held out."""
    model, tok = fresh_tiny
    examples = train.build_examples(tok, PAIRS, sign, 1024)
    held = [e.question for e in train.split_examples(examples, 0.3, 0)[1]]
    assert len(held) % 4 == (1 if sign == "pos" else 2)
    words = [("Yes.", "No."), ("zq ## 77 !! jk qq @@ xv", "qq jk !! 77 ## @@ xv zq")]  # the losses are not alike
    pairs = [replace(p, **dict(zip(("pos", "neg"), words[p.question == held[-1]], strict=True))) for p in PAIRS]
    losses = []
    for micro in (1, 2, 4):
        config = replace(settings(batch=4, micro_batch=micro), validation=0.3, max_steps=1)
        facts = train_adapter(model, tok, pairs, sign, "lora", tmp_path / str(micro), config, must_learn=False)
        losses.append(facts["validation_losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_training_that_ends_within_an_epoch_is_at_its_end_when_it_is_gone_on(fresh_tiny, keep, tmp_path, monkeypatch):
    """What stops between the last checkpoint and the adapter, such as a full disk, has no step left to do."""
    config = replace(settings(batch=2, micro_batch=1), max_steps=7, validation=0.3, keep=keep)
    whole = train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "whole", config, must_learn=False)
    save = train._save

    def full(*asked):
        monkeypatch.setattr(train, "_save", save)
        raise DiskError("The disk is full.")

    monkeypatch.setattr(train, "_save", full)
    with pytest.raises(DiskError):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "gone", config, must_learn=False)
    gone_on = train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "gone", config, must_learn=False)
    assert gone_on == whole
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "gone"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_gpu_than_the_first_is_refused_and_not_left(fresh_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(type(fresh_tiny[0]), "device", torch.device("cuda", 1))
    with pytest.raises(ws.WsError, match="CUDA_VISIBLE_DEVICES=1"):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", settings())


# ---- precision ------------------------------------------------------------------------------------------------------


def test_adapters_and_their_moments_are_float32_on_a_bfloat16_base(family, tmp_path, monkeypatch):
    """Steps far below what bfloat16 tells apart add up, and gradients are those of the base in float32."""
    fit, fitted, gradients = trainer.fit, [], {}

    def kept(peft_model, *args, **kwargs):
        before = {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}
        done = fit(peft_model, *args, **kwargs)
        moved = {n: (before[n], p.detach().clone()) for n, p in peft_model.named_parameters() if n in before}
        fitted.append((done.optimizer.state, moved))
        return done

    monkeypatch.setattr(trainer, "fit", kept)
    for dtype in ("float32", "bfloat16"):
        model, tok = ws.load_model("tiny-random", device="cpu", dtype="bfloat16")
        if dtype == "float32":
            model.float()  # with the weights of the other one
        config = settings(family, lr=1e-6, weight_decay=0.0, warmup=0, batch=16, micro_batch=16)
        train_adapter(model, tok, PAIRS, "pos", family, tmp_path / dtype, replace(config, max_steps=1))
        (state, moved), gradients[dtype] = fitted[-1], []
        for moments, (start, end) in zip(state.values(), moved.values(), strict=True):
            assert {start.dtype, end.dtype, moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {torch.float32}
            gradients[dtype].append(moments["exp_avg"].flatten())
        assert any(not torch.equal(start, end) for start, end in moved.values())
        ends = [torch.cat([p[i].flatten() for p in moved.values()]) for i in (0, 1)]
        large = ends[0].abs() > 0.05
        rounded = [end[large].bfloat16() for end in ends]
        assert family == "oft" or (rounded[0] != rounded[1]).float().mean() < 0.01, "oft starts at 0"
    wanted, found = (torch.cat(gradients[dtype]) for dtype in ("float32", "bfloat16"))
    assert torch.nn.functional.cosine_similarity(wanted, found, dim=0) > 0.98
    assert len(fitted[0][1]) == len(in_training_names(family))


def in_training_names(family: str) -> list[str]:
    """The parameters that a family trains on the tiny model."""
    from ws.train import _adapted, adapter_spec

    model, _ = ws.load_model("tiny-random", device="cpu")
    with _adapted(model, adapter_spec(settings(family), family), 0) as (peft_model, *_):
        trained = {n for n, p in peft_model.named_parameters() if p.requires_grad}
        return sorted(trained & in_training(peft_model, ws.adapters.family(family)).keys())


# ---- reports --------------------------------------------------------------------------------------------------------

TRACKIO = """
from types import SimpleNamespace
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
config, told = {}, []
class Config(dict):
    def update(self, values, allow_val_change): super().update(values)
config = Config()
def init(**options): told.append(("init", options["project"], options["name"]))
def log(values): told.append(("log", values))
def finish(): told.append(("finish",))
"""
WANDB = """
from types import SimpleNamespace
run, told = None, []
class Config(dict):
    def update(self, values, allow_val_change): super().update(values)
config = Config()
def init(**options):
    global run
    run = SimpleNamespace(_label=lambda code: None, name=options["name"], summary={})
    told.append(("init", options["name"]))
def log(values, **kwargs): told.append(("log", run.name))
def finish():
    global run
    run = None
    told.append(("finish",))
"""
TENSORBOARD = """
class SummaryWriter:
    folders = []
    def __init__(self, log_dir): self.folders.append(log_dir)
    def __getattr__(self, name): return lambda *args, **kwargs: None
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a package in place of one that is not installed, and import it."""

    def put(name: str, text: str, *more: str):
        for path, code in ((name, text), *((m, "class ConfigError(Exception): pass") for m in more)):
            file = tmp_path / "packages" / path / "__init__.py"
            file.parent.mkdir(parents=True)
            file.write_text(code)
            monkeypatch.delitem(sys.modules, path.replace("/", "."), raising=False)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        return __import__(name)

    return put


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_every_arm_is_a_run_of_its_own(fresh_tiny, stand_in, name, tmp_path):
    fake = stand_in(
        name,
        *{"trackio": (TRACKIO,), "wandb": (WANDB, "wandb/sdk", "wandb/sdk/lib", "wandb/sdk/lib/config_util")}[name],
    )
    for sign in ("pos", "neg"):
        train_adapter(
            *fresh_tiny, PAIRS, sign, "lora", tmp_path / "honesty" / "lora" / sign, settings(report_to=(name,))
        )
    told = [t for t in fake.told if t[0] != "log"]
    runs = [("honesty/lora/pos",), ("honesty/lora/neg",)]
    runs = [("weight-steering", *r) for r in runs] if name == "trackio" else runs
    assert told == [("init", *runs[0]), ("finish",), ("init", *runs[1]), ("finish",)]
    assert sum(t[0] == "log" for t in fake.told) >= 4
    if name == "trackio":
        assert any("train/loss" in t[1] for t in fake.told if t[0] == "log")


def test_a_run_that_was_open_stays_open(fresh_tiny, stand_in, tmp_path):
    fake = stand_in("wandb", WANDB, "wandb/sdk", "wandb/sdk/lib", "wandb/sdk/lib/config_util")
    fake.init(name="mine")
    train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", settings(report_to=("wandb",)))
    assert {t[1:] for t in fake.told if t[0] == "log"} == {("mine",)}
    assert ("finish",) not in fake.told


def test_files_of_tensorboard_stay_beside_the_arm(fresh_tiny, stand_in, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fake = stand_in("tensorboardX", TENSORBOARD)
    train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", settings(report_to=("tensorboard",)))
    assert fake.SummaryWriter.folders == [str(tmp_path / "logs" / "pos")]


def test_who_is_told_and_what_is_kept_in_memory_is_no_part_of_a_run(fresh_tiny, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(asdict(p)) + "\n" for p in PAIRS))
    run = Run(tmp_path / "lora")
    assert train_stage(*fresh_tiny, file, "pos", run, "lora", settings(), 0)
    assert not train_stage(*fresh_tiny, file, "pos", run, "lora", settings(recompute="all", report_to=("wandb",)), 0)
    assert "report_to" not in (tmp_path / "lora" / "pos" / "ws_train.json").read_text()


def test_who_cannot_be_told_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("ws.options.make.find_spec", lambda name: None)
    for command in (TrainCommand, SweepConfig):
        with pytest.raises(ws.WsError, match="`report_to` wandb needs the package wandb, which is not installed"):
            command(train=TrainConfig(report_to=("wandb",))).check()
        with pytest.raises(ws.WsError, match="no `report_to` named 'wandbb'"):
            command(train=TrainConfig(report_to=("wandbb",))).check()
