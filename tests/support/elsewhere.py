"""A device that is none: tensors on `elsewhere` compute on the CPU, but may not be mixed with those of the CPU.

It finds what would fall on an accelerator, on a machine that has none: a tensor made on the wrong device, a `.numpy()`
of one that lies elsewhere, a random generator of another device, and float64, which Apple's devices lack. As on CUDA, a
number without dimensions and the indices of a lookup may come from the CPU. `register` makes it torch's private
backend, for the whole process and for good, so a test that wants it starts a process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
_ATEN = torch.ops.aten
# May take tensors of both sides.
_MIXED = {_ATEN.copy_.default, _ATEN._to_copy.default, _ATEN.index.Tensor, _ATEN.index_put_.default}


class _Module(backend_registration._DummyBackendModule):
    """What `torch.elsewhere` is: its random numbers are the CPU's."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def manual_seed(self, seed: int) -> None: ...


class Elsewhere(Tensor):
    """A tensor of the device; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        with torch.inference_mode(False):  # a view of a tensor from outside of it is none of its own
            made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=f"{NAME}:0", **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    def tolist(self) -> Any:  # which torch refuses for subclasses, and every device has
        return self.held.tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:  # as saved by one who has read it back
        return self.held.__reduce_ex__(protocol)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The function on the CPU, and its result on the device that it belongs to; mixed devices are refused."""
    if function._can_decompose() and (parts := function.decompose(*args, **kwargs)) is not NotImplemented:
        return parts
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    if there and function not in _MIXED and any(t.dim() and not isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got {NAME} and cpu.")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif function is _ATEN.copy_.default:
        there = isinstance(args[0], Elsewhere)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a {NAME!r} generator, but {function} got one of the cpu.")
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if there and any(t.dtype == torch.float64 for t in tree_leaves(result) if isinstance(t, Tensor)):
        raise TypeError(f"Cannot convert a tensor of {NAME} to float64 in {function}.")
    known = {id(t.held): t for t in tensors if isinstance(t, Elsewhere)}  # what is written in place stays itself
    return tree_map(lambda t: known.get(id(t), Elsewhere(t) if there else t) if isinstance(t, Tensor) else t, result)


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


def register() -> torch.library.Library:
    """Make the device, for this process and while what is returned lives; libraries that ask for one are told of it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `model.to` would part tied weights
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in (
        ("empty.memory_format", _empty),
        ("empty_strided", _empty_strided),
        ("_copy_from", _copy_from),
    ):
        library.impl(name, kernel, "PrivateUse1")
    Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[method-assign]
    return library
