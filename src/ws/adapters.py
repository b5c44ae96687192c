"""The six adapter families: a PEFT config on the way in, a `LinearDelta` per module on the way out.

One entry per family. `configure` gives the PEFT config to train with; `extract` reads the trained tensors of one module
and returns the exact coordinates of `W' - W` (see `ws.delta`), always against the pristine `W`. Extraction works from
the adapter's files, so no PEFT model is built and no weight is written; what else may be set in the config while the
tensors look alike is therefore refused, by an allow-list of fields per family. `register` adds a family.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import msgspec
import peft
import torch
from jaxtyping import Float
from peft import DeloraConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.ia3.model import IA3Model
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_PLACES
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ws import console
from ws.delta import LinearDelta, in_float64
from ws.errors import WsError, choose, shortened
from ws.files.reading import convert, read_json
from ws.files.runs import PISSA_INIT_FILE as PISSA_INIT_FILE
from ws.files.runs import SIGNED_INIT_FILE as SIGNED_INIT_FILE
from ws.files.tensors import read_tensors
from ws.lm.models import bias_of, is_packed, linear_size, target_modules, weight_of
from ws.lm.probe import MIN_LIKENESS, likeness, probe_adapter, start_again

# Of a PiSSA adapter without its initial factors, which are taken from the base again.
MAX_ROTATION = 0.1  # median over directions of how much rather the base is another than the factors trained
LEAST_MOVED = 3e-4  # of its length, that a direction must have moved to say something
MAX_RANK = 65536  # more than any layer has use for
AGAIN = "train or download it again"  # what to do about a damaged adapter
PEFT_PREFIX = "base_model.model."
_FACTORS = ("lora_A.weight", "lora_B.weight")
_GIVE_FACTORS = (
    f"give the {PISSA_INIT_FILE} beside it, or convert it with PEFT's path_initial_model_for_weight_conversion"
)


@dataclass(frozen=True)
class AdapterSpec:
    """Shape and place of an adapter.

    Attributes:
        family: one of `FAMILIES`.
        rank: of lora, dora, pissa and delora; oft and ia3 have none.
        lora_alpha: LoRA's own scale is `lora_alpha / rank`, baked into the vector; it is not the steering strength.
        layers: decoder layers, see `ws.lm.models.parse_layers`.
        kinds: module kinds such as `q_proj`; None means the family's default.
        delora_lambda: the bound on the relative size of a DeLoRA change.
        oft_block: size of OFT's rotation blocks; must divide the input size of every module.
    """

    family: str = "lora"
    rank: int = 32
    lora_alpha: float = 64.0
    layers: str = "0.3:0.8"
    kinds: tuple[str, ...] | None = None
    delora_lambda: float = 15.0
    oft_block: int = 32


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModuleTensors:
    """What `extract` may look at: the trained tensors of one module, its initial ones (PiSSA), and the base module."""

    name: str
    trained: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    base: nn.Module | None
    size: tuple[int, int]

    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The base weight in float32, for families whose coordinates depend on it."""
        if self.base is None:
            raise WsError(f"The change of {self.name} depends on the base weight: pass the base model.")
        if is_packed(self.base):
            raise WsError(
                f"The change of {self.name} depends on the base weight, which is quantised here: load the base without "
                "--dtype 4bit or 8bit."
            )
        return weight_of(self.base).float().cpu()


@dataclass(frozen=True)
class Family:
    """One adapter family.

    Attributes:
        name: the name on the command line.
        reference: title and arXiv id.
        peft_type: PEFT's name of the kind of adapter.
        learning_rate: default for real models.
        kinds: default module kinds, None for all linear modules of a layer.
        tensors: the saved tensors of one module, by the suffix PEFT gives them.
        modules: the classes that PEFT's own layer can stand in for.
        needs_base: extraction reads the base weight.
        configure: the PEFT config for a spec and a list of module names.
        extract: the exact change of one module.
        variant: which configs of that `peft_type` are of this family; all of them, unless it is told.
        fields: the fields of the config that `extract` reads, or that cannot change `W' - W`, beside `COMMON_FIELDS`;
            an adapter with any other one off its default is refused. None stands for the fields that `configure` sets.
        mirror: of one module, the trained tensors at -c from those at +c and from the initial ones, those that differ;
            where they are their own mirror image the module is the base's. None: the family is not trained signed.
        start: tensors whose initial values `mirror` needs; they are kept beside a signed adapter.
    """

    name: str
    reference: str
    peft_type: PeftType
    learning_rate: float
    kinds: tuple[str, ...] | None
    tensors: frozenset[str]
    modules: tuple[type[nn.Module], ...]
    needs_base: bool
    configure: Callable[[AdapterSpec, list[str]], PeftConfig]
    extract: Callable[[PeftConfig, ModuleTensors], LinearDelta]
    variant: Callable[[PeftConfig], bool] = field(default=lambda config: True)
    fields: frozenset[str] | None = None
    mirror: Callable[[Tensors, Tensors], dict[str, Tensor]] | None = None
    start: frozenset[str] = frozenset()

    def understands(self) -> frozenset[str]:
        """The fields of its configs that may be off their defaults."""
        if self.fields is not None:
            return self.fields | COMMON_FIELDS
        return frozenset(changed_fields(self.configure(AdapterSpec(self.name), ["module"]))) | COMMON_FIELDS


