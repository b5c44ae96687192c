"""The dial, and steering module by module: every kind of change against the weights that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ws
from ws.delta import LinearDelta
from ws.errors import WsError
from ws.steer import _STEERED, _UNCOMPILED, Dial, DialBoard, _LiveDial, steer, steer_many, uncompiled

D_OUT, D_IN, WORDS = 6, 4, 9


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Scaled(nn.Embedding):
    """An embedding whose rows come out larger, as Gemma's do."""

    def forward(self, ids):
        return 3 * super().forward(ids)


class Rms(nn.Module):
    """A norm whose weight is one more than is stored, as Gemma's is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Biased(Rms):
    """A norm with a bias that it adds by itself."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        return super().forward(x) + self.bias


def parts() -> nn.ModuleDict:
    """One module of every kind, with random weights."""
    made = nn.ModuleDict(
        {
            "linear": nn.Linear(D_IN, D_OUT), "plain": nn.Linear(D_IN, D_OUT, bias=False), "conv": Conv1D(D_OUT, D_IN),
            "embedding": nn.Embedding(WORDS, D_IN), "scaled": Scaled(WORDS, D_IN), "norm": nn.LayerNorm(D_IN),
            "rms": Rms(D_IN), "biased": Biased(D_IN), "bare": nn.LayerNorm(D_IN, bias=False),
        }
    )  # fmt: skip
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(draw(*p.shape, seed=i))
    return made


CHANGES = {
    "g": {"g": draw(D_OUT, seed=10)},
    "c": {"c": draw(D_IN, seed=11)},
    "d": {"d": draw(2, 2, 2, seed=12)},
    "uv": {"u": draw(D_OUT, 2, seed=13), "v": draw(2, D_IN, seed=14)},
    "e": {"e": draw(D_OUT, D_IN, seed=15)},
    "bias": {"bias": draw(D_OUT, seed=16)},
}
CHANGES |= {
    "uv with g": CHANGES["uv"] | CHANGES["g"],
    "uv with bias": CHANGES["uv"] | CHANGES["bias"],
    "all": {name: t for part in CHANGES.values() for name, t in part.items()},
}
LINEAR = [(module, change) for module in ("linear", "plain", "conv") for change in CHANGES]
OTHERS = {
    "embedding": [{"e": draw(WORDS, D_IN, seed=17)}, {"u": draw(WORDS, 2, seed=18), "v": draw(2, D_IN, seed=19)}],
    "norm": [{"e": draw(D_IN, 1, seed=20)}, {"bias": draw(D_IN, seed=21)}],
}
OTHERS["norm"].append(OTHERS["norm"][0] | OTHERS["norm"][1])
OTHERS["scaled"], OTHERS["rms"] = OTHERS["embedding"], OTHERS["norm"][:1]
OTHERS["biased"], OTHERS["bare"] = OTHERS["norm"], OTHERS["norm"][:1]
TABLES, NORMS = ("embedding", "scaled"), ("norm", "rms", "biased", "bare")
SIZES = dict.fromkeys(TABLES, (WORDS, D_IN)) | dict.fromkeys(NORMS, (D_IN, 1))
KINDS = dict.fromkeys(TABLES, "embedding") | dict.fromkeys(NORMS, "scale")
CASES = [(m, LinearDelta(D_OUT, D_IN, **CHANGES[c])) for m, c in LINEAR]
CASES += [(m, LinearDelta(*SIZES[m], **c, kind=KINDS[m])) for m, changes in OTHERS.items() for c in changes]


def of(module: str, delta: LinearDelta) -> ws.SteeringVector:
    return ws.SteeringVector({module: delta}, "parts", None)


