"""Cosines and pair diagnostics against plain dense computations, planted vectors and sampled nulls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import ws
import ws.analysis.geometry as module
from conftest import FAMILY_NAMES, build_adapter, build_model
from ws.analysis.geometry import (
    StoredVector,
    by_layer,
    cosine_matrix,
    cosines,
    heat_map,
    inner_products,
    labels,
    open_vector,
    pair_geometry,
    pair_rows,
)
from ws.delta import LinearDelta
from ws.files.plots import save_svg

UP = "model.layers.1.mlp.up_proj"


def flat(vector, model) -> torch.Tensor:
    """Every number of the change in one row, absent ones as zeros."""
    found = dict(vector.dense(model))
    shapes = {n: p.shape for n, p in model.named_parameters() if ".layers." in n}
    return torch.cat([found.get(n, torch.zeros(s)).double().flatten() for n, s in shapes.items()])


def dense_cosines(vectors, model) -> np.ndarray:
    rows = torch.stack([flat(v, model) for v in vectors])
    rows = rows / rows.norm(dim=1, keepdim=True)
    return (rows @ rows.T).numpy()


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A model with biases and a vector of every family for it."""
    folder = tmp_path_factory.mktemp("six")
    model = build_model("qwen2")
    for family in FAMILY_NAMES:
        for seed in (1, 2):
            build_adapter(model, family, folder / f"{family}-{seed}", seed)
    pairs = {f: [ws.SteeringVector.from_adapter(folder / f"{f}-{s}", model) for s in (1, 2)] for f in FAMILY_NAMES}
    return model, pairs


# ---- cosines ----------------------------------------------------------------------------------------------------


def test_a_factor_without_columns_is_a_change_of_nothing():
    rng = torch.Generator().manual_seed(0)

    def vector(rank: int) -> ws.SteeringVector:
        u, v = torch.randn(4, rank, generator=rng), torch.randn(rank, 3, generator=rng)
        return ws.SteeringVector({UP: LinearDelta(4, 3, u=u, v=v)}, "acme/model", "f" * 16)

    full, empty, other = vector(2), vector(0), vector(1)
    for vectors in ([empty, full, other], [full, empty, other], [full, other, empty]):
        dense = torch.stack([v.deltas[UP].dense(torch.zeros(4, 3)).double().flatten() for v in vectors])
        (weights,) = inner_products(vectors)
        np.testing.assert_allclose(weights.matrix, (dense @ dense.T).numpy(), atol=1e-6)


def test_the_cosines_of_all_families_are_those_of_dense_vectors(six):
    model, pairs = six
    vectors = [p - n for p, n in pairs.values()] + [pairs["lora"][0]]
    assert cosine_matrix(vectors, model).cosine == pytest.approx(dense_cosines(vectors, model), abs=1e-5)
    products = inner_products(vectors, model)
    for layer, part in by_layer(products).items():
        here = [v.select(layers=[layer]) for v in vectors]
        assert cosines(part).cosine == pytest.approx(dense_cosines(here, model), abs=1e-5)
    assert any(p.parameter.endswith(".bias") for p in products), "ia3 changes biases"


def test_low_rank_vectors_need_no_model_and_dense_ones_say_so(six):
    model, pairs = six
    low = [pairs[f][0] for f in ("lora", "pissa", "delora")]
    assert cosine_matrix(low).cosine == pytest.approx(dense_cosines(low, model), abs=1e-5)
    with pytest.raises(ws.WsError, match="pass the base model"):
        cosine_matrix([*low, pairs["oft"][0]])


def test_no_more_is_formed_than_one_layer(six, monkeypatch):
    model, pairs = six
    formed, dense = [], LinearDelta.dense

    def counted(delta, weight):
        formed.append(weight.numel())
        return dense(delta, weight)

    monkeypatch.setattr(LinearDelta, "dense", counted)
    vectors = [pairs[f][0] for f in FAMILY_NAMES]
    inner_products([v.select(modules=["up_proj"]) for v in vectors if any("up_proj" in n for n in v.deltas)], model)
    (largest,) = {model.get_submodule(UP).weight.numel()}
    assert max(formed) * 5 <= largest, "five vectors change up_proj, and are formed together"
    assert sum(formed) == 3 * 5 * largest, "once per vector, not once per pair"
    formed.clear()
    inner_products([pairs[f][0] for f in ("lora", "pissa", "delora")], model)
    assert not formed


