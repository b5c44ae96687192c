"""`SteeringVector`: named `LinearDelta`s with their provenance; `pos - neg`, geometry, save and load.

`dW = theta_pos - theta_neg` (Fierro & Roger 2025, arXiv 2511.05408), kept as exact coordinates. Saved as a folder with
`ws.json` and safetensors; a purely low-rank vector's folder is at the same time a PEFT LoRA of scale 1.
`ws diff --pos A --neg B --to FOLDER` reads two full fine-tunes tensor by tensor and writes their difference likewise.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ws import console
from ws.behaviors import load_behavior
from ws.console import progress
from ws.delta import COORDINATES, LinearDelta, approximation_errors
from ws.errors import DamagedError, WsError, choose, require_strength, shortened
from ws.files.places import place_below
from ws.files.public import public
from ws.files.reading import convert, kept, read_json
from ws.files.runs import (
    CARD,
    CARD_TAG,
    VECTOR,
    VECTOR_FILES,
    atomic_folder,
    library_versions,
    model_name,
    recover,
    sha256_file,
    slug,
    write_json,
)
from ws.files.tensors import read_tensors, tensor_writer
from ws.lm.checkpoints import Checkpoint, Difference
from ws.lm.hub import find
from ws.lm.models import (
    as_matrix,
    bias_of,
    fingerprint,
    is_offloaded,
    is_packed,
    layer_count,
    layer_of,
    load_model,
    model_id,
    module_kind,
    parse_layers,
    require_base,
    tokenizer_hash_on_disk,
    weight_of,
    weight_size,
)
from ws.options.make import DiffOptions as DiffOptions

T = TypeVar("T")

FORMAT_VERSION, CALIBRATION_FORMAT = 1, 1
RECALIBRATE = "calibrate again, with --fresh"  # what to do about a calibration that cannot be read
MANIFEST, CALIBRATION, NATIVE_WEIGHTS, _, PEFT_WEIGHTS = VECTOR_FILES
_UNKNOWN = "unknown"  # the name of a base that is not on record


@dataclass(frozen=True)
class Units:
    """The calibrated strengths of a vector, from `calibration.json` in its folder (see `ws.intervene.calibration`).

    Attributes:
        subject: digest of the vector they were measured for.
        negative, positive: -1u and +1u; None where the calibration did not converge.
        tokenizer: hash of the tokenizer whose prompts they were measured on; empty where that is not recorded.
        model: fingerprint of the model; empty where that is not recorded.
    """

    subject: str
    negative: float | None
    positive: float | None
    tokenizer: str = ""
    model: str = ""

    def mismatch(self, subject: str, tokenizer: str = "", model: str = "") -> tuple[str, str, str] | None:
        """`(what, then, now)` of the first thing that these strengths are not of; None when they can be used.

        A tokenizer or a model that is not on record, or not given, is not compared.
        """
        if self.subject != subject:
            return "vector", self.subject, subject
        others = (("model", self.model, model), ("tokenizer or chat template", self.tokenizer, tokenizer))
        return next(((what, was, now) for what, was, now in others if was and now and was != now), None)


class ParameterChange(NamedTuple):
    """The change of one parameter, `module.leaf`; modules that share it are not named again.

    Attributes:
        name: of a module that holds it.
        leaf: `weight` or `bias`.
        delta: in which the change is.
        module: that of the name.
    """

    name: str
    leaf: str
    delta: LinearDelta
    module: nn.Module


@dataclass(frozen=True)
class SteeringVector:
    """An exact change of a model's linear layers, as a value: `+ - * /` and unary minus work as on vectors.

    Attributes:
        deltas: module name to `LinearDelta`.
        base_id: the name of the base model.
        base_fingerprint: of its weights (`ws.lm.models.fingerprint`), None when unknown.
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
    def from_adapter(cls, folder: str | Path, base: PreTrainedModel | str, mirrored: bool = False) -> SteeringVector:
        """The change `theta - base` that a PEFT adapter folder makes.

        Args:
            folder: a PEFT adapter, ours or somebody else's. The six families give their exact coordinates; any other
                whose layers are linear is read off them densely, with a warning (see `ws.lm.probe`).
            base: the pristine base model or its name.
            mirrored: of an adapter that was trained signed, the change at -c (see `ws.adapters`).

        Raises:
            WsError: the adapter is unreadable, or does not fit the base.
        """
        from ws.adapters import read_adapter  # peft takes seconds, and a vector of our own needs none of it

        model = load_model(base, device="cpu")[0] if isinstance(base, str) else base
        # Packed weights are like no others, not even the base's.
        base_fingerprint = None if is_packed(model) else fingerprint(model)
        family, deltas = read_adapter(folder, model, mirrored)
        file = Path(folder) / "ws_train.json"
        stamp = read_json(file, _TrainStamp, "train it again") if file.exists() else _TrainStamp()
        trained_on = stamp.base_fingerprint
        require_base(model, stamp.base_id, trained_on, f"The adapter {folder} was trained on")
        source: dict[str, Any] = {"adapter": Path(folder).name, "sha256": sha256_file(Path(folder) / PEFT_WEIGHTS)}
        source |= stamp.recipe | ({"mirrored": True} if mirrored else {})
        info = {"family": family, "depth": layer_count(model)}
        return cls(deltas, model_id(model), trained_on or base_fingerprint, source, info)

    @classmethod
    def from_checkpoints(
        cls,
        pos: str | Path,
        neg: str | Path,
        base: str | Path | None = None,
        rank: int | None = None,
        kinds: Sequence[str] | None = None,
    ) -> SteeringVector:
        """`theta_pos - theta_neg` of two full fine-tunes of one base, read tensor by tensor.

        Linear layers, embeddings, norms, biases and `lm_head` get dense coordinates `E`, four bytes a parameter; what
        is equal in both is left out. `ws diff` writes the same to disk with a few tensors in memory. Both files are
        rounded to their dtype, so the vector carries that rounding; adapters have none.

        Args:
            pos, neg: folders or hub ids. With the base itself as `neg` the vector is `theta_pos - base`.
            base: what both were fine-tuned from; without it names and shapes are all that is checked when steering.
            rank: keep this many singular directions of every matrix; the recipe records the errors.
            kinds: only modules with these last names, such as `q_proj`.

        Raises:
            WsError: unreadable, of different architectures, not different at all, or different in tensors that no
                linear layer, embedding or norm holds.
        """
        difference = Difference(str(pos), str(neg), kinds)
        deltas, facts = difference.collect(rank)
        recipe = {"op": "checkpoints", "pos": slug(str(pos)), "neg": slug(str(neg))} | facts
        base_fingerprint = None if base is None else Checkpoint.open(str(base)).fingerprint()
        return cls(
            deltas,
            model_name(str(base or _UNKNOWN)),
            base_fingerprint,
            recipe,
            {"family": "full", "depth": difference.depth},
        )

    # ---- the vector space ---------------------------------------------------------------------------------------

    def __add__(self, other: object) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        self._check_same_base(other)
        joined, sums = dict(self.deltas), dict[tuple[int, int], LinearDelta]()
        for name, delta in other.deltas.items():
            if name in joined:  # tied weights have one change, and keep one
                pair = (id(joined[name]), id(delta))
                joined[name] = sums[pair] = sums.get(pair) or joined[name] + delta
            else:
                joined[name] = delta
        recipe = {"op": "+", "terms": [self.recipe, other.recipe]}
        shared = {k: v for k, v in self.info.items() if k in other.info and other.info[k] == v}
        known = self._better_known(other)
        return SteeringVector(joined, known.base_id, known.base_fingerprint, recipe, shared)

    def __mul__(self, scalar: object) -> SteeringVector:
        if not isinstance(scalar, Real):
            return NotImplemented
        factor = require_strength(scalar, "What a steering vector is multiplied by")
        recipe = {"op": "*", "scalar": factor, "of": self.recipe}
        return replace(self, deltas=self.each(lambda delta: delta * factor), recipe=recipe)

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __sub__(self, other: object) -> SteeringVector:
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def __truediv__(self, scalar: object) -> SteeringVector:
        if not isinstance(scalar, Real):
            return NotImplemented
        if scalar == 0:
            raise WsError("A steering vector cannot be divided by zero.")
        return self * (1.0 / require_strength(scalar, "What a steering vector is divided by"))

    def each(self, function: Callable[[LinearDelta], T]) -> dict[str, T]:
        """A function of every change by module, called once for modules that share one (tied weights)."""
        done = {id(d): function(d) for d in {id(d): d for d in self.deltas.values()}.values()}
        return {name: done[id(d)] for name, d in self.deltas.items()}

    def _check_same_base(self, other: SteeringVector) -> None:
        fingerprints = {self.base_fingerprint, other.base_fingerprint} - {None}
        if len(fingerprints) > 1:
            copies = ", one of them perhaps in float16" if self.base_id == other.base_id else ""
            raise WsError(
                f"The vectors have different bases: {self.base_id} ({self.base_fingerprint}) and "
                f"{other.base_id} ({other.base_fingerprint}){copies}."
            )

    def _better_known(self, other: SteeringVector) -> SteeringVector:
        """The operand whose base a sum is of, by name and fingerprint; warns where the other one names another."""
        known, less = sorted((self, other), key=lambda v: (v.base_fingerprint is None, v.base_id == _UNKNOWN))
        names = {model_name(v.base_id) for v in (known, less)} - {_UNKNOWN}
        if less.base_fingerprint is None and len(names) > 1:
            console.warn(
                f"two vectors are added that name different bases, {known.base_id} and {less.base_id}; the latter has "
                f"no fingerprint, so only shapes were compared. The sum is taken for one of {known.base_id}."
            )
        return known

    # ---- what it is ---------------------------------------------------------------------------------------------

    @property
    def is_low_rank(self) -> bool:
        """True when every change is `U V` of a linear layer, so that the saved folder is a PEFT LoRA."""
        return all(d.is_low_rank and d.kind == "linear" for d in self.deltas.values())

    @property
    def is_zero(self) -> bool:
        """True when the vector changes nothing."""
        return all(d.is_zero for d in self.deltas.values())

    @property
    def depth(self) -> int:
        """Decoder layers of the base, as `from_adapter` recorded, or else up to the deepest one that is changed."""
        return int(self.info.get("depth") or max(layer_of(n) or 0 for n in self.deltas) + 1)

    @property
    def single(self) -> dict[str, LinearDelta]:
        """The changes, each once: those that modules share (tied weights) by the first one's name."""
        shared = self.shared
        return {name: delta for name, delta in self.deltas.items() if name not in shared}

    @property
    def numbers(self) -> int:
        """How many numbers its changes hold."""
        return sum(t.numel() for d in self.single.values() for t in d.coordinates().values())

    @property
    def max_rank(self) -> int:
        """The largest number of low-rank columns of any module."""
        return max(d.rank for d in self.deltas.values())

    def strength(self, text: str, tokenizer: str | None = None) -> float:
        """A strength from text: a number, or calibrated units such as `+1u` and `-0.5u` (half of that strength).

        Args:
            text: what was written.
            tokenizer: hash of the tokenizer in use (`ws.lm.models.tokenizer_hash`); None for the base's, if it is at
                hand.

        Raises:
            WsError: neither of them, or units of a vector that is not calibrated, not on that side, or not with this
                tokenizer and chat template.
        """
        units = parse_units(text)
        if units is None:
            return parse_number(text)
        now = tokenizer_hash_on_disk(self.base_id) if tokenizer is None else tokenizer
        known, digest = self.units, vector_digest(self)
        if known is None or known.subject != digest:
            raise WsError(f"{text} is in calibrated units and the vector has no calibration; run `ws calibrate` first.")
        if known.mismatch(digest, now):
            raise WsError(f"{text} was calibrated with another tokenizer or chat template; run `ws calibrate` again.")
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
            yield f"{name}.weight", as_stored(module, delta.dense(weight_of(module)))
            if delta.bias is not None and "bias" in _leaves(delta, module):
                yield f"{name}.bias", delta.bias.float()

    def inner(self, other: SteeringVector, model: nn.Module | None = None) -> float:
        """Frobenius inner product over all parameters; `model` is needed unless both vectors are low-rank.

        What modules with a tied weight share counts once, where both vectors change them alike.
        """
        self._check_same_base(other)
        pairs = {(id(self.deltas[n]), id(other.deltas[n])): n for n in self.deltas if n in other.deltas}
        return self._products(other, pairs.values(), model)

    def norm(self, model: nn.Module | None = None) -> float:
        """Frobenius norm over all changed parameters."""
        return math.sqrt(max(self.inner(self, model), 0.0))

    def cosine(self, other: SteeringVector, model: nn.Module | None = None) -> float:
        """Cosine of the angle between two vectors of one base; raises `WsError` for a zero vector."""
        self._check_same_base(other)
        # What modules share counts once in all three sums or in none, as one of the vectors may change them apart.
        pairs = {(id(self.deltas.get(n)), id(other.deltas.get(n))): n for n in {**self.deltas, **other.deltas}}
        ours, theirs = (math.sqrt(max(v._products(v, pairs.values(), model), 0.0)) for v in (self, other))
        if ours * theirs == 0:
            raise WsError("The cosine with a zero vector is undefined.")
        return self._products(other, pairs.values(), model) / (ours * theirs)

    def _products(self, other: SteeringVector, names: Iterable[str], model: nn.Module | None) -> float:
        """The inner product over the named modules."""
        names = [n for n in names if n in self.deltas and n in other.deltas]
        modules = {} if model is None else {n: model.get_submodule(n) for n in names}
        return sum(self.deltas[n].inner(other.deltas[n], _weight(modules.get(n))) for n in names)

    # ---- parts --------------------------------------------------------------------------------------------------

    def select(self, layers: str | Sequence[int] | None = None, modules: Sequence[str] | None = None) -> SteeringVector:
        """Only the given decoder layers and module kinds (`q_proj`, ...).

        Fractions such as `0.3:0.8` are of the base's depth, which `from_adapter` records; a vector that does not know
        it counts from the deepest layer it changes.

        Raises:
            WsError: a kind that the vector lacks, or nothing is left.
        """
        wanted = None if layers is None else set(parse_layers(layers, self.depth))
        for kind in modules or ():
            choose("module kind of the vector", kind, sorted({n.rsplit(".", 1)[-1] for n in self.deltas}))
        deltas = {
            name: delta
            for name, delta in self.deltas.items()
            if (wanted is None or layer_of(name) in wanted) and (modules is None or name.rsplit(".", 1)[-1] in modules)
        }
        if not deltas:
            raise WsError(f"No module of the vector is in layers {layers} and of kinds {modules}.")
        picked = {"layers": None if wanted is None else sorted(wanted), "modules": modules and list(modules)}
        return replace(self, deltas=deltas, recipe={"op": "select", **picked, "of": self.recipe})

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
        parts = self.each(lambda delta: delta.compress(rank, energy))
        if self.max_rank == 0:
            family = self.info.get("family", "unknown")
            raise WsError(
                f"No module of this vector (family: {family}) has a low-rank part; there is nothing to compress."
            )
        errors = {n: parts[n][1] for n in self.single}
        sizes = {n: LinearDelta(d.d_out, d.d_in, u=d.u, v=d.v).norm() for n, d in self.single.items()}
        asked = {"rank": rank} if energy is None else {"energy": float(energy)}
        recipe = {"op": "compress", **asked, **approximation_errors(errors, sizes), "of": self.recipe}
        return replace(self, deltas={n: d for n, (d, _) in parts.items()}, recipe=recipe)

    def factorised(
        self, model: nn.Module | None = None, rank: int | None = None, error: float | int | None = None
    ) -> SteeringVector:
        """The best approximation of the whole vector by one low-rank product per linear layer.

        What no such product holds (biases, norms, embeddings) is left out and counts as lost. The recipe records the
        relative Frobenius errors: `errors` of each module, `error` of the worst, `total_error` of `dW` as one vector.

        Args:
            model: the base; not needed for a vector that is low-rank already.
            rank: columns of every module.
            error: the relative error that every module may have; it gets as few columns as that needs. Exactly one of
                the two.

        Raises:
            WsError: not exactly one of the two, a base that does not fit, or nothing that is linear.
        """
        if model is None and not self.is_low_rank:
            raise WsError("The change of this vector is not low-rank; factorising it needs the base model.")
        modules = {} if model is None else {n: m for n, _, m in self.matched(model)}
        deltas, errors, sizes = dict[str, LinearDelta](), dict[str, float](), dict[str, float]()
        shared = self.shared
        for name, delta in progress(self.deltas.items(), desc="factors", unit="module"):
            if name in shared:
                deltas |= {name: deltas[shared[name]]} if shared[name] in deltas else {}
                continue
            weight = _weight(modules.get(name))
            sizes[name], errors[name] = delta.norm(weight), 1.0
            if delta.kind == "linear" and sizes[name]:
                low, part = delta.factorised(torch.empty(0) if weight is None else weight, rank, error)
                bias = 0.0 if delta.bias is None else float(delta.bias.norm()) / sizes[name]
                errors[name] = math.hypot(part * math.sqrt(max(1 - bias**2, 0.0)), bias)
                deltas |= {name: low} if low.rank else {}
        asked = {"rank": rank} if error is None else {"allowed": float(error)}
        recipe = {"op": "factorise", **asked, **approximation_errors(errors, sizes), "of": self.recipe}
        return replace(self, deltas=deltas, recipe=recipe)

    def balanced(self) -> SteeringVector:
        """The same vector, without large parts of a low-rank change that cancel; see `LinearDelta.balanced`."""
        return replace(self, deltas=self.each(LinearDelta.balanced))

    # ---- in a model ---------------------------------------------------------------------------------------------

    def matched(self, model: nn.Module) -> list[tuple[str, LinearDelta, nn.Module]]:
        """Each change with the module it belongs to; `WsError` if the base differs or a module has no partner.

        The weights of a quantised or float16 model cannot be compared with the base's, so there its name has to agree.
        """
        require_base(model, self.base_id, self.base_fingerprint, "The vector was made for")
        modules = dict(model.named_modules())
        matched = []
        for name, delta in self.deltas.items():
            size = weight_size(modules[name]) if name in modules else None
            # The change of a tied embedding is that of the linear head as well.
            kinds = {delta.kind, "linear"} if delta.kind == "embedding" else {delta.kind}
            if size != (delta.d_out, delta.d_in) or module_kind(modules[name]) not in kinds:
                seen = "no such module" if name not in modules else f"{type(modules[name]).__name__} of {size}"
                raise WsError(f"The vector changes {name} ({delta.d_out}, {delta.d_in}) but the model has {seen}.")
            if delta.bias is not None and getattr(modules[name], "bias", None) is None and delta.kind == "scale":
                raise WsError(f"The vector changes the bias of {name}, which this model does not have.")
            matched.append((name, delta, modules[name]))
        return matched

    def apart(self, model: nn.Module) -> list[str]:
        """Changed parameters of `model` that another module shares, which the vector changes otherwise or not at all.

        Such as those of a head that was fine-tuned apart from the embedding to which the base ties it: to hold the
        changes of both, one weight must become two.
        """
        owners = dict[int, list[str]]()
        for name, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if leaf != "bias" or module_kind(module):  # what BERT's head calls its bias is only its decoder's
                    owners.setdefault(id(parameter), []).append(name)
        untied = []
        for name, delta, module in self.matched(model):
            for leaf in _leaves(delta, module):
                others = owners.get(id(getattr(module, leaf, None)), [])
                untied += [] if all(self._alike(name, other, leaf) for other in others) else [f"{name}.{leaf}"]
        return untied

    def _alike(self, name: str, other: str, leaf: str) -> bool:
        """Whether two modules have the same change of their weight, or of their bias."""
        ours, theirs = self.deltas[name], self.deltas.get(other)
        if theirs is None or ours is theirs:
            return theirs is not None
        a, b = ({c: t for c, t in d.coordinates().items() if (c == "bias") == (leaf == "bias")} for d in (ours, theirs))
        return a.keys() == b.keys() and all(torch.equal(a[c], b[c]) for c in a)

    def written(self, model: nn.Module) -> list[ParameterChange]:
        """The changes as changes of parameters: like `matched`, but one entry for modules that share a weight.

        Raises:
            WsError: a parameter is shared by modules that the vector does not change alike, packed, or a bias that is
                changed and not there.
        """
        matched = self.matched(model)  # first of all: reading offloaded weights makes new parameters of them
        for name, delta, module in matched:
            if is_packed(module):
                raise WsError(f"The weight of {name} is quantised; merge into the unquantised model.")
            if "bias" in _leaves(delta, module) and getattr(module, "bias", None) is None:
                raise WsError(f"The vector changes the bias of {name}, which this model does not have.")
        if apart := replace(self, base_fingerprint=None).apart(model):  # the base has been checked
            name, _, leaf = apart[0].rpartition(".")
            raise WsError(
                f"{name} shares its {leaf} with another module (tied embeddings?), which the vector changes otherwise "
                "or not at all; steer instead of merging, or write both apart with `ws export merged`."
            )
        changes = dict[int, ParameterChange]()
        for name, delta, module in matched:
            for leaf in _leaves(delta, module):
                changes.setdefault(id(getattr(module, leaf)), ParameterChange(name, leaf, delta, module))
        return list(changes.values())

    @torch.no_grad()
    def merge_into(self, model: nn.Module, alpha: float | int = 1.0) -> float:
        """Write `W + alpha dW` into `model`, in float32 and cast to each weight's dtype.

        Returns:
            The relative part of `alpha dW` that the cast destroyed (0 for a float32 model up to rounding):
            `‖written - wanted‖ / ‖wanted‖` over all parameters.
        """
        alpha = require_strength(alpha)
        lost = wanted = 0.0
        for name, leaf, delta, module in self.written(model):
            if is_offloaded(module):
                raise WsError(f"The weight of {name} is offloaded; load the model whole, or use `ws export merged`.")
            parameter = weight_of(module) if leaf == "weight" else bias_of(module)
            change = delta.bias if leaf == "bias" else delta.dense(weight_of(module))
            assert parameter is not None
            assert change is not None
            gone, asked = write_step(parameter, parameter, alpha * change)
            lost, wanted = lost + gone, wanted + asked
        return math.sqrt(lost / wanted) if wanted else 0.0

    # ---- files --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write the vector as a folder, all at once; an existing vector there is replaced.

        Args:
            folder: the place; refuses a folder that holds something else, or the card of the vector in it.
            dtype: float32 is bit-exact; bfloat16 halves the file and rounds the *factors* by up to 0.4 %, which must
                not cancel for that (see `LinearDelta.balanced`).
        """
        folder = Path(folder)
        require_place(folder)
        low_rank = self.is_low_rank and self.max_rank > 0
        weights = PEFT_WEIGHTS if low_rank else NATIVE_WEIGHTS
        stored = replace(self, deltas=self.each(lambda delta: delta.to("cpu", dtype)))
        tensors = stored._peft_tensors() if low_rank else stored._native_tensors()
        with atomic_folder(folder, VECTOR) as part:
            save_file(_apart(tensors), part / weights)
            stored._take_along(folder / CALIBRATION, part)
            if low_rank:
                stored._peft_config().save_pretrained(str(part))
            modules: dict[str, dict[str, Any]] = {
                "modules": {n: [d.d_out, d.d_in] for n, d in self.deltas.items()},
                "kinds": {n: d.kind for n, d in self.deltas.items() if d.kind != "linear"},
                "shared": self.shared,
            }
            base = {"id": self.base_id, "fingerprint": self.base_fingerprint}
            write_manifest(part, weights, dtype, base, self.info, self.recipe, modules)
        return folder

    def _take_along(self, calibration: Path, part: Path) -> None:
        """Copy the calibration of what is replaced if it is of this very vector, which is made again when damaged."""
        units = kept(calibration, read_units, "it goes with the vector that is replaced")
        if units is not None and units.subject == vector_digest(self):
            shutil.copyfile(calibration, part / CALIBRATION)

    @classmethod
    def load(cls, folder: str | Path) -> SteeringVector:
        """Read a saved vector, bit for bit; a plain PEFT LoRA folder loads as the one-sided vector `theta - base`.

        Of a run's folder it is the vector in it.

        What is no folder is taken for a repository on the hub, `user/name` or `user/name@revision`.

        A foreign LoRA carries no fingerprint of its base, so only names and shapes are checked when it is used; for
        the other families use `from_adapter`, which reads the base as well.

        Raises:
            WsError: no vector there, a half-written or altered folder, or a newer format.
        """
        folder = vector_folder(folder)
        if not (folder / MANIFEST).exists():
            if (folder / "adapter_config.json").is_file():
                return cls._from_foreign_lora(folder)
            if below := sorted(file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{MANIFEST}")):
                raise WsError(f"{folder} is not a steering vector; give one that lies below it, such as {below[0]}.")
            raise WsError(f"{folder} is not a steering vector: {MANIFEST} is missing (half-written?); make it again.")
        manifest, tensors = read_saved(folder, VectorManifest)
        deltas = deltas_from_tensors(manifest.modules, tensors, folder, manifest.kinds)
        deltas |= {name: deltas[first] for name, first in manifest.shared.items()}
        units = kept(folder / CALIBRATION, read_units, "its strengths are not used; calibrate again")
        base = manifest.base
        return cls(deltas, base.id, base.fingerprint, manifest.recipe, manifest.info, units)

    @classmethod
    def _from_foreign_lora(cls, folder: Path) -> SteeringVector:
        from ws.adapters import read_adapter

        family, deltas = read_adapter(folder, None)
        config = read_json(folder / "adapter_config.json", dict[str, Any], "make or download it again")
        base = str(config.get("base_model_name_or_path") or _UNKNOWN)
        source = {"adapter": folder.name, "sha256": sha256_file(folder / PEFT_WEIGHTS)}
        return cls(deltas, base, None, source, {"family": family})

    @property
    def shared(self) -> dict[str, str]:
        """Modules whose change is that of an earlier one, with that one's name: they share their weight."""
        first: dict[int, str] = {}
        for name, delta in self.deltas.items():
            first.setdefault(id(delta), name)
        return {n: first[id(d)] for n, d in self.deltas.items() if first[id(d)] != n}

    def _native_tensors(self) -> dict[str, Tensor]:
        return {f"{n}:{c}": t for n, d in self.single.items() for c, t in d.coordinates().items()}

    def _peft_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, d in self.deltas.items():
            if d.u is not None and d.v is not None:
                tensors[f"base_model.model.{name}.lora_A.weight"] = d.v
                tensors[f"base_model.model.{name}.lora_B.weight"] = d.u
        return tensors

    def _peft_config(self) -> Any:
        """PEFT's `LoraConfig` of scale 1: `lora_alpha == r` everywhere, with explicit patterns where ranks differ."""
        from peft import LoraConfig

        ranks = {name: d.rank for name, d in self.deltas.items() if d.rank}
        config = LoraConfig(
            r=self.max_rank,
            lora_alpha=self.max_rank,
            rank_pattern=ranks,
            alpha_pattern=dict(ranks),
            target_modules=sorted(ranks),
            base_model_name_or_path=self.base_id,
            task_type="CAUSAL_LM",
            inference_mode=True,
        )
        config.target_modules = sorted(ranks)  # PEFT makes a set of it, which is written in another order every time
        return config


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and no two in one memory, as safetensors asks; multiples of a change share its V."""
    apart, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.contiguous() if memory not in seen else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
    return apart


def vector_folder(name: str | Path) -> Path:
    """The folder with the files of the vector that `SteeringVector.load` reads by this name; errors as of `find`."""
    recover(Path(name).parent)
    folder = find(name, VECTOR_FILES)
    is_one = any((folder / file).is_file() for file in (MANIFEST, "adapter_config.json"))
    return folder if is_one or not (folder / "vector" / MANIFEST).is_file() else vector_folder(folder / "vector")


def require_place(folder: Path) -> None:
    """`WsError` unless a vector may be written there: over nothing, or over a vector that no card describes.

    A card of ours says what the vector beside it does, and others may have added to it.
    """
    VECTOR.require(folder)
    card = folder / CARD
    if card.is_file() and f"- {CARD_TAG}\n".encode() in card.read_bytes():
        raise WsError(f"{card} describes the vector that is there; move it away, or choose another place.")


def write_manifest(
    folder: Path,
    weights: str,
    dtype: torch.dtype,
    base: Mapping[str, str | None],
    info: Mapping[str, Any],
    recipe: Mapping[str, Any],
    modules: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the `ws.json` of a vector whose weights are in the folder already.

    Args:
        folder, weights, dtype: where the weights are, in which file, stored how.
        base: its `id` and `fingerprint`.
        info, recipe: see `SteeringVector`.
        modules: the sizes of all `modules`, the `kinds` of those that are not linear, and which are `shared`.
    """
    stored = {"file": weights, "sha256": sha256_file(folder / weights), "dtype": str(dtype)[6:]}
    manifest = {"format": FORMAT_VERSION, "base": base, "info": public(info), "recipe": public(recipe), **modules}
    manifest |= {"weights": stored, "versions": library_versions()}
    write_json(folder / MANIFEST, manifest)


