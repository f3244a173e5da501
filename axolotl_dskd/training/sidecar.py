"""What is trained beside the student: its optimizer, and its part of a checkpoint.

A module of the objective's own must not be a part of the student: exports would carry it, sharding
would cut it. Knows a module, gradients and files; nothing of models, tokens or losses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from axolotl_dskd.objectives.base import Beside
from axolotl_dskd.ranks import average_over_ranks, raise_together, share_first

_FOLDER = "dskd"
_WEIGHTS, _OPTIMIZER, _OBJECTIVE = "module.safetensors", "optimizer.safetensors", "objective.json"
#: What the Trainer writes into a checkpoint last.
_LAST_FILE = "trainer_state.json"


class Sidecar:
    """Trains an objective's modules, one for each teacher that has one, and keeps them in
    checkpoints; without a module it notes in checkpoints which objective wrote them.

    float32 AdamW that follows the student's learning-rate schedule: gradients are averaged over
    ranks, clipped to the same norm as the student's, and the learning rate is a module's own
    times the factor by which the schedule scales the student's.

    Args:
        objective: its name.
        modules: by the teacher's name, which is empty where there is one teacher, or
            `virtual_attention`. Their parameters and buffers start alike on every rank: rank 0's
            are taken.
        beside: how each is optimised; those with `warmup_steps` train alone at first.
        max_grad_norm: the student's, for each of them.
    """

    def __init__(
        self,
        objective: str,
        modules: Mapping[str, nn.Module],
        beside: Mapping[str, Beside],
        *,
        max_grad_norm: float,
    ) -> None:
        self.objective = objective
        #: By what the names of its tensors begin with.
        self.modules = {f"{name}." if name else "": module for name, module in modules.items()}
        self.warmup_steps = max((way.warmup_steps for way in beside.values()), default=0)
        self.max_grad_norm = max_grad_norm
        self._parameters: dict[str, nn.Parameter] = {}
        groups = []
        for prefix, (name, module) in zip(self.modules, modules.items(), strict=True):
            named = {f"{prefix}{key}": value for key, value in module.named_parameters()}
            self._parameters |= named
            if named:
                way = beside[name]
                group = {"params": list(named.values()), "lr": way.learning_rate}
                group |= {"own_lr": way.learning_rate, "is_first": way.warmup_steps > 0}
                groups.append({**group, "weight_decay": way.weight_decay})
        self.adamw = torch.optim.AdamW(groups) if groups else None
        share_first(tensor.data for tensor in self.tensors(keep_vars=True).values())

    def tensors(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {
            f"{prefix}{name}": tensor
            for prefix, module in self.modules.items()
            for name, tensor in module.state_dict(keep_vars=keep_vars).items()
        }

    @staticmethod
    def folder(checkpoint: str | Path) -> Path:
        """Our part of a checkpoint."""
        return Path(checkpoint) / _FOLDER

    def is_alone(self, step: int) -> bool:
        """Whether the modules train alone at this step."""
        return step < self.warmup_steps

    def forget_gradients(self) -> None:
        """Drop what was accumulated."""
        for module in self.modules.values():
            module.zero_grad(set_to_none=True)

    def step(
        self,
        schedule_factor: float,
        loss_scale: float = 1.0,
        scaler: torch.amp.GradScaler | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """One update from the accumulated gradients, which are cleared.

        Under float16 a step whose gradients are not finite is skipped, as the student's is.

        Args:
            schedule_factor: the student's current learning rate over its initial one.
            loss_scale: what the loss was multiplied by before backward, where `scaler` is not
                what did it.
            scaler: the student's, before its `update`: gradients are divided by its scale, and it
                lowers the scale where they overflow, also if the student's do not.
            alone: what has warm-up steps trains, at its full rate, and nothing else does.
        """
        if self.adamw is None:
            return
        gradients, finite = self._averaged(loss_scale)
        if scaler is not None:  # after averaging: every rank finds the same
            scaler.unscale_(self.adamw)
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self._apply(self.adamw, schedule_factor, alone)
        elif loss_scale == 1.0 and scaler is None:
            self._refuse(self.adamw, finite)
        self.forget_gradients()

    def _averaged(self, loss_scale: float) -> tuple[list[Tensor], Tensor]:
        """All gradients, now the ranks' mean; and [k] bool, which of this rank's were finite: read
        where one is not, or the host would wait for a GPU once more."""
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:  # a rank may see no supervised token
                parameter.grad = torch.zeros_like(parameter)
            if loss_scale != 1.0:
                parameter.grad.div_(loss_scale)
            gradients.append(parameter.grad)
        finite = torch.stack([gradient.sum() for gradient in gradients]).isfinite()
        average_over_ranks(gradients)
        return gradients, finite

    def _apply(self, adamw: torch.optim.AdamW, schedule_factor: float, alone: bool) -> None:
        """One update from finite gradients."""
        for group in adamw.param_groups:
            if self.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
            factor = float(group["is_first"]) if alone else schedule_factor
            group["lr"] = group["own_lr"] * factor
        adamw.step()

    def _refuse(self, adamw: torch.optim.AdamW, finite: Tensor) -> NoReturn:
        """Stop every rank: they are all here, since it is the average that is not finite."""
        flags = zip(self._parameters, finite.tolist(), strict=True)
        not_finite = [name for name, is_finite in flags if not is_finite]
        where = f" ({', '.join(not_finite)})" if not_finite else ""
        first = next(iter(self._parameters.values()))
        taken = int(adamw.state[first].get("step", 0))
        problem = (
            f"the gradients of what {self.objective} trains beside the student{where} are not "
            f"finite at step {taken + 1} although the loss is. Lower its learning rate "
            "(dskd.objective.projector.learning_rate; of virtual_attention: "
            "dskd.virtual_attention.learning_rate) or the student's learning_rate."
        )
        raise_together(problem if not_finite else None, first.device)
        raise ValueError(problem)  # finite on every rank, their sum is not

    def save(self, checkpoint: str | Path) -> None:
        """Write `<checkpoint>/dskd/`: weights and optimizer state as safetensors, and whose they
        are."""
        folder = Path(checkpoint) / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        _write(self.tensors(), folder / _WEIGHTS)
        state = {}
        if self.adamw is not None:
            state = {
                f"{name}.{key}": value
                for name, parameter in self._parameters.items()
                for key, value in self.adamw.state[parameter].items()
            }
        _write(state, folder / _OPTIMIZER)
        part = folder / f"{_OBJECTIVE}.part"
        part.write_text(json.dumps({"objective": self.objective}) + "\n")
        part.replace(folder / _OBJECTIVE)

    def load(self, checkpoint: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the checkpoint has no such part, a damaged one, or another run's.
        """
        check_checkpoint(checkpoint)
        folder = Path(checkpoint) / _FOLDER
        try:
            weights, state = load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER)
            written_by = json.loads((folder / _OBJECTIVE).read_text())["objective"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the objective's part in {folder} is damaged ({error}). "
                f"{_other_checkpoint(checkpoint)}"
            ) from error
        ours = {name: tuple(t.shape) for name, t in self.tensors().items()}
        theirs = {name: tuple(t.shape) for name, t in weights.items()}
        if (written_by, theirs) != (self.objective, ours):
            raise ValueError(
                f"what the objective trains in {folder} does not fit this run: found "
                f"{written_by} with {theirs}, need {self.objective} with {ours}. Teachers, student "
                "and objective must be those of the interrupted run."
            )
        for prefix, module in self.modules.items():
            own = module.state_dict()
            module.load_state_dict({name: weights[f"{prefix}{name}"] for name in own})
        for name, parameter in self._parameters.items():
            prefix = f"{name}."
            assert self.adamw is not None
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
        ValueError: it was written without distillation, or its writing was interrupted.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {path}. Correct the path.")
    files = [path / _FOLDER / name for name in (_WEIGHTS, _OPTIMIZER, _OBJECTIVE)]
    missing = [file for file in files if not file.exists()]
    whole = (path / _LAST_FILE).exists()
    if whole and len(missing) == len(files):
        raise ValueError(
            f"{path} cannot be resumed as a distillation: it has no folder "
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