# ---- the settings of an adapter -----------------------------------------------------------------------------------

# What is recorded about an adapter, and which modules it goes to: `_check_place` compares that with its tensors.
COMMON_FIELDS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
})  # fmt: skip

# What no look at one layer at a time shows: other layers, tokens that are treated apart, weights that are no layer's.
_BEYOND_A_LAYER = frozenset({
    "layer_replication", "alora_invocation_tokens", "arrow_config", "modules_to_save", "trainable_token_indices",
    "target_parameters", "bias",
})  # fmt: skip

# Initialisations that move the base by what nobody can work out again from the adapter and the base.
_LOST_STARTS = ("corda", "lora_ga", "loftq")


def changed_fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config that are off their defaults, with their values."""
    values = {f.name: (getattr(config, f.name), _default(f)) for f in fields(config)}
    return {name: value for name, (value, default) in values.items() if _plain(value) != _plain(default)}


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _plain(value: Any) -> Any:
    """One form for values that JSON, PEFT and Python write differently; whatever is empty or off is None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()} or None
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value] or None
    return None if value is False or value == "" else value


def check_fields(config: PeftConfig, fam: Family | None, adapter: str) -> None:
    """Refuse settings under which the tensors of an adapter mean something else than is read from them.

    Args:
        config: of the adapter.
        fam: its family; None for an adapter that is read off its layers.
        adapter: how the sentence calls it.

    Raises:
        WsError: a field off its default that the family does not understand, or that no single layer shows.
    """
    changed = changed_fields(config)
    if fam is not None:
        beyond, why = changed.keys() - fam.understands(), f"the tensors of {fam.name} adapters mean another change then"
    else:
        beyond, why = changed.keys() & _BEYOND_A_LAYER, "what it does then does not show in its layers one by one"
        if str(changed.get("init_lora_weights")).startswith(_LOST_STARTS):
            beyond |= {"init_lora_weights"}
    if beyond:
        raise WsError(f"{adapter} has {_settings(changed, beyond)}: {why}; give one without.")


def _check_known(stored: Mapping[str, Any], config: PeftConfig, folder: Path) -> None:
    """Refuse fields that the installed PEFT does not know and drops; those that are off or empty say nothing."""
    known = {f.name for f in fields(config)} | COMMON_FIELDS
    unknown = {name for name, value in stored.items() if name not in known and _plain(value) is not None}
    if unknown:
        raise WsError(
            f"The adapter {folder} has {_settings(stored, unknown)}, which PEFT {peft.__version__} does not know for a "
            f"{type(config).__name__} and drops (PEFT {stored.get('peft_version') or '?'} saved it); upgrade PEFT, "
            "or take the setting out if it does nothing."
        )


# What families read of a config. PEFT takes any value and fails later.
_VALUES: dict[str, Any] = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict[str, float] | None),
    **dict.fromkeys(("r", "lora_alpha", "oft_block_size", "eps", "num_cayley_neumann_terms"), float),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"), str | list[str] | None
    ),
    "layers_to_transform": int | list[int] | None,
}


def _check_values(config: PeftConfig, folder: Path) -> None:
    """Refuse values of a type that the fields families read do not have."""
    for name in _VALUES.keys() & {f.name for f in fields(config)}:
        value = getattr(config, name)
        try:
            convert(list(value) if isinstance(value, set) else value, _VALUES[name])
        except msgspec.ValidationError as problem:
            raise WsError(
                f"The adapter {folder} has {_settings({name: value}, [name])}, which is no value for it."
            ) from problem


def _settings(values: Mapping[str, Any], names: Collection[str]) -> str:
    texts = {name: repr(values[name]) for name in sorted(names)}
    return ", ".join(f"{name}={text if len(text) <= 60 else text[:57] + '...'}" for name, text in texts.items())


# ---- one adapter at +c and at -c ----------------------------------------------------------------------------------
#
# A signed adapter is used with its trained tensors on positive answers, and with their mirror image on negative ones.
# Each family says what that is (`Family.mirror`), once for the training and for the extraction, so that the change at
# -c is read by the very function that reads the one at +c. The point that is its own mirror image, c = 0, is the base.


def require_signed(fam: Family) -> Callable[[Tensors, Tensors], dict[str, Tensor]]:
    """The family's `mirror`; `WsError` when it has none."""
    if fam.mirror is None:
        able = ", ".join(f.name for f in FAMILIES.values() if f.mirror is not None)
        raise WsError(
            f"It is not known what a {fam.name} adapter is with the other sign, so it is not trained signed; leave out "
            f"--contrast signed, or take one of: {able}."
        )
    return fam.mirror


def in_training(model: nn.Module, fam: Family) -> dict[str, tuple[str, str]]:
    """The parameters of a family's adapter on a PEFT model by name, each as `(module, saved suffix)`."""
    suffixes = dict[str, str]()
    for saved in fam.tensors:  # PEFT puts the adapter's name in, and saves DoRA's magnitude without its last part
        head, dot, tail = saved.partition(".")
        suffixes |= {f"{head}.default{dot}{tail}": saved} | ({} if tail else {f"{head}.default.weight": saved})
    places = dict[str, tuple[str, str]]()
    for name, _ in model.named_parameters():
        for live, saved in suffixes.items():
            if name.startswith(PEFT_PREFIX) and name.endswith(f".{live}"):
                places[name] = (name.removeprefix(PEFT_PREFIX).removesuffix(f".{live}"), saved)
    return places


