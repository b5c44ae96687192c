"""Sweeps: a failing cell loses nothing, a second run fills only what is missing, the summary covers what is on disk."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest

import ws
from test_report import write_run
from ws.diff import vector_digest
from ws.eval.stats import holm
from ws.run_sweep import Cell, SweepConfig, failures, main, run_sweep
from ws.runs import read_csv, write_csv
from ws.sweep_tables import pooled_rows, render, sweep_rows, write_summary


@pytest.fixture
def config(tmp_path):
    start = SweepConfig.preset("tiny-random")
    train = replace(start.train, oft_block=7)  # divides no input, so that the oft cell fails
    return replace(
        start,
        out=tmp_path,
        adapters=("oft", "lora"),
        split="dev",
        n_bootstrap=100,
        n_think=6,
        limit=4,
        train=train,
        device="cpu",
    )


def test_cells_that_fail_alike_are_one_sentence(tmp_path):
    missing = [Cell(a, 0, tmp_path / a, problem="The model is not here.") for a in ("ia3", "oft")]
    other = Cell("lora", 1, tmp_path / "lora" / "seed-1", problem="KeyError: 'x'")
    assert failures([*missing, other, Cell("dora", 0, tmp_path)]) == (
        f"3 of 4 cells failed: ia3 seed 0, oft seed 0 (The model is not here; {tmp_path}/ia3/sweep.log); "
        f"lora seed 1 (KeyError: 'x'; {tmp_path}/lora/seed-1/sweep.log)."
    )
    assert failures([Cell("dora", 0, tmp_path)]) == ""


def test_a_failing_cell_is_listed_and_the_next_run_fills_it(config, monkeypatch, capsys):
    failed, fine = run_sweep(config)
    assert "--oft-block 7" in failed.problem
    assert "Traceback" in (failed.folder / "sweep.log").read_text()
    assert fine.problem is None
    with pytest.raises(ws.WsError, match=r"1 of 2 cells failed: oft seed 0 .*sweep.log"):
        main(config)
    assert "lora" in capsys.readouterr().out

    stamp = (fine.folder / "pos" / "adapter_model.safetensors").stat().st_mtime_ns
    per_frame = (fine.folder / "tinymfv_airisk_per_frame.csv").stat().st_mtime_ns
    trained = []
    from ws.train import train_adapter

    monkeypatch.setattr("ws.train.train_adapter", lambda *a, **k: trained.append(a[4]) or train_adapter(*a, **k))
    # oft_block is a setting of every cell, so the finished lora cell would object to another one; only oft is retried.
    mended = replace(config, adapters=("oft",), train=replace(config.train, oft_block=16))
    assert [c.problem for c in run_sweep(mended)] == [None]
    assert trained == ["oft", "oft"]
    assert not (failed.folder / "sweep.log").exists()

    trained.clear()
    assert run_sweep(replace(config, adapters=("lora",)))[0].problem is None
    assert not trained
    assert (fine.folder / "pos" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert (fine.folder / "tinymfv_airisk_per_frame.csv").stat().st_mtime_ns == per_frame, "nothing was scored again"


def test_seeds_share_pairs_and_the_summary_has_one_row_per_cell_and_strength(config):
    cells = run_sweep(replace(config, adapters=("lora", "ia3"), seeds=(0, 1)))
    assert [c.problem for c in cells] == [None] * 4
    assert len(list((config.out / "data").rglob("pairs.jsonl"))) == 1
    assert len(list((config.out / "base").rglob("*.json"))) == 3, "the base is scored once per evaluation"
    with (config.out / "honesty" / "sweep_summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3
    assert list(rows[0])[:4] == ["behavior", "adapter", "seed", "alpha"]
    assert {(r["adapter"], r["seed"]) for r in rows} == {("lora", "0"), ("ia3", "0"), ("lora", "1"), ("ia3", "1")}
    assert all(float(r["sycophancy_shift"]) == float(r["tinymfv_airisk_delta_wrongness"]) == 0 for r in rows[1::3])
    assert len({r["sycophancy_shift"] for r in rows[2::3]}) == 4, "every cell has a vector of its own"
    with (config.out / "honesty" / "sweep_pooled.csv").open() as file:
        pooled = list(csv.DictReader(file))
    assert [(r["adapter"], r["n_seeds"], r["alpha"]) for r in pooled] == [
        (adapter, "2", alpha) for adapter in ("lora", "ia3") for alpha in ("-1.0", "0.0", "1.0")
    ]
    for column in ("sycophancy_shift", "airisk_shift", "tinymfv_airisk_delta_wrongness"):
        seeds = [float(r[column]) for r in rows if r["adapter"] == "lora" and r["alpha"] == "1.0"]
        assert float(pooled[2][column]) == pytest.approx(np.mean(seeds))
        plain, corrected = (float(pooled[2][f"{column}_{p}"]) for p in ("p", "p_holm"))
        assert plain <= corrected <= 1
    assert pooled[1]["sycophancy_shift_p_holm"] == "", "the base is not compared with itself"


def test_nulls_are_trained_beside_their_vectors_and_stay_out_of_the_tables(config):
    wanted = replace(config, adapters=("lora",), evals=("sycophancy",), controls=("shuffled", "same-side"))
    cells = run_sweep(wanted)
    assert [(c.adapter, c.problem) for c in cells] == [(n, None) for n in ("lora", "lora-shuffled", "lora-same-side")]
    digests = {vector_digest(ws.SteeringVector.load(c.folder / "vector")) for c in cells}
    assert len(digests) == 3
    with (config.out / "honesty" / "sweep_summary.csv").open() as file:
        assert {r["adapter"] for r in csv.DictReader(file)} == {"lora"}
    again = run_sweep(replace(wanted, fresh=True))
    assert {vector_digest(ws.SteeringVector.load(c.folder / "vector")) for c in again} == digests, "made anew, the same"


ALL = ("sycophancy", "airisk", "tinymfv_airisk")


@pytest.fixture
def cells(tmp_path):
    """Two adapters with two seeds each, finished, with all three evaluations at -1, 0 and 1."""
    return [write_run(tmp_path, adapter, seed) for adapter in ("lora", "delora") for seed in (0, 1)]


def drop(folder, prefix, alpha=None):
    """Remove an evaluation, or one of its strengths, from a run."""
    for file in folder.glob(f"{prefix}_*.csv"):
        rows = [] if alpha is None else [r for r in read_csv(file) if float(r["alpha"]) != alpha]
        if rows:
            write_csv(file, rows)
        else:
            file.unlink()


def test_strengths_that_one_evaluation_lacks_stay_empty(cells):
    whole = {(r["adapter"], r["alpha"]): r for r in pooled_rows(cells, ALL, 200)}
    drop(cells[0], "airisk_truthfulness", -1.0)
    rows = sweep_rows(cells, ALL)
    assert len(rows) == 4 * 3
    assert len({tuple(r) for r in rows}) == 1, "every row has every column"
    (empty,) = [r for r in rows if r["airisk_shift"] is None]
    assert (empty["adapter"], empty["seed"], empty["alpha"]) == ("lora", "0", -1.0)
    assert empty["sycophancy_shift"] is not None
    for name, n in (("sycophancy_shift", 8), ("airisk_shift", 7)):
        tested = [r for r in rows if r["alpha"] != 0 and r[f"{name}_p"] is not None]
        assert len(tested) == n
        corrected = holm(np.array([float(r[f"{name}_p"]) for r in tested]))
        assert [r[f"{name}_p_holm"] for r in tested] == pytest.approx(list(corrected))
    pooled = {(r["adapter"], r["alpha"]): r for r in pooled_rows(cells, ALL, 200)}
    assert pooled.keys() == whole.keys()
    assert pooled["lora", -1.0]["airisk_shift"] is None, "one of its two seeds lacks it"
    assert pooled["lora", 1.0]["airisk_shift"] == whole["lora", 1.0]["airisk_shift"]
    assert pooled["lora", -1.0]["sycophancy_shift_p_holm"] == whole["lora", -1.0]["sycophancy_shift_p_holm"]


def test_tables_with_holes_are_written_and_rendered(cells, tmp_path):
    for folder in cells[:2]:
        drop(folder, "airisk_truthfulness")
        drop(folder, "sycophancy", -1.0)
    write_summary(tmp_path / "sums", cells, ALL, 200)
    rows = read_csv(tmp_path / "sums" / "sweep_pooled.csv")
    assert [(r["adapter"], float(r["alpha"])) for r in rows] == [
        (adapter, alpha) for adapter in ("lora", "delora") for alpha in (-1.0, 0.0, 1.0)
    ]
    assert {r["airisk_level"] == "" for r in rows if r["adapter"] == "lora"} == {True}
    text = render(rows, 200)
    lines = [line for line in text.splitlines() if line.startswith("| lora")]
    cell = [[part.strip() for part in line.split("|")[4:-1]] for line in lines]
    assert [[bool(part) for part in parts] for parts in cell] == [[False, False, True], [True, False, True]]
    assert "Holm's correction over the shifts of its column" in text
    only = sweep_rows(cells[:2], ALL)
    assert not any(column.startswith("airisk_") for column in only[0]), "no column that is empty throughout"


def test_seeds_that_were_asked_different_items_are_not_pooled(cells, capsys):
    for file in cells[0].glob("airisk_truthfulness_per_row.csv"):
        write_csv(file, [r for r in read_csv(file) if r["dilemma_idx"] != "0"])
    rows = pooled_rows(cells, ALL, 200)
    assert [r["airisk_shift"] is None for r in rows] == [True] * 3 + [False] * 3
    assert "airisk is not pooled" in capsys.readouterr().err


def test_mistakes_are_found_before_anything_runs(config):
    for change, match in (
        ({"controls": ("same_side",)}, "same-side"),
        ({"adapters": ("loora",)}, "lora"),
        ({"evals": ("sycophanty",)}, "sycophancy"),
    ):
        with pytest.raises(ws.WsError, match=f"Did you mean '{match}'"):
            run_sweep(replace(config, **change))
    assert not list(config.out.iterdir())
