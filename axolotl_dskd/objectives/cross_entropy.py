"""The student's cross-entropy alone: what is computed where nothing is learned from a teacher."""

from __future__ import annotations

from typing import ClassVar

from axolotl_dskd.config import ObjectiveConfig
from axolotl_dskd.losses import Budget, TermSpec, by_rows, even_parts, over, with_ce
from axolotl_dskd.objectives.base import Objective, student_stream
from axolotl_dskd.types import LossOutput, Matches, Per, Term, View

TERMS: dict[str, Per] = {"ce": "reference_token"}


def cross_entropy(student: View, budget: Budget) -> LossOutput:
    """Σ CE over the supervised tokens, chunk by chunk."""
    stream, tokens = student_stream(student), student.tokens
    parts = even_parts({"student": len(tokens)}, budget.size(stream))
    sums = over(
        {"student": stream},
        parts,
        by_rows(with_ce(None, student.references, 1.0)),
        {"ce": TermSpec("student", 1.0)},
    )

    return LossOutput(sums.loss, len(tokens), {"ce": Term(sums.values["ce"], tokens.sample_ids)})


class FineTuning(Objective[ObjectiveConfig]):
    """Stands where an objective does in runs whose teacher is there for evaluations alone."""

    terms: ClassVar = TERMS

    def describe(self) -> str:
        """See `Objective`."""
        return "fine-tuning: cross-entropy alone; only evaluations ask the teacher"

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """The student's cross-entropy; nothing of the teacher."""
        return cross_entropy(student, self.setting.budget)