def mirrored_parameters(
    model: nn.Module, fam: Family, places: Mapping[str, tuple[str, str]], initial: Tensors
) -> dict[str, Tensor]:
    """The parameters of a PEFT model at -c that differ from those at +c, by name, with gradients to the latter.

    Args:
        model: with an adapter of the family.
        fam: the family.
        places: its parameters (`in_training`).
        initial: their values at the start by the same names, for those in `Family.start`.
    """
    mirror, modules = require_signed(fam), dict[str, dict[str, str]]()
    for name, (module, saved) in places.items():
        modules.setdefault(module, {})[saved] = name
    opposite = dict[str, Tensor]()
    for names in modules.values():
        trained = {saved: model.get_parameter(name) for saved, name in names.items()}
        first = {saved: initial[name] for saved, name in names.items() if name in initial}
        opposite |= {names[saved]: tensor for saved, tensor in mirror(trained, first).items()}
    return opposite


def _opposite(name: str, around: float = 0.0) -> Callable[[Tensors, Tensors], dict[str, Tensor]]:
    """A `mirror` that reflects one tensor at a number."""
    return lambda trained, initial: {name: 2 * around - trained[name]}


def _mirrored_pissa(trained: Tensors, initial: Tensors) -> dict[str, Tensor]:
    """Both factors, reflected at their start: a change of `s ((2 B0 - B)(2 A0 - A) - B0 A0)`.

    That is `-Delta` but for the product of what both have moved, `s (B - B0)(A - A0)`, which keeps its sign.
    """
    return {name: 2 * initial[name] - trained[name] for name in _FACTORS}


def _mirrored_dora(trained: Tensors, initial: Tensors) -> dict[str, Tensor]:
    """`diag((2 m0 - m) / ‖W - s B A‖_row) (W - s B A)`: `-B`, and `m` reflected at its start, `m0 = ‖W‖_row`."""
    size = "lora_magnitude_vector"
    return {_FACTORS[1]: -trained[_FACTORS[1]], size: 2 * initial[size] - trained[size]}


# ---- LoRA: W' = W + s B A ---------------------------------------------------------------------------------------


def _lora_config(spec: AdapterSpec, names: list[str], **options: Any) -> LoraConfig:
    return LoraConfig(r=spec.rank, lora_alpha=spec.lora_alpha, target_modules=names, task_type="CAUSAL_LM", **options)


def _is_plain(config: LoraConfig) -> bool:
    """Training starts at the base's own weights; other ways to initialise the factors move them."""
    init = config.init_lora_weights
    return init is None or isinstance(init, bool) or init in ("gaussian", "eva", "orthogonal")


