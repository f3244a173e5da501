"""The dual-space loss, token chunk by token chunk, never holding logits for all tokens.

Two passes, one over each vocabulary. For a chunk of tokens a pass computes the logits of both of
its hidden-state matrices in one product with the head, the terms and, in closed form and in place,
the gradients of the logits; carries these back through the head and reuses the memory for the next
chunk. What is kept is the size of the hidden states. So `backward()` later only scales stored
gradients: no logits are recomputed and autograd never holds one. These are seven matrix products
(student vocabulary: two logits, two gradients; teacher vocabulary: two logits, one gradient) and
one more where the student's head trains, which is as few as the loss can be computed with.

This module knows heads, hidden states and labels. It does not know where projected states come
from (alignment), nor what the sums are divided by (trainer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses import elementwise
from axolotl_dskd.losses.divergences import Divergence
from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import LossOutput


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


def _elementwise(logits: Tensor) -> ModuleType:
    """Triton kernels on CUDA, where there is Triton; PyTorch elsewhere and for float64."""
    if logits.is_cuda and logits.dtype != torch.float64 and find_spec("triton") is not None:
        return import_module("axolotl_dskd.losses.kernels")
    return elementwise


def _gradient_scale(dtype: torch.dtype) -> float:
    """float16 gives gradients of rare tokens too few bits, or none: they are computed enlarged."""
    return 1024.0 if dtype == torch.float16 else 1.0


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
        projector_labels_N: Tensor,
        mask_N: Tensor | None,
        head: OutputHead,
        settings: LossSettings,
        *head_tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wants = ctx.needs_input_grad
        head, N = head.frozen(student_Nd.dtype), len(labels_N)
        scale = _gradient_scale(student_Nd.dtype)
        weights = elementwise.Weights(
            ce=settings.ce_factor * scale,
            projector_ce=settings.student_space_factor * scale,
            divergence=settings.student_space_factor * scale,
            temperature=settings.temperature,
            mask_wrong=settings.mask_wrong_projections,
        )
        buffers = tuple(
            torch.zeros_like(t, dtype=wide(t.dtype)) if t is not None and needed else None
            for t, needed in zip(head_tensors, wants[7:], strict=True)
        )
        trains_head = any(b is not None for b in buffers)
        grad_student = torch.empty_like(student_Nd) if wants[0] else None
        grad_projected = None
        if projected_Nd is not None and wants[1]:
            grad_projected = torch.zeros_like(projected_Nd)
        terms = elementwise.StudentTerms(
            *student_Nd.new_zeros((4, N), dtype=wide(student_Nd.dtype))
        )
        work = student_Nd.new_empty((2 * min(settings.chunk_tokens, N), head.vocab_size))

        for rows, paired in _chunks(N, mask_N, projected_Nd is not None, settings.chunk_tokens):
            states = student_Nd[rows]
            n = len(states)
            if paired:
                assert projected_Nd is not None
                states = torch.cat([states, projected_Nd[rows]])
            logits = head.linear(states, out=work[: len(states)])
            chunk_terms = _elementwise(work).student_terms(
                logits[:n],
                logits[n:] if paired else None,
                labels_N[rows],
                projector_labels_N[rows],
                head,
                settings.divergence,
                weights,
            )
            for term, values in zip(terms, chunk_terms, strict=True):
                term[rows] = values
            if not (trains_head or grad_student is not None or grad_projected is not None):
                continue
            if trains_head:  # its gradient flows from the student's own logits only
                grads = [head.backward(states[:n], logits[:n], buffers)]
                if paired:
                    grads.append(head.backward(states[n:], logits[n:]))
            else:
                grads = list(head.backward(states, logits).split(n))
            if grad_student is not None:
                grad_student[rows] = grads[0]
            if paired and grad_projected is not None:
                grad_projected[rows] = grads[1]

        ctx.scale, ctx.grads = scale, (grad_student, grad_projected, *(None,) * 5, *buffers)
        ctx.dtypes = (*(None,) * 7, *(None if t is None else t.dtype for t in head_tensors))
        loss = settings.ce_factor * terms.ce.sum() + settings.student_space_factor * (
            terms.projector_ce.sum() + terms.divergence.sum()
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

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
        mask_M: Tensor | None,
        head: OutputHead,
        settings: LossSettings,
    ) -> tuple[Tensor, ...]:
        M, dtype = len(labels_M), projected_MD.dtype
        scale = _gradient_scale(dtype)
        weights = elementwise.Weights(
            ce=0.0,
            projector_ce=0.0,
            divergence=settings.teacher_space_factor * scale,
            temperature=settings.temperature,
        )
        grad_projected = torch.zeros_like(projected_MD) if ctx.needs_input_grad[0] else None
        divergence, correct = projected_MD.new_zeros((2, M), dtype=wide(dtype)).unbind(0)
        work = projected_MD.new_empty((2 * min(settings.chunk_tokens, M), head.vocab_size))
        for rows, paired in _chunks(M, mask_M, True, settings.chunk_tokens):
            if not paired:
                continue
            projected = projected_MD[rows]
            n = len(projected)
            logits = head.linear(torch.cat([teacher_MD[rows], projected]), out=work[: 2 * n])
            divergence[rows], correct[rows] = _elementwise(work).teacher_terms(
                logits[:n], logits[n:], labels_M[rows], head, weights
            )
            if grad_projected is not None:
                grad_projected[rows] = head.backward(projected, logits[n:])
        ctx.scale, ctx.grads = scale, (grad_projected, *(None,) * 5)
        ctx.dtypes = (None,) * 6
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(divergence, correct)
        return settings.teacher_space_factor * divergence.sum(), divergence, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, grad_loss)


def _chunks(
    tokens: int, mask: Tensor | None, has_pair: bool, size: int
) -> Iterator[tuple[slice | Tensor, bool]]:
    """`(rows, whether they have a second state)`, those with one first."""
    if mask is None or not has_pair:
        for start in range(0, tokens, size):
            yield slice(start, min(start + size, tokens)), has_pair
        return
    for rows in mask.nonzero().flatten().split(size):
        yield rows, True
    for rows in (~mask).nonzero().flatten().split(size):
        yield rows, False


def _scaled(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The stored gradients times the incoming one, in `ctx.dtypes` where those are given."""
    if ctx.grads is None:
        raise RuntimeError("the dual-space loss was differentiated twice; run its forward again")
    factor = grad_loss / ctx.scale
    scaled = tuple(
        None if g is None else g.to(wide(g.dtype)).mul_(factor).to(dtype or g.dtype)
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
    projector_labels: Tensor | None = None,
    student_space_mask: Tensor | None = None,
    s2t_hidden: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_labels: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    teacher_space_mask: Tensor | None = None,
) -> LossOutput:
    """Sum over tokens of the dual-space distillation loss (arXiv 2406.17328, §3).

    Equals, with `sg` = stop-gradient, T = temperature and D the divergence (teacher side first):

        z, u = student_head(student_hidden), sg(student_head)(t2s_hidden)
        ce             = cross_entropy(z, student_labels)
        projector_ce   = cross_entropy(u, projector_labels)
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
        projector_labels: [N] what the projected teacher is taught to say, -100 for nothing;
            default `student_labels`.
        student_space_mask: [N] bool, which tokens have a row in `t2s_hidden` that counts; the
            others get `ce` alone and cost half. Default all.
        s2t_hidden: [M, D] student states in the teacher's space; None switches teacher space off.
        teacher_hidden: [M, D]; teacher_labels: [M]; teacher_head: frozen. With `s2t_hidden` only.
        teacher_space_mask: [M] bool, which rows of `s2t_hidden` count; default all.

    Returns:
        `LossOutput` with the differentiable sum and the per-token terms `ce`, `projector_ce`,
        `student_space`, `projector_accuracy`, `teacher_space`, `teacher_accuracy` (the last two
        only where there is a teacher space), 0 where a mask leaves a token out.
    """
    loss, ce, projector_ce, divergence, correct = _StudentVocabularyPass.apply(
        student_hidden,
        None if t2s_hidden is None else t2s_hidden.to(student_hidden.dtype),
        student_labels,
        student_labels if projector_labels is None else projector_labels,
        student_space_mask,
        student_head,
        settings,
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
            teacher_space_mask,
            teacher_head.frozen(),
            settings,
        )
        out.loss = out.loss + teacher_loss
        out.terms |= {"teacher_space": teacher_divergence, "teacher_accuracy": teacher_correct}
        out.teacher_tokens = len(teacher_labels)
    return out


def auto_chunk_tokens(
    memory_bytes: int, vocab_sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> int:
    """Tokens per chunk such that a chunk's logits take at most 768 MiB, or 1/64 of the memory.

    A chunk holds two matrices [chunk, vocabulary] in the dtype of the products, which turn into
    their own gradients; all else is small. The largest power of two that fits, 16 to 4096: the
    same for the same machine, vocabularies and dtype, whatever else is running.

    Args:
        memory_bytes: of the device, in total.
        vocab_sizes: of student and teacher.
        dtype: of the matrix products.
    """
    budget = min(768 << 20, memory_bytes // 64)
    tokens = max(16, min(4096, budget // (2 * dtype.itemsize * max(vocab_sizes))))
    return 1 << (tokens.bit_length() - 1)
