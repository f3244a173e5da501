"""What the ranks of `tests.ranks` run. Importing this is what takes half a minute."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import axolotl.cli.config
import axolotl.train
import axolotl.utils.environment
import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers.training_args
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers import multipack
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from axolotl_dskd import projectors
from axolotl_dskd.data import DualCollator
from axolotl_dskd.projectors import ProjectorOptimizer, Projectors
from axolotl_dskd.ranks import raise_together, whole
from axolotl_dskd.trainer import DSKDTrainer


def _on_this_cpu() -> None:
    """Axolotl places the model of local rank r on the accelerator number r; there is none."""
    normalize = axolotl.cli.config.normalize_config

    def normalized(cfg: Any) -> None:
        normalize(cfg)
        cfg.device_map = {"": "cpu"}

    axolotl.cli.config.normalize_config = normalized
    for module in (axolotl.cli.config, transformers.training_args):
        module.is_torch_bf16_gpu_available = lambda: True
    # A torch built for CUDA is asked about GPUs that are not there.
    axolotl.utils.environment.check_cuda_p2p_support = lambda: True
    # Axolotl 0.19's Trainer reads the optimizer's state to "cpu:0", which torch does not know.
    load = torch.load

    def load_to_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("map_location")).startswith("cpu"):
            kwargs["map_location"] = "cpu"
        return load(*args, **kwargs)

    torch.load = load_to_cpu
    # The jobs of a launch share one process group.
    axolotl.train.cleanup_distributed = lambda: None


def _fsdp_on_this_cpu() -> None:
    """Accelerate takes up FSDP on accelerators only; everything after that works on CPUs too."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kwargs.get("fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]

    AcceleratorState.__init__ = init
    build = ParallelismConfig.build_device_mesh  # Axolotl asks for a mesh of "cuda"
    ParallelismConfig.build_device_mesh = lambda self, _device_type: build(self, "cpu")
    save = axolotl.train.save_trained_model

    def save_whole(*args: Any, **kwargs: Any) -> None:
        """Accelerate's way of gathering a state for a file gives no plain tensors on a CPU."""
        if os.environ.get("ACCELERATE_USE_FSDP") != "true":
            save(*args, **kwargs)

    axolotl.train.save_trained_model = save_whole


def _once_for_all_ranks() -> None:
    """What every forked rank would otherwise import, compile or start anew (5 to 10 s a rank)."""
    for module in ("axolotl.core.builders", "axolotl.prompt_strategies.chat_template"):
        importlib.import_module(module)
    lengths = np.arange(1, 9)
    multipack.pack_parallel(lengths, 16, 100, 8, num_processes=1)
    multipack.allocate_sequentially(lengths, 0, 16, 1)
    save = datasets.Dataset.save_to_disk

    def save_here(self: Any, path: Any, num_proc: Any = None, **kwargs: Any) -> None:
        save(self, path, **kwargs)  # not from a process of its own

    datasets.Dataset.save_to_disk = save_here


_on_this_cpu()
_fsdp_on_this_cpu()
_once_for_all_ranks()


def train(config: dict[str, Any]) -> dict[str, Any]:
    """`axolotl train`; returns losses, metrics, weights of student and projectors."""
    cfg = load_cfg(DictDefault(config))
    torch.manual_seed(cfg.seed)  # Axolotl seeds later than it makes adapters
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    model, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=meta)
    return _outcome(model, trainer)


