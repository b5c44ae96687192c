"""Trimming: what is kept, what is lost and how that is reported, against dense computations."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ws
from conftest import build_adapter, build_model
from ws.analysis.trim import losses, main, render, scale_depth, total_error, trim
from ws.delta import LinearDelta
from ws.diff import vector_digest
from ws.lm.models import fingerprint, layer_of, weight_of
from ws.options.make import TrimOptions


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A model and a vector of several families."""
    model, folder = build_model("qwen3"), tmp_path_factory.mktemp("adapters")
    found = {}
    for family in ("lora", "dora", "ia3"):
        build_adapter(model, family, folder / family, seed=3)
        found[family] = ws.SteeringVector.from_adapter(folder / family, model)
    return model, found


def dense(vector: ws.SteeringVector, model) -> dict[str, np.ndarray]:
    return {name: change.double().numpy() for name, change in vector.dense(model)}


# ---- compression ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 12), st.floats(1e-3, 1.0), st.integers(0, 10**6))
def test_energy_is_kept_with_as_few_columns_as_possible(rank: int, energy: float, seed: int):
    """Against numpy's singular values of the product itself, also where there are more columns than rows."""
    rng = torch.Generator().manual_seed(seed)
    u, v = torch.randn(7, rank, generator=rng) * torch.logspace(0, -2, rank), torch.randn(rank, 9, generator=rng)
    small, error = LinearDelta(7, 9, u=u, v=v).compress(energy=energy)
    assert small.u is not None
    assert small.v is not None
    whole, kept = (u.double() @ v.double()).numpy(), (small.u.double() @ small.v.double()).numpy()
    squares = np.linalg.svd(whole, compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    assert shares[min(small.rank, 7) - 1] >= energy - 1e-12
    if small.rank > 1:
        assert shares[small.rank - 2] < energy + 1e-12
    assert error == pytest.approx(np.linalg.norm(whole - kept) / np.linalg.norm(whole), abs=1e-6)
    assert error == pytest.approx(np.sqrt(max(0, 1 - shares[min(small.rank, 7) - 1])), abs=1e-6)


def test_planted_singular_values_give_the_rank_by_hand():
    """Energies 16, 4 and 4: two thirds, five sixths, all."""
    u, v = torch.eye(5)[:, :3] * torch.tensor([4.0, 2.0, 2.0]), torch.eye(4)[:3]
    delta = LinearDelta(5, 4, u=u, v=v)
    ranks = {energy: delta.compress(energy=energy)[0].rank for energy in (0.1, 0.66, 0.67, 0.83, 0.84, 1.0)}
    assert ranks == {0.1: 1, 0.66: 1, 0.67: 2, 0.83: 2, 0.84: 3, 1.0: 3}
    assert delta.compress(energy=0.6)[1] == pytest.approx((8 / 24) ** 0.5)
    assert delta.compress(energy=1)[0] is delta
    nothing = LinearDelta(5, 4, u=torch.zeros(5, 2), v=torch.ones(2, 4))
    assert nothing.compress(energy=0.5) == (nothing, 0.0) or nothing.compress(energy=0.5)[0].is_zero


def test_the_total_error_is_that_of_the_whole_vector(vectors):
    model, found = vectors
    vector = found["lora"]
    for small in (vector.compress(rank=2), vector.compress(energy=0.7)):
        before, after = dense(vector, model), dense(small, model)
        lost = np.sqrt(sum(np.square(before[n] - after[n]).sum() for n in before))
        size = np.sqrt(sum(np.square(c).sum() for c in before.values()))
        assert small.recipe["total_error"] == pytest.approx(lost / size, rel=1e-5)
        errors = small.recipe["errors"]
        for name, error in errors.items():
            change = before[f"{name}.weight"]
            wanted = np.linalg.norm(change - after[f"{name}.weight"]) / np.linalg.norm(change)
            assert error == pytest.approx(wanted, rel=1e-4)
        assert small.recipe["error"] == max(errors.values())
        assert 0 < small.recipe["total_error"] < small.recipe["error"] < 1
    assert vector.compress(energy=0.7).recipe["energy"] == 0.7
    assert "rank" not in vector.compress(energy=0.7).recipe


def test_only_the_low_rank_part_is_compressed(vectors):
    model, found = vectors
    vector = found["dora"]
    small = vector.compress(rank=1)
    for name, delta in vector.deltas.items():
        assert torch.equal(small.deltas[name].g, delta.g)
        assert small.deltas[name].rank == 1
        product, kept = delta.u @ delta.v, small.deltas[name].u @ small.deltas[name].v
        assert small.recipe["errors"][name] == pytest.approx(float((product - kept).norm() / product.norm()), rel=1e-4)
    lost, size = (small - vector).norm(model), vector.norm(model)
    weights = {name: weight_of(module) for name, _, module in vector.matched(model)}
    assert total_error(losses(vector, small, weights)) == pytest.approx(lost / size, rel=1e-6)
    with pytest.raises(ws.WsError, match=r"family: ia3\) has a low-rank part"):
        found["ia3"].compress(rank=1)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "either a rank or a share"),
        ({"rank": 2, "energy": 0.5}, "either a rank or a share"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 0.0}, "above 0 and up to 1"),
        ({"energy": 1.5}, "above 0 and up to 1"),
        ({"energy": float("nan")}, "above 0 and up to 1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(vectors, asked, why):
    for family in ("lora", "ia3"):
        with pytest.raises(ws.WsError, match=why):
            vectors[1][family].compress(**asked)


# ---- depth ------------------------------------------------------------------------------------------------------


def test_layers_are_scaled_linearly_with_their_depth(vectors):
    model, found = vectors
    for vector in found.values():
        scaled, before = dense(scale_depth(vector, 0.5, 2.0), model), dense(vector, model)
        for name, change in before.items():
            factor = {0: 0.5, 1: 1.25, 2: 2.0}[layer_of(name)]
            assert np.allclose(scaled[name], factor * change, atol=1e-6)
        assert scale_depth(vector, 0.5, 2.0).recipe == {
            "op": "scale_depth",
            "first": 0.5,
            "last": 2.0,
            "of": vector.recipe,
        }


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_scaling_is_linear_in_the_vector_and_in_the_factors(vectors, first: float, last: float, alpha: float):
    model, found = vectors
    vector = found["lora"].select(modules=["q_proj"])
    scaled = scale_depth(vector, first, last)
    for same in (
        scale_depth(alpha * vector, first, last) - alpha * scaled,
        scale_depth(vector, first, first) - first * vector,
        scale_depth(vector, first, last) + scale_depth(vector, 1 - first, 1 - last) - vector,
    ):
        assert same.norm(model) <= 1e-4 * vector.norm(model)


def test_modules_outside_the_layers_stay_and_the_depth_is_the_bases(tiny):
    model, _ = tiny
    size, ones = model.lm_head.out_features, torch.ones(64, 1)
    deltas = {
        "lm_head": LinearDelta(size, 64, u=torch.ones(size, 1), v=torch.ones(1, 64)),
        "model.layers.1.self_attn.q_proj": LinearDelta(64, 64, u=ones, v=ones.T),
    }
    vector = ws.SteeringVector(deltas, "tiny-random", fingerprint(model))
    for info, factor in (({}, 3.0), ({"depth": 4}, 5 / 3)):
        scaled = scale_depth(replace(vector, info=info), 1.0, 3.0)
        assert torch.equal(scaled.deltas["lm_head"].u, deltas["lm_head"].u)
        assert torch.allclose(scaled.deltas["model.layers.1.self_attn.q_proj"].u, factor * ones)
    with pytest.raises(ws.WsError, match="must be finite"):
        scale_depth(vector, 1.0, float("inf"))


def test_what_tied_modules_share_is_lost_once(tiny):
    model, _ = tiny
    table, query = model.get_input_embeddings().weight, "model.layers.0.self_attn.q_proj"
    shared = LinearDelta(*table.shape, e=torch.full(table.shape, 0.01), kind="embedding")
    d_out, d_in = model.get_submodule(query).weight.shape
    low = LinearDelta(d_out, d_in, u=torch.ones(d_out, 1), v=torch.ones(1, d_in) / 100)
    vector = ws.SteeringVector({"model.embed_tokens": shared, "lm_head": shared, query: low}, "tiny-random", None)
    small = vector.select(modules=["q_proj"])
    lost = losses(vector, small, {})
    assert [m.module for m in lost] == ["model.embed_tokens", query]
    assert total_error(lost) == pytest.approx((small - vector).norm() / vector.norm(), rel=1e-6)
    said = render(lost, vector, small)
    assert "2 modules are left out" in said
    assert f"{d_out + d_in:,} numbers instead of {table.numel() + d_out + d_in:,} (" in said
    apart = losses(vector, vector.select(modules=["lm_head", "q_proj"]), {})
    assert [m.error for m in apart] == [1.0, 0.0, 0.0], "what only one of them loses is another change"


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny, tmp_path):
    """`out/` with a LoRA-like honesty vector of the tiny model."""
    model, _ = tiny
    torch.manual_seed(0)
    deltas = {}
    for layer in range(4):
        for kind in ("self_attn.q_proj", "mlp.up_proj"):
            module = model.get_submodule(f"model.layers.{layer}.{kind}")
            d_out, d_in = module.out_features, module.in_features
            u, v = torch.randn(d_out, 5), torch.randn(5, d_in) / 30
            deltas[f"model.layers.{layer}.{kind}"] = LinearDelta(d_out, d_in, u=u, v=v)
    info = {"depth": 4, "family": "lora", "behavior": "honesty"}
    vector = ws.SteeringVector(deltas, "tiny-random", fingerprint(model), {"made": "here"}, info)
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    return tmp_path, vector


