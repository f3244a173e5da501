"""A teacher that is cut over the ranks, because it does not fit on one of them.

Its layers are sharded by FSDP2, forward only, whatever shards the student (DDP, FSDP2, ZeRO): each
is gathered for its own forward and let go. Embedding and output head, which the loss needs at any
moment, stay whole on every rank. Knows models and ranks; nothing of batches.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.models.heads import head_module
from axolotl_dskd.ranks import is_first, raise_together, share_first, world_size
from axolotl_dskd.teacher.load import (
    apart_from_the_student,
    freeze,
    load_teacher,
    resolve_dtype,
)


def is_to_be_sharded(config: TeacherConfig, *, student_is_sharded: bool) -> bool:
    """Whether `dskd.teacher.shard` means a teacher cut over the ranks.

    `auto` cuts it where the student is cut, too, if it can: not a quantised teacher, one with a
    `device_map`, or one behind a cache.

    Raises:
        ValueError: `full` for a checkpoint that is quantised already.
    """
    if world_size() == 1 or config.shard == "none":
        return False
    if not (config.shard == "full" or (student_is_sharded and config.can_be_sharded)):
        return False
    if getattr(_described(config), "quantization_config", None) is None:
        return True
    if config.shard == "full":
        raise ValueError(
            f"dskd.teacher.shard: full cannot cut {config.base_model}, whose weights are stored "
            "quantised. Use shard: none, or the unquantised model."
        )
    return False


def load_sharded_teacher(config: TeacherConfig, device: torch.device) -> Any:
    """The frozen teacher, of which every rank holds a part of each layer.

    Rank 0 reads it into main memory and hands it out parameter by parameter, so that no device
    ever holds more than its share, the embedding, the head and one parameter.

    Raises:
        ValueError: on every rank, if it cannot be loaded or sharded.
    """
    whole, problem = None, None
    if is_first():
        dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
        try:
            whole = load_teacher(config.model_copy(update={"dtype": dtype}), torch.device("cpu"))
        except Exception as error:  # whatever it is, the other ranks wait
            problem = f"{type(error).__name__}: {error}"
    raise_together(problem, device)
    model = _empty(config, device)
    _shard(model, device)
    model.to_empty(device=device)
    model.tie_weights()  # each gets storage of its own above
    source = {} if whole is None else dict(_tensors(whole))
    for name, tensor in _tensors(model):
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if is_first():
            full.copy_(source[name])
        share_first([full])
        if isinstance(tensor, DTensor):
            mesh, placements = tensor.device_mesh, tensor.placements
            full = distribute_tensor(full, mesh, placements, src_data_rank=None)
        tensor.data.copy_(full)
    return freeze(model)


def _empty(config: TeacherConfig, device: torch.device) -> Any:
    """The teacher without storage."""
    remote = config.trust_remote_code
    with apart_from_the_student(), init_empty_weights(include_buffers=True):
        optional = {"attn_implementation": config.attn_implementation}
        return AutoModelForCausalLM.from_config(
            _described(config),
            trust_remote_code=remote,
            dtype=resolve_dtype(config.dtype, device),
            **{key: value for key, value in optional.items() if value is not None},
        )


def _described(config: TeacherConfig) -> Any:
    return AutoConfig.from_pretrained(
        config.base_model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )


def _shard(model: Any, device: torch.device) -> None:
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"dskd.teacher.shard: {type(model).__name__} does not say what its layers are, so it "
            "cannot be sharded. Use shard: none with load_in_4bit: true, or a teacher cache."
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    ends = (head_module(model), model.get_input_embeddings())
    whole = {parameter for module in ends for parameter in module.parameters()}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _tensors(model: nn.Module) -> list[tuple[str, Any]]:
    """Parameters and buffers, those that no checkpoint holds included, tied ones once."""
    return [*model.named_parameters(), *model.named_buffers()]
