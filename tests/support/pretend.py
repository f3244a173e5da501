"""An accelerator that is not there: numbers on the CPU, devices as strict as CUDA's.

Code that only ever ran on a CPU may make an index, a mask or a table there and let it meet a state
on a GPU; on a CPU nothing tells. Tensors of `DEVICE` say that they are on it and compute on the
CPU beneath, forwards and backwards, and what meets a tensor of the CPU raises `OtherDevice`. The
device's name is that of PyTorch's lazy tensors, which nothing here loads: among the names that are
neither `cpu` nor `meta` (which plans of memory are made with) it alone has what backward needs, in
every build of PyTorch.

Stricter than CUDA where that would wait in silence: it takes an index from the CPU, and copies it.
It knows no streams, so it does not see what is read before it has been copied, nor a wait
(`waits.Waits` counts these, also here). It has no kernels of its own: what `is_cuda` chooses is
not run, nor does it know of which dtypes CUDA has an operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")

DEVICE = torch.device("lazy", 0)
CPU = torch.device("cpu")

#: Where a number on the CPU, which is no tensor of one or more, may meet an accelerator's tensors;
#: elsewhere than in what is computed number by number.
_TAKE_NUMBERS = {"fill_", "index_put", "index_put_", "masked_fill", "masked_fill_"}
_COPY = {"copy_", "_to_copy", "copy"}


class OtherDevice(RuntimeError):
    """An operation was given tensors of two devices."""


class Pretended(Tensor):
    """A tensor of `DEVICE`.

    Attributes:
        inner: its numbers, on the CPU.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        """Around a tensor of the CPU, without graph."""
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # so modules swap what they convert
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Pretended:
        return Pretended(inner["inner"])

    def tolist(self) -> Any:
        return Tensor.tolist(self.inner.detach())

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of an accelerator is no array: call cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner!r})"


def _is_ours(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == DEVICE.type


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation with a tensor of `DEVICE`, or one that makes one."""
    leaves, name = tree_leaves((args, kwargs)), func.__name__.partition(".")[0]
    _check(func, name, leaves)

    def beneath(x: Any) -> Any:
        return x.inner if isinstance(x, Pretended) else CPU if _is_ours(x) else x

    out = func(*tree_map(beneath, args), **tree_map(beneath, kwargs))
    target = kwargs.get("device")
    if target is None and name == "copy_" and not isinstance(args[0], Pretended):
        return args[0]
    if target is not None and not _is_ours(target):
        # What would come back in its own time is not there yet when the next line reads it.
        if kwargs.get("non_blocking"):
            raise OtherDevice(f"{func}: copied to the CPU without waiting")
        return out
    out = tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, out)
    out = return_and_correct_aliasing(func, args, kwargs, out)
    for leaf in leaves:
        if isinstance(leaf, Pretended) and leaf.shape != leaf.inner.shape:
            raise NotImplementedError(f"{func} resized one of its arguments")
    return out


def _check(func: Any, name: str, leaves: list[Any]) -> None:
    """Raise OtherDevice where CUDA would raise, or wait in silence."""
    ours = [x for x in leaves if isinstance(x, Pretended)]
    for x in leaves:
        if isinstance(x, torch.Generator):
            raise OtherDevice(f"{func}: a generator of {x.device} for tensors of {DEVICE}")
        if not ours or not isinstance(x, Tensor) or isinstance(x, Pretended) or name in _COPY:
            continue
        number = x.dim() == 0 and x.device.type == "cpu"
        if not (number and (torch.Tag.pointwise in func.tags or name in _TAKE_NUMBERS)):
            raise OtherDevice(
                f"{func}: a tensor of {x.device}, {x.dtype} {list(x.shape)}, among tensors of "
                f"{DEVICE}"
            )


class _Factories(TorchDispatchMode):
    """Makes the tensors that `device=DEVICE` asks for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, Pretended) or _is_ours(x) for x in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[torch.device]:
    """While open, there is a device with this name. It has no autocast."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def its_autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return (
            nullcontext() if device_type == DEVICE.type else autocast(device_type, *args, **kwargs)
        )

    def its_state(*device_type: str) -> bool:
        return device_type != (DEVICE.type,) and enabled(*device_type)

    with (
        mock.patch.object(torch, "autocast", its_autocast),
        mock.patch.object(torch, "is_autocast_enabled", its_state),
        _Factories(),
    ):
        before = torch._C._only_lift_cpu_tensors()
        # Else `torch.tensor` copies to its device where no mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield DEVICE
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def moved(value: T, device: torch.device) -> T:
    """The tensors of a dataclass, a tuple or a dictionary on a device, graph and all."""
    if isinstance(value, Tensor):
        return value.to(device)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: moved(getattr(value, f.name), device) for f in fields(value)}
        return replace(value, **parts)  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}  # type: ignore[return-value]
    return value
