"""The out/ folder: layout, manifests, atomic writes and resume.

Every artifact is written under a temporary name and renamed, so a file that exists is whole. A run is a list of stages;
`Run.stage` skips one that is finished with the same configuration and the same inputs, and stops when they differ.
"""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ws import console
from ws.errors import WsError
from ws.files.places import FolderKind, place_below, plain_name, require_no_link

RUN_MANIFEST = "manifest.json"
DEFAULT_MODEL, BUNDLED = "Qwen/Qwen3-0.6B", ("pocket", "tiny-random")
BUNDLED_MODELS = (*BUNDLED, "smollm2")  # with the one that a package carries
DEFAULT_OUT = Path("out")
DEMO_OUT = DEFAULT_OUT / "demo"  # what `ws demo` makes is in nobody's way
VECTOR_MANIFEST, TRAIN_FILE = "ws.json", "ws_train.json"  # in the folder of a vector, and of a trained adapter
PISSA_INIT_FILE = "pissa_init.safetensors"
# What is in them besides is somebody's own.
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
VECTOR_FILES = (VECTOR_MANIFEST, "calibration.json", "vector.safetensors", *_PEFT_FILES)
VECTOR = FolderKind("not a steering vector", (VECTOR_MANIFEST,), VECTOR_FILES)
ADAPTER = FolderKind("not an adapter that `ws train` made", (TRAIN_FILE,), (*_PEFT_FILES, PISSA_INIT_FILE, TRAIN_FILE))
_OURS = {"pos": ADAPTER, "neg": ADAPTER, "vector": VECTOR}
# Of evaluation, model, dtype, tokenizer, subject and strength; see `ws.eval.context`.
_SCORES = re.compile(r"\.?[\w.-]+-[0-9a-f]{8,}-[0-9a-f]{8,}-\w+-[0-9a-f]{8,}-\w+-[-+.\de]+\.json(\.lock)?")


