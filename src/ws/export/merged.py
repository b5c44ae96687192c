"""`ws export merged`: the base with `alpha dW` written into its weights, as an ordinary checkpoint.

A file of the base that the vector does not touch is linked; one that it does is copied and then patched tensor by
tensor: read, add in float32, cast, write. Nothing but one tensor is in memory, whatever the size of the model.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ws import console
from ws.checkpoints import SIDE_FILES, Checkpoint
from ws.delta import LinearDelta
from ws.diff import SteeringVector, vector_digest, write_step
from ws.errors import WsError
from ws.export.card import describe, merged_card, public
from ws.export.source import ExportOptions, strength_text
from ws.models import as_matrix
from ws.runs import atomic_folder, library_versions, write_json
from ws.tensor_files import TensorPatcher, tensor_patcher

EXPORT_FILE = "ws_export.json"

Change = tuple[str, LinearDelta, nn.Module]


@dataclass(frozen=True)
class MergedOptions(ExportOptions):
    """Write a vector at a fixed strength into a copy of its base.

    Attributes:
        model: the base checkpoint, a folder or hub id; None for the one that the vector was made for.
    """

    model: str | None = None


@dataclass(frozen=True)
class Merge:
    """What a merge did.

    Attributes:
        lost: `‖written - wanted‖ / ‖alpha dW‖` over all parameters: what the cast to the base's dtype destroyed.
        by_module: the same of every module's weight and bias.
        dtypes: of the parameters written.
        patched, linked: files that were changed, and that are the base's own.
    """

    lost: float
    by_module: dict[str, float]
    dtypes: tuple[str, ...]
    patched: tuple[str, ...]
    linked: tuple[str, ...]


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
        WsError: alpha is 0, another base, a folder that holds something else, a weight that is shared with a module
            which the vector does not change, or one that overflows its dtype.
    """
    if alpha == 0:
        raise WsError("At alpha 0 the export would be the base itself; give another --alpha.")
    if to.exists() and not (to / EXPORT_FILE).is_file():
        raise WsError(f"{to} exists and is no export; choose another place with --to.")
    base = Checkpoint.open(model or vector.base_id)
    if to.resolve() == base.folder.resolve():
        raise WsError(f"{to} is the base itself; choose another place with --to.")
    _require_base(vector, base)
    changes = replace(vector, base_fingerprint=None).written(base.model)
    with atomic_folder(to) as part:
        merge = _write(base, changes, float(alpha), part)
        facts: dict[str, Any] = {"base": vector.base_id, "fingerprint": vector.base_fingerprint, "alpha": alpha}
        facts |= {"vector": vector_digest(vector), "recipe": vector.recipe, "info": vector.info}
        facts |= {"lost": merge.lost, "lost_by_module": merge.by_module, "versions": library_versions()}
        write_json(part / EXPORT_FILE, public(facts))
        about = describe(vector, to.name, run)
        merged_card(about, alpha, merge.lost, "/".join(merge.dtypes)).save(part / "README.md")
    return merge


def _require_base(vector: SteeringVector, base: Checkpoint) -> None:
    if vector.base_fingerprint is not None and (mark := base.fingerprint()) != vector.base_fingerprint:
        raise WsError(
            f"The vector was made for {vector.base_id} ({vector.base_fingerprint}) and the weights of {base.name} "
            f"differ ({mark}); give its base with --model."
        )


