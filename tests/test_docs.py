"""README and docs are run, not only read: commands and Python snippets in order, in an empty folder."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import pytest

from support import processes
from ws.files.runs import read_csv, typed

ROOT = Path(__file__).parents[1]
FIRST = [ROOT / "README.md", ROOT / "docs" / "tour.md"]  # they leave what the other pages use
PAGES = [*FIRST, *sorted(set((ROOT / "docs").glob("*.md")) - set(FIRST))]
# Pages of minutes, whose commands have tests of their own.
LONG = ("baselines", "data", "evaluations")
SERVED = "http://127.0.0.1:8000/v1"
FENCE = re.compile(r"^ *```(\w+)([^\n]*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[tuple[str, str]]:
    """`(language, code)` of the fenced blocks that can run here; a fence marked `skip` says why in the prose."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    run = [(language, dedent(code)) for language, info, code in found if "skip" not in info]
    return [(language, code) for language, code in run if language in ("bash", "python")]


def run_command(line: str, cwd: Path) -> str:
    """Run one `uv run ...` line in this environment instead of a new one."""
    words = shlex.split(line, comments=True)
    assert words[:2] == ["uv", "run"], f"only `uv run` lines can be checked: {line}"
    done = processes.run(words[2:], cwd)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def background(cwd: Path) -> Iterator[Callable[[str], str]]:
    """Starts `uv run ws serve ... &` lines, at ports that are free; what is started ends with the page."""
    with ExitStack() as stack:

        def start(line: str) -> str:
            """The address that the server prints."""
            scratch = Path(stack.enter_context(TemporaryDirectory()))
            process = processes.start([*shlex.split(line.removesuffix("&"))[2:], "--port", "0"], cwd, scratch)
            stack.callback(end, process)
            out, deadline = scratch / "out", time.monotonic() + 120
            while not (out.exists() and out.read_text(encoding="utf-8").endswith("\n")):
                assert process.is_alive(), (scratch / "err").read_text(encoding="utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.1)
            return out.read_text(encoding="utf-8").strip()

        def end(process: BaseProcess) -> None:
            process.terminate()
            process.join(30)
            assert process.exitcode == 0

        yield start


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory) -> Path:
    """An empty folder shared by all pages; README and tour come first and leave what the others use."""
    return tmp_path_factory.mktemp("newcomer")


def run_snippets(page: Path, cwd: Path, start: Callable[[str], str]) -> None:
    """Run a page's blocks in order; a server that one of them starts is asked at its own address."""
    namespace: dict[str, object] = {}
    address = SERVED
    for language, code in snippets(page):
        if language == "python":
            exec(compile(code.replace(SERVED, address), str(page), "exec"), namespace)
            continue
        for line in filter(None, (x.strip() for x in code.splitlines())):
            if line.startswith("uv run pytest"):
                continue
            if line.endswith("&"):
                address = start(line)
                continue
            out = run_command(line, cwd)
            if line == "uv run ws demo":
                assert "is not known before nulls are trained" in out
                assert "as the behaviour predicts" not in out
                assert "one seed" in out


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in LONG], ids=lambda p: p.stem)
def test_snippets_run(page, newcomer, monkeypatch, capsys):
    monkeypatch.chdir(newcomer)
    with background(newcomer) as start:
        run_snippets(page, newcomer, start)
    if page.stem == "README":
        base, steered = capsys.readouterr().out.splitlines()
        assert base.startswith("0 ")
        assert "wings" in base
        assert "gills" in steered


@pytest.mark.slow
def test_snippets_of_long_pages_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in [*FIRST, *(p for p in PAGES if p.stem in LONG)]:
        with background(tmp_path) as start:
            run_snippets(page, tmp_path, start)


def test_the_documented_behaviour_file_is_valid(tmp_path):
    import ws

    (code,) = [
        c for language, _, c in FENCE.findall((ROOT / "docs" / "behaviors.md").read_text()) if language == "toml"
    ]
    (tmp_path / "brevity.toml").write_text(code)
    behavior = ws.load_behavior(str(tmp_path / "brevity.toml"))
    assert behavior.positive == ("You are a terse assistant.",)
    assert behavior.test.claims == ws.load_behavior("sycophancy").test.claims


def test_the_documented_prompts_file_is_valid(tmp_path):
    from ws.eval.airisk import _SLOTS, Prompts
    from ws.eval.prompts import load_prompts

    (code,) = [
        c for language, _, c in FENCE.findall((ROOT / "docs" / "evaluations.md").read_text()) if language == "toml"
    ]
    (tmp_path / "prompts.toml").write_text(code)
    assert load_prompts(Prompts(), tmp_path / "prompts.toml", _SLOTS) != Prompts()


