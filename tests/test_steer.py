"""Steering a live model: nesting, exceptions, several vectors, refusals, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, JambaConfig, LongcatFlashConfig, MambaConfig, PreTrainedModel

import ws
from conftest import SHAPE, build_adapter, build_model, tokens
from ws.analysis.controls import random_like
from ws.lm.row_sums import FEW, RowSums
from ws.steer import _STEERED


@pytest.fixture
def setting(tmp_path):
    """A base and a vector of every family on it."""
    model = build_model("qwen2")
    vectors = {}
    for family in ("lora", "oft", "ia3", "dora"):
        build_adapter(model, family, tmp_path / family, seed=3)
        vectors[family] = ws.SteeringVector.from_adapter(tmp_path / family, model)
    return model, vectors


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids).logits


def test_nested_contexts_add_up_for_input_and_output_sided_changes(setting):
    model, v = setting
    names = list(v)
    with ws.steer_many(model, v, dict.fromkeys(names, 0.5)):
        together = logits(model)
    total = sum((v[n] * 0.5 for n in names[1:]), v[names[0]] * 0.5)
    with ws.steer(model, total, 1.0):
        assert (logits(model) - together).abs().max() < 1e-4
    with ws.steer(model, v["oft"], 0.5), ws.steer(model, v["lora"], 0.5), ws.steer(model, v["ia3"], 0.5):
        with ws.steer(model, v["dora"], 0.5):
            assert (logits(model) - together).abs().max() < 1e-4
        with ws.steer(model, v["dora"], 0.5):
            assert (logits(model) - together).abs().max() < 1e-4


def test_the_same_vector_twice_counts_twice(setting):
    model, v = setting
    with ws.steer(model, v["lora"], 2.0):
        double = logits(model)
    with ws.steer(model, v["lora"], 1.0), ws.steer(model, v["lora"], 1.0):
        assert (logits(model) - double).abs().max() < 1e-4


def test_alpha_changes_take_effect_and_zero_is_the_base_bit_for_bit(setting):
    model, v = setting
    before = logits(model)
    with ws.steer(model, v["oft"], 0.0) as dial:
        assert torch.equal(logits(model), before)
        dial.alpha = 1.0
        moved = logits(model)
        assert not torch.allclose(moved, before)
        dial.alpha = 0
        assert torch.equal(logits(model), before)
        dial.alpha = torch.zeros(3)
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_a_change_that_is_taken_off_leaves_no_copy_behind(setting):
    """The outer context keeps the hooks; vectors that come and go inside it may lie where an earlier one lay."""
    model, v = setting
    module, x = model.model.layers[0].mlp.up_proj, torch.randn(2, 3, 32)
    plain = module(x)
    gone = []
    with ws.steer(model, v["lora"].select(layers=[0], modules=["up_proj"]), 1.0):
        outer = module(x) - plain
        for size in range(1, 6):
            u, inner = torch.full((48, 1), float(size)), torch.ones(1, 32)
            delta = ws.LinearDelta(48, 32, u=u, v=inner)
            vector = replace(v["lora"], deltas={"model.layers.0.mlp.up_proj": delta})
            with ws.steer(model, vector, 1.0):
                assert torch.allclose(module(x) - plain - outer, x.sum(-1, keepdim=True) * size, atol=1e-3)
            gone.append(weakref.ref(u))
            del u, inner, delta, vector
            assert torch.allclose(module(x) - plain, outer, atol=1e-5)
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_a_change_of_the_bias_alone_is_a_change(setting, tmp_path):
    """On a layer with a bias of its own and on one without."""
    model, v = setting
    shift = {"model.layers.0.self_attn.q_proj": torch.ones(32), "model.layers.1.mlp.down_proj": torch.full((32,), -0.5)}
    deltas = {n: ws.LinearDelta(32, model.get_submodule(n).in_features, bias=b) for n, b in shift.items()}
    vector = replace(v["ia3"], deltas=deltas, units=None)
    assert not vector.is_zero
    assert vector.norm() == pytest.approx((32 + 8) ** 0.5)
    vector.save(tmp_path / "bias")
    other = copy.deepcopy(model)
    for name, change in shift.items():
        module = other.get_submodule(name)
        before = torch.zeros(32) if module.bias is None else module.bias.detach()
        module.bias = torch.nn.Parameter(before + 2 * change)
    with ws.steer(model, ws.SteeringVector.load(tmp_path / "bias"), 2.0):
        assert (logits(model) - logits(other)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["lora", "oft", "ia3", "dora"])
def test_in_bfloat16_a_strength_per_row_is_that_strength(setting, family):
    """0.3 in bfloat16 is 0.3008; a strength is not rounded to it just because rows differ."""
    model, v = setting
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        for p in low.parameters():
            p.zero_()
        for name, p in model.named_parameters():
            if family != "lora" and "mlp" in name:  # these changes multiply a weight
                low.get_parameter(name).copy_(p)
    vector = replace(v[family].select(modules=["down_proj"]), base_fingerprint=None)
    module, x = (
        low.model.layers[0].mlp.down_proj,
        torch.randn(2, 512, 48, generator=torch.Generator().manual_seed(0)).bfloat16(),
    )
    alphas = torch.tensor([0.3, -1.7])
    with torch.no_grad(), ws.steer(low, vector, alphas) as dial:
        rows, plain = module(x).double(), nn.functional.linear(x, module.weight).double()
        dial.alpha = torch.ones(2)
        unit = module(x).double()
    for row, alpha in enumerate(alphas.tolist()):
        a, b = rows[row] - plain[row], unit[row] - plain[row]
        # The slope over many values, in which their own rounding averages out and that of the strength would not.
        assert float((a * b).sum() / (b * b).sum()) == pytest.approx(alpha, rel=1e-3)


@pytest.mark.parametrize("family", ["lora", "oft", "ia3", "dora"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)])
def test_a_steering_that_compilers_can_follow_is_the_other_one(setting, family, dtype, most):
    """As it is written; what compilers make of it is tested with the other tools."""
    model, vector = setting[0].to(dtype), setting[1][family]
    turns = (0.3, torch.tensor([1.0, -0.5, 0.0]), -1, torch.tensor([0.3] * 3, requires_grad=True))
    asked = (tokens(), tokens()[:, :1])
    wanted, bare = [], [logits(model, ids) for ids in asked]
    for alpha in turns:
        with ws.steer(model, vector, alpha):
            wanted.append([logits(model, ids) for ids in asked])
    with ws.steer(model, vector, 1.0, compilable=True) as dial:
        for alpha, expected in zip(turns, wanted, strict=True):
            dial.alpha = alpha
            assert dial.rows == (3 if isinstance(alpha, torch.Tensor) else 1)
            for ids, right in zip(asked, expected, strict=True):
                assert (logits(model, ids) - right).norm() / right.norm() < most
        dial.alpha = 0.0
        assert all(torch.equal(logits(model, ids), base) for ids, base in zip(asked, bare, strict=True))
        dial.alpha = torch.ones(2)
        with pytest.raises(ws.WsError, match="2 entries but the layer sees 3 rows"):
            logits(model)
    assert all(torch.equal(logits(model, ids), base) for ids, base in zip(asked, bare, strict=True))
    assert not _STEERED


def test_a_turn_of_a_compilable_dial_is_written_where_the_strength_lies(setting):
    model, v = setting
    with ws.steer_many(model, {"a": v["lora"], "b": v["oft"]}, 0.5, compilable=True) as dials:
        lora = next(c for m in _STEERED for c in _STEERED[m].changes if c.dial is dials["a"])
        held = [weakref.ref(u_t) for u_t in lora.factors.u_t]
        dial, before = dials["a"], dials["a"].over(torch.zeros(3, 1, 1))
        dial.alpha = -2
        assert before.tolist() == [[[-2.0]]]
        dial.alpha = "0.25"
        assert before.tolist() == [[[0.25]]]
        assert dial.is_off is False
        dial.alpha = torch.tensor([1.0, 2.0, 3.0])
        assert dial.over(torch.zeros(3, 1, 1)).flatten().tolist() == [1, 2, 3]
        assert before.tolist() == [[[0.25]]], "of another number of rows it is another tensor"
        with pytest.raises(ws.WsError, match="finite"):
            dial.alpha = float("inf")
        del lora
    assert not any(ref() is not None for ref in held)
    with pytest.raises(ws.WsError, match="has ended"):
        dial.alpha = 1.0


def test_a_compilable_dial_is_refused_before_anything_is_steered(setting):
    """A norm, a layer whose weight is used without it, and a strength that the model cannot compute with."""
    model, v = setting
    width = model.config.hidden_size
    norm = ws.LinearDelta(width, 1, e=torch.ones(width, 1), kind="scale")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * nn.functional.linear(x, mlp.up_proj.weight))
    up = ws.LinearDelta(*mlp.up_proj.weight.shape, e=torch.ones_like(mlp.up_proj.weight))
    passed_by = ws.SteeringVector({"model.layers.0.mlp.up_proj": up}, "up", None)
    for vector, alpha, said in (
        (ws.SteeringVector({"model.norm": norm}, "norm", None), 1.0, r"model\.norm is a norm, which torch\.compile"),
        (passed_by, 1.0, r"weights of up_proj .* without calling"),
        (v["lora"], 1e39, "within float32"),
    ):
        with pytest.raises(ws.WsError, match=said), ws.steer(model, vector, alpha, compilable=True):
            pass
        assert not _STEERED
    with pytest.raises(ws.WsError, match="beyond float16"), ws.steer(model.half(), v["lora"], 1e5, compilable=True):
        pass


def test_the_model_is_restored_after_an_exception(setting, weights_hash):
    model, v = setting
    before, hashed, attributes = logits(model), weights_hash(model), copy.copy(vars(model))
    with pytest.raises(RuntimeError, match="inside"), ws.steer(model, v["dora"], 3.0):
        logits(model)
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)
    assert weights_hash(model) == hashed
    assert vars(model).keys() == attributes.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not _STEERED


def test_generation_under_per_row_alpha_equals_one_at_a_time(setting):
    model, v = setting
    ids, alphas = tokens(1).repeat(3, 1), torch.tensor([-2.0, 0.0, 2.0])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ws.steer(model, v["lora"], alphas) as dial:
        together = model.generate(ids, **options)
        for row, alpha in enumerate(alphas.tolist()):
            dial.alpha = alpha
            assert torch.equal(model.generate(ids[:1], **options)[0], together[row])


def test_what_another_hook_has_kept_is_left_as_it_was(setting):
    model, v = setting
    kept = []
    module = model.model.layers[1].mlp.up_proj
    handle = module.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    plain = logits(model)
    with ws.steer(model, v["lora"]):
        steered = logits(model)
    handle.remove()
    assert all(torch.equal(output, copied) for output, copied in kept)
    with ws.steer(model, v["lora"]):
        assert (logits(model) - steered).abs().max() < 1e-5
    assert (steered - plain).abs().max() > 0.01


@pytest.mark.parametrize("family", ["lora", "oft", "ia3", "dora"])
def test_gradients_are_those_of_the_merged_weights(setting, family):
    model, v = setting
    merged = copy.deepcopy(model)
    v[family].merge_into(merged, 0.3)

    def loss(of) -> torch.Tensor:
        return of(inputs_embeds=inputs).logits.square().mean()

    inputs = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(merged), inputs)
    alpha = torch.full((len(inputs),), 0.3, requires_grad=True)
    with ws.steer(model, v[family], alpha) as dial:
        given, slope = torch.autograd.grad(loss(model), (inputs, alpha))
        with torch.no_grad():
            dial.alpha = 0.35
            above = loss(model)
            dial.alpha = 0.25
            below = loss(model)
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    assert float(slope.sum()) == pytest.approx(float(above - below) / 0.1, rel=2e-2)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")]), torch.ones(2, 2)])
def test_alpha_must_be_finite_and_at_most_one_per_row(setting, alpha):
    model, v = setting
    with pytest.raises(ws.WsError, match="alpha"), ws.steer(model, v["lora"], alpha):
        pass
    with ws.steer(model, v["lora"]) as dial, pytest.raises(ws.WsError, match="alpha"):
        dial.alpha = alpha


@pytest.mark.parametrize(
    "alpha", [1e39, -1e39, 10**400, "1e39", "1e400", "9" * 5000, torch.tensor([1e39], dtype=torch.double)]
)
def test_alpha_beyond_float32_is_a_sentence(setting, alpha):
    model, v = setting
    with (
        pytest.raises(ws.WsError, match="must be (within float32|a finite number)") as said,
        ws.steer(model, v["lora"], alpha),
    ):
        pass
    assert len(str(said.value)) < 200
    with pytest.raises(ws.WsError, match="within float32"):
        _ = v["lora"] * 1e39
    with pytest.raises(ws.WsError, match="NaN or infinity"):
        _ = v["lora"] * 3e38 * 3e38


def test_alpha_beyond_what_the_model_computes_in_is_a_sentence(setting):
    model, v = setting
    half = copy.deepcopy(model).half()
    vector = replace(v["lora"], base_fingerprint=None)
    for alpha in (7e4, torch.tensor([7e4, 0.0, 0.0])):
        with ws.steer(half, vector, alpha), pytest.raises(ws.WsError, match="alpha 70000 is beyond float16"):
            logits(half)
    with ws.steer(half, vector, 2.0):
        assert logits(half).isfinite().all()


def test_a_dial_whose_block_has_ended_says_so(setting):
    model, v = setting
    with ws.steer(model, v["lora"], 0.5) as dial:
        assert repr(dial) == "Dial(alpha=0.5)"
    assert "has ended" in repr(dial)
    with pytest.raises(ws.WsError, match="block .* has ended"):
        dial.alpha = 1.0
    with ws.steer_many(model, v, 0.5) as dials:
        assert "'oft': Dial(alpha=0.5)" in repr(dials)
    with pytest.raises(ws.WsError, match="block .* has ended"):
        dials["oft"].alpha = 1.0


API = """
import sys, torch, ws, ws.adapters
from ws.delta import LinearDelta
model, _ = ws.load_model("tiny-random", device="cpu")
name = "model.layers.1.mlp.down_proj"
v = ws.SteeringVector({name: LinearDelta(64, 96, u=torch.ones(64, 1), v=torch.ones(1, 96))}, "x", None)
def exchanged():
    with ws.steer(v, model):
        pass
