"""Models that fit nowhere whole: spread, offloaded to disk, packed in 8 or 4 bits. Steering does not notice."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import ws
from conftest import SHAPE, build_adapter, build_model, lay_out, tokens
from ws.adapters import peft_config
from ws.export.merged import export_merged
from ws.lm.choice import score_choices
from ws.lm.models import fingerprint, is_offloaded, is_packed
from ws.options.shared import RunOptions

FAMILIES = ("lora", "oft", "ia3", "dora")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A base with biases, saved; a vector of four families, and what steering with them gives."""
    folder = tmp_path_factory.mktemp("big")
    model = build_model("qwen2")
    model.save_pretrained(folder / "base")
    vectors, wanted = {}, {}
    for family in FAMILIES:
        build_adapter(model, family, folder / family, seed=3)
        vectors[family] = ws.SteeringVector.from_adapter(folder / family, model)
        with ws.steer(model, vectors[family], torch.tensor([-0.5, 0.0, 1.0])):
            wanted[family] = logits(model)
    return folder, model, vectors, wanted


def logits(model):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(tokens()).logits


def offloaded(folder, places):
    """The saved base with some of its parts on disk."""
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    device_map = {part: "disk" if part in places else "cpu" for part in parts}
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=folder / "offload"
    ).eval()


@pytest.mark.parametrize("places", [["model.layers.0", "model.layers.2"], ["model.embed_tokens", "model.layers.1"]])
def test_an_offloaded_model_is_steered_like_the_whole_one(places, setting):
    folder, base, vectors, wanted = setting
    model = offloaded(folder, places)
    waiting = [n for n, m in model.named_modules() if is_offloaded(m)]
    assert any(n.endswith("q_proj") for n in waiting)
    assert fingerprint(model) == fingerprint(base)
    before = logits(model)
    for family in FAMILIES:
        with ws.steer(model, vectors[family], torch.tensor([-0.5, 0.0, 1.0])):
            assert (logits(model) - wanted[family]).abs().max() < 1e-4
        assert (wanted[family] - before).abs().max() > 0.02
        assert vectors[family].norm(model) == pytest.approx(vectors[family].norm(base), rel=1e-5)
    assert torch.equal(logits(model), before)
    assert [n for n, m in model.named_modules() if is_offloaded(m)] == waiting
    with pytest.raises(ws.WsError, match="offloaded"):
        vectors["lora"].merge_into(model)


def test_full_fine_tunes_steer_offloaded_embeddings_and_norms(setting):
    folder = setting[0]
    pos = build_model("qwen2")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in pos.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    pos.save_pretrained(folder / "pos")
    vector = ws.SteeringVector.from_checkpoints(folder / "pos", folder / "base", base=folder / "base")
    model = offloaded(folder, ["model.embed_tokens", "model.norm", "model.layers.0", "model.layers.2"])
    with ws.steer(model, vector):
        assert (logits(model) - logits(pos)).abs().max() < 1e-4


