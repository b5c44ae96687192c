"""Exports, each loaded by its real consumer: PEFT for LoRA folders, transformers for merged checkpoints."""

from __future__ import annotations

import copy
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, PhiConfig, Qwen2Config

import ws
from conftest import FAMILY_NAMES, SHAPE, build_adapter, build_model, lay_out, tokens
from ws.diff import vector_digest
from ws.export.lora import as_lora, vllm_lines
from ws.export.lora import main as export_peft
from ws.export.merged import EXPORT_FILE, export_merged
from ws.export.merged import main as merge
from ws.export.source import strength_text
from ws.lm.checkpoints import Checkpoint
from ws.lm.models import fingerprint, load_tokenizer
from ws.options.use import LoraOptions, MergedOptions

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
        with pytest.raises(ws.WsError, match=r"LoRA of rank 2 would lose \d.*`max_error` 0\.\d"):
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
    with pytest.raises(ws.WsError, match="`to`"):
        export_peft(LoraOptions(vector=str(tmp_path / "vector")))
    with pytest.raises(ws.WsError, match="alpha 0"):
        export_peft(LoraOptions(vector=str(tmp_path / "vector"), alpha="0", to=tmp_path / "y"))
    assert not (tmp_path / "y").exists()


def test_strengths_that_differ_have_names_that_differ():
    names = {1.0: "+1", -1.0: "-1", 0.5: "+0.5", -2.5: "-2.5", 0.12341: "+0.12341", 0.12342: "+0.12342"}
    assert {alpha: strength_text(alpha) for alpha in names} == {a: f"-alpha{name}" for a, name in names.items()}
    assert strength_text(0.1 + 0.2) != strength_text(0.3)


def test_vllm_is_told_a_rank_it_knows():
    assert "--max-lora-rank 64 --lora-modules kind=x" in vllm_lines(Path("x"), "kind", "b", 33)[0]
    assert "up to 512" in vllm_lines(Path("x"), "kind", "b", 513)[0]
    words = shlex.split(vllm_lines(Path("my x"), "it's kind", "b; reboot", 33)[0])  # can be pasted into a shell
    assert [words[2], words[-1]] == ["b; reboot", "it's kind=my x"]


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
        (vector, {"model": str(tmp_path / "other")}, "give its base with `model`"),
        (replace(vector, base_id="pocket"), {}, "differ"),
        (replace(vector, base_id="tiny-random"), {}, "no files"),
    ):
        with pytest.raises(ws.WsError, match=message):
            export_merged(change, 1.0, tmp_path / "merged", **options)
    with pytest.raises(ws.WsError, match="overflows bfloat16"):
        export_merged(vector, 1e40, tmp_path / "merged")
    with pytest.raises(ws.WsError, match="alpha 0"):
        export_merged(vector, 0.0, tmp_path / "merged")
    with pytest.raises(ws.WsError, match="1e-60 is too small"):
        export_merged(vector, 1e-60, tmp_path / "merged")
    with pytest.raises(ws.WsError, match="no export"):
        export_merged(vector, 1.0, base)
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


# ---- merged, with tied weights --------------------------------------------------------------------------------------


