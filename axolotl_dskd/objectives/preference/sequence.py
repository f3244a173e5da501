"""Pairs of answers: sums over each, by either model over its own tokens.

Knows samples and pairs of them; nothing of which tokens are about the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives.base import label_logprobs
from axolotl_dskd.types import Side, View


def per_sample(values: Tensor, tokens: Side, samples: int) -> Tensor:
    """[S] sums of values [n] of a side's tokens."""
    return values.new_zeros(samples).index_add(0, tokens.sample_ids, values)


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch that can be compared, and those that cannot: an answer is empty on a
    side, or both are the same.

    Attributes:
        preferred, other: [K] samples of those that can.
        lengths: [S] student tokens of every sample.
        left_out: [all pairs] bool.
        first: [all pairs] samples to prefer.
    """

    preferred: Tensor
    other: Tensor
    lengths: Tensor
    left_out: Tensor
    first: Tensor

    @classmethod
    def of(cls, student: View, teacher: View) -> Pairs:
        """Those of a batch, which may have none."""
        written, ids = student.written, student.tokens.sample_ids
        if written is None or written.pairs is None:
            last = (int(view.tokens.sample_ids[-1]) for view in (student, teacher) if len(view))
            samples, both = 1 + max(last, default=-1), ids.new_empty((0, 2))
        else:
            samples, both = len(written.samples), written.pairs
        lengths, theirs = (
            per_sample(torch.ones_like(side.labels), side, samples)
            for side in (student.tokens, teacher.tokens)
        )
        empty = (lengths * theirs == 0)[both].any(1)
        left_out = empty | same_answer(student.tokens, lengths, both)
        preferred, other = both[~left_out].unbind(1)
        return cls(preferred, other, lengths, left_out, both[:, 0])

    def __len__(self) -> int:
        return len(self.preferred)

    def samples(self) -> Tensor:
        """[S] bool: those that are in a pair."""
        found = torch.zeros_like(self.lengths, dtype=torch.bool)
        found[self.preferred] = True
        found[self.other] = True
        return found

    def spread(self, values: Tensor, tokens: Side) -> Tensor:
        """[N] each token has the value [K] of its pair, of all where it is in several."""
        total = values.new_zeros(len(self.lengths))
        for side in (self.preferred, self.other):
            total = total.index_add(0, side, values)
        return total[tokens.sample_ids]


def same_answer(tokens: Side, lengths: Tensor, pairs: Tensor) -> Tensor:
    """[K] bool: pairs [K, 2] of samples whose labels are the same, one by one."""
    equal = lengths[pairs[:, 0]] == lengths[pairs[:, 1]]
    counts = lengths[pairs[:, 0]] * equal
    number = torch.arange(len(pairs), device=pairs.device).repeat_interleave(counts)
    place = torch.arange(len(number), device=pairs.device) - (counts.cumsum(0) - counts)[number]
    begins = (lengths.cumsum(0) - lengths)[pairs]
    ours, theirs = (tokens.labels[begins[number, side] + place] for side in (0, 1))
    differing = torch.zeros_like(counts).index_add(0, number, (ours != theirs).to(counts))
    return equal & (differing == 0)


def teachers_sums(teacher: View, samples: Tensor, budget: Budget) -> Tensor:
    """[S] float64 log-probability of each answer that is asked for, 0 of the others.

    Args:
        samples: [S] bool.
    """
    tokens = teacher.tokens
    rows = samples[tokens.sample_ids].nonzero().flatten()
    log_p = label_logprobs(teacher, rows, budget)
    return per_sample(log_p.double(), tokens.at(rows), len(samples))
