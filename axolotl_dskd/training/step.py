"""One micro-batch on its way through the student's forward: from its states to the loss.

Created before the forward; its `at_head` runs inside it, where the head of a sharded student is
whole; what it found is read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from axolotl_dskd.config import about_teacher
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.evaluation.measure import Measured, measure
from axolotl_dskd.losses import Budget
from axolotl_dskd.models.student import Student
from axolotl_dskd.objectives import Objective, own_text
from axolotl_dskd.objectives.cross_entropy import cross_entropy
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher import Teacher
from axolotl_dskd.training.attending import Attending
from axolotl_dskd.training.parts import Found, part_of, together
from axolotl_dskd.types import IGNORE_INDEX, DualBatch, LossOutput, Needs, View


class Lesson(NamedTuple):
    """A teacher that is open, the objective that has begun with it, and how evaluations compare the
    two models (None: the teacher gives no states)."""

    teacher: Teacher
    objective: Objective[Any]
    compare: TeacherAgreement | None

    def __call__(self, batch: DualBatch, student: View, *, evaluates: bool) -> LossOutput:
        """The sums over a batch."""
        if len(student):
            teacher = self.teacher(batch, self.objective.needs)
        else:
            self.teacher.idle(batch)
            teacher = self.teacher.nothing(student.tokens)
        out = self.objective(student, teacher, batch.matches)
        if evaluates and self.compare is not None:
            out.terms |= self.compare(student, teacher, batch.matches.starts)
        if student.written is not None:
            if "reverse_kl" not in out.terms:
                budget = self.objective.setting.budget
                gap = own_text.reverse_kl(student, teacher, batch.matches, budget)
                out.terms["reverse_kl"] = gap
            out.references = int((student.references != IGNORE_INDEX).sum())
        return out


class Distillation:
    """What a run learns from: its teachers, each with an objective of its own.

    Args:
        lessons: by the teacher's name, in their order; one alone has an empty name.
    """

    def __init__(self, lessons: Mapping[str, Lesson]) -> None:
        self.lessons = dict(lessons)
        self.needs = _of_student(lesson.objective for lesson in self.lessons.values())

    def __call__(
        self, batch: DualBatch, student: View, *, evaluates: bool
    ) -> tuple[LossOutput, dict[str, Found]]:
        """The sums over a batch, and, where there are several teachers, those over each one's part.

        Every teacher is called on every rank, also on one that has no sample for it.
        """
        if batch.teachers is None:
            (lesson,) = self.lessons.values()
            return lesson(batch, student, evaluates=evaluates), {}
        found: dict[str, Found] = {}
        problems = []
        for number, (name, lesson) in enumerate(self.lessons.items()):
            part = part_of(batch, number)
            try:
                with about_teacher(name):
                    out = lesson(part.batch, part.view(student), evaluates=evaluates)
                    found[name] = Found(part, out)
            except ValueError as error:  # the next teacher may need every rank
                problems.append(error)
        if problems:
            raise problems[0]
        return together(found.values()), found

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """Name the teachers the batches that they will be asked about."""
        for number, lesson in enumerate(self.lessons.values()):
            lesson.teacher.expect(
                [b if b.teachers is None else part_of(b, number).batch for b in batches]
            )

    def follow(self, step: int, head: OutputHead) -> None:
        """See `Objective.follow`."""
        for lesson in self.lessons.values():
            lesson.objective.follow(step, head)


def _of_student(objectives: Iterable[Objective[Any]]) -> Needs:
    """What of the student has to be given where all of these are to have what they need."""
    needs = [objective.needs for objective in objectives]
    return Needs(
        embeddings=any(one.embeddings for one in needs),
        written=any(one.written for one in needs),
        contrast=any(one.contrast for one in needs),
    )


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
        found: of each of several teachers, by name.
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
        self.found: dict[str, Found] = {}
        self._refusal: str | None = None

    def at_head(self, hidden_BLd: Tensor) -> LossOutput:
        """The sums over the batch, from what the head was given."""
        needs = Needs() if self.distillation is None else self.distillation.needs
        tokens, written = self.batch.student_side(), self.batch.written
        view = self.student.view(
            tokens, hidden_BLd[self.batch.student_places], needs, evaluates=self.evaluates
        )
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
            out, self.found = self.distillation(self.batch, view, evaluates=self.evaluates)
            return out
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
