"""Adapters of families that are not ours, read off the layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OSFConfig,
    PolyConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import ws
from conftest import SHAPE, build_model, tokens
from ws.lm.probe import probe_adapter

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "loha": LoHaConfig(r=3, target_modules=TARGETS),
    "lokr": LoKrConfig(r=3, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], save_projection=True),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
    "lora": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
}


# Beside those above: what else PEFT has for linear layers, and starts that draw on nothing but the base.
OTHERS = {
    "boft": BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "c3a": C3AConfig(block_size=8, target_modules=TARGETS),
    "fourierft": FourierFTConfig(n_frequency=50, target_modules=TARGETS),
    "vblora": VBLoRAConfig(num_vectors=16, vector_length=8, target_modules=TARGETS),
    "randlora": RandLoraConfig(r=4, target_modules=["q_proj"]),
    "adalora": AdaLoraConfig(target_modules=TARGETS, total_step=10, tinit=1, tfinal=2),
    "pissa": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
}


def dense(vector, base) -> dict[str, torch.Tensor]:
    return dict(vector.dense(copy.deepcopy(base).float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_a_base_in_few_digits_gives_the_change_that_float32_does(name, dtype, tmp_path, weights_hash):
    base = build_model("qwen2", dtype)
    adapted = get_peft_model(copy.deepcopy(base), (CONFIGS | OTHERS)[name])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    adapted.save_pretrained(str(tmp_path / "a"))
    before, shape = weights_hash(base), state(base)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert (weights_hash(base), state(base)) == (before, shape)
    read = dense(vector, base)
    for parameter, wanted in dense(ws.SteeringVector.from_adapter(tmp_path / "a", base.float()), base).items():
        assert (read[parameter] - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("config", [OSFConfig(target_modules=["q_proj"])], ids=["osf"])
def test_what_takes_the_base_apart_needs_all_of_its_digits(config, tmp_path):
    base = build_model("qwen3", torch.bfloat16)
    save(base, config, tmp_path / "a")
    with pytest.raises(ws.WsError, match="OSF.*dtype float32"):
        ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert ws.SteeringVector.from_adapter(tmp_path / "a", base.float()).norm() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_change_of_any_linear_adapter_is_what_peft_computes(name, tmp_path, capsys, weights_hash):
    base = build_model("qwen2")
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(base), CONFIGS[name])
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 2.0)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    before = weights_hash(base)
    vector = ws.SteeringVector.from_adapter(tmp_path / "adapter", base)
    assert weights_hash(base) == before
    assert "read off the layers" in capsys.readouterr().err
    assert vector.info["family"] == name
    with torch.no_grad():
        wanted, plain = adapted.eval()(tokens()).logits, base(tokens()).logits
        assert (wanted - plain).abs().max() > 2e-3
        with ws.steer(base, vector):
            assert (base(tokens()).logits - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_olora_is_refused_by_a_base_that_it_did_not_begin_at(dtype, tmp_path, capsys):
    base, other = build_model("qwen3", dtype), build_model("qwen3", dtype)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p) * 0.02)
    adapted = get_peft_model(copy.deepcopy(base), CONFIGS["lora"])
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.01)
    adapted.save_pretrained(str(tmp_path / "a"))
    assert ws.SteeringVector.from_adapter(tmp_path / "a", base).norm() > 0
    assert "trained from exactly this base" in capsys.readouterr().err
    with pytest.raises(ws.WsError, match="does not begin at this one"):
        ws.SteeringVector.from_adapter(tmp_path / "a", other)


def test_prompts_have_no_vector(tmp_path):
    base = build_model("qwen3")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ws.WsError, match="no vector"):
        ws.SteeringVector.from_adapter(tmp_path / "adapter", base)


def test_without_the_base_it_cannot_be_read(tmp_path):
    base = build_model("qwen3")
    get_peft_model(copy.deepcopy(base), CONFIGS["loha"]).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ws.WsError, match="together with its base"):
        ws.SteeringVector.load(tmp_path / "adapter")


def save(base, config, folder) -> None:
    """A PEFT adapter with random tensors."""
    torch.manual_seed(2)
    adapted = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.5)
    adapted.save_pretrained(str(folder))


def edit(folder, **settings) -> None:
    """Other settings beside the same tensors."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def state(base) -> dict[str, object]:
    """All that an adapter could leave behind on a model, but its weights."""
    return {n: (type(m), set(vars(m)), m.training) for n, m in base.named_modules()} | {
        f"{n}:": (id(p), p.requires_grad) for n, p in base.named_parameters()
    }


