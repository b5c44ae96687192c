"""The out/ folder: layout, manifests and resume.

A run is a list of stages; `Run.stage` skips one that is finished with the same configuration and the same inputs, and
stops when they differ. How files are written and read back is in `writing` and `reading`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import msgspec

from ws.errors import DamagedError, WsError
from ws.files.places import FolderKind, place_below, plain_name, require_no_link
from ws.files.reading import convert, read_json
from ws.files.reading import read_csv as read_csv
from ws.files.reading import read_values as read_values
from ws.files.reading import typed as typed
from ws.files.writing import atomic_file as atomic_file
from ws.files.writing import atomic_folder as atomic_folder
from ws.files.writing import delete
from ws.files.writing import lock as lock
from ws.files.writing import recover as recover
from ws.files.writing import write_csv as write_csv
from ws.files.writing import write_json as write_json
from ws.files.writing import write_text as write_text

T = TypeVar("T")
RUN_MANIFEST = "manifest.json"
DEFAULT_MODEL, BUNDLED = "Qwen/Qwen3-0.6B", ("pocket", "tiny-random")
BUNDLED_MODELS = (*BUNDLED, "smollm2")  # with the one that a package carries
DEFAULT_OUT = Path("out")
DEMO_OUT = DEFAULT_OUT / "demo"  # what `ws demo` makes is in nobody's way
VECTOR_MANIFEST, TRAIN_FILE = "ws.json", "ws_train.json"  # in the folder of a vector, and of a trained adapter
PISSA_INIT_FILE = "pissa_init.safetensors"
SIGNED_INIT_FILE = "signed_init.safetensors"  # initial tensors of a signed adapter whose family needs them
CARD, CARD_TAG = "README.md", "weight-steering"  # what `ws export` writes of a vector, and a tag in it
# What is in them besides is somebody's own.
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
VECTOR_FILES = (VECTOR_MANIFEST, "calibration.json", "vector.safetensors", *_PEFT_FILES)


class _RunPart(FolderKind):
    """A kind of folder that runs have, too, in which `--fresh` leaves what is somebody's own."""

    def require(self, folder: Path) -> None:
        """As for any kind; and in a run it may lie among files that have none of the names of its own."""
        is_part = _OURS.get(folder.name) is self and (folder.parent / RUN_MANIFEST).is_file()
        if is_part and folder.is_dir() and not folder.is_symlink():
            there = sorted(folder.iterdir())
            if self.others(folder) == there and not any(path.name in self.markers for path in there):
                return
        super().require(folder)


VECTOR = _RunPart("not a steering vector", (VECTOR_MANIFEST,), VECTOR_FILES)
ADAPTER = _RunPart(
    "not an adapter that `ws train` made",
    (TRAIN_FILE,),
    (*_PEFT_FILES, PISSA_INIT_FILE, SIGNED_INIT_FILE, TRAIN_FILE),
)
_OURS = {"pos": ADAPTER, "neg": ADAPTER, "signed": ADAPTER, "vector": VECTOR}
# Of evaluation, model, dtype, tokenizer, subject and strength; see `ws.eval.context`.
_SCORES = re.compile(r"\.?[\w.-]+-[0-9a-f]{8,}-[0-9a-f]{8,}-\w+-[0-9a-f]{8,}-\w+-[-+.\de]+\.json(\.lock)?")
FORMAT_VERSION = 1  # of a run's manifest