def _lora_scale(config: LoraConfig, name: str) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA (arXiv 2312.03732), with per-module patterns.

    The rank is the config's, as in PEFT: PiSSA's factors have no more directions than the module, and keep its scale.
    """
    alpha, rank = _by_pattern(config.alpha_pattern, name, config.lora_alpha), _stated_rank(config, name)
    return alpha / rank**0.5 if config.use_rslora else alpha / rank


def _stated_rank(config: LoraConfig | DeloraConfig, name: str) -> int:
    return _by_pattern(config.rank_pattern, name, config.r)


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What a config's `rank_pattern` or `alpha_pattern` says of a module."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _check_rank(config: LoraConfig | DeloraConfig, name: str, rank: int, most: int | None = None) -> None:
    stated = _stated_rank(config, name)
    if rank != stated and not (rank == most and stated > most):
        raise WsError(f"The config says rank {stated} for {name} and its tensors have rank {rank}: a mixed-up folder?")


def _lora_delta(config: LoraConfig, m: ModuleTensors) -> LinearDelta:
    """`U V = s B A` (Hu et al. 2021, arXiv 2106.09685)."""
    a, b = m.trained["lora_A.weight"], m.trained["lora_B.weight"]
    _check_rank(config, m.name, a.shape[0])
    return LinearDelta(*m.size, u=_lora_scale(config, m.name) * b, v=a)


# ---- PiSSA: the base is moved to W - s B0 A0 before training ------------------------------------------------------


def _pissa_delta(config: LoraConfig, m: ModuleTensors) -> LinearDelta:
    """`U V = s (B A - B0 A0)` against the original `W` (Meng et al. 2024, arXiv 2404.02948).

    Written as `s (B (A - A0) + (B - B0) A0)`, which has no large parts that cancel: training moves the factors little.
    """
    if not m.initial:
        raise WsError(f"{PISSA_INIT_FILE} has no initial factors of {m.name}; {AGAIN}.")
    a, b, a0, b0 = (t[k] for t in (m.trained, m.initial) for k in _FACTORS)
    if (a.shape, b.shape) != (a0.shape, b0.shape):
        raise WsError(f"The initial factors of {m.name} in {PISSA_INIT_FILE} are not of the adapter's rank.")
    _check_rank(config, m.name, a.shape[0], most=min(m.size))
    scale = _lora_scale(config, m.name)
    return LinearDelta(*m.size, u=scale * b, v=a - a0) + LinearDelta(*m.size, u=scale * (b - b0), v=a0)


def _repeated_start(
    config: LoraConfig, m: ModuleTensors, folder: Path
) -> tuple[dict[str, Tensor], Float[Tensor, " directions"]]:
    """The factors that PEFT takes from the base when it starts a PiSSA adapter, and again when it loads one.

    Beside them how far they are turned against those of the adapter; see `_rotation`.

    Raises:
        WsError: they cannot be had from this base, or the trained ones are near to orthogonal to them, as those that
            began at an unrelated base are.
    """
    if m.base is None:
        raise WsError(f"The PiSSA adapter {folder} holds no initial factors: pass the base model, or {_GIVE_FACTORS}.")
    if config.init_lora_weights != "pissa":
        raise WsError(
            f"The PiSSA adapter {folder} holds no initial factors, and those of {config.init_lora_weights} are drawn "
            f"at random: {_GIVE_FACTORS}."
        )
    if is_packed(m.base):
        raise WsError(
            f"The PiSSA adapter {folder} holds no initial factors, and they cannot be taken from packed weights: load "
            f"the base with the dtype that it was trained in, or {_GIVE_FACTORS}."
        )
    _check_rank(config, m.name, m.trained[_FACTORS[0]].shape[0], most=min(m.size))
    started = start_again(m.name, m.base, m.weight(), config)
    a0, b0 = (getattr(started, n.split(".")[0])["default"].weight.detach().cpu() for n in _FACTORS)
    a, b = (m.trained[n] for n in _FACTORS)
    if not (cosine := likeness(b @ a, b0 @ a0)) > MIN_LIKENESS:
        raise WsError(
            f"The PiSSA adapter {folder} holds no initial factors, and its {m.name} does not begin at the principal "
            f"ones of this base (cosine {cosine:.2f}): pass the base that it was trained from, or {_GIVE_FACTORS}."
        )
    # The sign of a pair of singular vectors is anybody's choice: that under which the factors have moved least.
    signs = torch.where((a * a0).sum(1) + (b * b0).sum(0) < 0, -1.0, 1.0)
    a0, b0 = signs[:, None] * a0, signs * b0
    rest = weight_of(started.get_base_layer()).cpu()
    return dict(zip(_FACTORS, (a0, b0), strict=True)), _rotation(a, b, a0, b0, rest)


def _rotation(
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    a0: Float[Tensor, "rank d_in"],
    b0: Float[Tensor, "d_out rank"],
    rest: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, " directions"]:
    """How alike a row of A and its column of B have moved: the cosine of `rest^T (b - b0)` and `a - a0`.

    `rest` is the base without its principal part, and maps its other left singular vectors to its right ones. Training
    moves `a` and `b` by gradients that have nothing to do with each other there, and rounding moves them at random:
    about 0, give or take `1 / sqrt(d_in)`. The singular vectors of two bases that are related, such as a checkpoint and
    its fine-tune or its quantised copy, differ by a rotation that turns left and right ones alike: towards 1, the more,
    the larger that is beside what was trained. Directions that moved no further than two programs' SVDs differ have no
    value.
    """
    along = (a - a0) - ((a - a0) @ a0.T / a0.norm(dim=1) ** 2) @ a0
    moved = (a - a0).norm(dim=1) > LEAST_MOVED * a0.norm(dim=1)
    return functional.cosine_similarity((b - b0).T @ rest, along, dim=1)[moved]


def _require_this_base(rotation: Float[Tensor, " directions"], folder: Path) -> None:
    """Refuse factors of a base that is related to the one they were trained from, and is not it.

    The median is that of hundreds of directions in most adapters; where there are few it may be far off by chance.
    """
    if len(rotation) and not rotation.median() < MAX_ROTATION + len(rotation) ** -0.5:
        raise WsError(
            f"The PiSSA adapter {folder} holds no initial factors, and was trained from another version of this base: "
            f"its factors are turned against those of this one (cosine {float(rotation.median()):.2f} where 0 is "
            f"right). Pass exactly the base that it was trained from, in its dtype, or {_GIVE_FACTORS}."
        )


# ---- DoRA: W' = diag(m / |W + s B A|_row) (W + s B A) -------------------------------------------------------------


def _dora_delta(config: LoraConfig, m: ModuleTensors) -> LinearDelta:
    """`g = m / ‖W + s B A‖_row - 1`, `U V = diag(g + 1) s B A` (Liu et al. 2024, arXiv 2402.09353)."""
    low = _lora_delta(config, m)
    assert low.u is not None
    assert low.v is not None
    norms = (in_float64(m.weight()) + low.u.double() @ low.v.double()).norm(dim=1)
    ratio = m.trained["lora_magnitude_vector"].double().flatten() / norms
    return LinearDelta(*m.size, g=(ratio - 1).float(), u=(ratio[:, None] * low.u.double()).float(), v=low.v)


# ---- DeLoRA: W' = W + B diag(lambda / (r |a_i| |b_i|)) A diag(|W|_col) --------------------------------------------


def _delora_config(spec: AdapterSpec, names: list[str]) -> DeloraConfig:
    return DeloraConfig(r=spec.rank, delora_lambda=spec.delora_lambda, target_modules=names, task_type="CAUSAL_LM")


def _delora_delta(config: DeloraConfig, m: ModuleTensors) -> LinearDelta:
    """`U V = B diag(lambda / (r ‖a_i‖ ‖b_i‖)) A diag(w_norm)` (Bini et al. 2025, arXiv 2503.18225).

    Norms are clamped at 1e-4 as PEFT does, which matters only where a factor is still zero.
    """
    a, b = m.trained["delora_A"], m.trained["delora_B"]
    _check_rank(config, m.name, a.shape[0])
    sizes = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    scale = m.trained["delora_lambda"] / a.shape[0] / sizes
    return LinearDelta(*m.size, u=b * scale, v=a * m.trained["delora_w_norm"])


# ---- OFT: y = W R^T x ---------------------------------------------------------------------------------------------


def _oft_config(spec: AdapterSpec, names: list[str]) -> OFTConfig:
    return OFTConfig(r=0, oft_block_size=spec.oft_block, target_modules=names, task_type="CAUSAL_LM")


def _oft_delta(config: OFTConfig, m: ModuleTensors) -> LinearDelta:
    """`D_i = R_i - I` (Qiu et al. 2023, arXiv 2306.07280), with `R` from PEFT's own rotation module.

    The rotation is read off by rotating the identity, so Cayley-Neumann series, exact Cayley and block sharing all give
    what PEFT itself would compute.
    """
    weight = m.trained["oft_R.weight"]
    size = round((1 + (1 + 8 * weight.shape[1]) ** 0.5) / 2)
    blocks = m.size[1] // size
    _check_rotation(config, m, size, blocks)
    rotation = OFTRotationModule(
        weight.shape[0], weight.shape[1], size, m.size[1], config.coft, config.eps, config.block_share,
        use_cayley_neumann=config.use_cayley_neumann, num_cayley_neumann_terms=config.num_cayley_neumann_terms,
    )  # fmt: skip
    identity = torch.eye(size)
    with torch.no_grad():
        rotation.weight.copy_(weight)
        rotated = rotation(identity.repeat(1, blocks)).view(size, blocks, size).permute(1, 0, 2)
    return LinearDelta(*m.size, d=(rotated - identity).contiguous())


def _check_rotation(config: OFTConfig, m: ModuleTensors, size: int, blocks: int) -> None:
    """The tensors are of the shape and the parametrisation that the config states."""
    saved_by = config.peft_version or "0.17 or older"  # the field is new in 0.18
    if config.use_cayley_neumann and tuple(map(int, re.findall(r"\d+", saved_by)[:2])) < (0, 18):
        raise WsError(
            f"The OFT adapter was saved by PEFT {saved_by}, whose use_cayley_neumann was another series than that of "
            "PEFT 0.18; train it again."
        )
    stated, actual = (config.oft_block_size, size) if config.oft_block_size else (config.r, blocks)
    rows = m.trained["oft_R.weight"].shape[0]
    # A number of inputs that `stated` does not divide makes PEFT take one that is near.
    if (m.size[1] % stated == 0 and stated != actual) or rows != (1 if config.block_share else blocks):
        raise WsError(
            f"The tensors of {m.name} are {rows} blocks of {size} for {m.size[1]} inputs, which does not fit the "
            "config's r, oft_block_size and block_share: a mixed-up folder?"
        )


# ---- IA3: outputs of k and v, inputs of down_proj, times l --------------------------------------------------------


# The last linear layer of a feed-forward block, in every causal language model of PEFT's table.
_FEEDFORWARD = ("down_proj", "fc2", "fc_out", "mlp.c_proj", "dense_4h_to_h")


def _ia3_config(spec: AdapterSpec, names: list[str]) -> IA3Config:
    inputs = [n for n in names if _is_one_of(n, _FEEDFORWARD)]
    return IA3Config(target_modules=names, feedforward_modules=inputs, task_type="CAUSAL_LM")


def _ia3_delta(config: IA3Config, m: ModuleTensors) -> LinearDelta:
    """`g = l - 1`, `delta_b = (l - 1) b`; `c = l - 1` in feed-forward modules (Liu et al. 2022, arXiv 2205.05638)."""
    scale = m.trained["ia3_l"]
    change = scale.flatten() - 1
    inputs = scale.shape[0] == 1 and m.size[0] != 1
    if config.feedforward_modules and inputs != IA3Model._check_target_module_feedforward(config, m.name):
        raise WsError(f"The config's feedforward_modules and the tensors of {m.name} disagree: a mixed-up folder?")
    if inputs:
        return LinearDelta(*m.size, c=change)
    bias = None if m.base is None else bias_of(m.base)
    shift = None if bias is None else change * bias.float().cpu()
    return LinearDelta(*m.size, g=change, bias=shift)


# ---- the table ----------------------------------------------------------------------------------------------------

_LORA_TENSORS = frozenset({"lora_A.weight", "lora_B.weight"})
# Those of the last three lines say how training starts or goes, or matter only beside fields that are not in the list.
_LORA_FIELDS = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "fan_in_fan_out",  # PEFT goes by the module's class
    "init_lora_weights",  # `variant` looks at it
    "eva_config", "corda_config", "lora_ga_config", "lora_dropout", "megatron_core", "qalora_group_size",
})  # fmt: skip
_OFT_FIELDS = frozenset({
    "r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms",
    "fan_in_fan_out", "init_weights", "module_dropout",
})  # fmt: skip
_DELORA_FIELDS = frozenset({"r", "rank_pattern", "delora_lambda", "lambda_pattern", "init_weights", "module_dropout"})

_FAMILIES = (
    Family(
        name="ia3",
        reference="IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than ICL, arXiv 2205.05638",
        peft_type=PeftType.IA3,
        learning_rate=5e-3,
        kinds=("k_proj", "v_proj", "down_proj"),
        tensors=frozenset({"ia3_l"}),
        modules=(nn.Linear, Conv1D),
        needs_base=True,
        configure=_ia3_config,
        extract=_ia3_delta,
        mirror=_opposite("ia3_l", around=1.0),
        fields=frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}),
    ),
    Family(
        name="oft",
        reference="Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280",
        peft_type=PeftType.OFT,
        learning_rate=5e-4,
        kinds=None,
        tensors=frozenset({"oft_R.weight"}),
        modules=(nn.Linear,),
        needs_base=False,
        configure=_oft_config,
        extract=_oft_delta,
        mirror=_opposite("oft_R.weight"),
        fields=_OFT_FIELDS,
    ),
    Family(
        name="dora",
        reference="DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353",
        peft_type=PeftType.LORA,
        learning_rate=2e-4,
        kinds=None,
        tensors=_LORA_TENSORS | {"lora_magnitude_vector"},
        modules=(nn.Linear, Conv1D),
        needs_base=True,
        configure=partial(_lora_config, use_dora=True),
        extract=_dora_delta,
        mirror=_mirrored_dora,
        start=frozenset({"lora_magnitude_vector"}),
        variant=lambda config: config.use_dora and _is_plain(config),
        fields=_LORA_FIELDS | {"use_dora"},
    ),
    Family(
        name="lora",
        reference="LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685",
        peft_type=PeftType.LORA,
        learning_rate=2e-4,
        kinds=None,
        tensors=_LORA_TENSORS,
        modules=(nn.Linear, Conv1D),
        needs_base=False,
        configure=_lora_config,
        extract=_lora_delta,
        mirror=_opposite("lora_B.weight"),
        variant=lambda config: not config.use_dora and _is_plain(config),
        fields=_LORA_FIELDS,
    ),
    Family(
        name="pissa",
        reference="PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv 2404.02948",
        peft_type=PeftType.LORA,
        learning_rate=2e-4,
        kinds=None,
        tensors=_LORA_TENSORS,
        modules=(nn.Linear, Conv1D),
        needs_base=False,
        configure=partial(_lora_config, init_lora_weights="pissa"),
        extract=_pissa_delta,
        mirror=_mirrored_pissa,
        start=_LORA_TENSORS,
        variant=lambda config: str(config.init_lora_weights).startswith("pissa"),
        fields=_LORA_FIELDS,
    ),
    Family(
        name="delora",
        reference="Decoupling Angles and Strength in Low-rank Adaptation, arXiv 2503.18225",
        peft_type=PeftType.DELORA,
        learning_rate=1e-3,
        kinds=None,
        tensors=frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"}),
        modules=(nn.Linear,),
        needs_base=False,
        configure=_delora_config,
        extract=_delora_delta,
        mirror=_opposite("delora_lambda"),
        fields=_DELORA_FIELDS,
    ),
)
FAMILIES: dict[str, Family] = {f.name: f for f in _FAMILIES}
_ENTRY_POINTS = "ws.families"


def register(family: Family) -> None:
    """Add a family for this process: every command then takes it by its name.

    An adapter folder belongs to the family, of those whose `peft_type` and `variant` fit, that was registered last.

    Raises:
        WsError: the name is taken, or is not of lower-case letters, digits and `_` (it names folders and options).
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", family.name):
        raise WsError(f"{family.name!r} cannot name an adapter family: use lower-case letters, digits and _.")
    if family.name in FAMILIES:
        raise WsError(f"There is an adapter family {family.name!r} already ({FAMILIES[family.name].reference}).")
    FAMILIES[family.name] = family


