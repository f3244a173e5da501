"""The optimizer that trains the projectors beside the student's own, and their checkpoints.

Knows projectors, gradients and files; nothing of models, tokens or losses.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.ranks import average_over_ranks, raise_together, share_first

_FOLDER, _WEIGHTS, _OPTIMIZER = "dskd", "projectors.safetensors", "projector_optimizer.safetensors"
#: What the Trainer writes into a checkpoint last.
_LAST_FILE = "trainer_state.json"


class ProjectorOptimizer:
    """float32 AdamW over the projectors that follows the student's learning-rate schedule.

    Gradients are averaged over ranks, clipped to the same norm as the student's, and the learning
    rate is `learning_rate` times the factor by which the schedule scales the student's.
    """

    def __init__(
        self,
        projectors: Projectors,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self.projectors = projectors
        self.learning_rate = learning_rate
        self.max_grad_norm = max_grad_norm
        self.adamw = torch.optim.AdamW(
            projectors.parameters(), lr=learning_rate, weight_decay=weight_decay
        )
        share_first(parameter.data for parameter in projectors.parameters())

    def step(
        self,
        schedule_factor: float,
        loss_scale: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """One update from the accumulated gradients, which are cleared.

        Under float16 a step whose gradients are not finite is skipped, as the student's is.

        Args:
            schedule_factor: the student's current learning rate over its initial one.
            loss_scale: what the loss was multiplied by before backward, where `scaler` is not
                what did it.
            scaler: the student's, before its `update`: gradients are divided by its scale, and it
                lowers the scale where they overflow, also if the student's do not.
        """
        gradients, not_finite = [], []
        for name, parameter in self.projectors.named_parameters():
            if parameter.grad is None:  # a rank may see no supervised token
                parameter.grad = torch.zeros_like(parameter)
            if loss_scale != 1.0:
                parameter.grad.div_(loss_scale)
            gradients.append(parameter.grad)
            if not torch.isfinite(parameter.grad.sum()):
                not_finite.append(name)
        average_over_ranks(gradients)
        if scaler is not None:  # after averaging: every rank finds the same
            scaler.unscale_(self.adamw)
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm):
            if self.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(
                    self.projectors.parameters(), self.max_grad_norm, norm
                )
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate * schedule_factor
            self.adamw.step()
        elif loss_scale == 1.0 and scaler is None:
            # Every rank is here: it is the average that is not finite.
            where = f" ({', '.join(not_finite)})" if not_finite else ""
            taken = self.adamw.state[next(self.projectors.parameters())].get("step", 0)
            problem = (
                f"the projectors' gradients{where} are not finite at step {int(taken) + 1} "
                "although the loss is. Lower dskd.projector.learning_rate or the student's "
                "learning_rate."
            )
            raise_together(problem if not_finite else None, gradients[0].device)
            raise ValueError(problem)  # finite on every rank, their sum is not
        self.adamw.zero_grad(set_to_none=True)

    def save(self, checkpoint: str | Path) -> None:
        """Write `<checkpoint>/dskd/`: weights and optimizer state, as safetensors."""
        folder = Path(checkpoint) / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        _write(self.projectors.state_dict(), folder / _WEIGHTS)
        state = {
            f"{name}.{key}": value
            for name, parameter in self.projectors.named_parameters()
            for key, value in self.adamw.state[parameter].items()
        }
        _write(state, folder / _OPTIMIZER)

    def load(self, checkpoint: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the checkpoint has no projectors, damaged ones, or others than this run's.
        """
        check_checkpoint(checkpoint)
        folder = Path(checkpoint) / _FOLDER
        try:
            weights, state = load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER)
        except SafetensorError as error:
            raise ValueError(
                f"the projectors in {folder} are damaged ({error}). {_other_checkpoint(checkpoint)}"
            ) from error
        ours = {name: tuple(t.shape) for name, t in self.projectors.state_dict().items()}
        theirs = {name: tuple(t.shape) for name, t in weights.items()}
        if ours != theirs:
            raise ValueError(
                f"the projectors in {folder} do not fit this run: found {theirs}, need {ours}. "
                "Teacher, student and alignment must be those of the interrupted run."
            )
        self.projectors.load_state_dict(weights)
        for name, parameter in self.projectors.named_parameters():
            prefix = f"{name}."
            self.adamw.state[parameter] = {
                key.removeprefix(prefix): value.to(
                    "cpu" if key == f"{prefix}step" else parameter.device
                )
                for key, value in state.items()
                if key.startswith(prefix)
            }


def check_checkpoint(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that a distillation cannot go on from; reads no weights.

    Raises:
        ValueError: it was written without projectors, or its writing was interrupted.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {path}. Correct the path.")
    files = [path / _FOLDER / name for name in (_WEIGHTS, _OPTIMIZER)]
    missing = [file for file in files if not file.exists()]
    whole = (path / _LAST_FILE).exists()
    if whole and len(missing) == len(files):
        raise ValueError(
            f"{path} cannot be resumed as a distillation: it has no projectors in "
            f"{path / _FOLDER}. It was written without `dskd:` (or with save_only_model). Start "
            "from it as `base_model:` instead of `resume_from_checkpoint:`."
        )
    if missing or not whole:
        first = missing[0] if missing else path / _LAST_FILE
        raise ValueError(
            f"{path} is not complete ({first.relative_to(path)} is missing): the run that wrote it "
            f"was interrupted. {_other_checkpoint(path)}"
        )


def _other_checkpoint(checkpoint: str | Path) -> str:
    """What to do about a checkpoint that is of no use."""
    path = Path(checkpoint)

    def number(folder: Path) -> int:
        digits = folder.name.removeprefix("checkpoint-")
        return int(digits) if digits.isdigit() else -1

    before = [
        folder
        for folder in path.parent.glob("checkpoint-*")
        if 0 <= number(folder) < number(path) and (folder / _LAST_FILE).exists()
    ]
    if not before:
        return "Delete it; there is no checkpoint before it, so start anew."
    return f"Delete it and resume from {max(before, key=number)}, the one before it."


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Under another name first: a process that dies leaves no half of a file."""
    part = path.with_suffix(".part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part)
    part.replace(path)
