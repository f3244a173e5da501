"""Trainings that are killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from axolotl_dskd.training import sidecar
from axolotl_dskd.training.trainer import DSKDTrainer
from tests.support.jobs.common import this_rank, wrapped
from tests.support.jobs.registry import job
from tests.support.jobs.training import train


@job
def train_and_die(config: dict[str, Any], step: int, saving: bool, rank: int = 0) -> None:
    """`train`, killed as a machine's failure would: no exception, nothing is cleaned up.

    Args:
        step: optimizer step in which `rank` dies.
        saving: while it writes this step's checkpoint, between the projectors' two files; else in
            the forward.
    """
    written: list[Any] = []

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save(original: Any, tensors: Any, path: Any) -> None:
        if f"checkpoint-{step}" in Path(path).parts:
            if written:
                die()
            written.append(path)
        original(tensors, path)

    def compute_loss(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step - 1 and this_rank() == rank:
            die()
        return original(trainer, *args, **kwargs)

    with (
        wrapped(sidecar, "save_file", save)
        if saving
        else wrapped(DSKDTrainer, "compute_loss", compute_loss)
    ):
        train(config)