def test_the_steps_come_in_their_order(run):
    _, vector = run
    options = TrimOptions(layers="0.5:1.0", modules=("q_proj",), depth_scale=(0.0, 3.0), rank=2)
    expected = scale_depth(vector.select("0.5:1.0", ["q_proj"]), 0.0, 3.0).compress(2)
    assert vector_digest(trim(vector, options)) == vector_digest(expected)
    assert set(expected.deltas) == {f"model.layers.{i}.self_attn.q_proj" for i in (2, 3)}
    assert options.name == "lora_layers-0.5-1.0_modules-q_proj_depth-0-3_rank-2"


def test_the_command_files_a_run_and_says_what_is_lost(run, tiny, capsys):
    model, _ = tiny
    out, vector = run
    main(TrimOptions(out=out, layers="1,2", energy=0.8, to="small"))
    printed, folder = capsys.readouterr().out, out / "honesty" / "small"
    small = ws.SteeringVector.load(folder / "vector")
    assert vector_digest(small) == vector_digest(vector.select("1,2").compress(energy=0.8))
    before, after = dense(vector, model), dense(small, model)
    with (folder / "trimming.csv").open() as handle:
        rows = {r["module"]: r for r in csv.DictReader(handle)}
    assert set(rows) == set(vector.deltas)
    for name, row in rows.items():
        change, left = before[f"{name}.weight"], after.get(f"{name}.weight", 0.0)
        assert float(row["size"]) == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert float(row["lost"]) == pytest.approx(np.linalg.norm(change - left), rel=1e-4)
        kept = layer_of(name) in (1, 2)
        assert float(row["error"]) == pytest.approx(small.recipe["errors"][name] if kept else 1.0, abs=1e-5)
        assert (int(row["rank_before"]), int(row["rank"])) == (5, small.deltas[name].rank if kept else 0)
    lost = np.sqrt(sum(np.square(c - after.get(n, 0.0)).sum() for n, c in before.items()))
    size = np.sqrt(sum(np.square(c).sum() for c in before.values()))
    assert f"differs from the original by {lost / size:.4f} of its Frobenius norm" in printed
    assert "4 modules are left out" in printed
    from ws.run import open_run

    assert vector_digest(open_run(out, "honesty", "small", 0, None, "cpu").vector) == vector_digest(small)
    with pytest.raises(ws.WsError, match="`fresh`"):
        main(TrimOptions(out=out, rank=1, to="small"))
    main(TrimOptions(out=out, rank=1, to="small", fresh=True))
    assert ws.SteeringVector.load(folder / "vector").max_rank == 1


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "nothing to trim"),
        ({"rank": 2, "energy": 0.5}, "either `rank` or `energy`"),
        ({"layers": "9"}, "out of range"),
        ({"modules": ("q_proj", "qproj")}, "no module kind of the vector named 'qproj'. Did you mean 'q_proj'"),
        ({"modules": ("k_proj",)}, "no module kind of the vector named 'k_proj'"),
        ({"depth_scale": (0.0, 0.0)}, "Nothing is left"),
        ({"adapter": "oft", "rank": 2}, "no vector"),
        ({"rank": 2, "to": "lora"}, "cannot name this run"),
    ],
)
def test_bad_options_are_refused(run, asked, why):
    with pytest.raises(ws.WsError, match=why):
        main(TrimOptions(out=run[0], **asked))
    assert [f.name for f in (run[0] / "honesty").iterdir()] == ["lora"]


