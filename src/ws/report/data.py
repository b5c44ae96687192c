"""What a report is made of, as it is on disk: every run with those of its tables that are of its very vector."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from ws.analysis.compare_tables import NULLS
from ws.analysis.compose import STAGES
from ws.analysis.sweep_tables import POOLED
from ws.behaviors import Behavior, behavior_name, bundled_behaviors, load_behavior
from ws.console import command_line
from ws.data import PAIRS_FILE
from ws.delta import LinearDelta
from ws.diff import CALIBRATION, SteeringVector, vector_digest
from ws.errors import DamagedError, WsError, did_you_mean
from ws.eval.preference import Preferences
from ws.eval.readable import AGREEMENT
from ws.eval.suite import evaluations
from ws.files.public import public, public_name
from ws.files.reading import read_csv, read_json, typed
from ws.files.runs import DEFAULT_OUT, Run, data_folder, finished_runs, reads_otherwise, seed_flag
from ws.files.tensors import read_tensors
from ws.intervene.calibration import Calibration, read_calibration
from ws.lm.models import BUNDLED, fingerprint_of, load_model, model_folder, tokenizer_hash_on_disk
from ws.lm.models import layer_of as decoder_layer
from ws.options.make import SIGNED
from ws.options.shared import BASE, WEIGHT, RunOptions
from ws.report.scores import (
    CLAIMS,
    CONFOUNDS,
    DILEMMAS,
    evaluation_at,
    is_extra,
    needed_numbers,
    needed_texts,
    of,
    pooled_numbers,
    shown_scores,
)

Row = Mapping[str, str]
T = TypeVar("T")
_CONTROL = frozenset({"control", "score", "eval_hash", "vector"})
_COMPARE = frozenset({"intervention", "adapter", "seed", "part", "score", "alpha", "shift", "base", "p_random", "real"})
_COMPARE_NUMBERS = ("alpha", "shift", "base", "p_random", "n_draws")
_PROFILE = frozenset({"board", "adapter", "seed", "intervention", "strength", "vectors"})
_PROFILE_NUMBERS = ("z", "z_ci_lo", "z_ci_hi", "z_random")
_SELECTIVITY = ("selectivity", "selectivity_ci_lo", "selectivity_ci_hi", "agreement", "rms_shift", "z_random")
# Settings of a training on which its adapter depends as far as sums are rounded, or by another name of the base.
_ROUNDING = ("model", "dtype", "micro_batch")
# What the items of a behaviour are called, by the stage; a verdict is on no others.
_OWN_ITEMS = {CLAIMS: "claims", Preferences.stage: "preferences"}
# Columns of numbers that tables of some evaluations have.
_FURTHER = (AGREEMENT, "frame_agreement_other", "mass_other_violate", "frames_agree_other_violate")
_LABELLED = frozenset({"value_class", "protocol"})
OTHER_TEXT = "made with another tokenizer or chat template"
DERIVED = "made from other runs' by ws compose or ws trim, so they are no further evidence, and are not counted here"
UNCERTAIN = "shown, but it is not on record which vector gave them"
RELATIVE, PER_WEIGHT = "percent of W", "root mean square change of a weight"


@dataclass(frozen=True)
class Gap:
    """Something that the page cannot show.

    Attributes:
        what: a table's stage, `calibration`, `norms`, `samples`, `controls`, `compare`, `card`, `pooled`, `dilemmas`
            (further tables of them), `vector` or `derived` (a run whose vector was computed from others).
        why: `missing`, or what is wrong with what is there.
        adapter, seed: of which run; None when it is of none.
        command: what makes it; empty where nothing need be made.
    """

    what: str
    why: str
    command: str
    adapter: str | None = None
    seed: int = 0

    @classmethod
    def of_run(cls, what: str, why: str, command: str, adapter: str, seed: int) -> Gap:
        """A gap of one run, with the command for this very run."""
        named = shlex.quote(adapter)
        if command.startswith("ws replicate") and adapter.endswith(f"-{SIGNED}"):  # which makes the name of the two
            named = f"{shlex.quote(adapter.removesuffix(f'-{SIGNED}'))} --contrast {SIGNED}"
        return cls(what, why, f"{command} --adapter {named}{seed_flag(seed)}", adapter, seed)

    @property
    def is_left_out(self) -> bool:
        """Whether there is something that is not shown."""
        return self.what in ("vector", "dilemmas", "derived") or self.why.startswith(("made ", "of another", "damaged"))


@dataclass(frozen=True)
class Norms:
    """The size of `dW` per module, by kind and layer, in a unit that says what it is."""

    unit: str
    cells: Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        adapter, seed: which.
        base, fingerprint: the model that its vector is for.
        info: what the vector says of itself.
        digest: of the vector (`vector_digest`).
        stages: the manifest's finished stages.
        tables: rows by stage and use (see `table_files`), of this very vector; as `prompt` those of a prompted base.
        calibration: None without one of this very vector.
        norms: None where they are not to be had without the base.
        controls: rows of `controls.csv` of this very vector.
        samples: what `samples.json` holds.
        others: rows of further tables of dilemmas (other classes of values, the protocol `alone`), by stage.
        gaps: what is not there, or is of another vector or tokenizer.
    """

    adapter: str
    seed: int
    base: str
    fingerprint: str | None
    info: Mapping[str, Any]
    digest: str
    stages: Mapping[str, Any]
    tables: Mapping[tuple[str, str], Sequence[Row]]
    calibration: Calibration | None
    norms: Norms | None
    controls: Sequence[Row]
    samples: Sequence[Mapping[str, Any]]
    others: Mapping[str, Sequence[Row]]
    gaps: tuple[Gap, ...]

    @property
    def name(self) -> str:
        """How the run is called in notes."""
        return f"{self.adapter} seed {self.seed}"

    @property
    def training(self) -> Mapping[str, Any]:
        """The record of the stage that trained its positive arm, or its signed adapter; empty without one."""
        return self.stages.get("pos") or self.stages.get(SIGNED) or {}

    @property
    def settings(self) -> dict[str, Any]:
        """What it was trained with, without what tells runs of one recipe apart; empty where it is not on record."""
        return {k: v for k, v in self.training.get("config", {}).items() if k not in ("adapter", "seed")}

    @property
    def divergence(self) -> list[tuple[float, float]]:
        """What calibration measured, by strength: `(alpha, nats)`, with the base's 0; empty without a calibration."""
        if self.calibration is None:
            return []
        sides = (self.calibration.negative, self.calibration.positive)
        return sorted({(0.0, 0.0), *((float(a), float(d)) for side in sides for a, d in side.evaluations)})

    @property
    def units(self) -> dict[int, float]:
        """The calibrated strengths by sign, those that converged."""
        sides = {sign: self.calibration.side(sign) for sign in (-1, 1)} if self.calibration else {}
        return {sign: side.alpha for sign, side in sides.items() if side.converged}