class _TrainStamp(msgspec.Struct):
    """What `ws.train` says of an adapter that it has saved."""

    base_id: str = ""
    base_fingerprint: str | None = None
    recipe: dict[str, Any] = {}


class StoredBase(msgspec.Struct):
    """What a vector's manifest says of the base."""

    id: str
    fingerprint: str | None


class StoredWeights(msgspec.Struct):
    """What it says of the weights; another file than these would be none that `save` writes."""

    sha256: str
    file: Literal["vector.safetensors", "adapter_model.safetensors", "activation.safetensors"]


class _StoredInfo(msgspec.Struct):
    """What is read of a vector's `info`; it may hold more."""

    behavior: str | None = None
    behavior_sha256: str | None = None
    family: str | None = None
    depth: int | None = None


class _StoredRecipe(msgspec.Struct):
    """What is read of a recipe; it may hold more, such as the settings of an arm."""

    op: str | None = None
    of: _StoredRecipe | None = None
    terms: list[dict[str, Any]] | None = None
    scalar: float | None = None
    first: float | None = None
    last: float | None = None
    expression: str | None = None
    config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        needed = {"*": ("of", "scalar"), "+": ("terms",), "compose": ("expression", "of")}.get(self.op or "", ())
        if absent := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"a recipe of {self.op!r} lacks {absent[0]!r}")
        if self.op == "+":
            convert(self.terms, list[_StoredRecipe])


