"""What a training has recorded of its virtual attention.

Knows records; nothing of pages or pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from axolotl_dskd.evaluation.record import RECORD, read_record


@dataclass(frozen=True)
class Moment:
    """Attention after an optimizer step.

    Attributes:
        step: its number.
        strength: λ, how far attention scales blocks in the next step.
        alpha: [K, n] attention of each group.
        entropy: its mean over groups, 0 to 1.
    """

    step: int
    strength: float
    alpha: np.ndarray
    entropy: float


@dataclass(frozen=True)
class Margins:
    """Where margins on held-out rows came from, after an optimizer step.

    Attributes:
        step: its number.
        shares: [K, n] mean part of each block in the margins of a group's tokens, in logits.
        tokens: [K] how many of each group there were.
    """

    step: int
    shares: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Shown:
    """A training.

    Attributes:
        name: of its folder.
        kd_ratio: of the run; 0: without a teacher.
        settings: its keys of virtual attention, and names, sizes and examples of groups.
        moments: at its logs, by step.
        margins: at its evaluations, by step.
        steps: of the whole training.
        is_named: its name is needed to tell it from another one.
    """

    name: str
    kd_ratio: float
    settings: dict[str, Any]
    moments: list[Moment]
    margins: list[Margins]
    steps: int
    is_named: bool = False

    @property
    def groups(self) -> list[str]:
        """Their names."""
        return self.settings["names"]

    @property
    def label(self) -> str:
        """How pictures call it."""
        text = f"kd_ratio {self.kd_ratio:g}" if self.kd_ratio else "no teacher (kd_ratio 0)"
        return f"{self.name}, {text}" if self.is_named else text

    @property
    def whole(self) -> Moment:
        """The last moment of full strength; the first one where there is none."""
        full = [m for m in self.moments if m.strength >= self.settings["strength"] - 1e-9]
        return full[-1] if full else self.moments[0]

    @property
    def whole_margins(self) -> Margins | None:
        """Of the last evaluation up to that moment, or of the first one after it."""
        before = [m for m in self.margins if m.step <= self.whole.step and m.tokens.any()]
        return before[-1] if before else next((m for m in self.margins if m.tokens.any()), None)


def read(run: Path) -> Shown:
    """What a run has recorded; where it went on from a checkpoint, the steps that count.

    Args:
        run: its output_dir, or its folder in a comparison.

    Raises:
        ValueError: there is no record of virtual attention.
    """
    folder = next((f for f in (run, run / "model") if (f / RECORD).is_file()), run)
    lines = read_record(folder)
    heads = [line for line in lines if "virtual_attention" in line]
    if not heads:
        raise ValueError(
            f"{run} has no record of virtual attention ({RECORD}). Name the output_dir of a "
            "training with `dskd.virtual_attention`, which writes it, or its folder in a "
            "comparison."
        )
    moments: list[Moment] = []
    margins: list[Margins] = []
    steps = 0
    for line in lines:
        if "attention" not in line:
            continue
        found, step = line["attention"], line["step"]
        if "alpha" in found:
            moments = [m for m in moments if m.step < step]
            alpha = np.array(found["alpha"])
            moments.append(Moment(step, found["strength"], alpha, found["entropy"]))
            steps = line["max_steps"]
        else:
            margins = [m for m in margins if m.step < step]
            margins.append(Margins(step, np.array(found["margins"]), np.array(found["tokens"])))
    if not moments:
        raise ValueError(f"{run} logged no step of its training yet (logging_steps).")
    last = heads[-1]
    name = run.resolve().name
    return Shown(name, last["kd_ratio"], last["virtual_attention"], moments, margins, steps)


def check_alike(one: Shown, other: Shown) -> None:
    """Refuse two runs whose attention cannot be compared.

    Raises:
        ValueError: they differ in groups, blocks or length.
    """
    for what in ("names", "sizes", "blocks"):
        ours, theirs = one.settings[what], other.settings[what]
        if ours != theirs:
            raise ValueError(
                f"{one.name} and {other.name} cannot be compared: {what} of their virtual "
                f"attention are {ours} and {theirs}. Train both with the same "
                "`dskd.virtual_attention` and tokenizer."
            )
    if one.steps != other.steps:
        raise ValueError(
            f"{one.name} and {other.name} cannot be compared: they have {one.steps} and "
            f"{other.steps} steps. Train both equally long."
        )


def told_apart(runs: Sequence[Shown], folders: Sequence[Path]) -> list[Shown]:
    """Two runs as they are, or with their names where their teacher's part is the same."""
    if len({run.label for run in runs}) == len(runs):
        return list(runs)
    names = [run.name for run in runs]
    if len(set(names)) < len(runs):
        names = [str(folder) for folder in folders]
    return [replace(run, name=name, is_named=True) for run, name in zip(runs, names, strict=True)]


def specialisation(alpha: np.ndarray) -> np.ndarray:
    """[K] 1 - H_k / log n of each group: 1 where it attends to one block, 0 where to all alike."""
    logs = np.log(np.clip(alpha, 1e-12, None))
    return 1 + (alpha * logs).sum(-1) / np.log(alpha.shape[-1])
