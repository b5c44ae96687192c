"""Adapters of families that are not ours, read off the layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)

import ws
from conftest import build_model, tokens

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "loha": LoHaConfig(r=3, target_modules=TARGETS),
    "lokr": LoKrConfig(r=3, target_modules=TARGETS),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], save_projection=True),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
    "lora": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
}


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
