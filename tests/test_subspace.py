"""Where a change lies: planted directions, nulls against simulation and closed forms, the cache, and the command."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from scipy.stats import beta as beta_law
from scipy.stats import kstest

import ws
import ws.subspace as module
from conftest import build_adapter, build_model
from ws import console
from ws.delta import LinearDelta
from ws.lm.models import fingerprint
from ws.options.use import SubspaceOptions
from ws.subspace import (
    BaseSpectra,
    Share,
    beta_p,
    effective_rank,
    haar_null,
    main,
    measure_subspaces,
    pooled_share,
    singular_values,
    stable_rank,
)

DOWN, GATE = "model.layers.1.mlp.down_proj", "model.layers.2.mlp.gate_proj"


def vector_of(deltas) -> ws.SteeringVector:
    return ws.SteeringVector(deltas, "base", None)


def low_rank(u, v) -> LinearDelta:
    return LinearDelta(u.shape[0], v.shape[1], u=u.float(), v=v.float())


# ---- planted directions -----------------------------------------------------------------------------------------


def test_directions_of_the_base_are_found(qwen3, tmp_path):
    w = qwen3.get_submodule(GATE).weight.detach().double()
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    size = torch.tensor([3.0, 2.0, 1.0])
    strong = vector_of({GATE: low_rank(u[:, :3] * size, vh[-3:])})
    (part,) = measure_subspaces(strong, qwen3, BaseSpectra(qwen3, tmp_path), k=3)
    values = {name: share.value for name, share in part.shares.items()}
    want = {"left_top": 1, "left_bottom": 0, "right_top": 0, "right_bottom": 1}
    assert values == pytest.approx(want, abs=1e-5)
    assert part.shares["left_top"].p < 1e-3
    (part,) = measure_subspaces(strong, qwen3, BaseSpectra(qwen3, tmp_path), k=1)
    assert part.shares["left_top"].value == pytest.approx(9 / 14, abs=1e-5)
    assert part.shares["right_bottom"].value == pytest.approx(1 / 14, abs=1e-5)
    assert (part.layer, part.kind, part.energy) == (2, "gate_proj", pytest.approx(14, rel=1e-5))
    assert part.weight_energy == pytest.approx(float(w.square().sum()), rel=1e-5)


def test_the_weak_readout_is_that_of_the_unembedding(qwen3, tmp_path):
    head = qwen3.get_output_embeddings().weight.detach().double()
    weakest = torch.linalg.svd(head, full_matrices=False)[2][-4:].T
    there, away = weakest @ torch.randn(4, 2).double(), torch.randn(32, 2).double()
    away -= weakest @ (weakest.T @ away)
    q = "model.layers.0.self_attn.q_proj"  # 32 x 32, but it writes no residual stream
    deltas = {DOWN: low_rank(there, torch.randn(2, 48)), q: low_rank(there, torch.randn(2, 32))}
    deltas["model.layers.2.self_attn.o_proj"] = low_rank(away, torch.randn(2, 32))
    down, q_part, o_part = measure_subspaces(vector_of(deltas), qwen3, BaseSpectra(qwen3, tmp_path), k=4)
    assert down.shares["readout_weak"].value == pytest.approx(1, abs=1e-5)
    assert o_part.shares["readout_weak"].value == pytest.approx(0, abs=1e-5)
    assert "readout_weak" not in q_part.shares
    assert pooled_share([q_part], "readout_weak") is None


@pytest.mark.parametrize("family", ["ia3", "oft", "dora", "lora"])
def test_shares_and_ranks_are_those_of_the_dense_change(family, tmp_path):
    model = build_model("qwen2")
    build_adapter(model, family, tmp_path / "a", 1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    dense = dict(vector.dense(model))
    for part in measure_subspaces(vector, model, BaseSpectra(model, tmp_path))[::3]:
        change = dense[f"{part.module}.weight"].double()
        u, _, vh = torch.linalg.svd(model.get_submodule(part.module).weight.detach().double(), full_matrices=False)
        s, k = torch.linalg.svdvals(change), part.k
        energy = change.square().sum()
        assert k == max(1, round(0.1 * min(change.shape)))
        want = {"left_top": u[:, :k].T @ change, "right_bottom": change @ vh[-k:].T}
        for name, projected in want.items():
            assert part.shares[name].value == pytest.approx(float(projected.square().sum() / energy), abs=1e-5)
        assert part.energy == pytest.approx(float(energy), rel=1e-4)
        assert part.stable_rank == pytest.approx(float(energy / s[0] ** 2), rel=1e-4)
        concentration = float((s**4).sum() / energy**2)
        assert part.shares["left_top"].null_sd == pytest.approx(haar_null(k, u.shape[0], concentration)[1], rel=1e-3)


def test_ranks_of_known_spectra():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert stable_rank(torch.tensor([2.0, 1, 1])) == pytest.approx(1.5)
    halves = torch.tensor([0.5, 0.25, 0.25]).sqrt()
    assert effective_rank(halves) == pytest.approx(2**1.5), "1.5 bits"
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0
    torch.manual_seed(0)
    u, v, w = torch.randn(9, 3), torch.randn(3, 6), torch.randn(9, 6)
    by_factors = singular_values(LinearDelta(9, 6, u=u, v=v), w)
    assert by_factors.numpy() == pytest.approx(torch.linalg.svdvals(u @ v)[:3].numpy(), rel=1e-5)
    assert len(singular_values(LinearDelta(9, 6, g=torch.ones(9)), w)) == 6


# ---- the null ---------------------------------------------------------------------------------------------------


def random_shares(d: int, k: int, s, n: int, seed: int = 0) -> np.ndarray:
    """Shares in the first `k` directions of `n` matrices with singular values `s` and uniform columns."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, d, len(s))))[0]
    w = np.square(s) / np.square(s).sum()
    return np.einsum("nkr,r->n", np.square(q[:, :k]), w)


