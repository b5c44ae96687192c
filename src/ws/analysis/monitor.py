"""`ws monitor`: how far a fine-tune has moved along behaviours that are known as vectors.

With `c` the change of a fine-tune against its base, `v` a vector of the library, and sums over the modules that `v`
changes,

    cosine = <c, v> / (|c| |v|)          projection = <c, v> / <v, v>

where what modules with a tied weight share counts once, as in the inner products of vectors.
`projection` is the strength at which `v` lies nearest to the change: the alpha that the fine-tune has moved by. A
cosine means nothing by itself, because what is trained on text is rarely at right angles to what was trained on text.
So it is compared with a null:

- controls: the cosines of n fine-tunes known to be benign. `z = (cosine - mean) / sd`, and
  `t = z / sqrt(1 + 1/n)` has Student's law with n - 1 degrees of freedom when cosines of benign fine-tunes are normal
  (Crawford & Howell 1998, The Clinical Neuropsychologist 12, 482-486): few controls widen what is allowed. `p_rank`
  assumes only that the fine-tune is exchangeable with the controls, and cannot go below 1 / (n + 1).
- random, when there are no controls: the cosine with an isotropic direction that has the norm of `v` in every module
  `m` has mean 0 and variance `sum_m |c_m|^2 |v_m|^2 / size_m / (|c|^2 |v|^2)`, and is nearly normal. This null is easy
  to beat: nearly every fine-tune does, a benign one too.

p-values are two-sided, and a behaviour is flagged when its p, with Holm's correction over the library, is at most
`fpr`: that bounds the probability that a benign fine-tune is flagged for any behaviour, as far as the null holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from scipy import stats
from tabulate import tabulate
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import PreTrainedTokenizerBase as Tokenizer

from ws import console
from ws.adapters import ModuleTensors, check_fields, family_of, group_tensors
from ws.analysis.controls import empirical_p
from ws.analysis.monitor_profile import Bench, profile_changes, render_profiles
from ws.delta import LinearDelta, in_float64
from ws.diff import MANIFEST, SteeringVector
from ws.errors import WsError
from ws.eval.boards import open_plain
from ws.eval.context import EvalContext
from ws.eval.evaluation import Rows
from ws.files.reading import kept
from ws.files.runs import Run, read_csv, write_csv
from ws.lm.models import (
    SAMPLES_PER_TENSOR,
    bias_of,
    fingerprint,
    layer_of,
    load_model,
    module_kind,
    weight_of,
    weight_size,
)
from ws.options.check import MonitorOptions as MonitorOptions
from ws.options.measure import ProfileOptions
from ws.options.shared import EvalOptions
from ws.stats import holm

TABLE, LAYER_TABLE, PROFILE_TABLE = "monitor.csv", "monitor_per_layer.csv", "monitor_profile.csv"
MIN_CONTROLS = 3
EASY_NULL = (
    "The null is that of random directions, which nearly every fine-tune beats, a benign one too: a flag says that the "
    "change is not noise, not that it is unwanted. Give benign fine-tunes with --benign."
)

Change = SteeringVector | nn.Module


class NoMovementError(WsError):
    """The change leaves every module of the library as it was, so that it has no direction."""


# ---- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One module's part of the sums.

    Attributes:
        module: its name.
        inner, change, vector: `<c_m, v_m>`, `|c_m|^2` and `|v_m|^2`.
        size: number of weights.
    """

    module: str
    inner: float
    change: float
    vector: float
    size: int


