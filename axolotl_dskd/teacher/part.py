"""The teacher's side of a batch: of rows, of some of its samples, and as it was before padding.

Knows batches; not what teachers make of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_dskd.types import IGNORE_INDEX, DualBatch


def of_rows(rows: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device) -> DualBatch:
    """The teacher's side of prepared rows, padded; the student's is empty."""
    ids, labels = (
        [torch.as_tensor(row[column], dtype=torch.long) for row in rows]
        for column in ("teacher_input_ids", "teacher_labels")
    )
    nothing = torch.zeros((0, 1), dtype=torch.long, device=device)
    return DualBatch(
        nothing,
        nothing,
        nothing,
        pad_sequence(ids, True, pad_id).to(device),
        pad_sequence(labels, True, IGNORE_INDEX).to(device),
        pad_sequence([torch.ones_like(i) for i in ids], True).to(device),
    )


def indices(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """[k] int64 on a device, for which the host does not wait: a plain copy to a GPU would end
    only with all that the GPU has been told before."""
    return torch.as_tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


def with_samples(batch: DualBatch, samples: list[int]) -> DualBatch:
    """The batch with some of its samples, maybe none, on the teacher's side."""
    if len(samples) == len(batch.teacher_labels):
        return batch
    states, cached, written = batch.cached_states, batch.cached, batch.written
    at = indices(samples, batch.teacher_labels.device)
    if states is not None:
        states = states[torch.isin(batch.teacher_side().sample_ids, at)]
    return replace(
        batch,
        teacher_input_ids=batch.teacher_input_ids[at],
        teacher_labels=batch.teacher_labels[at],
        teacher_attention_mask=batch.teacher_attention_mask[at],
        cached_states=states,
        cached=None if cached is None else cached[at],
        written=None if written is None else replace(written, samples=written.samples[at]),
        known=batch.sizes.with_teachers(samples),
    )


def unpadded(batch: DualBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of each sample, as they were before they were padded."""
    lengths = batch.sizes.lengths
    ids, labels = batch.teacher_input_ids.cpu().numpy(), batch.teacher_labels.cpu().numpy()
    return [(i[:n], y[:n]) for i, y, n in zip(ids, labels, lengths, strict=True)]
