"""Results that a benchmark keeps in the repository, item by item, so that another machine goes on with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from benchmarks import smollm2

from ws.analysis.compare_tables import Cell, Group, group_rows
from ws.eval.readable import FLAG, Readability


def cell(adapter: str, seed: int) -> Cell:
    rng = np.random.default_rng(seed)
    scores = {sign: sign + rng.standard_normal(12) for sign in (-1, 0, 1)}
    return Cell(
        intervention="weight",
        adapter=adapter,
        seed=seed,
        matched=True,
        alphas={-1: -1.25, 1: 0.75},
        divergence={-1: 1.01, 1: 0.98},
        scores={"preference": scores},
        nulls={"shuffled": {"preference": {sign: rng.standard_normal(12) for sign in (-1, 0, 1)}}},
        random={"preference": {1: rng.standard_normal(19), -1: rng.standard_normal(19)}},
        readable={"preference": {sign: Readability(None) for sign in (-1, 0, 1)}},
        asked={"preference": {"items": "12 of 44"}},
    )


def test_a_run_that_is_kept_comes_back_and_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "KEPT", tmp_path)
    asked = list[tuple[str, int]]()

    def compared(options):
        asked.append((options.adapters[0], options.seeds[0]))
        return [cell(options.adapters[0], options.seeds[0])]

    monkeypatch.setattr(smollm2, "compare", compared)
    monkeypatch.setattr(smollm2, "make", lambda *run: None)
    for adapter, seed in [("oft", 1), ("oft", 0), ("ia3", 0), ("oft", 1)]:
        smollm2.measure("truthfulness", adapter, seed, tmp_path / "out", None)
    assert asked == [("oft", 1), ("oft", 0), ("ia3", 0)]
    back, made = smollm2.kept("truthfulness", "run"), [cell("ia3", 0), cell("oft", 0), cell("oft", 1)]
    assert [(c.adapter, c.seed) for c in back] == [(c.adapter, c.seed) for c in made]
    rows, wanted = (group_rows({}, Group.of(cells), 1, 200) for cells in (back, made))
    assert len(rows) == len(wanted) > 0
    for row, other in zip(rows, wanted, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            same = pytest.approx(other[name], rel=1e-4, abs=1e-4) if isinstance(value, float) else other[name]
            assert value == same


def test_doses_are_pooled_over_the_kept_seeds_where_all_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "KEPT", tmp_path)
    base = np.linspace(-1, 1, 20)
    for seed, doses in enumerate([(0.0, 0.5, 1.0), (0.0, 0.5, 1.0, -1.0)]):
        found = {f"{dose:g}": base + dose * (1 + seed) for dose in doses}
        smollm2.keep(tmp_path / "tone" / f"lora_{seed}_doses.json", found)
    smollm2.keep(tmp_path / "tone" / "lora_0_run.json", [cell("lora", 0)])
    rows = smollm2.dose_rows("tone")
    assert [(r["dose"], r["n_seeds"], r["n"]) for r in rows] == [("0.5", 2, 20), ("1", 2, 20)]
    assert [r["shift"] for r in rows] == pytest.approx([0.75, 1.5], abs=1e-5)
    assert all(r["shift_ci_lo"] < r["shift"] < r["shift_ci_hi"] for r in rows)
    assert smollm2.dose_rows("honesty") == []


def test_what_has_no_cost_on_neutral_text_has_an_empty_cell():
    """A system prompt has none: no text is read under it."""
    free = {"valid": {sign: np.ones(4) for sign in (-1, 0, 1)}}
    paid = free | {"nll": {sign: np.full(4, 2.0 + sign) for sign in (-1, 0, 1)}}
    cells = [
        replace(cell("lora", 0), intervention=name, scores=cell("lora", 0).scores | costs, nulls={}, random={})
        for name, costs in (("weight", paid), ("prompt", free))
    ]
    rows = group_rows({"compared": "run"}, Group.of(cells), 1, 200)
    lines = smollm2.render([row | {FLAG: row[FLAG] or ""} for row in rows]).splitlines()[2:]
    assert [line.split("|")[-3].strip() for line in lines] == ["+1.00", ""]
