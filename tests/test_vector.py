"""Steering vectors as values and as folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import ws
from conftest import build_adapter, build_model
from ws.diff import vector_digest


@pytest.fixture
def pair(tmp_path):
    """A model and two LoRA vectors of it."""
    model = build_model("qwen3")
    made = []
    for seed in (1, 2):
        build_adapter(model, "lora", tmp_path / str(seed), seed)
        made.append(ws.SteeringVector.from_adapter(tmp_path / str(seed), model))
    return model, made[0], made[1]


def test_vectors_are_values_in_a_vector_space(pair):
    model, a, b = pair
    combined = dict((2 * a - b / 4).dense(model))
    da, db = dict(a.dense(model)), dict(b.dense(model))
    for name, change in combined.items():
        assert torch.allclose(change, 2 * da[name] - db[name] / 4, atol=1e-6)
    assert (a - a).is_zero
    assert (-a).cosine(a) == pytest.approx(-1)
    assert (3 * a).norm() == pytest.approx(3 * a.norm())
    assert a.norm() == pytest.approx(a.norm(model), rel=1e-6)
    assert a.cosine(b) == pytest.approx(a.cosine(b, model), abs=1e-6)


def test_the_recipe_says_how_a_vector_was_made(pair):
    _, a, b = pair
    recipe = (2 * a - b).recipe
    assert recipe["op"] == "+"
    assert recipe["terms"][0]["scalar"] == 2.0
    assert len(recipe["terms"][1]["of"]["sha256"]) == 64
    json.dumps(recipe)


@pytest.mark.parametrize("scalar", [float("nan"), float("inf")])
def test_scalars_must_be_finite(pair, scalar):
    with pytest.raises(ws.WsError):
        pair[1] * scalar
    with pytest.raises(ws.WsError):
        pair[1] / 0


def test_vectors_of_different_bases_do_not_mix(pair, tmp_path):
    _, a, _ = pair
    other = build_model("qwen3")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 1.5
    build_adapter(other, "lora", tmp_path / "other", 1)
    b = ws.SteeringVector.from_adapter(tmp_path / "other", other)
    for operation in (lambda: a + b, lambda: a - b, lambda: a.cosine(b)):
        with pytest.raises(ws.WsError, match="different bases"):
            operation()


def test_a_sum_is_of_the_base_that_any_of_its_terms_knows(pair, tmp_path):
    _, a, _ = pair
    unknown = replace(a, base_fingerprint=None)
    assert (a + a).base_fingerprint == a.base_fingerprint
    other = replace(a, base_fingerprint="of another base")
    for total in (a + unknown, unknown + a, unknown - a):
        assert total.base_fingerprint == a.base_fingerprint
        with pytest.raises(ws.WsError, match="different bases"):
            total + other
    assert (unknown + unknown).base_fingerprint is None


def test_a_sum_says_of_itself_what_holds_for_all_terms(pair):
    _, a, b = pair
    first = replace(a, info={"behavior": "honesty", "family": "lora", "depth": 3, "note": None})
    second = replace(b, info={"behavior": "sycophancy", "family": "lora", "depth": 3})
    for total in (first + second, second - first):
        assert dict(total.info) == {"family": "lora", "depth": 3}


def test_select_keeps_layers_and_kinds(pair):
    _, a, _ = pair
    assert len(a.deltas) == 3 * 7
    assert set(a.select(modules=["q_proj"]).deltas) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert len(a.select(layers=[1]).deltas) == 7
    assert len(a.select(layers="0.3:1.0", modules=["up_proj", "down_proj"]).deltas) == 4
    for wrong in ({"layers": [7]}, {"modules": ["nope"]}):
        with pytest.raises(ws.WsError):
            a.select(**wrong)


def test_compress_records_its_error(pair):
    _model, a, b = pair
    small = (a - b).compress(5)
    assert small.max_rank == 5
    assert 0 < small.recipe["error"] < 1
    assert (a - b).cosine(small) > 0.9
    assert (a - b).compress(99).recipe["error"] == 0
    with pytest.raises(ws.WsError, match="at least 1"):
        a.compress(0)


def test_merge_into_reports_what_the_cast_destroys(pair):
    model, a, _ = pair
    coarse = build_model("qwen3", torch.bfloat16)
    assert a.merge_into(model, 0.5) < 1e-4
    assert a.merge_into(coarse, 0.001) > 0.3


def test_a_tied_weight_is_steered_but_never_merged(tiny):
    model, _ = tiny
    size = model.lm_head.out_features
    vector = ws.SteeringVector({"lm_head": ws.LinearDelta(size, 64, g=torch.ones(size))}, "tiny-random", None)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), ws.steer(model, vector, 1.0):
        steered = model(ids).logits
    with torch.no_grad():
        assert torch.allclose(steered, 2 * model(ids).logits, atol=1e-4)
    with pytest.raises(ws.WsError, match="shares its weight"):
        vector.merge_into(model)


def test_bfloat16_files_are_half_the_size_and_close(pair, tmp_path):
    _, a, _ = pair
    a.save(tmp_path / "exact")
    a.save(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("exact", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    assert ws.SteeringVector.load(tmp_path / "half").cosine(a) > 0.9999


def test_bfloat16_files_keep_what_is_left_of_large_parts(pair, tmp_path):
    """A folder whose factors cancel, as older versions wrote those of PiSSA, is made anew before it is rounded."""
    model, a, _ = pair
    near = {
        n: ws.LinearDelta(d.d_out, d.d_in, u=torch.cat([d.u, -0.99 * d.u], dim=1), v=torch.cat([d.v, d.v + 1e-3]))
        for n, d in a.deltas.items()
    }
    vector = replace(a, deltas=near)
    exact = {n: change.double() for n, change in vector.dense(model.double())}
    vector.save(tmp_path / "whole")
    assert vector_digest(ws.SteeringVector.load(tmp_path / "whole")) == vector_digest(vector)
    vector.save(tmp_path / "half", dtype=torch.bfloat16)
    for name, change in ws.SteeringVector.load(tmp_path / "half").dense(model):
        assert float((change - exact[name]).norm() / exact[name].norm()) < 0.01


def test_saving_replaces_a_vector_but_nothing_else(pair, tmp_path):
    _, a, b = pair
    a.save(tmp_path / "v")
    b.save(tmp_path / "v")
    assert vector_digest(ws.SteeringVector.load(tmp_path / "v")) == vector_digest(b)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    with pytest.raises(ws.WsError, match="not a steering vector"):
        a.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years of work"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_failed_save_leaves_the_old_vector(pair, tmp_path, monkeypatch):
    _, a, b = pair
    a.save(tmp_path / "v")
    monkeypatch.setattr("ws.diff.library_versions", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        b.save(tmp_path / "v")
    assert vector_digest(ws.SteeringVector.load(tmp_path / "v")) == vector_digest(a)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def damaged(tmp_path, vector, how):
    folder = vector.save(tmp_path / "v")
    weights = folder / "adapter_model.safetensors"
    if how == "no manifest":
        (folder / "ws.json").unlink()
        (folder / "adapter_config.json").unlink()
    elif how == "torn manifest":
        (folder / "ws.json").write_text((folder / "ws.json").read_text()[:50])
    elif how == "no weights":
        weights.unlink()
    elif how == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "altered weights":
        tensors = load_file(weights)
        save_file({k: t + 1 for k, t in tensors.items()}, weights)
    elif how == "newer format":
        manifest = json.loads((folder / "ws.json").read_text())
        (folder / "ws.json").write_text(json.dumps(manifest | {"format": 99}))
    elif how == "gone":
        shutil.rmtree(folder)
    return folder


@pytest.mark.parametrize(
    "how",
    ["no manifest", "torn manifest", "no weights", "torn weights", "altered weights", "newer format", "gone"],
)
def test_damaged_folders_are_refused(pair, tmp_path, how):
    with pytest.raises(ws.WsError):
        ws.SteeringVector.load(damaged(tmp_path, pair[1], how))


def test_adapters_that_do_not_fit_are_refused(pair, tmp_path):
    model, _, _ = pair
    folder = tmp_path / "1"
    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    first = next(iter(whole))

    def expect(tensors, match):
        save_file(tensors, weights)
        with pytest.raises(ws.WsError, match=match):
            ws.SteeringVector.from_adapter(folder, model)

    expect({k: t for k, t in whole.items() if k != first}, "lacks")
    expect({**whole, "base_model.model.lm_head.weight": torch.ones(1)}, "cannot place")
    renamed = {k.replace("layers.0", "layers.7"): t for k, t in whole.items()}
    expect(renamed, "no module")
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ws.WsError, match="pickled"):
        ws.SteeringVector.from_adapter(folder, model)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ws.WsError, match="no adapter"):
        ws.SteeringVector.from_adapter(folder, model)


@pytest.mark.parametrize(
    "change",
    [
        {"info": {"behavior": 5}}, {"info": {"behavior": ["x"]}}, {"info": {"depth": "4"}}, {"info": {"family": {}}},
        {"recipe": {"op": "*"}}, {"recipe": {"op": "*", "of": 5, "scalar": 1}}, {"recipe": {"op": "+", "terms": None}},
        {"recipe": {"op": "+", "terms": [{"op": "*", "of": {}, "scalar": "2"}]}}, {"recipe": {"op": ["+"]}},
        {"recipe": {"op": "compose", "of": {}}}, {"recipe": {"adapter": "pos", "config": 5}},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_manifest_says_beside_the_weights_has_its_type(change, tmp_path):
    model = build_model("qwen3")
    build_adapter(model, "lora", tmp_path / "a", 1)
    file = ws.SteeringVector.from_adapter(tmp_path / "a", model).save(tmp_path / "v") / "ws.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"info": {"own": [1]}, "recipe": {"op": "mine", "terms": [{"name": "x"}]}}))
    ws.SteeringVector.load(tmp_path / "v")
    file.write_text(json.dumps(whole | change))
    with pytest.raises(ws.WsError, match="ws.json is damaged"):
        ws.SteeringVector.load(tmp_path / "v")


IMPORT_ORDERS = [
    "import ws; ws.steer; import ws.steer; import ws.diff",
    "import ws.steer, ws",
    "from ws.steer import Dial; import ws",
    "import ws.replicate; import ws",
    "from ws import steer; import ws.steer, ws",
    "import importlib, ws; importlib.import_module('ws.steer')",
]


# Each in a process that has imported what takes long, and nothing of ours.
FORKS = """
import os, sys, types
import peft, torch, transformers
for order in sys.argv[1:]:
    if (child := os.fork()) == 0:
        exec(order + "; from ws.steer import Dial")
        os._exit(not isinstance(ws.steer, types.FunctionType))
    if os.waitpid(child, 0)[1]:
        sys.exit(order)