@pytest.mark.parametrize("copies", ["once", "twice", "apart"])
def test_a_tied_head_on_disk_leaves_the_fingerprint_alone(copies, tmp_path):
    """Transformers does not compare copies that both wait on disk, and reading them makes two parameters of one."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    folder = lay_out(tmp_path / "model", tmp_path / copies / "base", copies)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    model = offloaded(folder.parent, ["model.embed_tokens", "lm_head"])
    assert fingerprint(model) == fingerprint(whole)
    assert fingerprint(model) == fingerprint(whole)  # the second time too


def test_a_map_with_little_memory_puts_the_rest_on_disk(tmp_path):
    model, tok = ws.load_model("pocket", device="map", offload=tmp_path, max_memory={"cpu": "4MB"})
    assert any(p.is_meta for p in model.parameters())
    whole, _ = ws.load_model("pocket", device="cpu")
    assert fingerprint(model) == fingerprint(whole)
    prompts = ["The sky is", "I think that"]
    given, wanted = (score_choices(m, tok, prompts, ("Yes", "No"), 2) for m in (model, whole))
    assert abs(given.logp - wanted.logp).max() < 1e-5
    ids = tok(prompts[0], return_tensors="pt").input_ids
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False), whole.generate(ids, max_new_tokens=5, do_sample=False)
    )


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits


def unpacked(module):
    """The weight that a packed layer stands for, float32."""
    import bitsandbytes.functional as bnb

    if module.weight.dtype == torch.uint8:
        return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return module.weight.data.float() * module.weight.SCB[:, None] / 127


@pytest.mark.parametrize("packing", ["8bit", "4bit"])
def test_packed_weights_are_steered_and_never_touched(packing, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, tok = ws.load_model("pocket", device="cpu")
    model, _ = ws.load_model("pocket", device="cpu", dtype=packing)
    assert is_packed(model)
    ids, name = tok("I think the sun is", return_tensors="pt").input_ids, "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    weight = unpacked(module)
    logits_of(model, ids)  # bitsandbytes may lay its weights out anew the first time
    stored = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(0))
    for family in ("lora", "oft", "ia3", "dora"):
        build_adapter(whole, family, tmp_path / family, seed=3, oft_block=16)
        vector = ws.SteeringVector.from_adapter(tmp_path / family, whole)
        with torch.no_grad():
            before, plain = logits_of(model, ids), module(x)
            with ws.steer(model, vector, -0.7):
                moved = logits_of(model, ids)
                shift = (module(x) - plain).float()
            assert (moved - before).abs().max() > 0.05
            with ws.steer(model, vector, -0.7, compilable=True):
                assert (logits_of(model, ids) - moved).abs().max() < 0.05 * (moved - before).abs().max()
            assert torch.equal(logits_of(model, ids), before)
        # What is added is that of the weights the layer stands for; their own rounding in the product remains.
        wanted = x @ (-0.7 * vector.deltas[name].dense(weight)).T
        assert float((shift - wanted).norm() / wanted.norm()) < (1e-3 if family == "lora" else 0.05)
        with pytest.raises(ws.WsError, match="quantised"):
            vector.merge_into(model)
        if family == "dora":  # its coordinates are the base's, and codes are no weights
            with pytest.raises(ws.WsError, match=r"depends on the base weight, which is quantised"):
                ws.SteeringVector.from_adapter(tmp_path / family, model)
    for name, p in model.named_parameters():
        assert torch.equal(p, stored[name]), name


@pytest.mark.parametrize("packing", ["8bit", "4bit"])
def test_packed_weights_have_a_fingerprint_that_a_pass_does_not_change_and_another_checkpoint_does(packing, tmp_path):
    """Scores that were kept for one checkpoint were read for the next one at its place."""
    pytest.importorskip("bitsandbytes")
    whole, tok = ws.load_model("pocket", device="cpu")
    ids, marks = tok("I think the sun is", return_tensors="pt").input_ids, []
    for number in range(2):
        with torch.no_grad():
            whole.model.layers[1].mlp.down_proj.weight[:, :8] *= 1 + number
        whole.save_pretrained(tmp_path / str(number))
        tok.save_pretrained(tmp_path / str(number))
        model, _ = ws.load_model(str(tmp_path / str(number)), device="cpu", dtype=packing)
        marks.append(fingerprint(model))
        logits_of(model, ids)
        assert fingerprint(model) == marks[-1]
    assert marks[0] != marks[1]


def test_the_base_of_a_packed_model_is_known_by_its_name(tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, _ = ws.load_model("pocket", device="cpu")
    build_adapter(whole, "oft", tmp_path / "a", seed=3, oft_block=16)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", whole)
    model, _ = ws.load_model("pocket", device="cpu", dtype="8bit")
    model.name_or_path = model.config._name_or_path = "another"
    with (
        pytest.raises(ws.WsError, match="made for pocket and this model, .* is another"),
        ws.steer(model, vector),
    ):
        pass
    model.name_or_path = model.config._name_or_path = "pocket"
    with pytest.raises(ws.WsError, match="unquantised"):
        vector.norm(model)
    with pytest.raises(ws.WsError, match="plain weights"):
        peft_config(model, ws.AdapterSpec("lora"))


def test_packing_is_asked_for_once():
    assert RunOptions(load_in_4bit=True).precision == "4bit"
    assert RunOptions(load_in_8bit=True, dtype="8bit").precision == "8bit"
    assert RunOptions(dtype="bfloat16").precision == "bfloat16"
    for options in ({"load_in_4bit": True, "load_in_8bit": True}, {"load_in_4bit": True, "dtype": "float32"}):
        with pytest.raises(ws.WsError, match="Give one of"):
            _ = RunOptions(**options).precision
    with pytest.raises(ws.WsError, match="no files to spread"):
        ws.load_model("tiny-random", device="map")


def test_float16_rounds_twice_so_its_name_has_to_do(tmp_path):
    whole, _ = ws.load_model("pocket", device="cpu")
    build_adapter(whole, "lora", tmp_path / "a", seed=3)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", whole)
    half, _ = ws.load_model("pocket", device="cpu", dtype="float16")
    ids = torch.arange(12)[None]
    with torch.no_grad(), ws.steer(half, vector), ws.steer(whole, vector):
        wanted = whole(ids).logits
        assert float((half(ids).logits.float() - wanted).norm() / wanted.norm()) < 0.01
    half.name_or_path = half.config._name_or_path = "another"
    with pytest.raises(ws.WsError, match="float16"):
        vector.matched(half)


def test_what_was_made_on_the_float16_copy_fits_the_base(tmp_path):
    """Its fingerprint is of weights that float16 has rounded, which every copy with more digits can be, too."""
    whole, half = (ws.load_model("pocket", device="cpu", dtype=d)[0] for d in ("float32", "float16"))
    assert fingerprint(half) == fingerprint(whole, torch.float16) != fingerprint(whole)
    build_adapter(half, "lora", tmp_path / "a", seed=3)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", half)
    assert vector.base_fingerprint == fingerprint(half)
    with ws.steer(whole, vector), ws.steer(half, vector):
        pass
    export_merged(vector, 1.0, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    with pytest.raises(ws.WsError, match="different bases: pocket .* pocket .*float16"):
        _ = vector + ws.SteeringVector(vector.deltas, "pocket", fingerprint(whole))
    with torch.no_grad():
        whole.model.norm.weight += 1
    with pytest.raises(ws.WsError, match="weights differ .*float16"):
        vector.matched(whole)