def tied_pair(tmp_path, dtype=torch.float32):
    """A base with a tied head and a full fine-tune of it, as folders."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, tie_word_embeddings=True)).to(dtype)
    for part in ("base", "tuned"):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / part)
    return tmp_path / "base", tmp_path / "tuned"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tensors_of(folder):
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("sharded", [False, True])
def test_both_copies_of_a_tied_weight_are_written(sharded, tmp_path):
    base, tuned = tied_pair(tmp_path)
    vector = ws.SteeringVector.from_checkpoints(tuned, base, base=base)
    twice = lay_out(base, tmp_path / "twice", "twice", sharded)
    merged = export_merged(vector, 1.0, tmp_path / "merged", model=str(twice))
    stored, given = tensors_of(tmp_path / "merged"), loaded(tmp_path / "merged")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert given.lm_head.weight is given.model.embed_tokens.weight
    assert given.config.tie_word_embeddings
    assert merged.untied == ()
    assert (logits(given) - logits(loaded(tuned))).abs().max() < 1e-4
    assert (logits(loaded(base)) - logits(loaded(tuned))).abs().max() > 0.05
    assert Checkpoint.open(str(tmp_path / "merged")).fingerprint() == fingerprint(given)


def test_copies_in_two_dtypes_stay_one_weight(tmp_path):
    base, tuned = tied_pair(tmp_path, torch.bfloat16)
    vector = ws.SteeringVector.from_checkpoints(tuned, base, base=base)
    twice = lay_out(base, tmp_path / "twice", "twice")
    tensors = load_file(twice / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].float()}, twice / "model.safetensors")
    for dtype in ("bfloat16", "float32"):
        config = json.loads((twice / "config.json").read_text())
        (twice / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        assert export_merged(vector, 0.3, tmp_path / "merged", model=str(twice)).untied == ()
        given, stored = loaded(tmp_path / "merged"), tensors_of(tmp_path / "merged")
        assert given.lm_head.weight is given.model.embed_tokens.weight
        assert (stored["lm_head.weight"].dtype, stored["model.embed_tokens.weight"].dtype) == (
            torch.float32,
            torch.bfloat16,
        )


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("copies", ["once", "twice", "apart", "other"])
def test_a_head_of_its_own_is_exported_untied(copies, sharded, tmp_path):
    """Onto a base that stores the tied weight once or twice, or that transformers does not tie itself."""
    tied, tuned = tied_pair(tmp_path)
    base = lay_out(tied, tmp_path / "stored", copies, sharded)
    apart = lay_out(tuned, tmp_path / "apart", "apart")
    vector = ws.SteeringVector.from_checkpoints(apart, base, base=base)
    merged = export_merged(vector, 1.0, tmp_path / "merged")
    given = loaded(tmp_path / "merged")
    assert merged.untied == ("lm_head.weight",)
    assert not given.config.tie_word_embeddings
    assert (logits(given) - logits(loaded(apart))).abs().max() < 1e-4
    assert (steered(loaded(base), vector, 1.0) - logits(given)).abs().max() < 1e-4
    assert Checkpoint.open(str(tmp_path / "merged")).fingerprint() == fingerprint(given)
    assert json.loads((tmp_path / "merged" / EXPORT_FILE).read_text())["untied"] == ["lm_head.weight"]
    stored = tensors_of(tmp_path / "merged")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= stored.keys()
    index = tmp_path / "merged" / "model.safetensors.index.json"
    assert index.is_file() == sharded
    if sharded:
        facts = json.loads(index.read_text())
        assert facts["weight_map"].keys() == stored.keys()
        assert facts["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
        assert all(n in load_file(tmp_path / "merged" / file) for n, file in facts["weight_map"].items())


def test_an_untied_base_stays_untied_when_other_weights_change(tmp_path):
    tied, tuned = tied_pair(tmp_path)
    base = lay_out(tied, tmp_path / "apart", "apart")
    vector = ws.SteeringVector.from_checkpoints(tuned, tied, kinds=["up_proj"])
    wanted = steered(loaded(base), vector, -0.5)
    export_merged(vector, -0.5, tmp_path / "merged", model=str(base))
    given = loaded(tmp_path / "merged")
    assert (logits(given) - wanted).abs().max() < 1e-5
    assert torch.equal(given.lm_head.weight, loaded(base).lm_head.weight)
    assert not given.config.tie_word_embeddings
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]  # the base itself is not touched


def test_a_change_of_the_head_alone_unties_it(tmp_path):
    model, _ = ws.load_model("pocket")
    vector = ws.SteeringVector(
        {"lm_head": ws.LinearDelta(*model.lm_head.weight.shape, g=torch.ones(len(model.lm_head.weight)))},
        "pocket",
        fingerprint(model),
    )
    with pytest.raises(ws.WsError, match="shares its weight"):
        vector.merge_into(model)
    export_merged(vector, 0.5, tmp_path / "merged")
    given = loaded(tmp_path / "merged")
    assert torch.equal(given.model.embed_tokens.weight, model.model.embed_tokens.weight.to(given.dtype))
    wanted = (1.5 * model.lm_head.weight.float()).to(given.dtype)
    assert torch.equal(given.lm_head.weight, wanted)
    assert not given.config.tie_word_embeddings


def test_the_bias_beside_a_tied_weight_is_written(tmp_path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(PhiConfig(**SHAPE, tie_word_embeddings=True)).eval()
    for part in ("base", "tuned"):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path / part)
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "tuned", tmp_path / "base", base=tmp_path / "base")
    for copies in ("once", "twice"):
        base = lay_out(tmp_path / "base", tmp_path / copies, copies)
        assert export_merged(vector, 1.0, tmp_path / "merged", model=str(base)).untied == ()
        given = loaded(tmp_path / "merged")
        assert (given.lm_head.bias - loaded(tmp_path / "tuned").lm_head.bias).abs().max() < 1e-6
        assert (logits(given) - logits(model)).abs().max() < 1e-4


def test_every_flag_that_ties_is_turned_off_or_the_export_refused(tmp_path, monkeypatch):
    """LFM2 has a name of its own for the flag, which counts more than the usual one."""
    torch.manual_seed(3)
    config = Lfm2Config(**SHAPE, layer_types=["full_attention", "conv", "full_attention"], tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings | {"tie_embedding": True}))
    head = ws.LinearDelta(SHAPE["vocab_size"], SHAPE["hidden_size"], g=torch.ones(SHAPE["vocab_size"]))
    vector = ws.SteeringVector({"lm_head": head}, str(tmp_path / "base"), None)
    wanted = steered(loaded(tmp_path / "base"), vector, 0.5)
    export_merged(vector, 0.5, tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged")) - wanted).abs().max() < 1e-5
    monkeypatch.setattr("ws.export.merged.TIE_FLAGS", ("tie_word_embeddings",))
    with pytest.raises(ws.WsError, match="could not be written; steer instead"):
        export_merged(vector, 0.5, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_lora_is_made_of_changes_it_cannot_hold(tmp_path):
    tied, tuned = tied_pair(tmp_path)
    apart = lay_out(tuned, tmp_path / "apart", "apart")
    for pos in (tuned, apart):  # a tied embedding, and one whose head has moved apart
        vector = ws.SteeringVector.from_checkpoints(pos, tied, base=tied, kinds=["embed_tokens", "lm_head", "up_proj"])
        with pytest.raises(ws.WsError, match="would lose"):
            as_lora(vector, 1.0, model=str(tied))
    head = ws.SteeringVector.from_checkpoints(apart, tied, base=tied, kinds=["lm_head"])
    low = as_lora(head, 1.0, max_error=1e-6, model=str(tied))
    low.save(tmp_path / "lora")
    model = loaded(tied)
    wanted = steered(model, head, 1.0)
    with torch.no_grad():
        given = PeftModel.from_pretrained(model, str(tmp_path / "lora"))(tokens()).logits
    assert (given - wanted).abs().max() < 1e-4


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


# ---- what must not be touched ---------------------------------------------------------------------------------------


def test_peft_exports_replace_their_own_and_nothing_else(tmp_path, capsys):
    vector = contrast(build_model("qwen3"), "lora", tmp_path)
    vector.save(tmp_path / "v")
    options = LoraOptions(vector=str(tmp_path / "v"), to=tmp_path / "to")
    export_peft(options)
    (tmp_path / "to" / "notes.txt").write_text("mine")
    export_peft(replace(options, alpha="-2"))
    assert (tmp_path / "to" / "notes.txt").read_text() == "mine"
    assert ws.SteeringVector.load(tmp_path / "to").recipe["scalar"] == -2
    for to, why in ((tmp_path / "v", "the vector itself"), (tmp_path / "mine", "is not a steering vector")):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "adapter_config.json").write_text("{}")
        with pytest.raises(ws.WsError, match=why):
            export_peft(replace(options, to=to))
    assert vector_digest(ws.SteeringVector.load(tmp_path / "v")) == vector_digest(vector)


@pytest.mark.parametrize("record", ["kept", "lost"])
def test_a_merge_is_replaced_around_what_is_somebodys_own(saved, tmp_path, record):
    model, base = saved
    vector, to = contrast(model, "lora", tmp_path), tmp_path / "to"
    export_merged(vector, 1.0, to, str(base))
    names = {f.name for f in to.iterdir()}
    assert set(json.loads((to / EXPORT_FILE).read_text())["files"]) == names - {EXPORT_FILE}
    if record == "lost":
        (to / EXPORT_FILE).write_text("{}")
    (to / "notes.txt").write_text("mine")
    (to / "model-00099-of-00099.safetensors").write_bytes(b"")
    if record == "kept":
        found = json.loads((to / EXPORT_FILE).read_text())
        (to / EXPORT_FILE).write_text(json.dumps(found | {"files": [*found["files"], "../mine.txt"]}))
        (tmp_path / "mine.txt").write_text("mine")
    export_merged(vector, 2.0, to, str(base))
    assert {f.name for f in to.iterdir()} == names | {"notes.txt"}, "weights that are left would be read"
    assert (to / "notes.txt").read_text() == "mine"
    assert record == "lost" or (tmp_path / "mine.txt").read_text() == "mine"
    AutoModelForCausalLM.from_pretrained(to)


def test_an_index_cannot_name_weights_elsewhere(tmp_path):
    build_model("qwen3").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name = next(iter(found["weight_map"]))
    for place in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps(found | {"weight_map": found["weight_map"] | {name: place}}))
        with pytest.raises(ws.WsError, match="secret"):
            Checkpoint.open(str(tmp_path / "base"))


def test_an_export_says_nothing_of_the_folders_of_this_machine(tmp_path):
    secret = tmp_path / "Jane Doe" / "my models"
    model = build_model("qwen3")
    load_tokenizer("pocket").save_pretrained(secret / "base")
    model.save_pretrained(secret / "base")
    vector = replace(contrast(model, "lora", tmp_path), base_id=str(secret / "base"))
    recipe = {"op": "compose", "expression": f"'{secret}/v'*1.0 + C:\\Users\\Jane Doe\\w", "of": vector.recipe}
    vector = replace(
        vector, recipe=recipe, info={"behavior": "honesty", "note": f"see {secret}/notes, or ~/Jane Doe/x"}
    )
    export_merged(vector, 1.0, tmp_path / "to")
    for file in (EXPORT_FILE, "README.md"):
        text = (tmp_path / "to" / file).read_text(encoding="utf-8")
        assert "Jane" not in text, file
        assert str(tmp_path) not in text, file
    assert json.loads((tmp_path / "to" / EXPORT_FILE).read_text())["base"] == "base"
