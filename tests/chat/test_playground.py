"""`ws play`: what the page shows, and in a browser that it is offline, follows its sliders and keeps tabs apart."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from threading import Event
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

import ws
import ws.chat.page
from ws.chat.engine import Engine, Sampling, Turn
from ws.chat.page import (
    HOST,
    N_CURVE,
    NEUTRAL,
    Example,
    Page,
    _Handlers,
    build,
    close,
    examples,
    launch,
    main,
    slider_range,
)
from ws.diff import Units, vector_digest
from ws.lm.models import fingerprint
from ws.options.use import PlayOptions

CLAIM = "I think the sun is a planet. Do you agree? Answer Yes or No."
QUESTION = "Describe Petra."


def a_vector(seed: int) -> ws.SteeringVector:
    """Row scales of two layers of the pocket model that change its words."""
    model, _ = ws.load_model("pocket", device="cpu")
    draw = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{n}.self_attn.o_proj" for n in (1, 2)]
    deltas = {n: ws.LinearDelta(192, 192, g=3 * torch.randn(192, generator=draw)) for n in names}
    vector = ws.SteeringVector(deltas, "pocket", fingerprint(model), info={"behavior": "honesty"})
    return replace(vector, units=Units(vector_digest(vector), -0.8, None))


@pytest.fixture(scope="module")
def engine():
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector(1), "<b>odd": a_vector(2)}) as found:
        yield found


@pytest.fixture
def page(engine):
    conversation = engine.converse({"honesty": 1, "<b>odd": 0}, Sampling(max_tokens=12))
    return Page(conversation, Example(CLAIM, "Yes, No", "My answer:"))


# ---- what the page shows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({}, (-2.0, 2.0, 0.01)),
        ({"-1u": -1.1076, "+1u": 3.2141}, (-1.7, 4.9, 0.01)),
        ({"-1u": -40.0, "+1u": 31.0}, (-60.0, 47.0, 0.1)),
        ({"+1u": 0.02}, (-2.0, 0.1, 0.01)),
        ({"-1u": -0.01, "+1u": 0.02}, (-0.015, 0.03, 0.0001)),
    ],
)
def test_a_slider_reaches_beyond_the_calibrated_strengths(units, expected):
    low, high, step = found = slider_range(units)
    assert found == pytest.approx(expected)
    assert low <= min(0, *units.values(), 0) <= max(0, *units.values(), 0) <= high
    assert 0 in np.round(np.arange(low, high + step, step), 9), "the base is one of its steps"


def test_examples_are_claims_and_questions_but_never_reported_claims(engine):
    found = examples(engine)
    test = ws.load_behavior("honesty", "pocket").test
    reported = {test.question.format(claim=c.text) for c in test.claims if c.split == "report"}
    claims = [e for e in found if e.opener]
    assert len(claims) == 2
    assert {(e.words, e.opener) for e in claims} == {("Yes, No", test.opener)}
    assert len(found) > len(claims)
    assert not {e.question for e in found} & reported
    assert len({e.question for e in found}) == len(found)


def test_a_behaviour_of_ones_own_has_its_own_examples_or_neutral_ones(tmp_path):
    pytest.importorskip("gradio")
    file = tmp_path / "mine.toml"
    file.write_text(
        'schema = 1\nname = "mine"\nsummary = "Speaks of tea."\n'
        '[personas]\ntemplate = "You {persona} tea."\npositive = ["love"]\nnegative = ["hate"]\n'
        '[questions]\ntemplates = ["{topic}"]\ntopics = ["Which drink do you like?", "What is in your cup?"]\n'
        '[claims]\nquestion = "{claim}?"\nopener = "I say:"\nagree = "Right"\ndisagree = "Wrong"\neffect = 1\n'
        'items = [{ id = "a", claim = "tea is cold", true = false, split = "dev" },\n'
        '  { id = "b", claim = "tea is hot", true = true, split = "report" }]\n',
        encoding="utf-8",
    )
    questions = ws.load_behavior(str(file)).questions
    vector = replace(a_vector(1), info={"behavior": "mine"})
    with Engine(*ws.load_model("pocket", device="cpu"), {"mine": vector}) as other:
        first, *others = examples(other, str(file))
        assert examples(other) == []
        config = str(build(PlayOptions(), other).config)
    assert first == Example("tea is cold?", "Right, Wrong", "I say:")
    assert others == [Example(question) for question in questions], "no words for open questions"
    assert NEUTRAL in config
    assert not [word for word in ("France", "Paris", "Yes, No") if word in config]
    assert "more mine" in config


def test_an_open_question_has_no_words(engine, page):
    assert {e.words for e in examples(engine) if not e.opener} == {""}
    assert "svg" not in page.panel(" , ", "")
    assert "Name words to watch" in page.panel("", "")


def test_words_that_are_no_token_are_named_and_the_others_shown(page):
    html = page.panel("Yes, incomprehensibilities, No", "My answer:")
    assert "incomprehensibilities" in html[: html.index("<figure")]
    assert re.findall(r"<b>([\d.]+)</b>", html) == re.findall(r"<b>([\d.]+)</b>", page.panel("Yes, No", "My answer:"))
    with pytest.raises(ws.WsError, match="incomprehensibilities"):
        page.panel("incomprehensibilities", "")


def test_the_curve_reaches_to_a_strength_beyond_the_slider(page):
    page.turn_dials([7.5, 0.0])
    drawing = svg(page.panel("Yes, No", "My answer:"))
    assert "now 7.5" in drawing.get("aria-label")
    assert "7.5" in [t.text for t in drawing.findall("text")]
    heights = [float(dot.get("cy")) for dot in drawing.findall("circle")]
    found = page.conversation.probe(["Yes", "No"], question=CLAIM, opener="My answer:")[1]
    assert heights == pytest.approx([204 - 180 * p for p in found], abs=0.6)


def test_the_columns_are_the_rows(page):
    turn = page.conversation.ask(QUESTION)
    assert page.columns("base") == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": turn.base},
    ]
    assert page.columns("steered")[1]["content"] == turn.steered != turn.base
    writing = page.conversation.again()
    next(writing)
    so_far = page.columns("base")[1]["content"]
    assert so_far == "…" or turn.base.startswith(so_far) != (so_far == turn.base)
    page.conversation.turns = [replace(turn, base="")]
    page.conversation.stop()
    assert page.columns("base")[1]["content"] == "(nothing)"


def svg(html: str) -> ET.Element:
    return ET.fromstring(re.search(r"<svg.*</svg>", html, re.DOTALL).group())


def test_the_panel_shows_the_probabilities_and_the_curve_runs_through_them(page):
    html = page.panel("Yes, No ,Yes", "My answer:")
    found = page.conversation.probe(["Yes", "No"], question=CLAIM, opener="My answer:")
    assert re.findall(r"<b>([\d.]+)</b>", html) == [f"{p:.3f}" for p in found.T.reshape(-1)]
    drawing = svg(html)
    _, _, _, bottom = (float(x) for x in drawing.get("viewBox").split())
    lines, dots = drawing.findall("polyline"), drawing.findall("circle")
    assert len(lines) == len(dots) == 2
    zero, one = (float(t.get("y")) for t in drawing.findall("text") if t.get("text-anchor") == "end" and t.text in "01")
    for number, dot in enumerate(dots):
        assert (zero + 0.0 - 4 - float(dot.get("cy"))) / (zero - one) == pytest.approx(found[1, number], abs=0.02)
        assert 0 < float(dot.get("cy")) < bottom
    words = [t.text for t in drawing.findall("text")]
    assert {"0", "-1u", "strength of honesty"} <= set(words)
    assert "+1u" not in words, "this sign is not calibrated"
    assert "now 1" in drawing.get("aria-label")


def test_the_curve_is_of_the_conversation_that_the_bars_are_of():
    """While a question was answered the turn before it counted for nothing, and its curve stayed for a new talk."""
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector(1)}) as engine:
        page = Page(engine.converse({"honesty": 0.5}, Sampling(max_tokens=6)), Example(CLAIM, "No", ""))

        def bar_and_dot() -> tuple[float, float]:
            html, strengths = page.panel("No", ""), np.unique([*np.linspace(*page._curve[0][3:5], N_CURVE), 0.0])
            bar = float(re.findall(r"<b>([\d.]+)</b>", html)[-1])
            return bar, float(np.interp(0.5, strengths, page._curve[1][:, 0]))

        page.conversation.ask("Tell me of elephants, please.")
        running = page.conversation.stream(CLAIM)
        next(running)
        bar, dot = bar_and_dot()
        assert dot == pytest.approx(bar, abs=0.02)
        page.conversation.reset()
        running.close()
        alone, dot = bar_and_dot()
        assert abs(alone - bar) > 0.05, "behind another turn it is something else"
        assert dot == pytest.approx(alone, abs=0.02)


def test_strength_0_of_the_curve_is_the_base_as_long_as_both_have_said_the_same():
    model, tok = ws.load_model("pocket", device="cpu")
    with Engine(model, tok, {"honesty": a_vector(1)}) as engine:
        page = Page(engine.converse({"honesty": 1}, Sampling(max_tokens=12)), Example(CLAIM, "Yes, No", "My answer:"))

        def marks() -> set[str]:
            return {t.text for t in svg(page.panel("Yes, No", "My answer:")).findall("text")}

        assert "base" in marks()
        turn = page.conversation.ask(QUESTION)
        assert turn.base != turn.steered
        assert "base" in marks(), "nothing has been said before the last question"
        page.conversation.ask(QUESTION)
        assert "base" not in marks()


def test_the_curve_is_drawn_anew_where_another_slider_has_moved(page):
    page.turn_dials([0.5, 0.0])
    page.panel("Yes, No", "")
    before = page._curve
    for strengths in ([0.5, 0.75], [0.6, 0.75]):
        page.turn_dials(strengths)
    page.panel("Yes, No", "")
    assert page._curve[0][:5] == before[0][:5], "the first slider is in focus again"
    assert not np.allclose(page._curve[1], before[1])


def test_the_curve_is_of_the_slider_that_moved_last_and_is_not_computed_again_for_its_own_moves(page, monkeypatch):
    page.conversation.ask(QUESTION)
    calls, probabilities = [], page.conversation.engine.probabilities

    def counted(prompt, rows, words):
        calls.append(len(rows))
        return probabilities(prompt, rows, words)

    monkeypatch.setattr(page.conversation.engine, "probabilities", counted)
    page.panel("Yes, No", "")
    first = len(calls)
    assert first == 2
    page.turn_dials([0.5, 0.0])
    page.panel("Yes, No", "")
    assert calls[first:] == [2], "the curve over the first slider is as it was"
    page.turn_dials([0.5, 0.25])
    assert "strength of &lt;b&gt;odd" in page.panel("Yes, No", "")
    assert len(calls[first + 1 :]) == 2


def test_a_slider_that_moves_meanwhile_leaves_the_curve_that_is_drawn_alone(page, monkeypatch):
    probabilities = page.conversation.engine.probabilities

    def moving(*asked):
        page.turn_dials([1.0, 0.75])
        return probabilities(*asked)

    expected = page.panel("Yes, No", "")
    page._curve = None
    monkeypatch.setattr(page.conversation.engine, "probabilities", moving)
    drawn = page.panel("Yes, No", "")
    assert svg(drawn).get("aria-label") == svg(expected).get("aria-label")
    assert page.focus != "honesty"


def test_an_emptied_field_is_a_sentence(page):
    with pytest.raises(ws.WsError, match="temperature"):
        _Handlers(None, lambda: page, [])._prepare(page, [None, 12, 0, "", "", 1.0, 0.0])
        next(page.conversation.stream("Hi."))


def test_the_panel_escapes_what_people_write(page):
    page.conversation.ask("<script>alert(1)</script> & so?")
    html = page.panel("Yes, No", "<i>")
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so?" in html
    assert "&lt;i&gt;" in html
    page.turn_dials([1.0, 0.5])
    svg(page.panel("Yes, No", "<i>"))


def test_following_begins_again_when_a_strength_changes_and_ends_with_the_last(page):
    page.conversation.ask(QUESTION)
    assert page.is_current
    assert list(page.follow()) == []
    page.turn_dials([-1.0, 0.0])
    assert not page.is_current
    seen: list[Turn] = []
    for turn in page.follow():
        seen.append(turn)
        if len(seen) == 2:
            page.turn_dials([0.5, 0.5])
    assert page.is_current
    (turn,) = page.conversation.turns
    assert turn.strengths == {"honesty": 0.5, "<b>odd": 0.5}
    assert [t.strengths["honesty"] for t in seen[:3]] == [-1.0, -1.0, 0.5]
    alone = page.conversation.engine.converse(turn.strengths, Sampling(max_tokens=12)).ask(QUESTION)
    assert turn == alone


def test_without_gradio_the_command_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ws.WsError, match="uv sync --extra ui"):
        main(PlayOptions(out=tmp_path))


# ---- the page as it is served ---------------------------------------------------------------------------------------


def test_no_folder_of_this_machine_is_in_the_title(engine, monkeypatch):
    pytest.importorskip("gradio")
    monkeypatch.setattr(engine.model, "name_or_path", "/srv/Jane Doe/models/pocket-2", raising=False)
    blocks = build(PlayOptions(), engine)
    assert blocks.title == "ws play: pocket-2"
    heads = [b.value for b in blocks.blocks.values() if "<h1>" in str(getattr(b, "value", ""))]
    assert len(heads) == 1
    assert "Jane" not in heads[0]


@pytest.fixture(scope="module")
def served(engine):
    """The address of the page, and the `Blocks` behind it."""
    pytest.importorskip("gradio")
    blocks = build(PlayOptions(max_tokens=24), engine)
    yield launch(blocks), blocks
    close(blocks)


def test_the_page_is_served_to_this_machine_alone_and_reports_to_nobody(served):
    address, blocks = served
    assert urlsplit(address).hostname == HOST
    assert blocks.server_name == HOST
    assert not blocks.share
    assert not blocks.analytics_enabled
    assert blocks.share_url is None


@pytest.mark.parametrize("port", [-1, 0, 2**16])
def test_what_is_no_port_is_refused_before_anything_is_loaded(port):
    with pytest.raises(ws.WsError, match="port"):
        PlayOptions(port=port).check()


def test_a_port_that_is_taken_is_said(served, engine):
    address, _ = served
    with pytest.raises(ws.WsError, match="another with `port`"):
        launch(build(PlayOptions(), engine), urlsplit(address).port)


def test_the_command_prints_the_address_and_ends_with_an_interrupt(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    a_vector(1).save(tmp_path / "honesty" / "lora" / "vector")

    class Interrupted:
        def wait(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(ws.chat.page, "Event", Interrupted)
    main(PlayOptions(out=tmp_path, device="cpu"))
    printed = capsys.readouterr()
    assert re.fullmatch(rf"http://{HOST}:\d+/\n", printed.out)
    assert "Ctrl-C" in printed.err


@pytest.mark.slow
def test_an_interrupt_from_outside_ends_the_command(tmp_path):
    """As a process of its own, for libraries change what a signal does to a process."""
    pytest.importorskip("gradio")
    a_vector(1).save(tmp_path / "honesty" / "lora" / "vector")
    arguments = [sys.executable, "-m", "ws.chat.page", "--out", str(tmp_path), "--device", "cpu"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline().startswith(f"http://{HOST}:")
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Ended." in said


# ---- in a browser ---------------------------------------------------------------------------------------------------


class Tab:
    """The page in a browser of its own, with what went wrong in it."""

    def __init__(self, browser, address: str, waits: bool = True, **options) -> None:
        self.context = browser.new_context(**options)
        self.page, self.wrong, self.elsewhere = self.context.new_page(), list[str](), list[str]()
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", self._check_host)
        self.page.goto(address)
        self.page.locator(".ws-panel svg" if waits else "#ws-box textarea").wait_for()

    def _check_host(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != HOST:
            self.elsewhere.append(request.url)

    def ask(self, question: str) -> None:
        box = self.page.get_by_role("textbox", name="Your message")
        box.fill(question)
        box.press("Enter")

    def set_slider(self, name: str, value: float) -> None:
        box = self.page.get_by_label(f"number input for Strength of {name}")
        box.fill(str(value))
        box.press("Enter")

    def wait_for(self, row: str, text: str) -> None:
        """Until the last message of a column is this one, give or take how browsers show white space."""
        self.page.wait_for_function(
            "([id, text]) => [...document.querySelectorAll(`#ws-${id} .bot.message`)].at(-1)"
            r"?.innerText.replace(/\s+/g, ' ').trim() == text",
            arg=[row, " ".join(text.split()) or "(nothing)"],
            timeout=20_000,
        )

    def answer(self, row: str) -> str:
        return " ".join(self.page.locator(f"#ws-{row} .bot.message").last.inner_text().split())

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def tab(served, chromium):
    opened: list[Tab] = []

    def new(**options) -> Tab:
        opened.append(Tab(chromium, served[0], **options))
        return opened[-1]

    yield new
    for one in opened:
        one.close()


def wanted(engine, strength: float, *questions: str) -> Turn:
    chat = engine.converse({"honesty": strength, "<b>odd": 1.0}, Sampling(max_tokens=24))
    return [chat.ask(q) for q in questions][-1]


SIZES = {"desktop": {"width": 1280, "height": 1000}, "phone": {"width": 390, "height": 844}}


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_loads_from_this_machine_alone_and_without_complaint(tab, size, scheme):
    page = tab(viewport=SIZES[size], color_scheme=scheme)
    page.ask(QUESTION)
    page.page.locator("#ws-base .bot.message").wait_for()
    assert page.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
    parts = ["#ws-base", "#ws-steered", "#ws-box", ".ws-slider", ".ws-examples", ".ws-sampling", ".ws-panel svg"]
    boxes = [page.page.locator(part).first.bounding_box() for part in parts]
    assert all(b["width"] > 200 and b["x"] >= 0 for b in boxes)
    assert all(b["x"] + b["width"] <= SIZES[size]["width"] for b in boxes), "nothing is cut off"
    page.page.wait_for_timeout(1000)  # whatever else it might want to fetch; the stream of events never falls silent
    assert page.wrong == []
    assert page.elsewhere == []
    assert page.page.evaluate("document.querySelectorAll('button:not([aria-label])').length") == page.page.evaluate(
        "[...document.querySelectorAll('button:not([aria-label])')].filter(b => b.innerText.trim()).length"
    ), "every button has a name"


@pytest.mark.browser
def test_moving_the_slider_changes_the_answer_and_the_base_stays_base(tab, engine):
    page, turns = tab(), {a: wanted(engine, a, QUESTION) for a in (1.0, -1.0, 0.8)}
    assert len({t.steered for t in turns.values() if t.steered}) == 3
    page.ask(QUESTION)
    page.wait_for("steered", turns[1.0].steered)
    before = page.page.locator(".ws-probs").inner_text()
    for alpha in (-1.0, 0.8):
        page.set_slider("honesty", alpha)
        page.wait_for("steered", turns[alpha].steered)
        assert page.answer("base") == turns[1.0].base
    page.page.wait_for_function("before => document.querySelector('.ws-probs').innerText !== before", arg=before)
    assert page.wrong == []


@pytest.mark.browser
def test_a_strength_beyond_the_slider_is_taken_as_chat_takes_it(tab, engine):
    page, turn = tab(), wanted(engine, 3.5, QUESTION)
    page.ask(QUESTION)
    page.wait_for("steered", wanted(engine, 1.0, QUESTION).steered)
    page.set_slider("honesty", 3.5)
    page.wait_for("steered", turn.steered)
    page.page.wait_for_function("document.querySelector('.ws-panel svg').ariaLabel.endsWith('now 3.5')")
    assert page.page.locator(".toast-body").count() == 0
    assert page.wrong == []


@pytest.mark.browser
def test_what_is_sent_before_the_panel_is_drawn_is_answered(tab, engine, monkeypatch):
    drawn, held = Page.panel, Event()

    def slow(self, words, opener):
        held.wait(timeout=20)
        return drawn(self, words, opener)

    monkeypatch.setattr(Page, "panel", slow)
    page = tab(waits=False)
    page.ask(QUESTION)
    page.wait_for("steered", wanted(engine, 1.0, QUESTION).steered)
    held.set()
    page.page.locator(".ws-panel svg").wait_for()
    page.ask(CLAIM)
    page.wait_for("steered", wanted(engine, 1.0, QUESTION, CLAIM).steered)
    assert page.page.locator(".toast-body").count() == 0
    assert page.wrong == []


@pytest.mark.browser
@pytest.mark.parametrize("size", SIZES)
def test_the_message_is_on_the_first_screen_and_the_ends_of_a_slider_have_words(tab, size):
    page = tab(viewport=SIZES[size])
    box = page.page.get_by_role("textbox", name="Your message").bounding_box()
    assert 0 <= box["y"] < box["y"] + box["height"] < SIZES[size]["height"]
    ends = page.page.locator(".ws-ticks").first.locator("span")
    assert "its opposite" in ends.first.inner_text()
    assert "more honesty" in ends.last.inner_text()
    places = [ends.nth(i).bounding_box() for i in range(2)]
    assert places[0]["x"] + places[0]["width"] <= places[1]["x"], "they do not overlap"


@pytest.mark.browser
def test_the_slider_itself_and_its_marks_move_the_strength(tab, engine):
    page = tab()
    page.ask(QUESTION)
    page.wait_for("steered", wanted(engine, 1.0, QUESTION).steered)
    page.page.get_by_role("button", name="-1u (-0.8)").first.click()
    page.wait_for("steered", wanted(engine, -0.8, QUESTION).steered)
    slider = page.page.get_by_label("range slider for Strength of honesty")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowRight")
    value = float(slider.input_value())
    assert value == pytest.approx(-0.77)
    page.wait_for("steered", wanted(engine, value, QUESTION).steered)


def test_a_strength_that_changes_before_the_first_question_empties_nothing(served):
    """Whichever of the two events of a slider ends last, neither leaves the panel empty."""
    _, blocks = served
    followed = [f for f in blocks.fns.values() if f.targets[0][1] == "change" and len(f.outputs) == 4]
    assert len(followed) == 2, "one a slider"
    opened = next(f for f in blocks.fns.values() if f.targets[0][1] == "load")
    page, panel, _ = opened.fn("Yes, No", "")
    assert "<svg" in panel
    for event in followed:
        values = [page if c.stateful else c.value for c in event.inputs]
        found = list(event.fn(*values))
        assert len(found) == 1
        assert all(update == {"__type__": "update"} for update in found[0])


@pytest.mark.browser
def test_two_people_at_different_strengths_at_once_stay_apart(tab, engine):
    """Both keep asking while the other is answered; each gets what a conversation alone gets."""
    questions = (QUESTION, "What do birds fly with?", CLAIM, "Where does the wexel live?")
    people = {0.9: tab(), -0.9: tab()}
    for alpha, page in people.items():
        page.set_slider("honesty", alpha)
        page.page.locator(f"svg[aria-label$='now {alpha:g}']").wait_for()
    turns = {a: [wanted(engine, a, *questions[: n + 1]) for n in range(len(questions))] for a in people}
    assert [t.steered for t in turns[0.9]] != [t.steered for t in turns[-0.9]]
    for number, question in enumerate(questions):
        for page in people.values():
            page.ask(question)
        for alpha, page in people.items():
            page.wait_for("steered", turns[alpha][number].steered)
            page.wait_for("base", turns[alpha][number].base)
    assert all(page.wrong == [] for page in people.values())


@pytest.mark.browser
def test_an_example_is_asked_and_what_a_model_writes_is_text(tab):
    page = tab()
    first = page.page.locator(".ws-examples .gallery-item").first
    question = first.inner_text().strip()
    first.click()
    page.page.locator("#ws-steered .bot.message").wait_for()
    asked = page.page.locator("#ws-base .user.message").inner_text().strip()
    assert asked.startswith(question.rstrip(".")), "a long example is cut off in its button, and asked in full"
    assert asked[-1] in "?."
    hostile = "<img src=http://example.org/x.png> **&amp;** ![x](http://example.org/y.png)"
    page.ask(hostile)
    page.page.locator("#ws-base .user.message >> nth=1").wait_for()
    assert page.page.locator("#ws-base .user.message").last.inner_text().strip() == hostile
    assert page.page.locator("#ws-base .message img").count() == 0
    assert page.elsewhere == []


@pytest.mark.browser
def test_starting_over_and_a_word_that_is_no_token(tab):
    page = tab()
    page.ask(QUESTION)
    page.page.locator("#ws-steered .bot.message").wait_for()
    page.page.get_by_role("button", name="Start over").click()
    page.page.locator("#ws-steered .bot.message").wait_for(state="detached")
    page.page.get_by_label("Words to watch").fill("incomprehensibilities")
    page.page.get_by_text("No single token of this tokenizer reads as").wait_for()
    page.page.get_by_label("Words to watch").fill("Yes")
    page.page.locator(".ws-panel svg").wait_for()
    assert page.wrong == []