@dataclass(frozen=True)
class Movement:
    """How far a change has moved along one behaviour, and how surprising that is.

    Attributes:
        behavior: the name of the library's vector.
        cosine, projection: see the module's equations.
        norm: `|c|` over the modules of the vector.
        null: `controls` or `random`.
        n_controls: 0 for the random null.
        null_mean, null_sd: of cosines under the null.
        z: `(cosine - null_mean) / null_sd`.
        p: two-sided; Student's law for controls, the normal one for random directions.
        p_rank: two-sided and free of laws; None for the random null.
        p_holm: `p` with Holm's correction over the library.
        fpr: the family-wise false-positive rate that `flagged` is held to.
        terms: the sums module by module.
    """

    behavior: str
    cosine: float
    projection: float
    norm: float
    null: str
    n_controls: int
    null_mean: float
    null_sd: float
    z: float
    p: float
    p_rank: float | None
    p_holm: float
    fpr: float
    terms: tuple[Term, ...]

    @property
    def flagged(self) -> bool:
        """Whether the movement is more than the null allows at `fpr`."""
        return self.p_holm <= self.fpr

    @property
    def columns(self) -> dict[str, str | float | int | bool | None]:
        """The row of a table."""
        names = ("behavior", "cosine", "projection", "norm", "null", "n_controls", "null_mean", "null_sd")
        tests = ("z", "p", "p_rank", "p_holm", "fpr", "flagged")
        return {name: getattr(self, name) for name in names + tests}

    def verdict(self) -> str:
        """One sentence for a person."""
        way = "towards" if self.z > 0 else "away from"
        allowed = f"the null's {self.null_mean:+.3f} with sd {self.null_sd:.3f}"
        tests = f"z {self.z:+.1f}, p {_p_text(self.p_holm)} after Holm"
        if not self.flagged:
            return f"{self.behavior}: no movement beyond the null (cosine {self.cosine:+.3f}, {allowed}; {tests})."
        return (
            f"{self.behavior}: FLAGGED, moved further {way} it than the null allows: {self.projection:+.2f} of the "
            f"vector (cosine {self.cosine:+.3f}, {allowed}; {tests})."
        )


def _p_text(p: float) -> str:
    return "< 1e-15" if p < 1e-15 else f"{p:.2g}"


def per_layer(movement: Movement) -> Rows:
    """The cosine within every decoder layer and its share of `<c, v>`; an empty cosine where the change is zero."""
    whole = sum(t.inner for t in movement.terms)
    rows: Rows = []
    ordered = sorted(movement.terms, key=lambda t: _layer(t.module))
    for layer, group in groupby(ordered, key=lambda t: _layer(t.module)):
        inner, change, vector = _sums(list(group))
        cosine = inner / sqrt(change * vector) if change * vector > 0 else None
        share = inner / whole if whole else None
        where = "outside" if layer < 0 else str(layer)
        rows.append({"behavior": movement.behavior, "layer": where, "cosine": cosine, "share": share})
    return rows


def _layer(module: str) -> int:
    layer = layer_of(module)
    return -1 if layer is None else layer


def _sums(terms: Sequence[Term]) -> tuple[float, float, float]:
    """`<c, v>`, `|c|^2`, `|v|^2`."""
    return sum(t.inner for t in terms), sum(t.change for t in terms), sum(t.vector for t in terms)


def _cosine(terms: Sequence[Term]) -> float:
    inner, change, vector = _sums(terms)
    return inner / sqrt(change * vector)


# ---- the monitor ----------------------------------------------------------------------------------------------------