BEYOND = [
    {"layer_replication": [[0, 2], [1, 2]]}, {"alora_invocation_tokens": [9, 27]}, {"arrow_config": {}},
    {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}, {"bias": "all"}, {"bias": "lora_only"},
    {"target_parameters": ["mlp.down_proj.weight"]}, {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"), [*(("olora", s) for s in BEYOND), *(("adalora", s) for s in BEYOND[:-1])], ids=str
)
def test_settings_that_no_single_layer_shows_are_refused_by_name(kind, settings, tmp_path, weights_hash):
    base = build_model("qwen2")
    olora = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora", task_type="CAUSAL_LM")
    adalora = AdaLoraConfig(target_modules=TARGETS, total_step=10, tinit=1, tfinal=2, task_type="CAUSAL_LM")
    save(base, olora if kind == "olora" else adalora, tmp_path / "a")
    edit(tmp_path / "a", **settings)
    before, shape = weights_hash(base), state(base)
    with pytest.raises(ws.WsError, match=f"{next(iter(settings))}=.* does not show in its layers"):
        ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert (weights_hash(base), state(base)) == (before, shape)


def test_fields_that_this_peft_does_not_know_are_refused_here_too(tmp_path):
    base = build_model("qwen3")
    save(base, CONFIGS["loha"], tmp_path / "a")
    edit(tmp_path / "a", wonder_scale=2.0, use_wonder=None)
    with pytest.raises(
        ws.WsError, match=r"wonder_scale=2\.0, which PEFT .* does not know for a LoHaConfig .*upgrade PEFT"
    ):
        ws.SteeringVector.from_adapter(tmp_path / "a", base)
    edit(tmp_path / "a", wonder_scale=None)
    ws.SteeringVector.from_adapter(tmp_path / "a", base)


def test_the_whole_model_has_to_answer_as_pefts(tmp_path, weights_hash):
    """Whatever it is that one layer at a time does not show: here a layer that is run twice."""
    base = build_model("qwen2")
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora", task_type="CAUSAL_LM")
    save(base, config, tmp_path / "a")
    assert set(probe_adapter(tmp_path / "a", config, base)) == {
        n for n, m in base.named_modules() if n.endswith(tuple(TARGETS)) and isinstance(m, nn.Linear)
    }
    edit(tmp_path / "a", layer_replication=[[0, 2], [1, 2]])
    before, shape = weights_hash(base), state(base)
    with pytest.raises(ws.WsError, match="does more than change linear layers"):
        probe_adapter(tmp_path / "a", config, base)
    assert (weights_hash(base), state(base)) == (before, shape)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LNTuningConfig(target_modules=["input_layernorm"]), "input_layernorm, which is no linear layer"),
        (TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]), "embed_tokens, which is no linear"),
        (PolyConfig(r=4, n_tasks=2, target_modules=TARGETS, task_type="CAUSAL_LM"), "cannot be run .*task_ids"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"), "changes no layer"),
    ],
    ids=["norms", "tokens", "tasks", "prompts"],
)
def test_what_is_no_change_of_linear_layers_is_refused_and_leaves_the_base_alone(config, why, tmp_path, weights_hash):
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).train()
    save(base, config, tmp_path / "a")
    before, shape = weights_hash(base), state(base)
    with pytest.raises(ws.WsError, match=why):
        ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert (weights_hash(base), state(base)) == (before, shape)


def test_tensors_have_to_be_the_ones_that_peft_places(tmp_path, weights_hash):
    base = build_model("qwen2")
    save(base, CONFIGS["loha"], tmp_path / "a")
    before, shape = weights_hash(base), state(base)
    file = tmp_path / "a" / "adapter_model.safetensors"
    whole = load_file(file)
    first = min(whole)

    def refused(why: str) -> None:
        with pytest.raises(ws.WsError, match=why):
            ws.SteeringVector.from_adapter(tmp_path / "a", base)
        assert (weights_hash(base), state(base)) == (before, shape)

    edit(tmp_path / "a", layers_to_transform=[0, 1])
    refused("holds a tensor that PEFT does not place: .*layers.2")
    edit(tmp_path / "a", layers_to_transform=None, r=2)
    refused("PEFT cannot put the adapter")
    edit(tmp_path / "a", r=3)
    save_file({k: t for k, t in whole.items() if k != first}, file)
    refused(f"lacks: {first}")


def test_what_peft_warns_of_is_said(tmp_path, capsys):
    """Commands filter the warnings of libraries, and this one is about the numbers."""
    base = build_model("qwen2")
    config = VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
    save(base, config, tmp_path / "a")
    capsys.readouterr()
    ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert "warning: PEFT says of the adapter" in (said := capsys.readouterr().err)
    assert "PRNG key" in said
