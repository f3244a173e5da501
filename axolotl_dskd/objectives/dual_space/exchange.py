"""What the two models get of each other in a step: projected states, and targets for them.

Joins an alignment with the projectors and says in the loss's words which tokens take part. Knows
batches, states and heads; nothing of tokenizers, models or the training loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.objectives.dual_space import (
    Aligned,
    align_exact_pairs,
    align_positions,
    align_with_attention,
    greedy_tokens,
    teacher_targets,
)
from axolotl_dskd.objectives.dual_space.loss import LossSettings
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.objectives.dual_space.start import StartReport
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, DualBatch, Side, TeacherSignal

LOG = get_logger(__name__)


@dataclass(frozen=True)
class Exchanged:
    """The aligned and projected states of a batch.

    Attributes:
        signal: the teacher's.
        aligned: the projected states.
        teacher_tokens: the teacher tokens that have a student's state.
        pairs: [P, 2] exact pairs of student and teacher tokens, also where these do not decide
            the alignment.
        targets: [N] what the projected teacher is taught to say, -100 for nothing; None: the
            student's labels, all of them.
    """

    signal: TeacherSignal
    aligned: Aligned
    teacher_tokens: Side
    pairs: Tensor
    targets: Tensor | None

    def loss_arguments(self, settings: LossSettings, teacher_head: OutputHead) -> dict[str, Any]:
        """Arguments of `dual_space_loss` for the spaces that are switched on."""
        call: dict[str, Any] = {}
        if settings.student_space_weight:
            call["t2s_hidden"] = self.aligned.t2s_hidden
            if self.targets is not None:
                call["projector_labels"] = self.targets
                call["student_space_mask"] = self.targets != IGNORE_INDEX
        if settings.teacher_space_weight:
            rows = self.aligned.teacher_rows
            call["s2t_hidden"] = self.aligned.s2t_hidden
            call["teacher_hidden"] = (
                self.signal.hidden if rows is None else self.signal.hidden[rows]
            )
            call["teacher_labels"] = self.teacher_tokens.labels
            call["teacher_head"] = teacher_head
        return call


class Exchange:
    """Aligns and projects batch after batch, as configured for the run.

    Args:
        alignment: "positions", "eta" or "cma".
        teacher_head: frozen.
        causal: cross-model attention sees no byte that is not read yet.
        translation: [U] student id of the same bytes for each teacher id, -100 for none (eta).
        start_report: measures the projectors on the first batches; None for none.
    """

    def __init__(
        self,
        *,
        alignment: str,
        projectors: Projectors,
        teacher_head: OutputHead,
        causal: bool,
        translation: Tensor,
        start_report: StartReport | None,
    ) -> None:
        self.alignment = alignment
        self.projectors = projectors
        self.teacher_head = teacher_head
        self.causal = causal
        self.translation = translation
        self._start_report = start_report
        self._saw_the_start = False

    def __call__(
        self,
        batch: DualBatch,
        hidden: Tensor,
        student: Side,
        embedded: tuple[Tensor, Tensor] | None,
        signal: TeacherSignal,
        chunk_tokens: int,
    ) -> Exchanged:
        """Align and project both sides' states.

        Args:
            hidden: [N, d] the student's states.
            embedded: [N, d] the student's embeddings of its inputs and of its labels, without
                graph (for cross-model attention).
            chunk_tokens: tokens whose teacher logits may be held at once.
        """
        pairs, targets = batch.exact_pairs(student, signal.tokens), None
        if self.alignment == "positions":
            aligned = align_positions(hidden, student, signal, self.projectors)
        elif self.alignment == "eta":
            aligned = align_exact_pairs(hidden, pairs, signal, self.projectors)
            greedy = greedy_tokens(self.teacher_head, signal.hidden[pairs[:, 1]], chunk_tokens)
            targets = teacher_targets(greedy, pairs, student, signal.tokens, self.translation)
        else:
            assert embedded is not None
            spans = None
            if self.causal:
                assert batch.spans is not None
                assert batch.teacher_spans is not None
                spans = batch.spans, batch.teacher_spans
            aligned = align_with_attention(
                hidden, embedded, student, signal, self.projectors, spans=spans
            )
            if aligned.student_mask is not None:
                targets = torch.where(aligned.student_mask, student.labels, IGNORE_INDEX)
        rows = aligned.teacher_rows
        tokens = signal.tokens if rows is None else signal.tokens.at(rows)
        return Exchanged(signal, aligned, tokens, pairs, targets)

    def report(
        self,
        exchanged: Exchanged,
        states: tuple[Tensor, Tensor],
        heads: tuple[OutputHead, OutputHead],
        step: int,
    ) -> None:
        """Measure the projectors on the batches of the first step, and say once what they give.

        Args:
            states, heads: student's first.
            step: optimizer steps made so far. Projectors of a resumed run are past their start.
        """
        report = self._start_report
        if report is None:
            return
        if step == 0:
            self._saw_the_start = True
            report.add(exchanged.pairs, exchanged.aligned, states, heads)
        elif not self._saw_the_start:
            self._start_report = None
            return
        if report.complete or step:
            self._start_report = None
            LOG.info(report.text())
            if warning := report.warning():
                LOG.warning(warning)
