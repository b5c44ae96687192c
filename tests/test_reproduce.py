"""The page that says how every figure is made names all of them, and nothing that does not exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from fnmatch import fnmatch

import pytest

from test_docs import PAGES, ROOT
from ws.cli import COMMANDS, FORMER
from ws.console import parse

TEXT = (ROOT / "docs" / "reproduce.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", TEXT)
KEPT = ("docs/results", "benchmarks/results")
RECIPES = set(re.findall(r"^([a-z][\w-]*)[^\n=]*:", (ROOT / "justfile").read_text(), re.MULTILINE))
COMMAND_LINES = sorted({c for c in CODE if c.startswith(("uv run ", "just "))})


def measurements() -> list[str]:
    """The benchmarks that can be run by name."""
    return [f.stem for f in (ROOT / "benchmarks").glob("*.py") if "def main(" in f.read_text()]


def test_every_picture_is_named():
    found = set()
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text) + re.findall(r"<img[^>]+src=\"([^\"]+)\"", text):
            assert "://" not in target, f"{page.name} shows a picture from elsewhere: {target}"
            found.add((page.parent / target).resolve().relative_to(ROOT).as_posix())
    assert len(found) >= 5
    assert not sorted(found - set(CODE))


def test_every_kept_file_is_named():
    git = subprocess.run(["git", "ls-files", *KEPT], cwd=ROOT, capture_output=True, text=True, check=False)
    on_disk = {f.relative_to(ROOT).as_posix() for folder in KEPT for f in (ROOT / folder).rglob("*") if f.is_file()}
    kept = on_disk | set(git.stdout.splitlines())
    assert not sorted(file for file in kept if not any(fnmatch(file, name) for name in CODE))


def test_every_benchmark_is_named():
    named = {c.split()[2] for c in CODE if c.startswith("just bench ")}
    assert named == set(measurements())
    for page in PAGES:
        assert set(re.findall(r"just bench (\w+)", page.read_text())) - {"NAME"} <= named, page.name


def test_every_file_that_is_named_is_there():
    named = [c for c in CODE if re.match(r"(docs|benchmarks|tests|tools|src)/", c) and "*" not in c]
    assert len(named) > 25
    assert not [c for c in named if not (ROOT / c).is_file()]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_is_there_and_takes_its_options(line):
    words = shlex.split(line)
    if words[0] == "just":
        assert words[1] in RECIPES
        if words[1] == "bench":
            source = (ROOT / "benchmarks" / f"{words[2]}.py").read_text()
            assert all(f'"{word}"' in source for word in words[3:] if word.startswith("--"))
        return
    program, *rest = words[2:]
    if program == "pytest" or rest[0].endswith(".py"):
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".py"))
        return
    if program == "python":
        assert rest[0] == "-m"
        known = {place.split(":")[0]: options for place, options in COMMANDS.values() if place.endswith(":main")}
        options, rest = known[rest[1]], rest[2:]
    else:
        assert program == "ws"
        name = FORMER.get(rest[0], rest[0])
        n_words = 1 if name in COMMANDS else 2  # `ws eval airisk` is a member of a family
        options, rest = COMMANDS[name if n_words == 1 else " ".join(rest[:2])][1], rest[n_words:]
    parse(options, rest)  # tyro exits when it does not know an option


def anchors(text: str) -> set[str]:
    """The sections of a page, as links name them, and the objects that the API page documents."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_links_to_sections_lead_somewhere():
    """Also in the README, which is no part of the site."""
    lost, found = [], 0
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([\w/.-]*\.md)?#([\w.-]+)\)", page.read_text()):
            there, found = (page.parent / target) if target else page, found + 1
            if anchor not in anchors(there.read_text()):
                lost.append(f"{page.name} links to {target}#{anchor}")
    assert found > 20
    assert not lost
