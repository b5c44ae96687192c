"""Two pictures of doses: vectors of three behaviours on a real model, and of six families on the bundled one.

`uv run python -m benchmarks.picture` (or `just bench picture`) draws `docs/results/smollm2_doses.svg` from the table
beside it, which `just bench smollm2` has measured, and `docs/results/dose_response.svg` from
`docs/results/sweep_pooled.csv`, which `uv run python -m ws.run_sweep --model pocket --seeds 0 1 2` has; see
`docs/results.md`. It takes a second, and the same tables give the same bytes.

Colours are of Okabe and Ito (2008), darkened until text in them reads on white; families differ in the shape of their
marks too. The background is white, so that the picture reads on a dark page as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from ws.files.plots import save_svg
from ws.files.runs import read_csv

DOCS = Path(__file__).parents[1] / "docs" / "results"
TABLE, PICTURE = DOCS / "sweep_pooled.csv", DOCS / "dose_response.svg"
REAL_TABLE, REAL_PICTURE = DOCS / "smollm2_doses.csv", DOCS / "smollm2_doses.svg"

WIDTH, HEIGHT = 600.0, 372.0  # points: 800 pixels wide, as a page shows it
BOTTOM, TOP, LINE = 78.0, 304.0, 14.5  # points: the panels' lower and upper edge, the height of a line of text
GREY, INK = "#666666", "#222222"


@dataclass(frozen=True)
class Look:
    """How a family is drawn: where two lie on one another, the lower has the larger mark, the upper a broken line."""

    colour: str
    marker: str
    size: float
    line: str | tuple[float, tuple[float, ...]] = "solid"

    @property
    def style(self) -> dict[str, Any]:
        """Of its line, as matplotlib takes it."""
        mark = {"marker": self.marker, "markersize": self.size, "markeredgecolor": "white", "markeredgewidth": 0.6}
        return mark | {"color": self.colour, "linestyle": self.line, "linewidth": 1.6}


LOOKS = {
    "oft": Look("#a63d00", "s", 7.5),
    "delora": Look("#00724f", "^", 6.5),
    "pissa": Look("#0068a3", "D", 4.5, (0, (4, 1.5))),
    "lora": Look("#9c2f74", "o", 8.5),
    "dora": Look("#7a5a00", "v", 5.0, (0, (4, 1.5))),
    "ia3": Look("#333333", "X", 6.5),
}

BEHAVIORS = {"agreement": LOOKS["oft"], "truthfulness": LOOKS["pissa"], "honesty": LOOKS["ia3"]}

Rows = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Panel:
    """One evaluation.

    Attributes:
        name: of its columns.
        title: what the model does more of as the level rises.
        items: what is asked, with `{n}` of it.
        unit: of the level.
        honest: +1 where honesty raises the level, -1 where it lowers it.
    """

    name: str
    title: str
    items: str
    unit: str
    honest: int


PANELS = (
    Panel("sycophancy", "Agrees with falsehoods", "{n} false claims", "log P(Yes) / P(No)", -1),
    Panel("airisk", "Chooses truthfully", "{n} dilemmas", "log P(truthful) / P(other)", 1),
    Panel("tinymfv_airisk", "Finds wrongs wrong", "{n} vignettes", "wrongness, from −1 to 1", 1),
)


def draw(rows: Rows) -> Figure:
    """The picture of a table of pooled results: levels with 95 % bands against alpha, one line per family."""
    seeds, alphas = {r["n_seeds"] for r in rows}, sorted({float(r["alpha"]) for r in rows})
    assert len(seeds) == 1, f"families with different numbers of seeds: {sorted(seeds)}"
    measured = ", ".join(f"{a:+g}" if a else "0" for a in alphas).replace("-", "−")
    note = (
        f"Honesty vectors of {len(LOOKS)} adapter families on the bundled pocket model.\n"
        f"Marks: measured, at alpha {measured}. Bands: 95 %, over {seeds.pop()} seeds and all items."
    )
    with matplotlib.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="white")
        panels = figure.subplots(1, len(PANELS))
        figure.subplots_adjust(left=0.05, right=0.985, wspace=0.2, bottom=BOTTOM / HEIGHT, top=TOP / HEIGHT)
        for axes, panel in zip(panels, PANELS, strict=True):
            _draw_panel(axes, panel, rows)
        figure.text(0.5, 0.015, note, ha="center", color=GREY, fontsize=11, linespacing=1.25)
    return figure


def _draw_panel(axes: Axes, panel: Panel, rows: Rows) -> None:
    _frame(axes, panel, rows)
    for family, look in LOOKS.items():
        _draw_family(axes, panel, family, look, rows)
    base = next(float(r[f"{panel.name}_level"]) for r in rows if float(r["alpha"]) == 0)
    axes.plot([-1, 1.1], [base, base], color=GREY, linewidth=1, linestyle="dashed", zorder=1)
    axes.plot([0], [base], color=INK, marker="o", markersize=5.5, markeredgecolor="white", gid=f"base-{panel.name}")
    place = {"va": "bottom"} if panel.honest < 0 else {"va": "top"}
    shift = (0, -2 * panel.honest)
    axes.annotate("base", (1.1, base), shift, textcoords="offset points", ha="right", color=GREY, **place)
    _label_ends(axes, panel, rows)


def _frame(axes: Axes, panel: Panel, rows: Rows) -> None:
    """Title, axes and the words that say which way is honest, in the corner that the lines leave free."""
    ends = [float(r[f"{panel.name}_level_ci_{end}"]) for r in rows for end in ("lo", "hi")]
    room = 0.08 * (max(ends) - min(ends))
    axes.set(xlim=(-2.12, 1.12), ylim=(min(ends) - room, max(ends) + room))
    axes.set_xticks([-1, 0, 1], ["−1", "0", "+1"])
    axes.set_xlabel("alpha", labelpad=0, color=INK)
    axes.locator_params(axis="y", nbins=5)
    _ruled(axes)
    lines = [
        (2.65, panel.title, {"fontsize": 12.5, "fontweight": "bold", "color": INK}),
        (1.5, panel.items.format(n=rows[0][f"{panel.name}_n"]), {"fontsize": 11, "color": INK}),
        (0.5, panel.unit, {"fontsize": 11, "color": GREY}),
    ]
    for y, words, style in lines:
        axes.text(0, 1 + y * LINE / (TOP - BOTTOM), words, transform=axes.transAxes, **style)
    words, y, side = ("more honest ↑", 0.99, "top") if panel.honest > 0 else ("more honest ↓", 0.02, "bottom")
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text(0.03, y, words, transform=axes.transAxes, va=side, fontweight="bold", color=INK, bbox=behind)


def _ruled(axes: Axes) -> None:
    """Small ticks, and lines across that lie behind everything."""
    axes.tick_params(length=3, labelsize=11, pad=2, colors=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_family(axes: Axes, panel: Panel, family: str, look: Look, rows: Rows) -> None:
    """A line with its band; the mark at alpha 0 is the base's, which all families share."""
    rows = sorted((r for r in rows if r["adapter"] == family), key=lambda r: float(r["alpha"]))
    x = [float(r["alpha"]) for r in rows]
    level, low, high = ([float(r[f"{panel.name}_level{end}"]) for r in rows] for end in ("", "_ci_lo", "_ci_hi"))
    axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0, gid=f"band-{panel.name}-{family}")
    marked = [i for i, a in enumerate(x) if a]
    axes.plot(x, level, markevery=marked, gid=f"line-{panel.name}-{family}", **look.style)


