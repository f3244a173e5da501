"""Axolotl's collators with the teacher's side carried along."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from axolotl.utils.collators.batching import (
    BatchSamplerDataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from axolotl_dskd.data.byte_spans import (
    BYTES_PER_TOKEN,
    Spans,
    exact_pairs,
    group_numbers,
    kept_apart,
    start_pairs,
)
from axolotl_dskd.data.reconcile import SPANS, TEACHER, TEACHER_SPANS
from axolotl_dskd.types import IGNORE_INDEX, DualBatch, Matches, Written

_TEACHER_COLUMNS = ("teacher_input_ids", "teacher_labels")
#: Column of a row whose answer the student has just written: [n] float32 as bytes, the
#: log-probability of each of its supervised tokens.
LOGPROBS = "dskd_logprobs"
#: Column of such a row where the teacher took part in drawing: [n] float32 as bytes, what
#: `Written.weights` says of each of its supervised tokens.
WEIGHTS = "dskd_weights"
#: Column of rows with the same prompt: a number of their own in the batch.
GROUP = "dskd_group"
#: Columns of a prepared row that are ours.
PREPARED_COLUMNS = (*_TEACHER_COLUMNS, SPANS, TEACHER_SPANS)

#: Ids and labels of samples to `DualBatch.cached_states` and `.cached`.
_Reader = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]


class DualCollator:
    """Wraps any collator: takes the teacher's columns out, lets it work, adds our tensors.

    The inner collator may pad rows (a list of rows) or pack them (a list of lists of rows). Ours
    is what `DualBatch` lists: one teacher row per sample, padded on the right, the number of each
    student token's sample, -1 on padding, and the byte matches of all supervised tokens, sample by
    sample. `input_ids` stays the batch's first key.

    Attributes:
        readers: of each teacher, what looks up samples in its cache, or None: it has none. Called
            in the data workers.
    """

    readers: Sequence[_Reader | None] = ()

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
        ours = {*PREPARED_COLUMNS, TEACHER, LOGPROBS, WEIGHTS, GROUP}
        plain = [[{k: v for k, v in s.items() if k not in ours} for s in row] for row in rows]
        lengths = [[len(s["input_ids"]) for s in row] for row in rows]
        batch = dict(self.inner(plain if packed else [row[0] for row in plain], **kwargs))
        ids, labels = (
            [torch.from_numpy(np.array(s[column], dtype=np.int64)) for s in samples]
            for column in _TEACHER_COLUMNS
        )
        teachers = None
        if TEACHER in samples[0]:
            teachers = torch.tensor([int(sample[TEACHER]) for sample in samples])
        cached_states, cached = _read_cached(self.readers, ids, labels, teachers)
        dual = DualBatch(
            input_ids=batch["input_ids"],
            labels=batch["labels"],
            segment_ids=self._segment_ids(lengths, batch["input_ids"].shape),
            teacher_input_ids=pad_sequence(ids, True, self.teacher_pad_id),
            teacher_labels=pad_sequence(labels, True, IGNORE_INDEX),
            teacher_attention_mask=pad_sequence([torch.ones_like(i) for i in ids], True),
            cached_states=cached_states,
            cached=cached,
            teachers=teachers,
            matches=find_matches([s[SPANS] for s in samples], [s[TEACHER_SPANS] for s in samples]),
            written=_written(samples),
        )
        replace(dual, known=dual.sizes).put_into(batch)
        return batch

    @property
    def packs(self) -> bool:
        """Whether the inner collator joins the samples of a list to one row."""
        return isinstance(
            self.inner, BatchSamplerDataCollatorForSeq2Seq | V2BatchSamplerDataCollatorForSeq2Seq
        )

    def again(self, rows: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Collate samples row by row, as `samples_of` gave them."""
        return self(rows if self.packs else [sample for row in rows for sample in row])

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


