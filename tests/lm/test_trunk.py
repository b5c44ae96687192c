"""The trunk that several strengths share: bit for bit what every strength gives alone, and read once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import ws
from conftest import build_model, build_sharing, tokens
from ws.analysis.controls import random_like
from ws.lm import trunk
from ws.lm.batches import row_logits
from ws.lm.models import decoder_blocks, target_modules

BATCHES = [tokens()[:, :n].tolist() for n in (5, 9)]
STRENGTHS = (-2.0, 0.5, 1.0, 0.0)


@pytest.fixture
def model():
    return build_model("qwen2")


def vector_of(model, layers: str) -> ws.SteeringVector:
    rng, deltas = torch.Generator().manual_seed(1), {}
    for name in target_modules(model, layers):
        d_out, d_in = model.get_submodule(name).weight.shape
        u, v = torch.randn(d_out, 2, generator=rng), torch.randn(2, d_in, generator=rng)
        deltas[name] = ws.LinearDelta(d_out, d_in, u=0.1 * u, v=v)
    return ws.SteeringVector(deltas, "random", None)


def calls_of(block: nn.Module) -> list[int]:
    """A number for every time that the block computes; without a hook, which would end the trunk."""
    calls, original = list[int](), block.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    vars(block)["forward"] = counted
    return calls


@torch.inference_mode()
def read(model, vector, strengths=STRENGTHS, shared=True) -> list[torch.Tensor]:
    results = []
    with trunk.shared_trunk(model) if shared else nullcontext():
        for alpha in strengths:
            with ws.steer(model, vector, alpha):
                results += [row_logits(model, 0, rows) for rows in BATCHES]
    return results


def all_equal(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_strength_gives_the_same_to_the_bit_and_the_trunk_is_read_once(model):
    vector = vector_of(model, "1:2")
    alone, calls = read(model, vector, shared=False), calls_of(decoder_blocks(model)[0])
    assert all_equal(read(model, vector), alone)
    assert len(calls) == len(BATCHES) + 1  # and once more, to compare both ways
    calls.clear()
    assert all_equal(read(model, vector), alone)
    assert len(calls) == len(BATCHES)
    assert not all_equal(alone[:2], alone[2:4])


def test_a_vector_that_touches_the_first_block_has_no_trunk(model):
    vector = vector_of(model, "all")
    alone, calls = read(model, vector, shared=False), calls_of(decoder_blocks(model)[0])
    assert all_equal(read(model, vector), alone)
    assert len(calls) == len(BATCHES) * len(STRENGTHS)


def test_a_hook_in_the_trunk_or_before_it_is_heard(model):
    vector, ids = vector_of(model, "1:2"), BATCHES[0]
    for place in (decoder_blocks(model)[0], model.get_input_embeddings()):
        with torch.inference_mode(), trunk.shared_trunk(model), ws.steer(model, vector):
            first = [row_logits(model, 0, ids) for _ in range(2)]
            handle = place.register_forward_hook(lambda module, args, output: output * 1.5)
            moved = row_logits(model, 0, ids)
            handle.remove()
            again = row_logits(model, 0, ids)
        assert all_equal(first, [again, again])
        assert (moved - again).abs().max() > 1e-3


def test_other_vectors_with_other_first_blocks_are_told_apart(model):
    vectors = [vector_of(model, "1:2"), random_like(vector_of(model, "1:2"), model, 3), vector_of(model, "0:1")]
    with torch.inference_mode(), trunk.shared_trunk(model):
        shared = []
        for vector in [*vectors, *vectors]:
            with ws.steer(model, vector):
                shared += [row_logits(model, 0, rows) for rows in BATCHES]
    alone = [x for vector in vectors for x in read(model, vector, (1.0,), shared=False)]
    assert all_equal(shared, [*alone, *alone])


def hand_on_more(model) -> None:
    """Let the second block read something that the first has left beside its output."""
    first, second = decoder_blocks(model)[:2]
    left, one, two = {}, first.forward, second.forward

    def leave(hidden, *args, **kwargs):
        left["it"] = hidden.mean()
        return one(hidden, *args, **kwargs)

    def take(hidden, *args, **kwargs):
        return two(hidden, *args, **kwargs) + left.pop("it", 0.0)

    vars(first)["forward"], vars(second)["forward"] = leave, take


def test_a_model_whose_blocks_hand_on_more_than_they_give_is_read_as_always(model):
    hand_on_more(model)
    vector = vector_of(model, "1:2")
    assert all_equal(read(model, vector), read(model, vector, shared=False))
    assert trunk._EQUAL[model] == {1: False}


def test_a_model_whose_blocks_share_keys_and_values_is_read_as_always():
    """The first block above reads those that the trunk did not compute, which is an error and no other number."""
    model = build_sharing()
    vector = vector_of(model, "3:4")
    assert all_equal(read(model, vector), read(model, vector, shared=False))
    assert trunk._EQUAL[model] == {3: False}
    assert not trunk.goes_on(model, decoder_blocks(model)[:3], lambda: row_logits(model, 0, BATCHES[0]))


def test_what_is_beyond_the_budget_is_read_again(model, monkeypatch):
    vector = vector_of(model, "1:2")
    alone, calls = read(model, vector, shared=False), calls_of(decoder_blocks(model)[0])
    monkeypatch.setattr(trunk, "BUDGET", 0)
    assert all_equal(read(model, vector), alone)
    assert len(calls) == len(BATCHES) * len(STRENGTHS)


def test_gradients_go_through_the_trunk(model):
    with trunk.shared_trunk(model), ws.steer(model, vector_of(model, "1:2")):
        for _ in range(2):
            row_logits(model, 0, BATCHES[0]).sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_nothing_is_kept_when_the_block_has_ended(model):
    read(model, vector_of(model, "1:2"))
    assert model not in trunk._ACTIVE
    assert not any("forward" in vars(block) for block in decoder_blocks(model))


# ---- in training ----------------------------------------------------------------------------------------------------


def test_blocks_before_the_first_that_learns_are_frozen_where_nothing_else_learns(model):
    blocks = decoder_blocks(model)
    model.requires_grad_(False)
    assert trunk.frozen_blocks(model) == []
    blocks[1].mlp.requires_grad_(True)
    assert trunk.frozen_blocks(model) == blocks[:1]
    blocks[0].mlp.up_proj.requires_grad_(True)
    assert trunk.frozen_blocks(model) == []
    blocks[0].requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    assert trunk.frozen_blocks(model) == [], "the embeddings lie before all of them"


@pytest.mark.parametrize("what", ["plain", "dropout", "a tuple", "more"])
def test_steps_go_on_from_a_trunk_only_where_that_gives_the_same(model, what):
    first, second = decoder_blocks(model)[:2]
    if what == "dropout":
        first.self_attn.attention_dropout = 0.3
    if what == "more":
        hand_on_more(model)
    if what == "a tuple":
        one, two = first.forward, second.forward
        vars(first)["forward"] = lambda *args, **kwargs: (one(*args, **kwargs),)
        vars(second)["forward"] = lambda hidden, *args, **kwargs: two(hidden[0], *args, **kwargs)
    model.eval()
    found = trunk.goes_on(model, [first], lambda: model(tokens()[:, :9], use_cache=False).logits)
    assert found == (what == "plain")
    assert not model.training
