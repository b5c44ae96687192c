"""The house rules that a machine can check: style, types, the import contract, and what must not be in the tree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = {
    "style": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "imports flow one way": ["lint-imports"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_tools_are_content(check):
    program, *arguments = CHECKS[check]
    found = shutil.which(program, path=str(Path(sys.executable).parent))
    assert found, f"{program} is not installed beside the interpreter; run `uv sync`"
    done = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def tracked(*suffixes: str) -> list[Path]:
    """Files under version control with one of the suffixes; outside a checkout, those of the project's own folders."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0:
        files = [ROOT / name for name in git.stdout.splitlines()]
    else:
        files = [p for folder in ("src", "tests", "tools", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.*")]
    return [f for f in files if f.name.endswith(suffixes) and f.is_file()]


def test_texts_are_read_and_written_in_a_stated_encoding():
    """Ruff sees it where it knows the type; this sees it wherever a method has the name."""
    unstated = []
    for file in tracked(".py"):
        if file.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {k.arg for k in node.keywords}
                starts = node.func.attr in ("run", "Popen", "check_output") and "text" in named
                text = node.func.attr in ("read_text", "write_text") or starts
                unstated += [f"{file.name}:{node.lineno}"] if text and "encoding" not in named else []
    assert not unstated


def test_functions_fit_a_screen():
    long = []
    for file in tracked(".py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno > 60:
                long.append(f"{file.name}:{node.lineno} {node.name}")
    assert not long


def test_no_pickle_and_no_remote_code():
    bad = re.compile(r"trust_remote_code=True|import pickle|torch\.load\(|weights_only=False")
    assert not [f.name for f in tracked(".py") if f.parent.name != "tests" and bad.search(f.read_text())]


def test_no_lock_file_and_no_path_of_a_machine_is_tracked():
    assert not list(tracked("uv.lock"))
    path = re.compile(r"/(home|Users|root|work)/\w")
    texts = [f for f in tracked(".py", ".md", ".toml", ".json", ".csv", "justfile") if f != Path(__file__)]
    assert not [f.name for f in texts if path.search(f.read_text())]