class SavedManifest(msgspec.Struct, kw_only=True):
    """What the manifest of anything holds that was saved with its base: a vector of weights, or of activations."""

    base: StoredBase
    weights: StoredWeights
    info: dict[str, Any]
    recipe: dict[str, Any]

    def __post_init__(self) -> None:
        convert(self.info, _StoredInfo)
        convert(self.recipe, _StoredRecipe)


class VectorManifest(SavedManifest):
    """A vector's `ws.json`; see `write_manifest`."""

    modules: dict[str, tuple[int, int]]
    kinds: dict[str, Literal["linear", "embedding", "scale"]] = {}
    shared: dict[str, str] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {*self.kinds, *self.shared, *self.shared.values()}
        if absent := sorted(names - self.modules.keys()):
            raise ValueError(f"{absent[0]} is not among its modules")
        if any(size < 1 for sizes in self.modules.values() for size in sizes):
            raise ValueError("a module has a size below 1")


Saved = TypeVar("Saved", bound=SavedManifest)


def read_saved(folder: Path, kind: type[Saved], name: str = MANIFEST) -> tuple[Saved, dict[str, Tensor]]:
    """The manifest, by its name, of a saved vector, and its tensors in float32.

    Raises:
        DamagedError: a manifest that is none, or weights that are not the ones on record.
        WsError: a newer format.
    """
    manifest = read_json(folder / name, kind, "make the vector again", FORMAT_VERSION)
    file = place_below(folder, manifest.weights.file, folder / name)
    if not file.is_file() or sha256_file(file) != manifest.weights.sha256:
        raise DamagedError(f"The weights {file} are missing or differ from their recorded hash; make the vector again.")
    return manifest, {name: tensor.float() for name, tensor in read_tensors(file, "make the vector again").items()}