for action in (lambda: v + 1, lambda: 1 + v, lambda: sum([v, v]), lambda: v - 1, lambda: v * "x", lambda: "x" * v,
               lambda: v / "x", lambda: v * None, exchanged, lambda: v.select(layers="0:90000000000000000000")):
    try:
        action()
        print("none")
    except Exception as problem:
        print(type(problem).__name__, problem)
print("bitsandbytes" in sys.modules)
"""


def test_what_is_no_vector_or_no_number_is_told_without_inner_names():
    """Without the checks of types that these tests run under."""
    program = subprocess.run([sys.executable, "-c", API], capture_output=True, encoding="utf-8", check=True)
    *said, loads = program.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["TypeError"] * 8 + ["WsError"] * 2
    assert said[-2].endswith("a model and then a SteeringVector, not a SteeringVector and a Qwen3ForCausalLM.")
    assert "--" not in said[-1]
    assert "gemm" not in program.stderr
    assert loads == str(find_spec("bitsandbytes") is not None)


def test_a_wrong_number_of_rows_is_refused(setting):
    model, v = setting
    with ws.steer(model, v["lora"], torch.ones(2)), pytest.raises(ws.WsError, match="2 entries .* 3 rows"):
        logits(model)
    assert not _STEERED


def test_another_base_is_refused(setting):
    _, v = setting
    torch.manual_seed(99)
    other = build_model("qwen2")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.1
    with pytest.raises(ws.WsError, match="weights differ"), ws.steer(other, v["lora"]):
        pass


def test_the_bfloat16_copy_of_the_base_is_accepted(setting):
    model, v = setting
    with ws.steer(copy.deepcopy(model).to(torch.bfloat16), v["lora"]) as dial:
        assert dial.alpha == 1.0


def test_modules_without_a_partner_stop_it(setting):
    model, v = setting
    for vector, what in (
        (
            replace(v["lora"], base_fingerprint=None, deltas={"model.layers.9.mlp.up_proj": ws.LinearDelta(4, 4)}),
            "zero",
        ),
        (
            replace(
                v["lora"],
                base_fingerprint=None,
                deltas={"model.layers.9.x": ws.LinearDelta(2, 2, g=torch.ones(2))},
            ),
            "no such module",
        ),
        (
            replace(
                v["lora"],
                base_fingerprint=None,
                deltas={"model.layers.0.mlp.up_proj": ws.LinearDelta(2, 2, g=torch.ones(2))},
            ),
            r"Linear of \(48, 32\)",
        ),
    ):
        with pytest.raises(ws.WsError, match=what), ws.steer(model, vector):
            pass


def test_a_zero_vector_is_an_error_not_a_silent_no_op(setting):
    model, v = setting
    with pytest.raises(ws.WsError, match="zero"), ws.steer(model, v["lora"] - v["lora"]):
        pass


def test_a_model_with_adapter_layers_is_refused(setting):
    from peft import LoraConfig, get_peft_model

    model, v = setting
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ws.WsError, match="adapter layers"), ws.steer(peft_model, v["lora"]):
        pass


def test_unknown_dial_names_get_a_suggestion(setting):
    model, v = setting
    with ws.steer_many(model, {"honesty": v["lora"]}) as dials:
        with pytest.raises(ws.WsError, match="Did you mean 'honesty'"):
            dials["honest"]
        dials["honesty"].alpha = 2
    with (
        pytest.raises(ws.WsError, match="Did you mean"),
        ws.steer_many(model, {"honesty": v["lora"]}, {"honestly": 1.0}),
    ):
        pass


def test_random_controls_match_the_norm_of_every_module(setting):
    model, v = setting
    for vector in v.values():
        control = random_like(vector, model, seed=1)
        for name, delta in vector.deltas.items():
            w = model.get_submodule(name).weight
            assert control.deltas[name].norm(w) == pytest.approx(delta.norm(w), rel=1e-4)
        assert abs(control.cosine(vector, model)) < 0.2
        again, other = random_like(vector, model, seed=1), random_like(vector, model, seed=2)
        assert control.cosine(again, model) == pytest.approx(1.0, abs=1e-6)
        assert abs(control.cosine(other, model)) < 0.2


# ---- weights that are used without their module ---------------------------------------------------------------------

STATE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}
EXPERTS = {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "n_routed_experts": 4}
RANKS = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ODD = {
    "mamba": (MambaConfig(**STATE), "dt_proj"),
    "jamba": (JambaConfig(**SHAPE, mamba_d_state=4, mamba_dt_rank=4, num_experts=2, attn_layer_offset=1), "dt_proj"),
    "longcat": (
        LongcatFlashConfig(vocab_size=96, hidden_size=32, num_attention_heads=4, head_dim=8, **EXPERTS, **RANKS),
        "classifier",
    ),
}


def build(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def low_rank(model: nn.Module, kinds: set[str]) -> ws.SteeringVector:
    """A random change of every linear layer of these kinds."""
    rng, deltas = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in kinds:
            d_out, d_in = module.weight.shape
            u, v = torch.randn(d_out, 2, generator=rng), torch.randn(2, d_in, generator=rng)
            deltas[name] = ws.LinearDelta(d_out, d_in, u=0.3 * u, v=0.3 * v)
    return ws.SteeringVector(deltas, "random", None)


def untouched(model: nn.Module) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooked and not _STEERED and not torch._C._len_torch_function_stack()


@pytest.mark.parametrize("name", ODD)
def test_weights_that_a_model_uses_without_their_module_are_named_and_refused(name):
    """Steering the others is what merging is; steering these would be nothing at all."""
    config, bypassed = ODD[name]
    model = build(config)
    kinds = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    everything, others = low_rank(model, kinds), low_rank(model, kinds - {bypassed})
    merged, before = copy.deepcopy(model), logits(model)
    others.merge_into(merged, 0.7)
    with ws.steer(model, others, 0.7) as dial:
        assert (logits(model) - logits(merged)).abs().max() < 1e-4
        assert (logits(model) - before).abs().max() > 1e-2
        dial.alpha = 0.0
        assert torch.equal(logits(model), before)
    assert untouched(model)
    for vector, alpha in ((everything, 0.7), (low_rank(model, {bypassed}), 0.0)):
        refused = pytest.raises(ws.WsError, match=rf"weights of {bypassed} \(2 modules, such as .*0\..*{bypassed}\)")
        with refused, ws.steer(model, vector, alpha):
            logits(model)
        assert untouched(model)
    nothing = {n: d * 0.0 for n, d in everything.deltas.items() if n.endswith(bypassed)}
    with ws.steer(model, replace(others, deltas={**others.deltas, **nothing}), 0.7):  # as training leaves them
        assert (logits(model) - logits(merged)).abs().max() < 1e-4


class Block(nn.Module):
    """A feed-forward block that uses the weight of its second layer in some way of its own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), way
        self.copied = [self.down.weight.detach().clone()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = self.up(x).relu(), self.down.weight
        ways = {
            "called": lambda: self.down(h.to(w.dtype)),
            "linear": lambda: nn.functional.linear(h, w),
            "matmul": lambda: h @ w.T,
            "detached": lambda: h @ w.detach().float().t(),
            "data": lambda: torch.einsum("brc,dc->brd", h, self.down.weight.data),
            "forward": lambda: self.down.forward(h),
            "stacked": lambda: h @ torch.stack([w, w])[1].T,
            "split": lambda: torch.cat([h @ part.T for part in w.chunk(2)], dim=-1),
            "copied": lambda: h @ self.copied[0].T,
            "in training": lambda: nn.functional.linear(h, w) if self.training else self.down(h),
        }
        return x + ways[self.way]()


class Stack(nn.Module):
    """Two blocks, the first of which calls its layers as it should."""

    def __init__(self, *ways: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(way) for way in ways)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("way", ["linear", "matmul", "detached", "data", "forward", "stacked", "split"])
def test_one_layer_that_takes_its_weight_by_itself_is_enough(way):
    model, x = Stack("called", way).eval(), torch.randn(2, 3, 8)
    vector = low_rank(model, {"up", "down"})
    with ws.steer(model, vector), pytest.raises(ws.WsError, match=r"weights of down \(1 modules, .*layers.1.down\)"):
        model(x)
    assert untouched(model)
    with ws.steer(model, vector.select(layers=[0])):
        model(x)


def test_copies_of_weights_are_noticed_by_what_no_layer_calls():
    model, x = Stack("copied", "copied").eval(), torch.randn(2, 3, 8)
    with ws.steer(model, low_rank(model, {"down"})), pytest.raises(ws.WsError, match="down .2 modules"):
        model(x)
    assert untouched(model)


def test_every_mode_is_looked_at_and_a_pass_that_failed_does_not_count():
    model, x = Stack("in training", "in training").eval(), torch.randn(2, 3, 8)
    with ws.steer(model, low_rank(model, {"down"}), torch.ones(5)) as dial:
        with pytest.raises(ws.WsError, match="5 entries"):
            model(x)
        dial.alpha = 1.0
        assert torch.equal(model(x), model(x))
        model.train()
        for _ in range(2):
            with pytest.raises(ws.WsError, match="weights of down"):
                model(x)
    assert untouched(model)


def test_an_interrupted_pass_leaves_nothing_behind():
    model = Stack("called", "called").eval()

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), ws.steer(model, low_rank(model, {"up"})):
        model(torch.randn(2, 3, 8))
    handle.remove()
    assert untouched(model)


