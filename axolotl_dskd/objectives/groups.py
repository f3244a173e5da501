"""Groups of tokens between byte boundaries that both sides have.

For objectives that compare what whole groups say. Knows rows of two sides; no texts, no logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_dskd.losses import Budget, Part, Stream, grouped_parts
from axolotl_dskd.types import Matches

#: Column of a side in `Groups`.
STUDENT, TEACHER = 0, 1


@dataclass(frozen=True)
class Groups:
    """The groups in which both sides have a token, in order.

    Attributes:
        first, last: [G, 2] first and last row of each, student's first. Both columns ascend.
    """

    first: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, matches: Matches) -> Groups:
        """Those of a batch; a group that one side has no token of is left out."""
        numbers, bounds = [], []
        for groups in (matches.groups, matches.teacher_groups):
            number, count = groups.unique_consecutive(return_counts=True)
            end = count.cumsum(0)
            numbers.append(number)
            bounds.append(torch.stack([end - count, end - 1]))
        # Of numbers that are known to be unique: else it looks for these, and the host waits.
        met = [torch.isin(a, b, assume_unique=True) for a, b in (numbers, numbers[::-1])]
        first, last = torch.stack([b[:, m] for b, m in zip(bounds, met, strict=True)], -1)
        return cls(first, last)

    def within(self, part: Part) -> Groups:
        """Those of a chunk, with rows counted from where it begins on each side."""
        rows = [part["student"], part["teacher"]]
        assert isinstance(rows[0], slice) and isinstance(rows[1], slice)
        here = (self.first[:, STUDENT] >= rows[0].start) & (self.first[:, STUDENT] < rows[0].stop)
        at = here.nonzero().flatten()

        def counted(bounds: Tensor) -> Tensor:
            sides = zip(bounds[at].unbind(1), rows, strict=True)
            return torch.stack([side - r.start for side, r in sides if isinstance(r, slice)], 1)

        return Groups(counted(self.first), counted(self.last))

    def owner(self, side: int, length: int) -> Tensor:
        """[length] which group each row of a side belongs to; G where it belongs to none."""
        rows = torch.arange(length, device=self.first.device)
        if not len(self):
            return torch.zeros_like(rows)
        group = torch.searchsorted(self.first[:, side].contiguous(), rows, right=True) - 1
        inside = (group >= 0) & (rows <= self.last[group.clamp_min(0), side])
        return torch.where(inside, group, len(self))

    def sums(self, side: int, values: Tensor) -> Tensor:
        """[G] sum of a side's values [n] over each group."""
        buckets = values.new_zeros(len(self) + 1)
        return buckets.index_add(0, self.owner(side, len(values)), values)[:-1]

    def rows(self, side: int, length: int) -> Tensor:
        """Rows of a side that belong to a group."""
        return (self.owner(side, length) < len(self)).nonzero().flatten()


def group_chunks(
    matches: Matches, streams: dict[str, Stream], budget: Budget, copies: int
) -> Iterator[Part]:
    """Chunks of the streams `student` and `teacher` that tear no group apart.

    Args:
        copies: float32 copies of each stream's logits that are held beside them.
    """
    groups = {"student": matches.groups, "teacher": matches.teacher_groups}
    return grouped_parts(groups, budget.size(*streams.values(), copies=copies))