def write_step(target: Tensor, before: Tensor, step: Tensor) -> tuple[float, float]:
    """Write `before + step` into `target`, summed in float32 and cast to its dtype.

    Returns:
        The squared norms of what the cast destroyed, `written - (before + step)`, and of `step`.
    """
    wanted = before.to(torch.float32, copy=True)
    step = step.to(wanted.device, torch.float32)
    asked = float(step.double().square().sum())
    wanted += step
    target.copy_(wanted)
    wanted -= target
    return float(wanted.double().square().sum()), asked


def deltas_from_tensors(
    sizes: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
    folder: Path,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, LinearDelta]:
    """The changes of modules of the given `(d_out, d_in)` from a saved vector's tensors.

    `kinds` has those that are not linear; the folder is for errors.
    """
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in sizes}
    peft = {"lora_A.weight": "v", "lora_B.weight": "u"}
    for key, tensor in tensors.items():
        name, _, coordinate = key.rpartition(":")
        if not name:
            stem, _, leaf = key.rpartition(".lora_")
            name, coordinate = stem.removeprefix("base_model.model."), peft.get(f"lora_{leaf}", "?")
        if name not in parts or coordinate not in COORDINATES:
            raise DamagedError(f"{folder} holds a tensor that belongs to no module of the vector: {key}.")
        parts[name][coordinate] = tensor
    kinds, deltas = kinds or {}, dict[str, LinearDelta]()
    for name, coordinates in parts.items():
        try:
            d_out, d_in = sizes[name]
            deltas[name] = LinearDelta(d_out, d_in, **coordinates, kind=kinds.get(name, "linear"))
        except (WsError, IndexError) as problem:  # the latter where a tensor has too few dimensions
            raise DamagedError(f"{folder} holds no change of {name}: {problem}; make the vector again.") from problem
    return deltas


