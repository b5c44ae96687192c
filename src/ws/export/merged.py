"""`ws export merged`: the base with `alpha dW` written into its weights, as an ordinary checkpoint.

A file of the base that the vector does not touch is linked; one that it does is copied and then patched tensor by
tensor: read, add in float32, cast, write. Nothing but one tensor is in memory, whatever the size of the model.

A tied weight is written wherever the base stores it. Where the vector changes the head otherwise than the embedding it
is tied to, or the base itself stores the two with different values, the export has both and is configured untied.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ws import console
from ws.diff import ParameterChange, SteeringVector, vector_digest, write_step
from ws.errors import WsError
from ws.export.card import describe, merged_card
from ws.export.source import strength_text, vector_of
from ws.files.places import FolderKind
from ws.files.public import public, public_name
from ws.files.reading import read_json
from ws.files.runs import CARD, atomic_folder, library_versions, write_json
from ws.files.tensors import INDEX, WHOLE, TensorPatcher, copy_with_room, tensor_patcher
from ws.lm.checkpoints import SIDE_FILES, Checkpoint, Place
from ws.lm.models import AGAIN, as_matrix
from ws.options.use import MergedOptions as MergedOptions

EXPORT_FILE, CONFIG = "ws_export.json", "config.json"
TIE_FLAGS = ("tie_word_embeddings", "tie_embedding")  # the second is LFM2's, and counts more than the first


@dataclass(frozen=True)
class Merge:
    """What a merge did.

    Attributes:
        lost: `‖written - wanted‖ / ‖alpha dW‖` over all parameters: what the cast to the base's dtype destroyed.
        by_module: the same of every module's weight and bias.
        dtypes: of the parameters written.
        patched, linked: files that were changed, and that are the base's own.
        untied: weights which the base's configuration ties to others, and that have values of their own in the export.
    """

    lost: float
    by_module: dict[str, float]
    dtypes: tuple[str, ...]
    patched: tuple[str, ...]
    linked: tuple[str, ...]
    untied: tuple[str, ...]


def export_merged(
    vector: SteeringVector, alpha: float | int, to: Path, model: str | None = None, run: Path | None = None
) -> Merge:
    """Write the base with `W + alpha dW` into a new folder, all at once; an earlier export there is replaced.

    Args:
        vector: `dW`.
        alpha: the strength.
        to: the folder.
        model: the base checkpoint, None for the one that the vector was made for.
        run: the vector's run, whose evaluations go onto the card.

    Raises:
        WsError: alpha or the vector is 0, another base, a folder that holds something else, or a weight that overflows
            its dtype.
    """
    if alpha == 0 or vector.is_zero:
        what = "At alpha 0" if alpha == 0 else "With a vector that is zero"
        raise WsError(f"{what} the export would be the base itself; give another {'--alpha' if alpha == 0 else 'one'}.")
    kind = _kind_of(to)
    kind.require(to)
    base = Checkpoint.open(model or vector.base_id)
    if to.resolve() == base.folder.resolve():
        raise WsError(f"{to} is the base itself; choose another place with --to.")
    _require_base(vector, base)
    vector_here = replace(vector, base_fingerprint=None)
    if base.untied or vector_here.apart(base.model):
        base = base.untie()
    changes = vector_here.written(base.model)
    with atomic_folder(to, kind) as part:
        merge = _write(base, changes, float(alpha), part)
        facts: dict[str, Any] = {"base": public_name(vector.base_id), "alpha": alpha}
        facts |= {
            "fingerprint": vector.base_fingerprint,
            "vector": vector_digest(vector),
            "recipe": vector.recipe,
            "info": vector.info,
        }
        facts |= {"lost": merge.lost, "lost_by_module": merge.by_module, "untied": merge.untied}
        about = describe(vector, to.name, run)
        merged_card(about, alpha, merge.lost, "/".join(merge.dtypes)).save(part / CARD)
        facts |= {"files": sorted(file.name for file in part.iterdir())}
        write_json(part / EXPORT_FILE, public(facts | {"versions": library_versions()}))
    return merge


class _Export(msgspec.Struct):
    """What an export says of itself."""

    files: list[str] = []


def _kind_of(folder: Path) -> FolderKind:
    """An export, with the names of the files that the one in the folder, if there is one, says are its own."""
    files = ["*.safetensors", "*.safetensors.index.json"]  # weights that are left would be read beside the new ones
    if (folder / EXPORT_FILE).is_file():
        with suppress(WsError):  # a damaged one says nothing
            files += map(escape, read_json(folder / EXPORT_FILE, _Export).files)
    return FolderKind("no export", (EXPORT_FILE,), tuple(files))


def _require_base(vector: SteeringVector, base: Checkpoint) -> None:
    made_on = vector.base_fingerprint
    if made_on is not None and (actual := base.fingerprint()) != made_on and base.fingerprint(torch.float16) != made_on:
        raise WsError(
            f"The vector was made for {vector.base_id} ({vector.base_fingerprint}) and the weights of {base.name} "
            f"differ ({actual}); give its base with --model."
        )


def _write(base: Checkpoint, changes: list[ParameterChange], alpha: float, part: Path) -> Merge:
    added = _added(base)
    patched = {file for c in changes for file, _ in _places(base, _name(c))} | {file for file, _ in added.values()}
    for file in base.files:
        if file not in patched:
            _link(file, part / file.name)
        elif extra := {name: key for name, (place, key) in added.items() if place == file}:
            copy_with_room(file, part / file.name, extra)
        else:
            shutil.copyfile(file, part / file.name)
    for file in _side_files(base):
        shutil.copyfile(file, part / file.name)
    lost, wanted, dtypes = dict[str, float](), dict[str, float](), set[str]()
    with ExitStack() as stack:
        patchers = {f: stack.enter_context(tensor_patcher(part / f.name)) for f in patched}
        for name in added.keys() - {_name(c) for c in changes}:
            patchers[added[name][0]].replace(name, base.tensor(name))
        for change in console.progress(changes, desc="merge", unit="tensor"):
            gone, asked, dtype = _patch(base, patchers, change, alpha)
            lost[change.name] = lost.get(change.name, 0.0) + gone
            wanted[change.name] = wanted.get(change.name, 0.0) + asked
            dtypes.add(dtype)
    if base.untied:
        _say_untied(base, added, part)
    if not (asked := sum(wanted.values())):
        raise WsError(f"Alpha {alpha:g} is too small: the export would be the base itself; give another --alpha.")
    total = math.sqrt(sum(lost.values()) / asked)
    by_module = {n: math.sqrt(lost[n] / wanted[n]) for n in lost if wanted[n]}
    changed, linked = (
        tuple(f.name for f in base.files if (f in patched) == is_patched) for is_patched in (True, False)
    )
    return Merge(total, by_module, tuple(sorted(dtypes)), changed, linked, tuple(base.untied))


def _name(change: ParameterChange) -> str:
    return f"{change.name}.{change.leaf}"


def _added(base: Checkpoint) -> dict[str, Place]:
    """Parameters that the files of the base hold only as the weight to which they were tied, with its place."""
    names = [n for pair in base.model.all_tied_weights_keys.items() for n in pair] if base.untied else []
    return {n: base.values[n] for n in names if n not in base.stored}


def _places(base: Checkpoint, parameter: str) -> list[Place]:
    """Where an export holds a parameter: wherever the base does, a tied weight that is stored twice in both places."""
    return base.copies(parameter) or [(base.place(parameter)[0], parameter)]


def _patch(
    base: Checkpoint, patchers: Mapping[Path, TensorPatcher], change: ParameterChange, alpha: float
) -> tuple[float, float, str]:
    """Write one parameter, wherever it is stored; returns the squared norms of `write_step`, and the dtype."""
    name, places = _name(change), _places(base, _name(change))
    stored = base.tensor(name)
    if not stored.is_floating_point():
        raise WsError(f"{name} of {base.name} is quantised; merge into the unquantised checkpoint.")
    # Copies of one weight stay equal, so that it stays tied: they are rounded alike, even if their dtypes differ.
    dtype = min((patchers[file].dtype(key) for file, key in places), key=lambda d: d.itemsize)
    written = torch.empty_like(stored, dtype=dtype, memory_format=torch.contiguous_format)
    gone, asked = _add(change, stored, written, alpha)
    if not torch.isfinite(written).all():
        raise WsError(f"{name} overflows {str(dtype)[6:]} at alpha {alpha:g}; use a smaller strength.")
    for file, key in places:
        patchers[file].replace(key, written.to(patchers[file].dtype(key)))
    return gone, asked, str(dtype)[6:]


def _add(change: ParameterChange, stored: Tensor, written: Tensor, alpha: float) -> tuple[float, float]:
    delta, module = change.delta, change.module
    if change.leaf == "bias":
        assert delta.bias is not None
        return write_step(written, stored, alpha * delta.bias)
    before = as_matrix(module, stored)
    return write_step(as_matrix(module, written), before, delta.dense(before).mul_(alpha))


def _say_untied(base: Checkpoint, added: Mapping[str, Place], part: Path) -> None:
    """Enter the parameters that were added into the index, and into the configuration that no weight is tied any more.

    Raises:
        WsError: this architecture's configuration does not say it in a way that is known here.
    """
    config = read_json(part / CONFIG, dict[str, Any], AGAIN)
    config["tie_word_embeddings"] = False
    for settings in [config, *(value for value in config.values() if isinstance(value, dict))]:
        settings |= {flag: False for flag in TIE_FLAGS if flag in settings}
    write_json(part / CONFIG, config)
    if (part / INDEX).is_file():
        index = read_json(part / INDEX, dict[str, Any], AGAIN)
        index["weight_map"] |= {name: file.name for name, (file, _) in added.items()}
        sizes = [base.tensor(name).nbytes for name in added]
        if isinstance(facts := index.get("metadata"), dict) and isinstance(facts.get("total_size"), int):
            facts["total_size"] += sum(sizes)
        write_json(part / INDEX, index)
    made = Checkpoint.open(str(part))
    stored_names = {name for name, (_, key) in made.stored.items() if name == key}
    if made.model.all_tied_weights_keys or not added.keys() <= stored_names:
        raise WsError(
            f"The vector changes weights of {base.name} apart that its configuration ties ({', '.join(base.untied)}), "
            "and a configuration which does not tie them could not be written; steer instead of merging."
        )


def _side_files(base: Checkpoint) -> list[Path]:
    """Configuration and tokenizer; the base's own card is replaced by one that says what was done."""
    files = {f for pattern in SIDE_FILES for f in base.folder.glob(pattern) if f.is_file()}
    return sorted(f for f in files if f.name != INDEX or base.files[0].name != WHOLE)


def _link(file: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def main(options: MergedOptions) -> None:
    """The command `ws export merged`."""
    vector = vector_of(options)
    alpha = vector.strength(options.alpha)
    folder = options.target(f"merged{strength_text(alpha)}")
    merge = export_merged(vector, alpha, folder, options.model, options.run_folder)
    worst = max(merge.by_module, key=merge.by_module.__getitem__)
    text = (
        f"{len(merge.by_module)} modules written at alpha {alpha:+g}, in {len(merge.patched)} files; "
        f"{len(merge.linked)} untouched files are the base's own.\nThe cast to {'/'.join(merge.dtypes)} destroyed "
        f"{merge.lost:.2g} of alpha dW (worst: {worst}, {merge.by_module[worst]:.2g})."
    )
    if merge.untied:
        text += f"\n{', '.join(merge.untied)}: no longer tied to another weight, in the files and in the configuration."
    console.show(console.Result(text, {"alpha": alpha, **asdict(merge)}, [folder]))


if __name__ == "__main__":
    console.run(main, MergedOptions, "python -m ws.export.merged")
