"""What a process that runs Axolotl in tests changes about the libraries, for as long as it lives.

These are the only patches that nobody undoes: what Axolotl and its libraries expect of a machine
with accelerators, and what costs seconds in every training and is no part of what tests ask.
Everything else is patched by the job or the test that needs it and put back after it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from unittest import mock


def prepare_ranks() -> None:
    """For the fork server of `tests.support.ranks`, and thereby for every rank."""
    run_on_this_cpu()
    shard_on_this_cpu()
    handle_datasets_in_this_process()
    make_configuration_classes_once()
    read_versions_once()
    import_and_compile_ahead()
    leave_imports_to_no_collection()


@cache
def prepare_to_train_here() -> None:
    """For pytest's own process, before its first training."""
    import axolotl.core.builders
    import axolotl.train  # noqa: F401

    make_configuration_classes_once()
    read_versions_once()
    leave_imports_to_no_collection()


def handle_datasets_in_this_process() -> None:
    """`datasets` otherwise starts a process to map, filter or write a data set, also where one is
    all that was asked for, and for sixteen rows."""
    import datasets

    def without_another_process(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def here(*args: Any, num_proc: int | None = None, **kwargs: Any) -> Any:
            return method(*args, num_proc=None if num_proc == 1 else num_proc, **kwargs)

        return here

    for name in ("map", "filter", "save_to_disk"):
        setattr(datasets.Dataset, name, without_another_process(getattr(datasets.Dataset, name)))


@cache
def make_configuration_classes_once() -> None:
    """Axolotl otherwise joins its hundreds of keys with those of plugins anew for each
    configuration, which takes as long as two steps of a tiny training."""
    import axolotl.utils.config
    from axolotl.integrations.base import PluginManager

    join = axolotl.utils.config.merge_input_args
    joined = cache(lambda plugins: join())

    def made_once() -> Any:
        return joined(tuple(PluginManager.get_instance().get_input_args()))

    axolotl.utils.config.merge_input_args = made_once


@cache
def read_versions_once() -> None:
    """Libraries ask each other's versions again and again, by parsing files as e-mails."""
    for name in ("metadata", "version"):
        setattr(importlib.metadata, name, cache(getattr(importlib.metadata, name)))


def forget_the_last_training() -> None:
    """A process is meant for one training: Axolotl refuses DeepSpeed where accelerate has been set
    up, and accelerate remembers how."""
    import axolotl.utils.distributed
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    axolotl.utils.distributed.distributed_state = None
    leave_imports_to_no_collection()


def leave_imports_to_no_collection() -> None:
    """Axolotl collects garbage several times a training, a second each over a million objects of
    imports that live as long as the process."""
    gc.collect()
    gc.freeze()


def run_on_this_cpu() -> None:
    """Axolotl places the model of local rank r on the accelerator number r; there is none."""
    import axolotl.cli.config
    import axolotl.train
    import axolotl.utils.environment
    import torch
    import transformers.training_args

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


def shard_on_this_cpu() -> None:
    """Accelerate takes up FSDP and DeepSpeed on accelerators only; what follows works on CPUs."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, DistributedType, PartialState

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
    # Otherwise DeepSpeed compiles a reduction over shared memory first, minutes of C++; where that
    # is killed, it leaves a lock for which all later ones wait. By its name as a module: as an
    # attribute, `deepspeed.comm.torch` is torch itself.
    backend = importlib.import_module("deepspeed.comm.torch")
    assert hasattr(backend, "build_shm_op")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    build = ParallelismConfig.build_device_mesh  # Axolotl asks for a mesh of "cuda"
    ParallelismConfig.build_device_mesh = lambda self, _device_type: build(self, "cpu")


def import_and_compile_ahead() -> None:
    """What every forked rank would otherwise import or compile anew (5 to 10 s a rank)."""
    import axolotl.utils.config
    import numpy as np
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.samplers import multipack

    from axolotl_dskd.plugin import DSKDPlugin

    for module in (
        "axolotl.core.builders",
        "axolotl.monkeypatch.lora_kernels",
        "axolotl.prompt_strategies.chat_template",
        "transformers.models.llama.modeling_llama",
    ):
        importlib.import_module(module)
    with mock.patch.object(
        PluginManager, "get_input_args", lambda _: [DSKDPlugin().get_input_args()]
    ):
        axolotl.utils.config.merge_input_args()
    lengths = np.arange(1, 9)
    multipack.pack_parallel(lengths, 16, 100, 8, num_processes=1)
    multipack.allocate_sequentially(lengths, 0, 16, 1)
