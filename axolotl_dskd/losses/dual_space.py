"""The dual-space loss, token chunk by token chunk, never holding logits for all tokens.

Two passes, one over each vocabulary. For a chunk of tokens a pass computes the logits of both of
its hidden-state matrices, the terms and, in closed form, the gradients of the logits; carries
these back through the output heads and drops the logits. What is kept is the size of the hidden
states. So `backward()` later only scales stored gradients: no logits are recomputed and autograd
never holds one.

This module knows heads, hidden states and labels. It does not know where projected states come
from (alignment), nor what the sums are divided by (trainer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses.divergences import Divergence, forward_kl
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, OutputHead


@dataclass(frozen=True)
class LossSettings:
    """How the terms are weighted, for one run.

    The loss is `(1-kd_ratio) * ce + kd_ratio * (student_space_weight * (student_space +
    projector_ce) + teacher_space_weight * teacher_space)`, as sums over tokens.

    Attributes:
        divergence: student-space divergence D(projected teacher ‖ student).
        temperature: of both spaces' divergences; cross-entropies are at temperature 1. No T²
            factor, as in the published method.
        mask_wrong_projections: count the student-space divergence only where the projected
            teacher's most likely token is the label (arXiv 2406.17328, cross-model attention).
        chunk_tokens: tokens per chunk; changes memory and speed, never the result.
    """

    divergence: Divergence
    temperature: float = 2.0
    kd_ratio: float = 0.5
    student_space_weight: float = 1.0
    teacher_space_weight: float = 1.0
    mask_wrong_projections: bool = False
    chunk_tokens: int = 256

    @property
    def ce_factor(self) -> float:
        """Weight of the student's cross-entropy in the loss."""
        return 1.0 - self.kd_ratio

    @property
    def student_space_factor(self) -> float:
        """Weight of the student-space divergence and of the projector's cross-entropy."""
        return self.kd_ratio * self.student_space_weight

    @property
    def teacher_space_factor(self) -> float:
        """Weight of the teacher-space divergence."""
        return self.kd_ratio * self.teacher_space_weight


