"""The nouns of the memory plan: what is planned for, and the bytes that are found.

Knows numbers; nothing of how they are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Card:
    """What is planned for: a GPU's memory, or this machine's."""

    name: str
    memory: int
    gpu: bool

    @property
    def device(self) -> torch.device:
        """The device that it stands for, which need not be here."""
        return torch.device("cuda" if self.gpu else "cpu")


class RowSize(NamedTuple):
    """Tokens of a row with two sides, and those of them that are trained on."""

    length: int
    supervised: int
    teacher_length: int
    teacher_supervised: int


class BatchShape(NamedTuple):
    """The largest batch of one process and one micro-step.

    Attributes:
        rows, length: of the student's input; `samples` in it (more than rows where packed).
        supervised: student tokens that are trained on.
        teacher_length: longest teacher side of a sample; `teacher_supervised` in the whole batch.
        padded: rows carry a padding mask.
        words: all that matters of it, and what it was taken from.
    """

    rows: int
    length: int
    samples: int
    supervised: int
    teacher_length: int
    teacher_supervised: int
    padded: bool
    words: str


@dataclass(frozen=True)
class Step:
    """One change of the configuration on the way to less memory: what it is, and what is left."""

    change: str
    total: int
    saves: int
    cost: str


#: What of a plan each of several teachers has of its own; the rest is the student's.
_OF_A_TEACHER = (
    "projectors with their optimizer",
    "teacher layers",
    "teacher embedding and head",
)


@dataclass(frozen=True)
class Plan:
    """Bytes of one process, against a card.

    Attributes:
        card: the card's bytes, and `card_name`, what it is.
        batch: the largest one, in words.
        held: part -> what stays during all of training.
        on_top: phase of a step (or the start) -> part -> what is there too at its fullest moment.
        on_host: of a GPU's process, what stays in the host's memory beside it.
        notes: what is assumed, in words.
        steps: changes, each on top of those before it, until it fits.
    """

    card: int
    card_name: str
    batch: str
    held: dict[str, int]
    on_top: dict[str, dict[str, int]]
    on_host: int = 0
    notes: Sequence[str] = ()
    steps: Sequence[Step] = ()

    @property
    def phases(self) -> dict[str, int]:
        """Phase -> bytes in all at that phase's fullest moment."""
        held = sum(self.held.values())
        return {name: held + sum(parts.values()) for name, parts in self.on_top.items()}

    @property
    def peak_phase(self) -> str:
        """The phase with the fullest moment."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def at_peak(self) -> dict[str, int]:
        """Part -> bytes at the fullest moment."""
        return {k: v for k, v in {**self.held, **self.on_top[self.peak_phase]}.items() if v}

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest moment is smaller than the card."""
        return self.total <= self.card


def of_all_teachers(plans: Sequence[Plan]) -> Plan:
    """The plan of a run with several teachers, as if whole batches asked the one that takes most.

    Args:
        plans: with each of them alone.
    """
    held = {name: sum(plan.held[name] for plan in plans) for name in _OF_A_TEACHER}
    together = (replace(plan, held={**plan.held, **held}) for plan in plans)
    return replace(
        max(together, key=lambda plan: plan.total), on_host=max(plan.on_host for plan in plans)
    )
