"""The slope against finite differences of really steered scores, its null against sampling, and nothing left behind."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from transformers import AutoModelForCausalLM, MambaConfig

import ws
import ws.analysis.slope
import ws.intervene.gradient
from conftest import build_adapter, build_model, reworded, tokens
from ws.analysis.controls import _random_delta, random_like
from ws.analysis.slope import (
    MeanScore,
    WeightGradient,
    _of_module,
    _ratio_variance,
    carry_out,
    main,
    mean_score,
    module_slopes,
    score_gradients,
    slope_test,
)
from ws.delta import LinearDelta
from ws.eval.airisk import Airisk, evaluate_airisk, signed_scores
from ws.eval.context import open_context
from ws.eval.dilemmas import load_dilemmas
from ws.eval.evaluation import MeanOfChoices
from ws.eval.sycophancy import Sycophancy, prompts_of, score_claims
from ws.eval.tinymfv_airisk import TinymfvAirisk, evaluate_tinymfv_airisk, load_vignettes, signed_wrongness
from ws.lm.models import fingerprint
from ws.options.check import SlopeOptions

IDS = tokens(6, 9)


def last_logratio(model) -> torch.Tensor:
    """A score per row: the log ratio of two tokens after the last position."""
    logits = model(IDS).logits[:, -1]
    return logits[:, 3] - logits[:, 5]


def token_score(model) -> MeanScore:
    def parts(batch_size):
        for start in range(0, len(IDS), batch_size):
            logits = model(IDS[start : start + batch_size]).logits[:, -1]
            yield (logits[:, 3] - logits[:, 5]).sum() / len(IDS)

    return MeanScore("token", len(IDS), parts)


def finite_difference(model, vector, at: float = 0.0, step: float = 1e-2) -> float:
    """The five-point stencil, whose error is of the order of `step^4`; norms and softmax run in float32 everywhere."""
    with torch.no_grad(), ws.steer(model, vector, 0.0) as dial:

        def at_strength(alpha: float) -> float:
            dial.alpha = alpha
            return float(last_logratio(model).mean())

        def difference(h: float) -> float:
            return at_strength(at + h) - at_strength(at - h)

        return (8 * difference(step) - difference(2 * step)) / (12 * step)


def random_vector(model, family, folder, seed=3):
    build_adapter(model, family, folder / f"{family}-{seed}", seed=seed)
    return ws.SteeringVector.from_adapter(folder / f"{family}-{seed}", model)


def test_it_is_the_finite_difference_of_the_steered_score(base, family, tmp_path):
    vector = random_vector(base, family, tmp_path)
    model = base.to(torch.float64)
    test = slope_test(model, vector, token_score(model), batch_size=4)
    assert test.slope == pytest.approx(finite_difference(model, vector), rel=2e-3)
    assert test.value == pytest.approx(last_logratio(model).mean().item(), rel=1e-9)
    for part in test.per_module[::8]:
        alone = replace(vector, deltas={part.module: vector.deltas[part.module]})
        assert part.slope == pytest.approx(finite_difference(model, alone), rel=2e-3, abs=1e-5)


def test_in_half_precision_it_is_that_of_float32_within_its_rounding(qwen3, tmp_path):
    vector = random_vector(qwen3, "lora", tmp_path)
    exact = slope_test(qwen3, vector, token_score(qwen3))
    half = qwen3.to(torch.bfloat16)
    gradients = score_gradients(half, list(vector.deltas), token_score(half))
    assert {g.weight.dtype for g in gradients.by_module.values()} == {torch.float32}
    rough = slope_test(half, vector, token_score(half))
    assert rough.slope == pytest.approx(exact.slope, abs=0.1 * exact.std + 0.02 * abs(exact.slope))
    assert rough.std == pytest.approx(exact.std, rel=0.05)


def test_inside_another_vector_it_is_the_slope_there(qwen3, tmp_path):
    first, second = (random_vector(qwen3, f, tmp_path) for f in ("oft", "dora"))
    model = qwen3.to(torch.float64)
    with ws.steer(model, first, 0.7):
        test = slope_test(model, second, token_score(model))
        assert test.slope == pytest.approx(finite_difference(model, second), rel=2e-3)
        along_itself = slope_test(model, first, token_score(model)).slope
    assert along_itself == pytest.approx(finite_difference(model, first, at=0.7), rel=2e-3)
    assert test.slope != pytest.approx(slope_test(model, second, token_score(model)).slope, rel=1e-2)


def test_it_is_linear_in_the_vector(qwen3, tmp_path):
    vectors = [random_vector(qwen3, f, tmp_path) for f in ("lora", "oft", "ia3", "dora")]
    gradients = score_gradients(qwen3, sorted(set().union(*(v.deltas for v in vectors))), token_score(qwen3)).by_module

    def slope(vector) -> float:
        return sum(s for s, _ in module_slopes(qwen3, vector.deltas, gradients).values())

    a, b, c, d = map(slope, vectors)
    assert slope(2 * vectors[0]) == pytest.approx(2 * a, rel=1e-5)
    assert slope(-vectors[1]) == pytest.approx(-b, rel=1e-5)
    mixed = vectors[0] + 0.5 * vectors[1] - 3 * vectors[2] + vectors[3]
    assert slope(mixed) == pytest.approx(a + 0.5 * b - 3 * c + d, rel=1e-4)


# ---- the null ---------------------------------------------------------------------------------------------------


def uneven_layer(d_out: int = 14, d_in: int = 12) -> tuple[torch.Tensor, WeightGradient]:
    """A weight with rows and columns of very different size, and a gradient as uneven."""
    rng = torch.Generator().manual_seed(4)
    w = torch.randn(d_out, d_in, generator=rng) * torch.linspace(0.1, 3, d_out)[:, None] * torch.linspace(2, 0.3, d_in)
    g = torch.randn(d_out, d_in, generator=rng) * torch.linspace(2, 0.2, d_out)[:, None]
    return w, WeightGradient(g, torch.randn(d_out, generator=rng))


def of_kinds(kinds: str, d_out: int = 14, d_in: int = 12) -> LinearDelta:
    rng = torch.Generator().manual_seed(8)
    parts = {"g": (d_out,), "c": (d_in,), "d": (3, d_in // 3, d_in // 3), "u": (d_out, 2), "v": (2, d_in)}
    parts |= {"e": (d_out, d_in), "b": (d_out,)}
    drawn = {("bias" if k == "b" else k): torch.randn(parts[k], generator=rng) for k in parts if k in kinds}
    return LinearDelta(d_out, d_in, **drawn)


@pytest.mark.parametrize("kinds", ["g", "c", "d", "uv", "e", "b", "gb", "guv", "cde"])
def test_the_variance_is_that_of_sampled_directions(kinds):
    (w, gradient), delta = uneven_layer(), of_kinds(kinds)
    slope, variance = _of_module(delta, gradient, w)
    bias = torch.zeros(14) if delta.bias is None else delta.bias
    assert slope == pytest.approx(float((gradient.weight * delta.dense(w)).sum() + gradient.bias @ bias), rel=1e-4)
    rng = torch.Generator().manual_seed(1)
    drawn = [_random_delta(delta, w, rng) for _ in range(600)]
    flat = torch.stack([r.dense(w).flatten() for r in drawn]) @ gradient.weight.flatten()
    flat += torch.stack([torch.zeros(14) if r.bias is None else r.bias for r in drawn]) @ gradient.bias
    assert abs(float(flat.mean())) < 4 * (variance / len(drawn)) ** 0.5
    assert float(flat.std()) == pytest.approx(variance**0.5, rel=0.1), "the sample's own error is 3 %"


@pytest.mark.parametrize("n", [1, 2, 3, 50, 5000])
def test_the_shares_of_a_quadratic_form_add_up(n):
    """`sum_i w_i E[n_i^2 / sum_j w_j n_j^2] = 1` for any weights, and each is `1 / n` for equal ones."""
    rng = torch.Generator().manual_seed(n)
    w = torch.rand(n, generator=rng, dtype=torch.float64) ** 4 + 1e-6
    assert _ratio_variance(w.sqrt(), w) == pytest.approx(1.0, rel=1e-6)
    first = torch.eye(1, n, dtype=torch.float64)[0]
    assert _ratio_variance(first, torch.full((n,), 2.5, dtype=torch.float64)) == pytest.approx(0.4 / n, rel=1e-6)


def test_one_heavy_coordinate_hides_the_others():
    """Where the norm is mostly that of one coordinate, the ratio of two means would be five times off."""
    w, a = torch.tensor([100.0, 1, 1, 1, 1]).double(), torch.tensor([0.0, 1, 1, 0, 0]).double()
    n = torch.randn(400_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampled = float(((n @ a).square() / (n.square() @ w)).mean())
    assert _ratio_variance(a, w) == pytest.approx(sampled, rel=0.03)
    assert sampled > 3 * float(a.square().sum() / w.sum())


def test_parts_that_add_up_in_one_direction_make_a_wider_null():
    """`random_like` gives the whole the norm of the whole: here twice that of either part, not 1.4 times."""
    w, gradient = uneven_layer()
    part = LinearDelta(14, 12, g=torch.ones(14))
    whole = part + LinearDelta(14, 12, e=w)
    separate = sum(_of_module(p, gradient, w)[1] for p in (part, LinearDelta(14, 12, e=w)))
    assert _of_module(whole, gradient, w)[1] == pytest.approx(2 * separate, rel=1e-4)
    rng = torch.Generator().manual_seed(1)
    drawn = [float((_random_delta(whole, w, rng).dense(w) * gradient.weight).sum()) for _ in range(600)]
    assert np.std(drawn) == pytest.approx((2 * separate) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("oft", "1:2"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("lora", "all"), ("ia3", "1:3")))],
)
def test_the_null_is_gaussian_with_the_stated_width(family, layers, tmp_path):
    """400 random directions, their slopes taken densely from one gradient; 5 % of them are `significant`."""
    model = build_model("qwen2")
    vector = replace(random_vector(model, family, tmp_path).select(layers), base_fingerprint=None)
    test = slope_test(model, vector, token_score(model))
    gradients = score_gradients(model, list(vector.deltas), token_score(model)).by_module
    slopes = []
    for seed in range(400):
        drawn = random_like(vector, model, seed)
        dense = dict(drawn.dense(model))
        parts = [(g.weight * dense[f"{n}.weight"]).sum() for n, g in gradients.items()]
        parts += [g.bias @ dense[f"{n}.bias"] for n, g in gradients.items() if f"{n}.bias" in dense]
        slopes.append(float(sum(parts)))
    assert np.std(slopes) == pytest.approx(test.std, rel=0.1)
    assert kstest(slopes, norm(0, test.std).cdf).pvalue > 0.01
    significant = np.mean(2 * norm.sf(np.abs(slopes) / test.std) < 0.05)
    assert 0.02 <= significant <= 0.085, "5 % and four binomial standard errors at most"
    assert test.p == pytest.approx(2 * norm.sf(abs(test.slope) / test.std))


# ---- the scores -------------------------------------------------------------------------------------------------


def test_the_claim_score_is_the_evaluation_and_batches_do_not_matter(tiny):
    model, tok = tiny
    test = ws.load_behavior("honesty", "tiny-random").test
    claims = test.select("dev", is_true=False)[:9]
    (mean,) = Sycophancy(items=claims, prompts=prompts_of(test)).means(tok, ("false_claims", "true_claims"))
    score = mean_score(model, tok, mean)
    together, apart = (score_gradients(model, ["model.layers.0.mlp.up_proj"], score, b) for b in (None, 2))
    assert together.value == pytest.approx(score_claims(model, tok, claims, prompts_of(test)).logratio.mean(), abs=1e-5)
    for gradients in (together, apart):
        assert gradients.value == pytest.approx(together.value, abs=1e-5)
        (weight,) = [g.weight for g in gradients.by_module.values()]
        (reference,) = [g.weight for g in together.by_module.values()]
        assert (weight - reference).norm() < 1e-4 * reference.norm()


def test_the_tinymfv_score_is_the_evaluation_and_its_slope_the_finite_difference(tiny):
    model, tok = tiny
    vignettes = load_vignettes("pocket", 5)
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.05, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    (mean,) = TinymfvAirisk(items=vignettes).means(tok, ("wrongness",))
    test = slope_test(model, vector, mean_score(model, tok, mean), batch_size=4)

    def wrongness() -> float:
        return float(signed_wrongness(evaluate_tinymfv_airisk(model, tok, vignettes))[:, 0].mean())

    assert test.value == pytest.approx(wrongness(), abs=1e-5)
    with ws.steer(model, vector, 0.02) as dial:
        up = wrongness()
        dial.alpha = -0.02
        assert test.slope == pytest.approx((up - wrongness()) / 0.04, rel=1e-2)


@pytest.mark.parametrize("protocol", ["explicit", "published"])
def test_the_airisk_score_is_the_evaluation_and_its_slope_the_finite_difference(tiny, protocol):
    model, tok = tiny
    dilemmas = load_dilemmas("pocket", "Truthfulness", 4)
    torch.manual_seed(0)
    delta = LinearDelta(96, 64, u=torch.randn(96, 2) * 0.05, v=torch.randn(2, 64))
    vector = ws.SteeringVector({"model.layers.1.mlp.up_proj": delta}, "tiny-random", fingerprint(model))
    (mean,) = Airisk(items=dilemmas, protocol=protocol).means(tok, ("choices",))
    test = slope_test(model, vector, mean_score(model, tok, mean), batch_size=4)

    def choices() -> float:
        return float(signed_scores(dilemmas, evaluate_airisk(model, tok, dilemmas, protocol, n_think=0)).mean())

    assert test.value == pytest.approx(choices(), abs=1e-5)
    with ws.steer(model, vector, 0.02) as dial:
        up = choices()
        dial.alpha = -0.02
        assert test.slope == pytest.approx((up - choices()) / 0.04, rel=1e-2)


def test_several_passes_give_what_one_does(qwen3, tmp_path, monkeypatch):
    vector = random_vector(qwen3, "dora", tmp_path)
    once = slope_test(qwen3, vector, token_score(qwen3))
    monkeypatch.setattr(ws.intervene.gradient, "_BUDGET", 3 * 4 * 32 * 48)
    assert len(ws.intervene.gradient.groups_of(qwen3, list(vector.deltas))) > 3
    assert slope_test(qwen3, vector, token_score(qwen3)) == once


def test_shares_and_layers_are_parts_of_the_slope(qwen3, tmp_path):
    vector = random_vector(qwen3, "lora", tmp_path)
    test = slope_test(qwen3, vector, token_score(qwen3))
    assert len(test.per_module) == len(vector.deltas)
    assert sum(abs(m.share) for m in test.per_module) == pytest.approx(1)
    assert all(m.share * m.slope >= 0 for m in test.per_module)
    assert set(test.per_layer) == {0, 1, 2}
    assert sum(test.per_layer.values()) == pytest.approx(test.slope)
    assert sum(m.std**2 for m in test.per_module) == pytest.approx(test.std**2)


# ---- nothing left behind, and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_was(qwen3, tmp_path, weights_hash, mode):
    vector = random_vector(qwen3, "lora", tmp_path)
    parameters = list(qwen3.parameters())
    for p in parameters[::2]:
        p.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    hashed, flags = weights_hash(qwen3), [p.requires_grad for p in parameters]
    with mode():
        found = slope_test(qwen3, vector, token_score(qwen3))
    assert found.slope == pytest.approx(finite_difference(qwen3, vector), rel=0.02)
    with pytest.raises(RuntimeError, match="inside"):
        slope_test(qwen3, vector, MeanScore("broken", 1, lambda _: raising(qwen3)))
    assert weights_hash(qwen3) == hashed
    assert [p.requires_grad for p in parameters] == flags
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert all(p.grad is None for p in parameters if p is not parameters[1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in qwen3.modules())


def raising(model):
    yield last_logratio(model).mean()
    raise RuntimeError("inside")


def test_what_has_no_slope_is_refused(qwen3, tmp_path, tiny):
    vector = random_vector(qwen3, "lora", tmp_path)
    score = token_score(qwen3)
    with pytest.raises(ws.WsError, match="zero"):
        slope_test(qwen3, vector - vector, score)
    with pytest.raises(ws.WsError, match="weights differ"):
        slope_test(tiny[0], vector, score)
    with pytest.raises(ws.WsError, match="does not depend"):
        slope_test(qwen3, vector, MeanScore("constant", 1, lambda _: iter([0 * last_logratio(qwen3).mean()])))
    with pytest.raises(ws.WsError, match="NaN"):
        slope_test(qwen3, vector, MeanScore("broken", 1, lambda _: iter([last_logratio(qwen3).mean() * torch.nan])))
    with pytest.raises(ws.WsError, match="no items"):
        mean_score(*tiny, MeanOfChoices("false_claims", 0, [], ("Yes", "No"), []))
    name = "model.layers.0.mlp.up_proj"
    packed = qwen3.get_submodule(name)
    packed.weight = torch.nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ws.WsError, match=r"up_proj stores uint8 .* unquantised"):
        slope_test(qwen3, vector, score)


def test_weights_that_the_model_uses_by_itself_have_no_slope_but_a_sentence():
    """Mamba never calls its `dt_proj`: recorded there, a gradient would be zero."""
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    deltas = {}
    for kind, d_out, d_in in (("in_proj", 128, 32), ("dt_proj", 64, 4)):
        change = LinearDelta(d_out, d_in, e=0.1 * torch.randn(d_out, d_in))
        deltas |= {f"backbone.layers.{i}.mixer.{kind}": change for i in range(2)}
    vector = ws.SteeringVector(deltas, "random", None)
    with pytest.raises(ws.WsError, match="weights of dt_proj .* gradients are unknown"):
        slope_test(model, vector, token_score(model))
    rest = vector.select(modules=["in_proj"])
    test = slope_test(model, rest, token_score(model))
    assert test.slope == pytest.approx(finite_difference(model, rest), rel=2e-3)
    unmoved = {n: d * 0.0 for n, d in deltas.items() if n.endswith("dt_proj")}
    assert slope_test(model, replace(rest, deltas={**rest.deltas, **unmoved}), token_score(model)) == test


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny, tmp_path):
    model, _ = tiny
    torch.manual_seed(0)
    deltas = {
        f"model.layers.{i}.mlp.up_proj": LinearDelta(96, 64, u=torch.randn(96, 2), v=torch.randn(2, 64)) for i in (1, 2)
    }
    ws.SteeringVector(deltas, "tiny-random", fingerprint(model)).save(tmp_path / "honesty" / "lora" / "vector")
    return SlopeOptions(out=tmp_path, split="dev", limit=5, device="cpu")


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_both_tables_and_resumes(options, capsys, monkeypatch):
    main(options)
    printed = capsys.readouterr().out
    folder = options.out / "honesty" / "lora"
    rows, parts = (read(folder / f"{name}.csv") for name in ("slope", "slope_per_module"))
    assert list(rows[0])[:9] == ["behavior", "adapter", "seed", "score", "slope", "null_std", "z", "p", "n"]
    assert [r["score"] for r in rows] == ["false_claims", "true_claims", "wrongness", "choices"]
    assert [r["eval"] for r in rows] == ["sycophancy", "sycophancy", "tinymfv_airisk", "airisk_truthfulness"]
    assert {r["n"] for r in rows} == {"5"}
    assert {r["words"] for r in rows} == {"own"}
    assert "Items of wrongness: a draw of 5 of 154, seed 0" in printed
    for row in rows:
        mine = [float(r["slope"]) for r in parts if r["score"] == row["score"]]
        assert sum(mine) == pytest.approx(float(row["slope"]))
        assert float(row["z"]) == pytest.approx(float(row["slope"]) / float(row["null_std"]))
        assert f"{float(row['slope']):+.4g}" in printed
    monkeypatch.setattr(ws.analysis.slope, "slope_test", None)
    main(options)
    assert capsys.readouterr().out == printed
    context = open_context(options.eval_options())
    with pytest.raises(TypeError):  # another template is another question
        carry_out(replace(context, tok=reworded(context.tok)), options)
    with pytest.raises(TypeError):  # and other digits give another number
        main(replace(options, dtype="bfloat16"))


def test_the_command_takes_the_scores_it_is_asked_for(options, capsys):
    main(replace(options, scores=("true_claims",)))
    assert [r["score"] for r in read(options.out / "honesty" / "lora" / "slope.csv")] == ["true_claims"]
    with pytest.raises(ws.WsError, match="Did you mean 'true_claims'"):
        main(replace(options, scores=("true_claim",)))
