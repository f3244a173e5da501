"""How long answers may be so that what they are packed with stays within its limit."""

from __future__ import annotations

from collections.abc import Sequence


def longest_that_fit(lengths: Sequence[int], room: int) -> int:
    """The largest c with Σ min(length, c) ≤ room; the longest of them where all fit whole.

    Cutting at c takes from the longest alone, and as little as will do. 0 or less: none fit.
    """
    left = sorted(lengths)
    while left and left[0] * len(left) <= room:
        room -= left.pop(0)
    return room // len(left) if left else max(lengths, default=0)
