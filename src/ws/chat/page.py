"""`ws play`: the base beside the steered model in a web page, with a slider for the strength of every vector.

The page is Gradio's (extra `ui`), served to this machine alone unless a share link is asked for. It loads nothing from
elsewhere: system fonts, no analytics, charts as inline SVG. What models write is shown as plain text, so that nothing
in it can make the browser fetch anything either.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from html import escape
from importlib import import_module
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import Float

from ws import console
from ws.behaviors import Behavior, behavior_name, load_behavior
from ws.chat.engine import BASE, STEERED, Conversation, Engine, Sampling, Turn, first_conversation, open_engine
from ws.chat.guard import LOOPBACK, Guard
from ws.console import say
from ws.errors import WsError
from ws.files.public import public_name
from ws.options.use import PlayOptions as PlayOptions

HOST = "127.0.0.1"
N_CURVE = 25
N_QUESTIONS, N_CLAIMS = 4, 2
NEUTRAL = "Introduce yourself in one sentence."
HINT = "Ask something, or choose an example."


# ---- what is on the page --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A question to start from.

    Attributes:
        question: as a user would put it.
        words: whose probabilities are of interest, as the first word behind the opener; none for an open question.
        opener: the start of the answer that is put into the model's mouth for them.
    """

    question: str
    words: str = ""
    opener: str = ""