def moved(module: nn.Module, delta: LinearDelta, alpha: float) -> nn.Module:
    """A copy of the module with the change in its parameters, in double precision."""
    twin = copy.deepcopy(module).double()
    twin._forward_hooks.clear()
    weight = twin.weight.detach()
    if isinstance(twin, Conv1D):
        weight = weight.T
    change = delta.dense(weight if weight.ndim == 2 else weight[:, None])
    change = change[:, 0] if weight.ndim == 1 else change.T if isinstance(twin, Conv1D) else change
    twin.weight = nn.Parameter(twin.weight + alpha * change)
    if delta.bias is not None:
        bias = getattr(twin, "bias", None)
        twin.bias = nn.Parameter((0 if bias is None else bias) + alpha * delta.bias.double())
    return twin


def given(module: str, rows: int = 3) -> torch.Tensor:
    if "embedding" in KINDS.get(module, ""):
        return torch.randint(0, WORDS, (rows, 5), generator=torch.Generator().manual_seed(1))
    return draw(rows, 5, D_IN, seed=1)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("module", "delta"), CASES, ids=lambda part: part if isinstance(part, str) else repr(part)[12:]
)
def test_a_change_is_that_of_the_weights_at_every_strength(module, delta, grad):
    model, x = parts(), given(module)
    layer = model[module]
    double = x if x.dtype == torch.long else x.double()
    before, plain = {n: p.clone() for n, p in model.named_parameters()}, layer(x).detach()
    with torch.set_grad_enabled(grad), steer(model, of(module, delta), 0.5) as dial:
        for alpha in (0.5, -1.5):
            dial.alpha = alpha
            assert (layer(x).double() - moved(layer, delta, alpha)(double)).abs().max() < 2e-5
        rows = torch.tensor([0.75, 0.0, -2.0])
        dial.alpha = rows
        made = layer(x)
        for row, alpha in enumerate(rows.tolist()):
            assert (made[row].double() - moved(layer, delta, alpha)(double)[row]).abs().max() < 2e-5
        assert (made[1] - plain[1]).abs().max() < 1e-6
        dial.alpha = 0.0
        assert torch.equal(layer(x), plain)
    assert torch.equal(layer(x), plain)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    ("module", "delta"), CASES, ids=lambda part: part if isinstance(part, str) else repr(part)[12:]
)
def test_in_bfloat16_a_change_keeps_the_dtype_and_nearly_its_size(module, delta):
    model, x = parts().bfloat16(), given(module)
    x = x if x.dtype == torch.long else x.bfloat16()
    double, layer = x if x.dtype == torch.long else x.double(), model[module]
    with torch.no_grad(), steer(model, of(module, delta), 0.5) as dial:
        for alpha in (0.5, torch.tensor([0.5, 0.5, 0.5])):
            dial.alpha = alpha
            made, wanted = layer(x), moved(layer, delta, 0.5)(double)
            assert made.dtype == torch.bfloat16
            assert float((made.double() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("module", ["embedding", "norm", "biased"])
def test_two_changes_of_a_table_or_a_norm_add_up(module):
    model, x = parts(), given(module)
    first, second = (LinearDelta(*SIZES[module], e=draw(*SIZES[module], seed=s), kind=KINDS[module]) for s in (30, 31))
    with steer(model, of(module, first) + 0.5 * of(module, second)):
        wanted = model[module](x)
    with steer(model, of(module, first)), steer(model, of(module, second), 0.5):
        torch.testing.assert_close(model[module](x), wanted)


def test_two_vectors_on_one_module_see_its_own_input_and_output():
    """Row scales beside column scales: neither is taken of what the other has made."""
    model, x = parts(), given("linear")
    layer, plain = model["linear"], parts()["linear"]
    rows, columns = (LinearDelta(D_OUT, D_IN, **CHANGES[c]) for c in ("g", "c"))
    both = LinearDelta(D_OUT, D_IN, **CHANGES["g"], **CHANGES["c"])
    with torch.no_grad(), steer(model, of("linear", rows), 0.5) as outer:
        hooks = dict(layer._forward_hooks)
        with steer(model, of("linear", columns), 0.5) as inner:
            assert dict(layer._forward_hooks) == hooks, "one hook serves them all"
            assert (layer(x).double() - moved(plain, both, 0.5)(x.double())).abs().max() < 1e-5
            outer.alpha = 0.0
            assert (layer(x).double() - moved(plain, columns, 0.5)(x.double())).abs().max() < 1e-5
            outer.alpha, inner.alpha = 0.5, 0.0
            assert (layer(x).double() - moved(plain, rows, 0.5)(x.double())).abs().max() < 1e-5
        assert (layer(x).double() - moved(plain, rows, 0.5)(x.double())).abs().max() < 1e-5
        assert layer in _STEERED
    assert layer not in _STEERED
    assert not layer._forward_hooks
    low, other = (LinearDelta(D_OUT, D_IN, **CHANGES[c]) for c in ("uv", "uv with g"))
    with torch.no_grad(), steer(model, of("linear", low), 2.0), steer(model, of("linear", other), -2.0):
        assert (layer(x).double() - moved(plain, rows, -2.0)(x.double())).abs().max() < 1e-5, "the products cancel"


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_under_autocast_a_change_is_in_the_dtype_of_the_output(mode):
    model, x = parts(), given("linear")
    delta = LinearDelta(D_OUT, D_IN, **CHANGES["uv with bias"])
    wanted = moved(model["linear"], delta, 0.5)(x.double())
    with steer(model, of("linear", delta), 0.5):
        with mode(), torch.autocast("cpu", torch.bfloat16):
            made = model["linear"](x)
        assert made.dtype == torch.bfloat16
        assert float((made.double() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_only_a_fresh_output_of_its_own_is_added_to_in_place(dtype, most):
    model, x = (
        parts().to(dtype),
        given("plain")[:, :1].to(dtype),
    )  # few tokens, which have a way of their own in bfloat16
    layer, delta = model["plain"], LinearDelta(D_OUT, D_IN, **CHANGES["uv"])
    wanted = moved(layer, delta, 1.0)(x.double())
    kept = list[torch.Tensor]()
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad(), steer(model, of("plain", delta)):
        assert (layer(x) - wanted).abs().max() < most
        assert (kept[0] - layer.forward(x)).abs().max() == 0, "what another hook has seen stays"
        handle.remove()
        assert (layer(x) - wanted).abs().max() < most
    with steer(model, of("plain", delta)):
        forward, made = layer.forward, list[torch.Tensor]()
        layer.forward = lambda x: made.append(forward(x)) or made[-1]
        assert layer(x) is not made[0], "a gradient needs it"
        with torch.no_grad():
            assert layer(x) is made[1]
        del layer.forward
    odd = nn.ModuleDict({"plain": Turned(D_IN, D_OUT, bias=False)}).to(dtype)
    x = given("plain").to(dtype)
    wanted = moved(layer, delta, 1.0)(x.double())
    with torch.no_grad():
        odd["plain"].weight.copy_(layer.weight)
        with steer(odd, of("plain", delta)):
            assert not odd["plain"].forward(x).is_contiguous()
            assert (odd["plain"](x) - wanted).abs().max() < most


def test_a_model_that_is_cast_while_it_is_steered_goes_on():
    model, x = parts(), given("plain")
    layer, delta = model["plain"], LinearDelta(D_OUT, D_IN, **CHANGES["uv with g"])
    wanted = moved(layer, delta, 0.5)(x.double())
    with torch.no_grad(), steer(model, of("plain", delta), 0.5):
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float64, 0.1), (torch.float32, 0.1)):
            made = model.to(dtype)["plain"](x.to(dtype))
            assert made.dtype == dtype
            assert (made - wanted).abs().max() < most


class Turned(nn.Linear):
    """A layer whose output is not contiguous."""

    def forward(self, x):
        return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)


def test_gradients_reach_strengths_and_inputs():
    model, x = parts(), given("linear").requires_grad_()
    delta, alpha = LinearDelta(D_OUT, D_IN, **CHANGES["all"]), torch.tensor([0.5, 1.0, -1.0], requires_grad=True)
    with steer(model, of("linear", delta), alpha):
        for _ in range(2):  # what one pass leaves behind is not in the next one's graph
            model["linear"](x).square().sum().backward()
    layer, twin = model["linear"], x.detach().double().requires_grad_()
    change, w, b = delta.dense(layer.weight.double()), layer.weight.detach().double(), layer.bias.detach().double()
    strength = alpha.detach().double().requires_grad_()
    column = strength.view(-1, 1, 1)
    (twin @ w.T + b + column * (twin @ change.T + delta.bias.double())).square().sum().backward()
    assert alpha.grad.double().numpy() == pytest.approx(2 * strength.grad.numpy(), rel=1e-4)
    assert torch.allclose(x.grad.double(), 2 * twin.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.5, torch.full((3,), 0.5)])
