"""Vectors of full fine-tunes: read tensor by tensor, steered through every kind of module, streamed to disk."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

import ws
from conftest import SHAPE, tokens
from ws.checkpoints import Checkpoint
from ws.diff import vector_digest
from ws.fine_tunes import DiffOptions, diff_checkpoints
from ws.models import fingerprint
from ws.steer import _STEERED
from ws.tensor_files import tensor_patcher, tensor_writer

GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
CONFIGS = {
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, pad_token_id=0),
    "gpt2": GPT2Config(**GPT2, eos_token_id=2),
    "neox": GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
}


def fine_tunes(name: str, tmp_path, size: float = 0.05):
    """A base and two copies of it in which every parameter has moved."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for p in base.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    models = {"base": base, "pos": copy.deepcopy(base), "neg": copy.deepcopy(base)}
    for sign in ("pos", "neg"):
        with torch.no_grad():
            for p in models[sign].parameters():
                p.add_(torch.randn_like(p) * size)
    for part, model in models.items():
        model.save_pretrained(tmp_path / part, max_shard_size="40KB" if part == "pos" else "1GB")
    return models


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_adding_theta_minus_base_gives_theta_in_every_kind_of_module(name, tmp_path):
    models = fine_tunes(name, tmp_path)
    base = models["base"]
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "base", base=tmp_path / "base")
    assert vector.base_fingerprint == fingerprint(base)
    with ws.steer(base, vector, 1.0):
        assert (logits(base) - logits(models["pos"])).abs().max() < 2e-4
        assert (logits(models["pos"]) - logits(models["neg"])).abs().max() > 0.05
    middle = copy.deepcopy(base)
    with torch.no_grad():
        for p, q in zip(middle.parameters(), models["pos"].parameters(), strict=True):
            p.add_(-0.5 * (q - p))
    with ws.steer(base, vector, -0.5):
        assert (logits(base) - logits(middle)).abs().max() < 2e-4
    merged = copy.deepcopy(base)
    assert vector.merge_into(merged, -0.5) < 1e-5
    assert (logits(merged) - logits(middle)).abs().max() < 2e-4
    assert not _STEERED


def test_the_difference_of_two_fine_tunes_is_dense_and_complete(tmp_path):
    models = fine_tunes("gemma2", tmp_path)
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")
    changes = dict(vector.dense(models["base"]))
    wanted = {n: (p - dict(models["neg"].named_parameters())[n]) for n, p in models["pos"].named_parameters()}
    assert changes.keys() == wanted.keys() | {"lm_head.weight"}
    for name, change in wanted.items():
        assert torch.equal(changes[name], change.detach())
    # A tied matrix counts once.
    assert vector.norm() == pytest.approx(sum(float(c.square().sum()) for c in wanted.values()) ** 0.5, rel=1e-6)
    twice = 2 * vector - vector
    assert twice.deltas["lm_head"] is twice.deltas["model.embed_tokens"]


def test_gemma_scales_its_embedding_and_its_norm_and_rows_have_strengths_of_their_own(tmp_path):
    base = fine_tunes("gemma2", tmp_path)["base"]
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "base", kinds=["embed_tokens", "norm"])
    assert vector.deltas.keys() == {"model.embed_tokens", "model.norm"}
    with ws.steer(base, vector, torch.tensor([0.0, 1.0, -2.0])) as dial:
        rows = logits(base)
        for row, alpha in enumerate((0.0, 1.0, -2.0)):
            dial.alpha = alpha
            assert (logits(base)[row] - rows[row]).abs().max() < 1e-5


def test_a_tied_matrix_is_stored_once_and_read_back(tmp_path):
    base = fine_tunes("qwen2-tied", tmp_path)["base"]
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")
    vector.save(tmp_path / "vector")
    stored = load_file(tmp_path / "vector" / "vector.safetensors")
    assert "model.embed_tokens:e" in stored
    assert "lm_head:e" not in stored
    again = ws.SteeringVector.load(tmp_path / "vector")
    assert again.deltas["lm_head"] is again.deltas["model.embed_tokens"]
    assert vector_digest(again) == vector_digest(vector)
    assert again.deltas["model.norm"].kind == "scale"
    with ws.steer(base, again):
        assert logits(base).isfinite().all()


