"""The vector between any two full fine-tunes of one base, as a command.

`ws diff --pos A --neg B --to FOLDER` reads both checkpoints tensor by tensor and writes the difference the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ws import console
from ws.checkpoints import Checkpoint, Difference
from ws.diff import MANIFEST, NATIVE_WEIGHTS, SteeringVector, write_manifest
from ws.errors import WsError
from ws.runs import atomic_folder, slug
from ws.tensor_files import tensor_writer


@dataclass(frozen=True)
class DiffOptions:
    """Write the vector `theta_pos - theta_neg` of two full fine-tunes of one base.

    Attributes:
        pos, neg: checkpoints, as folders or hub ids; with the base itself as `--neg`, the vector is `theta_pos - base`.
        to: the vector's folder.
        base: what both were fine-tuned from, so that the vector refuses other models.
        rank: keep this many singular directions of every matrix, and store the errors; None for dense coordinates.
        kinds: only modules with these last names, such as `q_proj`.
        behavior: what the vector is about, for tables and cards.
    """

    pos: str
    neg: str
    to: Path
    base: str | None = None
    rank: int | None = None
    kinds: tuple[str, ...] | None = None
    behavior: str | None = None


def diff_checkpoints(options: DiffOptions) -> dict[str, Any]:
    """Write the vector; returns its recipe.

    Raises:
        WsError: see `SteeringVector.from_checkpoints`, or a folder that holds something else.
    """
    if options.to.exists() and not (options.to / MANIFEST).is_file():
        raise WsError(f"{options.to} exists and is not a steering vector; choose another place with --to.")
    mark = None if options.base is None else Checkpoint.open(options.base).fingerprint()
    difference = Difference(options.pos, options.neg, options.kinds)
    base, info = options.base or "unknown", {"family": "full", "depth": difference.depth}
    info |= {} if options.behavior is None else {"behavior": options.behavior}
    recipe: dict[str, Any] = {"op": "checkpoints", "pos": slug(options.pos), "neg": slug(options.neg)}
    if options.rank is not None:
        deltas, facts = difference.collect(options.rank)
        SteeringVector(deltas, base, mark, recipe | facts, info).save(options.to)
        return recipe | facts
    with atomic_folder(options.to) as part:
        modules = _stream(difference, part / NATIVE_WEIGHTS)
        recipe |= {"modules": len(modules["modules"]), "equal": len(difference.modules) - len(modules["modules"])}
        origin = {"id": base, "fingerprint": mark}
        write_manifest(part, NATIVE_WEIGHTS, torch.float32, origin, info, recipe, modules)
    return recipe


def _stream(difference: Difference, file: Path) -> dict[str, dict[str, Any]]:
    """Write every change as it is formed; returns what the manifest says of the modules."""
    sizes, kinds, shared = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    names = [f"{name}:{leaf}" for name, _ in difference.modules for leaf in ("e", "bias")]
    with tensor_writer(file, names) as writer:
        for name, change in difference:
            if isinstance(change, str):
                sizes[name], shared[name] = sizes[change], change
                kinds |= {name: kinds[change]} if change in kinds else {}
                continue
            sizes[name] = [change.d_out, change.d_in]
            kinds |= {} if change.kind == "linear" else {name: change.kind}
            for leaf, tensor in change.coordinates().items():
                writer.add(f"{name}:{leaf}", tensor)
    return {"modules": sizes, "kinds": kinds, "shared": shared}


def main(options: DiffOptions) -> None:
    """The command `ws diff`."""
    recipe = diff_checkpoints(options)
    lines = [f"{recipe['modules']} modules differ, {recipe['equal']} are equal."]
    if "total_error" in recipe:
        worst = max(recipe["errors"], key=recipe["errors"].__getitem__)
        lines.append(
            f"Rank {options.rank}: relative error {recipe['total_error']:.2%}, worst {recipe['error']:.2%} ({worst})."
        )
        for name, error in recipe["errors"].items():
            console.say(f"  {error:8.3%}  {name}")
    console.show(console.Result("\n".join(lines), recipe, [options.to]))


if __name__ == "__main__":
    console.run(main, DiffOptions, "python -m ws.fine_tunes")