def _dtypes_as_given(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run outside autocast, which would round a float32 head's products."""

    @wraps(forward)
    def run(ctx: Any, states: Tensor, *args: Any) -> Any:
        with torch.autocast(states.device.type, enabled=False):
            return forward(ctx, states, *args)

    return run


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities in float32 (float64 stays): the one place where precision is raised."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature if temperature != 1.0 else wide, dim=-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token cross-entropy at temperature 1 and its gradient with respect to the logits."""
    log_q = _log_softmax(logits)
    value = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    grad = log_q.exp_()
    grad.scatter_add_(-1, labels.unsqueeze(-1), grad.new_full((len(labels), 1), -1.0))
    return value, grad


class _StudentVocabularyPass(torch.autograd.Function):
    """CE, projector CE and student-space divergence: the terms over the student's vocabulary.

    Returns the weighted sum (differentiable in the student's states, the projected teacher's
    states and the head's tensors) and, without gradient, the per-token values.
    """

    @staticmethod
    @_dtypes_as_given
    def forward(
        ctx: Any,
        student_Nd: Tensor,
        projected_Nd: Tensor | None,
        labels_N: Tensor,
        head: OutputHead,
        settings: LossSettings,
        projector_labels_N: Tensor | None,
        space_mask_N: Tensor | None,
        *head_tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wants = ctx.needs_input_grad
        frozen, T = head.frozen(student_Nd.dtype), settings.temperature
        buffers = tuple(
            torch.zeros_like(t, dtype=_wide(t.dtype)) if t is not None and needed else None
            for t, needed in zip(head_tensors, wants[7:], strict=True)
        )
        grad_student = torch.empty_like(student_Nd) if wants[0] else None
        grad_projected = (
            torch.empty_like(projected_Nd) if projected_Nd is not None and wants[1] else None
        )
        wide = _wide(student_Nd.dtype)
        ce, projector_ce, divergence, correct = student_Nd.new_zeros(
            (4, len(labels_N)), dtype=wide
        ).unbind(0)

        for rows in _chunks(len(labels_N), settings.chunk_tokens):
            labels = labels_N[rows]
            logits = frozen.logits(student_Nd[rows])
            ce[rows], grad = _cross_entropy(logits, labels)
            grad *= settings.ce_factor
            if projected_Nd is not None:
                projected_logits = frozen.logits(projected_Nd[rows])
                targets = labels if projector_labels_N is None else projector_labels_N[rows]
                has_target = targets != IGNORE_INDEX
                value, projected_grad = _cross_entropy(projected_logits, targets.clamp_min(0))
                projector_ce[rows] = value * has_target
                projected_grad *= has_target.unsqueeze(-1)
                hits = (projected_logits.argmax(-1) == targets).to(wide)
                correct[rows] = hits
                value, divergence_grad = settings.divergence(
                    _log_softmax(projected_logits, T), _log_softmax(logits, T)
                )
                counts = torch.ones_like(hits)
                if space_mask_N is not None:
                    counts = counts * space_mask_N[rows]
                if settings.mask_wrong_projections:
                    counts = counts * hits
                value = value * counts
                divergence_grad *= counts.unsqueeze(-1)
                divergence[rows] = value
                grad.add_(divergence_grad, alpha=settings.student_space_factor / T)
                if grad_projected is not None:
                    projected_grad *= settings.student_space_factor
                    grad_projected[rows] = frozen.backward(
                        projected_Nd[rows], projected_logits, projected_grad
                    )
            if grad_student is not None or any(b is not None for b in buffers):
                grad_hidden = frozen.backward(student_Nd[rows], logits, grad, buffers)
                if grad_student is not None:
                    grad_student[rows] = grad_hidden

        ctx.grads = (grad_student, grad_projected, *(None,) * 5, *buffers)
        head_dtypes = (None if t is None else t.dtype for t in head_tensors)
        ctx.dtypes = (*(None,) * 7, *head_dtypes)
        loss = settings.ce_factor * ce.sum()
        loss = loss + settings.student_space_factor * (projector_ce.sum() + divergence.sum())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ce, projector_ce, divergence, correct)
        return loss, ce, projector_ce, divergence, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, grad_loss)


