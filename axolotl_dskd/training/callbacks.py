"""What happens beside the student's own steps. Each callback is told what it needs, no more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from axolotl_dskd.teacher import Teacher
from axolotl_dskd.training.sidecar import Sidecar


class Begin(TrainerCallback):
    """Calls a function when training begins, maybe again (auto_find_batch_size)."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first step."""
        self.begin()


class EndStep(TrainerCallback):
    """Calls a function after every optimizer step, before anything of it is logged or saved."""

    def __init__(self, end_step: Callable[[], None]) -> None:
        self.end_step = end_step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """On every rank, also where mixed precision has skipped the update."""
        self.end_step()


class RemoveAtEnd(TrainerCallback):
    """Removes a folder that only the steps of a training need, when it has ended well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        """On the first rank."""
        if args.process_index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


class StepSidecar(TrainerCallback):
    """Updates what is trained beside the student together with it.

    Args:
        sidecar: whose module it is.
        scaler: the student's gradient scaler of this moment, or None.
        loss_scale: what the loss of the current step was multiplied by, where no scaler did it.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        *,
        scaler: Callable[[], Any],
        loss_scale: Callable[[], float],
    ) -> None:
        self.sidecar = sidecar
        self.scaler = scaler
        self.loss_scale = loss_scale
        self.schedule_factor = 1.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """What an attempt that ran out of memory has left is dropped."""
        self.sidecar.forget_gradients()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first micro-batch: DeepSpeed moves the schedule on within the backward."""
        group = kwargs["optimizer"].param_groups[0]
        # one_cycle begins at a part of its highest rate, which is the configured one; a scheduler
        # that notes no initial rate (reduce_lr_on_plateau) starts from that.
        full = group.get("max_lr") or group.get("initial_lr") or args.learning_rate
        self.schedule_factor = float(group["lr"] / full) if full else 1.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After backward of the last micro-batch, before the student's optimizer steps."""
        alone = self.sidecar.is_alone(state.global_step)
        if alone:  # an optimizer leaves parameters without gradient as they are
            for parameter in kwargs["model"].parameters():
                parameter.grad = None
        self.sidecar.step(
            schedule_factor=self.schedule_factor,
            loss_scale=self.loss_scale(),
            scaler=self.scaler(),
            alone=alone,
        )


class TeacherEpochs(TrainerCallback):
    """Tells the teacher where epochs and training end."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step of an epoch, before the next one's data workers start."""
        goes_on = state.global_step < state.max_steps and not control.should_training_stop
        self.teacher.end_epoch(more=goes_on)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Also where training stops within an epoch."""
        self.teacher.end()
