"""What the ranks of `tests.ranks` run. Importing this is what takes half a minute."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import axolotl.cli.config
import axolotl.train
import torch
import torch.distributed as dist
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from transformers import TrainerCallback

import axolotl_dskd.trainer
from axolotl_dskd.trainer import DSKDTrainer


def _on_this_cpu() -> None:
    """Axolotl places the model of local rank r on the accelerator number r; there is none."""
    normalize = axolotl.cli.config.normalize_config

    def normalized(cfg: Any) -> None:
        normalize(cfg)
        cfg.device_map = {"": "cpu"}

    axolotl.cli.config.normalize_config = normalized
    # The jobs of a launch share one process group.
    axolotl.train.cleanup_distributed = lambda: None


_on_this_cpu()


class _Kill(TrainerCallback):
    """Ends this process at once, as a power cut would."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(config: dict[str, Any], kill_at_step: int | None = None) -> dict[str, Any]:
    """`axolotl train`; returns losses, metrics, weights of student and projectors."""
    cfg = load_cfg(DictDefault(config))
    torch.manual_seed(cfg.seed)  # Axolotl seeds later than it makes adapters
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    if kill_at_step is not None:
        original = DSKDTrainer.__init__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.add_callback(_Kill(kill_at_step))

        DSKDTrainer.__init__ = init
    model, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=meta)
    return _outcome(model, trainer)


def _outcome(model: Any, trainer: Any) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "losses": [float(entry["loss"]) for entry in logs],
        "logs": [
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in logs
        ],
        "student": {k: v.detach().clone() for k, v in state.items()},
        "projectors": {k: v.clone() for k, v in trainer.projectors.state_dict().items()},
        "trainer": type(trainer.model_wrapped).__name__,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
    }
