"""From logits to terms and gradients, in place: the part of the loss that is no matrix product.

A chunk's logits are read, and overwritten with their gradients, a few rows at a time: every
temporary of these rows stays in the processor's cache, and none has the size of the chunk. On CUDA
`kernels.py` does the same in one launch a chunk; this form is the reference, and what runs where
there is no Triton.

liger-kernel, which comes with Axolotl, offers fused losses for a student and a teacher that share
one vocabulary. None of them fits here: they have neither the projector's cross-entropy nor a
gradient for the second states, know no softcap, scale, LoRA or padded rows of a head, lack most of
the divergences and give sums instead of values per token; separate kernels for cross-entropy and
divergence would read each logit twice as often.

This module knows logits, labels and weights; nothing of hidden states or of matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_dskd.losses.divergences import Distribution, Divergence, forward_kl
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX

#: Numbers of one matrix that are worked on at once: a block's temporaries fit into a CPU's cache,
#: or are many enough for a GPU without Triton.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class Weights:
    """What each term's gradient is multiplied by.

    Attributes:
        ce: of the student's cross-entropy.
        projector_ce: of the projected teacher's cross-entropy.
        divergence: of the divergence at `temperature`.
        temperature: of the divergence.
        mask_wrong: the divergence counts only where the projection's argmax is its label.
    """

    ce: float
    projector_ce: float
    divergence: float
    temperature: float
    mask_wrong: bool = False


class StudentTerms(NamedTuple):
    """Per token [n], float32 or wider: the terms over the student's vocabulary."""

    ce: Tensor
    projector_ce: Tensor
    divergence: Tensor
    correct: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def student_terms(
    student: Tensor,
    projected: Tensor | None,
    labels: Tensor,
    projector_labels: Tensor,
    head: OutputHead,
    divergence: Divergence,
    weights: Weights,
) -> StudentTerms:
    """Cross-entropies and divergence of one chunk; `student` and `projected` become gradients.

    Args:
        student: [n, V] `head.linear` of the student's states.
        projected: [n, V] the same of the projected teacher's states, or None: then only `ce`.
        labels, projector_labels: [n] int64; a projector label of -100 counts nowhere.
        head: for its scale and softcap.
        divergence, weights: see there.
    """
    terms = StudentTerms(*student.new_zeros((4, len(labels)), dtype=wide(student.dtype)))
    for rows in _blocks(student):
        z = head.activation(student[rows].to(terms.ce.dtype))
        terms.ce[rows], grad_z = _cross_entropy(z, labels[rows], weights.ce)
        if projected is not None:
            u = head.activation(projected[rows].to(terms.ce.dtype))
            targets = projector_labels[rows]
            terms.projector_ce[rows], grad_u = _cross_entropy(u, targets, weights.projector_ce)
            correct = (u.argmax(-1) == targets).to(u.dtype)
            T = weights.temperature
            value, grad = divergence(Distribution.of(u, T), Distribution.of(z, T))
            if weights.mask_wrong:
                value *= correct
                grad *= correct.unsqueeze(-1)
            terms.divergence[rows], terms.correct[rows] = value, correct
            grad_z.add_(grad, alpha=weights.divergence / T)
            projected[rows] = head.activation_backward(u, grad_u)
        student[rows] = head.activation_backward(z, grad_z)
    return terms


def teacher_terms(
    teacher: Tensor, projected: Tensor, labels: Tensor, head: OutputHead, weights: Weights
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ projected student) of one chunk; `projected` becomes its gradient.

    Args:
        teacher, projected: [m, U] `head.linear` of the teacher's and the projected states.
        labels: [m] int64.

    Returns:
        `(divergence, correct)`, [m] each: the value, and whether the teacher's argmax is the label.
    """
    value, correct = teacher.new_zeros((2, len(labels)), dtype=wide(teacher.dtype)).unbind(0)
    T = weights.temperature
    for rows in _blocks(teacher):
        t, s = (head.activation(x[rows].to(value.dtype)) for x in (teacher, projected))
        correct[rows] = (t.argmax(-1) == labels[rows]).to(value.dtype)
        value[rows], grad = forward_kl(Distribution.of(t, T), Distribution.of(s, T))
        projected[rows] = head.activation_backward(s, grad.mul_(weights.divergence / T))
    return value, correct


def _blocks(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK.get(matrix.device.type, 1 << 24) // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield slice(start, start + rows)


def _cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Value per token at temperature 1, and the gradient of the logits times `weight`."""
    counted = (labels != IGNORE_INDEX).to(logits.dtype)
    at = labels.clamp_min(0).unsqueeze(-1)
    prob = torch.softmax(logits, -1)
    # The largest probability is 1 / Σ exp(logits − largest logit), and never underflows.
    log_sum = -prob.amax(-1).log_()
    value = (logits.amax(-1) - logits.gather(-1, at).squeeze(-1) + log_sum) * counted
    share = (counted * weight).unsqueeze(-1)
    return value, prob.mul_(share).scatter_add_(-1, at, -share)