# ---- layout ---------------------------------------------------------------------------------------------------


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, by its ending, in capitals or not."""
    return name.lower().endswith(".gguf")


def model_name(name: str | os.PathLike[str]) -> str:
    """The one form of a model's name: a folder or GGUF file by its whole path without links, however it was written.

    Hub ids and the names of bundled models stay as they are, the latter also beside a folder that is called so, and the
    empty name of a model that came from nowhere stays empty.

    Raises:
        WsError: what is no name, such as None.
    """
    if not isinstance(name, str | os.PathLike):
        raise WsError(f"A model is a hub id, a folder, a .gguf file or {', '.join(BUNDLED_MODELS)}, not {name!r}.")
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if name in BUNDLED_MODELS or not (os.path.isdir(path) or (is_gguf(path) and os.path.isfile(path))):
        return name
    whole = os.path.realpath(path)
    if is_gguf(path) and not is_gguf(whole):  # the hub's cache keeps files under their hashes, and links to them
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return whole


def slug(name: str) -> str:
    """A model id or path as one folder name: `Qwen/Qwen3-0.6B` becomes `Qwen--Qwen3-0.6B`, of a path the last part."""
    named = model_name(name)
    if is_gguf(named):
        return Path(named).stem
    return Path(named).name or "root" if Path(named).is_absolute() else re.sub(r"[/\\:]", "--", named)


def data_folder(out: Path, model: str, behavior: str) -> Path:
    """`out/data/<model>/<behavior>`: the contrast pairs, shared by all adapters and seeds."""
    return out / "data" / plain_name(slug(model), "the pairs of a model") / plain_name(behavior, "a behaviour's pairs")


def run_folder(out: Path, behavior: str, adapter: str, seed: int = 0) -> Path:
    """`out/<behavior>/<adapter>`, with `seed-<n>` below it for every seed but 0."""
    top = out / plain_name(behavior, "a behaviour's runs") / plain_name(adapter, "a run")
    return top if seed == 0 else top / f"seed-{seed}"


def tune_folder(out: Path, behavior: str, adapter: str) -> Path:
    """`out/<behavior>/<adapter>/tune`: the search of `ws tune`, and what it chose for all seeds."""
    return run_folder(out, behavior, adapter) / "tune"


def finished_runs(out: Path) -> list[Path]:
    """The folders of all runs below `out` that have a vector, in order."""
    folders = [
        p.parent.parent for depth in ("*/*", "*/*/seed-*") for p in out.glob(f"{depth}/vector/{VECTOR_MANIFEST}")
    ]
    return sorted(folders, key=str)


def seed_flag(seed: int) -> str:
    """What names a seed on a command line: ` --seed 2`, and nothing for 0, which every command takes anyway."""
    return f" --seed {seed}" if seed else ""


def model_flag(model: str | None) -> str:
    """What names a model on a command line, and nothing for the one that every command takes anyway."""
    return "" if model in (None, DEFAULT_MODEL) else f" --model {shlex.quote(str(model))}"


# ---- hashes and versions --------------------------------------------------------------------------------------


def sha256_file(file: Path) -> str:
    """Hex SHA-256 of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


@lru_cache(maxsize=1)
def library_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    packages = ("weight-steering", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "scipy")
    return {"python": platform.python_version()} | {p: version(p) for p in packages}


# ---- stages ---------------------------------------------------------------------------------------------------


class Stage:
    """One step of a run while it executes; `done` records it in the manifest."""

    def __init__(self, run: Run, name: str, config: dict[str, Any], inputs: dict[str, str]) -> None:
        self.run, self.name, self.config, self.inputs = run, name, config, inputs
        self.started = time.perf_counter()

    def done(self, outputs: Iterable[Path], **facts: Any) -> None:
        """Mark the stage as finished, with the hashes of what it wrote and any further facts."""
        record = {
            "config": self.config,
            "config_sha256": sha256_json(self.config),
            "inputs": self.inputs,
            "outputs": {str(f.relative_to(self.run.folder)): sha256_file(f) for f in outputs},
            "seconds": round(time.perf_counter() - self.started, 2),
            "command": _command(),
            "versions": library_versions(),
            **facts,
        }
        self.run.write(self.name, record)