@cache
def _register_installed() -> None:
    """Add what installed packages bring: entry points of the group `ws.families`, each of them a `Family`."""
    for point in entry_points(group=_ENTRY_POINTS):
        try:
            register(point.load())
        except (ImportError, AttributeError) as problem:
            raise WsError(f"The installed adapter family {point.value} cannot be loaded ({problem}).") from problem


def family(name: str) -> Family:
    """The family of that name, or a `WsError` with the nearest one."""
    _register_installed()
    return FAMILIES[choose("adapter", name, FAMILIES)]


def family_of(config: PeftConfig) -> Family | None:
    """The family a PEFT config belongs to, None for every other kind of adapter."""
    _register_installed()
    fitting = (f for f in reversed(FAMILIES.values()) if f.peft_type == config.peft_type and f.variant(config))
    return next(fitting, None)


def peft_config(model: PreTrainedModel, spec: AdapterSpec) -> PeftConfig:
    """The PEFT config for `spec` on `model`, naming every target module in full.

    Raises:
        WsError: unknown family or kind, rank below 1, layers out of range, an OFT block that does not fit, modules that
            PEFT does not adapt, a family without default modules for this architecture, or one that configures what it
            could not read.
    """
    fam = family(spec.family)
    if is_packed(model):
        raise WsError("Adapters are trained on the plain weights; load the model without --dtype 4bit or 8bit.")
    if not 1 <= spec.rank <= MAX_RANK:
        raise WsError(f"--rank must be at least 1 and at most {MAX_RANK}, not {shortened(spec.rank)}.")
    names = _places(model, spec, fam)
    _check_classes(model, names, fam)
    if fam.name == "oft":
        _check_oft_block(model, names, spec.oft_block)
    config = fam.configure(spec, names)
    check_fields(config, fam, f"What {fam.name} would train")
    _check_taken(model, names, fam, config)
    return config