"""


def test_the_function_steer_survives_every_import_order():
    subprocess.run([sys.executable, "-c", FORKS, *IMPORT_ORDERS], check=True)
    broken = subprocess.run([sys.executable, "-c", FORKS, "import ws; ws.steer = 1"], check=False, capture_output=True)
    assert broken.returncode == 1


@pytest.mark.slow
def test_former_names_of_modules_lead_to_where_they_are_now():
    code = (
        "import warnings, ws\n"
        "from importlib import import_module\n"
        "for old, new in ws._FORMER.items():\n"
        "    with warnings.catch_warnings(record=True) as said:\n"
        "        warnings.simplefilter('always')\n"
        "        assert import_module(f'ws.{old}') is import_module(f'ws.{new}'), old\n"
        "    assert any(f'ws.{old} is now ws.{new}' in str(w.message) for w in said), old\n"
        "assert callable(ws.calibrate) and ws.models is ws.lm.models\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "ws.trim", "--help"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: ws trim")


def test_importing_ws_is_quick_and_lists_its_names():
    code = "import sys, ws; assert 'torch' not in sys.modules; assert 'steer' in dir(ws); print(ws.__all__)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "SteeringVector" in out
    with pytest.raises(AttributeError):
        _ = ws.nonsense


def test_a_runs_folder_opens_as_the_vector_in_it(tmp_path):
    model = build_model("qwen3")
    build_adapter(model, "lora", tmp_path / "a", 1)
    vector = ws.SteeringVector.from_adapter(tmp_path / "a", model)
    vector.save(tmp_path / "run" / "vector")
    assert vector_digest(ws.SteeringVector.load(tmp_path / "run")) == vector_digest(vector)
    (tmp_path / "run" / "vector" / "ws.json").unlink()
    with pytest.raises(ws.WsError, match="not a steering vector"):
        ws.SteeringVector.load(tmp_path / "run")


def test_a_folder_of_runs_is_told_from_a_half_written_vector(tmp_path):
    vector = ws.SteeringVector({"up": ws.LinearDelta(4, 3, u=torch.ones(4, 1), v=torch.ones(1, 3))}, "base", None)
    vector.save(tmp_path / "honesty" / "lora" / "vector")
    assert ws.SteeringVector.load(tmp_path / "honesty" / "lora").deltas.keys() == {"up"}
    with pytest.raises(ws.WsError, match=r"give one that lies below it, such as .*honesty/lora/vector\."):
        ws.SteeringVector.load(tmp_path / "honesty")
    (tmp_path / "honesty" / "lora" / "vector" / "ws.json").unlink()
    with pytest.raises(ws.WsError, match="half-written"):
        ws.SteeringVector.load(tmp_path / "honesty")
