"""Position-wise alignment, exactly aligned tokens, and cross-model attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.types import Side, TeacherSignal


@dataclass(frozen=True)
class Aligned:
    """Projected states, ready for the losses.

    Attributes:
        t2s_hidden: [N, d] the teacher's states for each student token, in the student's space.
        s2t_hidden: [M, D] the student's states for each teacher token, in the teacher's space.
        student_mask: [N] bool, student tokens that have a teacher's state; None means all. The
            other rows of `t2s_hidden` mean nothing.
        teacher_rows: [M'] indices of the teacher tokens that have a student's state, one for each
            row of `s2t_hidden`; None means all M.
    """

    t2s_hidden: Tensor
    s2t_hidden: Tensor
    student_mask: Tensor | None = None
    teacher_rows: Tensor | None = None


def align_positions(
    student_hidden: Tensor, student: Side, teacher: TeacherSignal, projectors: Projectors
) -> Aligned:
    """Token i of one side meets token i of the other (arXiv 2406.17328, §3.2: one vocabulary).

    Args:
        student_hidden: [N, d].

    Raises:
        ValueError: the supervised tokens of the two sides are not the same ids in the same order.
    """
    same_count = len(student) == len(teacher.tokens)
    if not same_count or not torch.equal(student.labels, teacher.tokens.labels):
        raise ValueError(
            "alignment: positions needs the same supervised tokens on both sides, but this batch "
            f"has {len(student)} for the student and {len(teacher.tokens)} for the teacher"
            + (" with other ids" if same_count else "")
            + ". Use `alignment: cma`."
        )
    return Aligned(projectors.t2s(teacher.hidden), projectors.s2t(student_hidden))


def align_exact_pairs(
    student_hidden: Tensor, pairs: Tensor, teacher: TeacherSignal, projectors: Projectors
) -> Aligned:
    """Tokens that stand for the same bytes on both sides meet; the others meet nothing
    (arXiv 2504.11426, §3.4: exact token alignment).

    Args:
        student_hidden: [N, d].
        pairs: [P, 2] indices of the student's and of the teacher's token.
    """
    ours, theirs = pairs.unbind(1)
    projected = projectors.t2s(teacher.hidden[theirs].to(student_hidden.dtype))
    t2s = torch.zeros_like(student_hidden).index_copy_(0, ours, projected)
    mask = torch.zeros(len(t2s), dtype=torch.bool, device=t2s.device).index_fill_(0, ours, True)
    return Aligned(t2s, projectors.s2t(student_hidden[ours]), mask, theirs)


def sample_std(states: Tensor, sample_ids: Tensor) -> Tensor:
    """[M, 1] unbiased standard deviation over all numbers of each token's sample.

    The published code takes it over the whole batch, padding included. Per sample it depends on
    nothing but the sample: not on padding, packing or what else is in the batch.

    Args:
        states: [M, k], k > 1.
        sample_ids: [M] int64.
    """
    wide = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
    samples = int(sample_ids.max()) + 1 if len(sample_ids) else 0
    k = states.shape[1]
    count = torch.bincount(sample_ids, minlength=samples).to(wide) * k
    mean = wide.new_zeros(samples).index_add_(0, sample_ids, wide.sum(1)) / count.clamp_min(1)
    squares = (wide - mean[sample_ids].unsqueeze(1)).square().sum(1)
    variance = wide.new_zeros(samples).index_add_(0, sample_ids, squares)
    std = (variance / (count - 1).clamp_min(1)).sqrt()
    return std[sample_ids].unsqueeze(1)


def align_with_attention(
    student_hidden: Tensor,
    student_embedded: tuple[Tensor, Tensor],
    student: Side,
    teacher: TeacherSignal,
    projectors: Projectors,
    stds: tuple[Tensor, Tensor, Tensor] | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
) -> Aligned:
    """Cross-model attention (arXiv 2406.17328, §3.3, eq. 8-11): each token attends to the other
    side's supervised tokens of its own sample.

        Q = query([E_s x ; E_s y])                         [N, 2D]
        K = [E_t x ; E_t y] / std                          [M, 2D]
        A = Q Kᵀ / sqrt(2D), pairs of the same sample only [N, M]
        t2s_hidden = softmax(A)  t2s(h_t / std + E_t y / std)
        s2t_hidden = softmax(Aᵀ) s2t(h_s)

    with x the input token and y the label of each supervised position. Works block by block, so
    memory grows with the number of samples, not with its square.

    Args:
        student_hidden: [N, d].
        student_embedded: the student's input embeddings of x and y, [N, d] each, taken as given
            (no gradient flows into the embedding through the attention).
        stds: [M, 1] each, of [E_t x ; E_t y], h_t and E_t y; default `sample_std` of each.
        spans: [N, 2] and [M, 2] first byte and end of each token, for causal attention; default
            none. A student token then attends only to teacher tokens that end no later than it
            does: a value knows its token's label, so what counts is the token's end. A teacher
            token attends only to student tokens that begin no later than it does: the student's
            state has read what is before its token. Both ways an exact pair sees each other.
    """
    assert projectors.query is not None, "these projectors were built for positions"
    dtype = student_hidden.dtype
    query = projectors.query(torch.cat([e.detach().to(dtype) for e in student_embedded], dim=1))
    key = torch.cat([teacher.embedded_inputs, teacher.embedded_labels], dim=1)
    if stds is None:
        ids = teacher.tokens.sample_ids
        stds = tuple(  # type: ignore[assignment]
            sample_std(x, ids) for x in (key, teacher.hidden, teacher.embedded_labels)
        )
    assert stds is not None
    key = (key / stds[0]).to(dtype)
    value_t = projectors.t2s(
        (teacher.hidden / stds[1] + teacher.embedded_labels / stds[2]).to(dtype)
    )
    value_s = projectors.s2t(student_hidden)

    samples = int(max(student.sample_ids.max(), teacher.tokens.sample_ids.max())) + 1
    counts_N = torch.bincount(student.sample_ids, minlength=samples).tolist()
    counts_M = torch.bincount(teacher.tokens.sample_ids, minlength=samples).tolist()
    blocks = zip(
        query.split(counts_N),
        key.split(counts_M),
        value_t.split(counts_M),
        value_s.split(counts_N),
        *((s.split(c) for s, c in zip(spans, (counts_N, counts_M), strict=True)) if spans else ()),
        strict=True,
    )
    t2s, s2t, seen, seen_by = [], [], [], []
    for q, k, v_t, v_s, *bounds in blocks:
        if len(q) == 0 or len(k) == 0:
            # Preparation drops rows that one side does not supervise.
            assert len(q) == len(k) == 0, "a sample is supervised on one side only"
            continue
        scores = (q @ k.T).float() / math.sqrt(k.shape[1])
        to_teacher = to_student = scores
        if bounds:
            (start, end), (teacher_start, teacher_end) = (b.unbind(1) for b in bounds)
            readable, read = teacher_end <= end[:, None], start[:, None] <= teacher_start
            # Finite, so that a token which may see nothing gives no NaN; it is left out below.
            lowest = torch.finfo(scores.dtype).min
            to_teacher, to_student = (scores.masked_fill(~m, lowest) for m in (readable, read))
            seen.append(readable.any(1))
            seen_by.append(read.any(0))
        t2s.append(to_teacher.softmax(1).to(dtype) @ v_t)
        s2t.append(to_student.softmax(0).to(dtype).T @ v_s)
    if not spans:
        return Aligned(torch.cat(t2s), torch.cat(s2t))
    rows = torch.cat(seen_by).nonzero().squeeze(1)
    return Aligned(torch.cat(t2s), torch.cat(s2t)[rows], torch.cat(seen), rows)
