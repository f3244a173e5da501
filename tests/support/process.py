"""What a process that runs Axolotl in tests changes about the libraries, for as long as it lives.

These are the only patches that nobody undoes: what Axolotl and its libraries expect of a machine
with accelerators, and what costs seconds in every training and is no part of what tests ask.
Everything else is patched by the job or the test that needs it and put back after it.
"""

from __future__ import annotations

import gc
import os
from functools import cache
from typing import Any


def prepare_ranks() -> None:
    """For the fork server of `tests.support.ranks`, and thereby for every rank."""
    run_on_this_cpu()
    shard_on_this_cpu()
    save_datasets_in_this_process()
    import_and_compile_ahead()
    leave_imports_to_no_collection()


@cache
def prepare_to_train_here() -> None:
    """For pytest's own process, before its first training."""
    import axolotl.core.builders
    import axolotl.train  # noqa: F401

    leave_imports_to_no_collection()


def save_datasets_in_this_process() -> None:
    """`datasets` otherwise starts an interpreter for each data set that it writes, also for one
    of sixteen rows."""
    import datasets

    save = datasets.Dataset.save_to_disk

    def save_here(self: Any, path: Any, num_proc: Any = None, **kwargs: Any) -> None:
        save(self, path, **kwargs)

    datasets.Dataset.save_to_disk = save_here


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
    build = ParallelismConfig.build_device_mesh  # Axolotl asks for a mesh of "cuda"
    ParallelismConfig.build_device_mesh = lambda self, _device_type: build(self, "cpu")


def import_and_compile_ahead() -> None:
    """What every forked rank would otherwise import or compile anew (5 to 10 s a rank)."""
    import importlib

    import numpy as np
    from axolotl.utils.samplers import multipack

    for module in ("axolotl.core.builders", "axolotl.prompt_strategies.chat_template"):
        importlib.import_module(module)
    lengths = np.arange(1, 9)
    multipack.pack_parallel(lengths, 16, 100, 8, num_processes=1)
    multipack.allocate_sequentially(lengths, 0, 16, 1)
