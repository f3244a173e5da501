"""Some samples of a batch on the teacher's side, and samples as they were before they were padded.

Knows batches; not what teachers make of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from axolotl_dskd.types import DualBatch


def with_samples(batch: DualBatch, samples: list[int]) -> DualBatch:
    """The batch with some of its samples, maybe none, on the teacher's side."""
    if len(samples) == len(batch.teacher_labels):
        return batch
    states, cached, written = batch.cached_states, batch.cached, batch.written
    at = torch.tensor(samples, dtype=torch.long, device=batch.teacher_labels.device)
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
