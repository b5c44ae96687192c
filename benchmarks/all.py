"""Every comparison of performance, ours against what one would do otherwise, one benchmark after the other.

`uv run python -m benchmarks.all` (we estimate 45 minutes of two free cores) runs the benchmarks below, each a process
of its own with the settings that stand here, lifts the ratios out of their records, adds them to the history
(`benchmarks/results/history.jsonl`, which `benchmarks.compare` reads) and writes docs/benchmarks.md from it. A part
that was measured today on this machine, commit and versions is not measured again unless `--fresh`; one that fails is
said, the others go on, and the exit code is 1. `--only` does some parts, `--tables` writes nothing but the page,
`--quick` takes as few rounds as there can be, to see whether every part works. Texts are the bundled ones. Records and
what the benchmarks say are left in `out/benchmarks/all/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from benchmarks import compare, harness
from benchmarks.compare import BUSY, EXPONENT, Entry, Measured, Metric
from ws import console
from ws.errors import WsError
from ws.files.runs import library_versions, write_text

OUT, PAGE = harness.ROOT / "out" / "benchmarks" / "all", harness.ROOT / "docs" / "benchmarks.md"
DIGITS = 5  # that are kept of every number


# ---- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lift:
    """Where a ratio stands in the records of a benchmark; one for every match where there is a `*`.

    Attributes:
        name, against, unit: those of the metric; `{0}` is what the first `*` stands for.
        place: `record/key/key...`, to a spread, a list of one value a round, or a number.
        inverse: there it is the other way's over ours.
        better: which way is better.
    """

    name: str
    against: str
    unit: str
    place: str
    inverse: bool = False
    better: Literal["lower", "higher"] = "lower"

    def metrics(self, records: Mapping[str, Any]) -> list[Metric]:
        """The metrics; `LookupError` where the records have nothing in that place."""
        matches = list(_matches(records, self.place.split("/")))
        if not matches:
            raise LookupError(f"the record has no {self.place}")
        return [self._metric(_spread(value), words) for words, value in matches]

    def _metric(self, spread: harness.Spread, words: Sequence[str]) -> Metric:
        numbers = [spread.median, spread.lowest, spread.highest]
        if self.inverse:
            numbers = [1 / spread.median, 1 / spread.highest, 1 / spread.lowest]
        value, lowest, highest = (float(f"{x:.{DIGITS}g}") for x in numbers)
        name, unit, against = (text.format(*words) for text in (self.name, self.unit, self.against))
        return Metric(name, unit, value, lowest, highest, spread.rounds, self.better, against)


def _matches(value: Any, place: Sequence[str], words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not place:
        yield words, value
        return
    pattern = re.compile(re.escape(place[0]).replace(r"\*", "(.*)"))
    keys = value if isinstance(value, Mapping) else ()
    for key in sorted(keys, key=lambda k: int(k) if k.isdigit() else 0):  # sizes rise, other names stay in order
        if found := pattern.fullmatch(key):
            yield from _matches(value[key], place[1:], (*words, *(w.replace("_", " ") for w in found.groups())))


def _spread(value: Any) -> harness.Spread:
    if isinstance(value, Mapping):
        return harness.Spread(*(value[key] for key in ("median", "lowest", "highest", "rounds")))
    return harness.Spread.of(value if isinstance(value, list) else [value])


@dataclass(frozen=True)
class Part:
    """A benchmark as it is run here, its minutes on two cores, and what is lifted out of its records."""

    name: str
    title: str
    minutes: float
    settings: str
    quick: str
    lifts: tuple[Lift, ...]
    note: str = ""
    package: str = "benchmarks"

    def arguments(self, quick: bool) -> str:
        return self.quick if quick else self.settings

    def command(self, quick: bool) -> str:
        """As one would type it."""
        return " ".join(filter(None, ["just bench", self.name, self.arguments(quick)]))


PLAIN = "a plain script with transformers and PEFT"
MERGED = "merging both adapters and subtracting"
WRITTEN = "cloning the weights, adding to them and putting them back"
PARTS = (
    Part(
        "replicate",
        "From a behaviour to a reading",
        3,
        "--rounds 3",
        "--rounds 1 --questions 24",
        (
            Lift("`ws replicate`, honesty, LoRA, pocket", PLAIN, "time", "replicate/seconds_ours_over_plain"),
            Lift("`ws replicate`, by CPU time", PLAIN, "CPU time", "replicate/cpu_seconds_ours_over_plain"),
            Lift("`ws replicate`, the process", PLAIN, "memory", "replicate/peak_mib_ours_over_plain"),
        ),
    ),
    Part(
        "sampling",
        "Sampling answers",
        6,
        "--rounds 3 --pairs 8",
        "--rounds 1 --pairs 2",
        (
            Lift(
                "answers of SmolLM2 under a persona",
                "`generate`, eight at a time",
                "tokens per second",
                "sampling/tokens_per_second/ours_over_generate",
                better="higher",
            ),
            Lift(
                "answers of SmolLM2 under a persona, by CPU time",
                "`generate`, eight at a time",
                "tokens per CPU second",
                "sampling/tokens_per_cpu_second/ours_over_generate",
                better="higher",
            ),
            Lift(
                "answers of SmolLM2 under a persona, above the model",
                "`generate`, eight at a time",
                "memory",
                "sampling/mib_above_model/ours_over_generate",
            ),
        ),
    ),
    Part(
        "training",
        "Training an arm",
        3,
        "--rounds 3 --steps 1 --batch 4 --layers 7 --sides plain arm",
        "--rounds 1 --steps 1 --batch 4 --layers 2 --sides plain arm",
        (
            Lift("a token, LoRA, Qwen3-0.6B's width", "Trainer on PEFT's LoRA", "time", "training/time_arm_over_plain"),
            Lift("a token, by CPU time", "Trainer on PEFT's LoRA", "CPU time", "training/cpu_time_arm_over_plain"),
            Lift("the process", "Trainer on PEFT's LoRA", "memory", "training/peak_arm_over_plain"),
        ),
    ),
    Part(
        "vector",
        "The vector",
        3,
        "--rounds 3",
        "--rounds 1",
        (
            Lift("building it from two adapters", MERGED, "time", "vector/merge_and_subtract_over_build", True),
            Lift("saving it", "saving the dense matrices", "time", "vector/dense_save_over_save", True),
            Lift("loading it", "loading the dense matrices", "time", "vector/dense_load_over_load", True),
            Lift("a process that does all this", MERGED, "memory", "vector/peak_over_merge_and_subtract"),
            Lift(
                "a process that does all this, beside the base", "loading the base alone", "memory", "vector/peak_ratio"
            ),
            Lift("its file", "the dense matrices", "size", "vector/dense_touched_matrices_over_vector", True),
        ),
    ),
    Part(
        "serving",
        "Steering",
        4,
        "--rounds 7",
        "--rounds 1",
        (
            Lift("steered {0}", "the bare model", "time", "serving/steered_over_bare_*"),
            Lift("changing the strength", WRITTEN, "time", "serving/*_over_dial", True),
            Lift("a token, static cache, steered", "the bare model", "time", "serving/eager_ours_over_bare"),
            Lift(
                "a token, static cache, {0}, compiled", "the bare model", "time", "serving/compiled_*_over_eager_bare"
            ),
            Lift("five strengths", "each by itself", "time", "serving/five_strengths_alone_over_shared", True),
            Lift("{1}, {0}", "dW added to the weights", "error", "serving/*/activations_*_ratio"),
        ),
    ),
    Part(
        "evaluations",
        "Evaluations at three strengths",
        6,
        "--vignettes 24 --rounds 3 --dilemmas 12 --n-think 32 --airisk-rounds 3",
        "--vignettes 2 --rounds 1 --dilemmas 1 --n-think 4 --airisk-rounds 1",
        (
            Lift("tiny-mfv", WRITTEN, "time", "evaluations_tinymfv/time", True),
            Lift("tiny-mfv, above the model", WRITTEN, "memory", "evaluations_tinymfv/memory_ours_over_usual"),
            Lift("AIRiskDilemmas with a thought", WRITTEN, "time", "evaluations_airisk/time", True),
        ),
    ),
    Part(
        "serve",
        "Serving sixteen clients, each with a strength of its own",
        2,
        "--rounds 3 --tokens 24",
        "--rounds 1 --tokens 8 --models pocket",
        (
            Lift(
                "the engine, {0}",
                "`generate`, one after the other",
                "tokens per second",
                "serve/models/*/engine against generate",
                better="higher",
            ),
            Lift(
                "the server, {0}",
                "`generate`, one after the other",
                "tokens per second",
                "serve/models/*/server against generate",
                better="higher",
            ),
            Lift(
                "the engine, {0}, steered",
                "the same without a strength",
                "tokens per second",
                "serve/models/*/engine against unsteered",
                better="higher",
            ),
            Lift(
                "the first token behind a known beginning, {0}",
                "the prompt before it",
                "time",
                "serve/models/*/first token behind a known beginning",
            ),
        ),
    ),
    Part(
        "startup",
        "Starting",
        2,
        "--rounds 3 --only 'ws --help' 'ws inspect VECTOR' 'import ws.replicate'",
        "--rounds 1 --only 'ws --help' 'import ws.replicate'",
        (
            Lift("`ws{0}`", "`import torch`", "CPU time", "startup/commands/ws*/ratio to torch"),
            Lift(
                "importing what `ws replicate` needs, without bitsandbytes",
                "importing torch and transformers",
                "CPU time",
                "startup/commands/import ws.replicate, no bitsandbytes/ratio to torch and transformers",
            ),
        ),
    ),
    Part(
        "exports",
        "Merging into a checkpoint",
        4,
        "--rounds 3",
        "--rounds 1",
        (
            Lift("`ws export merged`", "mergekit, task arithmetic", "time", "exports/mergekit_over_ours_seconds", True),
            Lift(
                "`ws export merged`, the process",
                "mergekit, task arithmetic",
                "memory",
                "exports/mergekit_over_ours_peak",
                True,
            ),
        ),
    ),
    Part(
        "cosines",
        "Cosines of twelve vectors",
        3,
        "--rounds 3",
        "--rounds 1",
        (
            Lift("all pairs", "dense matrices", "time", "cosines/seconds_over_dense"),
            Lift("the process", "dense matrices", "memory", "cosines/peak_over_dense"),
        ),
    ),
    Part(
        "exponents",
        "Growth",
        9,
        "",
        "--rounds 1 --series rank items",
        (
            Lift("{0} {2}, {1}", "the smallest of the series", "{1}", "exponents/*/*/over_smallest/*"),
            Lift("{0}, exponent of {1}", "1, in proportion", EXPONENT, "exponents/*/*/exponent"),
        ),
        note="Sizes of the model are quarters of Qwen3-0.6B's depth, width and vocabulary; its exponent is that of the "
        "number of parameters. Strengths stand beside the base, which is one more.",
    ),
)


# ---- one run --------------------------------------------------------------------------------------------------------


def busy_seconds() -> float | None:
    """CPU seconds of all processes since the machine started, as Linux counts them."""
    if not (file := Path("/proc/stat")).is_file():
        return None
    user, nice, system, _idle, _wait, *rest = map(int, file.read_text(encoding="utf-8").split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def run(part: Part, quick: bool) -> Measured:
    """Measure one part.

    Raises:
        RuntimeError: it failed; the log says how.
        LookupError: its records do not have what is lifted out of them.
    """
    folder = OUT / part.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    environment = {k: v for k, v in os.environ.items() if k != "WS_REAL_DATA"} | {harness.ELSEWHERE: str(folder)}
    command = [sys.executable, "-m", f"{part.package}.{part.name}", *shlex.split(part.arguments(quick))]
    start, before = time.perf_counter(), busy_seconds()
    with (folder / "log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, cwd=harness.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds, after = time.perf_counter() - start, busy_seconds()
    if child.returncode:
        raise RuntimeError(
            f"it ended with code {child.returncode}; see {os.path.relpath(folder / 'log', harness.ROOT)}"
        )
    ours = usage.ru_utime + usage.ru_stime
    others = None if before is None or after is None else max(0.0, round((after - before - ours) / seconds, 2))
    records = {f.stem: json.loads(f.read_text(encoding="utf-8"))["results"] for f in sorted(folder.glob("*.json"))}
    metrics = [metric for lift in part.lifts for metric in lift.metrics(records)]
    if len({m.name for m in metrics}) < len(metrics):
        raise ValueError("two of its metrics have one name")
    return Measured(part.command(quick), round(seconds / 60, 1), others, metrics)


def entry_of_today(history: list[Entry], quick: bool, fresh: bool) -> Entry:
    """The last run, where this one goes on with it; else a new one, put behind it."""
    new = Entry(date.today().isoformat(), harness.commit(), quick, harness.machine(), library_versions())
    if history and not fresh and replace(history[-1], parts={}, failed={}) == new:
        return history[-1]
    history.append(new)
    return new


def measure(parts: Sequence[Part], quick: bool, fresh: bool) -> list[str]:
    """Run what is not measured yet, and keep every part as soon as it is; the names of those that failed."""
    history = compare.read_history(compare.HISTORY)
    entry = entry_of_today(history, quick, fresh)
    minutes = {p.name: p.minutes / (4 if quick else 1) for p in PARTS}
    for old in history:
        if old.is_like(entry):
            minutes |= {name: done.minutes for name, done in old.parts.items()}
    known = {p.name for p in parts if p.name in entry.parts and entry.parts[p.name].command == p.command(quick)}
    left = [part for part in parts if part.name not in known]
    if known:
        console.say(f"Measured today already: {', '.join(sorted(known))}.")
    for number, part in enumerate(left):
        rest = timedelta(minutes=round(sum(minutes[p.name] for p in left[number:])))
        console.say(
            f"{part.command(quick)} (about {minutes[part.name]:.0f} minutes, {rest} left)",
            f"[{number + 1}/{len(left)}] ",
        )
        entry.failed.pop(part.name, None)
        try:
            entry.parts[part.name] = run(part, quick)
        except (RuntimeError, LookupError, ValueError) as problem:
            entry.failed[part.name] = str(problem)
            console.warn(f"{part.name} failed: {problem}")
        compare.write_history(compare.HISTORY, history)
    return [part.name for part in parts if part.name in entry.failed]


# ---- the page -------------------------------------------------------------------------------------------------------

COLUMNS = ("what", "against", "of", "ratio", "rounds")
HEAD = """# Benchmarks

