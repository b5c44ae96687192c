"""`steer`: add `alpha * dW` to a live model, with a dial, without writing a weight.

For every changed linear layer, with `D = blockdiag(D_1..D_k)`,

    y = W (x + alpha (c*x + D^T x)) + alpha g * (W x) + alpha U (V x) + alpha E x + b + alpha delta_b

and for the embeddings and norms that full fine-tunes change too, `y = E[ids] + alpha dE[ids]` and
`y = (w + alpha dw) n(x) + b + alpha delta_b`.

One forward hook per module computes this. No weight is touched, so nothing is rounded into the model's dtype, the base
comes back bit for bit, and alpha may change at any time or differ per row of the batch. What torch.compile made of a
model does not see such hooks, so while a model is steered compiled code does not run (see `uncompiled`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from math import isfinite
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ws.delta import LinearDelta
from ws.diff import SteeringVector, parse_number
from ws.errors import WsError, choose, require_strength
from ws.lm.models import bias_of, is_offloaded, module_kind, require_calls, weight_of, weight_size
from ws.lm.row_sums import FEW, RowSums

Alpha = float | int | str | Tensor
_SMALLEST_MAX = torch.finfo(torch.float16).max  # of the dtypes that models compute in


class Dial:
    """The strength of one vector while it steers a model.

    `alpha` is a finite float, or a tensor with one entry per row of the batch; setting it takes effect at the next
    forward pass. Text such as `+1u` is in the calibrated units of the vector, where it has any. When a call repeats
    rows (beam search, `num_return_sequences`), repeat the entries accordingly with `repeat_interleave`. What chooses
    its own batches, as every `ws.evaluate_*` does, orders rows by length and takes one number.
    """

    def __init__(self, alpha: Alpha, strength: Callable[[str], float] = parse_number) -> None:
        self._strength = strength
        self.is_over = False
        self.alpha = alpha

    def end(self) -> None:
        """The block that it steered has ended."""
        self.is_over = True

    def __repr__(self) -> str:
        return f"Dial(alpha={self._alpha!r}{', its block has ended' if self.is_over else ''})"

    @property
    def alpha(self) -> float | Tensor:
        """The current strength."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        self._set(value)

    def _set(self, value: Alpha) -> None:
        if self.is_over:
            raise WsError("The block that this dial steered has ended; it turns nothing any more. Open another one.")
        if isinstance(value, Tensor):
            if value.ndim > 1:
                raise WsError(f"alpha must be a number or one number per row, not a tensor of {tuple(value.shape)}.")
            largest = float(value.abs().max()) if value.numel() else 0.0
            if not isfinite(largest):
                raise WsError("alpha must be finite, but the tensor holds NaN or infinity.")
            self._largest = require_strength(largest)
            self._alpha: float | Tensor = value if value.ndim else float(value)
            self._columns = dict[tuple[torch.device, torch.dtype, int], Tensor]()
        else:
            self._alpha = require_strength(self._strength(value) if isinstance(value, str) else value)
            self._largest = abs(self._alpha)
        self.is_by_row = isinstance(self._alpha, Tensor)
        # True for the float 0, where the hooks do nothing at all.
        self.is_off = not isinstance(self._alpha, Tensor) and self._alpha == 0.0

    def over(self, x: Tensor) -> float | Tensor:
        """The strength in a shape that broadcasts over activations `x [rows, ..., features]`."""
        self._require_within(x.dtype)
        if not isinstance(self._alpha, Tensor):
            return self._alpha
        key = (x.device, x.dtype, x.ndim)
        if key in self._columns and len(self._columns[key]) == x.shape[0]:
            return self._columns[key]
        self._require_rows(x)
        # Not in the dtype of x: bfloat16 would round 0.3 to 0.3008 here, and leave it alone where it is one number.
        moved = self._alpha.to(x.device, torch.promote_types(x.dtype, torch.float32))
        column = moved.view(-1, *[1] * (x.ndim - 1))
        # Most layers ask for the same. A copy would not follow a change in place, nor a view gradients.
        if moved is self._alpha and not moved.requires_grad:
            self._columns[key] = column
        return column

    def _require_within(self, dtype: torch.dtype) -> None:
        if self._largest > _SMALLEST_MAX and self._largest > torch.finfo(dtype).max:
            raise WsError(f"alpha {self._largest:g} is beyond {str(dtype)[6:]}, in which the model computes.")

    def _require_rows(self, x: Tensor) -> None:
        if x.ndim < 3:
            raise WsError(
                "alpha has one entry per row, but a layer sees the tokens of all rows as one list (as OPT's fc1 and a "
                "mixture's shared experts do); give one number, or leave such layers out with `vector.select`."
            )
        if self.rows != x.shape[0]:
            raise WsError(
                f"alpha has {self.rows} entries but the layer sees {x.shape[0]} rows; give one per row "
                "(repeat_interleave them for beams or several return sequences)."
            )

    @property
    def rows(self) -> int:
        """Rows that there is a strength for; 1 where it is one for all."""
        return len(self._alpha) if isinstance(self._alpha, Tensor) else 1

    @property
    def factor(self) -> float:
        """What a product is still to be multiplied by that has the strengths of `over` in it if they are by row."""
        return 1.0 if isinstance(self._alpha, Tensor) else self._alpha