@dataclass(frozen=True)
class Contents:
    """Everything a page shows.

    Attributes:
        name: of the behaviour.
        called: how commands call it: by its name or, unless it is bundled, by its file.
        behavior: as it was when the vectors were trained, None when that is not to be had.
        effect: the sign that a positive strength should give to agreement with false claims; None when unknown.
        results: the runs of the behaviour's vectors, without those computed from others (gaps called `derived`).
        nulls: the names of the runs that are nulls (label-shuffled, same-side).
        pooled: rows of `sweep_pooled.csv`.
        compare: rows of `compare.csv`, of the strengths that the vectors are calibrated to now.
        card: the data card of the pairs, None without one.
        gaps: what is missing of all this.
        out: what commands must be told of where runs are; empty for the usual place, and for one of this machine alone.
        profile, profiles: rows of `profile.csv` and of `profile_summary.csv`, those of vectors as they are now.
    """

    name: str
    called: str
    behavior: Behavior | None
    effect: int | None
    results: tuple[Result, ...]
    nulls: tuple[str, ...]
    pooled: Sequence[Row]
    compare: Sequence[Mapping[str, Any]]
    card: Mapping[str, Any] | None
    gaps: tuple[Gap, ...]
    out: str = ""
    profile: Sequence[Mapping[str, Any]] = ()
    profiles: Sequence[Mapping[str, Any]] = ()

    @property
    def adapters(self) -> list[str]:
        """In the order in which they are shown."""
        return list(dict.fromkeys(r.adapter for r in self.results))

    def of(self, adapter: str) -> list[Result]:
        """The seeds of an adapter."""
        return [r for r in self.results if r.adapter == adapter]

    def compared(self, **columns: str) -> list[Mapping[str, Any]]:
        """The rows of `compare.csv` with these values in these columns."""
        return [row for row in self.compare if all(row[name] == value for name, value in columns.items())]

    def against_nulls(self, adapter: str, score: str) -> Mapping[str, Any]:
        """The row of `compare.csv` that holds the adapter's span of a score against all nulls; empty without."""
        return next(iter(self.compared(intervention=WEIGHT, adapter=adapter, part="span", score=score)), {})