def _read_cached(
    readers: Sequence[_Reader | None],
    ids: list[Tensor],
    labels: list[Tensor],
    teachers: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """`DualBatch.cached_states` and `.cached`: what each sample's teacher has of it."""
    if not any(readers):
        return None, None
    if teachers is None:
        (reader,) = readers
        assert reader is not None
        return reader(ids, labels)
    tokens = [int((label[1:] != IGNORE_INDEX).sum()) for label in labels]
    states = [torch.zeros((count, 0), dtype=torch.uint8) for count in tokens]
    cached = torch.zeros(len(ids), dtype=torch.bool)
    for number, reader in enumerate(readers):
        mine = (teachers == number).nonzero().flatten().tolist()
        if reader is None or not mine:
            continue
        found, cached[mine] = reader([ids[k] for k in mine], [labels[k] for k in mine])
        for k, rows in zip(mine, found.split([tokens[k] for k in mine]), strict=True):
            states[k] = rows
    width = max(rows.shape[1] for rows in states)
    return torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in states]), cached


def _written(samples: Sequence[dict[str, Any]]) -> Written | None:
    """What is known of answers that the student wrote, where there are any."""
    if not any(LOGPROBS in sample for sample in samples):
        return None
    weighted = any(WEIGHTS in sample for sample in samples)
    return Written(
        samples=torch.tensor([LOGPROBS in sample for sample in samples]),
        logprobs=_of_tokens(samples, LOGPROBS, 0.0),
        weights=_of_tokens(samples, WEIGHTS, 1.0) if weighted else None,
        pairs=_pairs(samples),
    )


def _of_tokens(samples: Sequence[dict[str, Any]], column: str, otherwise: float) -> Tensor:
    """[N] float32 of each supervised token, in samples without the column a number."""
    values = [
        np.frombuffer(sample[column], "<f4")
        if column in sample
        else np.full(len(sample[SPANS]) // BYTES_PER_TOKEN, otherwise, "<f4")
        for sample in samples
    ]
    return torch.from_numpy(np.concatenate(values).astype(np.float32))


def _pairs(samples: Sequence[dict[str, Any]]) -> Tensor | None:
    """[K, 2] the data's answer and each written one to the same prompt."""
    preferred = {s[GROUP]: k for k, s in enumerate(samples) if GROUP in s and LOGPROBS not in s}
    pairs = [
        (preferred[s[GROUP]], k)
        for k, s in enumerate(samples)
        if LOGPROBS in s and s.get(GROUP) in preferred
    ]
    return torch.tensor(pairs) if pairs else None


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


def samples_of(inputs: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The samples of a collated batch, row by row: what `DualCollator.again` takes.

    A row holds several where it was packed, else one. Positions count from 0 in each sample.
    """
    batch = DualBatch.pop_from({name: x.cpu() for name, x in inputs.items() if _is_tensor(x)})
    lengths = batch.sizes.lengths
    spans = batch.matches.spans.split(batch.sizes.student)
    teacher_spans = batch.matches.teacher_spans.split(batch.sizes.teacher)
    rows = []
    for ids, labels, segments in zip(batch.input_ids, batch.labels, batch.segment_ids, strict=True):
        row = []
        for number in segments[segments >= 0].unique().tolist():
            here = segments == number
            teacher_ids, teacher_labels = (
                side[number, : lengths[number]].tolist()
                for side in (batch.teacher_input_ids, batch.teacher_labels)
            )
            row.append(
                {
                    "input_ids": ids[here].tolist(),
                    "labels": labels[here].tolist(),
                    "teacher_input_ids": teacher_ids,
                    "teacher_labels": teacher_labels,
                    SPANS: _stored(spans[number]),
                    TEACHER_SPANS: _stored(teacher_spans[number]),
                }
            )
            if batch.teachers is not None:
                row[-1][TEACHER] = int(batch.teachers[number])
        rows.append(row)
    columns = [name for name in ("attention_mask", "position_ids") if name in inputs]
    for sample in (sample for row in rows for sample in row):
        fill_columns(sample, columns)
    return rows


def fill_columns(sample: dict[str, Any], columns: Iterable[str]) -> None:
    """Give a sample the columns that follow from its length."""
    length = len(sample["input_ids"])
    made = {"attention_mask": [1] * length, "position_ids": list(range(length)), "length": length}
    sample.update({name: made[name] for name in columns if name in made})


def _stored(spans: Tensor) -> bytes:
    return Spans(*(column.numpy() for column in spans.unbind(1))).to_bytes()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
