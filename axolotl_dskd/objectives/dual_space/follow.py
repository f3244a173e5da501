"""A student head that trains, and the projector that follows it."""

from __future__ import annotations

import torch
from axolotl.utils.logging import get_logger

from axolotl_dskd.objectives.dual_space.projectors import ROWS_AT_ONCE, Gram, Projectors
from axolotl_dskd.objectives.dual_space.start import SharedIds
from axolotl_dskd.output_head import OutputHead

LOG = get_logger(__name__)


class HeadFollower:
    """Keeps `s2t` right for a student head that trains.

    The start of s2t solves `teacher_head @ s2t ≈ student_head` for the head as it was. Each time
    it is to follow, the solution's change is added to the weights, so what training has added
    to them stays. The teacher's side of the normal equations is factorised once.

    The solution for the head that was followed last is a buffer of the projectors,
    `s2t_solution` [D, d] float32, and so part of their checkpoints.

    Args:
        projectors: in least squares, on every rank.
        ids: the tokens that both vocabularies share.
        teacher: its output head.
    """

    def __init__(self, projectors: Projectors, ids: SharedIds, teacher: OutputHead) -> None:
        self.projectors = projectors
        self.ids = ids
        self.teacher = teacher
        self.gram = Gram(teacher.rows(index)[0] for index in ids.teacher.split(ROWS_AT_ONCE))
        projectors.register_buffer("s2t_solution", projectors.s2t.weight.detach().clone())
        LOG.info("s2t follows the student's output head, which trains")

    @torch.no_grad()
    def follow(self, student: OutputHead) -> None:
        """After an update of the student, with its head as it is now, whole."""
        rows = (self.teacher.rows(index)[0] for index in self.ids.teacher.split(ROWS_AT_ONCE))
        targets = (student.rows(index)[0] for index in self.ids.student.split(ROWS_AT_ONCE))
        weight, before = self.projectors.s2t.weight, self.projectors.s2t_solution
        solution = self.gram.solve(zip(rows, targets, strict=True)).to(weight)
        weight += solution - before
        before.copy_(solution)