def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: a link, an anchor or a name in the API page that leads nowhere is an error."""
    command = [
        str(Path(sys.executable).with_name("mkdocs")),
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert all(f'id="ws.{name}"' in api for name in ("diff.SteeringVector.from_checkpoints", "steer.steer"))
    assert 'id="the-hub"' in (tmp_path / "exports" / "index.html").read_text()  # no fence has swallowed a heading
    for page in ("index.html", "notebook/index.html"):
        text = (tmp_path / page).read_text()
        asked = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="https?:[^>]*>', text)
        assert not asked, f"{page} asks other hosts for something"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    assert not [p.name for p in PAGES[1:] if p.name not in nav]


def test_every_relative_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tables_of_the_sweep_are_their_csvs():
    """What the page shows of the sweep is what it wrote."""
    from ws.analysis.sweep_tables import render
    from ws.eval.readme_airisk_table import check

    results = ROOT / "docs" / "results"
    page = ROOT / "docs" / "results.md"
    check(page, results / "readme_airisk_table.csv")
    assert render(read_csv(results / "sweep_pooled.csv")) in page.read_text()


def test_the_comparison_is_its_csvs():
    """The page's tables are the ones that `ws compare` wrote."""
    from ws.analysis.compare_tables import render

    rows, pairs = (typed(read_csv(ROOT / "docs" / "results" / f"{n}.csv")) for n in ("compare", "compare_pairs"))
    page = (ROOT / "docs" / "results.md").read_text()
    assert page.split("<!-- compare -->")[1].split("<!-- /compare -->")[0].strip() == render(rows, pairs, "github")


@pytest.mark.parametrize("behavior", ["truthfulness", "agreement", "honesty"])
def test_the_tables_of_the_real_model_are_their_csvs(behavior):
    from benchmarks.smollm2 import render

    page = (ROOT / "docs" / "results.md").read_text()
    shown = page.split(f"<!-- smollm2 {behavior} -->")[1].split(f"<!-- /smollm2 {behavior} -->")[0]
    assert shown.strip() == render(read_csv(ROOT / "docs" / "results" / f"smollm2_{behavior}.csv"))


def test_the_readme_says_of_the_real_model_what_the_page_says():
    """Its table has the column of preferences of all behaviours, in rows that are called as there."""
    page, (header, _, *shown) = (ROOT / "docs" / "results.md").read_text(), readme_table()
    assert len(shown) >= 5
    for column, behavior in enumerate(header[1:], start=1):
        table = page.split(f"<!-- smollm2 {behavior} -->")[1].split(f"<!-- /smollm2 {behavior} -->")[0]
        names, *rows = cells_of(table.strip())
        preference = {cells[0]: cells[names.index("preference")] for cells in rows}
        assert [cells[column] for cells in shown] == [preference.get(cells[0], "") for cells in shown]


def readme_table() -> list[list[str]]:
    """The cells of the table of results in the README."""
    return cells_of((ROOT / "README.md").read_text().split("## What comes out")[1].split("\n## ")[0])


@pytest.mark.parametrize("model", ["pocket", "smollm2"])
def test_the_ways_to_learn_are_their_csvs(model):
    from benchmarks.contrasts import render

    rows, beyond = (read_csv(ROOT / "docs" / "results" / f"contrasts_{model}{n}.csv") for n in ("", "_beyond_arms"))
    page = (ROOT / "docs" / "vectors.md").read_text()
    shown = page.split(f"<!-- contrasts {model} -->")[1].split(f"<!-- /contrasts {model} -->")[0]
    assert shown.strip() == render(rows, beyond)


def test_the_profiles_are_their_csvs():
    from benchmarks.profile import planted_page, real_page

    page = (ROOT / "docs" / "profile.md").read_text()
    made = {"planted": planted_page(), **{name: real_page(name) for name in ("truthfulness", "agreement")}}
    for name, table in made.items():
        assert page.split(f"<!-- profile {name} -->")[1].split(f"<!-- /profile {name} -->")[0].strip() == table


def test_the_results_table_is_the_csv():
    """The page's numbers are the ones that the benchmark wrote."""
    with (ROOT / "benchmarks" / "results" / "pocket_effects.csv").open() as file:
        rows = {row["adapter"]: row for row in csv.DictReader(file)}
    table = (ROOT / "docs" / "results" / "pocket_effects.md").read_text().split("\n\n")[0]
    assert table in (ROOT / "docs" / "results.md").read_text()
    for row in rows.values():
        assert f"{float(row['span']):+.2f} [{float(row['span_ci_lo']):+.2f}, {float(row['span_ci_hi']):+.2f}]" in table


def cells_of(text: str) -> list[list[str]]:
    """The cells of every line of a Markdown table, headers and rules included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_the_shares_of_the_statistics_are_what_was_simulated():
    found = json.loads((ROOT / "benchmarks" / "results" / "small_samples.json").read_text())["results"]
    page = (ROOT / "docs" / "evaluations.md").read_text()
    for seeds, items in ((s, n) for s in (2, 3, 5) for n in (12, 113)):
        key = f"coverage, {seeds} seeds, {items} items, by standard deviation of seeds in standard errors"
        for kind, name in (("plain", "plain bootstrap"), ("ours", "moved apart")):
            shares = [f"{found[key][ratio][kind]:.2f}" for ratio in ("0", "1", "3", "10")]
            assert f"| {seeds}, {items}, {name} | {' | '.join(shares)} |" in page
    for items, noise in ((n, kind) for n in (12, 40, 113) for kind in ("normal", "skewed")):
        shares = [f"{100 * found[f'12 null rows, {items} items, {noise}'][k]:.1f} %" for k in ("plain", "ours")]
        assert f"| {items} | {noise} | {' | '.join(shares)} |" in page
