"""Do the tests notice small faults that are planted, one at a time, in the numeric core? `just mutate stats`, say.

mutmut (https://mutmut.readthedocs.io) plants them: another operator, number, text or argument, None for a value, a
branch always or never taken. Every module has the tests that are about it (`TESTS`); of those a mutant gets the ones
that call its function, and is killed when one of them fails. They are a part of the suite, so the whole kills no fewer.

mutmut leaves decorated functions out. Here their insides are mutated as well (`with_decorated`), for `steer`,
`merge_into` and `score_choices` are such functions. The work lies in `out/mutation/<module>`. What came out is kept in
`benchmarks/results/mutation.json` with every mutant that survived; `EQUIVALENT` says of some of them why no test can
tell them from the code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
EQUIVALENT = ROOT / "tools" / "equivalent_mutants.toml"
PAGE = ROOT / "docs" / "design.md"
PLUGINS = ("-p", "xdist", "-p", "_hypothesis_pytestplugin")  # others would only take time, once for every mutant
OPTIONS = (*PLUGINS, "-n", "0", "-p", "no:cacheprovider", "--hypothesis-profile=mutation")
# Runs another process, in which nothing is mutated.
PROGRAM = "test_what_is_no_vector_or_no_number_is_told_without_inner_names"
TESTS = {
    "delta": ("tests/test_delta.py",),
    "diff": ("tests/test_diff.py",),
    "steer": ("tests/test_dial.py", "tests/test_steer.py", "--deselect=tests/test_steer.py::" + PROGRAM),
    "stats": ("tests/test_stats.py",),
    "lm.choice": ("tests/lm/test_choice.py",),
}
COPIED = ("pyproject.toml", "src", "tests")  # by mutmut, from the folder it works in
STATES = {"killed": "killed", "timeout": "timed_out", "survived": "survived", "no tests": "not_tested"}


# ---- mutmut -------------------------------------------------------------------------------------------------------


def with_decorated() -> None:
    """Have mutmut mutate decorated functions: around what picks one copy decorators stay, the copies lose theirs."""
    import libcst as cst
    from mutmut.mutation import file_mutation

    visitor, arrange = file_mutation.MutationVisitor, file_mutation.function_trampoline_arrangement
    skips = visitor._skip_node_and_children

    def skip(self: Any, node: cst.CSTNode) -> bool:
        plain = isinstance(node, cst.FunctionDef) and node.decorators
        return skips(self, node.with_changes(decorators=[]) if plain else node)

    def arranged(function: cst.FunctionDef, mutants: Any, class_name: str | None) -> Any:
        declared, functions, assigned, names = arrange(function, mutants, class_name)
        of_class = any(
            isinstance(d.decorator, cst.Name) and d.decorator.value == "classmethod" for d in function.decorators
        )
        copies = functions[1:] if of_class else [f.with_changes(decorators=[]) for f in functions[1:]]
        return declared, [functions[0], *copies], assigned, names

    visitor._skip_node_and_children = skip
    file_mutation.function_trampoline_arrangement = arranged


def quick_first() -> None:
    """Have mutmut run the tests of a mutant in the order of their times: most mutants die of the first few."""
    from mutmut.state import state
    from mutmut.workers.isolation import ForkServerRunner

    submit = ForkServerRunner.submit

    def submitted(self: Any, mutant: str, tests: list[str], limit: int, estimate: float) -> None:
        submit(self, mutant, sorted(tests, key=lambda t: state().duration_by_test[t]), limit, estimate)

    ForkServerRunner.submit = submitted


def mutate(module: str) -> None:
    """Run mutmut in the working folder, on every mutant that it does not know to be killed in code as it is now."""
    from mutmut import __main__ as mutmut
    from mutmut import configuration

    settings = configuration.config()
    settings.source_paths, settings.only_mutate = [Path("src")], [source_of(module)]
    settings.pytest_add_cli_args = list(OPTIONS)
    settings.pytest_add_cli_args_test_selection = list(TESTS[module])
    settings.process_isolation = configuration.ProcessIsolation.FORKSERVER  # torch is imported once
    settings.timeout_multiplier, settings.timeout_constant = 10.0, 3.0  # on a busy machine, too
    with_decorated()
    quick_first()
    mutmut._run([], 1)


def source_of(module: str) -> str:
    """`src/ws/lm/choice.py` of `lm.choice`."""
    return f"src/ws/{module.replace('.', '/')}.py"


def states(module: str) -> dict[str, str]:
    """What has become of every mutant; in the working folder."""
    from mutmut.stats import status_by_exit_code

    codes = json.loads(record_of(module).read_text(encoding="utf-8"))["exit_code_by_key"]
    return {mutant: status_by_exit_code[code] for mutant, code in codes.items()}


def forget_living(module: str) -> None:
    """Have mutmut look again at the mutants that were not killed, for tests may have changed; in the working folder."""
    if record_of(module).exists():
        record = json.loads(record_of(module).read_text(encoding="utf-8"))
        living = [mutant for mutant, state in states(module).items() if state != "killed"]
        record["exit_code_by_key"] |= dict.fromkeys(living)
        record_of(module).write_text(json.dumps(record), encoding="utf-8")


def record_of(module: str) -> Path:
    """Where mutmut keeps what has become of a module's mutants; in the working folder."""
    return Path("mutants") / f"{source_of(module)}.meta"