@pytest.mark.parametrize(("module", "delta"), [case for case in CASES if KINDS.get(case[0]) != "embedding"], ids=str)
def test_what_was_used_in_inference_mode_gives_gradients_afterwards(module, delta, alpha):
    """Copies that were made there would be of no use to a backward pass, and they are kept."""
    model, x = parts().double(), given(module).double().requires_grad_()
    twin, exact = moved(model[module], delta, 0.5), x.detach().requires_grad_()
    with steer(model, of(module, delta), alpha):
        with torch.inference_mode():
            model[module](x)
        model[module](x).square().sum().backward()
    twin(exact).square().sum().backward()
    torch.testing.assert_close(x.grad, exact.grad)


def test_a_dial_for_the_compiler_can_be_turned_outside_of_the_mode_it_was_set_in():
    with torch.inference_mode():
        dial = _LiveDial(1.0, float, torch.empty(0))
        dial.alpha = torch.tensor([1.0, 2.0])
    dial.alpha = torch.tensor([3.0, 4.0])
    assert dial.over(torch.zeros(2, 1, 1)).flatten().tolist() == [3.0, 4.0]


# ---- what cannot be steered -----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Takes the square of its weight, and so is no norm; or fails outright."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.weight, self.fails = nn.Parameter(torch.ones(D_IN)), fails

    def forward(self, x):
        if self.fails:
            raise IndexError("no")
        return x * self.weight**2


