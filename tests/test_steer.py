"""Steering a live model: nesting, exceptions, several vectors, refusals, and that nothing is left behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import ws
from conftest import build_adapter, build_model, tokens
from ws.controls import random_like
from ws.steer import _STEERED


@pytest.fixture
def setting(tmp_path):
    """A base and a vector of every family on it."""
    model = build_model("qwen2")
    vectors = {}
    for family in ("lora", "oft", "ia3", "dora"):
        build_adapter(model, family, tmp_path / family, seed=3)
        vectors[family] = ws.SteeringVector.from_adapter(tmp_path / family, model)
    return model, vectors


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def test_nested_contexts_add_up_for_input_and_output_sided_changes(setting):
    model, v = setting
    names = list(v)
    with ws.steer_many(model, v, dict.fromkeys(names, 0.5)):
        together = logits(model)
    total = sum((v[n] * 0.5 for n in names[1:]), v[names[0]] * 0.5)
    with ws.steer(model, total, 1.0):
        assert (logits(model) - together).abs().max() < 1e-4
    with ws.steer(model, v["oft"], 0.5), ws.steer(model, v["lora"], 0.5), ws.steer(model, v["ia3"], 0.5):
        with ws.steer(model, v["dora"], 0.5):
            assert (logits(model) - together).abs().max() < 1e-4
        with ws.steer(model, v["dora"], 0.5):
            assert (logits(model) - together).abs().max() < 1e-4


def test_the_same_vector_twice_counts_twice(setting):
    model, v = setting
    with ws.steer(model, v["lora"], 2.0):
        double = logits(model)
    with ws.steer(model, v["lora"], 1.0), ws.steer(model, v["lora"], 1.0):
        assert (logits(model) - double).abs().max() < 1e-4


def test_alpha_changes_take_effect_and_zero_is_the_base_bit_for_bit(setting):
    model, v = setting
    before = logits(model)
    with ws.steer(model, v["oft"], 0.0) as dial:
        assert torch.equal(logits(model), before)
        dial.alpha = 1.0
        moved = logits(model)
        assert not torch.allclose(moved, before)
        dial.alpha = 0
        assert torch.equal(logits(model), before)
        dial.alpha = torch.zeros(3)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_the_model_is_restored_after_an_exception(setting, weights_hash):
    model, v = setting
    before, hashed, attributes = logits(model), weights_hash(model), copy.copy(vars(model))
    with pytest.raises(RuntimeError, match="inside"), ws.steer(model, v["dora"], 3.0):
        logits(model)
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)
    assert weights_hash(model) == hashed
    assert vars(model).keys() == attributes.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not _STEERED


def test_generation_under_per_row_alpha_equals_one_at_a_time(setting):
    model, v = setting
    ids, alphas = tokens(1).repeat(3, 1), torch.tensor([-2.0, 0.0, 2.0])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ws.steer(model, v["lora"], alphas) as dial:
        together = model.generate(ids, **options)
        for row, alpha in enumerate(alphas.tolist()):
            dial.alpha = alpha
            assert torch.equal(model.generate(ids[:1], **options)[0], together[row])


def test_what_another_hook_has_kept_is_left_as_it_was(setting):
    model, v = setting
    kept = []
    module = model.model.layers[1].mlp.up_proj
    handle = module.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    plain = logits(model)
    with ws.steer(model, v["lora"]):
        steered = logits(model)
    handle.remove()
    assert all(torch.equal(output, copied) for output, copied in kept)
    with ws.steer(model, v["lora"]):
        assert (logits(model) - steered).abs().max() < 1e-5
    assert (steered - plain).abs().max() > 0.01


def test_steering_does_not_disturb_gradients(setting):
    model, v = setting
    alpha = torch.tensor([0.3, 0.3, 0.3], requires_grad=True)
    with ws.steer(model, v["lora"], alpha):
        model(tokens()).logits.square().mean().backward()
    assert alpha.grad is not None
    assert torch.isfinite(alpha.grad).all()


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")]), torch.ones(2, 2)])
def test_alpha_must_be_finite_and_at_most_one_per_row(setting, alpha):
    model, v = setting
    with pytest.raises(ws.WsError, match="alpha"), ws.steer(model, v["lora"], alpha):
        pass
    with ws.steer(model, v["lora"]) as dial, pytest.raises(ws.WsError, match="alpha"):
        dial.alpha = alpha


def test_a_wrong_number_of_rows_is_refused(setting):
    model, v = setting
    with ws.steer(model, v["lora"], torch.ones(2)), pytest.raises(ws.WsError, match="2 entries .* 3 rows"):
        logits(model)
    assert not _STEERED


def test_another_base_is_refused(setting):
    _, v = setting
    torch.manual_seed(99)
    other = build_model("qwen2")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.1
    with pytest.raises(ws.WsError, match="weights differ"), ws.steer(other, v["lora"]):
        pass


def test_the_bfloat16_copy_of_the_base_is_accepted(setting):
    model, v = setting
    with ws.steer(copy.deepcopy(model).to(torch.bfloat16), v["lora"]) as dial:
        assert dial.alpha == 1.0


def test_modules_without_a_partner_stop_it(setting):
    model, v = setting
    for vector, what in (
        (
            replace(v["lora"], base_fingerprint=None, deltas={"model.layers.9.mlp.up_proj": ws.LinearDelta(4, 4)}),
            "zero",
        ),
        (
            replace(
                v["lora"],
                base_fingerprint=None,
                deltas={"model.layers.9.x": ws.LinearDelta(2, 2, g=torch.ones(2))},
            ),
            "no such module",
        ),
        (
            replace(
                v["lora"],
                base_fingerprint=None,
                deltas={"model.layers.0.mlp.up_proj": ws.LinearDelta(2, 2, g=torch.ones(2))},
            ),
            r"Linear of \(48, 32\)",
        ),
    ):
        with pytest.raises(ws.WsError, match=what), ws.steer(model, vector):
            pass


def test_a_zero_vector_is_an_error_not_a_silent_no_op(setting):
    model, v = setting
    with pytest.raises(ws.WsError, match="zero"), ws.steer(model, v["lora"] - v["lora"]):
        pass


def test_a_model_with_adapter_layers_is_refused(setting):
    from peft import LoraConfig, get_peft_model

    model, v = setting
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ws.WsError, match="adapter layers"), ws.steer(peft_model, v["lora"]):
        pass


def test_unknown_dial_names_get_a_suggestion(setting):
    model, v = setting
    with ws.steer_many(model, {"honesty": v["lora"]}) as dials:
        with pytest.raises(ws.WsError, match="Did you mean 'honesty'"):
            dials["honest"]
        dials["honesty"].alpha = 2
    with (
        pytest.raises(ws.WsError, match="Did you mean"),
        ws.steer_many(model, {"honesty": v["lora"]}, {"honestly": 1.0}),
    ):
        pass


def test_random_controls_match_the_norm_of_every_module(setting):
    model, v = setting
    for vector in v.values():
        control = random_like(vector, model, seed=1)
        for name, delta in vector.deltas.items():
            w = model.get_submodule(name).weight
            assert control.deltas[name].norm(w) == pytest.approx(delta.norm(w), rel=1e-4)
        assert abs(control.cosine(vector, model)) < 0.2
        again, other = random_like(vector, model, seed=1), random_like(vector, model, seed=2)
        assert control.cosine(again, model) == pytest.approx(1.0, abs=1e-6)
        assert abs(control.cosine(other, model)) < 0.2
