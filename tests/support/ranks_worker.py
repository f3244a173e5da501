"""What the ranks of `tests.support.ranks` run. Importing this is what takes half a minute."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

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
from accelerate.state import AcceleratorState, DistributedType, PartialState
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from axolotl.utils.samplers import multipack
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from axolotl_dskd.cache import files, store
from axolotl_dskd.commands import cli as cache_cli
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.data import DualCollator
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.ranks import gathered, raise_together, whole
from axolotl_dskd.teacher import LiveTeacher, live, load_sharded_teacher
from axolotl_dskd.teacher.cached import identity
from axolotl_dskd.teacher.cached import open as cache_open
from axolotl_dskd.teacher.cached import teacher as cached
from axolotl_dskd.training import sidecar as projector_optimizer
from axolotl_dskd.training.sidecar import ProjectorOptimizer
from axolotl_dskd.training.trainer import DSKDTrainer


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


def _sharding_on_this_cpu() -> None:
    """Accelerate takes up FSDP and DeepSpeed on accelerators only; what follows works on CPUs."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kwargs.get("fsdp_plugin"):
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
        if plugin := kwargs.get("deepspeed_plugin"):
            self.distributed_type = DistributedType.DEEPSPEED
            plugin.set_mixed_precision(self._mixed_precision)
            plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init
    build = ParallelismConfig.build_device_mesh  # Axolotl asks for a mesh of "cuda"
    ParallelismConfig.build_device_mesh = lambda self, _device_type: build(self, "cpu")


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
_sharding_on_this_cpu()
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