def reads_otherwise(record: Mapping[str, Any], tokenizer: str) -> bool:
    """Whether the stage of this record was run with another tokenizer or chat template than `tokenizer`.

    Both are hashes of `ws.lm.models.tokenizer_hash`; where one is empty or not on record, nothing is known: no.
    """
    recorded = record.get("config", {}).get("tokenizer_hash")
    return bool(tokenizer and recorded) and recorded != tokenizer


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the model by its one name; records of earlier versions have it as it was typed."""
    named = {"model": model_name(config["model"])} if isinstance(config.get("model"), str) else {}
    return {**config, **named}


class _Record(TypedDict, total=False):
    """What must be true of a stage on record; there are further facts, which differ from stage to stage."""

    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


class _Manifest(msgspec.Struct):
    stages: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        convert(self.stages, dict[str, _Record])


class Run:
    """A folder with a manifest of finished stages.

    Args:
        folder: where the artifacts go.
        fresh: forget and delete what earlier runs recorded here.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        recover(folder)
        if fresh:
            self._forget()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk, empty when there is none."""
        file = self.folder / RUN_MANIFEST
        if not file.exists():
            return {"format": FORMAT_VERSION, "stages": {}}
        stored = read_json(file, _Manifest, "use --fresh to start over", FORMAT_VERSION)
        return {"format": FORMAT_VERSION, "stages": stored.stages}

    def facts(self, name: str) -> dict[str, Any]:
        """What a finished stage recorded; `DamagedError` when it is not on record."""
        stages = self.manifest["stages"]
        if "outputs" not in stages.get(name, {}):
            raise DamagedError(f"{self.folder / RUN_MANIFEST} has no finished stage {name!r}; run its command again.")
        return stages[name]

    def fact(self, name: str, key: str, kind: type[T]) -> T:
        """One of them, of this type; `DamagedError` when it is not on record."""
        try:
            return convert(self.facts(name)[key], kind)
        except (KeyError, msgspec.ValidationError) as problem:
            file = self.folder / RUN_MANIFEST
            raise DamagedError(
                f"{file} does not say {key} of the stage {name!r}; use --fresh to start over."
            ) from problem

    def outputs(self, name: str) -> list[Path]:
        """The files that a finished stage wrote."""
        return [self._place(path) for path in self.facts(name)["outputs"]]

    def stage(self, name: str, config: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Stage | None:
        """The stage to carry out, or None when it is finished with this configuration and these inputs.

        Raises:
            WsError: it was begun or finished with another configuration or other inputs; the message names the fields.
        """
        if self.is_finished(name, config, inputs):
            return None
        return self.restart(name, config, inputs)

    def is_finished(self, name: str, config: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> bool:
        """Whether a stage is finished with this configuration and these inputs; `WsError` as `stage` raises it."""
        self.require_same(name, config, inputs or {})
        recorded = self.manifest["stages"].get(name)
        return bool(recorded) and "outputs" in recorded and self._whole(recorded["outputs"])

    def require_same(self, name: str, config: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> None:
        """`WsError` where a stage is on record with another configuration or, where they are given, other inputs.

        Inputs that a stage before it has yet to make are not known; its configuration is, before anything is made.
        """
        recorded = self.manifest["stages"].get(name)
        if not recorded:
            return
        was, now = (_by_name(json.loads(json.dumps(c))) for c in (recorded.get("config", {}), config))
        if inputs is not None:
            was |= {f"input {k}": v[:12] for k, v in recorded.get("inputs", {}).items()}
            now |= {f"input {k}": v[:12] for k, v in inputs.items()}
        changed = [f"{k}: {was.get(k)!r} -> {now.get(k)!r}" for k in sorted(was | now) if was.get(k) != now.get(k)]
        if changed:
            raise WsError(
                f"The stage {name!r} in {self.folder} was made with other settings ({'; '.join(changed)}); "
                "use --fresh to start over or --out for another place."
            )

    def alone(self, name: str, wait: bool = True) -> AbstractContextManager[None]:
        """No other process works on that stage while the block runs; whoever comes second finds it finished.

        Only inside can what `stage` and `refresh` say be relied on.
        """
        return lock(self.folder / name, wait)

    def refresh(self, name: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Stage | None:
        """The stage to carry out unless exactly this is finished; other settings on disk are simply replaced."""
        recorded = self.manifest["stages"].get(name, {})
        was, now = (_by_name(json.loads(json.dumps(c))) for c in (recorded.get("config", {}), config))
        same = was == now and recorded.get("inputs") == dict(inputs)
        if same and "outputs" in recorded and self._whole(recorded["outputs"]):
            return None
        return self.restart(name, config, inputs)

    def restart(self, name: str, config: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Stage:
        """The stage to carry out, whatever is on record: for cheap stages that are simply done again."""
        plain, given = json.loads(json.dumps(config)), dict(inputs or {})
        self.write(name, {"config": plain, "inputs": given})
        return Stage(self, name, plain, given)

    def drop(self, name: str) -> None:
        """Forget one stage, so that it may be tried again with other settings."""
        with lock(self.folder / RUN_MANIFEST):
            manifest = self.manifest
            if manifest["stages"].pop(name, None):
                write_json(self.folder / RUN_MANIFEST, manifest)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Replace one stage's record in the manifest; stages of other processes in the same folder are kept."""
        with lock(self.folder / RUN_MANIFEST):
            manifest = self.manifest
            manifest["stages"][name] = record
            write_json(self.folder / RUN_MANIFEST, manifest)

    def _whole(self, outputs: Mapping[str, str]) -> bool:
        return all((f := self._place(p)).is_file() and sha256_file(f) == digest for p, digest in outputs.items())

    def _place(self, name: Any) -> Path:
        """The file of a recorded output."""
        return place_below(self.folder, name, self.folder / RUN_MANIFEST)

    def _forget(self) -> None:
        """Delete what was made here, and only that: nothing else in the folder is ours.

        Raises:
            WsError: the manifest names a place outside, or a link leads there; then nothing is deleted.
        """
        if not self.folder.is_dir():
            return
        with ExitStack() as others:
            for name in _OURS:  # what another process is making is not taken away from it
                others.enter_context(self.alone(name))
            self._delete_outputs()

    def _delete_outputs(self) -> None:
        try:
            stages = self.manifest["stages"]
        except WsError:  # a damaged manifest is the very thing --fresh is the way out of
            stages = {}
        outputs = (record.get("outputs", {}).items() for record in stages.values())
        recorded = {self._place(name): digest for name, digest in chain.from_iterable(outputs)}
        folders = [self.folder / name for name in (*_OURS, "scores")]
        work = [self.folder / f".{name}.work" for name, kind in _OURS.items() if kind is ADAPTER]
        for path in [*recorded, *folders, *work]:
            require_no_link(path)
        # What has changed since is somebody's work: it stays until it is written anew.
        made = [path for path, digest in recorded.items() if path.is_file() and sha256_file(path) == digest]
        for path in [*made, *chain.from_iterable(map(_made_in, folders)), *work]:
            delete(path)
        for folder in folders:
            with suppress(OSError):  # what is not empty holds files of somebody's own
                folder.rmdir()
        (self.folder / RUN_MANIFEST).unlink(missing_ok=True)


def _made_in(folder: Path) -> list[Path]:
    """The files in `pos`, `neg`, `vector` or `scores` of a run that were made by a run."""
    if not folder.is_dir():
        return []
    if folder.name == "scores":
        return [path for path in folder.iterdir() if _SCORES.fullmatch(path.name)]
    kind = _OURS[folder.name]
    is_ours = all((folder / marker).is_file() for marker in kind.markers)
    others = kind.others(folder)
    return [path for path in folder.iterdir() if is_ours and path not in others and not path.is_dir()]


def _command() -> str:
    """The command line that is running, without the folder of the interpreter or script; a notebook has none."""
    place = Path(sys.argv[0] if sys.argv else "")
    program = f"{place.parent.name}.py" if place.name == "__main__.py" else place.name  # a package, run by `python -m`
    # The command line calls its commands by two words, `ws demo`; every other program is one, whatever its name holds.
    words = program.split() if program.startswith("ws ") else [program]
    return "" if program.startswith("ipykernel") else shlex.join([*words, *sys.argv[1:]])
