"""The contract that every adapter family passes: what we extract is exactly what PEFT computes."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from peft import (
    DeloraConfig,
    EvaConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import ws
from conftest import build_adapter, build_model, tokens
from ws.adapters import (
    COMMON_FIELDS,
    FAMILIES,
    PISSA_INIT_FILE,
    SIGNED_INIT_FILE,
    AdapterSpec,
    changed_fields,
    family_of,
    in_training,
    mirrored_parameters,
    peft_config,
)
from ws.diff import vector_digest
from ws.steer import _STEERED


def arms(base, family, tmp_path, **options):
    """Two adapters of one initialisation, their one-sided vectors, and PEFT's merges of them."""
    merged = {s: build_adapter(base, family, tmp_path / s, seed, **options) for s, seed in (("pos", 1), ("neg", 2))}
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


def signed(base, family, tmp_path, **options):
    """The changes at +c and at -c of one adapter, and PEFT's model with the adapter in training."""
    build_adapter(base, family, tmp_path / "signed", seed=3, **options)
    plus, minus = (ws.SteeringVector.from_adapter(tmp_path / "signed", base, mirrored=m) for m in (False, True))
    torch.manual_seed(11)  # as `build_adapter` starts it
    spec = AdapterSpec(family, rank=4, lora_alpha=6.0, layers="all", oft_block=8, delora_lambda=2.0)
    model = get_peft_model(copy.deepcopy(base), peft_config(base, spec))
    places = in_training(model, FAMILIES[family])
    initial = {n: model.get_parameter(n).detach().clone() for n in places}
    saved = load_file(tmp_path / "signed" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, place in places.items():
            model.get_parameter(name).copy_(saved[f"base_model.model.{'.'.join(place)}"])
    return plus, minus, model, mirrored_parameters(model, FAMILIES[family], places, initial)


def test_what_is_read_of_a_signed_adapter_is_what_is_trained_with_either_sign(base, family, tmp_path):
    plus, minus, model, opposite = signed(base, family, tmp_path)
    ids = tokens()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert opposite.keys() <= trained
    with torch.no_grad():
        wanted = {1: model(ids).logits, -1: functional_call(model, opposite, (ids,)).logits}
        assert (wanted[1] - wanted[-1]).abs().max() > 1e-2
        for sign, change in ((1, plus), (-1, minus)):
            with ws.steer(base, change, 1.0):
                assert (base(ids).logits - wanted[sign]).abs().max() < 1e-4
        # The vector is the whole way from one to the other.
        with ws.steer(base, minus, 1.0), ws.steer(base, plus - minus, 1.0):
            assert (base(ids).logits - wanted[1]).abs().max() < 1e-4


def test_which_families_are_exactly_opposite_with_the_other_sign(base, family, tmp_path):
    plus, minus, _, _ = signed(base, family, tmp_path, size=NEAR)
    opposed = plus.cosine(minus, base)
    if family in ("lora", "delora", "ia3"):
        assert opposed == pytest.approx(-1, abs=1e-6)
        for name, change in (plus - minus).dense(base):
            assert relative(change, 2 * dict(plus.dense(base))[name]) < 1e-4, "but for the rounding of 2 - l"
    else:
        assert -1 < opposed < -0.9, "the others are of first order"
    assert (plus - minus).is_low_rank == (family in ("lora", "pissa", "delora"))
    assert (plus - minus).max_rank == {"ia3": 0, "oft": 0, "pissa": 8}.get(family, 4)


def test_a_signed_adapter_that_learned_nothing_is_the_zero_vector_exactly(base, family, tmp_path):
    """With c = 0, its own mirror image, the model is the base."""
    plus, minus, _, opposite = signed(base, family, tmp_path, size=0.0)
    assert opposite
    assert (plus - minus).is_zero


def test_an_adapter_that_was_not_trained_signed_has_no_mirror_image(base, tmp_path):
    build_adapter(base, "dora", tmp_path / "a", seed=1)
    (tmp_path / "a" / SIGNED_INIT_FILE).unlink()
    assert ws.SteeringVector.from_adapter(tmp_path / "a", base).norm(base) > 0
    with pytest.raises(ws.WsError, match="dora adapter .*signed_init.safetensors"):
        ws.SteeringVector.from_adapter(tmp_path / "a", base, mirrored=True)


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


NEAR = 0.003  # as after a short training: what the arms have in common is a hundred times what they differ by


def changes(base, family, tmp_path):
    """Of arms that moved little: `(vector, PEFT's change of every weight)` for their difference and for one of them."""
    pos, neg, merged_pos, merged_neg = arms(base, family, tmp_path, size=NEAR)
    a, b, before = (dict(m.named_parameters()) for m in (merged_pos, merged_neg, base))
    names = [n for n, _ in pos.dense(base)]
    return [(pos - neg, {n: a[n] - b[n] for n in names}), (pos, {n: a[n] - before[n] for n in names})]


def overall(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The relative error of all changes as one vector."""
    gone = sum(float((found[n].double() - w.detach().double()).square().sum()) for n, w in wanted.items())
    return (gone / sum(float(w.double().square().sum()) for w in wanted.values())) ** 0.5


def test_bfloat16_takes_its_own_share_of_a_small_change_and_no_more(base, family, tmp_path):
    for vector, wanted in changes(base, family, tmp_path):
        assert overall(dict(vector.dense(base)), wanted) < 1e-3
        rounded = {n: d.to(dtype=torch.bfloat16) for n, d in vector.deltas.items()}
        assert overall(dict(replace(vector, deltas=rounded).dense(base)), wanted) < 0.005
        vector.save(tmp_path / "half", dtype=torch.bfloat16)
        assert overall(dict(ws.SteeringVector.load(tmp_path / "half").dense(base)), wanted) < 0.005


@pytest.mark.parametrize("family", ["lora", "pissa", "delora"])
def test_a_forward_pass_in_bfloat16_adds_the_whole_of_a_small_change(base, family, tmp_path):
    """Without weights and biases an output is the change alone, nothing it could be rounded away beside."""
    low = copy.deepcopy(base).to(torch.bfloat16)
    with torch.no_grad():
        for p in low.parameters():
            p.zero_()
    for vector, wanted in changes(base, family, tmp_path):
        found, products = {}, {}
        with torch.no_grad(), ws.steer(low, replace(vector, base_fingerprint=None), 1.0):
            for name in vector.deltas:
                module = low.get_submodule(name)
                x = torch.randn(64, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
                found[name], products[name] = module(x), x.double() @ wanted[f"{name}.weight"].detach().double().T
        assert overall(found, products) < 0.006


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pissa_of_peft_alone_begins_where_pefts_svd_does(dtype, tmp_path, capsys):
    """PEFT saves no initial factors; it takes them from the base again, and so do we."""
    base = build_model("qwen3", dtype)
    wanted = build_adapter(base.float(), "pissa", tmp_path / "a", seed=3, size=NEAR)
    base = build_model("qwen3", dtype)
    with_factors = ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "a" / PISSA_INIT_FILE).unlink()
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", base)
    assert "warning: the PiSSA adapter" in capsys.readouterr().err
    assert vector.is_low_rank
    for name in vector.deltas:
        a, b = (
            v.deltas[name].dense(torch.zeros(v.deltas[name].d_out, v.deltas[name].d_in)) for v in (vector, with_factors)
        )
        assert (a - b).norm() < 1e-3 * b.norm()
    if dtype == torch.float32:
        with torch.no_grad(), ws.steer(base, vector):
            assert (base(tokens()).logits - wanted(tokens()).logits).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [16, 24, 40])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_has_the_scale_of_its_rank_where_a_module_has_fewer_directions(rank, rslora, qwen3, tmp_path):
    """PEFT cuts the factors to the smaller side of the module, and not `r` in `alpha / r`."""
    places = {"k_proj": 16, "q_proj": 32}
    steered = trained_by_peft(qwen3, tmp_path / "a", r=rank, target_modules=list(places), use_rslora=rslora, lr=1e-3)
    config = LoraConfig(r=rank, target_modules=list(places), init_lora_weights="pissa", use_rslora=rslora)
    begun = get_peft_model(copy.deepcopy(qwen3), config).state_dict().items()
    first = {n.replace(".default.", "."): t.contiguous() for n, t in begun if ".lora_" in n}
    save_file(first, tmp_path / "a" / PISSA_INIT_FILE)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)
    ranks = {n.split(".")[-3]: t.shape[0] for n, t in first.items() if "lora_A" in n}
    assert ranks == {name: min(rank, size) for name, size in places.items()}
    with torch.no_grad():
        plain, wanted = qwen3(tokens()).logits, steered(tokens()).logits
    assert (steered_logits(qwen3, vector) - wanted).norm() < 1e-3 * (wanted - plain).norm()
    edit(tmp_path / "a", r=12)
    with pytest.raises(ws.WsError, match="says rank 12 for .*_proj and its tensors have rank"):
        ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)


def test_pissa_of_peft_alone_is_refused_where_its_start_is_lost(tmp_path):
    base = build_model("qwen3")
    build_adapter(base, "pissa", tmp_path / "a", seed=3, size=NEAR)
    (tmp_path / "a" / PISSA_INIT_FILE).unlink()
    with pytest.raises(ws.WsError, match="pass the base model"):
        ws.SteeringVector.load(tmp_path / "a")
    other = build_model("qwen3")
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p) * 0.02)
    with pytest.raises(ws.WsError, match="does not begin at the principal ones of this base .cosine"):
        ws.SteeringVector.from_adapter(tmp_path / "a", other)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ws.WsError, match="pissa_niter_4 are drawn at random"):
        ws.SteeringVector.from_adapter(tmp_path / "a", base)


def small(family):
    if family == "pocket":
        return ws.load_model("pocket")[0]
    if family == "gpt2":
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4)).eval()
    return build_model(family)


def trained_by_peft(base, folder, dtype=torch.float32, steps=12, lr=1e-4, **options):
    """A PiSSA adapter that PEFT alone trained (on random labels) and saved, its tensors in some dtype."""
    config = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"} | options
    model = get_peft_model(copy.deepcopy(base).float(), LoraConfig(**config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    torch.manual_seed(1)
    for _ in range(steps):
        model(input_ids=tokens(), labels=torch.randint_like(tokens(), 60)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(dtype).save_pretrained(str(folder))
    return model.float().merge_and_unload()


def fine_tuned(base, steps=3):
    """The same model, a little further on."""
    model = copy.deepcopy(base).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens().flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def to_8_bits(base):
    """The same model, its matrices rounded as an int8 copy has them."""
    model = copy.deepcopy(base).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                step = p.abs().amax(1, keepdim=True) / 127
                p.copy_((p / step).round() * step)
    return model


@pytest.mark.parametrize("family", ["qwen3", "gpt2", pytest.param("pocket", marks=pytest.mark.slow)])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pissa_of_peft_alone_is_never_refused_on_its_base(family, saved, tmp_path):
    base = small(family)
    places = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
    for number, options in enumerate((
        {}, {"r": 1, "steps": 2}, {"r": 8, "lora_alpha": 20, "use_rslora": True}, {"lr": 3e-3, "steps": 30},
        {"lr": 1e-5, "steps": 1}, {"rank_pattern": {"down_proj": 2, "c_proj": 2}},
    )):  # fmt: skip
        steered = trained_by_peft(base, tmp_path / str(number), saved, target_modules=places, **options)
        vector = ws.SteeringVector.from_adapter(tmp_path / str(number), base)
        if saved == torch.float32:
            with torch.no_grad(), ws.steer(base, vector):
                assert (base(tokens()).logits - steered(tokens()).logits).abs().max() < 1e-3


@pytest.mark.parametrize("other", [fine_tuned, to_8_bits], ids=["fine-tuned", "8 bits"])
@pytest.mark.parametrize("family", ["qwen3", "pocket"])
def test_pissa_of_peft_alone_is_refused_by_another_version_of_its_base(family, other, tmp_path):
    """The products of the factors are as good as the same; the factors are turned."""
    base = small(family)
    trained_by_peft(base, tmp_path / "a", r=8)
    with pytest.raises(ws.WsError, match="another version of this base.*turned"):
        ws.SteeringVector.from_adapter(tmp_path / "a", other(base))


def test_pissa_whose_file_of_initial_factors_lacks_a_module_is_refused(qwen3, tmp_path):
    build_adapter(qwen3, "pissa", tmp_path / "a", seed=3, size=NEAR)
    file = tmp_path / "a" / PISSA_INIT_FILE
    tensors = load_file(file)
    module = min(tensors).split(".lora_")[0]
    save_file({n: t for n, t in tensors.items() if not n.startswith(module)}, file)
    with pytest.raises(ws.WsError, match=f"no initial factors of {module.removeprefix('base_model.model.')}"):
        ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)


def test_pissa_is_as_exact_as_its_files(base, tmp_path):
    """Against `s (B A - B' A')` from the files of both arms, in float64."""
    pos, neg, _, _ = arms(base, "pissa", tmp_path, size=NEAR)
    files = [load_file(tmp_path / s / "adapter_model.safetensors") for s in ("pos", "neg")]
    for name, delta in (pos - neg).deltas.items():
        key = f"base_model.model.{name}.lora"
        p, n = (f[f"{key}_B.weight"].double() @ f[f"{key}_A.weight"].double() * 1.5 for f in files)
        assert relative(delta.dense(base.get_submodule(name).weight).double(), p - n) < 5e-7
        assert delta.rank == 2 * 4
    assert vector_digest(pos - neg) == vector_digest(pos - neg)
    assert ((pos - neg) + (neg - pos)).is_zero


def test_alphas_of_one_adapter_config_are_not_mistaken_for_strength(qwen3, tmp_path):
    build_adapter(qwen3, "lora", tmp_path / "a", seed=1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", qwen3)
    vector.save(tmp_path / "v")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]


# ---- settings of a config -------------------------------------------------------------------------------------------

PLACES = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
MAKERS = {
    "lora": lambda **o: LoraConfig(**({"r": 4, "lora_alpha": 6} | PLACES | o)),
    "dora": lambda **o: LoraConfig(**({"r": 4, "lora_alpha": 6, "use_dora": True} | PLACES | o)),
    "oft": lambda **o: OFTConfig(**({"oft_block_size": 8} | PLACES | o)),
    "ia3": lambda **o: IA3Config(**({"feedforward_modules": ["down_proj"]} | PLACES | o)),
    "delora": lambda **o: DeloraConfig(**({"r": 4} | PLACES | o)),
}
STARTS = [{"init_lora_weights": start} for start in (False, "gaussian", "orthogonal", "eva")]
UNDERSTOOD = {
    "lora": [
        {"r": 6}, {"lora_alpha": 9.5}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"down_proj": 11}},
        {"use_rslora": True}, {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        {"fan_in_fan_out": True}, {"lora_dropout": 0.4}, {"megatron_core": "another"}, {"qalora_group_size": 4},
        {"eva_config": EvaConfig(rho=3.0)}, {"corda_config": CordaConfig()}, {"lora_ga_config": LoraGAConfig()},
        *STARTS,
    ],
    "dora": [
        {"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}, {"fan_in_fan_out": True}, *STARTS,
    ],
    "oft": [
        {"oft_block_size": 4}, {"r": 2, "oft_block_size": 0}, {"r": 12, "oft_block_size": 0}, {"oft_block_size": 12},
        {"block_share": True}, {"coft": True, "eps": 0.2}, {"use_cayley_neumann": False},
        {"num_cayley_neumann_terms": 3}, {"fan_in_fan_out": True}, {"init_weights": False}, {"module_dropout": 0.4},
    ],
    "ia3": [
        {"feedforward_modules": []}, {"feedforward_modules": ["q_proj", "down_proj"]},
        {"feedforward_modules": r".*mlp.*"}, {"fan_in_fan_out": True}, {"init_ia3_weights": False},
    ],
    "delora": [
        {"r": 3}, {"rank_pattern": {"q_proj": 2}}, {"delora_lambda": 3}, {"lambda_pattern": {"q_proj": 2}},
        {"init_weights": False}, {"module_dropout": 0.4},
    ],
}  # fmt: skip
ANYWHERE = [
    {"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"layers_to_transform": [1, 2]}, {"layers_to_transform": 1},
    {"layers_to_transform": [0], "layers_pattern": "layers"}, {"target_modules": "all-linear"},
    {"target_modules": r".*\.[12]\..*(v|up)_proj"}, {"task_type": None, "auto_mapping": {"parent_library": "x"}},
    {"revision": "v1.0", "base_model_name_or_path": "somebody/model", "inference_mode": True},
]  # fmt: skip
CASES = [(name, options) for name, several in UNDERSTOOD.items() for options in several]
CASES += [("lora", options) for options in ANYWHERE]


@pytest.fixture(scope="module")
def biased() -> PreTrainedModel:
    """A base with biases on q, k and v."""
    return build_model("qwen2")


def save_random(base: PreTrainedModel, config: PeftConfig, folder) -> None:
    """A PEFT adapter of that config with random tensors, saved by PEFT."""
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if re.search("lora_|ia3_|oft_", name):  # delora_, too
                p.add_(torch.randn_like(p) * (0.3 if p.numel() > 1 else 0.1))
    model.save_pretrained(str(folder))


def edit(folder, **settings) -> None:
    """Other settings beside the same tensors."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@torch.no_grad()
def peft_logits(base, folder) -> torch.Tensor:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(tokens()).logits


@torch.no_grad()
def steered_logits(base, vector) -> torch.Tensor:
    with ws.steer(base, vector):
        return base(tokens()).logits


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_with_every_setting_that_is_understood_the_model_is_pefts(biased, name, options, tmp_path):
    config = MAKERS[name](**options)
    save_random(biased, config, tmp_path / "a")
    assert family_of(config) is FAMILIES[name]
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", biased)
    wanted = peft_logits(biased, tmp_path / "a")
    with torch.no_grad():
        effect = float((wanted - biased(tokens()).logits).abs().max())
    assert effect > 3e-4
    assert (steered_logits(biased, vector) - wanted).abs().max() < min(1e-5, 1e-2 * effect)


def test_no_setting_is_understood_without_a_case_above():
    tried: dict[str, set[str]] = {name: set() for name in MAKERS}
    for name, options in CASES:
        tried[name] |= changed_fields(MAKERS[name](**options)).keys()
    same_code = FAMILIES["lora"].fields
    assert FAMILIES["pissa"].fields == same_code
    assert FAMILIES["dora"].fields == same_code | {"use_dora"}
    assert tried["dora"] >= {"use_dora"}
    for name in ("lora", "oft", "ia3", "delora"):
        assert FAMILIES[name].fields <= tried[name]
    assert COMMON_FIELDS - {"runtime_config"} <= tried["lora"]  # it is in no file


REFUSED = [
    ("lora", {"layer_replication": [[0, 2], [1, 3]]}), ("lora", {"alora_invocation_tokens": [9, 27]}),
    ("lora", {"bias": "all"}), ("lora", {"bias": "lora_only"}), ("lora", {"lora_bias": True}),
    ("lora", {"modules_to_save": ["lm_head"]}), ("lora", {"trainable_token_indices": [1, 2]}),
    ("lora", {"target_parameters": ["mlp.experts.down_proj"]}), ("lora", {"megatron_config": {"hidden_size": 1}}),
    ("lora", {"velora_config": {"num_groups": 4}}), ("lora", {"use_qalora": True}), ("lora", {"monteclora_config": {}}),
    ("lora", {"arrow_config": {}}), ("lora", {"kasa_config": {}}), ("lora", {"ensure_weight_tying": True}),
    ("lora", {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}),
    ("dora", {"layer_replication": [[0, 2], [1, 3]]}), ("dora", {"alora_invocation_tokens": [9]}),
    ("ia3", {"modules_to_save": ["lm_head"]}), ("oft", {"bias": "oft_only"}), ("oft", {"modules_to_save": ["lm_head"]}),
    ("delora", {"bias": "delora_only"}), ("delora", {"modules_to_save": ["lm_head"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting"), REFUSED, ids=str)
def test_other_settings_are_refused_by_name(biased, name, setting, tmp_path):
    """The tensors are those of an adapter without the setting, so nothing but the config tells."""
    save_random(biased, MAKERS[name](), tmp_path / "a")
    edit(tmp_path / "a", **setting)
    (field,) = setting
    with pytest.raises(ws.WsError, match=rf"has {field}=.*the tensors of {name} adapters mean another change"):
        ws.SteeringVector.from_adapter(tmp_path / "a", biased)
    with pytest.raises(ws.WsError, match=f"has {field}="):
        ws.SteeringVector.load(tmp_path / "a")


def test_all_settings_that_are_refused_are_named_at_once(biased, tmp_path):
    save_random(biased, MAKERS["lora"](), tmp_path / "a")
    edit(tmp_path / "a", bias="all", layer_replication=[[0, 3]] * 40)
    with pytest.raises(ws.WsError, match=r"has bias='all', layer_replication=\[\[0, 3\], .*\.\.\.: the tensors"):
        ws.SteeringVector.load(tmp_path / "a")


@pytest.mark.parametrize("setting", [{"layer_replication": [(0, 2), (1, 2)]}, {"alora_invocation_tokens": [40, 41]}])
def test_the_same_tensors_do_mean_another_model_then(biased, setting, tmp_path):
    """Why the settings have to be read: PEFT's own model is another one, by as much as the adapter does at all."""
    save_random(biased, MAKERS["lora"](**setting), tmp_path / "a")
    wanted = peft_logits(biased, tmp_path / "a")
    edit(tmp_path / "a", **dict.fromkeys(setting))
    without = steered_logits(biased, ws.SteeringVector.from_adapter(tmp_path / "a", biased))
    with torch.no_grad():
        effect = (without - biased(tokens()).logits).abs().max()
    assert (without - wanted).abs().max() > 0.5 * effect


@pytest.mark.parametrize("value", [1, 0, 0.0, "on", [0], {"a": None}, True])
def test_fields_that_this_peft_does_not_know_are_refused_by_name(biased, value, tmp_path):
    save_random(biased, MAKERS["lora"](), tmp_path / "a")
    edit(tmp_path / "a", use_wonder=value, peft_version="9.1.0")
    for read in (ws.SteeringVector.load, lambda folder: ws.SteeringVector.from_adapter(folder, biased)):
        with pytest.raises(ws.WsError, match=r"use_wonder=.* does not know .*9\.1\.0 saved it\); upgrade PEFT"):
            read(tmp_path / "a")


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_fields_that_are_off_or_empty_say_nothing(biased, value, tmp_path):
    save_random(biased, MAKERS["lora"](), tmp_path / "a")
    before = vector_digest(ws.SteeringVector.load(tmp_path / "a"))
    edit(tmp_path / "a", use_wonder=value)
    assert vector_digest(ws.SteeringVector.load(tmp_path / "a")) == before


def test_ways_to_write_a_default_are_one(biased, tmp_path):
    save_random(biased, MAKERS["lora"](), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    before = vector_digest(ws.SteeringVector.load(tmp_path / "a"))
    edit(
        tmp_path / "a", rank_pattern=None, alpha_pattern=None, exclude_modules=[], layers_to_transform=[],
        lora_bias=None, modules_to_save=[], loftq_config=None, megatron_config={}, target_parameters=[],
        trainable_token_indices={}, runtime_config={"ephemeral_gpu_offload": True}, layers_pattern="",
    )  # fmt: skip
    assert vector_digest(ws.SteeringVector.load(tmp_path / "a")) == before
    few = ("peft_type", "r", "lora_alpha", "target_modules")  # as an old PEFT, or a hand, writes it
    file.write_text(json.dumps({name: json.loads(file.read_text())[name] for name in few}))
    assert vector_digest(ws.SteeringVector.load(tmp_path / "a")) == before
    assert changed_fields(LoraConfig(modules_to_save=(), layer_replication=[], exclude_modules=set())) == {
        "peft_type": "LORA",
        "peft_version": LoraConfig().peft_version,
    }


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("lora", {"exclude_modules": ["layers.1.mlp.down_proj"]}, "layers.1.mlp.down_proj, which its config leaves"),
        ("lora", {"layers_to_transform": [0, 1]}, "layers.2.* which its config leaves alone"),
        ("lora", {"target_modules": ["q_proj"]}, "down_proj, which its config leaves alone"),
        ("oft", {"target_modules": None}, "which its config leaves alone"),
        ("lora", {"r": 8}, "rank 8 for .* its tensors have rank 4"),
        ("lora", {"rank_pattern": {"q_proj": 2}}, "rank 2 for .*q_proj and its tensors have rank 4"),
        ("delora", {"r": 8}, "rank 8 for .* its tensors have rank 4"),
        ("ia3", {"feedforward_modules": ["q_proj"]}, "feedforward_modules and the tensors of .* disagree"),
        ("oft", {"oft_block_size": 4}, "blocks of 8 .* does not fit"),
        ("oft", {"oft_block_size": 0, "r": 2}, "blocks of 8 .* does not fit"),
        ("oft", {"block_share": True}, "blocks of 8 .* does not fit"),
        ("oft", {"peft_version": "0.17.1"}, r"PEFT 0\.17\.1, whose use_cayley_neumann was another series"),
        ("oft", {"peft_version": "0.16.2.dev0@abc"}, "use_cayley_neumann was another series"),
        ("lora", {"lora_alpha": None}, "lora_alpha=None, which is no value for it"),
        ("lora", {"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern=.* no value"),
        ("lora", {"rank_pattern": ["q_proj"]}, "rank_pattern=.* no value"),
        ("lora", {"layers_to_transform": "all"}, "layers_to_transform='all', which is no value"),
        ("lora", {"exclude_modules": 3}, "exclude_modules=3, which is no value"),
        ("lora", {"monteclora_config": {"x": 1}}, "not a PEFT config"),
        ("lora", {"peft_type": "WONDER"}, "of type 'WONDER', which PEFT .* does not know"),
        ("lora", {"init_lora_weights": "wonder"}, "PEFT cannot put the adapter"),
        ("lora", {"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_tensors_are_refused(biased, name, settings, why, tmp_path, weights_hash):
    """PEFT drops such tensors, stops with a traceback, or takes them for what they are not."""
    save_random(biased, MAKERS[name](), tmp_path / "a")
    edit(tmp_path / "a", **settings)
    before = weights_hash(biased)
    with pytest.raises(ws.WsError, match=why):
        ws.SteeringVector.from_adapter(tmp_path / "a", biased)
    assert weights_hash(biased) == before


def test_an_oft_adapter_that_does_not_say_its_peft_is_from_before_that_was_recorded(biased, tmp_path):
    save_random(biased, MAKERS["oft"](), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    stored = json.loads(file.read_text())
    del stored["peft_version"]
    file.write_text(json.dumps(stored))
    with pytest.raises(ws.WsError, match=r"0\.17 or older, whose use_cayley_neumann was another series"):
        ws.SteeringVector.from_adapter(tmp_path / "a", biased)
    edit(tmp_path / "a", use_cayley_neumann=False)  # the exact transform has not changed
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", biased)
    assert (steered_logits(biased, vector) - peft_logits(biased, tmp_path / "a")).abs().max() < 1e-5


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"peft_type": null}', '{"peft_type": []}'])
def test_what_is_no_config_is_refused(biased, text, tmp_path):
    save_random(biased, MAKERS["lora"](), tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(ws.WsError, match=r"not a PEFT config|which PEFT .* does not know|config.json is damaged"):
        ws.SteeringVector.load(tmp_path / "a")
