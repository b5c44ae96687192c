"""The whole path on random weights, for every adapter family: shapes, files and restoration, not effects.

Run alone by `just smoke`, which checks shapes and types at run time.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

import ws
from ws.diff import vector_digest
from ws.eval import airisk, tinymfv_airisk
from ws.eval.context import open_context
from ws.eval.readme_airisk_table import CHECKS, COLUMNS, build_table
from ws.new_behavior import behavior_template
from ws.options.make import ReplicateConfig
from ws.options.measure import AiriskOptions
from ws.options.use import TableConfig
from ws.replicate import render, replicate
from ws.report import write_report

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One output folder, so that the families share their pairs as they do in real use."""
    return tmp_path_factory.mktemp("out")


def test_replicate_end_to_end(out, family):
    config = replace(ReplicateConfig.preset("tiny-random", family), out=out, split="dev", alphas=(-1.0, 0.0, 1.0))
    reading = replicate(config)
    folder = out / "honesty" / family
    assert reading.folder == folder
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "pos", "neg", "vector", "manifest.json", "sycophancy_per_claim.csv", "sycophancy_summary.csv", "samples.json",
        "scores",
    }  # fmt: skip

    vector = ws.SteeringVector.load(folder / "vector")
    assert vector_digest(vector) == vector_digest(reading.vector)
    assert vector.info["behavior"] == "honesty"
    model, _ = ws.load_model("tiny-random")
    sides = [ws.SteeringVector.from_adapter(folder / s, model) for s in ("pos", "neg")]
    assert vector_digest(sides[0] - sides[1]) == vector_digest(vector)
    for name, change in vector.dense(model):
        assert change.shape == model.get_parameter(name).shape
        assert torch.isfinite(change).all()

    with (folder / "sycophancy_summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert {r["alpha"] for r in summary} == {"-1.0", "0.0", "1.0"}
    assert all(float(r["shift"]) == 0 for r in summary if r["alpha"] == "0.0")
    assert any(float(r["shift"]) != 0 for r in summary)
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert set(stages) == {"pos", "neg", "vector", "sycophancy", "reading"}
    assert all("outputs" in s for s in stages.values())
    assert "No conclusion" in render(reading), "a random model does not answer Yes or No, and the verdict must say so"

    stamps = {s: (folder / s / "adapter_model.safetensors").stat().st_mtime_ns for s in ("pos", "neg")}
    again = replicate(config)
    assert vector_digest(again.vector) == vector_digest(vector)
    assert stamps == {s: (folder / s / "adapter_model.safetensors").stat().st_mtime_ns for s in stamps}, "resumed"
    with pytest.raises(ws.WsError, match="rank: 4 -> 2"):
        replicate(replace(config, train=replace(config.train, rank=2)))


def test_the_families_share_one_set_of_pairs(out):
    assert sorted(p.name for p in (out / "data").rglob("pairs.jsonl")) == ["pairs.jsonl"]


def test_evaluations_and_table_end_to_end(out):
    """Every family of this module's folder through both evaluations and into the results table."""
    families = sorted(p.parent.name for p in (out / "honesty").glob("*/vector"))
    if not families:
        pytest.skip("no family was replicated before this test")
    for name in families:
        options = AiriskOptions(out=out, adapter=name, limit=3, n_think=6, n_bootstrap=100)
        context = open_context(options)
        assert "Worked example" in context.carry_out(airisk.Airisk.of_run(context)).text
        plain = replace(context, options=replace(options, n_think=None))
        assert "Worked example" in context.carry_out(tinymfv_airisk.TinymfvAirisk.of_run(plain)).text
    rows = build_table(TableConfig(out=out, n_bootstrap=100))
    assert {r["adapter"] for r in rows} == {"base", *families}
    assert all(tuple(r) == (*COLUMNS, *CHECKS) for r in rows)
    assert len(list((out / "base").rglob("airisk_truthfulness-*.json"))) == 1, "one base for all families"


def test_a_behaviour_of_ones_own_goes_the_same_way(tmp_path):
    file = tmp_path / "accuracy.toml"
    file.write_text(behavior_template("accuracy"))
    preset = ReplicateConfig.preset("tiny-random", "lora")
    data = replace(preset.data, n_topics=4)
    reading = replicate(
        replace(preset, behavior=str(file), out=tmp_path / "out", data=data, split="dev", alphas=(-1.0, 0.0, 1.0))
    )
    assert reading.folder == tmp_path / "out" / "accuracy" / "lora"
    assert reading.vector.info["behavior"] == "accuracy"
    assert write_report(tmp_path / "out", str(file)).is_file()
