"""Parts of sharding alone: projectors' steps, gathered weights, a teacher cut over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.objectives.base import Beside
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.ranks import whole
from axolotl_dskd.teacher.shard import load_sharded_teacher
from axolotl_dskd.training.sidecar import Sidecar
from tests.support.jobs.common import process_group, this_rank
from tests.support.jobs.registry import job


@job
def projector_step() -> dict[str, Any]:
    """One step of projectors that each rank starts by a seed, and trains by a gradient, of its
    own."""
    process_group()
    projectors = Projectors(4, 6, with_query=True, seed=this_rank())
    optimizer = Sidecar("dual_space", {"": projectors}, {"": Beside(0.1)}, max_grad_norm=0.0)
    group = {"params": list(projectors.parameters()), "own_lr": 0.1}
    optimizer.adamw = torch.optim.SGD([group], lr=0.1)  # type: ignore[assignment]
    start = {k: v.clone() for k, v in projectors.state_dict().items()}
    for parameter in projectors.parameters():
        parameter.grad = torch.full_like(parameter, float(this_rank() + 1))
    optimizer.step(schedule_factor=1.0)
    return {"start": start, "end": dict(projectors.state_dict())}


@job
def gathered_weight(hybrid: bool) -> dict[str, Any]:
    """A weight that FSDP2 shards, gathered, and its gradient where ranks have unlike ones."""
    process_group()
    world_size = dist.get_world_size()
    shape, names = (
        ((2, world_size // 2), ("replicate", "shard")) if hybrid else ((world_size,), None)
    )
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7, bias=False)
    before = linear.weight.detach().clone()
    fully_shard(linear, mesh=mesh)
    gathered = whole(linear.weight)
    (gathered * float(this_rank() + 1)).sum().backward()
    return {
        "same": torch.equal(gathered, before),
        "shard": linear.weight.to_local().shape[0],
        "grad": linear.weight.grad.full_tensor(),
    }


@job
def sharded_teacher(model: str) -> dict[str, Any]:
    """Logits of a teacher that is cut over the ranks, and how much of its layers is here."""
    process_group()
    config = TeacherConfig(base_model=model, dtype="float32")
    teacher = load_sharded_teacher(config, torch.device("cpu"))
    layers = list(teacher.model.layers.parameters())
    with torch.no_grad():
        logits = teacher(input_ids=torch.arange(3, 19).unsqueeze(0), use_cache=False).logits
    return {
        "logits": logits,
        "share": sum(p.to_local().numel() for p in layers) / sum(p.numel() for p in layers),
    }