SPECTRA = {"one": [1.0], "steep": [5.0, 2, 1, 0.5], "flat": [1.0] * 6, "full": list(np.linspace(3, 0.2, 20))}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [2, 7])
def test_the_moments_of_the_null_are_those_of_simulation(spectrum, k):
    s, n = SPECTRA[spectrum], 8000
    shares = random_shares(20, k, s, n)
    mean, sd = haar_null(k, 20, float((np.array(s) ** 4).sum() / np.square(s).sum() ** 2))
    assert shares.mean() == pytest.approx(mean, abs=5 * sd / n**0.5)
    assert shares.std() == pytest.approx(sd, rel=0.04)


def test_the_null_in_closed_form():
    assert haar_null(3, 10, 0.1)[1] == pytest.approx(0, abs=1e-9), "equal singular values fill every direction alike"
    assert haar_null(4, 4, 0.7) == (1, 0)
    assert haar_null(1, 1, 1.0) == (1, 0)
    share = Share(0.3, *haar_null(3, 30, 1.0))
    exact = beta_law(1.5, 13.5)
    assert share.p == pytest.approx(2 * exact.sf(0.3)), "for rank 1 the Beta distribution is the exact one"
    assert share.z == pytest.approx((0.3 - 0.1) / exact.std())
    assert (Share(1.0, 1.0, 0.0).z, Share(1.0, 1.0, 0.0).p) == (0, 1)


def test_a_gaussian_matrix_has_the_beta_distribution_that_the_docstring_gives():
    """Its variance is the mean of our variance given the singular values, as the conditional mean is constant."""
    d, other, k, n = 8, 5, 3, 4000
    matrices = np.random.default_rng(1).standard_normal((n, d, other))
    squares = np.linalg.svd(matrices, compute_uv=False) ** 2
    concentrations = (squares**2).sum(axis=1) / squares.sum(axis=1) ** 2
    law = beta_law(k * other / 2, (d - k) * other / 2)
    ours = np.mean([haar_null(k, d, c)[1] ** 2 for c in concentrations])
    assert ours == pytest.approx(law.var(), rel=0.01)
    shares = np.square(matrices[:, :k]).sum(axis=(1, 2)) / np.square(matrices).sum(axis=(1, 2))
    assert kstest(shares, law.cdf).pvalue > 0.01


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [2, 7])
def test_chance_is_significant_one_time_in_twenty(spectrum, k):
    """The matched Beta distribution beyond rank 1: 8,000 nulls each, four binomial standard errors at most too often.

    Where few directions are counted and singular values differ it is too careful, 3 times in 100 rather than 5.
    """
    s = SPECTRA[spectrum]
    null = haar_null(k, 20, float((np.array(s) ** 4).sum() / np.square(s).sum() ** 2))
    p = beta_p(random_shares(20, k, s, 8000, seed=5), *null)
    assert 0.025 <= np.mean(p <= 0.05) <= 0.06
    assert np.mean(p <= 0.005) <= 0.0082


def test_vectors_without_meaning_are_not_found_significant(qwen3, tmp_path):
    """200 random vectors over two modules: every share, pooled, at most as often as it may."""
    spectra, rng = BaseSpectra(qwen3, tmp_path), torch.Generator().manual_seed(0)
    bases = {name: (qwen3.get_submodule(name).weight.detach(), spectra.of(name)) for name in (DOWN, GATE)}
    weak, p = {DOWN: spectra.readout()[:, :5], GATE: None}, []
    for _ in range(200):
        parts = []
        for name, (w, spectrum) in bases.items():
            u, v = torch.randn(w.shape[0], 3, generator=rng), torch.randn(3, w.shape[1], generator=rng)
            delta = LinearDelta(*w.shape, u=u * torch.tensor([4.0, 2, 1]), v=v)
            parts.append(module._measure(name, delta, w, spectrum, 5, weak[name]))
        p.append([pooled_share(parts, name).p for name in module.SHARES])
    rates = (np.array(p) <= 0.05).mean(axis=0)
    assert (rates <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5).all()
    assert 0.02 <= rates.mean() <= 0.085