def _fix(tensor: Tensor | None) -> None:
    """Tell CUDA graphs that the tensor stays where it is, or they would copy it at every replay."""
    if tensor is not None and tensor.is_cuda:
        torch._dynamo.mark_static_address(tensor)


class _LiveDial(Dial):
    """A dial whose strength is a tensor on the model's device, which compiled code and CUDA graphs read as they run.

    Turning it writes into that tensor; only another number of rows needs another tensor, and a compilation.
    """

    factor = 1.0

    def __init__(self, alpha: Alpha, strength: Callable[[str], float], reference: Tensor) -> None:
        self.device, self.dtype, self._live = reference.device, reference.dtype, torch.empty(0)
        super().__init__(alpha, strength)

    @torch.inference_mode(False)
    def _set(self, value: Alpha) -> None:
        super()._set(value)
        self.is_off = False  # which would be a reason to compile again
        self._require_within(self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        new = torch.as_tensor(self._alpha, dtype=wide).detach().reshape(-1)
        if new.shape != self._live.shape:
            self._live = torch.empty_like(new, device=self.device)
            _fix(self._live)
        self._live.copy_(new)

    @property
    def rows(self) -> int:
        """Rows that there is a strength for; 1 where it is one for all."""
        return self._live.shape[0]

    def over(self, x: Tensor) -> Tensor:
        if self.is_by_row:
            self._require_rows(x)
        return self._live.to(x.device).view(-1, *[1] * (x.ndim - 1))


class DialBoard(Mapping[str, Dial]):
    """The dials of several vectors by name: `dials["honesty"].alpha = 0.5`."""

    def __init__(self, dials: Mapping[str, Dial]) -> None:
        self._dials = dict(dials)

    def __getitem__(self, name: str) -> Dial:
        return self._dials[choose("vector", name, self._dials)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dials)

    def __len__(self) -> int:
        return len(self._dials)

    def __repr__(self) -> str:
        return f"DialBoard({self._dials!r})"


class _Working(NamedTuple):
    """A change beside the activations, laid out for the forward pass.

    `v [r, d_in]` and `u_t [r, d_out]` are the factors of a linear layer's change, `rest` everything else of it.
    """

    rest: LinearDelta | None
    v: Tensor | None
    u_t: Tensor | None

    @classmethod
    def of(cls, delta: LinearDelta, reference: Tensor, linear: bool) -> _Working:
        """The change on the device and in the dtype of `reference`, of a linear layer or of another module."""
        with torch.inference_mode(False):  # a copy that is made while a model is only read serves gradients later
            moved = delta.to(reference.device, reference.dtype)
            if not linear or moved.u is None:
                return cls(moved, None, None)
            rest = {name: t for name, t in moved.coordinates().items() if name not in ("u", "v")}
            return cls(moved.holding(rest) if rest else None, moved.v, moved.u.T.contiguous())


class _Change:
    """A change with its dial, and its copies beside the activations, which go when it goes."""

    def __init__(self, delta: LinearDelta, dial: Dial) -> None:
        self.delta, self.dial = delta, dial
        self.is_product = delta.is_low_rank and delta.u is not None  # and nothing else
        self.readers = _Readers([self])
        self.copies: dict[tuple[torch.device, torch.dtype], _Working] = {}

    def beside(self, reference: Tensor, linear: bool) -> _Working:
        """What `_Working.of` makes of it, copied once for every device and dtype."""
        key = (reference.device, reference.dtype)
        if key not in self.copies:
            self.copies[key] = _Working.of(self.delta, reference, linear)
        return self.copies[key]

    def product(self, x: Tensor) -> _Product | Tensor | None:
        """`U (V x)`, or what there is of it yet (see `_Factors.products`); None without factors."""
        return self.readers.product(self, x)

    def release(self) -> None:
        """Break the circle with its factors, which Python would free at some time."""
        del self.readers


class _LiveChange(_Change):
    """A change that torch.compile can follow: everything lies where it is needed, and nothing is remembered."""

    def __init__(self, delta: LinearDelta, dial: _LiveDial, module: nn.Module) -> None:
        super().__init__(delta, dial)
        weight = weight_of(module)
        packed = not weight.is_floating_point()  # into integers, which nothing is computed in
        beside = torch.empty(0, dtype=dial.dtype if packed else weight.dtype, device=weight.device)
        self.working = _Working.of(delta, beside, module_kind(module) == "linear")
        rest, v, _ = self.working
        self.factors = None if v is None else _Factors({self: self.working})
        self.working = _Working(rest, None, None)
        held = () if self.factors is None else (self.factors.v, *self.factors.u_t)
        for tensor in (*held, *({} if rest is None else rest.coordinates()).values()):
            _fix(tensor)

    def beside(self, reference: Tensor, linear: bool) -> _Working:
        return self.working

    def release(self) -> None:
        super().release()
        self.factors = None

    def product(self, x: Tensor) -> _Product | Tensor | None:
        return None if self.factors is None else self.factors.products(x, self.dial.over(x))[0]


class _Product(NamedTuple):
    """`alpha U (V x)` of a change without its second product: `low [tokens, r]` is `V x`."""

    low: Tensor
    u_t: Tensor


class _Factors:
    """The factors of several changes beside activations: `V` below each other, and what belongs to its parts."""

    @torch.inference_mode(False)
    def __init__(self, workings: Mapping[_Change, _Working]) -> None:
        self.changes = list(workings)
        v = [w.v for w in workings.values() if w.v is not None]
        self.u_t = [w.u_t for w in workings.values() if w.u_t is not None]
        self.ranks, self.sizes = [len(part) for part in v], [part.shape[1] for part in self.u_t]
        self.v = torch.cat(v) if len(v) > 1 else v[0]
        self.sums: tuple[RowSums, RowSums] | None = None
        if RowSums.suits(self.v):
            self.sums = RowSums([self.v.T]), RowSums(self.u_t)
            self.v, self.u_t = self.sums[0].matrices[0].T, self.sums[1].matrices

    def products(self, x: Tensor, alpha: float | Tensor) -> Sequence[_Product | Tensor]:
        """Of every change with `x [..., d_in]`, with its second product where that is taken for all of them at once.

        A strength for every row is in them; a number is not.
        """
        by_row, width = isinstance(alpha, Tensor), x.shape[-1]
        sums = self.sums if x.dtype == self.v.dtype and not torch.is_grad_enabled() else None
        if sums and 0 < x.numel() <= FEW * width:
            low = sums[0](x)
            both = sums[1](low.mul_(alpha) if by_row else low)  # in float32, and rounded once
            return (both,) if len(self.sizes) == 1 else both.split_with_sizes(self.sizes, dim=-1)
        low = nn.functional.linear(x.reshape(-1, width), self.v)
        if by_row:
            low.view(*x.shape[:-1], low.shape[-1]).mul_(alpha)
        parts = (low,) if len(self.ranks) == 1 else low.split_with_sizes(self.ranks, dim=1)
        return [_Product(part, u_t) for part, u_t in zip(parts, self.u_t, strict=True)]


def _versions(x: Tensor, alpha: float | Tensor) -> tuple[int, int]:
    """Changes when one is written in place; not in inference mode, where no known model writes what it reads."""
    of_alpha = alpha._version if isinstance(alpha, Tensor) and not alpha.is_inference() else 0
    return 0 if x.is_inference() else x._version, of_alpha


class _Readers:
    """The changes of one vector in layers that read the same tensor, as q, k and v do: one product with all their V.

    The first layer that is given a tensor computes `V x` for all of them, and each takes its part. Only of that very
    tensor at the same strength: a layer that is given another one, whatever its name promised, starts anew.
    """

    def __init__(self, changes: Sequence[_Change]) -> None:
        self._changes = changes
        self._factors: dict[tuple[torch.device, torch.dtype], _Factors | None] = {}
        # Replaced whole, and read once: threads that share a model at worst compute a product twice.
        self._kept: tuple[Tensor, float | Tensor, tuple[int, int], dict[_Change, _Product | Tensor]] | None = None

    def product(self, change: _Change, x: Tensor) -> _Product | Tensor | None:
        """The product of one of the changes with `x [..., d_in]`; None if it has no factors."""
        alpha, kept = change.dial.alpha, self._kept
        fits = kept is not None and kept[0] is x and kept[1] is alpha and change in kept[3]
        if kept is None or not fits or kept[2] != _versions(x, alpha):
            if (factors := self._beside(x)) is None:
                return None
            products = factors.products(x, change.dial.over(x))
            if len(products) == 1:
                return products[0]
            kept = (x, alpha, _versions(x, alpha), dict(zip(factors.changes, products, strict=True)))
        product = kept[3].pop(change, None)
        self._kept = kept if kept[3] else None  # activations are let go with the last layer that reads them
        return product

    def _beside(self, x: Tensor) -> _Factors | None:
        """The factors beside `x`, joined once for every device and dtype; the copies they were made of are let go."""
        key = (x.device, x.dtype)
        if key not in self._factors:
            workings = {change: change.beside(x, linear=True) for change in self._changes}
            with_factors = {change: w for change, w in workings.items() if w.v is not None}
            self._factors[key] = _Factors(with_factors) if with_factors else None
            for change, working in with_factors.items():
                change.copies[key] = working._replace(v=None, u_t=None)
        return self._factors[key]


# Layers to which a block hands one tensor, by the names that transformers' model classes give them.
_READERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


def _join_readers(changes: Mapping[str, _Change]) -> None:
    """Tell the changes of one vector, by the names of their modules, which of them read one tensor."""
    groups = dict[tuple[str, tuple[str, ...], int], list[_Change]]()
    for name, change in changes.items():
        parent, _, own = name.rpartition(".")
        for names in _READERS:
            if own in names and change.delta.u is not None:
                groups.setdefault((parent, names, change.delta.d_in), []).append(change)
    for group in groups.values():
        readers = _Readers(group)
        for change in group:
            change.readers = readers


class _SteeredModule:
    """All changes that are active on one module, summed by one forward hook.

    One hook for all of them keeps nested use exact: every change sees the module's own input and `W x`, never another
    change's result.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.changes: list[_Change] = []
        self._steered = _steered_linear
        if module_kind(module) == "embedding":
            self._steered = partial(_steered_embedding, _embedding_scale(name, module))
        elif module_kind(module) == "scale":
            _require_scale(name, module)
            self._steered = _steered_scale
        self.handle: RemovableHandle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        if x.device != output.device:  # the output is where the module computes; offloaded ones are given others'
            x = x.to(output.device)
        active = [change for change in self.changes if not change.dial.is_off]
        return self._steered(module, x, output, active) if active else output


def _steered_linear(module: nn.Module, x: Tensor, output: Tensor, active: Sequence[_Change]) -> Tensor:
    """The equation at the head of this module."""
    steered = output
    rests: list[tuple[float | Tensor, LinearDelta]] = []  # as torch.compile can read it
    for change in active:
        if not change.is_product and (rest := change.beside(x, linear=True).rest) is not None:
            rests.append((change.dial.over(x), rest))
    if rests:
        steered = _plus(output, _shift(module, x, output, rests))
    for change in active:
        if (product := change.product(x)) is not None:
            steered = _add_product(steered, product, change.dial.factor, _is_ours_alone(module, steered))
    return steered


def _is_ours_alone(module: nn.Module, y: Tensor) -> bool:
    """True when nothing else can hold a linear layer's fresh output: no other hook has seen it, no gradient needs it.

    Then it may be added to in place, which saves a pass over it.
    """
    return len(module._forward_hooks) == 1 and not torch.is_grad_enabled() and y.is_contiguous()


def _shift(
    module: nn.Module, x: Tensor, output: Tensor, active: Sequence[tuple[float | Tensor, LinearDelta]]
) -> Tensor | None:
    """What changes other than low-rank ones add to the output."""
    bias = bias_of(module) if any(change.depends_on_weight for _, change in active) else None
    shift: Tensor | None = None
    z: Tensor | None = None
    for alpha, change in active:
        wx = None if change.g is None else output if bias is None else output - bias.to(output.device)
        shift = _accumulate(shift, alpha, change.output_change(x, wx))
        z = _accumulate(z, alpha, change.input_change(x))
    if z is not None:
        # A second product, rather than W (x + z), keeps a small z from being rounded away next to x in bfloat16.
        wz = module.forward(z)
        shift = _accumulate(shift, 1.0, wz if bias is None else wz - bias.to(wz.device))
    return shift


def _add_product(y: Tensor, product: _Product | Tensor, alpha: float, in_place: bool) -> Tensor:
    """`y + alpha U (V x)`, where the second product is not there yet in one pass over `y`."""
    if isinstance(product, Tensor):
        return y.add_(product, alpha=alpha) if in_place else y.add(product, alpha=alpha)
    low, u_t = product
    if not low.dtype == u_t.dtype == y.dtype:  # under autocast
        low, u_t = low.to(y.dtype), u_t.to(y.dtype)
    if in_place:
        y.view(-1, y.shape[-1]).addmm_(low, u_t, alpha=alpha)
        return y
    return torch.addmm(y.reshape(-1, y.shape[-1]), low, u_t, alpha=alpha).view_as(y)


def _steered_embedding(
    scale: float, module: nn.Module, ids: Tensor, output: Tensor, active: Sequence[_Change]
) -> Tensor:
    """`alpha scale dE[ids]`."""
    shift: Tensor | None = None
    for change in active:
        rest = change.beside(output, linear=False).rest
        assert rest is not None
        shift = _accumulate(shift, change.dial.over(output) * scale, rest.rows(ids))
    return _plus(output, shift)


def _steered_scale(module: nn.Module, x: Tensor, output: Tensor, active: Sequence[_Change]) -> Tensor:
    """`alpha (dw n(x) + db)` of a norm `w n(x) + b`, whose `n(x)` is read off the module itself."""
    shift: Tensor | None = None
    ones = torch.ones(output.shape[-1], dtype=output.dtype, device=output.device)
    normalised = _with_weight(module, x, ones) - _with_weight(module, x, 0 * ones)
    for change in active:
        rest, alpha = change.beside(x, linear=False).rest, change.dial.over(x)
        assert rest is not None
        shift = _accumulate(shift, alpha, None if rest.e is None else rest.e[:, 0] * normalised)
        shift = _accumulate(shift, alpha, None if rest.bias is None else rest.bias.expand_as(output))
    return _plus(output, shift)


def _with_weight(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a norm would give with another weight and without bias; the module is not touched."""
    twin = copy.copy(module)
    others = dict.fromkeys(module._parameters, torch.zeros_like(weight))  # no bias and none are the same
    twin.__dict__["_parameters"] = others | {"weight": weight}
    return type(module).forward(twin, x)


def _require_scale(name: str, module: nn.Module) -> None:
    """Stop unless the module's output is its weight times something that does not depend on it, as in every norm."""
    size = weight_size(module)
    assert size is not None
    x, ramp = torch.randn(2, size[0], generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 1.5, size[0])
    try:
        zero = _with_weight(module, x, 0 * ramp)
        unit, wanted = (_with_weight(module, x, w) - zero for w in (torch.ones_like(ramp), ramp))
        linear = torch.allclose(wanted, ramp * unit, atol=1e-4)
    except (TypeError, RuntimeError, AttributeError, IndexError):
        linear = False
    if not linear:
        raise WsError(f"{name} is a {type(module).__name__}; only linear layers, embeddings and norms can be steered.")


def _embedding_scale(name: str, module: nn.Module) -> float:
    """By what an embedding multiplies its rows: 1, or the root of the width in Gemma."""
    weight = weight_of(module)
    rows = weight[:8].float().cpu()
    try:
        with torch.no_grad():
            given = module(torch.arange(len(rows), device=weight.device)).float().cpu()
    except (TypeError, RuntimeError, IndexError):  # it is called with something else than ids, as OPT's positions are
        given = torch.full_like(rows, torch.nan)
    scale = float((given * rows).sum() / rows.square().sum())
    if not torch.allclose(given, scale * rows, rtol=2e-2, atol=1e-6):
        raise WsError(f"The embedding {name} ({type(module).__name__}) does more than look rows up; leave it out.")
    return scale


def _plus(output: Tensor, shift: Tensor | None) -> Tensor:
    return output if shift is None else output + shift.to(output.dtype)


def _accumulate(total: Tensor | None, alpha: float | Tensor, part: Tensor | None) -> Tensor | None:
    if part is None:
        return total
    return _times(alpha, part) if total is None else total + _times(alpha, part)


def _times(alpha: float | Tensor, part: Tensor) -> Tensor:
    """`alpha * part`, rounded once to the dtype of `part` whether there is one strength or one per row."""
    return (alpha * part).to(part.dtype)


class _Uncompiled:
    """How many `uncompiled` blocks are open in the process, and the stance of the compiler that holds in them."""

    def __init__(self) -> None:
        self.lock, self.count, self.stance = Lock(), 0, ExitStack()

    def open(self) -> None:
        with self.lock:
            if self.count == 0:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.count += 1

    def close(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                self.stance.close()


_UNCOMPILED = _Uncompiled()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, everything under torch.compile runs as it is written, in the whole process.

    Compiled code is not told of hooks that come or go after it was made (`skip_nnmodule_hook_guards` of torch's
    compiler): without this, a model compiled before would be left unsteered, and one compiled inside steered for ever.
    Compiled code that is there already is kept, and used again outside.
    """
    _UNCOMPILED.open()
    try:
        yield
    finally:
        _UNCOMPILED.close()


_STEERED: WeakKeyDictionary[nn.Module, _SteeredModule] = WeakKeyDictionary()


@contextmanager
def _attached(model: nn.Module, vector: SteeringVector, dial: Dial) -> Iterator[dict[str, nn.Module]]:
    """The vector's changes registered on their modules; taken off again whatever happens inside.

    Yields:
        The modules by name that have to be called.
    """
    if not isinstance(model, nn.Module) or not isinstance(vector, SteeringVector):
        given = f"a {type(model).__name__} and a {type(vector).__name__}"
        raise WsError(f"Steering takes a model and then a SteeringVector, not {given}.")
    if vector.is_zero:
        raise WsError("The steering vector is zero: it would change nothing.")
    matched = vector.matched(model)
    changes = _changes(matched, dial)
    entries = list[tuple[nn.Module, _Change]]()
    try:
        for name, _, module in matched:
            if module not in _STEERED:
                _STEERED[module] = _SteeredModule(name, module)
            _STEERED[module].changes.append(changes[name])
            entries.append((module, changes[name]))
        yield {n: m for n, delta, m in matched if not delta.is_zero}
    finally:
        dial.end()
        for change in changes.values():
            change.release()
        for module, change in entries:
            steered = _STEERED[module]
            steered.changes.remove(change)
            if not steered.changes:
                steered.handle.remove()
                del _STEERED[module]


def _changes(matched: Sequence[tuple[str, LinearDelta, nn.Module]], dial: Dial) -> dict[str, _Change]:
    """The changes of a vector by the names of their modules, ready for the dial's kind of steering."""
    if not isinstance(dial, _LiveDial):
        changes = {name: _Change(delta, dial) for name, delta, _ in matched}
        _join_readers(changes)
        return changes
    for name, _, module in matched:
        if is_offloaded(module) or module_kind(module) == "scale":
            what = "is offloaded" if is_offloaded(module) else "is a norm"
            raise WsError(f"{name} {what}, which torch.compile cannot follow; steer without `compilable`.")
    return {name: _LiveChange(delta, dial, module) for name, delta, module in matched}


@contextmanager
def _dials(
    model: nn.Module, vectors: Mapping[str, SteeringVector], alphas: Mapping[str, Alpha], compilable: bool
) -> Iterator[dict[str, Dial]]:
    """The vectors' dials, while all of them steer."""
    dials = dict[str, Dial]()
    with ExitStack() as stack:
        if compilable:
            # What was compiled before is not told of new hooks, and what is compiled now is not to outlive them.
            torch.compiler.reset()
            stack.callback(torch.compiler.reset)
        else:
            stack.enter_context(uncompiled())
        called = list[dict[str, nn.Module]]()
        for name, vector in vectors.items():
            # Units are looked up once, not at every turn of the dial.
            strength = cache(getattr(vector, "strength", parse_number))
            alpha = alphas[name]
            dials[name] = _LiveDial(alpha, strength, _reference(model)) if compilable else Dial(alpha, strength)
            called.append(stack.enter_context(_attached(model, vector, dials[name])))
        advice = "leave them out with `vector.select`, or merge the vector (`ws export merged`)"
        calls = require_calls(model, {n: m for modules in called for n, m in modules.items()}, advice)
        if not compilable:
            stack.enter_context(calls)
        else:
            _look_once(model, calls)
        yield dials


def _look_once(model: nn.Module, calls: AbstractContextManager[None]) -> None:
    """Watch one token now: compiled code cannot be watched later."""
    rows = max(change.dial.rows for m in model.modules() if m in _STEERED for change in _STEERED[m].changes)
    with uncompiled(), calls, torch.no_grad():
        model(torch.zeros(rows, 1, dtype=torch.long, device=_reference(model).device), use_cache=False)


def _reference(model: nn.Module) -> Tensor:
    """A tensor on the device where strengths are kept, of the dtype that the model computes in."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p for p in parameters if p.is_floating_point()), torch.empty(0))


@contextmanager
def steer(model: nn.Module, vector: SteeringVector, alpha: Alpha = 1.0, *, compilable: bool = False) -> Iterator[Dial]:
    """Steer `model` with `alpha * vector` inside a `with` block; the model leaves it exactly as it came.

    ```python
    with ws.steer(model, dW, alpha=1.0) as dial:
        dial.alpha = torch.tensor([-1.0, 0.0, 1.0])     # or one strength per row of the batch
    ```

    Contexts nest and add up. The weights are never written; the hooks are removed also after an exception.

    Args:
        model: the base the vector was made for.
        vector: what to add.
        alpha: the steering strength, a finite float, a tensor `[batch]`, or calibrated units such as `"+1u"`.
        compilable: let torch.compile and CUDA graphs see the steering, as a tensor of strengths that compiled code
            reads: turning the dial needs no other compilation, unless it changes the number of rows. All that was
            compiled before or inside is compiled anew when the block begins and when it ends, so keep it open and turn
            the dial. Otherwise models that were compiled run uncompiled inside.

    Yields:
        The `Dial`.

    Raises:
        WsError: another base, a module without partner, a zero vector, an alpha that is not finite, or a change of a
            norm or of an offloaded module with `compilable`.
    """
    with _dials(model, {"": vector}, {"": alpha}, compilable) as dials:
        yield dials[""]


@contextmanager
def steer_many(
    model: nn.Module,
    vectors: Mapping[str, SteeringVector],
    alphas: Mapping[str, Alpha] | Alpha = 1.0,
    *,
    compilable: bool = False,
) -> Iterator[DialBoard]:
    """Steer with several named vectors at once, each with a dial of its own; see `steer`."""
    if not vectors:
        raise WsError("There are no vectors to steer with.")
    if isinstance(alphas, Mapping):
        for name in alphas:
            choose("vector", name, vectors)
    start = {n: alphas.get(n, 1.0) if isinstance(alphas, Mapping) else alphas for n in vectors}
    with _dials(model, vectors, start, compilable) as dials:
        yield DialBoard(dials)


if __name__ == "__main__":
    sys.stderr.write("ws.steer is for Python: `with ws.steer(model, dW, alpha): ...`. Commands: ws chat, ws play.\n")
    raise SystemExit(2)