def _places(model: PreTrainedModel, spec: AdapterSpec, fam: Family) -> list[str]:
    """The modules asked for, else the family's own; where an architecture lacks those, the ones in PEFT's table."""
    if spec.kinds or fam.kinds is None:
        return target_modules(model, spec.layers, spec.kinds or None)
    names, kind = target_modules(model, spec.layers), model.config.get_text_config().model_type
    for wanted in (fam.kinds, IA3_PLACES.get(kind, ())):
        if wanted and all(any(_is_one_of(n, (w,)) for n in names) for w in wanted):
            return [n for n in names if _is_one_of(n, wanted)]
    known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names}))
    raise WsError(f"It is not known where {fam.name} goes in a {kind} model; choose with --modules from: {known}.")


def _is_one_of(name: str, suffixes: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)


def _check_classes(model: PreTrainedModel, names: Sequence[str], fam: Family) -> None:
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, fam.modules):
            others = ", ".join(f.name for f in FAMILIES.values() if isinstance(module, f.modules)) or "none"
            raise WsError(f"PEFT has no {fam.name} for a {type(module).__name__} such as {name}; it has: {others}.")


def _check_taken(model: PreTrainedModel, names: Sequence[str], fam: Family, config: PeftConfig) -> None:
    """Ask PEFT which kinds it refuses in this architecture: by itself it says so when others are in place already."""
    kinds, refused = {name.rsplit(".", 1)[-1] for name in names}, set[str]()
    for kind in kinds:
        try:
            BaseTuner._check_target_module_compatiblity(cast(Any, None), config, model, kind)
        except ValueError:
            refused.add(kind)
    if refused:
        where, others = model.config.get_text_config().model_type, ", ".join(sorted(kinds - refused)) or "none"
        raise WsError(
            f"PEFT takes no {fam.name} at {', '.join(sorted(refused))} of a {where} model; name other modules with "
            f"--modules: {others}."
        )