def trained_otherwise(runs: Sequence[Result]) -> list[str]:
    """The settings in which the training of some runs differs, as far as they are on record; rounding aside."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings if name not in _ROUNDING)
    return [name for name in names if any(settings.get(name) != known[0].get(name) for settings in known)]


def table_files() -> dict[str, tuple[str, dict[str, str]]]:
    """The tables a page is made of, by the stage that writes them: the command, and their files by use."""
    known = evaluations().values()
    files = {cls.stage: (cls.command(), {"summary": "summary", "items": cls.item_table}) for cls in known}
    return files | {CONFOUNDS: ("ws check confounds", {"summary": "summary", "answers": "answers"})}


def read_contents(out: Path, name: str) -> Contents:
    """Read what is in `out/<behavior>/`; `WsError` when no run there has a vector of its own.

    Args:
        out: where runs are.
        name: a behaviour's name or its TOML file; with the file the page can say what the behaviour is.
    """
    behavior = behavior_name(name)
    runs = _runs(out, behavior)
    folders = [run for run in runs if not _is_derived(run[2])]
    gaps = [Gap("derived", DERIVED, "", adapter, seed) for adapter, seed, folder in runs if _is_derived(folder)]
    if not folders:
        names = ", ".join(dict.fromkeys(adapter for adapter, _, _ in runs))
        made = command_line("ws replicate", RunOptions(behavior=name, out=out), always=("behavior",))
        raise WsError(f"All vectors below {out / behavior} are computed from others ({names}); make one with `{made}`.")
    results, tokenizer = [], cache(tokenizer_hash_on_disk)
    for adapter, seed, folder in folders:
        if not _is_null(adapter):
            try:
                results.append(_result(folder, adapter, seed, tokenizer))
            except WsError as problem:
                gaps.append(Gap.of_run("vector", _brief(problem, folder), _made_again(folder), adapter, seed))
    if not results:
        raise WsError(f"No vector below {out / behavior} can be read, so there is nothing to report.")
    results = _in_the_same_words(results)
    known, effect = _behavior(name, results[0])
    nulls = tuple(dict.fromkeys(adapter for adapter, _, _ in folders if _is_null(adapter)))
    compare = _compare(out / behavior, results, gaps)
    profile, profiles = _profile(out / behavior, results, gaps)
    sparse = [name for score in shown_scores() for name in pooled_numbers(score)]
    columns = (("adapter",), ("n_seeds", "alpha"), sparse)
    pooled = _optional_table(out / behavior / POOLED, "pooled", "", gaps, False, *columns)  # without it the page pools
    card = _card(data_folder(out, results[0].base, behavior) / "card.json", tokenizer(results[0].base), results, gaps)
    called = Path(name).name if name != behavior or behavior in bundled_behaviors() else f"{behavior}.toml"
    place = "" if out == DEFAULT_OUT or out.is_absolute() else str(out)
    return Contents(
        behavior,
        shlex.quote(called),
        known,
        effect,
        tuple(results),
        nulls,
        pooled,
        compare,
        card,
        tuple(gaps),
        place,
        profile,
        profiles,
    )


def _runs(out: Path, behavior: str) -> list[tuple[str, int, Path]]:
    """Adapter, seed and folder of the behaviour's runs: in the order of the sweep's table, then others by name."""
    runs, others = [], set()
    for folder in finished_runs(out):
        name, adapter, *rest = folder.relative_to(out).parts
        others.add(name)
        seed = rest[0].removeprefix("seed-") if rest else "0"
        if name == behavior and seed.isdigit():
            runs.append((adapter, int(seed), folder))
    if not runs:
        hint = did_you_mean(behavior, others) if others else ""
        made = command_line("ws replicate", RunOptions(behavior=behavior, out=out), always=("behavior",))
        raise WsError(f"No run below {out / behavior} has a vector; make one with `{made}`.{hint}")
    order = list(dict.fromkeys(row.get("adapter") for row in read_rows(out / behavior / POOLED) or ()))
    return sorted(runs, key=lambda r: (order.index(r[0]) if r[0] in order else len(order), r[0], r[1]))


def _is_derived(folder: Path) -> bool:
    """Whether a run's vector was computed from those of others, so that it says nothing that they do not."""
    try:
        return not Run(folder).manifest["stages"].keys().isdisjoint(STAGES)
    except WsError:  # who reads the run says what is wrong with it
        return False