class Shifted(nn.Embedding):
    """Does more than look rows up; or is called with something else than ids."""

    fails = False

    def forward(self, ids):
        return super().forward(ids) + ids[:, None] if not self.fails else ids.nothing(1)


class Uneven(nn.Embedding):
    """Gives every other column a little more than its row has."""

    def forward(self, ids):
        return super().forward(ids) * torch.tensor([1.0, 1.06] * (D_IN // 2))


def test_what_is_no_norm_and_no_table_is_named():
    for odd in (Odd(), Odd(fails=True)):
        model = nn.ModuleDict({"odd": odd})
        delta = LinearDelta(D_IN, 1, e=torch.ones(D_IN, 1), kind="scale")
        with pytest.raises(WsError, match=r"^odd is a Odd; "), steer(model, of("odd", delta)):
            pass
        assert not odd._forward_hooks
    delta = LinearDelta(WORDS, D_IN, e=torch.ones(WORDS, D_IN), kind="embedding")
    for table in (Shifted(WORDS, D_IN), Uneven(WORDS, D_IN)):
        name = type(table).__name__
        with (
            pytest.raises(WsError, match=rf"^The embedding odd \({name}\) "),
            steer(nn.ModuleDict({"odd": table}), of("odd", delta)),
        ):
            pass
        assert not table._forward_hooks
        assert not _STEERED


class Ids(nn.Embedding):
    """Is called with a mask rather than with ids, as OPT's positions are."""

    def forward(self, mask):
        return super().forward(mask[:, :3].sum(dim=1))


def test_a_table_that_is_not_called_with_ids_is_named():
    model = nn.ModuleDict({"odd": Ids(WORDS, D_IN)})
    delta = LinearDelta(WORDS, D_IN, e=torch.ones(WORDS, D_IN), kind="embedding")
    with pytest.raises(WsError, match=r"^The embedding odd \(Ids\) "), steer(model, of("odd", delta)):
        pass


class Beside(nn.Module):
    """Uses one layer's weight without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D_IN, D_OUT)

    def forward(self, x):
        return nn.functional.linear(x, self.up.weight)


def test_a_layer_whose_weight_is_used_without_it_gets_advice():
    model, delta = Beside(), LinearDelta(D_OUT, D_IN, **CHANGES["e"])
    said = r"\bup\b.* leave them out with `vector\.select`, .*\(`ws export merged`\)"
    with pytest.raises(WsError, match=said), torch.no_grad(), steer(model, of("up", delta)):
        model(draw(1, 2, D_IN))
    assert not _STEERED


def test_what_is_exchanged_or_zero_is_refused():
    model, vector = parts(), of("linear", LinearDelta(D_OUT, D_IN, **CHANGES["e"]))
    for a, b, those in ((vector, model, "a SteeringVector and a ModuleDict"), (model, 1, "a ModuleDict and a int")):
        said = rf"^Steering takes a model and then a SteeringVector, not {those}\.$"
        for compilable in (False, True):
            with pytest.raises(WsError, match=said), steer(a, b, compilable=compilable):
                pass
    with pytest.raises(WsError, match=r"^The steering vector is zero"), steer(model, 0 * vector):
        pass
    with pytest.raises(WsError, match="no such module"), steer(model, of("gone", vector.deltas["linear"])):
        pass
    assert not _STEERED


# ---- the dial -------------------------------------------------------------------------------------------------------


def test_a_dial_holds_a_number_or_one_for_every_row():
    dial = Dial(0.5)
    assert (dial.alpha, dial.rows, dial.is_off, repr(dial)) == (0.5, 1, False, "Dial(alpha=0.5)")
    for value, kept in ((2, 2.0), ("-0.25", -0.25), (torch.tensor(1.5), 1.5), (0, 0.0)):
        dial.alpha = value
        assert dial.alpha == kept
        assert isinstance(dial.alpha, float)
        assert dial.is_off is (kept == 0)
        assert dial.over(torch.zeros(2, 3)) == kept
    dial.alpha = rows = torch.tensor([0.0, 0.0])
    assert dial.alpha is rows
    assert not dial.is_off
    assert repr(dial) == "Dial(alpha=tensor([0., 0.]))"
    assert Dial("+2u", {"+2u": 0.75}.__getitem__).alpha == 0.75
    with pytest.raises(WsError, match=r"tensor of \(2, 1\)"):
        dial.alpha = torch.zeros(2, 1)
    for wrong in (torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(WsError, match=r"^alpha must be finite, .*NaN or infinity\.$"):
            dial.alpha = wrong
    with pytest.raises(WsError, match="within float32"):
        dial.alpha = torch.tensor([1.0, -1e39], dtype=torch.double)
    assert dial.alpha is rows, "what is refused changes nothing"
    dial.end()
    assert repr(dial) == "Dial(alpha=tensor([0., 0.]), its block has ended)"
    with pytest.raises(WsError, match="block .* has ended"):
        dial.alpha = 1.0
    assert Dial(torch.zeros(0)).over(torch.zeros(0, 2, 3)).shape == (0, 1, 1)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 1, 1), (2, 5, 3, 4)])
def test_strengths_by_row_broadcast_over_activations(shape):
    dial = Dial(torch.tensor([0.3, -1.0]))
    for dtype, wide in ((torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2):
        column = dial.over(torch.zeros(shape, dtype=dtype))
        assert column.shape == (2, *[1] * (len(shape) - 1))
        assert column.dtype == wide
        assert column.flatten().tolist() == pytest.approx([0.3, -1.0], rel=1e-7)
        assert torch.equal(dial.over(torch.zeros(shape, dtype=dtype)), column)


def test_strengths_by_row_follow_their_tensor_and_need_its_rows():
    rows = torch.tensor([1.0, 2.0])
    dial = Dial(rows)
    assert dial.over(torch.zeros(2, 1, 1)).flatten().tolist() == [1, 2]
    rows[0] = 5.0
    assert dial.over(torch.zeros(2, 1, 1)).flatten().tolist() == [5, 2]
    for n in (1, 3):
        with pytest.raises(WsError, match=rf"^alpha has 2 entries .* {n} rows"):
            dial.over(torch.zeros(n, 2, 1))
    with pytest.raises(WsError, match=r"^alpha has one entry per row, .*`vector\.select`\.$"):
        dial.over(torch.zeros(2, 4))
    dial.alpha = torch.tensor([3.0, 4.0])
    assert dial.over(torch.zeros(2, 1, 1)).flatten().tolist() == [3, 4]
    assert dial.over(torch.zeros(2, 1, 1, 1)).shape == (2, 1, 1, 1)
    wide = torch.tensor([1.0, 2.0], dtype=torch.float64)  # of which activations get a copy
    dial.alpha = wide
    for value in (1.0, 5.0):
        wide[0] = value
        assert dial.over(torch.zeros(2, 1, 1)).flatten().tolist() == [value, 2]
    graded = torch.tensor([1.0, 2.0], requires_grad=True)
    dial.alpha = graded
    for _ in range(2):
        dial.over(torch.zeros(2, 1, 1)).sum().backward()
    assert graded.grad.tolist() == [2, 2]


def test_a_strength_beyond_the_dtype_of_the_model_is_named():
    half, single = torch.zeros(2, 1, 1, dtype=torch.float16), torch.zeros(2, 1, 1)
    for alpha in (7e4, -7e4, torch.tensor([0.0, -7e4])):
        dial = Dial(alpha)
        with pytest.raises(WsError, match=r"^alpha 70000 is beyond float16, "):
            dial.over(half)
        dial.over(single)
    assert Dial(65504.0).over(half) == 65504.0
    dial.alpha = 1.0
    assert dial.over(half) == 1.0
    dial.alpha = torch.tensor([1.0, 2.0])
    assert dial.over(half).flatten().tolist() == [1, 2]


def test_several_vectors_have_dials_of_their_own():
    model, x = parts(), given("linear")
    vectors = {c: of("linear", LinearDelta(D_OUT, D_IN, **CHANGES[c])) for c in ("g", "uv", "e")}

    def wanted(**alphas: float) -> torch.Tensor:
        total = sum((alphas[n] * vectors[n] for n in list(vectors)[1:]), alphas["g"] * vectors["g"])
        return moved(parts()["linear"], total.deltas["linear"], 1.0)(x.double())

    with torch.no_grad(), steer_many(model, vectors, {"uv": 0.5, "e": "-0.25"}) as dials:
        assert isinstance(dials, DialBoard)
        assert (list(dials), len(dials)) == (["g", "uv", "e"], 3)
        assert {n: d.alpha for n, d in dials.items()} == {"g": 1.0, "uv": 0.5, "e": -0.25}
        assert (model["linear"](x).double() - wanted(g=1.0, uv=0.5, e=-0.25)).abs().max() < 2e-5
        dials["g"].alpha = -1.0
        assert (model["linear"](x).double() - wanted(g=-1.0, uv=0.5, e=-0.25)).abs().max() < 2e-5
        assert repr(dials).startswith("DialBoard({'g': Dial(alpha=-1.0), ")
        with pytest.raises(WsError, match="vector .*'ee'"):
            dials["ee"]
    assert "its block has ended" in repr(dials["uv"])
    with torch.no_grad(), steer_many(model, vectors) as dials:
        assert {d.alpha for d in dials.values()} == {1.0}
    with torch.no_grad(), steer_many(model, vectors, 0.5) as dials:
        assert {d.alpha for d in dials.values()} == {0.5}
        assert (model["linear"](x).double() - wanted(g=0.5, uv=0.5, e=0.5)).abs().max() < 2e-5
    with pytest.raises(WsError, match="^There are no vectors to steer with"), steer_many(model, {}):
        pass
    with pytest.raises(WsError, match="vector .*'ggg'.*Did you mean 'g'"), steer_many(model, vectors, {"ggg": 1.0}):
        pass
    assert not _STEERED


def test_units_are_looked_up_once(monkeypatch):
    model, asked = parts(), list[str]()

    def strength(self, text, tokenizer=None):
        asked.append(text)
        return 0.25 * float(text[:-1])

    monkeypatch.setattr(ws.SteeringVector, "strength", strength)
    vector = of("linear", LinearDelta(D_OUT, D_IN, **CHANGES["e"]))
    with steer(model, vector, "2u") as dial:
        assert dial.alpha == 0.5
        dial.alpha = "-1u"
        dial.alpha = "2u"
        assert dial.alpha == 0.5
    assert asked == ["2u", "-1u"]
    with steer_many(model, {"a": vector}, {"a": "4u"}) as dials:
        dials["a"].alpha = "4u"
        assert dials["a"].alpha == 1.0
    assert asked == ["2u", "-1u", "4u"]
    with steer(model, vector) as dial:
        assert dial.alpha == 1.0


def test_compiled_code_rests_while_anything_is_steered():
    calls = list[int]()

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    model, x = parts(), draw(2, 3, D_IN)
    compiled = torch.compile(model["plain"], backend=backend)
    delta = LinearDelta(D_OUT, D_IN, **CHANGES["uv"])
    with torch.no_grad():
        plain = compiled(x)
        assert len(calls) == 1
        with uncompiled():
            compiled(x)
        with uncompiled(), uncompiled():
            compiled(x)
        with steer(model, of("plain", delta), 0.5):
            with steer(model, of("plain", delta), 0.5):
                pass
            assert (compiled(x) - moved(model["plain"], delta, 0.5)(x.double())).abs().max() < 1e-5
        with pytest.raises(RuntimeError, match="inside"), uncompiled():
            raise RuntimeError("inside")
        assert len(calls) == 1
        assert torch.equal(compiled(x), plain)
        assert len(calls) == 2
    assert _UNCOMPILED.count == 0


# ---- layers that read one tensor ------------------------------------------------------------------------------------


class Readers(nn.Module):
    """Layers by the names of those to which a block hands one tensor."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for i, name in enumerate(names):
            self.add_module(name, nn.Linear(D_IN, D_OUT + i))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"),
        ("q_proj", "up_proj"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bfloat16", [False, True])
def test_layers_that_read_one_tensor_take_one_product(names, bfloat16, monkeypatch):
    together = names != ("q_proj", "up_proj")
    model, seen = nn.ModuleDict({"block": Readers(*names)}), list[tuple[int, ...]]()
    deltas = {
        f"block.{n}": LinearDelta(D_OUT + i, D_IN, u=draw(D_OUT + i, i + 2, seed=i), v=draw(i + 2, D_IN, seed=i + 9))
        for i, n in enumerate(names)
    }
    deltas[f"block.{names[0]}"] = deltas[f"block.{names[0]}"] + LinearDelta(D_OUT, D_IN, g=draw(D_OUT, seed=30))
    vector = ws.SteeringVector(deltas, "readers", None)
    x, original = draw(2, 3, D_IN), nn.functional.linear
    if bfloat16:
        model, x = model.bfloat16(), x.bfloat16()

    def linear(x, w, b=None):
        seen.append(tuple(w.shape))
        return original(x, w, b)

    with torch.no_grad():
        wanted = torch.cat(
            [moved(model["block"].get_submodule(n), deltas[f"block.{n}"], 0.5)(x.double()) for n in names], -1
        )
        monkeypatch.setattr(nn.functional, "linear", linear)
        with steer(model, vector, torch.tensor([0.5, 0.5])) as dial:
            for alpha in (torch.tensor([0.5, 0.5]), 0.5):
                dial.alpha = alpha
                made = model["block"](x)
                assert made.dtype == x.dtype
                assert float((made.double() - wanted).norm() / wanted.norm()) < (0.02 if bfloat16 else 1e-5)
    each = [i + 2 for i in range(len(names))]
    products = [shape[0] for shape in seen if shape not in {tuple(m.weight.shape) for m in model["block"].children()}]
    assert products == ([sum(each)] * 2 if together else each * 2)