def test_the_command_streams_the_same_vector(tmp_path):
    fine_tunes("qwen2-tied", tmp_path)
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg", base=tmp_path / "base")
    places = {key: str(tmp_path / key) for key in ("pos", "neg", "base")}
    recipe = diff_checkpoints(DiffOptions(**places, to=tmp_path / "vector", behavior="honesty"))
    again = ws.SteeringVector.load(tmp_path / "vector")
    assert vector_digest(again) == vector_digest(vector)
    assert again.base_fingerprint == vector.base_fingerprint
    assert again.info["behavior"] == "honesty"
    assert recipe["equal"] == 0
    low = diff_checkpoints(DiffOptions(**places, to=tmp_path / "vector", rank=4))
    small = ws.SteeringVector.load(tmp_path / "vector")
    assert small.max_rank == 4
    assert 0 < low["errors"]["model.layers.0.mlp.up_proj"] < 1
    error = (vector - small).norm() / (vector.norm() ** 2 - norms_of_scales(vector)) ** 0.5
    assert low["total_error"] == pytest.approx(error, rel=1e-3)


def norms_of_scales(vector) -> float:
    biases = sum(float(d.bias.square().sum()) for d in vector.deltas.values() if d.bias is not None)
    return biases + sum(d.norm() ** 2 for d in vector.deltas.values() if d.kind == "scale")


def test_what_is_equal_is_left_out_and_nothing_different_is_an_error(tmp_path):
    models = fine_tunes("llama", tmp_path)
    with torch.no_grad():
        for name, p in models["neg"].named_parameters():
            if "down_proj" not in name:
                p.copy_(models["pos"].get_parameter(name))
    models["neg"].save_pretrained(tmp_path / "neg")
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")
    assert set(vector.deltas) == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}
    with pytest.raises(ws.WsError, match="equal in every module"):
        ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "pos")
    with pytest.raises(ws.WsError, match="Did you mean 'down_proj'"):
        ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg", kinds=["down_prj"])
    assert not list(tmp_path.glob("*.part"))


def test_a_vector_of_one_rank_everywhere_that_is_linear_is_a_peft_lora(tmp_path):
    fine_tunes("llama", tmp_path)
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg", rank=3, kinds=["q_proj"])
    assert vector.is_low_rank
    table = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg", rank=3, kinds=["embed_tokens"])
    assert not table.is_low_rank
    table.save(tmp_path / "vector")
    assert ws.SteeringVector.load(tmp_path / "vector").deltas["model.embed_tokens"].rank == 3


def test_fused_experts_that_differ_stop_it(tmp_path):
    from transformers import MixtralConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE, num_local_experts=2))
    model.save_pretrained(tmp_path / "neg")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model.save_pretrained(tmp_path / "pos")
    # Mixtral's files hold one tensor per expert, so the fused parameters have no tensor of their own in them.
    with pytest.raises(ws.WsError, match="keeps them in parts"):
        ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")


def test_unlike_or_broken_checkpoints_are_refused(tmp_path):
    fine_tunes("llama", tmp_path)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"hidden_size": 16})).save_pretrained(tmp_path / "small")
    with pytest.raises(ws.WsError, match="not of one architecture"):
        ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "small")
    with pytest.raises(ws.WsError, match="no folder"):
        ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "nowhere")
    file = tmp_path / "neg" / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "layers.1" not in n}, file)
    with pytest.raises(ws.WsError, match="lacks 9 weights"):
        Checkpoint.open(str(tmp_path / "neg")).require_whole()
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ws.WsError, match=r"model\.norm\.weight .* NaN"):
        ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")
    shard = next((tmp_path / "pos").glob("*-of-*.safetensors"))
    shard.unlink()
    with pytest.raises(ws.WsError, match=shard.name):
        Checkpoint.open(str(tmp_path / "pos"))


def test_a_module_that_is_neither_linear_nor_norm_is_not_steered(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.weight**2

    model = torch.nn.Sequential(Odd())
    delta = ws.LinearDelta(4, 1, e=torch.ones(4, 1), kind="scale")
    vector = ws.SteeringVector({"0": delta}, "odd", None)
    with pytest.raises(ws.WsError, match="only linear layers, embeddings and norms"), ws.steer(model, vector):
        pass
    assert not _STEERED
    assert not model[0]._forward_hooks


def test_files_are_written_and_patched_one_tensor_at_a_time(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = {"ä": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5).bfloat16(), "c": torch.tensor(3)}
    with tensor_writer(file, [*tensors, "never"]) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    read = load_file(file)
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    assert read.keys() == tensors.keys()
    with tensor_patcher(file) as patcher:
        patcher.replace("b", torch.full((5,), 2.0).bfloat16())
        with pytest.raises(ws.WsError, match="only be replaced by its like"):
            patcher.replace("b", torch.ones(5))
    read = load_file(file)
    assert torch.equal(read["b"], torch.full((5,), 2.0).bfloat16())
    assert torch.equal(read["ä"], tensors["ä"])
    json.dumps(sorted(read))