def _write(base: Checkpoint, changes: list[Change], alpha: float, part: Path) -> Merge:
    by_file: dict[Path, list[Change]] = {}
    for change in changes:
        for file in {base.places[base.stored_name(f"{change[0]}.{leaf}")][0] for leaf in _leaves(change[1])}:
            by_file.setdefault(file, []).append(change)
    linked = [f for f in sorted({file for file, _ in base.places.values()}) if f not in by_file]
    for file in linked:
        _link(file, part / file.name)
    for file in _side_files(base.folder):
        shutil.copyfile(file, part / file.name)
    lost, wanted, dtypes = dict[str, float](), dict[str, float](), set[str]()
    with console.progress(total=len(changes), desc="merge", unit="module") as bar:
        for file, here in by_file.items():
            shutil.copyfile(file, part / file.name)
            with tensor_patcher(part / file.name) as patcher:
                for change in here:
                    name = change[0]
                    for gone, asked, dtype in _patch(base, file, patcher, change, alpha):
                        lost[name], wanted[name] = lost.get(name, 0.0) + gone, wanted.get(name, 0.0) + asked
                        dtypes.add(dtype)
                    bar.update()
    total = math.sqrt(sum(lost.values()) / sum(wanted.values()))
    by_module = {n: math.sqrt(lost[n] / wanted[n]) for n in lost if wanted[n]}
    names = (tuple(f.name for f in files) for files in (by_file, linked))
    return Merge(total, by_module, tuple(sorted(dtypes)), *names)


def _patch(
    base: Checkpoint, file: Path, patcher: TensorPatcher, change: Change, alpha: float
) -> Iterator[tuple[float, float, str]]:
    """Write one module's tensors that are in `file`; yields the squared norms of `write_step`, and the dtype."""
    name, delta, module = change
    for leaf in _leaves(delta):
        parameter = base.stored_name(f"{name}.{leaf}")
        home, key = base.places[parameter]
        if home != file:
            continue
        stored = base.tensor(parameter)
        if not stored.is_floating_point():
            raise WsError(f"{key} of {base.name} is quantised; merge into the unquantised checkpoint.")
        written = torch.empty_like(stored, memory_format=torch.contiguous_format)
        gone, asked = _add(module, leaf, delta, stored, written, alpha)
        if not torch.isfinite(written).all():
            raise WsError(f"{key} overflows {str(stored.dtype)[6:]} at alpha {alpha:g}; use a smaller strength.")
        patcher.replace(key, written)
        yield gone, asked, str(stored.dtype)[6:]


def _add(
    module: nn.Module, leaf: str, delta: LinearDelta, stored: Tensor, written: Tensor, alpha: float
) -> tuple[float, float]:
    if leaf == "bias":
        assert delta.bias is not None
        return write_step(written, stored, alpha * delta.bias)
    before = as_matrix(module, stored)
    return write_step(as_matrix(module, written), before, delta.dense(before).mul_(alpha))


def _leaves(delta: LinearDelta) -> list[str]:
    """Which parameters of its module a change is of."""
    names = delta.coordinates().keys()
    return [*(["weight"] if names - {"bias"} else []), *(["bias"] if "bias" in names else [])]


def _side_files(folder: Path) -> list[Path]:
    """Configuration and tokenizer; the base's own card is replaced by one that says what was done."""
    return sorted({f for pattern in SIDE_FILES for f in folder.glob(pattern) if f.is_file()})


def _link(file: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def main(options: MergedOptions) -> None:
    """The command `ws export merged`."""
    vector = options.open()
    alpha = vector.strength(options.alpha)
    folder = options.target(f"merged{strength_text(alpha)}")
    merge = export_merged(vector, alpha, folder, options.model, options.run_folder)
    worst = max(merge.by_module, key=merge.by_module.__getitem__)
    text = (
        f"{len(merge.by_module)} modules written at alpha {alpha:+g}, in {len(merge.patched)} files; "
        f"{len(merge.linked)} untouched files are the base's own.\nThe cast to {'/'.join(merge.dtypes)} destroyed "
        f"{merge.lost:.2g} of alpha dW (worst: {worst}, {merge.by_module[worst]:.2g})."
    )
    console.show(console.Result(text, {"alpha": alpha, **asdict(merge)}, [folder]))


if __name__ == "__main__":
    console.run(main, MergedOptions, "python -m ws.export.merged")
