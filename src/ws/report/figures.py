"""The figures of a page, as SVG that takes its colours from the page.

Every figure is an image with a text alternative that states its numbers. Colours are of Okabe and Ito (2008), some
of them darkened for contrast, and series differ in the shape of their marks too. The page's style sheet sets them, so
that they follow its dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from ws.eval.evaluation import HeadlineScore
from ws.eval.readable import FLAG, MARK
from ws.report.curves import Curve, Foundation, Point
from ws.report.data import Norms
from ws.report.words import cost_text, counted, divergence_text, minus, p_text, shown, strength
from ws.stats import LOW_MASS

WIDTH, BROAD = 320.0, 880.0  # of a panel, and of one that has a page to itself
_LEFT, _RIGHT = 36.0, 12.0

Attributes = Mapping[str, object]


@dataclass(frozen=True)
class Figure:
    """A picture and its caption.

    Attributes:
        title: of the picture; the caption opens with it.
        svg: the picture, with a text alternative.
        caption: what else the caption says.
        broad: the same for a wide page, where there is one.
    """

    title: str
    svg: Markup
    caption: str = ""
    broad: Markup | None = None


def tag(name: str, attributes: Attributes, *children: str) -> Markup:
    """One element; attributes and texts are escaped, and what is markup already stays."""
    pairs = "".join(f' {key}="{escape(_plain(value))}"' for key, value in attributes.items())
    inside = "".join(escape(child) for child in children)
    return Markup(f"<{name}{pairs}>{inside}</{name}>")


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def picture(height: float, label: str, parts: Iterable[Markup], width: float = WIDTH) -> Markup:
    """The whole image."""
    kind = "figure" if width == WIDTH else "figure broad"
    view = f"0 0 {_plain(width)} {_plain(height)}"
    return tag("svg", {"viewBox": view, "role": "img", "aria-label": label, "class": kind}, *parts)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line of a class of the style sheet."""
    return tag("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> Markup:
    """A piece of text."""
    shape = {"x": float(x), "y": float(y), "text-anchor": anchor}
    return tag("text", shape | ({"class": kind} if kind else {}), words)


def marker(x: float, y: float, shape: str, kind: str, size: float = 4.0) -> Markup:
    """A circle, square, diamond, triangle (up or down) or cross."""
    s = size
    if shape == "circle":
        return tag("circle", {"cx": x, "cy": y, "r": s, "class": kind})
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
        "up": [(0, -1.2 * s), (1.1 * s, 0.8 * s), (-1.1 * s, 0.8 * s)],
        "down": [(0, 1.2 * s), (1.1 * s, -0.8 * s), (-1.1 * s, -0.8 * s)],
    }
    if shape == "cross":
        path = f"M{_at(x - s, y - s)}L{_at(x + s, y + s)}M{_at(x + s, y - s)}L{_at(x - s, y + s)}"
        return tag("path", {"d": path, "class": kind})
    return tag("path", {"d": _path([(x + dx, y + dy) for dx, dy in corners[shape]]) + "Z", "class": kind})


def _at(x: float, y: float) -> str:
    return f"{_plain(float(x))} {_plain(float(y))}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(_at(x, y) for x, y in points)