def _made_again(folder: Path) -> str:
    """What makes the vector of a run again: from its arms, which stay, while its manifest says which these are."""
    try:
        recorded = Run(folder).manifest["stages"]
    except WsError:
        recorded = {}
    return "ws replicate" if "vector" in recorded else "ws replicate --fresh --no-fresh-data"


def _is_null(adapter: str) -> bool:
    return adapter.endswith(tuple(f"-{null}" for null in NULLS))


def _brief(problem: Exception, folder: Path) -> str:
    """A message without the folders of this machine that it may name."""
    return str(public(str(problem).replace(f"{folder}/", "").replace(str(folder), "the run's folder"))).rstrip(".")


def _behavior(name: str, first: Result) -> tuple[Behavior | None, int | None]:
    """The behaviour as it was trained, and the sign its claims expect, from the run's record where there is one."""
    try:
        behavior: Behavior | None = load_behavior(name, first.base)
    except WsError:  # renamed, or somebody's own file that is not at hand
        behavior = None
    if behavior is not None and first.info.get("behavior_sha256") not in (None, behavior.digest):
        behavior = None
    recorded = first.stages.get("reading", {}).get("expected_sign")
    if recorded in (-1, 1):
        return behavior, int(recorded)
    return behavior, behavior.effect if behavior else None


def _in_the_same_words(results: Sequence[Result]) -> list[Result]:
    """The runs without tables that were asked in other words than most runs' (of equally many, than the first's).

    Tables with one hash were asked in the same words, whatever they call them.
    """
    known, stages = list(results), dict.fromkeys(stage for r in results for stage in (*table_files(), *r.others))
    for stage in stages:
        rows = {i: row for i, run in enumerate(known) if (row := _first_row(run, stage))}
        words = Counter(row.get("words") or "not on record" for row in rows.values())
        usual = max(words, key=lambda name: words[name], default="")
        hashes = {row["eval_hash"] for row in rows.values() if (row.get("words") or "not on record") == usual}
        for i, row in rows.items():
            if row["eval_hash"] not in hashes:
                known[i] = _without(known[i], stage, row.get("words") or "not on record", usual)
    return known


def _first_row(run: Result, stage: str) -> Row | None:
    rows = run.tables.get((stage, "summary")) or run.others.get(stage)
    return rows[0] if rows and rows[0].get("eval_hash") else None


def _without(run: Result, stage: str, words: str, usual: str) -> Result:
    files = table_files()
    what, command = (stage, files[stage][0]) if stage in files else ("dilemmas", files[DILEMMAS][0])
    why = f"made with other words ({words}) than most runs of the page ({usual})"
    gap = Gap.of_run(what, why, _as_asked(command, stage, run.stages), run.adapter, run.seed)
    tables = {key: rows for key, rows in run.tables.items() if key[0] != stage}
    others = {name: rows for name, rows in run.others.items() if name != stage}
    return replace(run, tables=tables, others=others, gaps=(*run.gaps, gap))