def examples(engine: Engine, behavior_file: str = "") -> list[Example]:
    """Held-out claims of the split `dev`, and questions, of the behaviours that the vectors are of.

    Args:
        engine: with the vectors, which say what their behaviours are called.
        behavior_file: a behaviour of the user's own, by its file.
    """
    offered = []
    for behavior in _behaviors(engine, behavior_file):
        if test := behavior.claims:
            words = f"{test.agree}, {test.disagree}"
            claims = [c for c in test.claims if c.split == "dev"][:N_CLAIMS]
            offered += [Example(test.question.format(claim=c.text), words, test.opener) for c in claims]
        step = max(1, len(behavior.questions) // N_QUESTIONS)
        offered += [Example(q) for q in behavior.questions[::step][:N_QUESTIONS]]
    return list({e.question: e for e in offered}.values())


def _behaviors(engine: Engine, behavior_file: str) -> list[Behavior]:
    files_by_name = {behavior_name(behavior_file): behavior_file} if behavior_file.endswith(".toml") else {}
    names = dict.fromkeys(v.info.get("behavior") for v in engine.vectors.values())
    model, behaviors = next(iter(engine.vectors.values())).base_id, []
    for name in filter(None, names):
        try:
            behaviors.append(load_behavior(files_by_name.get(str(name), str(name)), model))
        except WsError:  # one of somebody's own, whose file is not known here: it has no examples
            continue
    return behaviors


def slider_range(units: Mapping[str, float]) -> tuple[float, float, float]:
    """`(lowest, highest, step)` of a strength: one and a half times -1u and +1u; 2 where a sign is not calibrated."""
    low, high = (1.5 * units[u] if u in units else plain for u, plain in (("-1u", -2.0), ("+1u", 2.0)))
    step = 10.0 ** math.floor(math.log10((high - low) / 200))
    digits, wide = max(0, round(-math.log10(step))), 10 * step
    return round(math.floor(low / wide) * wide, digits), round(math.ceil(high / wide) * wide, digits), step


class Page:
    """One browser tab: a conversation, and what its panel of probabilities shows.

    Args:
        conversation: who is talked to.
        example: what the panel asks as long as nothing else was asked.
    """

    def __init__(self, conversation: Conversation, example: Example) -> None:
        self.conversation, self.example = conversation, example
        self.focus = next(iter(conversation.engine.vectors))
        self._curve: tuple[Any, Float[np.ndarray, "points words"]] | None = None

    def __deepcopy__(self, memo: Any) -> Page:
        """A tab of its own that begins as this one: what Gradio makes of a page for every browser."""
        chat = self.conversation
        return Page(chat.engine.converse(chat.strengths, chat.sampling), self.example)

    def columns(self, row: str) -> list[dict[str, str]]:
        """The messages of one column, as Gradio's chatbot takes them: as HTML, even where it renders no Markdown."""
        done = len(self.conversation.turns)
        pairs = [
            (turn.question, turn.answer(row) or ("(nothing)" if number < done else "…"))
            for number, turn in enumerate(self.conversation.shown)
        ]
        return [
            {"role": role, "content": escape(text, quote=False)}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]

    def turn_dials(self, strengths: Sequence[float | int]) -> None:
        """Take over the sliders; the one that moved is whose curve is drawn."""
        for name, alpha in zip(self.conversation.engine.vectors, strengths, strict=True):
            if self.conversation.strengths[name] != alpha:
                self.focus = name
                self.conversation.set(name, alpha)

    @property
    def is_current(self) -> bool:
        """Whether the last answers are whole and were given with the strengths and the sampling of now."""
        chat, last = self.conversation, self.conversation.shown[-1:]
        now = (chat.strengths, chat.sampling, False)
        return last == chat.turns[-1:] and [(t.strengths, t.sampling, t.stopped) for t in last] in ([], [now])

    def follow(self) -> Iterator[Turn]:
        """Answer the last question anew until its answers are current, beginning again when a strength changes."""
        while not self.is_current:
            for turn in self.conversation.again():
                yield turn
                if turn.strengths != self.conversation.strengths:
                    break
            else:
                return

    def panel(self, words: str, opener: str) -> str:
        """The probabilities of the words as HTML: base beside steered, and a curve over the strength in focus.

        Words that are no single token are named above it.
        """
        chat, asked_for = self.conversation, dict.fromkeys(w.strip() for w in words.split(",") if w.strip())
        if not asked_for:
            return "<p>Name words to watch, and here is how likely each is as the first of the answer.</p>"
        wanted, problems = chat.engine.single_tokens(list(asked_for))
        shown = chat.shown
        question = "" if shown else self.example.question
        now, focus = chat.strengths, self.focus  # which a slider may change meanwhile
        units = chat.engine.offered[focus].units
        low, high, _ = slider_range(units)
        low, high = min(low, now[focus]), max(high, now[focus])
        alphas = np.unique([*np.linspace(low, high, N_CURVE), 0.0])
        rows = [now | {focus: float(a)} for a in alphas]
        asked = shown[-1].question if shown else question
        others = {n: a for n, a in now.items() if n != focus}
        before = [(t.question, t.steered) for t in shown[:-1]]
        key = (wanted, opener, focus, low, high, others, [*before, (asked, "")])
        probabilities = chat.probe(wanted, None, question, opener)
        kept = self._curve
        if kept is None or kept[0] != key:
            kept = self._curve = key, chat.probe(wanted, rows, question, opener)
        # Behind steered answers strength 0 is not what the base has been asked.
        is_base = not others and all(t.base == t.steered for t in shown[:-1])
        curve = Curve(focus, alphas, kept[1], now[focus], {BASE if is_base else "0": 0.0} | units)
        return "".join(map(_alert, problems)) + _panel(asked, opener, wanted, probabilities, curve)


# ---- HTML -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Probabilities over the strength of one vector.

    Attributes:
        name: of the vector.
        alphas: strengths, increasing.
        p: of every word there, `[points, words]`.
        alpha: the strength now.
        marks: strengths to mark, by what to call them.
    """

    name: str
    alphas: Float[np.ndarray, "points"]
    p: Float[np.ndarray, "points words"]
    alpha: float
    marks: Mapping[str, float]


def _panel(question: str, opener: str, words: Sequence[str], p: Float[np.ndarray, "rows words"], curve: Curve) -> str:
    """A caption, a table with bars, and the curve."""
    start = f"behind “{escape(opener)}” in" if opener else "of"
    caption = f"The first word {start} the answer to “{escape(question)}”"
    body = "".join(
        f"<tr><th scope='row'><i class='ws-key ws-c{i % 6}'></i>{escape(word)}</th>{_bar(p[0, i], i)}{_bar(p[1, i], i)}"
        "</tr>"
        for i, word in enumerate(words)
    )
    head = f"<tr><th scope='col'>word</th><th scope='col'>{BASE}</th><th scope='col'>{STEERED}</th></tr>"
    table = f"<table class='ws-probs'><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f"<figure class='ws-panel'><figcaption>{caption}</figcaption><div>{table}{_svg(words, curve)}</div></figure>"


def _alert(text: str) -> str:
    return f"<p role='alert'>{escape(text)}</p>"


def _bar(p: float, color: int) -> str:
    """A cell with a probability as a number and as a bar."""
    bar = f"<span class='ws-bar ws-b{color % 6}' style='width:{100 * p:.1f}%'></span>"
    return f"<td><b>{p:.3f}</b><span class='ws-track'>{bar}</span></td>"


def _svg(words: Sequence[str], curve: Curve) -> str:
    """The curve as a drawing of 420 x 250 with direct marks for the base, the calibrated strengths and now."""
    left, right, top, bottom = 34.0, 412.0, 24.0, 204.0
    low, high = float(curve.alphas[0]), float(curve.alphas[-1])

    def x(alpha: float) -> float:
        return left + (right - left) * (alpha - low) / (high - low)

    def y(p: float) -> float:
        return bottom - (bottom - top) * p

    grid = "".join(
        f"<line class='ws-grid' x1='{left}' x2='{right}' y1='{y(v):.1f}' y2='{y(v):.1f}'/>"
        f"<text x='{left - 6}' y='{y(v) + 4:.1f}' text-anchor='end'>{v:g}</text>"
        for v in (0.0, 0.5, 1.0)
    )
    ticks = "".join(
        f"<line class='ws-tick' x1='{x(a):.1f}' x2='{x(a):.1f}' y1='{top}' y2='{bottom}'/>"
        f"<text x='{x(a):.1f}' y='{top - 8}' text-anchor='middle'>{name}</text>"
        for name, a in curve.marks.items()
        if low <= a <= high
    )
    lines = "".join(
        f"<polyline class='ws-l{i % 6}' points='"
        + " ".join(f"{x(float(a)):.1f},{y(float(v)):.1f}" for a, v in zip(curve.alphas, curve.p[:, i], strict=True))
        + "'/>"
        for i in range(len(words))
    )
    here = min(max(curve.alpha, low), high)
    heights = [y(float(np.interp(here, curve.alphas, column))) for column in curve.p.T]
    now = f"<line class='ws-now' x1='{x(here):.1f}' x2='{x(here):.1f}' y1='{top}' y2='{bottom}'/>"
    dots = "".join(
        f"<circle class='ws-d{i % 6}' cx='{x(here):.1f}' cy='{height:.1f}' r='4.5'/>"
        for i, height in enumerate(heights)
    )
    ends = "".join(
        f"<text x='{x(a):.1f}' y='{bottom + 17}' text-anchor='{anchor}'>{a:g}</text>"
        for a, anchor in ((low, "start"), (high, "end"))
    )
    axis = (
        f"<text x='{(left + right) / 2}' y='{bottom + 36}' text-anchor='middle'>strength of {escape(curve.name)}</text>"
    )
    said = f"Probability of {', '.join(words)} over the strength of {curve.name}, now {curve.alpha:g}"
    return (
        f"<svg viewBox='0 0 420 250' role='img' aria-label='{escape(said, quote=True)}'>"
        f"{grid}{ticks}{lines}{now}{dots}{ends}{axis}</svg>"
    )


# Colours of Okabe and Ito, which people with any colour vision tell apart; darker ones on light ground.
_LIGHT = ("#0072b2", "#c04e00", "#00795a", "#a8518a", "#7a6a00", "#444444")
_DARK = ("#56b4e9", "#e69f00", "#2fc59b", "#e08fc0", "#f0e442", "#bbbbbb")


def _css() -> str:
    """The page's own style; colours of text and borders are the theme's."""
    colors = "\n".join(
        f"{dark}.ws-panel {{ {' '.join(f'--ws{i}: {c};' for i, c in enumerate(values))} }}"
        for dark, values in (("", _LIGHT), (".dark ", _DARK))
    )
    uses = "\n".join(
        f".ws-panel .ws-l{i} {{ stroke: var(--ws{i}); }} .ws-panel .ws-d{i} {{ fill: var(--ws{i}); }} "
        f".ws-panel .ws-b{i}, .ws-panel .ws-c{i} {{ background: var(--ws{i}); }}"
        for i in range(len(_LIGHT))
    )
    return f"{colors}\n{uses}\n{_STYLE}"


_STYLE = """
.gradio-container { max-width: 1320px !important; }
.ws-head h1 { font-size: 1.5rem; margin: 0; }
.ws-head p { margin: 0.25rem 0 0; }
.ws-slider .min_value, .ws-slider .max_value { display: none; }
.ws-slider input[type=number] { width: 5.5rem; }
.ws-ticks { position: relative; height: 1.9rem;
  font-size: var(--text-sm); color: var(--body-text-color); }
.ws-ticks i { position: absolute; top: 2px; width: 2px; height: 0.6rem; margin-left: -1px; background: currentColor; }
.ws-ticks span { position: absolute; bottom: 0; }
.ws-ticks span:last-child { right: 0; }
.ws-marks { background: var(--block-background-fill); border: 0 !important; }
.ws-units { flex-wrap: nowrap !important; gap: 6px !important; padding: 4px 8px 8px;
  background: var(--block-background-fill); }
.ws-units button { min-width: 0 !important; padding-left: 2px; padding-right: 2px; }
.ws-examples .gallery { flex-direction: column; }
.ws-examples .gallery-item { text-align: left; }
.ws-examples .gallery-item div { --local-text-width: 100% !important; white-space: normal !important; }
#ws-box .submit-button { background: #1d4ed8; color: #fff; }
.ws-snippet .cm-content span { color: inherit !important; }
.ws-actions { flex-wrap: nowrap !important; }
.ws-actions button { min-width: 0 !important; }
.ws-panel { margin: 0; color: var(--body-text-color); }
.ws-panel > div { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; align-items: center; }
.ws-panel figcaption { margin-bottom: 0.5rem; }
.ws-panel svg { flex: 1 1 300px; min-width: 0; max-width: 520px; }
.ws-panel svg text { fill: var(--body-text-color); font-size: 13px; }
.ws-panel polyline { fill: none; stroke-width: 2.5; }
.ws-panel .ws-l1 { stroke-dasharray: 7 3; }
.ws-panel .ws-l2 { stroke-dasharray: 2 3; }
.ws-grid { stroke: var(--border-color-primary); }
.ws-tick { stroke: var(--body-text-color-subdued); stroke-dasharray: 3 4; }
.ws-now { stroke: var(--body-text-color); stroke-width: 1.5; }
.ws-panel table.ws-probs { flex: 1 1 300px; margin: 0; border-collapse: collapse; border: 0; }
.ws-panel .ws-probs tr, .ws-panel .ws-probs th, .ws-panel .ws-probs td { border: 0; background: none; }
.ws-panel .ws-probs th { text-align: left; font-weight: 600; padding: 0.3rem 1rem 0.3rem 0; white-space: nowrap; }
.ws-panel .ws-probs td { width: 42%; padding: 0.3rem 1rem 0.3rem 0; white-space: nowrap; }
.ws-probs td b { display: inline-block; width: 3.2rem; font-weight: 500; font-variant-numeric: tabular-nums; }
.ws-track { display: inline-block; width: calc(100% - 3.4rem); height: 0.8em; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); vertical-align: -0.05em; }
.ws-bar { display: block; height: 100%; }
.ws-key { display: inline-block; width: 0.7em; height: 0.7em; margin-right: 0.5em; border-radius: 2px; }
@media (max-width: 700px) {  /* on a phone first the message, then sliders and answers, and last what is rarely used */
  .ws-main { flex-direction: column !important; flex-wrap: nowrap !important; }
  .ws-main > .ws-left, .ws-main > .ws-right { display: contents; }
  .ws-right > * { order: 1; flex: none !important; width: 100%; min-width: 0 !important; }
  .ws-right > :has(#ws-box) { order: -2; }
  .ws-right > .ws-actions { order: -1; }
  .ws-main .ws-examples, .ws-main .ws-sampling { order: 2; }
  .ws-head p { font-size: var(--text-sm); }
  .ws-panel svg text { font-size: 17px; }
}
"""


# ---- Gradio ---------------------------------------------------------------------------------------------------------


def _gradio() -> Any:
    """Gradio with its telemetry off; `WsError` when it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return import_module("gradio")
    except ModuleNotFoundError as problem:
        if problem.name != "gradio":
            raise
        raise WsError("`ws play` needs Gradio; install it with `uv sync --extra ui`, or use `ws chat`.") from problem


class _Widgets:
    """The page's components, laid out; `wire` connects them."""

    def __init__(self, gr: Any, engine: Engine, start: Conversation, shown: Sequence[Example]) -> None:
        self.gr, self.engine = gr, engine
        self.page = gr.State(Page(start, shown[0]))
        gr.HTML(_head(engine), elem_classes="ws-head")
        with gr.Row(elem_classes="ws-main"):
            with gr.Column(scale=1, min_width=300, elem_classes="ws-left"):
                self.sliders = [self._slider(name, start.strengths[name]) for name in engine.vectors]
                self.live = gr.Checkbox(True, label="Answer again when a strength changes")
                self._examples(shown)
                with gr.Accordion("Sampling", open=False, elem_classes="ws-sampling"):
                    self._sampling(start.sampling)
            with gr.Column(scale=3, min_width=320, elem_classes="ws-right"):
                self._chat()
                self._probabilities(shown[0])
                with gr.Accordion("Share these settings", open=False):
                    title = "Python that gives these answers again"
                    self.snippet = gr.Code(label=title, language="python", interactive=False, elem_classes="ws-snippet")

    def _slider(self, name: str, alpha: float) -> Any:
        """A slider with its marks, and a button for each of them."""
        zero = "0 (base)" if len(self.engine.vectors) == 1 else "0"
        gr, units = self.gr, self.engine.offered[name].units
        low, high, step = slider_range(units)
        low, high = min(low, alpha), max(high, alpha)
        marks = sorted(({zero: 0.0} | {f"{u} ({a:+.3g})": a for u, a in units.items()}).items(), key=_second)
        with gr.Group():
            label = f"Strength of {name}"
            slider = gr.Slider(low, high, alpha, step=step, label=label, buttons=[], elem_classes="ws-slider")
            slider.preprocess = lambda typed: typed  # its number field takes what `ws chat` takes
            ticks = _ticks(low, high, [a for _, a in marks], self.engine.vectors[name].info.get("behavior"))
            gr.HTML(ticks, elem_classes="ws-marks", padding=False)
            with gr.Row(elem_classes="ws-units"):
                for text, value in marks:
                    button = gr.Button(text, size="sm")
                    button.click(lambda v=float(f"{value:.4g}"): v, None, slider, show_progress="hidden")
        return slider

    def _examples(self, shown: Sequence[Example]) -> None:
        gr = self.gr
        self.picked = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[e.question] for e in shown],
            type="index",
            layout="gallery",
            label="Examples: choose one to ask it",
            samples_per_page=12,
            elem_classes="ws-examples",
        )

    def _sampling(self, sampling: Sampling) -> None:
        gr = self.gr
        label = "Temperature (0: the most probable token)"
        self.temperature = gr.Slider(0, 2, float(sampling.temperature), step=0.05, label=label, buttons=[])
        self.max_tokens = gr.Number(sampling.max_tokens, label="Tokens per answer, at most", precision=0, minimum=1)
        self.seed = gr.Number(sampling.seed, label="Seed", precision=0, minimum=0)

    def _chat(self) -> None:
        gr = self.gr
        options = {"height": 320, "render_markdown": False, "buttons": [], "feedback_options": None}
        with gr.Row():
            self.columns = [
                gr.Chatbot(label=label, placeholder=HINT, elem_id=f"ws-{row}", **options)
                for row, label in ((BASE, "Base model"), (STEERED, "Steered model"))
            ]
        self.box = gr.Textbox(label="Your message", placeholder=HINT, max_lines=6, submit_btn="Send", elem_id="ws-box")
        with gr.Row(elem_classes="ws-actions"):
            self.stop, self.again, self.reset = (
                gr.Button(text, size="sm") for text in ("Stop", "Answer again", "Start over")
            )

    def _probabilities(self, example: Example) -> None:
        gr = self.gr
        with gr.Row():
            self.words = gr.Textbox(example.words, label="Words to watch, separated by commas")
            self.opener = gr.Textbox(example.opener, label="Start of the answer before them (may be empty)")
        self.panel = gr.HTML(label="Next-word probabilities", container=True, padding=True)

    @property
    def dials(self) -> list[Any]:
        """What every event reads."""
        return [self.page, self.temperature, self.max_tokens, self.seed, self.words, self.opener, *self.sliders]


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def _ticks(low: float, high: float, marks: Sequence[float], behavior: Any = None) -> str:
    """Lines below a slider at its marks, and what its ends are; the thumb of a slider is 1 rem wide."""
    places = [(a - low) / (high - low) for a in marks if low <= a <= high]
    lines = "".join(f"<i aria-hidden='true' style='left: calc(0.5rem + {p:.4f} * (100% - 1rem))'></i>" for p in places)
    name = escape(str(behavior).replace("_", " ")) if behavior else "the behaviour"
    ends = f"<span>{low:g}: its opposite</span><span>{high:g}: more {name}</span>"
    return f"<div class='ws-ticks'>{lines}{ends}</div>"


