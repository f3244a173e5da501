"""Trainings in narrow dtypes, and with gradients that are not finite."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from transformers import Trainer

from axolotl_dskd.training.sidecar import Sidecar
from tests.support.jobs.common import this_rank, wrapped
from tests.support.jobs.registry import job
from tests.support.jobs.training import train


@job
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
    steps: list[list[float]] = []

    def create(original: Any, trainer: Any) -> None:
        original(trainer)
        if precision == "fp16":
            AcceleratorState._shared_state["_mixed_precision"] = precision
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def step(original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        before = [p.detach().clone() for p in optimizer.modules[""].parameters()]
        if len(steps) + 1 == spoilt:
            optimizer.modules[""].t2s.weight.grad[0, 0] = float("inf")
        original(optimizer, *args, **kwargs)
        after = optimizer.modules[""].parameters()
        moved = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        steps.append([0.0, float(moved), 0.0])

    def student_step(original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        if optimizer.gradient_state.sync_gradients:
            steps[-1][0] = float(not optimizer.step_was_skipped)
            steps[-1][2] = optimizer.scaler.get_scale() if optimizer.scaler else 1.0

    try:
        with (
            wrapped(Trainer, "create_accelerator_and_postprocess", create),
            wrapped(Sidecar, "step", step),
            wrapped(AcceleratedOptimizer, "step", student_step),
        ):
            return train(config) | {"steps": steps}
    finally:
        AcceleratorState._reset_state()


@job
def train_spoilt(config: dict[str, Any], rank: int, step: int) -> dict[str, Any]:
    """`train`, where one rank's gradient of a projector is not finite in one step."""
    seen = [0]

    def spoil(original: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        seen[0] += 1
        if this_rank() == rank and seen[0] == step:
            optimizer.modules[""].t2s.weight.grad[0, 0] = float("nan")
        original(optimizer, *args, **kwargs)

    with wrapped(Sidecar, "step", spoil):
        return train(config)
