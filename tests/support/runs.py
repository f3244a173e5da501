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


def dskd(folder: Path, **block: Any) -> dict[str, Any]:
    """A `dskd:` block with the teacher of `folder`."""
    return {"teacher": {"base_model": str(folder / "teacher")}, **block}
