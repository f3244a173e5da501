"""What happens beside the student's own steps: the projectors' updates and the teacher's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from axolotl_dskd.teacher import CacheRun

if TYPE_CHECKING:
    from axolotl_dskd.training.trainer import DSKDTrainer


class StepProjectors(TrainerCallback):
    """Updates the projectors together with the student."""

    def __init__(self, trainer: DSKDTrainer) -> None:
        self.trainer = trainer
        self.schedule_factor = 1.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Training may begin again after running out of memory (auto_find_batch_size)."""
        assert self.trainer.projector_optimizer is not None
        self.trainer.projector_optimizer.adamw.zero_grad(set_to_none=True)
        self.trainer.begin()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the first micro-batch: DeepSpeed moves the schedule on within the backward."""
        group = self.trainer.optimizer.param_groups[0]
        # A scheduler that notes no initial rate (reduce_lr_on_plateau) starts from the configured.
        initial = group.get("initial_lr") or self.trainer.args.learning_rate
        self.schedule_factor = float(group["lr"] / initial) if initial else 1.0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After backward of the last micro-batch, before the student's optimizer steps."""
        assert self.trainer.projector_optimizer is not None
        warming_up = self.trainer.projectors_warm_up
        if warming_up:  # an optimizer leaves parameters without gradient as they are
            for parameter in self.trainer.model.parameters():
                parameter.grad = None
        self.trainer.projector_optimizer.step(
            schedule_factor=1.0 if warming_up else self.schedule_factor,
            loss_scale=self.trainer.loss_scale,
            scaler=self.trainer.accelerator.scaler,
        )


class KeepTeacherCache(TrainerCallback):
    """Writes what the epoch has computed, and frees the teacher once everything is cached."""

    def __init__(self, run: CacheRun) -> None:
        self.run = run

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step of an epoch, before the next one's data workers start."""
        self.run.end_epoch(more=state.global_step < state.max_steps)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Also where training stops within an epoch."""
        self.run.teacher.store.flush()
