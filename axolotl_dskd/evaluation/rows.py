"""Sums per held-out row, over batches and ranks.

A row is known by its tokens. So packs, the order of rows and the rows that a distributed sampler
repeats to fill its last batch change nothing: a row counts once, also one that the data have
twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from axolotl_dskd.evaluation.measure import Measured
from axolotl_dskd.ranks import gather_objects
from axolotl_dskd.types import DualBatch


@dataclass(frozen=True)
class Row:
    """Sums over the supervised tokens of one row: nats, bytes of text, tokens, first choices that
    are right."""

    nats: float
    text_bytes: int
    tokens: int
    right: float

    def as_list(self) -> list[float]:
        """In the order of the fields."""
        return list(astuple(self))


class RowScores:
    """What one evaluation has found so far, by row."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def add(self, batch: DualBatch, measured: Measured, text_bytes: Tensor) -> None:
        """Count a batch in.

        Args:
            measured: of its supervised student tokens.
            text_bytes: [N] of the same tokens.
        """
        sample_ids = batch.segment_ids[batch.student_mask()]
        samples = int(batch.segment_ids.max()) + 1
        columns = (measured.nats, text_bytes, torch.ones_like(measured.nats), measured.right)
        values = torch.stack([column.double() for column in columns], 1)
        sums = values.new_zeros(samples, len(columns)).index_add_(0, sample_ids, values).tolist()
        flat, owners = batch.input_ids.flatten().cpu(), batch.segment_ids.flatten().cpu()
        for sample, (nats, size, tokens, right) in enumerate(sums):
            if tokens:
                key = xxhash.xxh3_64_hexdigest(flat[owners == sample].numpy().tobytes())
                self.rows[key] = Row(nats, int(size), int(tokens), right)

    def gathered(self) -> dict[str, Row]:
        """Those of all ranks, in the order of their keys."""
        rows = {key: row for part in gather_objects(self.rows) for key, row in part.items()}
        return dict(sorted(rows.items()))


def means(rows: Mapping[str, Row]) -> dict[str, float]:
    """Bits per byte and the share of right first choices over rows; nothing without rows."""
    nats, text_bytes, tokens, right = totals(rows.values())
    if not text_bytes:
        return {}
    return {
        "dskd/bits_per_byte": bits_per_byte(nats, text_bytes),
        "dskd/accuracy": right / tokens,
    }


def totals(rows: Iterable[Row]) -> tuple[float, int, int, float]:
    """The sums of all fields."""
    columns: Any = list(zip(*(astuple(row) for row in rows), strict=True)) or [(0,)] * 4
    nats, text_bytes, tokens, right = columns
    return math.fsum(nats), sum(text_bytes), sum(tokens), math.fsum(right)


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Nats of some tokens and bytes of their text, as bits per byte."""
    return nats / math.log(2) / text_bytes