def _check_oft_block(model: PreTrainedModel, names: Sequence[str], block: int) -> None:
    for name in names:
        size = linear_size(model.get_submodule(name))
        assert size is not None
        if block < 2 or size[1] % block:
            raise WsError(f"--oft-block {block} does not divide the input size {size[1]} of {name}.")


# ---- reading an adapter folder ------------------------------------------------------------------------------------


def read_adapter(
    folder: str | Path, base: nn.Module | None, mirrored: bool = False
) -> tuple[str, dict[str, LinearDelta]]:
    """The family of a PEFT adapter folder and the exact change of every module it adapts.

    Adapters of other families are read off the layers themselves (see `ws.lm.probe`); their family is PEFT's name.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        base: the pristine base model; may be None for families that do not read its weights, in which case module
            names and shapes cannot be checked.
        mirrored: the change at -c, of an adapter that was trained signed.

    Raises:
        WsError: files missing or pickled, settings that are not understood (`check_fields`), tensors left over or
            missing, modules or shapes the base does not have.
    """
    folder = Path(folder)
    config, tensors = _read_files(folder)
    fam = family_of(config)
    check_fields(config, fam, f"The adapter {folder}")
    if fam is None:
        if mirrored:
            raise WsError(f"The adapter {folder} is of no family that is trained signed.")
        kind = PeftType(config.peft_type).value.lower()
        if base is None:
            raise WsError(f"The adapter {folder} ({kind}) can only be read together with its base model: pass it.")
        return kind, probe_adapter(folder, config, base)
    _check_values(config, folder)
    by_module = group_tensors(tensors, fam.tensors, folder)
    initial = _read_initial(folder, fam, mirrored)
    starts_again, rotations = fam.name == "pissa" and not initial, list[Tensor]()
    deltas = {}
    for name, trained in by_module.items():
        missing = fam.tensors - trained.keys()
        if missing:
            raise WsError(f"The adapter {folder} lacks {', '.join(sorted(missing))} for {name}.")
        module = _base_module(base, name, folder)
        try:
            _check_place(config, name, base, folder)
            size = _adapted_size(fam, trained) if module is None else linear_size(module)
            assert size is not None
            view = ModuleTensors(name, trained, initial.get(name, {}), module, size)
            if starts_again:
                first, rotation = _repeated_start(config, view, folder)
                view = ModuleTensors(name, trained, first, module, size)
                rotations.append(rotation)
            if mirrored:
                view = replace(view, trained={**trained, **require_signed(fam)(trained, view.initial)})
            deltas[name] = fam.extract(config, view)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, re.error) as problem:
            raise WsError(f"The adapter {folder} does not fit together at {name} ({problem}); {AGAIN}.") from problem
    if starts_again:
        _require_this_base(torch.cat(rotations), folder)
        console.warn(
            f"the PiSSA adapter {folder} holds no initial factors; they were taken from this base again, as PEFT does, "
            "and fit. The vector is right if the adapter was trained from exactly this base."
        )
    return fam.name, deltas


