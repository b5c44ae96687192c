"""The pictures of doses are what their code draws from the tables beside them."""

from __future__ import annotations

import re
from importlib import import_module
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.optimize import minimize

from ws.files.plots import save_svg
from ws.files.runs import read_csv

ROOT = Path(__file__).parents[1]
TABLE, PICTURE = (ROOT / "docs" / "results" / name for name in ("sweep_pooled.csv", "dose_response.svg"))


@pytest.fixture(scope="module")
def code():
    """The module `benchmarks.picture`."""
    return import_module("benchmarks.picture")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_csv(TABLE)


@pytest.fixture(scope="module")
def figure(code, rows):
    return code.draw(rows)


def drawn(figure, kind: str) -> dict[str, object]:
    """Lines or bands of the picture by the name that `draw` gave them."""
    found = [child for axes in figure.axes for child in axes.get_children()]
    return {gid: child for child in found if (gid := child.get_gid() or "").startswith(kind)}


def values(rows, panel: str, family: str, column: str) -> list[float]:
    mine = sorted((r for r in rows if r["adapter"] == family), key=lambda r: float(r["alpha"]))
    return [float(r[f"{panel}_{column}"]) for r in mine]


def test_the_committed_picture_is_what_the_table_gives(code, figure, tmp_path):
    assert (code.TABLE, code.PICTURE) == (TABLE, PICTURE)
    made = save_svg(figure, tmp_path / "picture.svg")
    assert made.read_bytes() == PICTURE.read_bytes(), "the table or the code has changed; run `just bench picture`"
    assert len(made.read_bytes()) < 120_000


def test_the_numbers_drawn_are_those_of_the_table(code, figure, rows):
    lines, bands = drawn(figure, "line-"), drawn(figure, "band-")
    families = {r["adapter"] for r in rows}
    assert families == set(code.LOOKS)
    assert lines.keys() == {f"line-{p.name}-{f}" for p in code.PANELS for f in families}
    assert bands.keys() == {f"band-{p.name}-{f}" for p in code.PANELS for f in families}
    for panel in (p.name for p in code.PANELS):
        for family in families:
            line = lines[f"line-{panel}-{family}"]
            assert list(line.get_xdata()) == [-1, 0, 1]
            assert list(line.get_ydata()) == values(rows, panel, family, "level")
            (outline,) = bands[f"band-{panel}-{family}"].get_paths()
            for end in ("ci_lo", "ci_hi"):
                edge = list(zip([-1, 0, 1], values(rows, panel, family, f"level_{end}"), strict=True))
                assert set(edge) <= set(map(tuple, outline.vertices.tolist()))


def test_every_measured_point_has_a_mark(code):
    text = PICTURE.read_text()
    groups = dict(re.findall(r'<g id="((?:line|base)-[^"]+)">(.*?)\n  +</g>\n  +<', text, flags=re.DOTALL))
    marks = {name: group.count("<use ") for name, group in groups.items()}
    assert marks == {f"line-{p.name}-{f}": 2 for p in code.PANELS for f in code.LOOKS} | {
        f"base-{p.name}": 1 for p in code.PANELS
    }


def test_the_words_say_which_way_is_honest(code, figure, rows):
    """In every panel the arrow points to where alpha +1 has moved most families."""
    for axes, panel in zip(figure.axes, code.PANELS, strict=True):
        moves = [np.sign(levels[2] - levels[0]) for f in code.LOOKS if (levels := values(rows, panel.name, f, "level"))]
        assert np.median(moves) == panel.honest
        arrow = "more honest ↑" if panel.honest > 0 else "more honest ↓"
        assert [t.get_text() for t in axes.texts if "honest" in t.get_text()] == [arrow]
        assert any(t.get_text().startswith(rows[0][f"{panel.name}_n"]) for t in axes.texts)


def test_no_words_lie_on_others(code, figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = []
    for axes in figure.axes:
        axes.get_xticklabels()
        words = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label]
        low, high = axes.get_ylim()
        seen = [t for t in words if t not in axes.get_yticklabels() or low <= t.get_position()[1] <= high]
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in seen if t.get_text()]
    boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in figure.texts]
    assert len(boxes) > 3 * (len(code.LOOKS) + 8)
    overlapping = [(a, b) for (a, box_a), (b, box_b) in combinations(boxes, 2) if box_a.shrunk(1, 0.75).overlaps(box_b)]
    assert not overlapping
    page = figure.bbox
    assert not [t for t, box in boxes if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1]


def test_another_table_gives_another_picture(code, rows, tmp_path):
    changed = [dict(r) for r in rows]
    changed[0]["airisk_level"] = str(float(changed[0]["airisk_level"]) + 0.5)
    assert save_svg(code.draw(changed), tmp_path / "picture.svg").read_bytes() != PICTURE.read_bytes()


def test_the_picture_of_the_real_model_is_what_its_table_gives(code, tmp_path):
    rows = read_csv(code.REAL_TABLE)
    figure = code.draw_real(rows)
    assert save_svg(figure, tmp_path / "picture.svg").read_bytes() == code.REAL_PICTURE.read_bytes()
    lines, bands = drawn(figure, "line-"), drawn(figure, "band-")
    assert {r["behavior"] for r in rows} == set(code.BEHAVIORS)
    for behavior in code.BEHAVIORS:
        mine = [r for r in rows if r["behavior"] == behavior]
        points = {(float(r["dose"]), float(r["shift"])) for r in mine} | {(0.0, 0.0)}
        line = lines[f"line-{behavior}"]
        assert set(zip(line.get_xdata(), line.get_ydata(), strict=True)) == points
        assert list(line.get_xdata()) == sorted(line.get_xdata())
        (outline,) = bands[f"band-{behavior}"].get_paths()
        edges = {(float(r["dose"]), float(r[f"shift_ci_{end}"])) for r in mine for end in ("lo", "hi")}
        assert edges <= set(map(tuple, outline.vertices.tolist()))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.01, 2))
def test_spread_is_the_nearest_that_keeps_the_gap(code, numbers, gap):
    wanted = np.sort(np.array(numbers))
    found = code.spread(wanted, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(found))
    apart = [{"type": "ineq", "fun": lambda p, i=i: p[i + 1] - p[i] - gap} for i in range(len(wanted) - 1)]
    best = minimize(lambda p: ((p - wanted) ** 2).sum(), wanted + gap * np.arange(len(wanted)), constraints=apart)
    assert ((found - wanted) ** 2).sum() <= best.fun + 1e-5
