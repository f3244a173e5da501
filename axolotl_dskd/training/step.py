"""One micro-batch on its way through the student's forward: from its states to the loss.

Created before the forward; its `at_head` runs inside it, where the head of a sharded student is
whole; what it found is read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from axolotl_dskd.evaluation.measure import Measured, measure
from axolotl_dskd.losses import Budget
from axolotl_dskd.models.student import Student
from axolotl_dskd.objectives import Objective
from axolotl_dskd.objectives.cross_entropy import cross_entropy
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher import Teacher
from axolotl_dskd.training.attending import Attending
from axolotl_dskd.types import IGNORE_INDEX, DualBatch, LossOutput, Needs, View


class Distillation:
    """What a run learns from: a teacher that is open, and the objective that has begun."""

    def __init__(self, teacher: Teacher, objective: Objective[Any]) -> None:
        self.teacher = teacher
        self.objective = objective

    def __call__(self, batch: DualBatch, student: View) -> LossOutput:
        """The sums over a batch."""
        if len(student):
            teacher = self.teacher(batch, self.objective.needs)
        else:
            self.teacher.idle(batch)
            teacher = self.teacher.nothing(student.tokens)
        out = self.objective(student, teacher, batch.matches)
        if student.written is not None:
            out.references = int((student.references != IGNORE_INDEX).sum())
        return out


class Step:
    """See the module.

    Args:
        batch: of this rank.
        student: whose forward it is.
        distillation: None where there is no teacher: then the loss is the cross-entropy.
        budget: of the cross-entropy's chunks.
        follow: told the head as it is now, on every rank, also on one without supervised tokens.
        attending: virtual attention, where there is one.
        evaluates: whether to measure the student, too.

    Attributes:
        measured: after the forward of a step that evaluates.
    """

    def __init__(
        self,
        batch: DualBatch,
        student: Student,
        distillation: Distillation | None,
        budget: Budget,
        follow: Callable[[OutputHead], None],
        attending: Attending | None = None,
        *,
        evaluates: bool = False,
    ) -> None:
        self.batch = batch
        self.student = student
        self.distillation = distillation
        self.budget = budget
        self.follow = follow
        self.attending = attending
        self.evaluates = evaluates
        self.measured: Measured | None = None
        self._refusal: str | None = None

    def at_head(self, hidden_BLd: Tensor) -> LossOutput:
        """The sums over the batch, from what the head was given."""
        mask_BL = self.batch.student_mask()
        needs = Needs() if self.distillation is None else self.distillation.objective.needs
        tokens, written = self.batch.student_side(mask_BL), self.batch.written
        view = self.student.view(tokens, hidden_BLd[mask_BL], needs, evaluates=self.evaluates)
        view = replace(view, written=written)
        assert view.head is not None
        # Of the student that learns: what is evaluated must not change what is trained.
        self.follow(self.student.head() if self.evaluates else view.head)
        if self.evaluates:
            self.measured = measure(view, self.budget)
        out = self._learned(view)
        if self.attending is not None and self.evaluates:
            self.attending.observe(view, self.student.gate(False))
        elif self.attending is not None:
            self.attending.add_entropy(out, view)
        return out

    def _learned(self, view: View) -> LossOutput:
        """The sums of what is learned: of the objective, or of the cross-entropy alone."""
        if self.distillation is None:
            return cross_entropy(view, self.budget)
        try:
            return self.distillation(self.batch, view)
        except ValueError as error:  # said later, by all ranks: none may wait for this one
            self._refusal = str(error)
            return cross_entropy(view, self.budget)

    def problem(self, out: LossOutput, step: int, decode: Callable[[Tensor], str]) -> str | None:
        """Why this batch cannot be learned from, in words, or None: the objective's or teacher's
        own, or the term, the step and the rows of a loss that is NaN or infinite.

        Args:
            step: its number, from 1.
            decode: ids of a row to text.
        """
        if self._refusal is not None or out.loss.isfinite():
            return self._refusal
        places = []
        for name, count, samples in out.not_finite():
            ids, segments = self.batch.input_ids, self.batch.segment_ids
            rows = [repr(decode(ids[segments == sample])[:120]) for sample in samples[:3]]
            places.append(f"dskd/{name} on {count} tokens of {len(samples)} rows, first: {rows}")
        return (
            f"the loss is not finite at step {step}: {'; '.join(places)}. Usual causes: a learning "
            "rate too high, float16 (use bf16), a damaged teacher."
        )