_UNITS = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))u")


def parse_units(text: str) -> float | None:
    """The number in `+1u`, `-0.5u`; None when the text is not in calibrated units."""
    match = _UNITS.fullmatch(text.strip())
    return float(match.group(1)) if match else None


def parse_number(text: str) -> float:
    """A strength as a plain number; `WsError` when it is none, not finite, or beyond float32."""
    if text == "calibrated":
        raise WsError("`calibrated` stands for two strengths, -1u and +1u, and one is wanted here; name that.")
    try:
        alpha = float(text)
    except ValueError:
        what = shortened(text)
        raise WsError(f"The strength {what} is not understood; use a number or units such as +1u.") from None
    return require_strength(alpha, "A strength")


class StoredSide(msgspec.Struct):
    """The strength of one sign."""

    alpha: float
    converged: bool


class StoredUnits(msgspec.Struct):
    """What a calibration says of the strengths; the rest of it is `ws.intervene.calibration.Calibration`."""

    subject: str
    negative: StoredSide
    positive: StoredSide
    tokenizer: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        check_signs(self.negative, self.positive)


def check_signs(negative: Any, positive: Any) -> None:
    """`ValueError` when a strength that converged does not have the sign it is for."""
    for sign, side in ((-1, negative), (1, positive)):
        if side.converged and not sign * side.alpha > 0:
            raise ValueError(f"its strength {sign:+d}u is {side.alpha:g}, which has another sign")