def _read_files(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    if not (folder / "adapter_config.json").is_file():
        raise WsError(f"There is no adapter in {folder} (adapter_config.json is missing); give a PEFT adapter folder.")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise WsError(f"The adapter {folder} has no adapter_model.safetensors; pickled adapters are never loaded.")
    return _read_config(folder), {k: t.float() for k, t in read_tensors(weights, AGAIN).items()}


def _read_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder, as PEFT reads it, with nothing dropped.

    What PEFT warns of is said here, because commands keep the warnings of libraries off the terminal. `peft_version` is
    the stored one, where PEFT fills in its own.
    """
    file = folder / "adapter_config.json"
    try:
        stored = read_json(file, dict[str, Any], AGAIN)
        kind = stored["peft_type"]
        if kind not in list(PeftType):
            raise WsError(f"The adapter {folder} is of type {kind!r}, which PEFT {peft.__version__} does not know.")
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            config: PeftConfig = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    except KeyError as problem:
        raise WsError(f"The file {file} is not a PEFT config ({problem} is missing).") from problem
    except (ValueError, TypeError, AttributeError, RuntimeError) as problem:  # whatever PEFT makes of other values
        raise WsError(f"The file {file} is not a PEFT config ({problem}).") from problem
    _check_known(stored, config, folder)
    for notice in notices:
        if issubclass(notice.category, UserWarning) and "Unexpected keyword" not in str(notice.message):
            console.say(f"warning: PEFT says of the adapter {folder}: {notice.message}")
    config.peft_version = stored.get("peft_version")
    return config


def _read_initial(folder: Path, fam: Family, mirrored: bool) -> dict[str, dict[str, Tensor]]:
    """Initial tensors by module: of PiSSA always, where they are there; of others when the mirror image needs them."""
    file = folder / (PISSA_INIT_FILE if fam.name == "pissa" else SIGNED_INIT_FILE)
    wanted = fam.name == "pissa" or (mirrored and fam.start)
    if wanted and file.is_file():
        return group_tensors(read_tensors(file, AGAIN), fam.start, folder)
    if wanted and fam.name != "pissa":
        raise WsError(f"The {fam.name} adapter {folder} holds no {SIGNED_INIT_FILE}, so it was not trained signed.")
    return {}


def group_tensors(tensors: Mapping[str, Tensor], known: frozenset[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by module and suffix; anything that fits no known suffix stops the load instead of being dropped."""
    pattern = re.compile(rf"^{re.escape(PEFT_PREFIX)}(.+)\.({'|'.join(re.escape(k) for k in known)})$")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = pattern.match(key)
        if not match:
            raise WsError(f"The adapter {folder} holds a tensor we cannot place: {key}.")
        groups.setdefault(match.group(1), {})[match.group(2)] = tensor
    if not groups:
        raise WsError(f"The adapter {folder} holds no tensors.")
    return groups


def _base_module(base: nn.Module | None, name: str, folder: Path) -> nn.Module | None:
    if base is None:
        return None
    try:
        module = base.get_submodule(name)
    except AttributeError:
        raise WsError(
            f"The base model has no module {name}, which the adapter {folder} changes: another base?"
        ) from None
    if linear_size(module) is None:
        raise WsError(f"The module {name} is a {type(module).__name__}, not a linear layer.")
    return module


def _check_place(config: PeftConfig, name: str, base: nn.Module | None, folder: Path) -> None:
    """Refuse tensors of a module that the config does not adapt, which PEFT would drop."""
    targets = config.target_modules
    if str(targets).lower() == "all-linear":  # PEFT's shorthand leaves out the layer that gives the logits
        is_head = isinstance(base, PreTrainedModel) and base.get_submodule(name) is base.get_output_embeddings()
        targets = set() if is_head else {name}
    config = copy.copy(config)
    config.target_modules = targets
    if not targets or not check_target_module_exists(config, name):
        raise WsError(
            f"The adapter {folder} holds tensors for {name}, which its config leaves alone (target_modules, "
            "exclude_modules, layers_to_transform, layers_pattern): a mixed-up folder?"
        )


def _adapted_size(fam: Family, trained: Mapping[str, Tensor]) -> tuple[int, int]:
    """`(d_out, d_in)` from the factors alone, for low-rank families read without a base."""
    names = ("delora_B", "delora_A") if fam.name == "delora" else ("lora_B.weight", "lora_A.weight")
    if fam.needs_base or names[0] not in trained:
        raise WsError(f"A {fam.name} adapter can only be read together with its base model: pass the base model.")
    return trained[names[0]].shape[0], trained[names[1]].shape[1]
