"""Exports, each loaded by its real consumer: PEFT for LoRA folders, transformers for merged checkpoints."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ws
from conftest import FAMILY_NAMES, build_adapter, build_model, tokens
from ws.export.lora import LoraOptions, as_lora, vllm_lines
from ws.export.lora import main as export_peft
from ws.export.merged import EXPORT_FILE, MergedOptions, export_merged
from ws.export.merged import main as merge
from ws.models import fingerprint, load_tokenizer

LOW_RANK = ("lora", "pissa", "delora")


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def contrast(model, family, tmp_path):
    """`pos - neg` of a family on a model."""
    sides = []
    for seed in (1, 2):
        build_adapter(model, family, tmp_path / f"{family}-{seed}", seed)
        sides.append(ws.SteeringVector.from_adapter(tmp_path / f"{family}-{seed}", model))
    return sides[0] - sides[1]


def steered(model, vector, alpha):
    with ws.steer(model, vector, alpha):
        return logits(model)


@pytest.fixture(params=["qwen3", "qwen2"])
def saved(request, tmp_path):
    """A base, also as a folder of several shards in bfloat16 with a tokenizer."""
    model = build_model(request.param, torch.bfloat16)
    load_tokenizer("pocket").save_pretrained(tmp_path / "base")
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"a pickle")
    return model, tmp_path / "base"


# ---- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("alpha", [1.0, -0.7])
def test_peft_gives_the_logits_of_steering(family, alpha, tmp_path):
    model = build_model("qwen3")
    vector = contrast(model, family, tmp_path)
    model.save_pretrained(tmp_path / "base")
    low = as_lora(vector, alpha, max_error=0.01 if family in LOW_RANK else 1e-6, model=str(tmp_path / "base"))
    low.save(tmp_path / "lora")
    wanted = steered(model, vector, alpha)
    effect = float((wanted - logits(model)).abs().max())
    with torch.no_grad():
        given = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "lora"))(tokens()).logits
    assert float((given - wanted).abs().max()) < 2e-4 * max(effect, 1.0)
    assert effect > 0.05
    if family in LOW_RANK:
        assert "errors" not in low.recipe
    else:
        assert low.recipe["op"] == "factorise"
        assert low.recipe["total_error"] < 1e-6 * 1.01


def test_a_rank_that_is_too_small_is_refused_unless_told(tmp_path):
    model = build_model("qwen3")
    model.save_pretrained(tmp_path / "base")
    for family in ("lora", "dora"):
        vector = contrast(model, family, tmp_path)
        with pytest.raises(ws.WsError, match=r"LoRA of rank 2 would lose \d.*--max-error 0\.\d"):
            as_lora(vector, 1.0, rank=2, model=str(tmp_path / "base"))
        low = as_lora(vector, 1.0, rank=2, max_error=0.99, model=str(tmp_path / "base"))
        assert low.max_rank == 2
        dense, small = dict(vector.dense(model)), dict(low.dense(model))
        lost = sum(float((dense[n] - small[n]).square().sum()) for n in dense) ** 0.5
        assert low.recipe["total_error"] == pytest.approx(lost / vector.norm(model), rel=1e-3)
        for name, change in dense.items():
            s = torch.linalg.svdvals(change.double())
            best = float(s[2:].norm() / s.norm())
            assert low.recipe["errors"][name.removesuffix(".weight")] == pytest.approx(best, rel=1e-3)


def test_what_a_lora_cannot_hold_counts_as_lost(tmp_path):
    """IA3 on Qwen2 changes biases, which are no part of a LoRA."""
    model = build_model("qwen2")
    model.save_pretrained(tmp_path / "base")
    vector = contrast(model, "ia3", tmp_path)
    with pytest.raises(ws.WsError, match="would lose"):
        as_lora(vector, 1.0, model=str(tmp_path / "base"))
    low = as_lora(vector, 1.0, max_error=0.999, model=str(tmp_path / "base"))
    biases = sum(float(d.bias.square().sum()) for d in vector.deltas.values() if d.bias is not None) ** 0.5
    assert low.recipe["total_error"] >= biases / vector.norm(model) > 0.01
    exact = vector.factorised(model, error=1e-7)
    assert exact.recipe["total_error"] == pytest.approx(biases / vector.norm(model), rel=1e-3)


def test_the_command_writes_prints_and_stores(tmp_path, capsys, monkeypatch):
    model = build_model("qwen3")
    vector = replace(contrast(model, "oft", tmp_path), base_id=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "base")
    vector.save(tmp_path / "vector")
    export_peft(LoraOptions(vector=str(tmp_path / "vector"), alpha="0.5", to=tmp_path / "x"))
    out = capsys.readouterr().out
    assert "relative error of the whole change: 0.9" in out or "relative error of the whole change: 0." in out
    assert "largest error" in out
    assert f"--lora-modules vector-alpha+0.5={tmp_path / 'x'}" in out
    stored = json.loads((tmp_path / "x" / "ws.json").read_text())["recipe"]
    assert stored["total_error"] <= 0.01
    assert len(stored["errors"]) == len(vector.deltas)
    with pytest.raises(ws.WsError, match="--to"):
        export_peft(LoraOptions(vector=str(tmp_path / "vector")))
    with pytest.raises(ws.WsError, match="alpha 0"):
        export_peft(LoraOptions(vector=str(tmp_path / "vector"), alpha="0", to=tmp_path / "y"))
    assert not (tmp_path / "y").exists()


def test_vllm_is_told_a_rank_it_knows():
    assert "--max-lora-rank 64 --lora-modules kind=x" in vllm_lines(Path("x"), "kind", "b", 33)[0]
    assert "up to 512" in vllm_lines(Path("x"), "kind", "b", 513)[0]


# ---- merged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_transformers_loads_the_merge_and_gives_what_merge_into_gives(family, saved, tmp_path):
    model, base = saved
    vector = replace(contrast(model.float(), family, tmp_path), base_id=str(base))
    model.to(torch.bfloat16)
    merged = export_merged(vector, -0.8, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.bfloat16
    lost = vector.merge_into(model, -0.8)
    assert merged.lost == pytest.approx(lost, rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.equal(plain.get_parameter(name), p), name
    assert plain.generation_config.max_new_tokens == 17


def test_the_merge_is_the_steered_model_in_float32(tmp_path):
    model = build_model("qwen2")
    vector = replace(contrast(model, "dora", tmp_path), base_id=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "base")
    wanted = steered(model, vector, 0.6)
    assert export_merged(vector, 0.6, tmp_path / "merged").lost < 1e-5
    given = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert float((given - wanted).abs().max()) < 2e-5
    assert float((wanted - logits(model)).abs().max()) > 0.05


def test_untouched_files_are_the_bases_own_and_nothing_else_comes_along(saved, tmp_path):
    model, base = saved
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    vector = replace(contrast(model.float(), "lora", tmp_path), base_id=str(base)).select(
        modules=["up_proj"], layers=[1]
    )
    merged = export_merged(vector, 1.0, tmp_path / "merged")
    assert len(merged.patched) == 1
    assert len(merged.linked) == 3
    for name in merged.linked:
        assert (tmp_path / "merged" / name).samefile(base / name)
    assert not (tmp_path / "merged" / merged.patched[0]).samefile(base / merged.patched[0])
    assert {f.name: f.read_bytes() for f in base.iterdir()} == before
    assert not (tmp_path / "merged" / "pytorch_model.bin").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    changed = [n for n, p in model.named_parameters() if not torch.equal(again.get_parameter(n).float(), p.float())]
    assert changed == ["model.layers.1.mlp.up_proj.weight"]
    facts = json.loads((tmp_path / "merged" / EXPORT_FILE).read_text())
    assert facts["alpha"] == 1.0
    assert str(tmp_path) not in (tmp_path / "merged" / EXPORT_FILE).read_text()


def test_a_full_fine_tune_comes_back_whole(tmp_path):
    base, pos = build_model("qwen2", torch.bfloat16), build_model("qwen2", torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in pos.parameters():
            p.mul_(1 + 0.1 * torch.randn(()))
    base.save_pretrained(tmp_path / "base")
    pos.save_pretrained(tmp_path / "pos")
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "base", base=tmp_path / "base")
    merged = export_merged(vector, 1.0, tmp_path / "merged")
    assert merged.lost == 0.0
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == fingerprint(pos)
    a, b = (load_file(tmp_path / part / "model.safetensors") for part in ("pos", "merged"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_merges_that_cannot_be_are_refused_and_leave_nothing(saved, tmp_path):
    model, base = saved
    vector = replace(contrast(model.float(), "lora", tmp_path), base_id=str(base))
    other = build_model("qwen3" if model.config.model_type == "qwen2" else "qwen2")
    other.save_pretrained(tmp_path / "other")
    for change, options, message in (
        (vector, {"model": str(tmp_path / "other")}, "give its base with --model"),
        (replace(vector, base_id="pocket"), {}, "differ"),
        (replace(vector, base_id="tiny-random"), {}, "no files"),
    ):
        with pytest.raises(ws.WsError, match=message):
            export_merged(change, 1.0, tmp_path / "merged", **options)
    with pytest.raises(ws.WsError, match="overflows bfloat16"):
        export_merged(vector, 1e40, tmp_path / "merged")
    with pytest.raises(ws.WsError, match="alpha 0"):
        export_merged(vector, 0.0, tmp_path / "merged")
    with pytest.raises(ws.WsError, match="no export"):
        export_merged(vector, 1.0, base)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_change_of_one_of_two_tied_weights_cannot_be_merged(tmp_path):
    model, _ = ws.load_model("pocket")
    vector = ws.SteeringVector(
        {"lm_head": ws.LinearDelta(*model.lm_head.weight.shape, g=torch.ones(len(model.lm_head.weight)))},
        "pocket",
        fingerprint(model),
    )
    with pytest.raises(ws.WsError, match="shares its weight"):
        export_merged(vector, 1.0, tmp_path / "merged")


def test_the_merge_command_says_what_the_cast_destroyed(saved, tmp_path, capsys):
    model, base = saved
    replace(contrast(model.float(), "lora", tmp_path), base_id=str(base)).save(tmp_path / "vector")
    merge(MergedOptions(vector=str(tmp_path / "vector"), alpha="0.01", to=tmp_path / "merged"))
    out = capsys.readouterr().out
    assert "The cast to bfloat16 destroyed" in out
    assert "21 modules written at alpha +0.01" in out
    card = (tmp_path / "merged" / "README.md").read_text()
    assert card.startswith("---")
    assert "library_name: transformers" in card
    merge(MergedOptions(vector=str(tmp_path / "vector"), alpha="0.02", to=tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / EXPORT_FILE).read_text())["alpha"] == 0.02
