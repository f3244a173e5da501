"""What several jobs need: this rank, its process group, and wrapping a function for a while."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch.distributed as dist


def this_rank() -> int:
    """0 in a plain process."""
    return int(os.environ.get("RANK", "0"))


def process_group() -> None:
    """The ranks' process group, made where Axolotl has not made it."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def wrapped(target: Any, name: str, wrapper: Callable[..., Any]) -> Any:
    """A context in which `target.name` is `wrapper(original, *its arguments)`.

    Where `target` is a class, the arguments begin with the object.
    """
    original = getattr(target, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    return patch.object(target, name, call)


def on_a_full_disk(target: Any, name: str, rank: int) -> Any:
    """A context in which `target.name`, which writes, finds no room on one rank."""

    def write(original: Any, *args: Any) -> Any:
        if this_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    return wrapped(target, name, write)