def _label_ends(axes: Axes, panel: Panel, rows: Rows) -> None:
    """Every family's name beside its left end, where the families lie furthest apart."""
    low, high = axes.get_ylim()
    ends = {r["adapter"]: float(r[f"{panel.name}_level"]) for r in rows if float(r["alpha"]) == -1}
    order = sorted(ends, key=lambda family: ends[family])
    places = spread(np.array([ends[f] for f in order]), gap=LINE * (high - low) / (TOP - BOTTOM))
    for family, y in zip(order, places, strict=True):
        colour = LOOKS[family].colour
        axes.plot([-1.26, -1.08], [y, ends[family]], color=colour, linewidth=0.7)
        axes.text(-1.3, y, family, color=colour, ha="right", va="center_baseline")


def spread(values: np.ndarray, gap: float) -> np.ndarray:
    """The places nearest to ascending values, in squares, that lie at least `gap` apart.

    With `q_i = p_i - i gap` the condition is that q does not fall: an isotonic regression.
    """
    steps = gap * np.arange(len(values))
    return isotonic_regression(values - steps).x + steps


def draw_real(rows: Rows) -> Figure:
    """How far the preference for a behaviour's answers moves on the real model, with 95 % bands, against the dose."""
    seeds, items = ({r[column] for r in rows} for column in ("n_seeds", "n"))
    assert len(seeds) == len(items) == 1, f"behaviours with different numbers of seeds or questions: {seeds}, {items}"
    note = (
        "Vectors of three behaviours (LoRA) on SmolLM2-135M; one unit costs one nat per token.\n"
        f"Bands: 95 %, over {seeds.pop()} seeds and {items.pop()} held-out questions of each behaviour."
    )
    with matplotlib.rc_context({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(WIDTH / 72, 300 / 72), facecolor="white")
        axes = figure.subplots()
        figure.subplots_adjust(left=0.085, right=0.8, bottom=0.22, top=0.9)
        for behavior, look in BEHAVIORS.items():
            _draw_behavior(axes, behavior, look, rows)
        doses = sorted({0.0, *(float(r["dose"]) for r in rows)})
        axes.set_xticks(doses, [f"{d:+g}u".replace("-", "−") if d else "base" for d in doses])
        axes.axhline(0, color=GREY, linewidth=1, linestyle="dashed", zorder=1)
        _ruled(axes)
        title = "Preference for the behaviour's own answers, nats per token from the base"
        axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK)
        figure.text(0.5, 0.02, note, ha="center", color=GREY, fontsize=11, linespacing=1.25)
    return figure


def _draw_behavior(axes: Axes, behavior: str, look: Look, rows: Rows) -> None:
    """A line with its band through the base at 0, and the behaviour's name at its right end."""
    mine = [
        [float(r[c]) for c in ("dose", "shift", "shift_ci_lo", "shift_ci_hi")]
        for r in rows
        if r["behavior"] == behavior
    ]
    dose, shift, low, high = np.array(sorted([*mine, [0.0] * 4])).T
    axes.fill_between(dose, low, high, color=look.colour, alpha=0.15, linewidth=0, gid=f"band-{behavior}")
    axes.plot(dose, shift, gid=f"line-{behavior}", **replace(look, line="solid").style)
    axes.annotate(
        behavior,
        (dose[-1], shift[-1]),
        (8, 0),
        textcoords="offset points",
        va="center",
        color=look.colour,
        fontweight="bold",
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(save_svg(draw_real(read_csv(REAL_TABLE)), REAL_PICTURE))
    print(save_svg(draw(read_csv(TABLE)), PICTURE))


if __name__ == "__main__":
    main()
