"""Axolotl's collators with the teacher's side carried along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_dskd.data.reconcile import EXACT_PAIRS, SPANS, TEACHER_SPANS
from axolotl_dskd.types import IGNORE_INDEX

_TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")
_SPAN_COLUMNS = (SPANS, TEACHER_SPANS)
#: Columns of a prepared row that are ours.
COLUMNS = (*_TEACHER_COLUMNS, EXACT_PAIRS, *_SPAN_COLUMNS)


def needed_columns(*, spans: bool) -> tuple[str, ...]:
    """Those of ours that training reads: most of the numbers are spans, which few runs need."""
    return COLUMNS if spans else tuple(c for c in COLUMNS if c not in _SPAN_COLUMNS)


class DualCollator:
    """Wraps any collator: takes the teacher's columns out, lets it work, adds our tensors.

    The inner collator may pad rows (a list of rows) or pack them (a list of lists of rows). Ours
    is one teacher row per sample, padded on the right, the number of each student token's sample,
    -1 on padding, and, where rows have them, the exact pairs and the spans of all supervised
    tokens, sample by sample. `input_ids` stays the batch's first key.

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
            ValueError: rows without a teacher side.
        """
        packed = isinstance(features[0], list)
        rows = features if packed else [[f] for f in features]
        samples = [sample for row in rows for sample in row]
        if any(c not in samples[0] for c in _TEACHER_COLUMNS):
            raise ValueError(
                f"a row has no teacher side; it has {sorted(samples[0])}. The dataset was "
                "prepared without dskd: delete dataset_prepared_path and prepare it again."
            )
        plain = [[{k: v for k, v in s.items() if k not in COLUMNS} for s in row] for row in rows]
        lengths = [[len(s["input_ids"]) for s in row] for row in rows]
        batch = dict(self.inner(plain if packed else [row[0] for row in plain], **kwargs))

        batch["dskd_segment_ids"] = self._segment_ids(lengths, batch["input_ids"].shape)
        ids, labels = (
            [torch.from_numpy(np.array(s[column], dtype=np.int64)) for s in samples]
            for column in _TEACHER_COLUMNS
        )
        batch["dskd_teacher_input_ids"] = pad_sequence(ids, True, self.teacher_pad_id)
        batch["dskd_teacher_labels"] = pad_sequence(labels, True, IGNORE_INDEX)
        batch["dskd_teacher_attention_mask"] = pad_sequence([torch.ones_like(i) for i in ids], True)
        if self.read_cached is not None:
            batch["dskd_cached_states"], batch["dskd_cached"] = self.read_cached(ids, labels)
        if EXACT_PAIRS in samples[0]:
            batch["dskd_pairs"] = _pairs(samples)
        for key, column in zip(("dskd_spans", "dskd_teacher_spans"), _SPAN_COLUMNS, strict=True):
            if column in samples[0]:
                batch[key] = torch.from_numpy(np.concatenate(_twos(samples, column)))
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


def _pairs(samples: list[dict[str, Any]]) -> Tensor:
    """[P, 3]: number of the sample, and the two tokens' numbers within it."""
    pairs = _twos(samples, EXACT_PAIRS)
    numbers = np.arange(len(pairs)).repeat([len(p) for p in pairs])
    return torch.from_numpy(np.column_stack([numbers, np.concatenate(pairs)]))


def _twos(samples: list[dict[str, Any]], column: str) -> list[np.ndarray]:
    # numpy reads a list of ints several times faster than torch does.
    return [np.asarray(s[column], dtype=np.int64).reshape(-1, 2) for s in samples]
