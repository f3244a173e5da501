"""Counts the rows that a contrast leaves alone.

A written answer is compared with the data's own in one batch: neighbours of a micro-batch belong
together. A packed row that one long sample fills has no neighbour. Knows batches; nothing of who
writes or of what is learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger

from axolotl_dskd.ranks import sum_over_ranks
from axolotl_dskd.samples.base import Batch, Samples

LOG = get_logger(__name__)

#: Where a larger share of a log's rows stands alone, it is said.
MANY = 0.25


class CountedPairs(Samples):
    """A source that writes, with the share of its rows that have no partner.

    Args:
        inner: the source.
        group: rows that belong together.
        device: of collectives.
    """

    def __init__(self, inner: Samples, group: int, device: torch.device) -> None:
        self.inner = inner
        self.group = group
        self.device = device
        self.begins_with_evaluation = inner.begins_with_evaluation
        self._alone = self._rows = 0
        self._is_said = False

    def __call__(self, batches: list[Batch], step: int) -> list[Batch]:
        """See `Samples`. Of a step of data, whose batches are handed on, nothing is counted."""
        taken = self.inner(batches, step)
        if taken is not batches:
            for batch in taken:
                rows = len(batch["dskd_teacher_labels"])
                self._rows += rows
                self._alone += rows % self.group == 1
        return taken

    def metrics(self) -> dict[str, float]:
        """See `Samples`; `dskd/unpaired_rows` is the share of rows without a partner."""
        means = self.inner.metrics()
        counts = torch.tensor([self._alone, self._rows], dtype=torch.float64, device=self.device)
        self._alone = self._rows = 0
        alone, rows = sum_over_ranks(counts).tolist()
        if rows:
            means["dskd/unpaired_rows"] = alone / rows
            if alone / rows > MANY and not self._is_said:
                self._is_said = True
                LOG.warning(
                    f"{alone / rows:.0%} of the rows that the student answers stand alone in their "
                    "packed row, so that no written answer has the data's beside it and nothing "
                    "is learned from a comparison there. Raise sequence_len or micro_batch_size."
                )
        return means

    def dataset(self, rows: Any) -> Any:
        """See `Samples`."""
        return self.inner.dataset(rows)

    def evaluated(self, metrics: dict[str, float], step: int) -> None:
        """See `Samples`."""
        self.inner.evaluated(metrics, step)

    def save(self, folder: Path) -> None:
        """See `Samples`."""
        self.inner.save(folder)

    def load(self, folder: Path) -> None:
        """See `Samples`."""
        self.inner.load(folder)
