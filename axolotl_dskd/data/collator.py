"""Axolotl's collators with the teacher's side carried along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_dskd.data.byte_spans import (
    Spans,
    exact_pairs,
    group_numbers,
    kept_apart,
    start_pairs,
)
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.types import IGNORE_INDEX, DualBatch, Matches

_TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")
#: Columns of a prepared row that are ours.
PREPARED_COLUMNS = (*_TEACHER_COLUMNS, SPANS, TEACHER_SPANS)


class DualCollator:
    """Wraps any collator: takes the teacher's columns out, lets it work, adds our tensors.

    The inner collator may pad rows (a list of rows) or pack them (a list of lists of rows). Ours
    is what `DualBatch` lists: one teacher row per sample, padded on the right, the number of each
    student token's sample, -1 on padding, and the byte matches of all supervised tokens, sample by
    sample. `input_ids` stays the batch's first key.

    Attributes:
        read_cached: looks up a batch's samples in the teacher's cache: lists of ids and labels
            to `DualBatch.cached_states` and `.cached`. Called in the data workers. None: no cache.
    """

    read_cached: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]] | None = None

    def __init__(
        self, inner: Callable[..., Any], *, padding_side: str, teacher_pad_id: int
    ) -> None:
        self.inner = inner
        self.padding_side = padding_side
        self.teacher_pad_id = teacher_pad_id

    def __getattr__(self, name: str) -> Any:
        # Axolotl reads attributes such as `tokenizer` off its collators.
        if name == "inner":
            raise AttributeError(name)  # not there yet while unpickling
        return getattr(self.inner, name)

    def __call__(self, features: list[Any], **kwargs: Any) -> dict[str, Any]:
        """Collate, see the class.

        Raises:
            ValueError: rows without a teacher side or byte spans.
        """
        packed = isinstance(features[0], list)
        rows = features if packed else [[f] for f in features]
        samples = [sample for row in rows for sample in row]
        if any(c not in samples[0] for c in PREPARED_COLUMNS):
            raise ValueError(
                f"a row has no teacher side; it has {sorted(samples[0])}. The dataset was "
                "prepared without dskd: delete dataset_prepared_path and prepare it again."
            )
        ours = set(PREPARED_COLUMNS)
        plain = [[{k: v for k, v in s.items() if k not in ours} for s in row] for row in rows]
        lengths = [[len(s["input_ids"]) for s in row] for row in rows]
        batch = dict(self.inner(plain if packed else [row[0] for row in plain], **kwargs))
        ids, labels = (
            [torch.from_numpy(np.array(s[column], dtype=np.int64)) for s in samples]
            for column in _TEACHER_COLUMNS
        )
        cached_states = cached = None
        if self.read_cached is not None:
            cached_states, cached = self.read_cached(ids, labels)
        dual = DualBatch(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            segment_ids=self._segment_ids(lengths, batch["input_ids"].shape),
            teacher_input_ids=pad_sequence(ids, True, self.teacher_pad_id),
            teacher_labels=pad_sequence(labels, True, IGNORE_INDEX),
            teacher_attention_mask=pad_sequence([torch.ones_like(i) for i in ids], True),
            cached_states=cached_states,
            cached=cached,
            matches=find_matches([s[SPANS] for s in samples], [s[TEACHER_SPANS] for s in samples]),
        )
        dual.put_into(batch)
        return batch

    def _segment_ids(self, lengths: list[list[int]], shape: torch.Size) -> Tensor:
        segment_ids = torch.full(shape, -1, dtype=torch.long)
        sample = 0
        for row, row_lengths in enumerate(lengths):
            at = 0 if self.padding_side == "right" else shape[1] - sum(row_lengths)
            for length in row_lengths:
                segment_ids[row, at : at + length] = sample
                at += length
                sample += 1
        return segment_ids


def find_matches(student: Sequence[bytes], teacher: Sequence[bytes]) -> Matches:
    """Byte matches of a batch from the stored spans of its samples (`Spans.to_bytes`).

    Tokens are numbered over the batch, sample after sample, as in `Side`.
    """
    spans, samples = Spans.of_rows(student)
    teacher_spans, teacher_samples = Spans.of_rows(teacher)
    both = kept_apart(spans, samples, teacher_spans, teacher_samples)
    groups, teacher_groups = group_numbers(*both)
    return Matches(
        spans=torch.from_numpy(spans.array()),
        teacher_spans=torch.from_numpy(teacher_spans.array()),
        exact=torch.from_numpy(np.stack(exact_pairs(*both), axis=1)),
        starts=torch.from_numpy(np.stack(start_pairs(*both), axis=1)),
        groups=torch.from_numpy(groups),
        teacher_groups=torch.from_numpy(teacher_groups),
    )
