"""How states of one model meet tokens of the other: paired tokens, or cross-model attention.

An exchange takes both sides' views and the projectors and gives projected states. It knows nothing
of heads, vocabularies' meaning or losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.types import Matches, View


@dataclass(frozen=True)
class Exchanged:
    """Projected states, ready for the losses.

    Attributes:
        t2s: [K, d] the teacher's states in the student's space.
        student_rows: [K] the student token that each of them is about; None: K = N, in order.
        s2t: [K', D] the student's states in the teacher's space.
        teacher_rows: [K'] the teacher token that each of them is about; None: K' = M, in order.
    """

    t2s: Tensor
    student_rows: Tensor | None
    s2t: Tensor
    teacher_rows: Tensor | None


def exchange_pairs(
    student: View, teacher: View, pairs: Tensor, projectors: Projectors
) -> Exchanged:
    """Two tokens of a pair meet; the others meet nothing.

    With one vocabulary the pairs are all tokens (arXiv 2406.17328, §3.2); with two, those that
    stand for the same bytes (arXiv 2504.11426, §3.4: exact token alignment).

    Args:
        student, teacher: with states.
        pairs: [P, 2] indices of the student's and of the teacher's token, ascending.
    """
    ours, theirs = _states(student), _states(teacher)
    if len(pairs) == len(ours) == len(theirs):  # ascending, so each token meets its like
        return Exchanged(projectors.t2s(theirs.to(ours.dtype)), None, projectors.s2t(ours), None)
    i, j = pairs.unbind(1)
    return Exchanged(projectors.t2s(theirs[j].to(ours.dtype)), i, projectors.s2t(ours[i]), j)


def sample_std(states: Tensor, sample_ids: Tensor) -> Tensor:
    """[M, 1] unbiased standard deviation over all numbers of each token's sample.

    The published code takes it over the whole batch, padding included. Per sample it depends on
    nothing but the sample: not on padding, packing or what else is in the batch.

    Args:
        states: [M, k], k > 1.
        sample_ids: [M] int64, ascending.
    """
    x = states.to(wide(states.dtype))
    k = states.shape[1]
    # Sums lie where their sample begins: to count the samples, the host would wait for the GPU.
    first = torch.searchsorted(sample_ids, sample_ids)
    nothing = x.new_zeros(len(x))
    count = nothing.index_add(0, first, nothing + k)
    mean = nothing.index_add(0, first, x.sum(1)) / count.clamp_min(1)
    squares = (x - mean[first].unsqueeze(1)).square().sum(1)
    variance = nothing.index_add(0, first, squares)
    std = (variance / (count - 1).clamp_min(1)).sqrt()
    return std[first].unsqueeze(1)


Std = Callable[[Tensor, Tensor], Tensor]


def exchange_by_attention(
    student: View,
    teacher: View,
    projectors: Projectors,
    *,
    causal: Matches | None = None,
    std: Std = sample_std,
) -> Exchanged:
    """Cross-model attention (arXiv 2406.17328, §3.3, eq. 8-11): each token attends to the other
    side's supervised tokens of its own sample.

        Q = query([E_s x ; E_s y])                         [N, 2D]
        K = [E_t x ; E_t y] / std                          [M, 2D]
        A = Q Kᵀ / sqrt(2D), pairs of the same sample only [N, M]
        t2s = softmax(A)  t2s(h_t / std + E_t y / std)     [N, d]
        s2t = softmax(Aᵀ) s2t(h_s)                         [M, D]

    with x the input token and y the label of each supervised position. Works sample by sample, so
    memory grows with the number of samples, not with its square.

    Args:
        student: with states and embeddings; these are taken as given (no gradient flows into the
            embedding through the attention).
        teacher: with states and embeddings.
        causal: the byte spans by which a token sees only what has been read by then; None: all.
            A student token then attends only to teacher tokens that end no later than it does: a
            value knows its token's label, so what counts is the token's end. A teacher token
            attends only to student tokens that begin no later than it does: the student's state
            has read what is before its token. Both ways an exact pair sees each other.
        std: [M, k] states and [M] sample ids to the [M, 1] divisor of the states.
    """
    assert projectors.query is not None, "these projectors were built without attention"
    assert student.embedded is not None and teacher.embedded is not None
    ours, theirs = _states(student), _states(teacher)
    dtype, ids = ours.dtype, teacher.tokens.sample_ids
    query = projectors.query(torch.cat([e.detach().to(dtype) for e in student.embedded], dim=1))
    key = torch.cat(teacher.embedded, dim=1)
    key = (key / std(key, ids)).to(dtype)
    label = teacher.embedded[1]
    value_t = projectors.t2s((theirs / std(theirs, ids) + label / std(label, ids)).to(dtype))
    value_s = projectors.s2t(ours)

    blocks = [
        _block(query[n], key[m], value_t[m], value_s[n], _visible(causal, n, m))
        for n, m in _samples(student, teacher)
    ]
    t2s, s2t = torch.cat([b.t2s for b in blocks]), torch.cat([b.s2t for b in blocks])
    if causal is None:
        return Exchanged(t2s, None, s2t, None)
    rows = torch.cat([b.seeing for b in blocks]).nonzero().squeeze(1)
    teacher_rows = torch.cat([b.seen for b in blocks]).nonzero().squeeze(1)
    return Exchanged(t2s[rows], rows, s2t[teacher_rows], teacher_rows)


@dataclass(frozen=True)
class _Block:
    """One sample's tokens after attention.

    Attributes:
        t2s: [n, d]. s2t: [m, D].
        seeing: [n] bool, student tokens that may see a teacher token; seen: [m] bool, teacher
            tokens that may see a student token. The others' states mean nothing.
    """

    t2s: Tensor
    s2t: Tensor
    seeing: Tensor
    seen: Tensor


def _block(
    query: Tensor,
    key: Tensor,
    value_t: Tensor,
    value_s: Tensor,
    visible: tuple[Tensor, Tensor] | None,
) -> _Block:
    """Attention both ways within one sample.

    Args:
        query: [n, 2D]. key: [m, 2D]. value_t: [m, d]. value_s: [n, D].
        visible: [n, m] bool, what the student's tokens and what the teacher's may see; None: all.
    """
    scores = query @ key.T
    scores = scores.to(wide(scores.dtype)) / math.sqrt(key.shape[1])
    to_teacher = to_student = scores
    everything = torch.ones_like(scores, dtype=torch.bool)
    readable, read = visible or (everything, everything)
    if visible is not None:
        # Finite, so that a token which may see nothing gives no NaN; it is left out afterwards.
        lowest = torch.finfo(scores.dtype).min
        to_teacher = scores.masked_fill(~readable, lowest)
        to_student = scores.masked_fill(~read, lowest)
    return _Block(
        to_teacher.softmax(1).to(value_t.dtype) @ value_t,
        to_student.softmax(0).to(value_s.dtype).T @ value_s,
        readable.any(1),
        read.any(0),
    )


def _visible(causal: Matches | None, n: slice, m: slice) -> tuple[Tensor, Tensor] | None:
    """[n, m] bool each: teacher tokens that end by a student token's end, and student tokens that
    begin by a teacher token's begin."""
    if causal is None:
        return None
    start, end = causal.spans[n].unbind(1)
    teacher_start, teacher_end = causal.teacher_spans[m].unbind(1)
    return teacher_end <= end[:, None], start[:, None] <= teacher_start


def _samples(student: View, teacher: View) -> Iterator[tuple[slice, slice]]:
    """The rows of both sides of each sample, and none at the end: so a batch without tokens has a
    graph through all projectors, too."""
    n = m = 0
    counts = (view.tokens.of_each_sample() for view in (student, teacher))
    for ours, theirs in zip_longest(*counts, fillvalue=0):
        # Preparation drops rows that one side does not supervise.
        assert bool(ours) == bool(theirs), "one side is not supervised"
        if ours:
            yield slice(n, n + ours), slice(m, m + theirs)
        n, m = n + ours, m + theirs
    yield slice(n, n), slice(m, m)


def _states(view: View) -> Tensor:
    assert view.hidden is not None
    return view.hidden


def rows_of(tokens: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """[k] where in a list of tokens' states some tokens stand, -1 for nowhere.

    Args:
        tokens: [k] which.
        rows: [K] the token of each state; None: state i is token i's.
        count: how many tokens there are.
    """
    if rows is None:
        return tokens
    place = torch.full((count,), -1, dtype=torch.long, device=tokens.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    return place[tokens]
