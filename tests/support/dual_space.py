"""The dual-space loss from plain tensors, as tests and benchmarks call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses import Budget, Stream, make_divergence
from axolotl_dskd.objectives.dual_space.align import Exchanged, exchange_pairs
from axolotl_dskd.objectives.dual_space.projectors import ROWS_AT_ONCE, Gram, Projectors
from axolotl_dskd.objectives.dual_space.spaces import Terms, student_space, teacher_space
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import LossOutput, Side, View


def settings(name: str, chunk_tokens: int = 256, **changes: Any) -> tuple[Terms, Budget]:
    """Weights with a named divergence, and chunks of so many tokens."""
    return Terms(make_divergence(name), **changes), Budget(chunk_tokens)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The W that minimises ‖x W − y‖², by normal equations in float64: [k, a], [k, b] -> [a, b].

    The same as `pinv(x) @ y`, several times faster.
    """
    blocks = zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True)
    return Gram(x.split(ROWS_AT_ONCE)).solve(blocks).to(torch.float32)


def side(labels: Tensor, sample_ids: Tensor | None = None) -> Side:
    """Tokens of one sample, unless told, whose inputs do not matter."""
    nothing = torch.zeros_like(labels)
    return Side(nothing, labels, nothing if sample_ids is None else sample_ids)


def dual_space_loss(
    *,
    student_hidden: Tensor,
    student_labels: Tensor,
    student_head: OutputHead,
    settings: tuple[Terms, Budget],
    t2s_hidden: Tensor | None = None,
    projector_labels: Tensor | None = None,
    student_space_mask: Tensor | None = None,
    s2t_hidden: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_labels: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    teacher_space_mask: Tensor | None = None,
) -> LossOutput:
    """Both spaces of N student and M teacher tokens, a state for each of them.

    Args:
        projector_labels: [N] targets of the projected teacher.
        student_space_mask: [N] bool, which tokens have a row in `t2s_hidden` that counts.
        teacher_space_mask: [M] bool, which rows of `s2t_hidden` count.
    """
    terms, budget = settings
    rows = targets = None
    if student_space_mask is not None:
        rows = student_space_mask.nonzero().flatten()
        assert t2s_hidden is not None
        t2s_hidden = t2s_hidden[rows]
    if projector_labels is not None:
        targets = projector_labels if rows is None else projector_labels[rows]
    out = student_space(
        Stream(student_hidden, student_head, trains_head=student_head.trainable),
        side(student_labels),
        None if t2s_hidden is None else t2s_hidden.to(student_hidden.dtype),
        rows,
        targets,
        terms,
        budget,
    )
    if s2t_hidden is not None:
        assert teacher_hidden is not None and teacher_labels is not None
        assert teacher_head is not None
        teacher_rows = None
        if teacher_space_mask is not None:
            teacher_rows = teacher_space_mask.nonzero().flatten()
            s2t_hidden = s2t_hidden[teacher_rows]
        teacher = Stream(teacher_hidden.to(teacher_head.weight.dtype), teacher_head)
        loss, values = teacher_space(
            teacher, side(teacher_labels), s2t_hidden, teacher_rows, terms, budget
        )
        out.loss = out.loss + loss
        out.terms |= values
    return out


def met_as_pairs(
    student: Tensor, teacher: Tensor, pairs: Tensor, projectors: Projectors
) -> Exchanged:
    """States met as pairs."""
    views = (
        View(side(torch.zeros(len(states), dtype=torch.long)), hidden=states)
        for states in (student, teacher)
    )
    return exchange_pairs(*views, pairs, projectors)
