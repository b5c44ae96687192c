"""`SteeringVector`: named `LinearDelta`s with their provenance; `pos - neg`, geometry, save and load.

`dW = theta_pos - theta_neg` (Fierro & Roger 2025, arXiv 2511.05408), kept as exact coordinates. Saved as a folder with
`ws.json` and safetensors; a purely low-rank vector's folder is at the same time a PEFT LoRA of scale 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ws.adapters import read_adapter
from ws.delta import COORDINATES, LinearDelta
from ws.errors import WsError
from ws.models import (
    bias_of,
    fingerprint,
    layer_count,
    layer_of,
    linear_size,
    load_model,
    model_id,
    parse_layers,
    weight_of,
)
from ws.runs import atomic_folder, library_versions, sha256_file

FORMAT_VERSION = 1
MANIFEST, CALIBRATION = "ws.json", "calibration.json"
NATIVE_WEIGHTS, PEFT_WEIGHTS = "vector.safetensors", "adapter_model.safetensors"


@dataclass(frozen=True)
class Units:
    """The calibrated strengths of a vector, from `calibration.json` in its folder (see `ws.calibration`).

    Attributes:
        subject: digest of the vector they were measured for.
        negative, positive: -1u and +1u; None where the calibration did not converge.
    """

    subject: str
    negative: float | None
    positive: float | None


@dataclass(frozen=True)
class SteeringVector:
    """An exact change of a model's linear layers, as a value: `+ - * /` and unary minus work as on vectors.

    Attributes:
        deltas: module name to `LinearDelta`.
        base_id: the name of the base model.
        base_fingerprint: of its weights (`ws.models.fingerprint`), None when unknown.
        recipe: how the vector was made, JSON-serialisable: a source, or an operation on the recipes of its operands.
        info: behaviour, family, seeds and whatever else describes it, JSON-serialisable.
        units: its calibrated strengths, None when it was not calibrated; those of another vector are never used.
    """

    deltas: Mapping[str, LinearDelta]
    base_id: str
    base_fingerprint: str | None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    units: Units | None = None

    def __post_init__(self) -> None:
        if not self.deltas:
            raise WsError("A steering vector must change at least one module.")

    @classmethod
    def from_adapter(cls, folder: str | Path, base: PreTrainedModel | str) -> SteeringVector:
        """The change `theta - base` that a PEFT adapter folder makes.

        Args:
            folder: an adapter of any of the six families, ours or somebody else's.
            base: the pristine base model or its name.

        Raises:
            WsError: the adapter is unreadable, or does not fit the base.
        """
        model = load_model(base, device="cpu")[0] if isinstance(base, str) else base
        mark = fingerprint(model)
        fam, deltas = read_adapter(folder, model)
        stamp = _read_json(Path(folder) / "ws_train.json") if (Path(folder) / "ws_train.json").is_file() else {}
        if stamp.get("base_fingerprint") not in (None, mark):
            raise WsError(
                f"The adapter {folder} was trained on {stamp['base_id']} ({stamp['base_fingerprint']}), "
                f"not on {model_id(model)} ({mark})."
            )
        source = {"adapter": Path(folder).name, "sha256": sha256_file(Path(folder) / PEFT_WEIGHTS)}
        info = {"family": fam.name, "depth": layer_count(model)}
        return cls(deltas, model_id(model), mark, source | stamp.get("recipe", {}), info)

    # ---- the vector space ---------------------------------------------------------------------------------------

    def __add__(self, other: SteeringVector) -> SteeringVector:
        self._check_same_base(other)
        joined = dict(self.deltas)
        for name, delta in other.deltas.items():
            joined[name] = joined[name] + delta if name in joined else delta
        recipe = {"op": "+", "terms": [self.recipe, other.recipe]}
        shared = {k: v for k, v in self.info.items() if other.info.get(k) == v}
        mark = self.base_fingerprint or other.base_fingerprint
        return SteeringVector(joined, self.base_id, mark, recipe, shared)

    def __mul__(self, scalar: float | int) -> SteeringVector:
        if not math.isfinite(scalar):
            raise WsError(f"A steering vector cannot be multiplied by {scalar}.")
        recipe = {"op": "*", "scalar": float(scalar), "of": self.recipe}
        return replace(self, deltas={n: d * scalar for n, d in self.deltas.items()}, recipe=recipe)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self + -other

    def __truediv__(self, scalar: float | int) -> SteeringVector:
        if scalar == 0:
            raise WsError("A steering vector cannot be divided by zero.")
        return self * (1.0 / scalar)

    def _check_same_base(self, other: SteeringVector) -> None:
        marks = {self.base_fingerprint, other.base_fingerprint} - {None}
        if len(marks) > 1:
            raise WsError(
                f"The vectors have different bases: {self.base_id} ({self.base_fingerprint}) and "
                f"{other.base_id} ({other.base_fingerprint})."
            )

    # ---- what it is ---------------------------------------------------------------------------------------------

    @property
    def is_low_rank(self) -> bool:
        """True when every module's change is `U V`, so that the saved folder is a PEFT LoRA."""
        return all(d.is_low_rank for d in self.deltas.values())

    @property
    def is_zero(self) -> bool:
        """True when the vector changes nothing."""
        return all(d.is_zero for d in self.deltas.values())

    @property
    def depth(self) -> int:
        """Decoder layers of the base, as `from_adapter` recorded, or else up to the deepest one that is changed."""
        return int(self.info.get("depth") or max((layer_of(n) or 0 for n in self.deltas), default=0) + 1)

    @property
    def max_rank(self) -> int:
        """The largest number of low-rank columns of any module."""
        return max(d.rank for d in self.deltas.values())

    def strength(self, text: str) -> float:
        """A strength from text: a number, or calibrated units such as `+1u` and `-0.5u` (half of that strength).

        Raises:
            WsError: neither of them, or units of a vector that is not calibrated, or not on that side.
        """
        units = parse_units(text)
        if units is None:
            return parse_number(text)
        known = self.units if self.units and self.units.subject == vector_digest(self) else None
        if known is None:
            raise WsError(f"{text} is in calibrated units and the vector has no calibration; run `ws calibrate` first.")
        side = known.negative if units < 0 else known.positive
        if side is None:
            raise WsError(f"{text} is not available: the calibration of this sign did not converge.")
        return abs(units) * side

    def __repr__(self) -> str:
        kind = self.info.get("family", "mixed")
        return f"SteeringVector({self.base_id}, {kind}, {len(self.deltas)} modules, rank {self.max_rank})"

    # ---- geometry -----------------------------------------------------------------------------------------------

    def dense(self, model: nn.Module) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
        """Yield `(parameter name, float32 change)` one tensor at a time, biases after their weights."""
        for name, delta, module in self.matched(model):
            yield f"{name}.weight", delta.dense(weight_of(module))
            if delta.bias is not None:
                yield f"{name}.bias", delta.bias.float()

    def inner(self, other: SteeringVector, model: nn.Module | None = None) -> float:
        """Frobenius inner product over all parameters; `model` is needed unless both vectors are low-rank."""
        self._check_same_base(other)
        shared = [n for n in self.deltas if n in other.deltas]
        modules = {} if model is None else {n: model.get_submodule(n) for n in shared}
        return sum(self.deltas[n].inner(other.deltas[n], _weight(modules.get(n))) for n in shared)

    def norm(self, model: nn.Module | None = None) -> float:
        """Frobenius norm over all changed parameters."""
        return math.sqrt(max(self.inner(self, model), 0.0))

    def cosine(self, other: SteeringVector, model: nn.Module | None = None) -> float:
        """Cosine of the angle between two vectors of one base; raises `WsError` for a zero vector."""
        size = self.norm(model) * other.norm(model)
        if size == 0:
            raise WsError("The cosine with a zero vector is undefined.")
        return self.inner(other, model) / size

    # ---- parts --------------------------------------------------------------------------------------------------

    def select(self, layers: str | Sequence[int] | None = None, modules: Sequence[str] | None = None) -> SteeringVector:
        """Only the given decoder layers and module kinds (`q_proj`, ...); `WsError` when nothing is left.

        Fractions such as `0.3:0.8` are of the base's depth, which `from_adapter` records; a vector that does not know
        it counts from the deepest layer it changes.
        """
        wanted = None if layers is None else set(parse_layers(layers, self.depth))
        kept = {
            name: delta
            for name, delta in self.deltas.items()
            if (wanted is None or layer_of(name) in wanted) and (modules is None or name.rsplit(".", 1)[-1] in modules)
        }
        if not kept:
            raise WsError(f"No module of the vector is in layers {layers} and of kinds {modules}.")
        picked = {"layers": None if wanted is None else sorted(wanted), "modules": modules and list(modules)}
        return replace(self, deltas=kept, recipe={"op": "select", **picked, "of": self.recipe})

    def compress(self, rank: int | None = None, energy: float | int | None = None) -> SteeringVector:
        """The best approximation of every module's low-rank part; see `LinearDelta.compress`.

        Other coordinates (DoRA's row scales) stay as they are. The recipe records relative Frobenius errors of the
        low-rank parts: `errors` of each module, `error` of the worst, `total_error` of all of them as one vector.

        Args:
            rank: columns of every module.
            energy: the share of `‖U V‖_F^2` that every module keeps with as few columns as it can.

        Raises:
            WsError: not exactly one of the two, one out of range, or a vector without any low-rank part.
        """
        parts = {n: d.compress(rank, energy) for n, d in self.deltas.items()}
        if self.max_rank == 0:
            family = self.info.get("family", "unknown")
            raise WsError(
                f"No module of this vector (family: {family}) has a low-rank part; there is nothing to compress."
            )
        errors = {n: error for n, (_, error) in parts.items()}
        sizes = {n: LinearDelta(d.d_out, d.d_in, u=d.u, v=d.v).norm() for n, d in self.deltas.items()}
        lost, whole = math.hypot(*(errors[n] * sizes[n] for n in errors)), math.hypot(*sizes.values())
        asked = {"rank": rank} if energy is None else {"energy": float(energy)}
        found = {"errors": errors, "error": max(errors.values()), "total_error": lost / whole if whole else 0.0}
        recipe = {"op": "compress", **asked, **found, "of": self.recipe}
        return replace(self, deltas={n: d for n, (d, _) in parts.items()}, recipe=recipe)

    # ---- in a model ---------------------------------------------------------------------------------------------

    def matched(self, model: nn.Module) -> list[tuple[str, LinearDelta, nn.Module]]:
        """Each change with the module it belongs to; `WsError` if the base differs or a module has no partner."""
        if self.base_fingerprint is not None:
            mark = fingerprint(model)
            if mark != self.base_fingerprint:
                raise WsError(
                    f"The vector was made for {self.base_id} ({self.base_fingerprint}) and this model's weights differ "
                    f"({mark}); load that base, or make a vector for this one."
                )
        modules = dict(model.named_modules())
        found = []
        for name, delta in self.deltas.items():
            size = linear_size(modules[name]) if name in modules else None
            if size != (delta.d_out, delta.d_in):
                seen = "no such module" if name not in modules else f"{type(modules[name]).__name__} of {size}"
                raise WsError(f"The vector changes {name} ({delta.d_out}, {delta.d_in}) but the model has {seen}.")
            found.append((name, delta, modules[name]))
        return found

    @torch.no_grad()
    def merge_into(self, model: nn.Module, alpha: float | int = 1.0) -> float:
        """Write `W + alpha dW` into `model`, in float32 and cast to each weight's dtype.

        Returns:
            The relative part of `alpha dW` that the cast destroyed (0 for a float32 model up to rounding):
            `‖written - wanted‖ / ‖wanted‖` over all parameters.
        """
        if not math.isfinite(alpha):
            raise WsError(f"alpha must be finite, not {alpha}.")
        lost = wanted = 0.0
        owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        for name, delta, module in self.matched(model):
            weight, bias = weight_of(module), bias_of(module)
            if owners[id(module.weight)] > 1:
                raise WsError(
                    f"{name} shares its weight with another module (tied embeddings?); steer instead of merging."
                )
            if delta.bias is not None and bias is None:
                raise WsError(f"The vector changes the bias of {name}, which this model does not have.")
            for parameter, change in ((weight, delta.dense(weight)), (bias, delta.bias)):
                if parameter is None or change is None:
                    continue
                step, before = alpha * change.to(parameter.device), parameter.to(torch.float32, copy=True)
                parameter.copy_(before + step)
                lost += float((parameter.float() - before - step).double().square().sum())
                wanted += float(step.double().square().sum())
        return math.sqrt(lost / wanted) if wanted else 0.0

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the vector as a folder, all at once; an existing vector there is replaced.

        Args:
            folder: the place; refuses a folder that holds something else.
            dtype: float32 is bit-exact; bfloat16 halves the file and rounds the *factors* by up to 0.4 %.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / MANIFEST).is_file():
            raise WsError(f"{folder} exists and is not a steering vector; choose another place.")
        low_rank = self.is_low_rank and self.max_rank > 0
        weights = PEFT_WEIGHTS if low_rank else NATIVE_WEIGHTS
        tensors = self._peft_tensors() if low_rank else self._native_tensors()
        with atomic_folder(folder) as part:
            save_file({k: t.to(dtype).cpu().contiguous() for k, t in tensors.items()}, part / weights)
            if low_rank:
                self._peft_config().save_pretrained(str(part))
            manifest = {
                "format": FORMAT_VERSION,
                "base": {"id": self.base_id, "fingerprint": self.base_fingerprint},
                "info": dict(self.info),
                "recipe": dict(self.recipe),
                "modules": {n: [d.d_out, d.d_in] for n, d in self.deltas.items()},
                "weights": {"file": weights, "sha256": sha256_file(part / weights), "dtype": str(dtype)[6:]},
                "versions": library_versions(),
            }
            (part / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SteeringVector:
        """Read a saved vector, bit for bit; a plain PEFT LoRA folder loads as the one-sided vector `theta - base`.

        A foreign LoRA carries no fingerprint of its base, so only names and shapes are checked when it is used; for
        the other families use `from_adapter`, which reads the base as well.

        Raises:
            WsError: no vector there, a half-written or altered folder, or a newer format.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise WsError(f"There is no folder {folder}.")
        if not (folder / MANIFEST).is_file():
            if (folder / "adapter_config.json").is_file():
                return cls._from_foreign_lora(folder)
            raise WsError(f"{folder} is not a steering vector: {MANIFEST} is missing (half-written?); make it again.")
        manifest = _read_json(folder / MANIFEST)
        if manifest.get("format") != FORMAT_VERSION:
            raise WsError(f"{folder} has vector format {manifest.get('format')}; this version reads {FORMAT_VERSION}.")
        file = folder / manifest["weights"]["file"]
        if not file.is_file() or sha256_file(file) != manifest["weights"]["sha256"]:
            raise WsError(
                f"The weights in {folder} are missing or differ from their recorded hash; make the vector again."
            )
        tensors = {k: t.float() for k, t in load_file(file).items()}
        deltas = deltas_from_tensors(manifest["modules"], tensors, folder)
        base = manifest["base"]
        units = _read_units(folder / CALIBRATION)
        return cls(deltas, base["id"], base["fingerprint"], manifest["recipe"], manifest["info"], units)

    @classmethod
    def _from_foreign_lora(cls, folder: Path) -> SteeringVector:
        fam, deltas = read_adapter(folder, None)
        base = str(_read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "unknown")
        source = {"adapter": folder.name, "sha256": sha256_file(folder / PEFT_WEIGHTS)}
        return cls(deltas, base, None, source, {"family": fam.name})

    def _native_tensors(self) -> dict[str, Tensor]:
        return {f"{n}:{c}": t for n, d in self.deltas.items() for c, t in d.coordinates().items()}

    def _peft_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, d in self.deltas.items():
            if d.u is not None and d.v is not None:
                tensors[f"base_model.model.{name}.lora_A.weight"] = d.v
                tensors[f"base_model.model.{name}.lora_B.weight"] = d.u
        return tensors

    def _peft_config(self) -> LoraConfig:
        """A LoRA of scale 1: `lora_alpha == r` everywhere, with explicit patterns where ranks differ."""
        ranks = {name: d.rank for name, d in self.deltas.items() if d.rank}
        return LoraConfig(
            r=self.max_rank,
            lora_alpha=self.max_rank,
            rank_pattern=ranks,
            alpha_pattern=dict(ranks),
            target_modules=sorted(ranks),
            base_model_name_or_path=self.base_id,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )


def deltas_from_tensors(
    sizes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], folder: Path
) -> dict[str, LinearDelta]:
    """The changes of modules of the given `(d_out, d_in)` from a saved vector's tensors; the folder is for errors."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in sizes}
    peft = {"lora_A.weight": "v", "lora_B.weight": "u"}
    for key, tensor in tensors.items():
        if ":" in key:
            name, coordinate = key.rsplit(":", 1)
        else:
            stem, which, leaf = key.rsplit(".", 2)
            name, coordinate = stem.removeprefix("base_model.model."), peft.get(f"{which}.{leaf}", "?")
        if name not in parts or coordinate not in COORDINATES:
            raise WsError(f"{folder} holds a tensor that belongs to no module of the vector: {key}.")
        parts[name][coordinate] = tensor
    return {n: LinearDelta(int(sizes[n][0]), int(sizes[n][1]), **coords) for n, coords in parts.items()}


_UNITS = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))u")