def read_units(file: Path) -> Units:
    """The strengths in a calibration file; `DamagedError` when they cannot be read."""
    stored = read_json(file, StoredUnits, RECALIBRATE, CALIBRATION_FORMAT)
    negative, positive = (side.alpha if side.converged else None for side in (stored.negative, stored.positive))
    return Units(stored.subject, negative, positive, stored.tokenizer or "", stored.model or "")


def _leaves(delta: LinearDelta, module: nn.Module) -> list[str]:
    """Which parameters of a module its change is of; the bias in an embedding's is that of the head tied to it."""
    weight = ["weight"] if delta.coordinates().keys() - {"bias"} else []
    return weight + (["bias"] if delta.bias is not None and module_kind(module) != "embedding" else [])


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix `[d_out, d_in]` in the layout in which `module` stores its weight."""
    return matrix.squeeze(1) if module_kind(module) == "scale" else as_matrix(module, matrix)


def _weight(module: nn.Module | None) -> Tensor | None:
    return None if module is None else weight_of(module)


def vector_digest(vector: SteeringVector) -> str:
    """SHA-256 over every coordinate: two vectors are bit-identical exactly when their digests agree."""
    digest = hashlib.sha256()
    for name in sorted(vector.deltas):
        for coordinate, tensor in vector.deltas[name].coordinates().items():
            digest.update(f"{name}:{coordinate}{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- the vector between two full fine-tunes, as a command -----------------------------------------------------------


def diff_checkpoints(options: DiffOptions) -> dict[str, Any]:
    """Write the vector; returns its recipe.

    Raises:
        WsError: see `SteeringVector.from_checkpoints`, a folder that holds something else, or no such behaviour.
    """
    require_place(options.to)
    behavior = None if options.behavior is None else load_behavior(options.behavior, options.base)
    base_fingerprint = None if options.base is None else Checkpoint.open(options.base).fingerprint()
    difference = Difference(options.pos, options.neg, options.kinds)
    base, info = model_name(options.base or _UNKNOWN), {"family": "full", "depth": difference.depth}
    info |= {} if behavior is None else {"behavior": behavior.name, "behavior_sha256": behavior.digest}
    recipe: dict[str, Any] = {"op": "checkpoints", "pos": slug(options.pos), "neg": slug(options.neg)}
    if options.rank is not None:
        deltas, facts = difference.collect(options.rank)
        SteeringVector(deltas, base, base_fingerprint, recipe | facts, info).save(options.to)
        return recipe | facts
    with atomic_folder(options.to, VECTOR) as part:
        modules = _stream(difference, part / NATIVE_WEIGHTS)
        recipe |= {"modules": len(modules["modules"]), "equal": len(difference.modules) - len(modules["modules"])}
        origin = {"id": base, "fingerprint": base_fingerprint}
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
    console.run(main, DiffOptions, "ws diff")
