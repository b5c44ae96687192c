"""What is kept of planted faults: it adds up, names functions that exist, and explains no mutant that is not there."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from test_docs import ROOT

tool = import_module("tools.mutate")
KEPT = tool.read()["modules"]
SURVIVORS = [s for m in KEPT.values() for s in m["survivors"]]


def exists(function: str) -> bool:
    """Whether `ws.delta.LinearDelta.norm` names a function of a module, or of a class in it."""
    module = next(m for m in tool.TESTS if function.startswith(f"ws.{m}."))
    found = import_module(f"ws.{module}")
    for part in function.removeprefix(f"ws.{module}.").split("."):
        found = vars(found).get(part)
    return found is not None


@pytest.mark.parametrize("module", tool.TESTS)
def test_nine_of_ten_planted_faults_are_noticed(module):
    m = KEPT[module]
    states = ("killed", "timed_out", "survived", "not_tested", "other")
    assert sum(m[state] for state in states) == m["mutants"] > 100
    assert (m["killed"] + m["timed_out"]) / m["mutants"] >= 0.9
    assert m["timed_out"] <= 0.02 * m["mutants"], "a busy machine looks like an endless loop"
    assert m["other"] == 0
    assert len(m["survivors"]) == m["survived"] + m["not_tested"]
    assert m["equivalent"] == sum("equivalent" in s for s in m["survivors"])
    assert all((ROOT / file).is_file() for file in m["tests"] if not file.startswith("-"))


def test_functions_that_are_named_exist():
    named = {s["function"] for s in SURVIVORS} | {f for e in tool.equivalents() for f in e["functions"]}
    assert named
    assert not sorted(function for function in named if not exists(function))
    assert not exists("ws.delta.LinearDelta.gone")


def test_every_reason_is_that_of_a_survivor():
    kept = tuple(f"ws.{module}" for module in KEPT)
    for entry in tool.equivalents():
        assert entry["why"].endswith(".")
        for function in (f for f in entry["functions"] if f.rpartition(".")[0].startswith(kept)):
            changes = ["\n".join(s["change"]) for s in SURVIVORS if s["function"] == function]
            assert any(re.search(entry["change"], change) for change in changes), (function, entry["change"])
    for survivor in SURVIVORS:
        assert survivor.get("equivalent") == tool.why_equivalent(survivor["function"], survivor["change"])


def test_the_page_shows_what_is_kept():
    assert tool.table(KEPT) in tool.PAGE.read_text(encoding="utf-8")


def test_names_of_mutants_are_read_as_functions():
    assert tool.function_of("ws.delta.xǁLinearDeltaǁnorm__mutmut_3") == "ws.delta.LinearDelta.norm"
    assert tool.function_of("ws.lm.choice.x__words__mutmut_12") == "ws.lm.choice._words"
    assert (ROOT / tool.source_of("lm.choice")).is_file()