class Monitor:
    """A library of vectors of one base, and a null to read changes against.

    Args:
        library: steering vectors by the name of their behaviour.
        base: the pristine base; it must stay as it is for as long as the monitor is used.
        controls: changes of benign fine-tunes, consumed one at a time; none for the random null.
        fpr: the probability that a benign fine-tune is flagged for any behaviour of the library.

    Raises:
        WsError: an empty library, a zero vector, another base, fewer controls than a null needs, or equal ones.
    """

    def __init__(
        self,
        library: Mapping[str, SteeringVector],
        base: nn.Module,
        controls: Iterable[Change] = (),
        fpr: float = 0.05,
    ) -> None:
        if not library:
            raise WsError("The library is empty; give at least one steering vector.")
        if not 0 < fpr < 1:
            raise WsError(f"The false-positive rate must lie between 0 and 1, not {fpr:g}.")
        self.library, self.fpr, self.base_fingerprint = dict(library), fpr, fingerprint(base)
        self._float16_fingerprint = fingerprint(base, torch.float16)  # of what was trained on a copy in other digits
        # The modules themselves are kept, so that adapter layers put into the model later do not hide them.
        self._modules: dict[str, nn.Module] = {}
        self._sizes: dict[str, dict[str, float]] = {}
        for name, vector in self.library.items():
            matched = vector.matched(base)
            sizes = {n: delta.norm(weight_of(module)) ** 2 for n, delta, module in matched}
            # A module that the vector leaves as it is gives no direction to move along.
            self._sizes[name] = {n: size for n, size in sizes.items() if size}
            self._modules |= {n: module for n, _, module in matched if n in self._sizes[name]}
            if not self._sizes[name]:
                raise WsError(f"The vector {name!r} of the library is zero.")
        read = [self.measure(change) for change in controls]
        self.controls = {name: np.array([_cosine(terms[name]) for terms in read]) for name in self.library}
        self._check_controls(len(read))

    def _check_controls(self, count: int) -> None:
        if 0 < count < MIN_CONTROLS:
            raise WsError(f"A null needs at least {MIN_CONTROLS} controls, not {count}; give more benign fine-tunes.")
        for name, cosines in self.controls.items():
            if count and np.ptp(cosines) == 0:
                raise WsError(f"All controls have the same cosine with {name!r}; give fine-tunes that differ.")

    def read(self, change: Change) -> list[Movement]:
        """How far a change has moved along every behaviour of the library, in the library's order.

        Args:
            change: a vector, a full checkpoint of the base, or a model in training, with a PEFT adapter or without.

        Raises:
            NoMovementError: the change is zero in the modules of a vector.
            WsError: another base, no module in common with a vector, or modules that do not fit.
        """
        measured = self.measure(change)
        judged = {name: self._judge(name, terms) for name, terms in measured.items()}
        adjusted = holm(np.array([p for *_, p, _ in judged.values()]))
        return [
            self._movement(name, measured[name], judged[name], float(p))
            for name, p in zip(measured, adjusted, strict=True)
        ]

    def measure(self, change: Change) -> dict[str, list[Term]]:
        """The terms of every behaviour's sums; a change of a whole checkpoint is formed one module at a time."""
        # By both changes, which modules with a tied weight share (see `SteeringVector.inner`).
        terms: dict[str, dict[Hashable, Term]] = {name: {} for name in self.library}
        read = set[str]()
        for module, of, delta in self._deltas(change):
            weight = weight_of(self._modules[module])
            square = delta.norm(weight) ** 2
            read.add(module)
            for name, vector in self.library.items():
                if module in self._sizes[name]:
                    inner = delta.inner(vector.deltas[module], weight)
                    term = Term(module, inner, square, self._sizes[name][module], weight.numel())
                    terms[name].setdefault((of, id(vector.deltas[module])), term)
        for name, behavior_terms in terms.items():
            if not behavior_terms:
                raise WsError(f"The change and the vector {name!r} have no module in common.")
            if not any(t.change for t in behavior_terms.values()):
                raise NoMovementError(f"The change leaves every module of {name!r} as it was: it has no direction.")
            for m in sorted(self._sizes[name].keys() - read):
                term = Term(m, 0.0, 0.0, self._sizes[name][m], weight_of(self._modules[m]).numel())
                behavior_terms.setdefault((None, id(self.library[name].deltas[m])), term)
        return {name: list(behavior_terms.values()) for name, behavior_terms in terms.items()}

    def _deltas(self, change: Change) -> Iterator[tuple[str, Hashable, LinearDelta]]:
        """The changes of the library's modules, one at a time, each with what is equal where modules share one."""
        if isinstance(change, PeftModel):
            change = self._live_adapter(change)
        if isinstance(change, SteeringVector):
            yield from self._vector_deltas(change)
        else:
            yield from self._checkpoint_deltas(change)

    def _vector_deltas(self, vector: SteeringVector) -> Iterator[tuple[str, Hashable, LinearDelta]]:
        if vector.base_fingerprint not in (None, self.base_fingerprint, self._float16_fingerprint):
            raise WsError(
                f"The change was made on {vector.base_id} ({vector.base_fingerprint}), but the library's base is "
                f"another ({self.base_fingerprint})."
            )
        for name in self._modules:
            if name in vector.deltas:
                self._require_size(name, (vector.deltas[name].d_out, vector.deltas[name].d_in))
                yield name, id(vector.deltas[name]), vector.deltas[name]

    def _checkpoint_deltas(self, model: nn.Module) -> Iterator[tuple[str, Hashable, LinearDelta]]:
        theirs = dict(model.named_modules())
        moved = whole = 0.0
        for name, module in self._modules.items():
            self._require_size(name, weight_size(theirs[name]) if name in theirs else None)
            if theirs[name].weight is module.weight:
                raise WsError("The monitor's base is the model that is to be read; load the base a second time for it.")
            delta = _dense_delta(theirs[name], module)
            assert delta.e is not None
            moved += float(in_float64(delta.e).square().sum())
            whole += float(in_float64(weight_of(module)).square().sum())
            tensors = (getattr(m, leaf, None) for m in (theirs[name], module) for leaf in ("weight", "bias"))
            yield name, tuple(map(id, tensors)), delta
        if moved > whole:
            raise WsError(
                f"The checkpoint differs from the base by {sqrt(moved / whole):.2g} times the size of its weights; it "
                "is no fine-tune of this base."
            )

    def _require_size(self, name: str, size: tuple[int, int] | None) -> None:
        wanted = weight_size(self._modules[name])
        if size != wanted:
            raise WsError(f"The base has {name} {wanted} and the fine-tune {size or 'no such module'}: another base?")

    def _live_adapter(self, model: PeftModel) -> SteeringVector:
        """The change of the active adapter of a PEFT model as it stands, read like a saved one."""
        config = model.active_peft_config
        fam, where = family_of(config), Path("in training")
        if fam is None:
            raise WsError("Only the six families can be monitored while they train; monitor the saved adapter instead.")
        if fam.name == "pissa":
            raise WsError("PiSSA moves the base's weights while it trains; monitor its saved adapters instead.")
        check_fields(config, fam, "The adapter in training")
        adapter = model.active_adapter
        tensors = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        trained = group_tensors({k: t.detach().float().cpu() for k, t in tensors.items()}, fam.tensors, where)
        deltas = {}
        for name in [n for n in self._modules if n in trained]:
            module = self._modules[name]
            size = weight_size(module)
            assert size is not None
            self._require_same_base(name, model.base_model.model.get_submodule(name))
            deltas[name] = fam.extract(config, ModuleTensors(name, trained[name], {}, module, size))
        if not deltas:
            raise WsError("The adapter in training and the library have no module in common.")
        return SteeringVector(deltas, "base in training", self.base_fingerprint)

    def _require_same_base(self, name: str, adapted: nn.Module) -> None:
        """Evenly spaced values of the frozen weight, rounded as for a fingerprint, against those of the base."""
        self._require_size(name, weight_size(adapted))
        theirs, ours = (_sample(weight_of(m)) for m in (adapted.get_submodule("base_layer"), self._modules[name]))
        if theirs is not None and ours is not None and not torch.equal(theirs, ours):
            raise WsError(f"The model in training is not the library's base: its frozen weights of {name} differ.")

    # ---- the null ---------------------------------------------------------------------------------------------------

    def _judge(self, name: str, terms: Sequence[Term]) -> tuple[float, float, float, float | None]:
        """The null's mean and standard deviation, the p-value and the rank p-value of the cosine."""
        cosine, null = _cosine(terms), self.controls[name]
        if len(null) == 0:
            sd = random_cosine_sd(terms)
            return 0.0, sd, float(2 * stats.norm.sf(abs(cosine) / sd)), None
        mean, sd = float(null.mean()), float(null.std(ddof=1))
        t = (cosine - mean) / (sd * sqrt(1 + 1 / len(null)))
        # Centred on all n + 1 cosines, so that the fine-tune is treated exactly as its controls are.
        centre = float(np.append(null, cosine).mean())
        return mean, sd, float(2 * stats.t.sf(abs(t), len(null) - 1)), empirical_p(cosine - centre, null - centre)

    def _movement(
        self, name: str, terms: Sequence[Term], judged: tuple[float, float, float, float | None], p_holm: float
    ) -> Movement:
        mean, sd, p, p_rank = judged
        inner, change, vector = _sums(terms)
        return Movement(
            behavior=name,
            cosine=_cosine(terms),
            projection=inner / vector,
            norm=sqrt(change),
            null="controls" if len(self.controls[name]) else "random",
            n_controls=len(self.controls[name]),
            null_mean=mean,
            null_sd=sd,
            z=(_cosine(terms) - mean) / sd,
            p=p,
            p_rank=p_rank,
            p_holm=p_holm,
            fpr=self.fpr,
            terms=tuple(terms),
        )


