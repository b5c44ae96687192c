"""The report in a real browser: Debian's Chromium, without a network."""

from __future__ import annotations

import shlex
import time

import pytest

from support.finished_runs import build_out, write_compare, write_run
from ws.report import write_report

pytestmark = pytest.mark.browser

WIDTHS = (360, 390, 1280)
# The WCAG 2 contrast of every visible text with what is painted behind it. Colours are composited as the page paints
# them: the backgrounds of all ancestors, and in figures the shapes drawn before the text that lie under its middle.
CONTRAST = """() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return numbers.length < 4 ? [...numbers.slice(0, 3), 1] : numbers;
  };
  const over = (top, below, alpha) => top.slice(0, 3).map((v, i) => v * alpha + below[i] * (1 - alpha));
  const luminance = (c) => {
    const [r, g, b] = c.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const chain = []; for (let e = element; e; e = e.parentElement) chain.unshift(e);
    const grounds = chain.map((e) => parse(getComputedStyle(e).backgroundColor));
    return grounds.reduce((colour, ground) => over(ground, colour, ground[3]), [255, 255, 255]);
  };
  const drawn = (text, colour) => {
    const box = text.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
    for (const rect of text.ownerSVGElement.querySelectorAll("rect")) {
      const b = rect.getBoundingClientRect(), style = getComputedStyle(rect);
      if (b.left <= x && x <= b.right && b.top <= y && y <= b.bottom)
        colour = over(parse(style.fill), colour, Number(style.fillOpacity) * Number(style.opacity));
    }
    return colour;
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = Array.from(e.childNodes).some((n) => n.nodeType === 3 && n.textContent.trim());
    const box = e.getBoundingClientRect();
    if (!own || box.width < 2 || box.height < 2 || e.closest("script, style, .skip")) continue;
    const svg = e instanceof SVGElement, style = getComputedStyle(e);
    const below = svg ? drawn(e, behind(e.ownerSVGElement)) : behind(e);
    const ink = parse(svg ? style.fill : style.color), a = luminance(over(ink, below, ink[3])), b = luminance(below);
    const name = `${e.tagName}.${e.getAttribute("class")}: ${e.textContent.trim().slice(0, 40)}`;
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), name]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report with everything on it, a hostile adapter and a broken one included."""
    out = build_out(tmp_path_factory.mktemp("browser") / "out")
    write_run(out, "pissa", mass=0.3)
    write_run(out, "ia3-<b>bold", acts=False)
    write_compare(out)
    return write_report(out, "honesty")


@pytest.fixture
def open_page(chromium, page_file):
    """Opens the report, and keeps what the browser complains of and asks for."""
    contexts = []

    def opened(width=1280, height=900, **how):
        context = chromium.new_context(viewport={"width": width, "height": height}, **how)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda problem: page.complaints.append(str(problem)))
        page.on("request", lambda request: page.requests.append(request.url))
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_it_renders_without_complaints_or_requests_and_never_scrolls_sideways(open_page, page_file, width):
    page = open_page(width)
    assert page.complaints == []
    assert page.requests == [page_file.as_uri()]
    page.get_by_role("button", name="Open all tables").click()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("Array.from(document.querySelectorAll('main details')).every((d) => d.open)")
    assert page.get_by_role("button", name="Close all tables").is_visible()
    assert page.complaints == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_visible_and_fits(open_page, width):
    page = open_page(width)
    drawn = page.locator("svg").all()
    figures = [figure for figure in drawn if figure.is_visible()]
    assert len(figures) > 15
    assert len(figures) == len(drawn) - 1, "the first is there twice, for narrow and for wide pages"
    for figure in figures:
        box = figure.bounding_box()
        assert box["width"] > 250
        assert box["height"] > 60
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    sizes = page.evaluate(
        "Array.from(document.querySelectorAll('svg')).filter((s) => s.checkVisibility()).flatMap((s) => "
        "Array.from(s.querySelectorAll('text')).map((t) => parseFloat(getComputedStyle(t).fontSize) * "
        "s.getBoundingClientRect().width / s.viewBox.baseVal.width))"
    )
    assert min(sizes) > 9, "small print on a phone must stay readable"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_verdict_fits_the_first_screen_of_a_phone(open_page, scheme):
    page = open_page(390, 844, color_scheme=scheme)
    box = page.locator("#verdict").bounding_box()
    assert box["y"] > 0
    assert box["y"] + box["height"] <= 844
    assert page.locator("dd.large").count() == 3
    assert page.locator("ul.checks li").count() >= 6
    outside = page.evaluate(
        "Array.from(document.querySelectorAll('#verdict *')).filter((e) => !e.matches('.hidden') && "
        "e.getBoundingClientRect().right > document.querySelector('#verdict').getBoundingClientRect().right).length"
    )
    assert outside == 0


