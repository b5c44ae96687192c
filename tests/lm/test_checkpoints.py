"""Vectors of full fine-tunes: read tensor by tensor, steered through every kind of module, streamed to disk."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

import ws
from conftest import SHAPE, lay_out, tokens
from ws.analysis.controls import random_like
from ws.analysis.geometry import cosine_matrix, open_vector
from ws.analysis.trim import scale_depth
from ws.diff import diff_checkpoints, vector_digest
from ws.files.tensors import copy_with_room, tensor_patcher, tensor_writer
from ws.lm.checkpoints import Checkpoint
from ws.lm.models import fingerprint, is_packed
from ws.options.make import DiffOptions
from ws.steer import _STEERED

GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
CONFIGS = {
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, pad_token_id=0),
    "gpt2": GPT2Config(**GPT2, eos_token_id=2),
    "neox": GPTNeoXConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    ),
    # Heads with a bias of their own beside a tied weight; BERT ties the bias as well, to one that no layer holds.
    "phi-tied": PhiConfig(**SHAPE, tie_word_embeddings=True),
    "bert": BertConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}, is_decoder=True),
}
TIED = ("qwen2-tied", "gemma2", "gpt2", "phi-tied")


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
    assert low["total_error"] == pytest.approx(error, rel=1e-5), "of the matrices, without the biases that stay"


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


# ---- tied weights ---------------------------------------------------------------------------------------------------


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def vector_of(pos, neg, **options):
    return ws.SteeringVector.from_checkpoints(pos, neg, base=neg, **options)


def steered(model, vector, alpha=1.0):
    with ws.steer(model, vector, alpha):
        return logits(model)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("copies", ["once", "twice", "apart", "other"])
@pytest.mark.parametrize("name", [*TIED, "bert"])
def test_a_checkpoint_is_the_model_that_transformers_loads(name, copies, sharded, tmp_path):
    fine_tunes(name, tmp_path)
    folder = lay_out(tmp_path / "base", tmp_path / "stored", copies, sharded)
    model, checkpoint = loaded(folder), Checkpoint.open(str(folder)).require_whole()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(checkpoint.tensor(n), p) for n, p in parameters.items())
    for one, other in loaded(tmp_path / "base").all_tied_weights_keys.items():
        tied = parameters[one] is parameters[other]
        assert tied == (copies != "apart")
        assert (checkpoint.model.get_parameter(one) is checkpoint.model.get_parameter(other)) == tied
        assert len(checkpoint.copies(one)) == (2 if copies == "twice" else 1)
    assert checkpoint.fingerprint() == fingerprint(model)


@pytest.mark.parametrize("name", TIED)
def test_a_weight_that_is_stored_twice_has_one_change(name, tmp_path):
    fine_tunes(name, tmp_path)
    once = ws.SteeringVector.from_checkpoints(tmp_path / "neg", tmp_path / "base")
    folders = {k: lay_out(tmp_path / k, tmp_path / f"{k}-2", c) for k, c in (("neg", "twice"), ("base", "other"))}
    twice = vector_of(folders["neg"], folders["base"])
    assert vector_digest(twice) == vector_digest(once)
    assert twice.shared == once.shared
    assert len(twice.shared) == 1


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize(("pos", "neg"), [("apart", "once"), ("apart", "twice"), ("once", "apart"), ("apart", "apart")])
def test_a_head_of_its_own_has_a_change_of_its_own(name, pos, neg, tmp_path):
    """Fine-tunes that have untied their head, of a tied base, and the other way round."""
    fine_tunes(name, tmp_path)
    folders = {
        "pos": lay_out(tmp_path / "neg", tmp_path / "a", pos),
        "neg": lay_out(tmp_path / "base", tmp_path / "b", neg),
    }
    vector, base = vector_of(folders["pos"], folders["neg"]), loaded(folders["neg"])
    assert not vector.shared
    wanted = logits(loaded(folders["pos"]))
    assert (steered(base, vector) - wanted).abs().max() < 2e-4
    assert (logits(base) - wanted).abs().max() > 0.05
    vector.save(tmp_path / "vector")
    assert vector_digest(ws.SteeringVector.load(tmp_path / "vector")) == vector_digest(vector)
    diff_checkpoints(DiffOptions(**{k: str(f) for k, f in folders.items()}, to=tmp_path / "vector"))
    assert vector_digest(ws.SteeringVector.load(tmp_path / "vector")) == vector_digest(vector)
    if neg == "apart":
        vector.merge_into(base)
        assert (logits(base) - wanted).abs().max() < 2e-4
    else:  # one matrix cannot hold two changes
        with pytest.raises(ws.WsError, match="shares its weight with another module"):
            vector.merge_into(base)
        assert (steered(base, vector) - wanted).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["phi-tied", "bert"])
def test_the_bias_of_a_tied_head_is_in_its_change(name, tmp_path):
    models = fine_tunes(name, tmp_path)
    vector = ws.SteeringVector.from_checkpoints(tmp_path / "pos", tmp_path / "neg")
    pairs = zip(models["pos"].parameters(), models["neg"].parameters(), strict=True)
    squares = [float((p - q).square().sum()) for p, q in pairs]
    assert vector.norm() == pytest.approx(sum(squares) ** 0.5, rel=1e-6)  # the tied matrix once, the bias once
    with torch.no_grad():
        for n, p in models["neg"].named_parameters():
            p.copy_(models["base"].get_parameter(n) + (0.1 if n in ("lm_head.bias", "cls.predictions.bias") else 0.0))
    models["neg"].save_pretrained(tmp_path / "neg")
    alone = ws.SteeringVector.from_checkpoints(tmp_path / "neg", tmp_path / "base")
    assert [d.kind for d in alone.deltas.values()] == ["linear"]
    for change in (alone, alone.select(modules=list({n.rsplit(".", 1)[-1] for n in alone.deltas}))):
        assert (steered(models["base"], change) - logits(models["base"]) - 0.1).abs().max() < 1e-5
    change = copy.deepcopy(models["base"])
    alone.merge_into(change)
    assert (logits(change) - logits(models["neg"])).abs().max() < 1e-5


def test_factors_of_a_tied_embedding_steer_the_head_too(tmp_path):
    models = fine_tunes("qwen2-tied", tmp_path)
    vector = vector_of(tmp_path / "pos", tmp_path / "base", rank=SHAPE["hidden_size"])
    assert vector.deltas["lm_head"].u is not None
    assert (steered(models["base"], vector) - logits(models["pos"])).abs().max() < 2e-4
    small = vector.compress(rank=3)
    merged = copy.deepcopy(models["base"])
    small.merge_into(merged)
    assert (steered(models["base"], small) - logits(merged)).abs().max() < 2e-4
    factors = {n: d for n, d in vector.deltas.items() if d.rank and n != "lm_head"}  # the tied matrix counts once
    size = sum(replace(d, bias=None).norm() ** 2 for d in factors.values()) ** 0.5
    lost = (vector - small).norm() / size
    assert small.recipe["total_error"] == pytest.approx(lost, rel=1e-3)


def test_one_change_stays_one_where_modules_share_it(tmp_path):
    base = fine_tunes("qwen2-tied", tmp_path)["base"]
    vector = vector_of(tmp_path / "pos", tmp_path / "base")
    low = vector_of(tmp_path / "pos", tmp_path / "base", rank=4)
    for made in (low.compress(rank=2), scale_depth(vector, 1, 0.5), random_like(vector, base, 0), -vector / 3):
        assert made.shared == {"lm_head": "model.embed_tokens"}
        made.merge_into(copy.deepcopy(base), 0.1)
    whole = sum(float(c.square().sum()) for n, c in vector.dense(base) if n != "lm_head.weight") ** 0.5
    assert vector.norm() == pytest.approx(whole, rel=1e-6)
    assert random_like(vector, base, 0).norm() == pytest.approx(whole, rel=1e-4)
    # What is equal without being the same object, as of a vector made by hand, is alike too.
    apart = replace(vector, deltas={n: d * 1.0 for n, d in vector.deltas.items()})
    assert not apart.shared
    merged = [copy.deepcopy(base) for _ in range(2)]
    for model, change in zip(merged, (vector, apart), strict=True):
        change.merge_into(model)
    assert torch.equal(logits(merged[0]), logits(merged[1]))


def test_tied_and_untied_changes_add_up_and_have_a_cosine(tmp_path):
    base = fine_tunes("qwen2-tied", tmp_path)["base"]
    tied = vector_of(tmp_path / "pos", tmp_path / "base")
    untied = vector_of(lay_out(tmp_path / "neg", tmp_path / "apart", "apart"), tmp_path / "base")
    with ws.steer(base, tied, 0.5):
        wanted = steered(base, untied, -1.0)
    assert (steered(base, 0.5 * tied - untied) - wanted).abs().max() < 1e-5
    assert (steered(base, -untied + 0.5 * tied) - wanted).abs().max() < 1e-5
    rows = [torch.cat([c.flatten() for _, c in v.dense(base)]).double() for v in (tied, untied)]  # both matrices
    assert tied.cosine(untied) == pytest.approx(float(torch.cosine_similarity(*rows, dim=0)), abs=1e-6)
    hand = replace(tied, deltas={n: d * 2.0 for n, d in tied.deltas.items()})  # equal, but not one object
    assert tied.cosine(hand) == pytest.approx(1, abs=1e-6)
    assert tied.cosine(2 * tied) == pytest.approx(1, abs=1e-6)


def test_tied_changes_on_disk_are_compared_like_those_in_memory(tmp_path):
    fine_tunes("qwen2-tied", tmp_path)
    pair = [vector_of(tmp_path / "pos", tmp_path / "base"), vector_of(tmp_path / "neg", tmp_path / "base")]
    stored = [open_vector(v.save(tmp_path / str(i))) for i, v in enumerate(pair)]
    wanted = cosine_matrix(pair, loaded(tmp_path / "base")).cosine
    assert wanted[0, 1] == pytest.approx(pair[0].cosine(pair[1]), abs=1e-6)
    assert cosine_matrix(stored, loaded(tmp_path / "base")).cosine == pytest.approx(wanted, abs=1e-9)


def test_copies_are_equal_or_not_in_the_dtype_of_the_model(tmp_path):
    """What the files hold in float32 may be equal once transformers has rounded it to the configuration's dtype."""
    fine_tunes("qwen2-tied", tmp_path)
    folder = lay_out(tmp_path / "base", tmp_path / "twice", "twice")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1 + 1e-4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for dtype, tied in (("float32", False), ("bfloat16", True)):
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
        model, checkpoint = loaded(folder), Checkpoint.open(str(folder))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert checkpoint.untied == ([] if tied else ["lm_head.weight"])
        assert checkpoint.fingerprint() == fingerprint(model)
    del config["dtype"]  # then that of the first tensor counts, here the head's
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].bfloat16()}, folder / "model.safetensors")
    model, checkpoint = loaded(folder), Checkpoint.open(str(folder))
    assert model.dtype == checkpoint.model.dtype == torch.bfloat16
    assert checkpoint.fingerprint() == fingerprint(model)