# ---- the cache --------------------------------------------------------------------------------------------------


def test_the_base_is_decomposed_once(qwen3, tmp_path, monkeypatch):
    fresh = BaseSpectra(qwen3, tmp_path)
    spectrum, readout = fresh.of(GATE), fresh.readout()
    w = qwen3.get_submodule(GATE).weight
    assert torch.allclose(spectrum.u * spectrum.s @ spectrum.v.T, w, atol=1e-5)
    assert torch.allclose(readout.T @ readout, torch.eye(32), atol=1e-5)
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    again = BaseSpectra(qwen3, tmp_path)
    assert torch.equal(again.of(GATE).u, spectrum.u)
    assert torch.equal(again.readout(), readout)
    assert not [f for f in fresh.folder.iterdir() if f.suffix != ".safetensors"]
    with torch.no_grad():
        w[0, 0] += 1
    with pytest.raises(TypeError):  # another model's are computed anew
        BaseSpectra(qwen3, tmp_path).of(GATE)


def test_a_damaged_cache_is_computed_again(qwen3, tmp_path, capsys):
    spectra = BaseSpectra(qwen3, tmp_path)
    whole = spectra.of(GATE)
    (file,) = spectra.folder.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (content[:-9], b"", save({"u": torch.ones(2)})):
        file.write_bytes(damaged)
        assert torch.equal(spectra.of(GATE).s, whole.s)
        assert re.search(r"gate_proj.safetensors .*is made again", capsys.readouterr().err)
        assert file.read_bytes() == content


def test_what_cannot_be_measured_is_refused(qwen3, tmp_path):
    spectra, vector = BaseSpectra(qwen3, tmp_path), vector_of({GATE: low_rank(torch.ones(48, 1), torch.ones(1, 32))})
    for wrong in ({"k": 0}, {"k": 17}):
        with pytest.raises(ws.WsError, match=r"`k` \d+ is out of range for .*gate_proj, which has 32"):
            measure_subspaces(vector, qwen3, spectra, **wrong)
    with pytest.raises(ws.WsError, match="`part` 0.7"):
        measure_subspaces(vector, qwen3, spectra, part=0.7)
    with pytest.raises(ws.WsError, match="zero"):
        measure_subspaces(vector - vector, qwen3, spectra)
    with pytest.raises(ws.WsError, match="weights differ"):
        measure_subspaces(replace(vector, base_fingerprint="0123"), qwen3, spectra)
    assert [file.name for file in spectra.folder.iterdir()] == ["unembedding.safetensors"], "of the module nothing"


def test_a_module_that_does_not_change_has_a_row_without_shares(qwen3, tmp_path):
    some, none = low_rank(torch.ones(48, 1), torch.ones(1, 32)), low_rank(torch.zeros(32, 1), torch.ones(1, 48))
    parts = measure_subspaces(vector_of({GATE: some, DOWN: none}), qwen3, BaseSpectra(qwen3, tmp_path))
    rows = module.per_layer_rows({}, parts)
    assert (rows[1]["norm"], rows[1]["effective_rank"], rows[1]["left_top"], rows[1]["left_top_p"]) == (
        0,
        0,
        None,
        None,
    )
    assert module.summary_rows({}, parts)[0]["left_top"] == rows[0]["left_top"]


