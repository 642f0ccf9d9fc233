"""A GPU that is not there: tensors that say they are on one, are computed on the CPU, and refuse what a GPU would refuse.

Code that mixes devices works on a CPU and fails in the first step on a GPU, where no test of a machine without one ever comes. In
``gpu()`` the device ``cuda`` can be used: a tensor sent to it is an ``Elsewhere``, which keeps its values in a tensor of the
CPU. As on CUDA, all tensors of an operation must be on one device, but for numbers (0-d) and indices, and NumPy takes none of them. The
values are the CPU's, so a step must come out the same. Of kernels, their precision and their speed this says nothing.

PyTorch thinks that the device is ``lazy``: its autograd runs that one on the CPU's thread, and asks no driver about it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda", 0)
LAZY = torch.device("lazy", 0)
OURS = ("models", "pipelines", "jobs")
aten = torch.ops.aten
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor
}  # fmt: skip
"""The first argument and the third, the values, must agree; indices may come from the CPU."""
COPYING = {aten._to_copy.default, aten.copy_.default}


class Elsewhere(Tensor):
    """A tensor that claims to be on the GPU."""

    here: Tensor
    """Its values."""

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        """Args: here: plain tensor on the CPU."""
        made: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=LAZY,
        )  # fmt: skip
        made.here = here
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """What our code is told."""
        return CUDA

    def numpy(self, **_: Any) -> Any:
        """Refused, as by CUDA."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        """A copy, as ``item``."""
        return self.here.tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Elsewhere({self.here!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(function, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Operations without tensors can make some there, too."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(function, args, kwargs or {})


class Names(TorchFunctionMode):
    """``cuda`` in a call becomes the device that PyTorch is told."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.device:
            return function(*args, **(kwargs or {}))
        names = {name: renamed(value) for name, value in (kwargs or {}).items()}
        return function(*map(renamed, args), **names)


def renamed(value: Any) -> Any:
    """``LAZY`` for anything that names the GPU."""
    if isinstance(value, torch.device):
        return LAZY if value.type == "cuda" else value
    return LAZY if isinstance(value, str) and value in ("cuda", "cuda:0") else value


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, if its tensors agree on where they are; its results are where CUDA's would be."""
    tensors: list[Tensor] = []
    tree_map_only(Tensor, tensors.append, (args, kwargs))
    known = {id(x.here): x for x in tensors if isinstance(x, Elsewhere)}
    if function not in COPYING:
        demand_one_device(function, args, tensors)
    plain_args, plain = tree_map_only(Elsewhere, lambda x: x.here, (args, kwargs))
    becomes_there = bool(known)
    if plain.get("device") is not None:
        becomes_there = torch.device(plain["device"]).type == LAZY.type
        plain["device"] = torch.device("cpu")
    if "pin_memory" in plain:
        plain["pin_memory"] = False
    inference = torch.is_inference_mode_enabled()  # its tensors cannot be views of others here
    with torch.inference_mode(False) if inference else nullcontext(), torch.no_grad():
        out = function(*plain_args, **plain)
        if function is aten.copy_.default:
            return args[0]
        if not becomes_there:
            return out
        return tree_map_only(
            Tensor, lambda x: known[id(x)] if id(x) in known else Elsewhere(x), out
        )


def demand_one_device(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise ``RuntimeError`` where CUDA does."""
    if function in INDEXING:
        tensors = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor)]
    if not any(isinstance(x, Elsewhere) for x in tensors):
        return
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if strangers:
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu {strangers}"
        )


def asked_by_us() -> bool:
    """Whether there is a GPU: yes for our code, no for PyTorch's own, which would call the driver."""
    return sys._getframe(1).f_globals["__name__"].partition(".")[0] in OURS


@contextmanager
def gpu() -> Iterator[torch.device]:
    """In it ``cuda`` is there, and ``torch.cuda.is_available()``. Autocast does nothing: everything is computed in fp32."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    try:
        with (
            mock.patch("torch.cuda.is_available", asked_by_us),
            mock.patch("torch.autocast", return_value=nullcontext()),
            Factories(),
            Names(),
        ):
            yield CUDA
    finally:
        torch._C._set_only_lift_cpu_tensors(False)  # type: ignore[attr-defined]
        torch.__future__.set_overwrite_module_params_on_conversion(False)
