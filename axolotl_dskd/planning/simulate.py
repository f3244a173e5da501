"""How many bytes are alive while code runs on meta tensors: a training step without its numbers.

A meta tensor has shape, dtype and lifetime but no storage, so a model of any size steps in about
a second, and what autograd, checkpoints and chunks keep alive is found out instead of estimated.
Knows tensors; nothing of configs or reports.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Allocations are rounded up to this (PyTorch's CUDA allocator).
_ROUND = 512


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _joining_meta(tensor: Tensor) -> Tensor:
    """Real ids may index meta states: who belongs to which sample decides shapes."""
    real = tensor.device.type != "meta" and tensor.dim() > 0
    return tensor.new_empty(tensor.shape, device="meta") if real else tensor


def _everywhere(index: Tensor | None) -> list[Tensor | None]:
    """An index; for a mask, those that choose as if it were True everywhere."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.long)] * index.dim()


#: Whose second argument is a list of indices, masks among them.
_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of meta storages that are alive, and the most that ever were.

    Where numbers decide shapes, none is zero: masks choose all, and a single number is 1 or True.

    Args:
        static: tensors that count nothing (weights: they are counted elsewhere).
    """

    def __init__(self, static: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: t for t in static}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(_is_meta(leaf) for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _joining_meta, (args, kwargs))
            if func is torch.ops.aten.nonzero.default:
                mask = args[0]
                return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.long)
            if func is torch.ops.aten._local_scalar_dense.default:
                return torch.ones((), dtype=args[0].dtype).item()
            if func in _INDEXING:
                args = (args[0], [x for index in args[1] for x in _everywhere(index)], *args[2:])
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if _is_meta(leaf):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND

        def freed(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def peak_of(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What `work` returns, and the most bytes alive at any moment of it beyond those before."""
        before = self.peak = self.live
        result = work()
        return result, self.peak - before


class _Attention(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: q, k, v, output, log-sum-exp, bias."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        out = q.new_empty((batch, length, heads, v.shape[-1]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        # The query's gradient is accumulated in float32.
        wide = torch.empty_like(q, dtype=torch.float32)
        return wide.to(q.dtype), torch.empty_like(k), torch.empty_like(v), None


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, padded: bool, **__: Any
) -> tuple[Tensor, None]:
    if not padded:
        return _Attention.apply(q, k, v, None), None
    # The mask becomes a bias, and each head has keys and values of its own.
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    return _Attention.apply(q, k, v, q.new_empty((q.shape[0], 1, q.shape[2], k.shape[2]))), None


# No mask is built for attentions that transformers does not know itself.
ALL_ATTENTION_FUNCTIONS.register("dskd_fused", partial(_attend, padded=False))
ALL_ATTENTION_FUNCTIONS.register("dskd_padded", partial(_attend, padded=True))


def attend(model: Any, implementation: str | None, *, padded: bool) -> None:
    """From now on, let a skeleton attend as `implementation` would, to padded batches or not."""
    name = implementation or "sdpa"
    if name != "eager":
        name = "dskd_padded" if padded and name == "sdpa" else "dskd_fused"
    model.set_attn_implementation(name)


class _QuantizedLinear(torch.autograd.Function):
    """A product with a weight that is unpacked for it and dropped again, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return F.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.shape), None


def _quantized_forward(module: Any, x: Tensor) -> Tensor:
    dtype = getattr(module, "compute_dtype", None) or x.dtype
    shape = (module.out_features, module.in_features)
    out = _QuantizedLinear.apply(x.to(dtype), shape).to(x.dtype)
    return out if module.bias is None else out + module.bias.to(out.dtype)


_LOW = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm}
_WIDE = {F.layer_norm, torch.layer_norm, F.softmax, torch.softmax, Tensor.softmax}


class _Autocast(TorchFunctionMode):
    """torch.autocast for meta tensors, which it does not know: products low, norms wide."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.enabled = dtype, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.enabled and (func in _LOW or func in _WIDE):
            dtype = self.dtype if func in _LOW else torch.float32

            def cast(tensor: Tensor) -> Tensor:
                # As torch.autocast, which leaves float64 alone.
                narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
                return tensor.to(dtype) if narrow else tensor

            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)


def backward(loss: Tensor) -> None:
    """`loss.backward()` in which checkpointed layers run again under the same autocast.

    Called in the usual way, backward is itself one function under `_Autocast`, inside of which
    that is off.
    """
    run = torch.autograd.Variable._execution_engine.run_backward
    keys = {"allow_unreachable": True, "accumulate_grad": True}
    run((loss,), (torch.ones_like(loss),), False, False, (), **keys)


@contextmanager
def simulation(static: Iterable[Tensor], autocast_dtype: torch.dtype | None) -> Iterator[LiveBytes]:
    """While open, code runs on meta tensors under a `LiveBytes`; quantised layers work too.

    Args:
        static: tensors that are counted elsewhere.
        autocast_dtype: that of `torch.autocast` blocks, or None where training uses none.
    """
    import bitsandbytes as bnb

    mode = _Autocast(autocast_dtype or torch.float32)

    def autocast(device: str, *_: Any, enabled: bool = True, **__: Any) -> Any:
        return mock.patch.object(mode, "enabled", enabled and autocast_dtype is not None)

    with (
        mock.patch.multiple(
            torch,
            autocast=autocast,
            is_autocast_enabled=lambda *_: mode.enabled,
            get_autocast_dtype=lambda *_: mode.dtype,
        ),
        mock.patch.object(bnb.nn.Linear4bit, "forward", _quantized_forward),
        mock.patch.object(bnb.nn.Linear8bitLt, "forward", _quantized_forward),
        mode,
        LiveBytes(static) as memory,
    ):
        yield memory