@dataclass(frozen=True)
class Scale:
    """A straight map from numbers to places in the picture."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Scale:
        """From the least to the greatest of some numbers, with a margin; never of no width."""
        numbers = list(values) or [0.0]
        low, high = min(numbers), max(numbers)
        room = margin * (high - low) if high > low else 0.5
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        """The place of a number."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def holds(self, value: float) -> bool:
        """Whether a number lies on the scale."""
        return self.low <= value <= self.high

    def ticks(self, n: int = 4) -> list[float]:
        """Round numbers on the scale, at most `n` + 1."""
        places = MaxNLocator(nbins=n, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [float(t) for t in places if self.holds(float(t))]


def _tick_text(value: float) -> str:
    return minus(f"{value:.3g}")


def _y_axis(scale: Scale, x: Scale, n: int = 4) -> list[Markup]:
    parts = []
    for t in scale.ticks(n):
        kind = "zero" if t == 0 else "grid"
        parts += [line(x.start, scale(t), x.end, scale(t), kind)]
        parts += [text(x.start - 4, scale(t) + 3.5, _tick_text(t), "end")]
    return parts


def _x_axis(scale: Scale, y: float, label: str, n: int = 5) -> list[Markup]:
    parts = [line(scale.start, y, scale.end, y, "axis")]
    for t in scale.ticks(n):
        parts += [line(scale(t), y, scale(t), y + 3, "axis"), text(scale(t), y + 14, _tick_text(t), "middle")]
    return [*parts, text((scale.start + scale.end) / 2, y + 27, label, "middle", "label")]


# ---- dose and response ----------------------------------------------------------------------------------------------

SERIES = {"false_claims": ("s1", "circle"), "true_claims": ("s2", "square")}
_EFFECT, _KL, _TALLER = (22.0, 142.0), (212.0, 252.0), 80.0
_KL_SHOWN = 3.0  # nats; beyond, an answer is far from anything the base would say


@dataclass(frozen=True)
class Doses:
    """What a panel shows of one adapter.

    Attributes:
        adapter: whose.
        curves: of one evaluation; two where it reads true claims beside false ones.
        marks: calibrated strengths: the mean over seeds, by unit (-1 and +1).
        divergence: `(alpha, nats)` as calibration measured it, per seed; empty without.
        references: levels of other ways to steer, by name; lines across the panel.
    """

    adapter: str
    curves: Sequence[Curve]
    marks: Mapping[int, float]
    divergence: Sequence[Sequence[tuple[float, float]]]
    references: Mapping[str, float]

    @property
    def points(self) -> list[Point]:
        """Of all curves."""
        return [p for c in self.curves for p in c.shown]


def dose_figures(panels: Sequence[Doses], lead: bool = False) -> list[Figure]:
    """Small multiples on common scales, one per adapter; with `lead` the first is drawn broad, too."""
    if not panels:
        return []
    levels = [v for d in panels for p in d.points for v in (p.level.ci_lo, p.level.ci_hi)]
    points = [p for d in panels for c in d.curves for s in c.seeds.values() for p in s]
    alphas = [*(p.alpha for p in points), *(m for d in panels for m in d.marks.values())]
    levels += [p.level.mean for p in points]

    def drawn(d: Doses, width: float = WIDTH, extra: float = 0.0) -> Markup:
        y = Scale.over(levels, _EFFECT[1] + extra, _EFFECT[0])
        x, cost = Scale.over(alphas, _LEFT, width - _RIGHT, 0.04), Scale(0.0, _KL_SHOWN, _KL[1] + extra, _KL[0] + extra)
        return _dose_picture(d, x, y, cost, width)

    broad = [drawn(panels[0], BROAD, _TALLER)] if lead else []
    return [Figure(d.curves[0].name, drawn(d), "", *(broad if i == 0 else ())) for i, d in enumerate(panels)]


def _dose_picture(d: Doses, x: Scale, y: Scale, cost: Scale, width: float) -> Markup:
    """A score against strength; below it the answer mass, and the cost, where it is drawn by `cost`."""
    parts = [*_y_axis(y, x), *_broken(d, x, cost.start), *_marks(d, x, cost.start), *_references(d, x, y)]
    for curve in d.curves:
        parts += _series(curve, x, y)
    parts += [*_mass_strip(d, x, cost.end), *_cost_strip(d, x, cost), *_x_axis(x, cost.start, "strength alpha")]
    title = f"{d.curves[0].name}: {d.curves[0].score.title}"
    return picture(cost.start + 32, f"{title}. {_dose_words(d)}", parts, width)


def _series(curve: Curve, x: Scale, y: Scale) -> list[Markup]:
    kind, shape = SERIES.get(curve.score.key, ("s1", "circle"))
    points = curve.shown
    band = [(x(p.alpha), y(p.level.ci_hi)) for p in points]
    band += [(x(p.alpha), y(p.level.ci_lo)) for p in reversed(points)]
    parts = [tag("path", {"d": _path(band) + "Z", "class": f"band {kind}"})]
    if len(curve.seeds) > 1:
        paths = (_path([(x(p.alpha), y(p.level.mean)) for p in seed]) for seed in curve.seeds.values())
        parts += [tag("path", {"d": path, "class": f"seed {kind}"}) for path in paths]
    parts.append(tag("path", {"d": _path([(x(p.alpha), y(p.level.mean)) for p in points]), "class": f"curve {kind}"}))
    for p in points:
        look = kind if p.is_readable else f"{kind} hollow"
        parts.append(marker(x(p.alpha), y(p.level.mean), shape, look, 3.2))
    return parts


def _broken(d: Doses, x: Scale, bottom: float) -> list[Markup]:
    """A shade over the strengths at which the answers no longer count."""
    parts = []
    alphas = sorted({p.alpha for p in d.points})
    for p in {p.alpha: p for p in d.points if not p.is_readable}.values():
        i = alphas.index(p.alpha)
        low = (alphas[i - 1] + p.alpha) / 2 if i else x.low
        high = (alphas[i + 1] + p.alpha) / 2 if i + 1 < len(alphas) else x.high
        shape = {"x": x(low), "y": _EFFECT[0], "width": x(high) - x(low), "height": bottom - _EFFECT[0]}
        parts.append(tag("rect", shape | {"class": "broken"}))
    return parts


def _marks(d: Doses, x: Scale, bottom: float) -> list[Markup]:
    parts = []
    for unit, alpha in d.marks.items():
        if x.holds(alpha):
            name = f"{'+' if unit > 0 else chr(0x2212)}1u"
            parts += [
                line(x(alpha), _EFFECT[0] - 4, x(alpha), bottom, "unit"),
                text(x(alpha), 12.0, name, "middle", "unit"),
            ]
    return parts


def _references(d: Doses, across: Scale, y: Scale) -> list[Markup]:
    """Levels of other ways to steer; those beyond the scale stand at its edge with an arrow."""
    parts, right = [], across.end
    edges = {"top": 0, "bottom": 0}
    for name, level in d.references.items():
        if y.holds(level):
            at_left = name == "base" and _is_free(d, y(level) - 6, y)
            x, anchor = (_LEFT + 3.0, "start") if at_left else (right, "end")
            parts.append(line(_LEFT, y(level), right, y(level), "reference"))
            parts.append(text(x, y(level) - 3, name, anchor, "small halo"))
            continue
        edge = "top" if level > y.high else "bottom"
        arrow = "\N{UPWARDS ARROW}" if edge == "top" else "\N{DOWNWARDS ARROW}"
        place = y.end + 9 + 11 * edges[edge] if edge == "top" else y.start - 3 - 11 * edges[edge]
        edges[edge] += 1
        parts.append(text(right, place, f"{name}: {shown(level, '+.1f')} {arrow}", "end", "small halo"))
    return parts


def _is_free(d: Doses, height: float, y: Scale) -> bool:
    """Whether a word at the left edge of the panel would stand clear of the curves' first marks."""
    first = [y(min(c.shown, key=lambda p: p.alpha).level.mean) for c in d.curves]
    return all(abs(place - height) > 9 for place in first)


def _mass_strip(d: Doses, x: Scale, below: float) -> list[Markup]:
    """The answer mass, above the strip that begins at the height `below`."""
    top, bottom, right = below - 48, below - 22, x.end
    y = Scale(0.0, 1.0, bottom, top)
    parts = [text(_LEFT, top - 5, "answer mass", "start", "small")]
    for level, kind in ((0.0, "axis"), (1.0, "grid"), (LOW_MASS, "limit")):
        parts.append(line(_LEFT, y(level), right, y(level), kind))
    parts += [text(_LEFT - 4, y(level) + 3.5, _tick_text(level), "end") for level in (0.0, 1.0)]
    for curve in d.curves:
        kind, shape = SERIES.get(curve.score.key, ("s1", "circle"))
        points = [p for p in curve.shown if p.mass is not None]
        if not points:
            middle = (_LEFT + right) / 2, (top + bottom) / 2 + 4
            return [parts[0], text(*middle, "none: the answers are given", "middle", "small")]
        places = [(x(p.alpha), y(min(1.0, p.mass or 0.0))) for p in points]
        parts.append(tag("path", {"d": _path(places), "class": f"curve thin {kind}"}))
        for p, place in zip(points, places, strict=True):
            parts.append(marker(*place, *((shape, kind) if p.is_readable else ("cross", "bad")), 2.2))
    return parts


def _cost_strip(d: Doses, x: Scale, y: Scale) -> list[Markup]:
    title = f"KL from the base, nats (cut off at {_KL_SHOWN:g})"
    parts = [text(_LEFT, y.end - 5, title, "start", "small")]
    if not any(d.divergence):
        middle = (_LEFT + x.end) / 2, (y.start + y.end) / 2 + 4
        return [*parts, text(*middle, "not measured: ws calibrate", "middle", "small")]
    parts += _y_axis(y, x, 3)
    parts.append(line(_LEFT, y(1.0), x.end, y(1.0), "limit"))
    for seed in d.divergence:
        places = [(x(a), y(min(kl, _KL_SHOWN))) for a, kl in seed if x.holds(a)]
        if not places:
            continue
        parts.append(tag("path", {"d": _path(places), "class": "curve thin s3"}))
        parts += [marker(px, py, "diamond", "s3", 1.8) for px, py in places]
    return parts


def _dose_words(d: Doses) -> str:
    said = []
    for curve in d.curves:
        values = [
            f"alpha {strength(p.alpha)}: {shown(p.level, curve.score.spec)}"
            + ("" if p.mass is None else f", answer mass {p.mass:.3f}")
            + ("" if p.is_readable else f" (not to be read: {p.read.problem})")
            + (f", {divergence_text(p.kl)}" if p.alpha else "")
            for p in curve.shown
        ]
        said.append(f"{curve.score.title}, {curve.score.unit}: {'; '.join(values)}.")
    units = [f"{'+' if unit > 0 else '-'}1u is alpha {strength(alpha)}" for unit, alpha in d.marks.items()]
    said += [f"Calibrated: {', '.join(units)}."] if units else []
    said += [f"{name}: {shown(level)}." for name, level in d.references.items()]
    return " ".join(said)


# ---- shifts ---------------------------------------------------------------------------------------------------------

SIGNS = {1: ("s1", "up"), -1: ("s2", "down")}
_ROW = 54


@dataclass(frozen=True)
class Shift:
    """A row of a forest plot: an adapter at one strength, pooled and by seed."""

    adapter: str
    pooled: Point | None
    seeds: Sequence[Point]
    alpha: float


def forest_figure(score: HeadlineScore, rows: Sequence[Shift]) -> Figure:
    """Shifts with their intervals: a triangle for the pooled one, where there is one, small marks for the seeds."""
    ends = [
        v for r in rows for p in (*r.seeds, *([r.pooled] if r.pooled else [])) for v in (p.shift.ci_lo, p.shift.ci_hi)
    ]
    x = Scale.over([0.0, *ends], 8.0, WIDTH - 8.0, 0.03)
    bottom = 6.0 + _ROW * len(rows)
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        parts += _forest_row(row, 6.0 + _ROW * i, x, score.spec)
    parts += _x_axis(x, bottom, "shift against the base")
    words = "; ".join(f"{r.adapter} at alpha {strength(r.alpha)}: {_shift_words(r, score.spec)}" for r in rows)
    return Figure(score.title, picture(bottom + 32, f"Shift of {score.title}. {words}.", parts))


def _forest_row(row: Shift, top: float, x: Scale, spec: str) -> list[Markup]:
    kind, shape = SIGNS[1 if row.alpha > 0 else -1]
    parts = [
        line(0.0, top - 2, WIDTH, top - 2, "row"),
        text(8.0, top + 11, f"{row.adapter} {strength(row.alpha)}", "start", "halo label"),
        *(line(x(t), top + 26, x(t), top + _ROW - 2, "zero" if t == 0 else "grid") for t in x.ticks(5)),
    ]
    if main := row.pooled:
        parts += [
            text(WIDTH - 8, top + 11, _numbers(main, spec), "end", "halo"),
            text(WIDTH - 8, top + 22, cost_text(main), "end", "small"),
            line(x(main.shift.ci_lo), top + 32, x(main.shift.ci_hi), top + 32, f"interval {kind}"),
            marker(x(main.shift.mean), top + 32, shape, kind if main.is_readable else f"{kind} hollow", 4.5),
        ]
    else:
        parts.append(text(WIDTH - 8, top + 11, "not pooled", "end", "halo"))
    if len(row.seeds) > 1 or not row.pooled:
        for i, p in enumerate(row.seeds):
            y = top + 40 + 7 * i / max(len(row.seeds) - 1, 1)
            parts.append(line(x(p.shift.ci_lo), y, x(p.shift.ci_hi), y, f"interval thin {kind}"))
            parts.append(marker(x(p.shift.mean), y, "circle", kind if p.is_readable else f"{kind} hollow", 1.6))
    return parts


def _numbers(p: Point, spec: str) -> str:
    holm = f"  p {p_text(p.p_holm)}" if p.p_holm is not None and p.is_readable else ""
    return f"{shown(p.shift, spec)}{p.suffix}{holm}"


def _shift_words(row: Shift, spec: str) -> str:
    pooled = f"{_numbers(row.pooled, spec)}, {cost_text(row.pooled)}" if row.pooled else "not pooled"
    seeds = ", ".join(shown(p.shift.mean, spec) for p in row.seeds)
    return f"{pooled} (seeds {seeds})" if len(row.seeds) > 1 else pooled


# ---- foundations ----------------------------------------------------------------------------------------------------


def foundation_figures(by_adapter: Mapping[str, Sequence[Foundation]]) -> list[Figure]:
    """One panel per adapter, a row per foundation and a mark per strength, on a common scale."""
    ends = [v for rows in by_adapter.values() for f in rows for v in (f.shift.ci_lo, f.shift.ci_hi)]
    x = Scale.over([0.0, *ends], 106.0, WIDTH - 8.0)
    return [_foundation_figure(adapter, rows, x) for adapter, rows in by_adapter.items() if rows]


def _foundation_figure(adapter: str, rows: Sequence[Foundation], x: Scale) -> Figure:
    names = list(dict.fromkeys((f.name, f.shift.n) for f in rows))
    bottom = 6.0 + 26 * len(names)
    parts = [line(x(t), 4.0, x(t), bottom, "zero" if t == 0 else "grid") for t in x.ticks(4)]
    for i, (name, n) in enumerate(names):
        top = 6.0 + 26 * i
        parts.append(text(2.0, top + 15, f"{name} ({n})"))
        for f in (f for f in rows if f.name == name):
            kind, shape = SIGNS[1 if f.alpha > 0 else -1]
            y = top + (8 if f.alpha > 0 else 18)
            parts.append(line(x(f.shift.ci_lo), y, x(f.shift.ci_hi), y, f"interval {kind}"))
            parts.append(marker(x(f.shift.mean), y, shape, kind if f.is_readable else f"{kind} hollow", 3.4))
    parts += _x_axis(x, bottom, "shift of logit(wrongness), nats", 4)
    words = "; ".join(f"{f.name} at alpha {strength(f.alpha)}: {shown(f.shift)}{f.suffix}" for f in rows)
    label = f"{adapter}: shift of logit(wrongness) by moral foundation, in nats. {words}."
    costs = {f.alpha: f"alpha {strength(f.alpha)}: {cost_text(f.point)}" for f in rows}
    return Figure(adapter, picture(bottom + 32, label, parts), "; ".join(costs.values()))


# ---- profile --------------------------------------------------------------------------------------------------------

_TRAITS = 12  # of a board, those that move most


def profile_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The traits of a board that move most, and the targets, with a mark per strength.

    Args:
        rows: of `profile.csv`, of one vector on one board.
    """
    targets = list(dict.fromkeys(r["trait"] for r in rows if r["role"] == "target"))
    size: dict[str, float] = {}
    for r in rows:
        if not r.get(FLAG):
            size[r["trait"]] = max(abs(r["z"]), size.get(r["trait"], 0.0))
    n_others, n_lost = len(size.keys() - set(targets)), len({r["trait"] for r in rows} - size.keys() - set(targets))
    shown_traits = list(dict.fromkeys([*targets, *sorted(size, key=lambda t: -size[t])]))[: _TRAITS + len(targets)]
    here, height = [r for r in rows if r["trait"] in shown_traits], 38.0
    ends = [r[f"z_{end}"] for r in here for end in ("ci_lo", "ci_hi")]
    random = {r["trait"]: 2 * float(r["z_random"] or 0) for r in here}
    ends += [side * width for width in random.values() for side in (-1, 1)]
    x, bottom = Scale.over([0.0, *ends], 8.0, WIDTH - 8.0), 6.0 + height * len(shown_traits)
    parts = [line(x(t), 4.0, x(t), bottom, "zero" if t == 0 else "grid") for t in x.ticks(5)]
    for i, trait in enumerate(shown_traits):
        top, width = 6.0 + height * i, random[trait]
        if width:
            shade = {"x": x(-width), "y": top + 14, "width": x(width) - x(-width), "height": 20.0}
            parts.append(tag("rect", shade | {"class": "broken"}))
        name = trait if len(trait) < 48 else f"{trait[:46]}\N{HORIZONTAL ELLIPSIS}"
        parts.append(text(8.0, top + 11, f"{name}{' (target)' if trait in targets else ''}", kind="halo"))
        for r in (r for r in here if r["trait"] == trait):
            kind, shape = SIGNS[1 if r["alpha"] > 0 else -1]
            y = top + (19 if r["alpha"] > 0 else 29)
            parts.append(line(x(r["z_ci_lo"]), y, x(r["z_ci_hi"]), y, f"interval {kind}"))
            look = ("cross", "bad") if r.get(FLAG) else (shape, kind if r["moved"] is True else f"{kind} hollow")
            parts.append(marker(x(r["z"]), y, *look, 3.4))
    parts += _x_axis(x, bottom, "shift, standard deviations of the base")
    words = []
    for r in here:
        end = f" {MARK}" if r.get(FLAG) else " (moved)" * (r["moved"] is True)
        words.append(f"{r['trait']} at {r['strength']}: {r['z']:+.2f}{end}")
    label = f"{title}: standardised shifts of traits. {'; '.join(words)}."
    meant, others = (f"{counted(len(targets), 'target')} and ", "other traits") if targets else ("", "traits")
    caption = f"{meant}the {len(shown_traits) - len(targets)} largest of {n_others} {others}"
    caption += f" that can be read; {n_lost} cannot" if n_lost else ""
    return Figure(title, picture(bottom + 32, label, parts), caption)


# ---- norms ----------------------------------------------------------------------------------------------------------


def norm_figure(adapter: str, norms: Norms, caption: str) -> Figure:
    """A heat map of the size of `dW`, module kinds by layers; the darkest cell is the largest of this adapter."""
    kinds = list(dict.fromkeys(kind for kind, _ in norms.cells))
    layers = sorted({layer for _, layer in norms.cells})
    most = max(norms.cells.values()) or 1.0
    left, top, height = 74.0, 4.0, 24.0
    width = (WIDTH - left - 2) / len(layers)
    parts = []
    for i, kind in enumerate(kinds):
        parts.append(text(left - 5, top + height * i + 16, kind, "end", "label"))
        for j, layer in enumerate(layers):
            value = norms.cells.get((kind, layer))
            if value is not None:
                shape = {"x": left + width * j, "y": top + height * i, "width": width - 1, "height": height - 1}
                parts.append(tag("rect", shape | {"class": "cell", "fill-opacity": 0.04 + 0.5 * value / most}))
                if width >= 40:
                    parts.append(text(left + width * (j + 0.5), top + height * i + 16, _size(value), "middle", "label"))
    bottom = top + height * len(kinds)
    step = max(1, -(-len(layers) // 8))
    places = [(left + width * (j + 0.5), str(layer)) for j, layer in enumerate(layers) if j % step == 0]
    parts += [text(x, bottom + 12, name, "middle") for x, name in places]
    parts.append(text(left + (WIDTH - left) / 2, bottom + 26, "decoder layer", "middle", "label"))
    words = "; ".join(
        f"{kind}: " + ", ".join(_size(norms.cells[kind, j]) if (kind, j) in norms.cells else "none" for j in layers)
        for kind in kinds
    )
    label = f"{adapter}: size of dW, {norms.unit}, layers {layers[0]} to {layers[-1]}. {words}."
    return Figure(adapter, picture(bottom + 32, label, parts), caption)


def _size(value: float) -> str:
    return f"{value:.3g}"