def random_cosine_sd(terms: Sequence[Term]) -> float:
    """The standard deviation of the cosine of a change with random directions of the vector's norm in every module.

    A direction whose law does not change when rows or columns are rotated, be it dense or a product of Gaussian
    factors, has uncorrelated entries of equal variance `|v_m|^2 / size_m`, whence the formula in this module's text.
    """
    _, change, vector = _sums(terms)
    return sqrt(sum(t.change * t.vector / t.size for t in terms) / (change * vector))


def _dense_delta(module: nn.Module, base: nn.Module) -> LinearDelta:
    """`W' - W` and the change of the bias, float32 on the CPU."""
    size = weight_size(base)
    assert size is not None
    bias, before = bias_of(module), bias_of(base)
    if (bias is None) != (before is None):
        raise WsError("The fine-tune and the base differ in which modules have a bias: another base?")
    shift = None if bias is None or before is None else bias.float().cpu() - before.float().cpu()
    change = weight_of(module).float().cpu() - weight_of(base).float().cpu()
    return LinearDelta(*size, e=change, bias=shift, kind=str(module_kind(base)))


def _sample(weight: torch.Tensor) -> torch.Tensor | None:
    """A few values of a weight in bfloat16; None for packed (quantised) weights, which cannot be compared."""
    if not weight.is_floating_point():
        return None
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].to(torch.bfloat16).cpu()


