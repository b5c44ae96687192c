"""The notebook runs from its first cell to its last in an empty folder, and what it says is so.

Executing it takes minutes; its way is that of the README and the tour, which every run of the tests goes.
"""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(?:/(?:tmp|work|home|root|Users|private|var|opt|usr|mnt)/|[A-Z]:\\\\)\S*|file://\S*"
)
# Run after the last cell: the values that the text speaks of, as the reader would have them.
PROBE = """
import json

ends = lambda estimate: [estimate.ci_lo, estimate.ci_hi]
claims = {behavior.test.question.format(claim=c.text) for c in behavior.test.claims}
found = {
    "expected": behavior.test.effect,
    "held_out": not {pair.question for pair in pairs} & claims,
    "cosine": pos.cosine(neg),
    "norms": [vector.norm() for vector in (pos, neg, dW)],
    "digests": [vector_digest(vector) for vector in (dW, loaded, reading.vector, again.vector)],
    "moved": not torch.equal(before, steered),
    "base_is_back": torch.equal(before, after),
    "means": [levels[alpha].mean for alpha in alphas],
    "mass": [mass[alpha] for alpha in alphas],
    "span": ends(span),
    "reading_span": ends(reading.span),
    "shift": ends(shift),
    "true_span": ends(claim_shift(true[1.0], true[-1.0])),
    "null": null.tolist(),
    "p": p,
    "agreement": verdict.kind,
    "report": str(write_report(settings.out, behavior.name)),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tool():
    """The script `tools/build_notebook.py` as a module."""
    return import_module("tools.build_notebook")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def executed(tool, committed, scratch):
    """The committed notebook, executed with one more cell; an error in any cell fails here."""
    longer = nbformat.from_dict({**committed, "cells": [*committed.cells, new_code_cell(PROBE)]})
    return tool.execute(longer, scratch)


@pytest.fixture(scope="module")
def found(executed) -> dict:
    (text,) = (o.text for o in executed.cells[-1].outputs if o.get("name") == "stdout")
    return json.loads(text)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


# ---- as it is committed ---------------------------------------------------------------------------------------------


def test_the_committed_file_is_whole_and_small(committed):
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 400_000
    assert 13 <= len(code_cells(committed)) <= 18
    assert [c.execution_count for c in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    assert "dW = theta_pos - theta_neg" in committed.cells[0].source


def test_the_stored_outputs_are_of_the_stored_cells(tool, committed):
    assert committed.metadata[tool.EXECUTED] == tool.sources_hash(committed), "run tools/build_notebook.py"
    assert tool.clean(committed) == committed
    first, *others = code_cells(committed)
    assert not first.outputs, "imports and settings print nothing"
    assert all(cell.outputs for cell in others)


def test_the_stored_outputs_hold_nothing_of_a_machine(committed):
    text = NOTEBOOK.read_text()
    assert not MACHINE_PATH.findall(text)
    kinds = {(o.output_type, o.get("name")) for c in code_cells(committed) for o in c.outputs}
    assert kinds == {("stream", "stdout"), ("display_data", None)}
    outputs = json.dumps([cell.outputs for cell in code_cells(committed)])
    assert not re.search(r"warning|traceback|error|it/s\]|\d{4}-\d\d-\d\dT\d\d:\d\d", outputs, flags=re.IGNORECASE)
    assert all(not cell.metadata for cell in committed.cells)


@pytest.mark.parametrize("path", ["/tmp/x/out", "see /var/ada/x", '"/opt/a"', "file:///etc", "C:\\\\Users"])
def test_paths_of_machines_are_recognised(path):
    assert MACHINE_PATH.search(path)


# ---- as it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_shows_what_is_stored(tool, committed, executed):
    """The same kinds of outputs cell by cell, and the same words; numbers may differ with the processor."""
    assert tool.sources_hash(committed) == tool.sources_hash(
        nbformat.from_dict({**executed, "cells": executed.cells[:-1]})
    )
    cleaned = tool.clean(executed)
    for old, new in zip(code_cells(committed), code_cells(cleaned), strict=False):
        assert [(o.output_type, o.get("name")) for o in old.outputs] == [
            (o.output_type, o.get("name")) for o in new.outputs
        ]
        if old.id != "steer-code":  # a word of an answer may hang on the last bit of a weight
            assert re.sub(r"[-+\d.]+", "#", printed(old)) == re.sub(r"[-+\d.]+", "#", printed(new)), old.id
    assert "False" not in "".join(printed(cell).replace("False and true", "") for cell in code_cells(cleaned)[:-1])


@pytest.mark.slow
def test_the_vector_is_what_the_text_says(found):
    assert len(set(found["digests"])) == 1, "made, loaded, of the run, of the run asked for again"
    assert found["cosine"] < 0
    assert found["norms"][2] > max(found["norms"][:2])
    assert found["moved"]
    assert found["base_is_back"]


@pytest.mark.slow
def test_the_effect_is_what_the_text_says(found):
    assert found["expected"] == -1
    assert found["held_out"]
    assert found["means"] == sorted(found["means"], reverse=True), "agreement with falsehoods falls along the curve"
    assert max(found["span"]) < 0
    assert max(found["shift"]) < 0
    assert found["span"] == pytest.approx(found["reading_span"], abs=0.02), "as `replicate` has read it"
    assert min(found["mass"]) > 0.9


@pytest.mark.slow
def test_random_vectors_do_less(found):
    assert len(found["null"]) == 20
    assert max(map(abs, found["null"])) < min(map(abs, found["shift"])) / 3
    assert found["p"] == pytest.approx(1 / 21)


@pytest.mark.slow
def test_true_claims_do_not_fall_along(found):
    assert min(found["true_span"]) > 0
    assert found["agreement"] == "specific"


@pytest.mark.slow
def test_strengths_side_by_side_differ(executed):
    """At least one of the questions is answered differently at the two ends, and no strength of a row is missing."""
    (cell,) = (c for c in executed.cells if c.id == "steer-code")
    answers = re.findall(r"^  ([+-]\d\.\d)  (\S.*)$", printed(cell), flags=re.MULTILINE)
    assert [a for a, _ in answers] == ["-1.0", "-0.5", "+0.0", "+0.5", "+1.0"] * 3
    assert any(answers[i][1] != answers[i + 4][1] for i in (0, 5, 10))


@pytest.mark.slow
def test_everything_lands_beside_the_reader(found, scratch):
    assert found["report"] == str(Path("out") / "honesty" / "report.html")
    assert (scratch / found["report"]).is_file()
    assert {p.name for p in scratch.iterdir() if not p.name.startswith(".")} == {"out"}