def parse_units(text: str) -> float | None:
    """The number in `+1u`, `-0.5u`; None when the text is not in calibrated units."""
    found = _UNITS.fullmatch(text.strip())
    return float(found.group(1)) if found else None


def parse_number(text: str) -> float:
    """A strength as a plain number; `WsError` when it is none, or not finite."""
    try:
        alpha = float(text)
    except ValueError:
        raise WsError(f"The strength {text!r} is not understood; use 1.5, +1u, -0.5u or `calibrated`.") from None
    if not math.isfinite(alpha):
        raise WsError(f"A strength must be a finite number, not {text}.")
    return alpha


def _read_units(file: Path) -> Units | None:
    if not file.is_file():
        return None
    values = _read_json(file)
    try:
        sides = [
            float(s["alpha"]) if s["converged"] is True else None for s in (values["negative"], values["positive"])
        ]
        return Units(str(values["subject"]), *sides)
    except (KeyError, TypeError, ValueError) as problem:
        raise WsError(f"{file} is damaged ({problem!r}); calibrate again.") from problem


def _weight(module: nn.Module | None) -> Tensor | None:
    return None if module is None else weight_of(module)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise WsError(f"{file} cannot be read ({problem}); the folder may be half-written, make it again.") from problem


def vector_digest(vector: SteeringVector) -> str:
    """SHA-256 over every coordinate: two vectors are bit-identical exactly when their digests agree."""
    digest = hashlib.sha256()
    for name in sorted(vector.deltas):
        for coordinate, tensor in vector.deltas[name].coordinates().items():
            digest.update(f"{name}:{coordinate}{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
