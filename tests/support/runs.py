"""What tests say to a training and read from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def steps(trainer: Any) -> list[dict[str, float]]:
    """The log of each optimizer step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer: Any) -> list[float]:
    """The loss of each optimizer step."""
    return [entry["loss"] for entry in steps(trainer)]


#: Keys of `dskd:` that are not the objective's.
_OUTER = ("teacher", "samples", "kd_ratio", "chunk_tokens", "evaluation")


def dskd(folder: Path, **keys: Any) -> dict[str, Any]:
    """A `dskd:` block with the teacher of `folder`; other keys are dual space's unless `name` says
    otherwise."""
    outer = {key: value for key, value in keys.items() if key in _OUTER}
    objective = {key: value for key, value in keys.items() if key not in _OUTER}
    block = {"teacher": {"base_model": str(folder / "teacher")}, **outer}
    return block | ({"objective": objective} if objective else {})


def objective_of(trainer: Any) -> Any:
    """The objective of a training with one teacher."""
    (objective,) = trainer.objectives.values()
    return objective


def teacher_of(trainer: Any) -> Any:
    """The teacher of a training with one, which has begun."""
    (lesson,) = trainer.distillation.lessons.values()
    return lesson.teacher
