"""`ws export peft`: a vector at a fixed strength as a PEFT LoRA of scale 1, for PEFT, vLLM and other readers of it.

A low-rank vector is written exactly. Of any other the dense change of every layer is factorised (Eckart-Young), and the
error is printed, stored, and refused when it is too large.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from tabulate import tabulate

from ws import console
from ws.diff import SteeringVector, require_place
from ws.errors import WsError
from ws.export.source import folder_of, strength_text, vector_of
from ws.files.gguf import gguf_file
from ws.lm.models import layer_of, load_model, model_folder
from ws.options.use import LoraOptions as LoraOptions

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def as_lora(
    vector: SteeringVector,
    alpha: float | int,
    rank: int | None = None,
    max_error: float | int = 0.01,
    model: str | None = None,
) -> SteeringVector:
    """`alpha dW` as a purely low-rank vector, whose saved folder is a PEFT LoRA.

    Args:
        vector: `dW`.
        alpha: the strength.
        rank, max_error, model: see `LoraOptions`.

    Raises:
        WsError: alpha is 0, or the error would be above `max_error`; the message says how many columns it takes.
    """
    if alpha == 0:
        raise WsError("At alpha 0 there is nothing to export; give another --alpha.")
    if not 0 <= max_error < 1:
        raise WsError(f"--max-error must be a share from 0 up to 1, not {max_error}.")
    scaled = (vector * alpha).balanced()  # those who read it may round it
    if scaled.is_low_rank and (rank is None or rank >= scaled.max_rank):
        return scaled
    base = None if scaled.is_low_rank else load_model(model or vector.base_id, device="cpu")[0]
    low = scaled.factorised(base, rank) if rank is not None else scaled.factorised(base, error=max_error)
    lost = low.recipe["total_error"]
    if lost > max_error and not math.isclose(lost, max_error, rel_tol=1e-6):
        worst = max(low.recipe["errors"], key=low.recipe["errors"].__getitem__)
        kind = "LoRA" if rank is None else f"LoRA of rank {rank}"
        raise WsError(
            f"A {kind} would lose {lost:.1%} of this change (most in {worst}, {low.recipe['error']:.1%}); leave "
            f"--rank out, allow it with --max-error {math.ceil(lost * 100) / 100:g}, or use `ws export merged`."
        )
    return low


def error_table(vector: SteeringVector) -> str:
    """The error of every decoder layer and of its worst module, from the recipe of a factorised vector."""
    groups: dict[int | None, list[str]] = {}
    for name in vector.recipe["errors"]:
        groups.setdefault(layer_of(name), []).append(name)
    rows = []
    for layer, names in groups.items():
        worst = max(names, key=vector.recipe["errors"].__getitem__)
        rank = max((vector.deltas[n].rank for n in names if n in vector.deltas), default=0)
        where = "outside" if layer is None else str(layer)
        rows.append([where, rank, f"{vector.recipe['errors'][worst]:.3%}", worst.rsplit(".", 1)[-1]])
    return tabulate(rows, ["layer", "rank", "largest error", "in"], disable_numparse=True)


def vllm_lines(folder: Path, name: str, base: str, rank: int) -> list[str]:
    """The command that serves a LoRA folder beside its base in vLLM."""
    fitting = [r for r in VLLM_RANKS if r >= rank]
    if not fitting:
        return [f"vLLM serves ranks up to {VLLM_RANKS[-1]}; this one has {rank}. Use `ws export merged` for it."]
    place = str(gguf_file(base) or model_folder(base))  # vLLM knows no bundled names
    loras = f"--enable-lora --max-lora-rank {fitting[0]} --lora-modules".split()
    return [shlex.join(["vllm", "serve", place, *loras, f"{name}={folder}"])]


def main(options: LoraOptions) -> None:
    """The command `ws export peft`."""
    vector = vector_of(options)
    alpha = vector.strength(options.alpha)
    name = f"{options.name}{strength_text(alpha)}"
    folder = options.target(f"peft{strength_text(alpha)}")
    if folder.exists() and folder.resolve() == folder_of(options).resolve():
        raise WsError(f"{folder} is the vector itself; choose another place with --to.")
    require_place(folder)
    low = as_lora(vector, alpha, options.rank, options.max_error, options.model)
    low.save(folder)
    exact = low.recipe.get("op") != "factorise"
    error = 0.0 if exact else low.recipe["total_error"]
    lines = ["exact: the vector is low-rank"]
    if not exact:
        lines = [error_table(low), "", f"relative error of the whole change: {error:.3%}"]
    lines.append(f"{len(low.deltas)} modules, rank up to {low.max_rank}")
    serve = "\n".join(vllm_lines(folder, name, vector.base_id, low.max_rank))
    data = {"alpha": alpha, "modules": len(low.deltas), "rank": low.max_rank, "total_error": error, "serve": serve}
    console.show(console.Result("\n".join(lines), data, [folder], serve))


if __name__ == "__main__":
    console.run(main, LoraOptions, "python -m ws.export.lora")