class _TeacherVocabularyPass(torch.autograd.Function):
    """KL(teacher ‖ projected student): the term over the teacher's vocabulary."""

    @staticmethod
    @_dtypes_as_given
    def forward(
        ctx: Any,
        projected_MD: Tensor,
        teacher_MD: Tensor,
        labels_M: Tensor,
        head: OutputHead,
        settings: LossSettings,
    ) -> tuple[Tensor, ...]:
        T = settings.temperature
        grad_projected = torch.empty_like(projected_MD) if ctx.needs_input_grad[0] else None
        wide = _wide(projected_MD.dtype)
        divergence, correct = projected_MD.new_zeros((2, len(labels_M)), dtype=wide).unbind(0)
        for rows in _chunks(len(labels_M), settings.chunk_tokens):
            teacher_logits = head.logits(teacher_MD[rows])
            correct[rows] = (teacher_logits.argmax(-1) == labels_M[rows]).to(wide)
            log_p = _log_softmax(teacher_logits, T)
            del teacher_logits
            logits = head.logits(projected_MD[rows])
            divergence[rows], grad = forward_kl(log_p, _log_softmax(logits, T))
            if grad_projected is not None:
                grad *= settings.teacher_space_factor / T
                grad_projected[rows] = head.backward(projected_MD[rows], logits, grad)
        ctx.grads = (grad_projected, None, None, None, None)
        ctx.dtypes = (None,) * 5
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(divergence, correct)
        return settings.teacher_space_factor * divergence.sum(), divergence, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, grad_loss)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scaled(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The stored gradients times the incoming one, in `ctx.dtypes` where those are given."""
    if ctx.grads is None:
        raise RuntimeError("the dual-space loss was differentiated twice; run its forward again")
    scaled = tuple(
        None if g is None else (g * grad_loss.to(_wide(g.dtype))).to(dtype or g.dtype)
        for g, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
    )
    ctx.grads = None
    return scaled


def dual_space_loss(
    *,
    student_hidden: Tensor,
    student_labels: Tensor,
    student_head: OutputHead,
    settings: LossSettings,
    t2s_hidden: Tensor | None = None,
    s2t_hidden: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_labels: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    projector_labels: Tensor | None = None,
    student_space_mask: Tensor | None = None,
) -> LossOutput:
    """Sum over tokens of the dual-space distillation loss (arXiv 2406.17328, §3).

    Equals, with `sg` = stop-gradient, T = temperature and D the divergence (teacher side first):

        z, u = student_head(student_hidden), sg(student_head)(t2s_hidden)
        ce             = cross_entropy(z, student_labels)
        projector_ce   = cross_entropy(u, student_labels)
        student_space  = D(softmax(sg(u) / T), softmax(z / T))   [· (argmax u == label) if masked]
        teacher_space  = KL(softmax(teacher_head(teacher_hidden) / T)
                            ‖ softmax(teacher_head(s2t_hidden) / T))

    each summed over its tokens and weighted as `LossSettings` says.

    Products over the student's vocabulary run in the dtype of its states, those over the
    teacher's in the dtype of the teacher's head; everything elementwise in float32.

    Args:
        student_hidden: [N, d] final hidden states of the student.
        student_labels: [N] int64, in the student's vocabulary.
        student_head: trainable or not; its gradients flow from `z` only.
        settings: weights and divergence.
        t2s_hidden: [N, d] teacher states in the student's space; None switches student space off.
        s2t_hidden: [M, D] student states in the teacher's space; None switches teacher space off.
        teacher_hidden: [M, D]; teacher_labels: [M]; teacher_head: frozen. With `s2t_hidden` only.
        projector_labels: [N] int64, what the projected teacher is trained to say, -100 for nothing;
            default `student_labels`.
        student_space_mask: [N] bool, where False there is no student-space divergence; default
            everywhere. A row of `t2s_hidden` with neither a label nor a divergence is not read.

    Returns:
        `LossOutput` with the differentiable sum and the per-token terms `ce`, `projector_ce`,
        `student_space`, `projector_accuracy`, `teacher_space`, `teacher_accuracy` (the last two
        only where there is a teacher space).
    """
    loss, ce, projector_ce, divergence, correct = _StudentVocabularyPass.apply(
        student_hidden,
        None if t2s_hidden is None else t2s_hidden.to(student_hidden.dtype),
        student_labels,
        student_head,
        settings,
        projector_labels,
        student_space_mask,
        *student_head.tensors(),
    )
    out = LossOutput(loss, {"ce": ce}, student_tokens=len(student_labels))
    if t2s_hidden is not None:
        out.terms |= {
            "student_space": divergence,
            "projector_ce": projector_ce,
            "projector_accuracy": correct,
        }
    if s2t_hidden is not None:
        assert teacher_hidden is not None and teacher_labels is not None
        assert teacher_head is not None
        teacher_loss, teacher_divergence, teacher_correct = _TeacherVocabularyPass.apply(
            s2t_hidden.to(teacher_head.weight.dtype),
            teacher_hidden.to(teacher_head.weight.dtype),
            teacher_labels,
            teacher_head.frozen(),
            settings,
        )
        out.loss = out.loss + teacher_loss
        out.terms |= {"teacher_space": teacher_divergence, "teacher_accuracy": teacher_correct}
        out.teacher_tokens = len(teacher_labels)
    return out


def auto_chunk_tokens(memory_bytes: int, vocab_sizes: tuple[int, ...]) -> int:
    """Tokens per chunk such that a chunk's temporaries take at most 1 GiB, or 1/16 of the memory.

    A chunk holds at most eight float32 matrices [chunk, vocabulary] at once (two logits, their
    log-probabilities, the temporaries of a divergence). The largest power of two that fits, 16 to
    4096: the same for the same machine and vocabularies, whatever else is running.

    Args:
        memory_bytes: of the device, in total.
        vocab_sizes: of student and teacher.
    """
    budget = min(1 << 30, memory_bytes // 16)
    tokens = max(16, min(4096, budget // (8 * 4 * max(vocab_sizes))))
    return 1 << (tokens.bit_length() - 1)