class Routed(nn.Module):
    """Experts, of which only those are called that a token goes to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})])
        self.vision = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, expert: int, image: torch.Tensor | None = None) -> torch.Tensor:
        x = x if image is None else x + self.vision(image)
        return self.layers[0]["experts"][expert](x)


def test_what_a_pass_has_no_use_for_is_no_concern():
    model, x = Routed().eval(), torch.randn(2, 3, 8)
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    vector = low_rank(model, {n.rsplit(".", 1)[-1] for n in names})
    merged = copy.deepcopy(model)
    vector.merge_into(merged, 0.5)
    with ws.steer(model, vector, 0.5), ws.steer(model, vector, 0.0):
        for arguments in ((x, 0), (x, 2), (x, 1, torch.randn(2, 3, 4))):
            assert torch.allclose(model(*arguments), merged(*arguments), atol=1e-5)


def test_embedded_input_and_checkpointed_layers_are_steered_as_merged_weights_would(setting):
    model, v = setting
    tied = build_model("qwen2")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    change = ws.LinearDelta(96, 32, e=torch.randn(96, 32, generator=torch.Generator().manual_seed(0)), kind="embedding")
    names = ("model.embed_tokens", "lm_head")
    embedded = torch.randn(2, 5, 32)
    for deltas in ({names[0]: change}, {names[1]: replace(change, kind="linear")}, dict.fromkeys(names, change)):
        with torch.no_grad(), ws.steer(tied, replace(v["lora"], deltas=deltas, base_fingerprint=None), 0.1):
            head = tied.lm_head.weight + (0.1 * change.e if names[1] in deltas else 0)
            wanted = tied.model(inputs_embeds=embedded).last_hidden_state @ head.T
            assert (tied(inputs_embeds=embedded).logits - wanted).abs().max() < 1e-4
    merged = copy.deepcopy(model)
    v["lora"].merge_into(merged, 1.0)
    model.gradient_checkpointing_enable()
    model.train()
    with ws.steer(model, v["lora"], 1.0):
        loss = model(tokens()).logits.square().mean()
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(merged(tokens()).logits.square().mean().detach()), rel=1e-4)
    wanted = torch.autograd.grad(merged(tokens()).logits.square().mean(), merged.model.norm.weight)[0]
    assert torch.allclose(model.model.norm.weight.grad, wanted, rtol=1e-3, atol=1e-5)


def test_threads_that_share_a_steered_model_do_not_stand_in_each_others_way():
    model = Stack("called", "called").eval()
    x, vector = torch.randn(40, 3, 8), low_rank(model, {"up", "down"})
    merged = copy.deepcopy(model)
    vector.merge_into(merged, 1.0)
    with ws.steer(model, vector), ThreadPoolExecutor(4) as pool, torch.no_grad():
        found = list(pool.map(model, x.unsqueeze(1)))
        assert all(torch.allclose(y, merged(row), atol=1e-4) for y, row in zip(found, x.unsqueeze(1), strict=True))
    assert untouched(model)


# ---- layers that read one tensor ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three layers by the names of those that read one tensor, of which the last may be given another."""

    def __init__(self, between=None, other=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, d, bias=False) for d in (7, 4, 5))
        self.between, self.other = between, other

    def forward(self, x):
        q = self.q_proj(x)
        if self.between is not None:
            self.between(x)
        return torch.cat([q, self.k_proj(x), self.v_proj(x if self.other is None else self.other)], dim=-1)