def function_of(mutant: str) -> str:
    """`ws.delta.LinearDelta.norm` of mutmut's `ws.delta.xǁLinearDeltaǁnorm__mutmut_3`."""
    place, _, name = mutant.partition("__mutmut_")[0].rpartition(".")
    return f"{place}.{name[2:].replace('ǁ', '.')}"


def change_of(mutant: str) -> list[str]:
    """The lines that are gone (-) and those in their place (+); in the working folder."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    lines = get_diff_for_mutant(mutant).splitlines()
    return [re.sub(r"\s+", " ", line) for line in lines if re.match(r"[-+](?![-+]{2})", line)]


# ---- what is kept ---------------------------------------------------------------------------------------------------


def equivalents() -> list[dict[str, Any]]:
    """Of mutants that no test can tell from the code: `functions`, a pattern of the new line (`change`), and `why`."""
    return tomllib.loads(EQUIVALENT.read_text(encoding="utf-8"))["mutants"]


def why_equivalent(function: str, change: Sequence[str]) -> str | None:
    """Why a mutant is equivalent; None when it is not known to be."""
    new = "\n".join(line for line in change if line.startswith("+"))
    fits = (e for e in equivalents() if function in e["functions"] and re.search(e["change"], new))
    return next((e["why"] for e in fits), None)


def counted(module: str, seconds: float) -> dict[str, Any]:
    """What is kept of a module; in the working folder."""
    found = states(module)
    number = Counter(STATES.get(state, "other") for state in found.values())
    living = {mutant: state for mutant, state in found.items() if state not in ("killed", "timeout")}
    return {
        "mutants": len(found),
        **{name: number[name] for name in (*STATES.values(), "other")},
        "date": date.today().isoformat(),
        "seconds": round(seconds),
        "tests": TESTS[module],
        "survivors": [{"function": function_of(m), "state": s, "change": change_of(m)} for m, s in living.items()],
    }


def keep(modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Put what came of some modules beside what is known of the others, with the reasons, and the table on its page."""
    from benchmarks.harness import machine

    from ws.files.runs import library_versions, write_json

    known = (read()["modules"] if RESULT.exists() else {}) | modules
    for module in known.values():
        for survivor in module["survivors"]:
            why = why_equivalent(survivor["function"], survivor["change"])
            survivor.pop("equivalent", None)
            survivor |= {} if why is None else {"equivalent": why}
        module["equivalent"] = sum("equivalent" in survivor for survivor in module["survivors"])
    about = {"command": "just mutate", "machine": machine(), "versions": library_versions()}
    write_json(RESULT, about | {"modules": known})
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\| module \| mutants .*?(?=\n\n)", table(known), page, flags=re.DOTALL), encoding="utf-8")


def read() -> dict[str, Any]:
    """What is kept."""
    return json.loads(RESULT.read_text(encoding="utf-8"))


def table(modules: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the page: killed are also those that ran out of time."""
    head = "| module | mutants | killed | of them out of time | survived | of them equivalent |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, m in ((name, modules[name]) for name in TESTS if name in modules):
        killed = m["killed"] + m["timed_out"]
        cells = [f"`ws.{name}`", m["mutants"], f"{killed} ({killed / m['mutants']:.1%})"]
        lines.append(f"| {' | '.join(map(str, [*cells, m['timed_out'], m['mutants'] - killed, m['equivalent']]))} |")
    return "\n".join(lines)


# ---- the command ----------------------------------------------------------------------------------------------------


def one_module(module: str, again: bool) -> None:
    """Mutate one module in this process, and keep what came out."""
    folder, start = ROOT / "out" / "mutation" / module, time.monotonic()
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    os.chdir(folder)
    forget_living(module)
    mutate(module)
    keep({module: counted(module, time.monotonic() - start)})


def main() -> None:
    """Every module in a process of its own, because mutmut and the tests leave their state in it."""
    parser = argparse.ArgumentParser(description="Which faults, planted in the numeric core, do the tests notice?")
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; all of them by default")
    parser.add_argument(
        "--again", action="store_true", help="only what the last run did not kill, and functions that changed"
    )
    parser.add_argument("--table", action="store_true", help="only put the reasons and the table to what is kept")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # benchmarks lie there
    if unknown := [module for module in options.modules if module not in TESTS]:
        parser.error(f"{unknown[0]} is none of {', '.join(TESTS)}")
    if options.here:
        one_module(options.modules[0], options.again)
        return
    settings = {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if options.table:
        keep({})
        return
    for module in options.modules or TESTS:
        arguments = [__file__, module, "--here", *(["--again"] if options.again else [])]
        subprocess.run([sys.executable, *arguments], env=os.environ | settings, check=True)
    print(table(read()["modules"]))


if __name__ == "__main__":
    main()
