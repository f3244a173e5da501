"""The distillation metrics of a logging window. Knows sums and ranks; nothing of models."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_dskd.ranks import sum_over_ranks
from axolotl_dskd.types import LossOutput

#: Per-token values that the loss reports (`dual_space_loss`).
TERMS = (
    "ce",
    "student_space",
    "projector_ce",
    "teacher_space",
    "projector_accuracy",
    "teacher_accuracy",
    "aligned",
)


class MetricSums:
    """Term sums and token counts since the last log, divided once, over all ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.student_tokens = 0
        self.teacher_tokens = 0

    def add(self, out: LossOutput) -> None:
        """Count one batch in."""
        for name, value in out.sums().items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
        self.student_tokens += out.student_tokens
        self.teacher_tokens += out.teacher_tokens

    def means(self, device: torch.device) -> dict[str, float]:
        """Every term per supervised *student* token, as it enters the loss, except
        `teacher_accuracy`, which is a share of the teacher's tokens."""
        counts = [float(self.student_tokens), float(self.teacher_tokens)]
        values = [float(self.sums.get(name, 0.0)) for name in TERMS]
        present = [float(name in self.sums) for name in TERMS]
        # The same length on every rank, whatever this one has seen.
        packed = torch.tensor(counts + values + present, dtype=torch.float64, device=device)
        students, teachers, *rest = sum_over_ranks(packed).tolist()
        if not students:
            return {}
        means = {
            f"dskd/{name}": total / (max(teachers, 1) if name == "teacher_accuracy" else students)
            for name, total, seen in zip(TERMS, rest, rest[len(TERMS) :], strict=False)
            if seen
        }
        return means | {"dskd/supervised_tokens": students}
