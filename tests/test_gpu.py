"""The script that measures everything on a GPU, in its small mode on the CPU."""

from __future__ import annotations

import json

import pytest
from benchmarks import gpu


def test_every_part_runs_small_and_is_not_run_again(tmp_path, capsys, monkeypatch):
    file = tmp_path / "gpu.json"
    assert gpu.run(gpu.SMALL, file, gpu.PARTS, budget=1e9) == 0, capsys.readouterr().err[-4000:]
    record = json.loads(file.read_text())
    assert record["settings"]["small"] is True
    assert set(record["parts"]) == set(gpu.PARTS)
    results = {name: part["results"] for name, part in record["parts"].items()}
    assert all(gpu.finite(found) for found in results.values())

    decoded = results["decode"]
    for name in ("ours", "ours_by_row", "merged", "peft"):
        for what in ("prompt", "token"):
            assert decoded[f"{name}_over_bare_{what}"]["median"] > 0
    for name in ("bare", "ours"):
        assert decoded[f"compiled_{name}_over_eager_bare"]["rounds"] == gpu.SMALL.rounds
        assert decoded[f"seconds_to_compile_compiled_{name}"] > 0
    for found in results["exactness"].values():
        assert 0 < found["ours"] < 0.1
        assert found["effect"] > 0
    assert set(results["evaluations"]) == {"sycophancy", "tinymfv", "airisk"}
    assert max(x["largest_difference"] for x in results["evaluations"].values()) < 0.5
    assert results["calibration"]["positive"]["converged"]
    assert all(speed > 0 for speed in results["serving"]["tokens_per_second"].values())

    monkeypatch.setattr(gpu, "measure", lambda part, s: pytest.fail("it is done already"))
    assert gpu.run(gpu.SMALL, file, gpu.PARTS, budget=1e9) == 0
    with pytest.raises(SystemExit, match="other settings"):
        gpu.begun(file, gpu.Settings(), fresh=False)


def test_a_part_that_fails_loses_no_other(tmp_path):
    tried = list[str]()

    def fails(s):
        tried.append("bad")
        raise ValueError("no such kernel")

    def works(s):
        tried.append("good")
        return {"ratio": 1.0}

    file, parts = (
        tmp_path / "gpu.json",
        {"bad": gpu.Part(fails, 1), "good": gpu.Part(works, 1), "long": gpu.Part(works, 99)},
    )
    assert gpu.run(gpu.SMALL, file, parts, budget=50) == 1
    record = json.loads(file.read_text())["parts"]
    assert record["bad"]["error"] == "ValueError: no such kernel"
    assert record["good"]["results"] == {"ratio": 1.0}
    assert "long" not in record
    assert gpu.run(gpu.SMALL, file, parts, budget=200) == 1
    assert tried == ["bad", "good", "bad", "good"]
    assert set(json.loads(file.read_text())["parts"]) == {"bad", "good", "long"}