def _as_asked(command: str, stage: str, stages: Mapping[str, Any]) -> str:
    """The command with the options of a stage on record without which it would make another table."""
    known, options = stages.get(stage, {}).get("config", {}), {"judged_by": "--judges"}
    if stage.startswith("airisk_") and stage != DILEMMAS:
        options = {"value_class": "--value-class", "protocol": "--protocol", "config": "--config"}
    words = (f"{option} {shlex.quote(str(known[fact]))}" for fact, option in options.items() if known.get(fact))
    return " ".join((command, *words))


# ---- one run --------------------------------------------------------------------------------------------------------


def _result(folder: Path, adapter: str, seed: int, tokenizer: Callable[[str], str]) -> Result:
    vector = SteeringVector.load(folder / "vector")
    reader = _Reader(folder, adapter, seed, vector_digest(vector), tokenizer(vector.base_id))
    for stage, (command, uses) in table_files().items():
        for use, file in uses.items():
            reader.table(stage, use, file, command)
    return Result(
        adapter,
        seed,
        vector.base_id,
        vector.base_fingerprint,
        vector.info,
        reader.digest,
        reader.stages,
        reader.tables,
        reader.calibration(),
        reader.norms(vector),
        reader.controls(),
        reader.samples(),
        reader.others(),
        tuple(dict.fromkeys(reader.gaps)),
    )