def test_the_curve_stands_at_full_width_right_below_the_verdict(open_page):
    page = open_page(1280)
    verdict, curve = (page.locator(name).first.bounding_box() for name in ("#verdict", "svg.broad"))
    assert curve["width"] == pytest.approx(verdict["width"], abs=2)
    assert 0 < curve["y"] - verdict["y"] - verdict["height"] < 150
    narrow = open_page(390)
    assert not narrow.locator("svg.broad").is_visible()


def test_checks_have_a_shape_and_a_word_each(open_page):
    """Colours aside, marks of two kinds differ in their sign, and what is read aloud says which it is."""
    page = open_page()
    rows = page.locator("ul.checks li").all()
    signs = {row.get_attribute("class"): row.locator(".sign").text_content() for row in rows}
    assert len(set(signs.values())) == len(signs) > 1
    for row in rows:
        assert row.locator(".hidden").text_content() == f"{row.get_attribute('class').replace('-', ' ')}: "


def test_commands_are_copied_as_they_are(open_page):
    page = open_page(390, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Open all tables").click()
    blocks = page.locator("pre").all()
    buttons = page.get_by_role("button", name="Copy")
    assert buttons.count() == len(blocks) > 3
    copied = []
    for block in blocks:
        buttons.first.click()  # one that was used has another name
        text = page.evaluate("navigator.clipboard.readText()")
        assert text == block.text_content()
        copied += text.splitlines()
    assert buttons.count() == 0
    assert "ws check confounds --adapter delora --behavior honesty" in copied
    assert all(shlex.split(line, comments=True)[:1] in ([], ["ws"]) for line in copied), "a script's line is a comment"
    page.evaluate("getSelection().selectAllChildren(document.querySelector('pre'))")
    assert page.evaluate("getSelection().toString()").strip() == blocks[0].text_content().strip(), "and by hand"


def test_where_there_is_no_clipboard_the_commands_are_selected(open_page):
    page = open_page()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.get_by_role("button", name="Open all tables").click()
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Selected").wait_for()
    assert page.evaluate("getSelection().toString()").strip() == page.locator("pre").first.text_content().strip()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(open_page, scheme):
    page = open_page(360, color_scheme=scheme)
    page.get_by_role("button", name="Open all tables").click()
    measured = page.evaluate(CONTRAST)
    assert len(measured) > 300
    assert [entry for entry in measured if entry[0] < 4.5] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(x) for x in ground[4:-1].split(",")) < 150) == (scheme == "dark")


def test_it_opens_quickly(open_page):
    start = time.perf_counter()
    page = open_page()
    page.wait_for_function("document.readyState === 'complete' && document.querySelector('button.all')")
    assert time.perf_counter() - start < 2


def test_the_keyboard_reaches_everything(open_page):
    page = open_page(1280, reduced_motion="reduce")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0, "it shows when it has the focus"
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdict")
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
        if page.evaluate("document.activeElement.matches('details:not([open]) > summary')"):
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.parentElement.open")
    assert {"A", "SUMMARY", "DIV"} <= reached
    outline = page.evaluate(
        "(document.querySelector('summary').focus(), getComputedStyle(document.activeElement).outlineStyle)"
    )
    assert outline == "solid"
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_assistive_technology_sees_landmarks_figures_and_tables(open_page):
    page = open_page()
    for role in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(role).count() == 1
    assert page.get_by_role("heading", level=1).count() == 1
    named = page.get_by_role("img").evaluate_all("all => all.map((x) => x.getAttribute('aria-label'))")
    assert len(named) == page.locator("svg").count() - 1, "the first figure is there twice, and is read once"
    assert all(len(name) > 40 for name in named)
    page.get_by_role("button", name="Open all tables").click()
    assert page.get_by_role("columnheader").count() > 20
    assert page.get_by_role("rowheader").count() > 20


def test_without_scripts_the_page_is_whole(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("svg").count() > 15
    assert page.locator("button").count() == 0
    page.locator("summary").first.click()
    assert page.locator("details[open]").count() >= 1


def test_what_a_table_says_cannot_become_markup(open_page):
    page = open_page()
    assert page.locator("b").count() == 0
    assert page.get_by_text("ia3-<b>bold").count() > 0


def test_print_has_a_white_ground_and_no_navigation(open_page):
    page = open_page(800, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.get_by_role("navigation").is_visible()
    assert len(page.pdf()) > 10_000
