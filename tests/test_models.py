"""Loading models by name, and finding out what a chat template can do."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import GPT2Config

import ws
from conftest import build_model
from ws.models import (
    chat_format,
    encode,
    fingerprint,
    layer_of,
    linear_size,
    load_tokenizer,
    model_folder,
    module_kind,
    parse_layers,
    render_prompt,
    target_modules,
    weight_of,
    weight_size,
)

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
ALWAYS_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def tok():
    return load_tokenizer("pocket")


def test_pocket_and_tiny_random_load_and_say_what_they_are():
    for name in ("pocket", "tiny-random"):
        model, tok = ws.load_model(name, device="cpu")
        assert model.name_or_path == name
        assert not model.training
        assert tok.pad_token_id is not None
        ids = torch.tensor([encode(tok, render_prompt(tok, "Hello"))])
        with torch.no_grad():
            assert torch.isfinite(model(ids).logits).all()


def test_tiny_random_is_the_same_every_time():
    marks = {fingerprint(ws.load_model("tiny-random")[0]) for _ in range(2)}
    assert len(marks) == 1


def test_local_folders_load_and_dtype_is_honoured(tmp_path, tok):
    model = build_model("qwen3")
    model.save_pretrained(tmp_path / "m")
    tok.save_pretrained(tmp_path / "m")
    again, _ = ws.load_model(str(tmp_path / "m"), dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert fingerprint(again) == fingerprint(model)


def test_the_fingerprint_tells_a_fine_tune_from_its_base_but_not_dtypes_apart(qwen3):
    mark = fingerprint(qwen3)
    assert fingerprint(build_model("qwen3", torch.bfloat16)) == mark
    with torch.no_grad():
        qwen3.model.layers[1].self_attn.q_proj.weight *= 1.02
    assert fingerprint(qwen3) != mark


def test_the_pocket_template_can_do_everything(tok):
    form = chat_format(tok)
    assert form.has_template
    assert form.system_role
    assert form.thinking_switch
    assert tok.convert_ids_to_tokens(form.end_of_turn_id) == "<|im_end|>"
    assert tok.convert_ids_to_tokens(form.think_close_id) == "</think>"
    closed, open_ = render_prompt(tok, "Q"), render_prompt(tok, "Q", thinking=True)
    assert closed.endswith("<think>\n\n</think>\n\n")
    assert open_.endswith("assistant\n")
    assert render_prompt(tok, "Q", system="S", opener="My answer:").endswith("</think>\n\nMy answer:")


def test_without_a_system_role_the_persona_goes_into_the_user_turn(tok):
    tok.chat_template = NO_SYSTEM
    form = chat_format(tok)
    assert not form.system_role
    text = render_prompt(tok, "What is it?", system="Be honest.")
    assert "Be honest.\n\nWhat is it?" in text
    assert text.endswith("model\n")


def test_a_template_that_always_thinks_gets_its_block_closed(tok):
    tok.chat_template = ALWAYS_THINKS
    assert not chat_format(tok).thinking_switch
    assert render_prompt(tok, "Q").endswith("<think>\n\n</think>\n\n")
    assert render_prompt(tok, "Q", thinking=True).endswith("<think>\n")


def test_without_a_template_a_plain_transcript_is_used(tok):
    tok.chat_template = None
    assert not chat_format(tok).has_template
    assert chat_format(tok).end_of_turn_id == tok.eos_token_id
    assert render_prompt(tok, "Q", system="S", opener="A:") == "User: S\n\nQ\nAssistant: A:"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("poket", "Did you mean 'pocket'"),
        ("./nowhere/model", "no folder"),
        ("someone/some-model-that-is-not-cached", "hf download"),
    ],
)
def test_unknown_models_are_explained(name, message):
    with pytest.raises(ws.WsError, match=message):
        ws.load_model(name)


def test_without_a_network_the_answer_comes_at_once(monkeypatch):
    import ws.models as models

    asked = []

    def unreachable(address, timeout):
        asked.append(address)
        raise OSError("no route")

    models.hub_is_out_of_reach.cache_clear()
    monkeypatch.setattr(models.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "getproxies", dict)
    monkeypatch.setattr(models.socket, "create_connection", unreachable)
    try:
        with pytest.raises(ws.WsError, match="hub could not be reached"):
            ws.load_model("someone/some-model-that-is-not-cached")
    finally:
        models.hub_is_out_of_reach.cache_clear()
    assert len(asked) == 1
    assert asked[0][1] == 443


def test_folders_that_are_no_safetensors_model_are_explained(tmp_path, tok):
    with pytest.raises(ws.WsError, match="not a transformers model"):
        ws.load_model(str(tmp_path))
    folder = tmp_path / "m"
    shutil.copytree(model_folder("pocket"), folder, ignore=shutil.ignore_patterns("__pycache__", "data"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ws.WsError, match="damaged|safetensors"):
        ws.load_model(str(folder))
    weights.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ws.WsError, match="never loaded"):
        ws.load_model(str(folder))


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path, tok):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "m"
    build_model("qwen3").save_pretrained(folder)
    tok.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ws.WsError, match="lacks 1 of its weights"):
        ws.load_model(str(folder))


@pytest.mark.parametrize(("device", "dtype"), [("cuda:77", "auto"), ("abacus", "auto"), ("cpu", "float99")])
def test_impossible_devices_and_dtypes_are_explained(device, dtype):
    with pytest.raises(ws.WsError):
        ws.load_model("tiny-random", device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("spec", "count", "want"),
    [
        ("0.3:0.8", 28, range(8, 22)),
        ("0.3:0.8", 4, (1, 2)),
        ("all", 3, (0, 1, 2)),
        ("1:3", 4, (1, 2)),
        ("2,0", 4, (2, 0)),
        (":0.5", 4, (0, 1)),
        ([3], 4, (3,)),
    ],
)
def test_layer_specs(spec, count, want):
    assert parse_layers(spec, count) == tuple(want)


@pytest.mark.parametrize("spec", ["0.8:0.3", "9", "-1", "a:b", "", "0.0:0.01", "1.0:2.0", "3:1"])
def test_bad_layer_specs_say_what_is_understood(spec):
    with pytest.raises(ws.WsError, match="layers"):
        parse_layers(spec, 4)


def test_target_modules_are_the_seven_kinds_inside_the_layers(qwen3):
    names = target_modules(qwen3, "0.3:0.8")
    assert {layer_of(n) for n in names} == {1}
    assert len(names) == 7
    assert target_modules(qwen3, "all", ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    with pytest.raises(ws.WsError, match="Did you mean 'q_proj'"):
        target_modules(qwen3, "all", ["q_prj"])


def test_modules_of_gpt2_count_as_linear_with_their_own_orientation():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    assert len(target_modules(model)) == 4
    up = model.transformer.h[0].mlp.c_fc
    assert linear_size(up) == (64, 16)
    assert tuple(weight_of(up).shape) == (64, 16)
    assert module_kind(model.transformer.wpe) == "embedding"
    assert weight_size(model.transformer.ln_f) == (16, 1)
    assert weight_size(model.transformer.h[0].attn) is None


def test_fused_experts_are_refused_by_name_unless_kinds_are_named():
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ws.WsError, match=r"fused \(model\.layers\.0\.mlp\.experts.*--kinds: k_proj, o_proj"):
        target_modules(model)
    assert target_modules(model, kinds=["q_proj", "o_proj"]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.o_proj",
    ]
