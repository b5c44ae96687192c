"""Sweeps: a failing cell loses nothing, a second run fills only what is missing, the summary covers what is on disk."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

import ws
from support.finished_runs import named, write_run
from ws.analysis.sweep_tables import pooled_rows, render, sweep_rows, write_summary
from ws.behaviors import Claim
from ws.data import generate_pairs, read_pairs
from ws.diff import vector_digest
from ws.eval import sycophancy
from ws.eval.sycophancy import ClaimScores
from ws.files.runs import data_folder, read_csv, run_folder, write_csv
from ws.options.make import QueueConfig, ReplicateConfig, SweepConfig
from ws.run_sweep import Cell, failures, main, run_sweep
from ws.stats import holm


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
    assert "`oft_block` 7" in failed.problem
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


def test_a_sweep_of_which_only_nulls_went_well_shows_no_table_of_another(config, monkeypatch, capsys):
    def cell(made):
        if made.control == "none":
            raise ws.WsError("It is full.")

    monkeypatch.setattr("ws.run_sweep._before_cells", lambda *given: None)
    monkeypatch.setattr("ws.run_sweep.replicate", cell)
    monkeypatch.setattr("ws.run_sweep.verdict", lambda reading: "")
    for name in ("sweep_summary.csv", "sweep_pooled.csv"):
        write_csv(config.out / "honesty" / name, [{"adapter": "earlier"}])
    with pytest.raises(
        ws.WsError, match=r"1 of 2 cells failed: lora .*It is full.*again without `fresh` to retry only"
    ):
        main(replace(config, adapters=("lora",), evals=(), controls=("shuffled",), fresh=True))
    assert "earlier" not in capsys.readouterr().out


def test_fresh_pairs_are_sampled_once_whichever_cell_fails(config, monkeypatch, capsys):
    """They were once left to the first cell, which may fail before it comes to them, and to that of `same-side`."""
    few = replace(config.data, n_topics=8, max_new_tokens=8, keep_truncated=True)
    folder, behavior = data_folder(config.out, "tiny-random", "honesty"), ws.load_behavior("honesty", "tiny-random")
    generate_pairs(*ws.load_model("tiny-random", device="cpu"), behavior, folder, few)
    sampled, cells = list[tuple[str, bool]](), list[ReplicateConfig]()

    def counted(*given):
        sampled.append((given[3].name, given[5]))
        return generate_pairs(*given)

    def cell(made):
        cells.append(made)
        raise ws.WsError("Enough.")

    monkeypatch.setattr("ws.replicate.generate_pairs", counted)
    monkeypatch.setattr("ws.run_sweep.replicate", cell)
    run_sweep(replace(config, fresh=True, evals=(), controls=("same-side",), data=replace(few, n_topics=10)))
    assert sampled == [("honesty", True), ("second", True)]
    assert len(read_pairs(folder)) == 10
    assert [(c.run_name, c.fresh, c.fresh_data) for c in cells] == [
        (name, True, False) for name in ("oft", "oft-same-side", "lora", "lora-same-side")
    ]
    warned = [line for line in capsys.readouterr().err.splitlines() if "will fail" in line]
    assert [("`oft_block` 7" in line, "other settings" in line) for line in warned] == [(True, False)] * 2
    sampled.clear()
    run_sweep(replace(config, fresh=True, evals=(), adapters=("oft",), data=few))
    assert not sampled, "no cell can use them"


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
    text = render(rows)
    lines = [line for line in text.splitlines() if line.startswith("| lora")]
    cell = [[part.strip() for part in line.split("|")[4:7]] for line in lines]
    assert [[bool(part) for part in parts] for parts in cell] == [[False, False, True], [True, False, True]]
    assert "Holm's correction over the shifts of its column" in text
    only = sweep_rows(cells[:2], ALL)
    assert not any(column.startswith("airisk_") for column in only[0]), "no column that is empty throughout"


def test_one_seed_pooled_is_the_seed_itself(cells):
    """Both tables have one interval and one p-value for the same items."""
    alone = {float(r["alpha"]): r for r in sweep_rows(cells[:1], ALL)}
    for row in pooled_rows(cells[:1], ALL, 100):
        for name in ("sycophancy_shift", "airisk_shift", "tinymfv_airisk_delta_wrongness"):
            for part in ("", "_ci_lo", "_ci_hi", "_p", "_p_holm"):
                mine, theirs = row[f"{name}{part}"], alone[row["alpha"]][f"{name}{part}"]
                assert (mine is None) == (theirs is None)
                assert mine is None or float(mine) == pytest.approx(float(theirs)), (name, part)


def test_a_score_without_answers_has_no_star_and_says_why(tmp_path):
    """One seed of two answers with a mass of 0.73, and one whose frames never agree: neither row has a star."""
    for seed in (0, 1):
        write_run(tmp_path, "lora", seed, mass=0.73 if seed else 0.99)
        write_run(tmp_path, "delora", seed, agree=seed == 0)
    cells = [run_folder(tmp_path, "honesty", a, s) for a in ("lora", "delora") for s in (0, 1)]
    rows = {(r["adapter"], r["alpha"]): r for r in pooled_rows(cells, ALL, 200)}
    low, frames = rows["lora", 1.0], rows["delora", 1.0]
    assert (low["sycophancy_mass"], low["sycophancy_unreadable"]) == (pytest.approx(0.73), "answer mass 0.730")
    assert low["sycophancy_shift_p_holm"] < 0.05
    assert frames["tinymfv_airisk_frame_agreement"] == 0
    assert frames["tinymfv_airisk_unreadable"] == "frames agree on 0% of the texts"
    assert low["tinymfv_airisk_unreadable"] is frames["sycophancy_unreadable"] is None
    assert rows["lora", 0.0]["sycophancy_unreadable"] is None, "the base answers"
    text = render(list(rows.values()))
    line = {a: next(x for x in text.splitlines() if x.startswith(f"| {a}") and " +1 " in x) for a in ("lora", "delora")}
    cell = {a: [part.strip()[-1] for part in x.split("|")[4:7]] for a, x in line.items()}
    assert cell == {"lora": ["!", "*", "*"], "delora": ["*", "*", "!"]}
    assert "! supports no conclusion" in text
    assert "answer mass 0.730" in text
    summary = {(r["adapter"], r["seed"], r["alpha"]): r["sycophancy_unreadable"] for r in sweep_rows(cells, ALL)}
    assert summary["lora", "1", 1.0] == "answer mass 0.730"
    assert summary["lora", "0", 1.0] is None


def test_a_small_effect_has_no_star_however_sure_it_is(tmp_path):
    folders = [write_run(tmp_path, "lora", 0, effect=effect) for effect in (-0.15,)]
    rows = pooled_rows(folders, ("sycophancy",), 200)
    assert rows[2]["sycophancy_shift_p_holm"] < 0.05
    text = render(rows)
    assert "]*" not in text
    assert "at least 0.2 nats (0.05 of wrongness)" in text
    assert "whether it comes from the behaviour is not known" in text


def test_tables_of_twelve_null_rows_keep_their_level(tmp_path):
    """Twelve adapters, 12 claims, noise alone: some p survives Holm in 5 % of tables, where 26 % had one before."""
    rng, tables, called = np.random.default_rng(0), 60, {"summary": 0, "pooled": 0}
    claims = [Claim(f"f{i}", f"claim {i}", False, "report") for i in range(12)]
    for _ in range(tables):
        cells = []
        for i in range(12):
            scores = {a: ClaimScores(tuple(claims), rng.normal(size=12), np.ones(12)) for a in (0.0, 1.0)}
            key = {"behavior": "honesty", "adapter": f"a{i}", "seed": 0}
            cells.append(tmp_path / f"a{i}")
            for name, rows in named(sycophancy.tables(key, scores, 20), "sycophancy").items():
                write_csv(cells[-1] / f"sycophancy_{name}.csv", rows)
        for name, rows in (("summary", sweep_rows(cells, ALL[:1])), ("pooled", pooled_rows(cells, ALL[:1], 20))):
            called[name] += min(float(r["sycophancy_shift_p_holm"]) for r in rows if r["alpha"]) < 0.05
    assert max(called.values()) <= binom.ppf(0.999, tables, 0.05), called


def test_seeds_that_were_asked_different_items_are_not_pooled(cells, capsys):
    for file in cells[0].glob("airisk_truthfulness_per_row.csv"):
        write_csv(file, [r for r in read_csv(file) if r["dilemma_idx"] != "0"])
    rows = pooled_rows(cells, ALL, 200)
    assert [r["airisk_shift"] is None for r in rows] == [True] * 3 + [False] * 3
    assert "airisk is not pooled" in capsys.readouterr().err


def relabel(folder, stage, **columns):
    """Give the rows of an evaluation other facts."""
    for file in folder.glob(f"{stage}_*.csv"):
        write_csv(file, [r | columns for r in read_csv(file)])


def test_cells_that_were_asked_in_other_words_do_not_go_into_one_table(cells, tmp_path):
    for folder in cells:
        relabel(folder, "tinymfv_airisk", words="paraphrase", drawn="20 of 131, seed 0")
    write_summary(tmp_path / "sums", cells, ALL, 200)
    for name in ("sweep_summary.csv", "sweep_pooled.csv"):
        rows = read_csv(tmp_path / "sums" / name)
        assert {r["tinymfv_airisk_words"] for r in rows} == {"paraphrase"}
        assert {r["tinymfv_airisk_drawn"] for r in rows} == {"20 of 131, seed 0"}
        assert {r["sycophancy_words"] for r in rows} == {""}, "not on record"
    text = render(rows)
    assert text.count("Words of wrongness: paraphrase, which is this project's and not the published text") == 1
    assert "Items of wrongness: a draw of 20 of 131, seed 0" in text
    relabel(cells[3], "tinymfv_airisk", words="file:theirs@12345678", eval_hash="another")
    for table in (sweep_rows, lambda *a: pooled_rows(*a, 200)):
        with pytest.raises(ws.WsError, match=r"delora/seed-1 was asked other items or words .*file:theirs@12345678"):
            table(cells, ALL)


def test_mistakes_are_found_before_anything_runs(config):
    for change, match in (
        ({"controls": ("same_side",)}, "same-side"),
        ({"adapters": ("loora",)}, "lora"),
        ({"evals": ("sycophanty",)}, "sycophancy"),
    ):
        with pytest.raises(ws.WsError, match=f"Did you mean '{match}'"):
            run_sweep(replace(config, **change))
    for change, match in (
        ({"adapters": ()}, "`adapters` and `seeds` must each name at least one"),
        ({"seeds": ()}, "`adapters` and `seeds` must each name at least one"),
        ({"n_bootstrap": 3}, "`n_bootstrap` must be at least 100"),
        ({"limit": 0}, "`limit` must be at least 1"),
        ({"batch_size": -1}, "`batch_size` must be at least 1"),
        ({"n_think": -1}, "`n_think` must be at least 0"),
        ({"n_think": 0, "evals": ("arithmetic",)}, "`n_think` 0: .*give a thought some tokens"),
        ({"split": "reprot"}, "Did you mean 'report'"),
    ):
        with pytest.raises(ws.WsError, match=match):
            run_sweep(replace(config, **change))
    for change in ({"adapters": ()}, {"seeds": ()}):
        with pytest.raises(ws.WsError, match="at least one"):
            QueueConfig(**change).check()
    assert not list(config.out.iterdir())