def train_in_small_forwards(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`train`, where the teacher reads so few tokens at once that ranks need unlike many turns."""
    live.MAX_TOKENS_PER_FORWARD = tokens
    return train(config)


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


def sharded_teacher(model: str) -> dict[str, Any]:
    """Logits of a teacher that is cut over the ranks, and how much of its layers is here."""
    _process_group()
    config = TeacherConfig(base_model=model, dtype="float32")
    teacher = load_sharded_teacher(config, torch.device("cpu"))
    layers = list(teacher.model.layers.parameters())
    with torch.no_grad():
        logits = teacher(input_ids=torch.arange(3, 19).unsqueeze(0), use_cache=False).logits
    return {
        "logits": logits,
        "share": sum(p.to_local().numel() for p in layers) / sum(p.numel() for p in layers),
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
    sidecar = getattr(trainer, "projectors", None)  # plain fine-tuning has none
    projectors = {} if sidecar is None else {k: v.clone() for k, v in sidecar.state_dict().items()}
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    ids = torch.arange(3, 19).unsqueeze(0)
    with gathered(unwrapped.parameters()), torch.no_grad():
        state = {
            k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
            for k, v in unwrapped.state_dict().items()
        }
        logits = model.eval()(input_ids=ids).logits
    teacher = getattr(getattr(trainer, "teacher", None), "model", None)
    return {
        "teacher_is_sharded": teacher is not None
        and any(isinstance(parameter, DTensor) for parameter in teacher.parameters()),
        "evaluations": [
            {k: float(v) for k, v in entry.items() if k == "eval_loss" or k.startswith("eval_dskd")}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
        "losses": [float(entry["loss"]) for entry in logs],
        "logs": [
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in logs
        ],
        "student": state,
        "projectors": projectors,
        "logits": logits,
        "trainer": type(trainer.model_wrapped).__name__,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
    }


# ---- the teacher's cache -----------------------------------------------------------------------


def cache(arguments: list[str]) -> dict[str, Any]:
    """`axolotl-dskd cache CONFIG.yml …`; returns what went to stdout."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as answer, os.fdopen(os.dup(1)) as before:
        os.dup2(answer.fileno(), 1)
        try:
            cache_cli.main(["cache", *arguments], standalone_mode=False)
        finally:
            sys.stdout.flush()
            os.dup2(before.fileno(), 1)
        answer.seek(0)
        return {"stdout": answer.read().decode()}


def noting_stages(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """A job whose every step of work on the cache is noted in `<folder>/stages` as it begins.

    Syncing takes a while, as on a disk: more moments at which files are half-way.
    """
    notes = os.open(f"{folder}/stages", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(module: Any, name: str, stage: str, slow: float = 0.0) -> None:
        original = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            os.write(notes, f"{stage}\n".encode())
            time.sleep(slow)
            return original(*args, **kwargs)

        setattr(module, name, noted)

    note(cache_open, "teacher_identity", "identity")
    note(identity, "hash_file", "weights", 0.1)
    note(cached.CachedTeacher, "__call__", "step")
    note(importlib.import_module("axolotl_dskd.commands.cache"), "_measure", "measure")
    note(cache_open, "write_tables", "head")
    note(cached.CachedTeacher, "compute", "teacher")
    note(store, "write_shard", "shard")
    note(files.os, "fsync", "sync", 0.03)
    note(cache_open.CacheRun, "end_epoch", "epoch")
    store.SHARD_BYTES = 10_000
    importlib.import_module("axolotl_dskd.teacher.cached.fill")._ROWS_AT_ONCE = 2  # type: ignore[attr-defined]
    os.write(notes, b"begin\n")
    arguments = dict(job)
    return globals()[arguments.pop("do")](**arguments)


def train_counting_loads(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; how often this rank loaded the teacher, for how many samples it ran it, and whether
    it still holds it at the end."""
    loads: list[int] = []
    ran: list[int] = []
    load, run = cache_open.load_teacher, LiveTeacher.__call__

    def loading(*args: Any) -> Any:
        loads.append(1)
        return load(*args)

    def running(self: Any, batch: Any) -> Any:
        ran.append(len(batch.teacher_labels))
        return run(self, batch)

    kept: list[Any] = []
    start = cache_open.CacheRun.start

    def starting(self: Any) -> None:
        kept.append(self.teacher)
        start(self)

    cache_open.load_teacher, LiveTeacher.__call__ = loading, running
    cache_open.CacheRun.start = starting
    try:
        outcome = train(config)
        return {**outcome, "loads": len(loads), "ran": sum(ran), "body": kept[-1].body is not None}
    finally:
        cache_open.load_teacher, LiveTeacher.__call__ = load, run
        cache_open.CacheRun.start = start


def train_where_files_show_late(
    config: dict[str, Any], rank: int, seconds: float, patience: float
) -> dict[str, Any]:
    """As `train_counting_loads`, where a rank sees shards of others some seconds late.

    Args:
        patience: how long ranks that see unlike files wait for them.
    """
    write, listdir, own = store.write_shard, os.listdir, set()

    def writing(*args: Any) -> Any:
        path = write(*args)
        own.add(path.name)
        return path

    def old_or_own(folder: Any) -> list[str]:
        before = time.time_ns() - int(seconds * 1e9)
        return [
            name
            for name in listdir(folder)
            if not store.is_shard(name) or name in own or int(name.split("-")[1]) < before
        ]

    if _rank() == rank:
        store.write_shard, os.listdir = writing, old_or_own
    cache_open._LATE_SECONDS = patience
    try:
        return train_counting_loads(config)
    finally:
        store.write_shard, os.listdir = write, listdir


def train_on_a_full_disk(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """As `train_counting_loads`, where one rank can write no samples."""
    original = store.write_shard

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if _rank() == rank:
        store.write_shard = full
    cache_open._LATE_SECONDS = 0.4
    try:
        return train_counting_loads(config)
    finally:
        store.write_shard = original


def train_on_a_disk_of_its_own(config: dict[str, Any]) -> dict[str, Any]:
    """As `train_counting_loads`, where ranks are on two machines and share no folder."""
    config["dskd"]["teacher"]["cache"]["path"] += f"-{_rank()}"
    cache_open._LATE_SECONDS = 0.4
    return train_counting_loads(config)


def train_where_the_teacher_fails(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """`train`, where one rank cannot load the teacher."""
    original = cache_open.load_teacher

    def failing(*args: Any) -> Any:
        if _rank() == rank:
            raise ValueError("no memory for the teacher")
        return original(*args)

    cache_open.load_teacher = failing
    return train(config)


# ---- interrupted runs and narrow dtypes --------------------------------------------------------


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
        save_file, written = projector_optimizer.save_file, []

        def save(tensors: Any, path: Any) -> None:
            if f"checkpoint-{step}" in Path(path).parts:
                if written:
                    die()
                written.append(path)
            save_file(tensors, path)

        projector_optimizer.save_file = save
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
