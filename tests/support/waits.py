"""How often a host would wait for a GPU: numbers that it reads, shapes that numbers decide, and
copies: to and from memory that is not pinned, CUDA's copies end with all that was begun before."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operators whose result the host must know before it can go on.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "_unique2",
    "unique_consecutive",
    "masked_select",
    "repeat_interleave",
}


def _copies(name: str, args: Any, kwargs: Any) -> bool:
    """Whether tensors change their device, other than to an accelerator without waiting: what is
    not in pinned memory is put into a queue then, and read at once."""
    if name == "_to_copy":
        source, target = args[0].device, kwargs.get("device") or args[0].device
    elif name == "copy_":
        target, source = args[0].device, args[1].device
    else:
        return False
    at_once = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
    return source.type != target.type and not (at_once and source.type == "cpu")


def _in_a_library() -> bool:
    """Whether the innermost caller that is ours or a library of models is the library."""
    frame = sys._getframe(1)
    while frame := frame.f_back:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("axolotl_dskd"):
            return False
        if name.startswith(("transformers.", "axolotl.", "accelerate.", "peft.")):
            return True
    return False


class Waits(TorchDispatchMode):
    """Use as a context manager; `count` is what it saw, but for what transformers and the like do
    in their own code. Works on a CPU, which waits for nothing; copies between devices are seen on
    an accelerator, also on one that is not there (`pretend`)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        )
        waits = name in _WAITING or masks or _copies(name, args, kwargs or {})
        self.count += waits and not _in_a_library()
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Waits:
        read = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.count += not _in_a_library()
            return read(tensor)

        self._patch = mock.patch.object(Tensor, "tolist", tolist)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()