What things cost here, over what they cost with what one would do otherwise: the median of some rounds, the lowest and
the highest. Below 1 is less; **+** marks what is better the higher it is, and **superlinear** what grows faster than in
proportion. Both sides of a round run one right after the other, because only such ratios mean anything on a machine
that does other things; memory is that of fresh processes at its peak. What each benchmark does stands in its file in
`benchmarks/`. Longer runs of some, with numbers beside the ratios, are in [results](results.md), [exports](exports.md),
[serving](serving.md) and [scaling](scaling.md), where larger models stand as arithmetic.

`just bench all` makes this page (what is here took {minutes} minutes) and adds the run to
`benchmarks/results/history.jsonl`;
`just bench compare` says what became worse since the run before, beyond noise.

{where}. {versions}."""
QUICK = """**This is a run of `just bench all --quick`: single rounds and tiny settings. They show that every part
works, and nothing else; `just bench all` makes the page properly.**"""


def latest(history: Sequence[Entry]) -> dict[str, tuple[Entry, Measured]]:
    """The last time every part was measured on the machine, with the versions and in the manner of the last run."""
    last, found = history[-1], dict[str, tuple[Entry, Measured]]()
    for entry in history:
        if entry.is_like(last) and entry.versions == last.versions:
            found |= {name: (entry, part) for name, part in entry.parts.items()}
    return found


def render(history: Sequence[Entry]) -> str:
    """The page, from the history alone."""
    if not history:
        raise WsError(f"There is no {compare.HISTORY.name} to write the page from; `just bench all` makes it.")
    last, found = history[-1], latest(history)
    where = "{cpu}, {cores} cores, torch on {threads}, {gpu}".format(
        **last.machine | {"gpu": last.machine["gpu"] or "no GPU"}
    )
    versions = ", ".join(f"{name} {version}" for name, version in last.versions.items())
    minutes = sum(measured.minutes for _, measured in found.values())
    lines = [HEAD.format(where=where, versions=versions, minutes=round(minutes)), *([QUICK] if last.quick else [])]
    for part in PARTS:
        lines.append(f"## {part.title}")
        if part.name not in found:
            lines.append(f"Not measured: {last.failed.get(part.name, 'not asked for')} (`{part.command(last.quick)}`).")
            continue
        entry, measured = found[part.name]
        disturbed = (measured.others or 0) > BUSY
        note = f" **Other work took {measured.others} cores meanwhile.**" if disturbed else ""
        lines.append(f"`{measured.command}`, {measured.minutes:g} minutes, {entry.date}, commit {entry.commit}.{note}")
        lines += [part.note] if part.note else []
        rows = [(m.name, m.against, m.unit, shown(m), m.rounds) for m in measured.metrics]
        lines.append(tabulate(rows, COLUMNS, tablefmt="github", disable_numparse=True, colalign=("left",) * 5))
    return "\n\n".join(lines) + "\n"


def shown(metric: Metric) -> str:
    """The ratio with its spread, and what to know to read it."""
    text = compare.number(metric) if metric.rounds > 1 else f"{metric.value:.3g}"
    too_much = metric.unit == EXPONENT and metric.lowest > 1 + compare.SHARE
    return text + (" +" if metric.better == "higher" else " **superlinear**" if too_much else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="NAME", help="some parts")
    parser.add_argument("--tables", action="store_true", help="write nothing but the page")
    parser.add_argument("--quick", action="store_true", help="as few rounds as there can be")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured today")
    o = parser.parse_args()
    parts = [part for part in PARTS if o.only is None or part.name in o.only]
    try:
        failed = [] if o.tables else measure(parts, o.quick, o.fresh)
        write_text(PAGE, render(compare.read_history(compare.HISTORY)))
    except WsError as problem:
        parser.error(str(problem))
    console.say(f"in {PAGE}")
    if failed:
        console.warn(f"{', '.join(failed)} failed; the page says so.")
        sys.exit(1)


if __name__ == "__main__":
    main()
