"""Batches as the collator makes them."""

from __future__ import annotations

import torch

from axolotl_dskd.types import DualBatch


def batch(lengths: list[int], width: int | None = None) -> DualBatch:
    """Rows of these lengths for the teacher alone, the later half of each supervised."""
    generator = torch.Generator().manual_seed(5)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    attention = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 97, (length,), generator=generator)
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
        attention[row, :length] = 1
    segments = torch.zeros(1, 1, dtype=torch.long)
    return DualBatch(ids[:1, :1], labels[:1, :1], segments, ids, labels, attention)
