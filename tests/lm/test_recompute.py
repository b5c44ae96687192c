"""Activations that are computed again: the same adapter from less, at either sign, and the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import ws
from ws.adapters import AdapterSpec, peft_config
from ws.data import Pair
from ws.files.runs import sha256_file
from ws.lm import recompute
from ws.options.make import SIGNED, TrainConfig, train_preset
from ws.train import train_adapter

PAIRS = [
    Pair(f"q{i}", f"What color is {i}?", "It is red. " * (1 + i % 3), "It is blue and so. " * (1 + i % 2), 6, 6)
    for i in range(8)
]


def settings(family: str) -> TrainConfig:
    return replace(train_preset("tiny-random", family), max_steps=2, batch=4, micro_batch=2, validation=0.0)


@pytest.fixture
def fresh_tiny():
    return ws.load_model("tiny-random", device="cpu")


@pytest.mark.parametrize("what", ["cheap", pytest.param("all", marks=pytest.mark.slow)])
def test_a_signed_adapter_of_every_family_comes_out_bit_for_bit(fresh_tiny, family, what, tmp_path, monkeypatch):
    """A layer that was computed again with the other sign's parameters would have other gradients."""
    monkeypatch.setattr(recompute, "TERMS", 16)  # so that products of a model this small are kept
    for name in ("none", what):
        config = replace(settings(family), recompute=name)
        train_adapter(*fresh_tiny, PAIRS, SIGNED, family, tmp_path / name, config)
    first, second = (sha256_file(tmp_path / name / "adapter_model.safetensors") for name in ("none", what))
    assert first == second


def work(model, what: str, terms: int) -> tuple[int, int, list[int]]:
    """Floating point operations of products forward and backward, and how often each layer was computed."""
    calls = [0] * len(model.model.layers)

    def count(module, args, output, layer):
        calls[layer] += 1

    peft_model = get_peft_model(model, peft_config(model, AdapterSpec("lora", rank=4, layers="1")))
    inputs = torch.arange(24).reshape(2, 12)
    with pytest.MonkeyPatch.context() as patch, recompute.recomputed(model, what):
        patch.setattr(recompute, "TERMS", terms)
        for i, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda m, a, o, i=i: count(m, a, o, i))
        peft_model.train()
        with FlopCounterMode(display=False) as forward:
            loss = peft_model(input_ids=inputs, labels=inputs).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    peft_model.unload()
    return forward.get_total_flops(), backward.get_total_flops(), calls


def test_cheap_repeats_no_large_product_and_layers_without_gradients_are_left_alone():
    counts = {}
    for what, terms in (("none", 1), ("cheap", 1), ("cheap", 16), ("all", 1)):
        counts[what, terms] = work(ws.load_model("tiny-random", device="cpu")[0], what, terms)
    forward, backward, calls = counts["none", 1]
    assert calls == [1] * len(calls)
    assert counts["cheap", 1] == (forward, backward, [1] + [2] * (len(calls) - 1))
    assert backward < counts["cheap", 16][1] < counts["all", 1][1]
    assert counts["all", 1][2] == counts["cheap", 1][2]


def test_the_model_is_handed_back_as_it_came(fresh_tiny, tmp_path):
    model, tok = fresh_tiny

    def state():
        return [dict(vars(m)) for m in model.modules() if "gradient_checkpointing" in dir(m)], model.config.use_cache

    before = state()
    train_adapter(model, tok, PAIRS, "pos", "lora", tmp_path / "pos", replace(settings("lora"), recompute="all"))
    after = state()
    assert [v.keys() for v in after[0]] == [v.keys() for v in before[0]]
    assert after[1] == before[1]


def test_a_model_without_such_layers_is_refused(fresh_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(type(fresh_tiny[0]), "supports_gradient_checkpointing", False)
    with pytest.raises(ws.WsError, match="no layers that can be computed again; leave out `recompute`"):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", replace(settings("lora"), recompute="all"))
    with pytest.raises(ws.WsError, match="'most'"):
        train_adapter(*fresh_tiny, PAIRS, "pos", "lora", tmp_path / "pos", replace(settings("lora"), recompute="most"))


def test_what_was_dropped_goes_back_to_the_system(monkeypatch):
    """Before each of the three layers with a gradient on the way there, and before the first on the way back."""
    returned = list[int]()
    monkeypatch.setattr(recompute, "_TRIM", returned.append)
    work(ws.load_model("tiny-random", device="cpu")[0], "none", 1)
    assert returned == []
    work(ws.load_model("tiny-random", device="cpu")[0], "cheap", 1)
    assert returned == [0] * 4
