"""The contract that every adapter family passes: what we extract is exactly what PEFT computes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import ws
from conftest import build_adapter, build_model, tokens
from ws.diff import vector_digest
from ws.steer import _STEERED


def arms(base, family, tmp_path):
    """Two adapters of one initialisation, their one-sided vectors, and PEFT's merges of them."""
    merged = {s: build_adapter(base, family, tmp_path / s, seed) for s, seed in (("pos", 1), ("neg", 2))}
    vectors = {s: ws.SteeringVector.from_adapter(tmp_path / s, base) for s in merged}
    return vectors["pos"], vectors["neg"], merged["pos"], merged["neg"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def test_one_side_equals_pefts_merge(base, family, tmp_path):
    pos, _, merged, _ = arms(base, family, tmp_path)
    before, after = dict(base.named_parameters()), dict(merged.named_parameters())
    seen = {n for n, p in after.items() if not torch.equal(p, before[n])}
    dense = dict(pos.dense(base))
    assert set(dense) == seen
    for name, change in dense.items():
        assert relative(before[name] + change, after[name]) < 1e-6


def test_dense_difference_equals_the_difference_of_merges(base, family, tmp_path):
    pos, neg, merged_pos, merged_neg = arms(base, family, tmp_path)
    a, b = dict(merged_pos.named_parameters()), dict(merged_neg.named_parameters())
    for name, change in (pos - neg).dense(base):
        assert relative(change, a[name] - b[name]) < 1e-5


def test_an_untrained_adapter_is_the_zero_vector(base, family, tmp_path):
    build_adapter(base, family, tmp_path / "a", seed=1, size=0.0)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert vector.norm(base) < 1e-4 * sum(float(p.norm()) for p in base.parameters())


def test_steered_logits_equal_merged_weights(base, family, tmp_path, weights_hash):
    pos, neg, _, _ = arms(base, family, tmp_path)
    vector, ids, before = pos - neg, tokens(), weights_hash(base)
    for alpha in (1.0, -0.7):
        other = copy.deepcopy(base)
        vector.merge_into(other, alpha)
        with torch.no_grad(), ws.steer(base, vector, alpha):
            steered = base(ids).logits
        with torch.no_grad():
            assert (steered - other(ids).logits).abs().max() < 1e-4
            assert (steered - base(ids).logits).abs().max() > 1e-3
    assert weights_hash(base) == before
    assert not _STEERED


def test_swapping_the_arms_negates(base, family, tmp_path):
    pos, neg, _, _ = arms(base, family, tmp_path)
    back = dict((neg - pos).dense(base))
    for name, change in (pos - neg).dense(base):
        assert relative(-back[name], change) < 1e-5
    assert (pos - neg).cosine(neg - pos, base) == pytest.approx(-1.0, abs=1e-6)


def test_alpha_per_row_equals_one_at_a_time(base, family, tmp_path):
    pos, neg, _, _ = arms(base, family, tmp_path)
    alphas, ids = torch.tensor([-1.0, 0.0, 2.0]), tokens(3)
    with torch.no_grad(), ws.steer(base, pos - neg, alphas) as dial:
        together = base(ids).logits
        for row, alpha in enumerate(alphas.tolist()):
            dial.alpha = alpha
            alone = base(ids[row : row + 1]).logits[0]
            assert (together[row] - alone).abs().max() < 1e-4


def test_save_and_load_are_bit_exact(base, family, tmp_path):
    pos, neg, _, _ = arms(base, family, tmp_path)
    vector = pos - neg
    vector.save(tmp_path / "vector")
    again = ws.SteeringVector.load(tmp_path / "vector")
    assert vector_digest(again) == vector_digest(vector)
    assert (again.base_fingerprint, dict(again.info), dict(again.recipe)) == (
        vector.base_fingerprint,
        dict(vector.info),
        dict(vector.recipe),
    )


def test_peft_reads_low_rank_folders_exactly_and_refuses_the_others(base, family, tmp_path):
    pos, neg, _, _ = arms(base, family, tmp_path)
    vector, ids = pos - neg, tokens()
    vector.save(tmp_path / "vector")
    if not vector.is_low_rank:
        assert not (tmp_path / "vector" / "adapter_config.json").exists()
        with pytest.raises(ValueError, match="adapter_config"):
            PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "vector"))
        return
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "vector"))
    with torch.no_grad(), ws.steer(base, vector, 1.0):
        steered = base(ids).logits
    with torch.no_grad():
        assert (loaded(ids).logits - steered).abs().max() < 1e-4


def test_which_families_are_low_rank(base, family, tmp_path):
    pos, neg, _, _ = arms(base, family, tmp_path)
    assert (pos - neg).is_low_rank == (family in ("lora", "pissa", "delora"))
    if family == "pissa":
        assert (pos - neg).max_rank == 2 * 4, "the initial factors of both arms cancel"


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 9}}]
)
def test_lora_variants_of_others(qwen3, tmp_path, options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"], init_lora_weights=False, **options)
    model = get_peft_model(copy.deepcopy(qwen3), config)
    model.save_pretrained(str(tmp_path / "a"))
    after = dict(model.merge_and_unload().named_parameters())
    before = dict(qwen3.named_parameters())
    for vector in (ws.SteeringVector.load(tmp_path / "a"), ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)):
        dense = dict(vector.dense(qwen3))
        assert len(dense) == 2 * 3
        for name, change in dense.items():
            assert relative(before[name] + change, after[name]) < 1e-6


def test_bfloat16_base_keeps_small_changes(tmp_path):
    """The reason for the exact form: a bf16 checkpoint difference loses most of a small dW, the factors none of it."""
    base = build_model("qwen3", torch.bfloat16)
    build_adapter(base, "lora", tmp_path / "a", seed=1, size=0.02)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", base)
    exact = dict(vector.dense(base))
    merged = copy.deepcopy(base)
    lost = vector.merge_into(merged, 1.0)
    for name, p in merged.named_parameters():
        if name in exact:
            rounded = p.float() - dict(base.named_parameters())[name].float()
            assert relative(rounded, exact[name]) > 0.01
    assert lost > 0.01


def test_alphas_of_one_adapter_config_are_not_mistaken_for_strength(qwen3, tmp_path):
    build_adapter(qwen3, "lora", tmp_path / "a", seed=1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)
    vector.save(tmp_path / "v")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