# ---- layout ---------------------------------------------------------------------------------------------------


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, by its ending, in capitals or not."""
    return name.lower().endswith(".gguf")


def model_name(name: str) -> str:
    """The one form of a model's name: a folder or GGUF file by its whole path without links, however it was written.

    Hub ids and the names of bundled models stay as they are, the latter also beside a folder that is called so.
    """
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


# ---- atomic writes --------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(file: Path) -> Iterator[Path]:
    """A temporary name beside a file to write to; it takes the file's place when the block ends well.

    The name is nobody else's, so of several writers the last one's whole file stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(file, "part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, kind: FolderKind | None = None) -> Iterator[Path]:
    """A temporary sibling to fill; it takes the place of `folder` when the block ends well and vanishes when not.

    Args:
        folder: the place.
        kind: what is written; files of somebody's own in a folder of this kind stay there.

    Raises:
        WsError: something of another kind is there.
    """
    if kind is not None:
        kind.require(folder)
    folder = folder.resolve() if folder.name in ("", "..") else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(folder, "part")
    aside = [part]
    part.mkdir()
    try:
        yield part
        while True:  # another writer may put its own there between the two renames
            if kind is not None and folder.is_dir() and not folder.is_symlink():
                new = [path.name for path in part.iterdir()]
                if kind.others(folder, new):
                    _replace_ours(folder, part, kind)
                    break
            try:
                part.rename(folder)
                break
            except OSError as problem:
                if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not folder.is_symlink():
                    raise
            aside.append(_beside(folder, "old"))
            with suppress(FileNotFoundError):
                folder.rename(aside[-1])
    finally:
        for path in aside:
            _delete(path)


def _replace_ours(folder: Path, part: Path, kind: FolderKind) -> None:
    """Put the files of `part` in the place of ours, file by file: what is somebody's own is never moved.

    The markers are the first to go and the last to come, so that half of it is not taken for the whole.
    """
    new = sorted(part.iterdir(), key=lambda path: path.name in kind.markers)
    others = {path.name for path in kind.others(folder, [path.name for path in new])}
    ours = [path for path in folder.iterdir() if path.name not in others]
    for path in sorted(ours, key=lambda path: path.name not in kind.markers):
        _delete(path)
    for path in new:
        path.rename(folder / path.name)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name beside a path that only this call uses; what killed processes of this machine left is deleted."""
    start = f".{path.name}.{kind}"
    own = f"{start}-{re.sub(r'[^A-Za-z0-9]', '', platform.node())}-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        owner = left.name.removeprefix(own).split("-")[0]
        is_ours = left.name.startswith(own) and owner.isdigit() and not _is_running(int(owner))
        if is_ours or left.name == start:  # the latter is what versions without these names called it
            _delete(left)
    return path.with_name(f"{own}{os.getpid()}-{secrets.token_hex(4)}")


def _delete(path: Path) -> None:
    """A folder with all in it, or a file, or a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there is no harmless way to ask; the rest of a killed run stays
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def lock(file: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes and threads that ask for the same lock out while the block runs.

    The operating system takes it from a process that ends, however that ends. Who holds a lock may ask for it again.

    Args:
        file: what is worked on; the lock is a hidden file beside it.
        wait: for the other to finish, and say so; else a lock that is taken is a `WsError`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(file.with_name(f".{file.name}.lock"), is_singleton=True)
    try:
        held.acquire(blocking=False)
    except Timeout as taken:
        if not wait:
            raise WsError(f"Another process is working on {file}; let it finish, or take another --out.") from taken
        console.say(f"waiting for another process that is working on {file}")
        held.acquire()
    try:
        yield
    finally:
        held.release()


def write_text(file: Path, text: str) -> Path:
    """Write a text file all at once."""
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")
    return file


def write_json(file: Path, value: Any) -> Path:
    """Write strict JSON all at once; NaN is refused rather than written."""
    return write_text(file, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows with the columns of the first; floats keep all their digits, NaN and ragged rows are refused."""
    if not rows:
        raise WsError(f"There are no rows to write to {file}.")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        bad = [k for k, v in row.items() if isinstance(v, float) and math.isnan(v)]
        if bad:
            raise WsError(f"Refusing to write NaN in {', '.join(bad)} to {file}.")
        writer.writerow(row)
    return write_text(file, buffer.getvalue())


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a table written by `write_csv`, as text; `WsError` when it is not there."""
    if not file.is_file():
        raise WsError(f"The table {file} is missing; run its evaluation again.")
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


_NUMBER = re.compile(r"[+-]?(inf|(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")
_TEXT_COLUMN = re.compile(r"(^|_)(hash|sha256|id)$")


def typed(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Rows of a table as they were before they were written: numbers, truth values, and None for empty cells.

    Identifiers stay text, also those that happen to be made of digits.
    """
    return [{k: v if _TEXT_COLUMN.search(k) else _value(v) for k, v in row.items()} for row in rows]


def read_values(file: Path) -> list[dict[str, Any]]:
    """The typed rows of a table written by `write_csv`; `WsError` when it is not there."""
    return typed(read_csv(file))


def _value(text: str) -> Any:
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    if not _NUMBER.fullmatch(text):
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


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


class Run:
    """A folder with a manifest of finished stages.

    Args:
        folder: where the artifacts go.
        fresh: forget and delete what earlier runs recorded here.
    """

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        if fresh:
            self._forget()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk, empty when there is none."""
        file = self.folder / RUN_MANIFEST
        if not file.is_file():
            return {"format": 1, "stages": {}}
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as problem:
            raise WsError(f"{file} is damaged ({problem}); use --fresh to start over.") from problem

    def facts(self, name: str) -> dict[str, Any]:
        """What a finished stage recorded."""
        return self.manifest["stages"][name]

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
        was, now = (_by_name(json.loads(json.dumps(c))) for c in (recorded["config"], config))
        if inputs is not None:
            was |= {f"input {k}": v[:12] for k, v in recorded["inputs"].items()}
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
            for name in ("pos", "neg", "vector"):  # what another process is making is not taken away from it
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
        work = [self.folder / name for name in (".pos.work", ".neg.work")]
        for path in [*recorded, *folders, *work]:
            require_no_link(path)
        # What has changed since is somebody's work: it stays until it is written anew.
        made = [path for path, digest in recorded.items() if path.is_file() and sha256_file(path) == digest]
        for path in [*made, *chain.from_iterable(map(_made_in, folders)), *work]:
            _delete(path)
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