def test_vectors_are_read_from_disk_a_layer_at_a_time(six, tmp_path, monkeypatch):
    model, pairs = six
    vectors = [p - n for p, n in pairs.values()]
    folders = [v.save(tmp_path / str(i) / "vector") for i, v in enumerate(vectors)]
    stored = [open_vector(folders[0]), *(open_vector(f.parent) for f in folders[1:])]
    assert all(isinstance(v, StoredVector) for v in stored)
    monkeypatch.setattr(ws.SteeringVector, "load", None)
    assert np.array_equal(cosine_matrix(stored, model).cosine, cosine_matrix(vectors, model).cosine)
    asked = []
    monkeypatch.setattr(StoredVector, "read", lambda _, names: asked.append(list(names)) or {})
    inner_products(stored, model)
    assert [{name.split(".")[2] for name in names} for names in asked[:: len(stored)]] == [{"0"}, {"1"}, {"2"}]


def test_a_foreign_lora_is_compared_too(six, tmp_path):
    model, pairs = six
    vector = pairs["lora"][0]
    vector.save(tmp_path / "mine")
    (tmp_path / "mine" / "ws.json").unlink()
    foreign = open_vector(tmp_path / "mine")
    assert cosine_matrix([vector, foreign], model).cosine[0, 1] == pytest.approx(1.0)


def test_planted_cosines(qwen3):
    torch.manual_seed(0)

    def vector(u, v):
        return ws.SteeringVector({UP: LinearDelta(48, 32, u=u, v=v)}, "base", None)

    u, v = torch.linalg.qr(torch.randn(48, 2))[0], torch.linalg.qr(torch.randn(32, 2))[0].T
    a, b = vector(u[:, :1], v[:1]), vector(u[:, 1:], v[1:])
    elsewhere = ws.SteeringVector({"model.layers.0.mlp.up_proj": LinearDelta(48, 32, u=u, v=v)}, "base", None)
    found = cosine_matrix([a, b, 3 * a + 4 * b, -a, elsewhere])
    assert found.cosine[0] == pytest.approx([1, 0, 0.6, -1, 0], abs=1e-6)
    assert found.norms == pytest.approx([1, 1, 5, 1, 2**0.5])
    assert found.random_sd[0, 1] == pytest.approx((48 * 32) ** -0.5)
    assert found.random_sd[0, 4] == 0, "they share no module, and cannot but be orthogonal"
    assert np.isnan(cosines(by_layer(inner_products([a, elsewhere]))[0]).cosine[0, 1]), "nothing there to compare"


def test_the_random_cosine_is_that_of_vectors_turned_at_random():
    """Two modules of unequal size and weight, turned on both sides: 40 times 40 pairs."""
    rng = torch.Generator().manual_seed(3)

    def haar(n):
        q, r = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))
        return q * r.diagonal().sign()

    spectra = {"a": (9, 6, [3.0, 1.0]), "b": (5, 7, [0.5, 0.5, 0.2])}

    def drawn(scale):
        deltas = {}
        for name, (d_out, d_in, s) in spectra.items():
            left, right = haar(d_out)[:, : len(s)], haar(d_in)[: len(s)]
            deltas[name] = LinearDelta(d_out, d_in, u=left * torch.tensor(s) * scale.get(name, 1), v=right)
        return ws.SteeringVector(deltas, "base", None)

    n = 40
    found = cosine_matrix([*(drawn({}) for _ in range(n)), *(drawn({"b": 4}) for _ in range(n))])
    values, sd = found.cosine[:n, n:], found.random_sd[0, n]
    assert np.std(values) == pytest.approx(sd, rel=0.08), "four standard errors of a sampled sd"
    assert abs(values.mean()) < 4 * sd / n