def _head(engine: Engine) -> str:
    names = ", ".join(map(escape, engine.vectors))
    model = escape(public_name(engine.model.name_or_path))
    return (
        f"<h1>Weight steering of {model}</h1><p>The base model, and beside it the same model with "
        f"<i>strength × vector</i> added to its weights ({names}). Both answer in one batch with the same random "
        "numbers, so at strength 0 they write the same.</p>"
    )


def build(options: PlayOptions, engine: Engine) -> Any:
    """The page as Gradio's `Blocks`, ready to launch."""
    gr = _gradio()
    shown = examples(engine, options.behavior) or [Example(NEUTRAL)]
    with gr.Blocks(title=f"ws play: {public_name(engine.model.name_or_path)}", analytics_enabled=False) as blocks:
        widgets = _Widgets(gr, engine, first_conversation(options, engine), shown)
        _wire(blocks, widgets, lambda: deepcopy(widgets.page.value), shown)
    return blocks


class _Handlers:
    """What happens on the page; `values` are those of `_Widgets.dials` behind the page itself."""

    def __init__(self, gr: Any, new_page: Callable[[], Page], shown: Sequence[Example]) -> None:
        self.gr, self.new_page, self.shown = gr, new_page, shown

    def opened(self, words: str, opener: str, page: Page | None = None) -> tuple[Any, ...]:
        """A browser has loaded the page, and may have asked something already."""
        page = page or self.new_page()
        return page, *self._beside(page, words, opener)

    def moved(self, page: Page, *values: Any) -> tuple[Any, ...]:
        """A slider or a field has changed."""
        try:
            self._prepare(page, values)
        except WsError as problem:
            return _alert(str(problem)), page.conversation.snippet()
        return self._beside(page, *values[3:5])

    def followed(self, live: bool, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
        """A strength has changed: answer again, if that is wanted."""
        yield (self.gr.skip(),) * 4  # Gradio empties the outputs of a generator that ends without a value
        if live and page.conversation.shown:
            yield from self._answer(Page.follow, page, values, base_too=False)

    def again(self, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The button: answer again whatever has changed."""
        yield from self._answer(lambda p: p.conversation.again(), page, values)

    def sent(self, text: str, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
        """A message; its field is emptied once, and may hold the next one while this one is answered."""
        field = ""
        for answers in self._answer(lambda p: p.conversation.stream(text), page, values):
            yield field, *answers
            field = self.gr.skip()

    def picked(self, number: int, page: Page, *values: Any) -> Iterator[tuple[Any, ...]]:
        """An example: its words are watched, and it is asked."""
        example = self.shown[number]
        values = (*values[:3], example.words, example.opener, *values[5:])
        for answers in self._answer(lambda p: p.conversation.stream(example.question), page, values):
            yield example.words, example.opener, *answers

    def stopped(self, page: Page) -> None:
        """The button: stop after the token that is being written."""
        page.conversation.stop()

    def reset(self, page: Page, *values: Any) -> tuple[Any, ...]:
        """The button: begin anew."""
        page.conversation.reset()
        return [], [], *self._beside(page, *values[3:5])

    def _prepare(self, page: Page, values: Sequence[Any]) -> None:
        temperature, max_tokens, seed = values[:3]
        strengths = [math.nan if v is None else float(v) for v in values[5:]]
        if not all(map(math.isfinite, strengths)):
            raise WsError("A strength must be a finite number.")
        page.turn_dials(strengths)
        heat = math.nan if temperature is None else float(temperature)
        page.conversation.sampling = Sampling(heat, int(max_tokens or 0), int(seed or 0))

    def _answer(
        self, turns: Callable[[Page], Iterator[Turn]], page: Page, values: Sequence[Any], base_too: bool = True
    ) -> Iterator[tuple[Any, ...]]:
        """Both columns as they are written, and at the end what stands beside them.

        The base's answer does not depend on the strength; where that is all that changes it stays until the end.
        """
        same = self.gr.skip()
        try:
            self._prepare(page, values)
            for _ in turns(page):
                yield page.columns(BASE) if base_too else same, page.columns(STEERED), same, same
        except WsError as problem:
            self.gr.Warning(escape(str(problem)), title="Not answered")
        yield page.columns(BASE), page.columns(STEERED), *self._beside(page, *values[3:5])

    def _beside(self, page: Page, words: str, opener: str) -> tuple[str, str]:
        """The panel and the snippet."""
        try:
            panel = page.panel(words, opener)
        except WsError as problem:
            panel = _alert(str(problem))
        return panel, page.conversation.snippet()


def _streamed(handler: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    """The handler as a plain generator function, for Gradio streams no other, and a type checker may wrap handlers."""
    return lambda *values: (yield from handler(*values))


def _wire(blocks: Any, w: _Widgets, new_page: Callable[[], Page], shown: Sequence[Example]) -> None:
    """Connect the components with what happens."""
    do, everything, beside = _Handlers(w.gr, new_page, shown), [*w.columns, w.panel, w.snippet], [w.panel, w.snippet]
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    live, at_once = quiet | {"trigger_mode": "always_last"}, quiet | {"trigger_mode": "multiple"}
    blocks.load(do.opened, [w.words, w.opener, w.page], [w.page, *beside], **quiet)
    w.box.submit(_streamed(do.sent), [w.box, *w.dials], [w.box, *everything], **at_once)
    w.picked.click(_streamed(do.picked), [w.picked, *w.dials], [w.words, w.opener, *everything], **at_once)
    w.again.click(_streamed(do.again), w.dials, everything, **at_once)
    w.stop.click(do.stopped, w.page, None, **quiet)
    for clear in (w.reset.click, *(column.clear for column in w.columns)):
        clear(do.reset, w.dials, everything, **quiet)
    for slider in w.sliders:
        slider.change(do.moved, w.dials, beside, **live)
        slider.change(_streamed(do.followed), [w.live, *w.dials], everything, **live)
    for part in (w.words, w.opener, w.temperature, w.max_tokens, w.seed):
        part.change(do.moved, w.dials, beside, **live)


def launch(blocks: Any, port: int | None = None, share: bool = False) -> str:
    """Serve the page from threads of its own, and return its address; Ctrl-C then reaches whoever waits."""
    gr, routes, hosts = _gradio(), import_module("gradio.routes"), set(LOOPBACK)
    app = routes.App(default_response_class=routes.ORJSONResponse)
    stack = app.build_middleware_stack
    app.build_middleware_stack = lambda: Guard(stack(), hosts)  # before Gradio's own, which answers some by itself
    system = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    try:
        _, local, public = blocks.launch(
            server_name=HOST,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            run_history=False,
            show_error=True,
            _app=app,
            theme=gr.themes.Default(primary_hue="blue", font=system[0], font_mono=system[1]),
            css=_css(),
        )
    except OSError as problem:
        where = f"port {port}" if port else "any port from 7860 on"
        raise WsError(f"The page cannot be served on {where} ({problem}); choose another with --port.") from problem
    if public:
        hosts.add(str(urlsplit(public).hostname))
    return public or local


def close(blocks: Any) -> None:
    """End the page at once: what a browser still waits for has no end of its own."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would call that an error
    blocks.server.config.timeout_graceful_shutdown = 0
    blocks.close(verbose=False)


def main(options: PlayOptions) -> None:
    """The command `ws play`."""
    _gradio()
    with open_engine(options) as engine:
        blocks = build(options, engine)
        address = launch(blocks, options.port, options.share)
        try:  # from the first word on, an interrupt is how this ends
            console.show(console.Result(address, {"address": address}))
            say("Open this address in a browser; Ctrl-C ends it.")
            Event().wait()
        except KeyboardInterrupt:
            say("\nEnded.")
        finally:
            close(blocks)


if __name__ == "__main__":
    console.run(main, PlayOptions, "ws play")