class _Reader:
    """Reads the files of one run, and keeps a note of those that are not to be used.

    Args:
        folder, adapter, seed: the run.
        digest: of its vector.
        tokenizer: hash of the base's tokenizer as it is now; empty where that is not to be had.
    """

    def __init__(self, folder: Path, adapter: str, seed: int, digest: str, tokenizer: str) -> None:
        self.folder, self.adapter, self.seed, self.digest, self.tokenizer = folder, adapter, seed, digest, tokenizer
        self.tables: dict[tuple[str, str], list[Row]] = {}
        self.gaps: list[Gap] = []
        stages = Run(folder).manifest["stages"]
        self.stages = {name: record for name, record in stages.items() if "outputs" in record}

    def gap(self, what: str, why: str, command: str) -> None:
        """Note that something is missing, with the command for this very run."""
        self.gaps.append(Gap.of_run(what, why, command, self.adapter, self.seed))

    def reads_otherwise(self, stage: str) -> bool:
        """Whether a stage is on record with another tokenizer or chat template than the base has now."""
        return reads_otherwise(self.stages.get(stage, {}), self.tokenizer)

    def table(self, stage: str, use: str, file: str, command: str) -> None:
        """The rows of the base and of the vector, when the stage is on record with this very vector and tokenizer."""
        path, command = self.folder / f"{stage}_{file}.csv", _as_asked(command, stage, self.stages)
        if not path.exists():
            cls = evaluation_at(stage)
            return None if cls is not None and is_extra(cls) else self.gap(stage, "missing", command)
        rows = read_rows(path, *_needed(stage, use), _FURTHER)
        if not rows:
            return self.gap(stage, "damaged", command)
        if "intervention" not in rows[0]:
            return self.gap(stage, "made by an older version, which did not say what was done to the model", command)
        if self.reads_otherwise(stage):
            return self.gap(stage, OTHER_TEXT, command)
        own, source = f"{rows[0].get('behavior')} {_OWN_ITEMS.get(stage)}", rows[0].get("dataset")
        if source and stage in _OWN_ITEMS and source != own:
            why = f"made with other items than the behaviour holds out ({public_name(source)})"
            return self.gap(stage, why, command)
        if use == "summary":  # a baseline that no vector has a part in
            self.tables[stage, "prompt"] = [r for r in rows if r["intervention"] == "prompt"]
        chosen = [r for r in rows if r["intervention"] in (BASE, WEIGHT)]
        if not any(r["intervention"] == WEIGHT for r in chosen):
            return self.gap(stage, "missing", command)
        if self.stages.get(stage, {}).get("inputs", {}).get("weight") != self.digest:
            return self.gap(stage, "made with another vector", command)
        self.tables[stage, use] = chosen
        return None

    def calibration(self) -> Calibration | None:
        """The calibration stored with the vector, when it is of this very one and of this tokenizer."""
        try:
            calibration = read_calibration(self.folder / "vector" / CALIBRATION)
        except WsError:
            self.gap("calibration", "damaged", "ws calibrate")
            return None
        other = calibration and calibration.units.mismatch(self.digest, self.tokenizer)
        if calibration is None:
            self.gap("calibration", "missing", "ws calibrate")
        elif other:
            is_void = other[0] == "vector"  # and is replaced without a word
            why, fresh = ("of another vector", "") if is_void else (OTHER_TEXT, " --fresh")
            self.gap("calibration", why, f"ws calibrate{fresh}")
        return None if other else calibration

    def controls(self) -> list[Row]:
        """The rows of `controls.csv` that are of this very vector."""
        rows = read_rows(self.folder / "controls.csv", _CONTROL, ("alpha", "shift"))
        kept = [r for r in rows or () if r["vector"] == self.digest[:12]]
        if self.reads_otherwise("controls"):
            self.gap("controls", OTHER_TEXT, "ws check controls")
            return []
        if not kept:
            why = "damaged" if rows is None else "made with another vector" if rows else "missing"
            self.gap("controls", why, "ws check controls")
        return kept

    def samples(self) -> list[Mapping[str, Any]]:
        """The answers in `samples.json`."""
        found = _read_json(self.folder / "samples.json", list[_Sample])
        recorded = self.stages.get("reading", {}).get("inputs", {}).get("vector")
        if recorded not in (None, self.digest):
            self.gap("samples", "made with another vector", "ws replicate")
            return []
        if self.reads_otherwise("reading"):
            self.gap("samples", OTHER_TEXT, "ws replicate")
            return []
        if not found:
            self.gap("samples", "damaged" if (self.folder / "samples.json").exists() else "missing", "ws replicate")
            return []
        if recorded is None:
            self.gap("samples", UNCERTAIN, "ws replicate")
        return [msgspec.to_builtins(sample) for sample in found]

    def others(self) -> dict[str, list[Row]]:
        """Summaries of dilemmas that `table_files` does not name, of this very vector."""
        summaries = {}
        for stage in sorted(self.stages):
            if not stage.startswith("airisk_") or stage == DILEMMAS:
                continue
            command = _as_asked("ws eval airisk", stage, self.stages)
            texts, numbers = _needed(DILEMMAS, "summary")
            rows = read_rows(self.folder / f"{stage}_summary.csv", texts | _LABELLED, numbers)
            chosen = [r for r in rows or () if r.get("intervention") in (BASE, WEIGHT)]
            if self.stages[stage].get("inputs", {}).get("weight") != self.digest:
                self.gap("dilemmas", f"{stage} was made with another vector", command)
            elif self.reads_otherwise(stage):
                self.gap("dilemmas", f"{stage} was {OTHER_TEXT}", command)
            elif not chosen:
                self.gap("dilemmas", f"{stage} is damaged", command)
            else:
                summaries[stage] = chosen
        return summaries

    def norms(self, vector: SteeringVector) -> Norms | None:
        """Module by module: from `ws subspace`, from the bundled base, or, where `W` is not needed, per weight."""
        rows = read_rows(self.folder / "subspace_per_layer.csv", ("kind",), ("relative_norm",), ("layer",)) or []
        if rows and self.stages.get("subspace", {}).get("inputs", {}).get("vector") == self.digest:
            inside = [r for r in rows if r["layer"]]
            return Norms(RELATIVE, {(r["kind"], int(r["layer"])): 100 * float(r["relative_norm"]) for r in inside})
        relative = _relative(vector)
        if relative is not None:
            return Norms(RELATIVE, relative)
        if any(d.depends_on_weight for d in vector.deltas.values()):
            self.gap("norms", "this family multiplies W, whose size only the base can tell", "ws subspace")
            return None
        return Norms(PER_WEIGHT, _cells(vector, lambda n, d: d.norm() / math.sqrt(d.d_out * d.d_in)))


def _needed(stage: str, use: str) -> tuple[set[str], set[str]]:
    """The columns with text and the columns with numbers that a table must have."""
    if stage == CONFOUNDS:
        return {"strong"} if use == "summary" else {"question", "answer"}, {"alpha"}
    cls = evaluation_at(stage)
    mine = cls.scores if cls is not None else ()
    texts, numbers = (needed_texts(s)[use] for s in mine), (needed_numbers(s)[use] for s in mine)
    return set().union(*texts), set().union(*numbers)