# ---- pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_diagnostics_of_a_pair_are_those_of_dense_arms(six, family):
    model, pairs = six
    pos, neg = (flat(v, model) for v in pairs[family])
    found = pair_geometry(inner_products(pairs[family], model))
    contrast, drift = (pos - neg) / 2, (pos + neg) / 2
    want = {
        "norm_pos": pos.norm(),
        "norm_neg": neg.norm(),
        "norm_dw": (pos - neg).norm(),
        "cos_opposed": pos @ -neg / pos.norm() / neg.norm(),
        "norm_ratio": pos.norm() / neg.norm(),
        "drift_ratio": drift.norm() / contrast.norm(),
        "cos_drift": (contrast @ drift).abs() / contrast.norm() / drift.norm(),
    }
    for name, value in want.items():
        assert getattr(found, name) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_planted_pairs(six):
    _, pairs = six
    a, b = pairs["lora"]

    def geometry(pos, neg):
        return pair_geometry(inner_products([pos, neg]))

    opposed = geometry(a, -a)
    assert (opposed.cos_opposed, opposed.norm_ratio) == pytest.approx((1, 1))
    assert (opposed.drift_ratio, opposed.cos_drift) == (0, None)
    assert geometry(a, -(0.5 * a)).cos_drift == pytest.approx(1)
    drifted = geometry(100 * b + a, 100 * b - a)
    assert drifted.drift_ratio == pytest.approx(100 * b.norm() / a.norm(), rel=1e-3)
    same = geometry(a, a)
    assert (same.cos_opposed, same.norm_dw, same.drift_ratio) == (pytest.approx(-1), 0, None)
    one_sided = geometry(a, 0 * a)
    assert (one_sided.cos_opposed, one_sided.norm_ratio, one_sided.random_sd) == (None, None, None)
    assert (one_sided.drift_ratio, one_sided.cos_drift) == pytest.approx((1, 1))


def test_the_rows_of_a_pair_are_the_whole_and_its_layers(six):
    model, pairs = six
    rows = pair_rows({"behavior": "honesty"}, inner_products(pairs["dora"], model))
    assert [r["layer"] for r in rows] == ["all", 0, 1, 2]
    assert sum(r["norm_dw"] ** 2 for r in rows[1:]) == pytest.approx(rows[0]["norm_dw"] ** 2)


# ---- names, pictures, refusals ----------------------------------------------------------------------------------


def test_labels_say_what_vectors_are_or_where(six, tmp_path):
    _, pairs = six
    a, b = (replace(v, info={"behavior": "honesty", "family": "lora", "seed": s}) for s, v in enumerate(pairs["lora"]))
    places = [tmp_path / "x", tmp_path / "y"]
    assert labels([a, b], places) == ["honesty/lora/seed-0", "honesty/lora/seed-1"]
    assert labels([a, a], places) == [str(p) for p in places]
    assert labels([a, pairs["lora"][1]], places) == [str(p) for p in places]


def test_the_same_picture_gives_the_same_bytes(tmp_path):
    values = np.array([[1.0, -0.5], [np.nan, 1.0]])
    files = [
        save_svg(heat_map(values, ["a", "b"], ["c", "d"], "title", diverging=True), tmp_path / f"{i}.svg")
        for i in range(2)
    ]
    first, second = (f.read_text() for f in files)
    assert first == second
    assert "-0.50" in first
    assert "nan" not in first
    assert first.count(">1.00<") >= 2
    assert "title" in first
    assert not [f for f in tmp_path.iterdir() if f.suffix != ".svg"]


def test_what_cannot_be_compared_is_refused(six, tmp_path):
    model, pairs = six
    a, b = pairs["lora"]
    with pytest.raises(ws.WsError, match="no vectors"):
        inner_products([])
    with pytest.raises(ws.WsError, match=r"different bases, .*\(0123\)"):
        inner_products([a, replace(b, base_fingerprint="0123")])
    with pytest.raises(ws.WsError, match="weights differ"):
        inner_products([a], build_model("qwen3"))
    with pytest.raises(ws.WsError, match="Vector 2 of 2 is zero"):
        cosine_matrix([a, b - b])
    small = ws.SteeringVector({UP: LinearDelta(8, 8, g=torch.ones(8))}, "base", None)
    with pytest.raises(ws.WsError, match=rf"{UP} as a layer of \(48, 32\) and of \(8, 8\)"):
        inner_products([a, small])
    with pytest.raises(ws.WsError, match="this model does not have"):
        inner_products([small], model)
    with pytest.raises(ws.WsError, match="no folder"):
        open_vector(tmp_path / "nowhere")
    packed = build_model("qwen2").get_submodule(UP)
    packed.weight = torch.nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ws.WsError, match=r"up_proj stores uint8 .* unquantised"):
        module.plain_weight(UP, packed)