def command(
    name: str, config: str, stdin: str = "", arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One of Axolotl's commands, as its CLI calls it; returns what it prints."""
    module = importlib.import_module(f"axolotl.cli.{name}")
    sys.argv, sys.stdin = [name], io.StringIO(stdin)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.do_cli(config=config, **(arguments or {}))
    return {"output": printed.getvalue()}


def train_without_labels(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """`train`, where one rank finds no supervised token in its second batch."""
    original, seen = DualCollator.__call__, [0]

    def collate(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        seen[0] += 1
        if seen[0] == 2 and _rank() == rank:
            batch["labels"] = torch.full_like(batch["labels"], -100)
            batch["dskd_teacher_labels"] = torch.full_like(batch["dskd_teacher_labels"], -100)
        return batch

    DualCollator.__call__ = collate
    return train(config)


def projector_step() -> dict[str, Any]:
    """One step of projectors that each rank starts by a seed, and trains by a gradient, of its
    own."""
    _process_group()
    projectors = Projectors(4, 6, with_query=True, seed=_rank())
    optimizer = ProjectorOptimizer(
        projectors, learning_rate=0.1, weight_decay=0.0, max_grad_norm=0.0
    )
    optimizer.adamw = torch.optim.SGD(projectors.parameters(), lr=0.1)
    start = {k: v.clone() for k, v in projectors.state_dict().items()}
    for parameter in projectors.parameters():
        parameter.grad = torch.full_like(parameter, float(_rank() + 1))
    optimizer.step(schedule_factor=1.0)
    return {"start": start, "end": dict(projectors.state_dict())}


def gathered_weight(hybrid: bool) -> dict[str, Any]:
    """A weight that FSDP2 shards, gathered, and its gradient where ranks have unlike ones."""
    _process_group()
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
    (gathered * float(_rank() + 1)).sum().backward()
    return {
        "same": torch.equal(gathered, before),
        "shard": linear.weight.to_local().shape[0],
        "grad": linear.weight.grad.full_tensor(),
    }


def stop(rank: int) -> dict[str, Any]:
    """One rank has a problem."""
    _process_group()
    raise_together("too hot" if _rank() == rank else None, torch.device("cpu"))
    return {}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _process_group() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def _outcome(model: Any, trainer: Any) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    state = trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict()
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    return {
        "losses": [float(entry["loss"]) for entry in logs],
        "logs": [
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in logs
        ],
        "student": {k: v.detach().clone() for k, v in state.items()},
        "projectors": {k: v.clone() for k, v in trainer.projectors.state_dict().items()},
        "logits": logits,
        "trainer": type(trainer.model_wrapped).__name__,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
    }


def train_and_die(config: dict[str, Any], step: int, saving: bool, rank: int = 0) -> None:
    """`train`, killed as a machine's failure would: no exception, nothing is cleaned up.

    Args:
        step: optimizer step in which `rank` dies.
        saving: while it writes this step's checkpoint, between the projectors' two files; else in
            the forward.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if saving:
        save_file, written = projectors.save_file, []

        def save(tensors: Any, path: Any) -> None:
            if f"checkpoint-{step}" in Path(path).parts:
                if written:
                    die()
                written.append(path)
            save_file(tensors, path)

        projectors.save_file = save
    else:
        loss = DSKDTrainer.compute_loss

        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step - 1 and _rank() == rank:
                die()
            return loss(self, *args, **kwargs)

        DSKDTrainer.compute_loss = compute_loss
    train(config)


def train_in(
    config: dict[str, Any], precision: str, scale: float = 65536.0, spoilt: int | None = None
) -> dict[str, Any]:
    """`train`, in fp16 with autocast and a gradient scaler, which accelerate refuses on a CPU.

    Args:
        precision: "fp16", or what `config` says.
        scale: its first scale.
        spoilt: optimizer step in whose backward one projector's gradient overflows.

    Returns:
        What `train` does, and of every step whether the student and whether the projectors took
        it, and the scale after it.
    """
    create = Trainer.create_accelerator_and_postprocess
    step, student_step = ProjectorOptimizer.step, AcceleratedOptimizer.step
    steps: list[list[float]] = []

    def created(self: Any) -> None:
        create(self)
        if precision == "fp16":
            AcceleratorState._shared_state["_mixed_precision"] = precision
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def stepped(self: Any, *args: Any, **kwargs: Any) -> None:
        before = [p.detach().clone() for p in self.projectors.parameters()]
        if len(steps) + 1 == spoilt:
            self.projectors.t2s.weight.grad[0, 0] = float("inf")
        step(self, *args, **kwargs)
        after = self.projectors.parameters()
        moved = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        steps.append([0.0, float(moved), 0.0])

    def student_stepped(self: Any, *args: Any, **kwargs: Any) -> None:
        student_step(self, *args, **kwargs)
        if self.gradient_state.sync_gradients:
            steps[-1][0] = float(not self.step_was_skipped)
            steps[-1][2] = self.scaler.get_scale() if self.scaler else 1.0

    Trainer.create_accelerator_and_postprocess = created
    ProjectorOptimizer.step, AcceleratedOptimizer.step = stepped, student_stepped
    try:
        return train(config) | {"steps": steps}
    finally:
        Trainer.create_accelerator_and_postprocess = create
        ProjectorOptimizer.step, AcceleratedOptimizer.step = step, student_step
        AcceleratorState._reset_state()


def train_spoilt(config: dict[str, Any], rank: int, step: int) -> dict[str, Any]:
    """`train`, where one rank's gradient of a projector is not finite in one step."""
    original, seen = ProjectorOptimizer.step, [0]

    def spoil(self: Any, *args: Any, **kwargs: Any) -> None:
        seen[0] += 1
        if _rank() == rank and seen[0] == step:
            self.projectors.t2s.weight.grad[0, 0] = float("nan")
        original(self, *args, **kwargs)

    ProjectorOptimizer.step = spoil
    return train(config)


def traffic(config: dict[str, Any]) -> dict[str, Any]:
    """Train, and count what all ranks send over the loopback device; for a namespace of one's own.

    Returns:
        `bytes` with TCP's headers and answers; numbers of trained parameters of the `student` and
        of the `projectors`.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        _process_group()
        dist.barrier()
    before = _sent_over_loopback()
    cfg = load_cfg(DictDefault(config))
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    model, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=meta)
    if several:
        dist.barrier()
    found = _sent_over_loopback() - before
    sidecar = getattr(trainer, "projectors", None)
    return {
        "bytes": found,
        "student": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "projectors": sum(p.numel() for p in sidecar.parameters()) if sidecar else 0,
    }


def _sent_over_loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise ValueError("there is no loopback device in /proc/net/dev")
