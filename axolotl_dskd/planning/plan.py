"""The nouns of the memory plan: what is planned for, and the bytes that are found.

Knows configurations and numbers; nothing of how they are found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.objectives import Objective
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.virtual_attention import VirtualAttention


@dataclass(frozen=True)
class BatchShape:
    """The largest batch of one process and one micro-step.

    Attributes:
        rows, length: of the student's input; `samples` in it (more than rows where packed).
        supervised: student tokens that are trained on.
        teacher_length: longest teacher side of a sample; `teacher_supervised` in the whole batch.
        padded: rows carry a padding mask.
    """

    rows: int
    length: int
    samples: int
    supervised: int
    teacher_length: int
    teacher_supervised: int
    padded: bool


@dataclass(frozen=True)
class PlannedRun:
    """What the plan depends on beside the two models.

    Attributes:
        cfg: Axolotl's validated configuration.
        teacher: the teacher's keys.
        batch: the largest one.
        objective: as the trainer builds it, not begun.
        on_gpu: whether it is a GPU that is planned for.
        attention: makes virtual attention for a student's head, or None.
        kept: most teacher tokens of kept answers, and bytes of the host's memory in which what the
            teacher says of them stays; None: nothing does.
        writing: [rows, tokens] of prompts and answers that the student writes at once; None: it
            does not write in this process.
        comparison: of student and teacher, where evaluations alone ask the teacher.
        writes: the student writes what the teacher then reads.
        mixes: the teacher takes part in drawing what the student writes.
    """

    cfg: Any
    teacher: TeacherConfig
    batch: BatchShape
    objective: Objective[Any]
    on_gpu: bool
    attention: Callable[[OutputHead], VirtualAttention] | None = None
    writing: tuple[int, int] | None = None
    comparison: TeacherAgreement | None = None
    kept: tuple[int, int] | None = None
    writes: bool = False
    mixes: bool = False

    @property
    def layers_are_loaded(self) -> bool:
        """Whether the teacher's layers are in memory: also a cached one's, where steps have text
        that no cache has seen."""
        return self.teacher.server is None and (self.teacher.layers_are_loaded or self.writes)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of mixed precision, if any."""
        return torch.bfloat16 if self.cfg.bf16 else torch.float16 if self.cfg.fp16 else None

    @property
    def optimizer(self) -> str:
        """Axolotl's name of it."""
        return str(getattr(self.cfg.optimizer, "value", self.cfg.optimizer) or "adamw_torch_fused")


@dataclass
class Plan:
    """Bytes of one process.

    Attributes:
        held: what stays during all of training, by name.
        phases: what each phase of a step (and the start) has on top at its own fullest moment.
        notes: what is assumed, in words.
        on_host: of a GPU's process, what stays in the host's memory beside it.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    on_host: int = 0

    @property
    def peak_phase(self) -> str:
        """The phase with the fullest moment."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def at_peak(self) -> dict[str, int]:
        """Every part of the fullest moment."""
        return {k: v for k, v in {**self.held, **self.phases[self.peak_phase]}.items() if v}

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.at_peak.values())


#: What of a plan each of several teachers has of its own; the rest is the student's.
_OF_A_TEACHER = (
    "projectors with their optimizer",
    "teacher layers",
    "teacher embedding and head",
)


def of_all_teachers(plans: Sequence[Plan]) -> Plan:
    """The plan of a run with several teachers, as if a whole batch asked the largest of them.

    Args:
        plans: with each of them alone.
    """
    first = plans[0]
    held = {
        name: (sum if name in _OF_A_TEACHER else max)(plan.held[name] for plan in plans)
        for name in first.held
    }
    names = dict.fromkeys(name for plan in plans for name in plan.phases)
    phases = {
        name: max(
            (plan.phases[name] for plan in plans if name in plan.phases),
            key=lambda parts: sum(parts.values()),
        )
        for name in names
    }
    notes = list(dict.fromkeys(note for plan in plans for note in plan.notes))
    return Plan(held, phases, notes, max(plan.on_host for plan in plans))
