"""What one evaluation finds, gathered by row over batches and ranks.

A row is known by its tokens and labels. So packs, the order of rows and the rows that a distributed
sampler repeats to fill its last batch change nothing: a row counts once, also one that the data
have twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from axolotl_dskd.evaluation.measure import Measured
from axolotl_dskd.evaluation.rows import Row
from axolotl_dskd.ranks import gather_objects
from axolotl_dskd.types import DualBatch


def row_keys(batch: DualBatch) -> list[str]:
    """What the rows of a batch are known by, in the order of the samples' numbers."""
    both = torch.stack([batch.input_ids, batch.labels]).flatten(1).cpu()
    owners = batch.segment_ids.flatten().cpu()
    return [
        xxhash.xxh3_64_hexdigest(both[:, owners == sample].numpy().tobytes())
        for sample in range(int(owners.max()) + 1)
    ]


class RowScores:
    """What one evaluation has found so far, by row."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def add(
        self, keys: Sequence[str], sample_ids: Tensor, measured: Measured, text_bytes: Tensor
    ) -> None:
        """Count a batch in.

        Args:
            keys: of its rows, see `row_keys`.
            sample_ids: [N] of its supervised student tokens.
            measured: of the same tokens.
            text_bytes: [N] of the same tokens.
        """
        columns = (measured.nats, text_bytes, torch.ones_like(measured.nats), measured.right)
        values = torch.stack([column.double() for column in columns], 1)
        sums = values.new_zeros(len(keys), len(columns)).index_add_(0, sample_ids, values).tolist()
        for key, (nats, size, tokens, right) in zip(keys, sums, strict=True):
            if tokens:
                self.rows[key] = Row(nats, int(size), int(tokens), right)

    def gathered(self) -> dict[str, Row]:
        """Those of all ranks, in the order of their keys."""
        rows = {key: row for part in gather_objects(self.rows) for key, row in part.items()}
        return dict(sorted(rows.items()))