@cache
def _bundled(base: str) -> tuple[Mapping[str, Tensor], str]:
    """The weights of a base that comes with the package, and their fingerprint; of the files, without building it."""
    if base not in BUNDLED:
        return {}, ""
    file = Path(model_folder(base)) / "model.safetensors"
    whole = file.is_file()
    tensors = read_tensors(file) if whole else dict(load_model(base, device="cpu")[0].named_parameters())
    return tensors, fingerprint_of((name, t.shape, partial(tensors.__getitem__, name)) for name, t in tensors.items())


def _relative(vector: SteeringVector) -> dict[tuple[str, int], float] | None:
    """`100 ||dW||_F / ||W||_F` per module of the decoder layers, biases left out; None unless the base is bundled."""
    tensors, fingerprint = _bundled(vector.base_id)
    shapes = {name: tuple(tensors[f"{name}.weight"].shape) for name in vector.deltas if f"{name}.weight" in tensors}
    same = shapes == {name: (delta.d_out, delta.d_in) for name, delta in vector.deltas.items()}
    if not same or vector.base_fingerprint not in (None, fingerprint):
        return None  # another base, or an earlier build of the bundled one

    def percent(name: str, delta: LinearDelta) -> float:
        plain, weight = delta.holding({k: t for k, t in delta.coordinates().items() if k != "bias"}), tensors[name]
        return 100 * plain.norm(weight) / float(weight.norm())

    tensors = {name: tensors[f"{name}.weight"].detach().float() for name in vector.deltas}
    return _cells(vector, percent)


def _cells(vector: SteeringVector, size: Callable[[str, Any], float]) -> dict[tuple[str, int], float]:
    cells = {}
    for name, delta in vector.deltas.items():
        layer = decoder_layer(name)
        if layer is not None:
            cells[name.rsplit(".", 1)[-1], layer] = size(name, delta)
    return cells


# ---- what the runs share --------------------------------------------------------------------------------------------


def _compare(folder: Path, results: Sequence[Result], gaps: list[Gap]) -> list[dict[str, Any]]:
    """`compare.csv`, when the strengths in it are those of the calibrations that are stored now, without scores that
    the runs were asked in other words or on other items; those of before items were on record stay."""
    file = folder / "compare.csv"
    rows = typed(_optional_table(file, "compare", "ws compare", gaps, texts=_COMPARE, sparse=_COMPARE_NUMBERS))
    rows = _not_derived(rows, gaps)
    ours = [r for r in rows if r.get("intervention") == WEIGHT and r.get("part") in ("-1u", "+1u")]
    if not all(_same_strength(row, results) for row in ours):
        gaps.append(Gap("compare", "made at other strengths than the vectors are calibrated to now", "ws compare"))
        return []
    asked = {s.key: [row for r in results if (row := _first_row(r, of(s).stage))] for s in shown_scores()}
    for column, what in (("words", "words"), ("eval_hash", "items")):
        known = {score: {row.get(column) for row in firsts} for score, firsts in asked.items()}
        other = {
            row["score"]
            for row in rows
            if row.get(column) and any(known.get(row["score"], ())) and row[column] not in known[row["score"]]
        }
        if other:
            named = ", ".join(sorted(other))
            gaps.append(Gap("compare", f"made with other {what} than the runs' tables ({named})", "ws compare"))
        rows = [r for r in rows if r["score"] not in other]
    return rows