# ---- in training ----------------------------------------------------------------------------------------------------


class MonitorCallback(TrainerCallback):
    """Reads the model every so many optimiser steps of a transformers `Trainer`; the training is not touched.

    Works with PEFT adapters (all families but PiSSA) and, when the monitor's base is a second copy of the model, with
    full fine-tuning. Sharded parameters (FSDP, ZeRO-3) are not gathered.

    ```python
    MonitorCallback(monitor, every=20, file=Path("run/monitor.csv")).attach(trainer)
    ```

    `monitor/<behaviour>/cos` and `/z` go to the trainer's log history, and with `attach` to its reporters too; the full
    readings go to `file`. Steps at which nothing has moved yet, as in the first step of a warm-up, are left out.

    Args:
        monitor: what to read with.
        every: optimiser steps between readings; the last step is always read.
        file: a table with a row per reading and behaviour; a resumed run continues it.
    """

    def __init__(self, monitor: Monitor, every: int, file: Path | None = None) -> None:
        if every < 1:
            raise WsError(f"The monitor must read every 1 or more steps, not every {every}.")
        self.monitor, self.every, self.file = monitor, every, file
        self.rows: Rows = []
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> MonitorCallback:
        """Join a trainer, and log through it."""
        trainer.add_callback(self)
        self._trainer = trainer
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Keeps the earlier rows of a resumed run and refuses another base before any step is taken."""
        if self.file is not None:
            rows = kept(self.file, partial(read_csv, numbers=("step",)), "it begins anew") or []
            self.rows = [dict(r) for r in rows if int(r["step"]) <= state.global_step]
        try:
            self.monitor.measure(model)
        except NoMovementError:
            return  # before the first step nothing has moved

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Reads the model when it is time."""
        if state.global_step % self.every == 0:
            self._read(state, control, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Reads the model as it is handed back, unless the last step did."""
        if state.global_step % self.every:
            self._read(state, control, model)

    def _read(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        try:
            movements = self.monitor.read(model)
        except NoMovementError:
            return
        values = {f"monitor/{m.behavior}/{k}": v for m in movements for k, v in (("cos", m.cosine), ("z", m.z))}
        if self._trainer is None:
            state.log_history.append({**values, "step": state.global_step})
        else:
            wanted = control.should_log  # logging clears it, and the step's own loss would go unlogged
            self._trainer.log(values)
            control.should_log = wanted
        earlier = [r for r in self.rows if int(r["step"]) != state.global_step]
        self.rows = earlier + [{"step": state.global_step, **m.columns} for m in movements]
        if self.file is not None:
            write_csv(self.file, self.rows)


# ---- the command ----------------------------------------------------------------------------------------------------


def open_library(folders: Sequence[Path]) -> dict[str, SteeringVector]:
    """Saved vectors by behaviour; by folder where several are of one behaviour or none is recorded."""
    vectors = {str(folder): SteeringVector.load(folder) for folder in folders}
    names = [str(v.info.get("behavior", folder)) for folder, v in vectors.items()]
    named = zip(names, vectors.items(), strict=True)
    return {name if names.count(name) == 1 else folder: vector for name, (folder, vector) in named}


def open_change(name: str, base: nn.Module, dtype: str = "auto") -> Change:
    """A fine-tune by name: a saved vector, a PEFT adapter, or else a full checkpoint (folder or hub id)."""
    folder = Path(name)
    if (folder / MANIFEST).is_file():
        return SteeringVector.load(folder)
    if (folder / "adapter_config.json").is_file():
        return SteeringVector.from_adapter(folder, base)
    return load_model(name, device="cpu", dtype=dtype)[0]


def monitor_changes(
    options: MonitorOptions, library: Mapping[str, SteeringVector], base: nn.Module
) -> dict[str, list[Movement]]:
    """The movements of every change of the options; controls and checkpoints are in memory one at a time."""
    controls = (
        open_change(c, base, options.dtype) for c in console.progress(options.controls, desc="controls", unit="vector")
    )
    monitor = Monitor(library, base, controls, options.fpr)
    movements = {}
    for name in options.changes:
        try:
            movements[name] = monitor.read(open_change(name, base, options.dtype))
        except NoMovementError as problem:
            raise NoMovementError(f"{name}: {problem}") from problem
    return movements


def render_movements(by_change: Mapping[str, Sequence[Movement]]) -> str:
    """A table and a verdict per behaviour for every change, and what the null is."""
    header = ["behavior", "cosine", "projection", "null: mean", "sd", "z", "p", "rank p", "p (Holm)", ""]
    parts = []
    for name, movements in by_change.items():
        rows = [
            [
                m.behavior,
                *(f"{value:+.3f}" for value in (m.cosine, m.projection, m.null_mean)),
                f"{m.null_sd:.3f}",
                f"{m.z:+.1f}",
                _p_text(m.p),
                "" if m.p_rank is None else _p_text(m.p_rank),
                _p_text(m.p_holm),
                "FLAGGED" if m.flagged else "",
            ]
            for m in movements
        ]
        table = tabulate(rows, header, disable_numparse=True)
        parts.append("\n".join([name, "", table, "", *(m.verdict() for m in movements)]))
    return "\n\n".join([*parts, _null_note(next(iter(by_change.values()))[0])])


def _null_note(m: Movement) -> str:
    rate = f"Flagged at a family-wise false-positive rate of {m.fpr:g} per fine-tune."
    if m.null == "random":
        return f"{rate} {EASY_NULL}"
    return (
        f"{rate} The null is {m.n_controls} control fine-tunes; it holds for fine-tunes that are like them but for the "
        f"behaviour. With so many, the rank p cannot be below {1 / (m.n_controls + 1):.3f}."
    )


def _profiles(
    options: MonitorOptions,
    library: Mapping[str, SteeringVector],
    model: PreTrainedModel,
    tok: Tokenizer,
    by_change: Mapping[str, Sequence[Movement]],
) -> tuple[Rows, Rows]:
    """What the changes move on a board of traits; see `ws.analysis.monitor_profile`."""
    context = EvalContext.of_base(EvalOptions(out=options.out, dataset=options.dataset), model, tok)
    asked = ProfileOptions(board=options.profile, dataset=options.dataset, n_items=options.n_items)
    return profile_changes(
        Bench(model, tok, open_plain(context, asked)),
        library,
        {name: partial(open_change, name, model, options.dtype) for name in by_change},
        {name: [sum(t.inner for t in m.terms) for m in movements] for name, movements in by_change.items()},
        (open_change(c, model, options.dtype) for c in options.controls),
    )


def main(options: MonitorOptions) -> None:
    """The command `ws monitor`."""
    options.check()
    library = open_library(options.library)
    if not library:
        raise WsError("The library is empty; give folders of steering vectors with --library.")
    base, tok = load_model(options.model or next(iter(library.values())).base_id, device="cpu", dtype=options.dtype)
    by_change = monitor_changes(options, library, base)
    settings: dict[str, Any] = {"changes": options.changes, "controls": options.controls}
    settings |= {"library": [str(f) for f in options.library]}
    settings |= {"profile": options.profile, "dataset": options.dataset, "n_items": options.n_items}
    run = Run(options.out)
    rows = [{"change": name, **m.columns} for name, movements in by_change.items() for m in movements]
    layers = [{"change": name, **r} for name, movements in by_change.items() for m in movements for r in per_layer(m)]
    with run.alone("monitor"):
        stage = run.restart("monitor", settings | {"fpr": options.fpr, "model": options.model, "dtype": options.dtype})
        files = [write_csv(run.folder / TABLE, rows), write_csv(run.folder / LAYER_TABLE, layers)]
        text, data = render_movements(by_change), {"rows": rows}
        if options.profile:
            traits, profiles = _profiles(options, library, base, tok, by_change)
            files.append(write_csv(run.folder / PROFILE_TABLE, traits))
            text = f"{text}\n\n{render_profiles(traits, profiles)}"
            data |= {"traits": traits, "profiles": profiles}
        stage.done(files)
    console.show(console.Result(text, data, files))


if __name__ == "__main__":
    console.run(main, MonitorOptions, "ws monitor")