def test_modules_that_share_one_change_are_measured_once(tiny, tmp_path):
    model, _ = tiny
    table = model.get_input_embeddings().weight
    shared = LinearDelta(*table.shape, e=0.01 * torch.randn(table.shape), kind="embedding")
    query = LinearDelta(64, 64, u=torch.ones(64, 1), v=torch.ones(1, 64))
    modules = {"model.embed_tokens": shared, "lm_head": shared, "model.layers.0.self_attn.q_proj": query}
    vector = ws.SteeringVector(modules, "tiny-random", None)
    parts = measure_subspaces(vector, model, BaseSpectra(model, tmp_path))
    assert [p.kind for p in parts] == ["embed_tokens", "q_proj"]
    assert module.summary_rows({}, parts)[0]["norm"] == pytest.approx(vector.norm(), rel=1e-5)


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def out(tiny, tmp_path) -> Path:
    """Finished runs of two families on the tiny model."""
    model = tiny[0]
    for family in ("lora", "ia3"):
        folder = tmp_path / "honesty" / family
        for seed, side in enumerate(("pos", "neg")):
            build_adapter(model, family, folder / side, seed)
        pos, neg = (ws.SteeringVector.from_adapter(folder / side, model) for side in ("pos", "neg"))
        info = {"behavior": "honesty", "family": family, "seed": 0}
        replace(pos - neg, info=info, base_fingerprint=fingerprint(model)).save(folder / "vector")
    return tmp_path


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_the_command_writes_its_tables_and_resumes(out, tiny, capsys, monkeypatch):
    options = SubspaceOptions(out=out, device="cpu")
    main(options)
    printed = capsys.readouterr().out
    folder = out / "honesty" / "lora"
    modules, summary, pair = (read(folder / f"{n}.csv") for n in ("subspace_per_layer", "subspace_summary", "geometry"))
    for table in (modules, summary, pair):
        assert list(table[0])[:4] == ["behavior", "adapter", "seed", "alpha"]
        assert {(r["behavior"], r["adapter"], r["seed"], r["alpha"]) for r in table} == {
            ("honesty", "lora", "0", "1.0")
        }
    assert (len(modules), len(summary), len(pair)) == (28, 1 + 4 + 7, 1 + 4)
    whole = summary[0]
    vector = ws.SteeringVector.load(folder / "vector")
    assert float(whole["norm"]) == pytest.approx(vector.norm(), rel=1e-5)
    assert float(pair[0]["norm_dw"]) == pytest.approx(vector.norm(), rel=1e-5)
    energies = np.array([float(r["norm"]) ** 2 for r in modules])
    shares = np.array([float(r["left_top"]) for r in modules])
    assert float(whole["left_top"]) == pytest.approx(energies @ shares / energies.sum())
    assert {r["kind"] for r in modules if r["readout_weak"]} == {"o_proj", "down_proj"}
    assert f"{float(pair[0]['cos_opposed']):.3g}" in printed
    assert all("<svg" in (folder / f"subspace_{n}.svg").read_text() for n in ("norms", "shares"))
    monkeypatch.setattr(module, "measure_subspaces", None)
    main(options)
    assert capsys.readouterr().out == printed
    with pytest.raises(TypeError):  # other settings are measured anew
        main(replace(options, k=2))


def test_without_its_arms_a_run_is_still_measured(out, capsys):
    for file in (out / "honesty" / "lora" / "pos").iterdir():
        file.unlink()
    main(SubspaceOptions(out=out, device="cpu"))
    assert "pos/ and neg/ are gone" in capsys.readouterr().out
    assert not (out / "honesty" / "lora" / "geometry.csv").exists()


def test_the_command_compares_runs(out, tiny, capsys):
    main(SubspaceOptions(out=out, all=True, per_layer=True, device="cpu"))
    printed = capsys.readouterr().out
    rows = read(out / "cosines.csv")
    assert list(rows[0])[:4] == ["behavior", "adapter", "seed", "alpha"]
    assert [r["layer"] for r in rows] == ["all", "0", "1", "2", "3"]
    assert (rows[0]["adapter"], rows[0]["other_adapter"]) == ("ia3", "lora")
    ia3, lora = (ws.SteeringVector.load(out / "honesty" / f / "vector") for f in ("ia3", "lora"))
    cosine = ia3.cosine(lora, tiny[0])
    assert float(rows[0]["cosine"]) == pytest.approx(cosine, abs=1e-6)
    assert f"{cosine:+.2f}" in printed
    assert "honesty/ia3/seed-0" in (out / "cosines.svg").read_text()
    lora.save(out / "copy")
    main(SubspaceOptions(out=out, vectors=(out / "honesty" / "lora", out / "copy"), device="cpu"))
    assert [r["cosine"] for r in read(out / "cosines.csv")] == ["1.0"]


def test_the_command_line_says_what_is_missing(out, tmp_path, monkeypatch, capsys):
    def fails(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ws.subspace", "--out", str(tmp_path), "--device", "cpu", *arguments])
        with pytest.raises(SystemExit) as stop:
            console.run(main, SubspaceOptions)
        printed = capsys.readouterr()
        assert (stop.value.code, printed.out) == (2, "")
        return printed.err

    assert "no vector in" in fails("--adapter", "oft")
    assert "--part must lie above 0" in fails("--part", "0")
    assert "give one of them" in fails("--all", "--vectors", "a", "b")
    assert "There are 1 vectors after --vectors" in fails("--vectors", "a")
    assert "no folder" in fails("--vectors", str(tmp_path / "a"), str(tmp_path / "b"))
    vector = ws.SteeringVector.load(out / "honesty" / "lora" / "vector")
    (vector - vector).save(tmp_path / "zero")
    assert "zero is zero" in fails("--vectors", str(tmp_path / "zero"), str(out / "honesty" / "lora"))