def _profile(
    folder: Path, results: Sequence[Result], gaps: list[Gap]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both tables of `ws profile`, without those of runs whose vectors have been made anew since."""
    known = {(r.adapter, str(r.seed)): r.digest[:12] for r in results}
    tables = list[list[dict[str, Any]]]()
    for name, texts, sparse in (
        ("profile.csv", _PROFILE | {"trait", "group", "role", "moved"}, _PROFILE_NUMBERS),
        ("profile_summary.csv", _PROFILE | {"targets"}, _SELECTIVITY),
    ):
        rows = typed(_optional_table(folder / name, "profile", "ws profile", gaps, False, texts, ("alpha",), sparse))
        rows = _not_derived(rows, gaps)
        stale = {
            (r["board"], r["adapter"])
            for r in rows
            if r["intervention"] == WEIGHT
            and str(r["vectors"]).split() != [known.get((r["adapter"], seed)) for seed in str(r["seed"]).split()]
        }
        same = [r for r in rows if (r["board"], r["adapter"]) not in stale]
        if len(same) < len(rows):
            gaps.append(Gap("profile", "made with another vector", "ws profile"))
        tables.append(same)
    return tables[0], tables[1]


def _not_derived(rows: Sequence[dict[str, Any]], gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    """The rows that are not of vectors computed from others."""
    derived = {gap.adapter for gap in gaps if gap.what == "derived"}
    return [row for row in rows if row["adapter"] not in derived]


def _same_strength(row: Mapping[str, Any], results: Sequence[Result]) -> bool:
    sign, seeds = (-1 if row["part"] == "-1u" else 1), str(row["seed"]).split()
    units = [r.units.get(sign) for r in results if r.adapter == row["adapter"] and str(r.seed) in seeds]
    if len(units) != len(seeds) or row["alpha"] is None:
        return False
    known = [u for u in units if u is not None]
    return len(known) == len(units) and math.isclose(sum(known) / len(known), row["alpha"], rel_tol=1e-9)


def _optional_table(
    file: Path,
    what: str,
    command: str,
    gaps: list[Gap],
    wanted: bool = True,
    texts: Iterable[str] = (),
    numbers: Iterable[str] = (),
    sparse: Iterable[str] = (),
) -> list[Row]:
    if rows := read_rows(file, texts, numbers, sparse):
        return rows
    if file.exists() or wanted:
        gaps.append(Gap(what, "damaged" if file.exists() else "missing", command))
    return []


def _card(file: Path, tokenizer: str, results: Sequence[Result], gaps: list[Gap]) -> Mapping[str, Any] | None:
    """The card of the pairs, unless they are on record as others than those that every vector here learned from."""
    try:
        stages = Run(file.parent).manifest["stages"]
    except WsError:
        stages = {}
    if reads_otherwise(stages.get("pairs", {}), tokenizer):
        gaps.append(Gap("card", OTHER_TEXT, "ws data --fresh"))
        return None
    if _read_json(file, _Card) is None:
        gaps.append(Gap("card", "damaged" if file.exists() else "missing", "ws data"))
        return None
    now = stages.get("pairs", {}).get("outputs", {}).get(PAIRS_FILE)
    others = [r for r in results if now and r.training.get("inputs", {}).get("pairs", now) != now]
    why = "made from other pairs than its vector learned from"
    why = why if len(others) == len(results) else f"shown, but {why}"
    gaps += [Gap("card", why, "", r.adapter, r.seed) for r in others]
    if len(others) == len(results):
        return None
    return _read_json(file, dict[str, Any])


class _Card(msgspec.Struct):
    """What must be true of a data card; it says more than this."""

    kept: int
    positive: dict[str, Any]
    negative: dict[str, Any]
    dropped: dict[str, int] = {}
    refusals: dict[str, Any] = {}
    samples: list[Any] = []
    confounds: list[str] = []


class _Sample(msgspec.Struct):
    """An answer that a run keeps."""

    alpha: float
    question: str
    answer: str


def read_rows(
    file: Path, texts: Iterable[str] = (), numbers: Iterable[str] = (), sparse: Iterable[str] = ()
) -> list[Row] | None:
    """The rows of a table with these columns (see `ws.files.reading.read_csv`), none when there is no such file.

    None when it is not a table, lacks a column, or holds NaN or infinity.
    """
    try:
        rows = list[Row](read_csv(file, texts, numbers, sparse)) if file.exists() else []
    except DamagedError:
        return None
    return None if any(v in ("nan", "inf", "-inf") for row in rows for v in row.values()) else rows


def _read_json(file: Path, kind: type[T] | GenericAlias) -> T | None:
    try:
        return read_json(file, kind) if file.exists() else None
    except DamagedError:
        return None