def changed_weights(module: nn.Module, vector: ws.SteeringVector, alpha: float) -> nn.Module:
    """A copy of the module with `W + alpha dW` in its weights."""
    twin = copy.deepcopy(module)
    for name, delta in vector.deltas.items():
        twin.get_submodule(name).weight.data += alpha * delta.u @ delta.v
    return twin


@pytest.mark.parametrize("case", ["one tensor", "changed in place between", "another tensor for one"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_layers_that_share_a_product_see_each_its_own_input(case, mode):
    torch.manual_seed(0)
    module = Attention(
        between=(lambda x: x.mul_(2.0)) if case == "changed in place between" and mode is torch.no_grad else None,
        other=torch.randn(2, 3, 6) if case == "another tensor for one" else None,
    )
    vector = low_rank(module, {"q_proj", "k_proj", "v_proj"})
    x = torch.randn(2, 3, 6)
    with mode():
        wanted = changed_weights(module, vector, 0.7)(x.clone())
        with ws.steer(module, vector, torch.tensor([0.7, 0.7])) as dial:
            for _ in range(2):  # what a pass has kept is of no use to the next
                torch.testing.assert_close(module(x.clone()), wanted)
            dial.alpha = -0.5
            given = module(x.clone())
        torch.testing.assert_close(given, changed_weights(module, vector, -0.5)(x.clone()))


def test_layers_that_read_one_tensor_share_one_product_and_let_it_go(monkeypatch):
    module = Attention()
    vector, products = low_rank(module, {"q_proj", "k_proj", "v_proj"}), []
    original = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: (products.append(w.shape), original(x, w, b))[1])
    x = torch.randn(2, 3, 6)
    seen = weakref.ref(x)
    with torch.no_grad(), ws.steer(module, vector):
        module(x)
        ranks = [vector.deltas[n].rank for n in ("q_proj", "k_proj", "v_proj")]
        assert [w for w in products if w not in {(7, 6), (4, 6), (5, 6)}] == [(sum(ranks), 6)]
        del x
        gc.collect()
        assert seen() is None  # nothing that was read is kept


def test_what_a_block_copied_is_given_back_when_it_ends():
    module = Attention()
    gc.disable()
    try:
        with torch.no_grad(), ws.steer(module, low_rank(module, {"q_proj", "k_proj", "v_proj"})):
            module(torch.randn(2, 3, 6))
            readers = _STEERED[module.q_proj].changes[0].readers
            held = [weakref.ref(u_t) for factors in readers._factors.values() for u_t in factors.u_t]
            del readers
        assert len(held) == 3
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_few_tokens_in_bfloat16_are_steered_as_exactly_as_many(n_tokens, by_row):
    """Where products are taken as sums of rows, at up to four tokens; with two rows of three there are more."""
    torch.manual_seed(0)
    module = Attention().bfloat16()
    vector = low_rank(module, {"q_proj", "k_proj", "v_proj"})
    x = torch.randn(2, n_tokens, 6).bfloat16()
    alphas = torch.tensor([0.7, -1.5]) if by_row else torch.tensor([0.7, 0.7])
    exact = [
        changed_weights(copy.deepcopy(module).double(), vector, float(a))(x[i].double()) for i, a in enumerate(alphas)
    ]
    with torch.no_grad(), ws.steer(module, vector, alphas if by_row else 0.7):
        few = module(x)
    with ws.steer(module, vector, alphas if by_row else 0.7):  # with gradients it is a product at any length
        product = module(x)
    wanted = torch.stack(exact)
    assert few.dtype == torch.bfloat16
    for given in (few, product):
        assert (given.double() - wanted).norm() / wanted.norm() < 6e-3


def test_sums_of_rows_are_taken_of_few_tokens_without_gradients_alone(monkeypatch):
    module, taken, original = Attention().bfloat16(), list[int](), RowSums.__call__
    vector = low_rank(module, {"q_proj", "k_proj", "v_proj"})
    monkeypatch.setattr(
        RowSums, "__call__", lambda sums, a: (taken.append(a.numel() // a.shape[-1]), original(sums, a))[1]
    )
    with ws.steer(module, vector):
        with torch.no_grad():
            for n in range(FEW + 2):
                module(torch.ones(1, n, 6).bfloat16())
        assert taken == [n for n in range(1, FEW + 1) for _ in "VU"]
        module(torch.ones(1, 1, 6).bfloat16())
        assert len(taken) == 2 * FEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_tokens_as_an_expert_may_be_is_steered(dtype):
    module = Attention().to(dtype)
    with torch.no_grad(), ws.steer(module, low_rank(module, {"q_proj", "k_proj", "v_proj"})):
        assert module(torch.zeros(0, 6, dtype=dtype)).shape == (0, 16)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_dial_that_is_turned_between_layers_that_share_a_product_is_heard(in_place):
    module, x = Attention(), torch.randn(2, 3, 6)
    vector, alpha = low_rank(module, {"q_proj", "k_proj", "v_proj"}), torch.tensor([1.0, 1.0])
    wanted = changed_weights(module, vector, -0.5).k_proj(x)
    with torch.no_grad(), ws.steer(module, vector, alpha) as dial:
        module.q_proj(x)
        if in_place:
            alpha.fill_(-0.5)
        else:
            dial.alpha = -0.5
        torch.testing.assert_close(module.k_proj(x), wanted)