# ---- the published curve ----------------------------------------------------------------------------------------


def test_the_documented_tables_are_those_of_the_benchmark():
    root = Path(__file__).parents[2]
    from benchmarks.trimming import render

    rows = json.loads((root / "benchmarks" / "results" / "trimming.json").read_text())["results"]["rows"]
    assert render(rows) in (root / "docs" / "trimming.md").read_text()


def test_own_directions_and_their_controls_are_what_they_are_called(monkeypatch, vectors):
    """All directions are the vector again, parts are orthogonal, and every control has the norms of the whole."""
    from benchmarks.trimming import pick, rank_conditions, rescaled, singular_factors

    model, found = vectors
    vector = replace(found["lora"], base_fingerprint=fingerprint(model)) * 0.5
    factors = singular_factors(vector)
    assert (pick(vector, factors, [0, 1, 2, 3]) - vector).norm() < 1e-4 * vector.norm()
    top, bottom = pick(vector, factors, [0]), pick(vector, factors, [-3, -2, -1])
    assert abs(top.inner(bottom)) < 1e-4 * top.norm() * bottom.norm()
    assert top.norm() == pytest.approx(vector.compress(rank=1).norm(), rel=1e-4)
    big = rescaled(top, vector)
    assert [d.norm() for d in big.deltas.values()] == pytest.approx([d.norm() for d in vector.deltas.values()])
    monkeypatch.setattr("benchmarks.trimming.RANKS", (1, 2))
    for label, made in rank_conditions(vector, model, seed=0, draws=2):
        same = made.norm() == pytest.approx(vector.norm(), rel=1e-4)
        assert same != (label["kind"] == "top, as it is")
        assert made.max_rank == label["rank"]