def test_the_same_files_and_names_count_as_in_transformers(tmp_path):
    fine_tunes("gpt2", tmp_path)
    one = lay_out(tmp_path / "base", tmp_path / "one", "once")
    for file in (tmp_path / "pos").glob("*.safetensors*"):  # beside a whole file, shards and their index do not count
        shutil.copy(file, one)
    assert Checkpoint.open(str(one)).fingerprint() == fingerprint(loaded(one)) == fingerprint(loaded(tmp_path / "base"))
    two = lay_out(tmp_path / "base", tmp_path / "two", "apart", sharded=True)
    index = json.loads((two / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]  # it is in a shard all the same, which is read as a whole
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(str(two)).fingerprint() == fingerprint(loaded(two))
    assert Checkpoint.open(str(two)).untied == ["lm_head.weight"]
    tensors = load_file(one / "model.safetensors")  # a second name of one parameter, without the prefix
    save_file(tensors | {"wte.weight": tensors["transformer.wte.weight"] + 1}, one / "model.safetensors")
    model = loaded(one)
    assert torch.equal(Checkpoint.open(str(one)).tensor("transformer.wte.weight"), model.transformer.wte.weight)
    assert Checkpoint.open(str(one)).fingerprint() == fingerprint(model)


def test_a_tensor_of_another_shape_than_configured_is_refused(tmp_path):
    fine_tunes("llama", tmp_path)
    tensors = load_file(tmp_path / "neg" / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(1)}, tmp_path / "neg" / "model.safetensors")
    with pytest.raises(ws.WsError, match=r"model\.norm\.weight as \(1,\).*\(32,\)"):
        ws.SteeringVector.from_checkpoints(tmp_path / "neg", tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_quantised_weights_are_no_numbers(dtype, tmp_path):
    """Their scales lie in tensors of their own; without them a difference or a merge would be of any size."""
    fine_tunes("llama", tmp_path)
    for name, codes in (("base", 1), ("neg", 2)):
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        weight = next(n for n in tensors if n.endswith("q_proj.weight"))
        packed = {weight: torch.full_like(tensors[weight], codes).to(dtype), f"{weight}_scale": torch.ones(1)}
        save_file(tensors | packed, file, metadata={"format": "pt"})
    with pytest.raises(ws.WsError, match="q_proj.weight as codes of a quantised weight"):
        ws.SteeringVector.from_checkpoints(tmp_path / "neg", tmp_path / "base")
    model = torch.nn.Linear(2, 2)
    assert not is_packed(model)
    model.weight = torch.nn.Parameter(model.weight.detach().to(dtype), requires_grad=False)
    assert is_packed(model)


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
    copy_with_room(file, tmp_path / "y.safetensors", {"new": "b", "another": "ä"})
    with tensor_patcher(tmp_path / "y.safetensors") as patcher:
        assert patcher.dtype("new") == torch.bfloat16
        patcher.replace("new", torch.arange(5).bfloat16())
    again = load_file(tmp_path / "y.safetensors")
    assert again.keys() == read.keys() | {"new", "another"}
    assert all(torch.equal(again[n], t) for n, t in (read | {"new": torch.arange(5).bfloat16()}).items())
    assert again["another"].shape == read["ä"].shape
    with safe_open(tmp_path / "y.safetensors", framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
