"""The ranks of a run: the one place that talks to `torch.distributed` and knows sharded tensors.

Every function is a collective on several ranks (all of them must call it, in the same order) and
does nothing on one. Knows tensors; nothing of models, batches or losses. Of the two ways to shard
a student, FSDP2 hands out tensors of a kind of their own (`whole` gathers them), ZeRO-3 parameters
that are empty until they are gathered in place (`gathered`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def rank() -> int:
    """The number of this rank, from 0."""
    return 0 if world_size() == 1 else dist.get_rank()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def share_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite every rank's tensors with rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def average_over_ranks(tensors: list[Tensor]) -> None:
    """Replace the tensors (one dtype, one device) by their means over ranks: one collective."""
    if world_size() == 1:
        return
    bucket = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(bucket)
    bucket /= world_size()
    for tensor, mean in zip(tensors, bucket.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def multiply(parameter: Tensor, factors: Tensor) -> None:
    """Multiply a parameter, sharded by FSDP2 or whole, in place by factors that all ranks have."""
    if isinstance(parameter, DTensor):
        factors = distribute_tensor(factors, parameter.device_mesh, parameter.placements)
    parameter.mul_(factors.to(parameter.device))


def gather_objects(value: T) -> list[T]:
    """What every rank has, by rank. Small plain values: they travel pickled between the processes
    of one training."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def raise_together(problem: str | None, device: torch.device) -> None:
    """Stop every rank if one of them has a problem.

    A rank that raises alone leaves the others waiting for it in their next collective.

    Args:
        problem: what is wrong on this rank, or None.
        device: of the process group's tensors.

    Raises:
        ValueError: on every rank, with the problems of all of them.
    """
    if not max_over_ranks(int(problem is not None), device):
        return
    problems = gather_objects(problem)
    named = [
        text if world_size() == 1 else f"rank {rank}: {text}"
        for rank, text in enumerate(problems)
        if text is not None
    ]
    if named:
        raise ValueError("\n".join(named))


def first_for_all(work: Callable[[], T], device: torch.device) -> T:
    """What rank 0 finds out, on every rank: a small plain value.

    Args:
        work: done by rank 0 alone.
        device: of the process group's tensors.

    Raises:
        ValueError: on every rank, if the work raises one or an OSError.
    """
    found: Any = None
    problem = None
    if is_first():
        try:
            found = work()
        except (ValueError, OSError) as error:
            problem = str(error)
    raise_together(problem, device)
    return gather_objects(found)[0]


class _Whole(torch.autograd.Function):
    """A sharded tensor gathered; its gradient averaged over the ranks, and sharded again."""

    @staticmethod
    def forward(ctx: Any, sharded: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return sharded.full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:
        mesh = ctx.mesh
        mine = DTensor.from_local(grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
        return mine.redistribute(placements=ctx.placements)


class _Regathered(torch.autograd.Function):
    """A parameter that ZeRO-3 has gathered for now, gathered again when its gradient arrives.

    Autograd shapes a gradient as its parameter is at that moment, which would be empty. ZeRO-3 sees
    to that for a module whose own forward ran; a layer within the head (LoRA) has none here.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach().view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parameter = ctx.parameter
        if _is_partitioned(parameter):
            parameter.all_gather()
            torch.autograd.Variable._execution_engine.queue_callback(parameter.partition)
        return grad


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, where it is one rank's shard of it (FSDP2), all of it.

    Differentiable: ranks average their gradients, as FSDP2 does with those of its own. A parameter
    of ZeRO-3 must be `gathered`.
    """
    if isinstance(tensor, DTensor):
        return _Whole.apply(tensor)
    if is_sharded(tensor) and tensor.requires_grad:
        return _Regathered.apply(tensor)
    return tensor


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While open, parameters that ZeRO-3 has partitioned are whole on every rank.

    Those that are whole already, because a module is using them, stay so afterwards.
    """
    partitioned = [p for p in parameters if _is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def is_sharded(parameter: Tensor) -> bool:
    """Whether this is a parameter of which a rank holds a part only, be it gathered or not."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_status")


def _is_partitioned(parameter: Tensor) -> bool:
    status = getattr(parameter, "ds_status", None)
    # One that is on its way would be left out of the gathering, and read before it is there.
    assert status is None or status.name != "INFLIGHT"
    return status is not None and status.name != "AVAILABLE"
