"""Which rows of each stream belong to which chunk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from axolotl_dskd.losses.chunks import Rows


def even_parts(lengths: Mapping[str, int], size: int) -> Iterator[dict[str, Rows]]:
    """Chunks of streams that all have equally many rows, in order."""
    (length,) = set(lengths.values())
    for start in range(0, length, size):
        yield dict.fromkeys(lengths, slice(start, min(start + size, length)))


def paired_parts(
    rows: Mapping[str, Tensor], alone: str, length: int, size: int
) -> Iterator[dict[str, Rows]]:
    """Chunks of paired rows, then chunks of what is left of one stream.

    Args:
        rows: [P] of each stream, those of one place belong together.
        alone: the stream whose other rows are to be seen, too; each of its rows is in one pair at
            most.
        length: how many rows it has.
        size: tokens per chunk.
    """
    (pairs,) = {len(index) for index in rows.values()}
    for start in range(0, pairs, size):
        yield {name: index[start : start + size] for name, index in rows.items()}
    if pairs < length:
        left = torch.ones(length, dtype=torch.bool, device=rows[alone].device)
        left[rows[alone]] = False
        for index in left.nonzero_static(size=length - pairs).flatten().split(size):
            yield {alone: index}


def grouped_parts(groups: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Rows]]:
    """Chunks that are cut where a group ends in all streams, so that none is torn apart.

    Args:
        groups: [n] of each stream, the group of each row, ascending over the same numbers. A group
            may have no row in a stream; a chunk then has an empty range there.
        size: rows of a chunk in each stream at most, unless a group alone has more.
    """
    numbers = {name: group.cpu() for name, group in groups.items()}
    last = max((int(group[-1]) for group in numbers.values() if len(group)), default=-1)
    every = torch.arange(last + 2)
    begins = {name: torch.searchsorted(group, every) for name, group in numbers.items()}
    first = 0
    while first <= last:
        # The farthest cut that all streams have room for, at least one group on.
        room = [
            int(torch.searchsorted(begin, begin[first] + size, right=True)) - 1
            for begin in begins.values()
        ]
        cut = min(last + 1, max(first + 1, min(room)))
        yield {n: slice(int(begin[first]), int(begin[cut])) for n, begin in begins.items()}
        first = cut
