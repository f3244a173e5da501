"""The collator that carries the teacher's side, and which tokens a batch supervises."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from transformers import PreTrainedTokenizerBase

from axolotl_dskd.data.byte_spans import Spans, exact_pairs, group_numbers, start_pairs, tile
from axolotl_dskd.data.collator import (
    LOGPROBS,
    PREPARED_COLUMNS,
    WEIGHTS,
    DualCollator,
    samples_of,
)
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.supervision import supervised_mask
from axolotl_dskd.types import DualBatch, Matches, Written
from tests.support import tiny

PACKING = (BatchSamplerDataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq)
TEACHER_PAD = 77


def same(one: Any, other: Any) -> bool:
    """Whether two values of batches are equal: tensors, and what the host knows of them."""
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _rows() -> list[dict[str, Any]]:
    """Samples of different lengths; ids say where a token comes from: 100 * sample + position."""
    rows = []
    for sample, (length, prompt, teacher_length) in enumerate(
        [(5, 2, 7), (3, 0, 2), (6, 5, 4), (2, 1, 5)], start=1
    ):
        ids = [100 * sample + i for i in range(length)]
        theirs = [1000 * sample + i for i in range(teacher_length)]
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": [1] * length,
                "labels": [-100] * prompt + ids[prompt:],
                "position_ids": list(range(length)),
                "teacher_input_ids": theirs,
                "teacher_labels": [-100, *theirs[1:]],
                # One byte a student token; the teacher's have two, and all that is left at the end.
                SPANS: tile([1] * (length - max(prompt, 1))).to_bytes(),
                TEACHER_SPANS: tile([2] * (teacher_length - 1)).to_bytes(),
            }
        )
    return rows


def _tokenizer(side: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.padding_side = side
    return tokenizer


def _collator(kind: type, side: str = "right", **kwargs: Any) -> DualCollator:
    inner = kind(_tokenizer(side), **kwargs)
    return DualCollator(inner, padding_side=side, teacher_pad_id=TEACHER_PAD)


def _ours(batch: dict[str, Any]) -> set[str]:
    return {key for key in batch if key.startswith("dskd_")}


def _packed(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [rows[:3], rows[3:]]


CASES = [
    pytest.param(kind, side, multiple, id=f"{kind.__name__}-{side}-{multiple}")
    for kind in (DataCollatorForSeq2Seq, *PACKING)
    for side in ("right", "left")
    for multiple in (None, 16)
]


def _features(kind: type) -> list[Any]:
    return _packed(_rows()) if kind in PACKING else _rows()


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
def test_matches_are_those_of_each_sample_in_the_tokens_of_the_whole_batch(kind: type) -> None:
    batch = DualBatch.pop_from(_collator(kind)(_features(kind)))
    student, teacher = batch.student_side(), batch.teacher_side()
    matches, samples = batch.matches, []
    for number, row in enumerate(_rows()):
        ours, theirs = (Spans.from_bytes(row[column]) for column in (SPANS, TEACHER_SPANS))
        at, to = ((side.sample_ids == number).nonzero().flatten() for side in (student, teacher))
        assert matches.spans[at].tolist() == ours.array().tolist()
        assert matches.teacher_spans[to].tolist() == theirs.array().tolist()
        groups, teacher_groups = group_numbers(ours, theirs)
        first = matches.groups[at[0]]
        assert (matches.groups[at] - first).tolist() == groups.tolist()
        assert (matches.teacher_groups[to] - first).tolist() == teacher_groups.tolist()
        pairs = [find(ours, theirs) for find in (exact_pairs, start_pairs)]
        samples.append([torch.stack([at[i], to[j]], 1).tolist() for i, j in pairs])
    assert matches.exact.tolist() == [pair for exact, _ in samples for pair in exact]
    assert matches.starts.tolist() == [pair for _, starts in samples for pair in starts]
    assert len(matches.starts)
    # A group is of one sample, and none is left out.
    both = torch.cat([matches.groups, matches.teacher_groups])
    of_sample = torch.cat([student.sample_ids, teacher.sample_ids])
    assert both.unique().tolist() == list(range(int(both.max()) + 1))
    assert all(len(of_sample[both == group].unique()) == 1 for group in both.unique())


def test_what_is_put_into_a_batch_comes_out_of_it_and_leaves_the_rest() -> None:
    batch = DualBatch.pop_from(_collator(DataCollatorForSeq2Seq)(_rows()))
    written = Written(torch.ones(4).bool(), torch.zeros(7), pairs=torch.tensor([[0, 1]]))
    batch = replace(batch, cached=torch.ones(4).bool(), cached_states=torch.zeros(9, 2))
    batch = replace(batch, written=written, teachers=torch.tensor([1, 0, 1, 2]))
    inputs = {"input_ids": batch.input_ids, "labels": batch.labels, "more": torch.ones(1)}
    before = dict(inputs)
    batch.put_into(inputs)
    assert len(_ours(inputs)) == len(fields(DualBatch)) - 4 + len(fields(Matches)) + 3
    again = DualBatch.pop_from(inputs)
    assert inputs == before
    assert again.written is not None
    parts = ((batch, again), (batch.matches, again.matches), (written, again.written))
    for part, other in parts:
        for f in fields(part):
            if f.name not in ("matches", "written"):
                assert getattr(part, f.name) is getattr(other, f.name), f.name


def test_a_batch_without_one_of_our_tensors_is_refused() -> None:
    for key in _ours(_collator(DataCollatorForSeq2Seq)(_rows())) - {"dskd_known"}:  # may be counted
        batch = _collator(DataCollatorForSeq2Seq)(_rows())
        del batch[key]
        with pytest.raises(TypeError, match=key.removeprefix("dskd_")):
            DualBatch.pop_from(batch)


@pytest.mark.parametrize(("kind", "side", "multiple"), CASES)
def test_segment_ids_number_the_samples_and_are_minus_one_on_padding(
    kind: type, side: str, multiple: int | None
) -> None:
    batch = _collator(kind, side, pad_to_multiple_of=multiple)(_features(kind))
    ids, segments = batch["input_ids"], batch["dskd_segment_ids"]
    assert segments.shape == ids.shape
    assert (segments >= 0).sum() == sum(len(row["input_ids"]) for row in _rows())
    # Padding has id 0, every token says its sample (counted from 1) in its hundreds.
    assert torch.equal(segments, torch.where(ids >= 100, ids // 100 - 1, -1))


@pytest.mark.parametrize(("kind", "side", "multiple"), CASES)
def test_the_student_tensors_are_those_of_the_inner_collator(
    kind: type, side: str, multiple: int | None
) -> None:
    dual = _collator(kind, side, pad_to_multiple_of=multiple)
    plain = [{k: v for k, v in row.items() if k not in PREPARED_COLUMNS} for row in _rows()]
    expected = dual.inner(_packed(plain) if kind in PACKING else plain)
    batch = dual(_features(kind))
    assert set(batch) == set(expected) | _ours(batch)
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_teacher_has_one_right_padded_row_per_sample(kind: type, side: str) -> None:
    batch = _collator(kind, side)(_features(kind))
    for number, row in enumerate(_rows()):
        length = len(row["teacher_input_ids"])
        ids, labels = batch["dskd_teacher_input_ids"][number], batch["dskd_teacher_labels"][number]
        mask = batch["dskd_teacher_attention_mask"][number]
        assert ids[:length].tolist() == row["teacher_input_ids"]
        assert labels[:length].tolist() == row["teacher_labels"]
        assert set(ids[length:].tolist()) <= {TEACHER_PAD}
        assert set(labels[length:].tolist()) <= {-100}
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
    assert batch["dskd_teacher_input_ids"].shape == (4, 7)


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
def test_input_ids_is_the_first_key(kind: type) -> None:
    assert next(iter(_collator(kind)(_features(kind)))) == "input_ids"


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
def test_the_features_are_left_as_they_were(kind: type) -> None:
    features = _features(kind)
    before = copy.deepcopy(features)
    _collator(kind)(features)
    assert features == before


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq])
@pytest.mark.parametrize("missing", PREPARED_COLUMNS)
def test_rows_without_a_teacher_side_are_refused(kind: type, missing: str) -> None:
    features = _features(kind)
    for row in features if kind not in PACKING else [r for rows in features for r in rows]:
        del row[missing]
    with pytest.raises(ValueError, match=r"no teacher side.*delete dataset_prepared_path"):
        _collator(kind)(features)


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
def test_a_pickled_collator_collates_the_same(kind: type) -> None:
    collator = _collator(kind)
    loaded = pickle.loads(pickle.dumps(collator))
    batch, again = collator(_features(kind)), loaded(_features(kind))
    assert list(batch) == list(again)
    assert all(same(batch[key], again[key]) for key in batch)


def test_attributes_come_from_the_inner_collator() -> None:
    collator = _collator(DataCollatorForSeq2Seq, label_pad_token_id=-7)
    assert collator.tokenizer is collator.inner.tokenizer
    assert collator.label_pad_token_id == -7
    with pytest.raises(AttributeError):
        _ = collator.no_such_attribute


def _supervised(kind: type, side: str) -> list[tuple[int, int, int]]:
    """(position's token, predicted token, sample) of all supervised student tokens, in order."""
    inputs = _collator(kind, side)(_features(kind))
    batch = DualBatch.pop_from(inputs)
    assert not _ours(inputs)
    tokens = batch.student_side()
    return list(
        zip(
            tokens.input_ids.tolist(),
            tokens.labels.tolist(),
            tokens.sample_ids.tolist(),
            strict=True,
        )
    )


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_and_packed_rows_supervise_the_same_tokens(kind: type, side: str) -> None:
    expected = [
        (row["input_ids"][i - 1], row["labels"][i], sample)
        for sample, row in enumerate(_rows())
        for i in range(1, len(row["labels"]))
        if row["labels"][i] != -100
    ]
    assert _supervised(kind, side) == expected


@pytest.mark.parametrize("kind", [DataCollatorForSeq2Seq, *PACKING])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_token_of_a_sample_is_never_predicted(kind: type, side: str) -> None:
    predicted = {label for _, label, _ in _supervised(kind, side)}
    assert predicted
    assert not predicted & {row["input_ids"][0] for row in _rows()}


def test_the_mask_knows_samples_and_labels() -> None:
    labels = torch.tensor([[-100, 5, 6, 7, 8, -100], [-100, 1, -100, 2, 9, 9]])
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [-1, -1, 2, 2, -1, -1]])
    expected = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]).bool()
    assert torch.equal(supervised_mask(labels, segments), expected)


def test_teacher_positions_are_masked_like_the_student_ones() -> None:
    batch = DualBatch.pop_from(_collator(DataCollatorForSeq2Seq)(_rows()))
    mask = supervised_mask(batch.teacher_labels, batch.teacher_segment_ids())
    assert mask.sum(1).tolist() == [len(row["teacher_labels"]) - 1 for row in _rows()]


@pytest.mark.parametrize(("kind", "side", "multiple"), CASES)
def test_samples_taken_out_of_a_batch_and_collated_again_are_that_batch(
    kind: type, side: str, multiple: int | None
) -> None:
    collator = _collator(kind, side, pad_to_multiple_of=multiple)
    batch = collator(_features(kind))
    again = collator.again(samples_of(batch))
    assert again.keys() == batch.keys()
    for name, value in batch.items():
        assert same(again[name], value), name


@pytest.mark.parametrize(("kind", "side", "multiple"), CASES)
def test_the_sizes_that_the_collator_hands_on_are_those_of_the_batch(
    kind: type, side: str, multiple: int | None
) -> None:
    """So nobody has to count on a GPU, and the places follow from them."""
    collator = _collator(kind, side, pad_to_multiple_of=multiple)
    batch = DualBatch.pop_from(collator(_features(kind)))
    assert batch.known is not None
    assert batch.known == replace(batch, known=None).sizes
    rows, positions = batch.student_mask().nonzero(as_tuple=True)
    assert torch.equal(torch.stack(batch.student_places), torch.stack([rows, positions]))
    ids = batch.teacher_side().sample_ids
    assert tuple(ids.bincount().tolist()) == batch.teacher_side().of_each_sample()
    assert batch.sizes.lengths == tuple(len(row["teacher_input_ids"]) for row in _rows())


def test_written_answers_bring_their_logprobs() -> None:
    rows = _rows()
    count = len(rows[1]["dskd_byte_spans"]) // 8
    numbers = np.linspace(-3, -1, count, dtype="<f4")
    rows[1] = rows[1] | {LOGPROBS: numbers.tobytes()}
    batch = DualBatch.pop_from(_collator(DataCollatorForSeq2Seq)(rows))
    assert batch.written is not None
    assert batch.written.samples.tolist() == [k == 1 for k in range(len(rows))]
    tokens = batch.student_side()
    assert torch.equal(batch.written.logprobs[tokens.sample_ids == 1], torch.from_numpy(numbers))
    assert float(batch.written.logprobs[tokens.sample_ids != 1].abs().sum()) == 0
    assert batch.written.weights is None


def test_answers_that_were_drawn_together_bring_their_weights() -> None:
    """All others weigh 1: rows of the data, and answers that the student drew alone."""
    rows = _rows()
    for k in (1, 2):
        count = len(rows[k]["dskd_byte_spans"]) // 8
        numbers = np.linspace(0.1, 1.2, count, dtype="<f4")
        rows[k] = rows[k] | {LOGPROBS: (-numbers).tobytes()}
    weights = numbers
    rows[2][WEIGHTS] = weights.tobytes()
    batch = DualBatch.pop_from(_collator(DataCollatorForSeq2Seq)(rows))
    assert batch.written is not None
    assert batch.written.weights is not None
    mine = batch.student_side().sample_ids == 2
    assert torch.equal(batch.written.weights[mine], torch.from_numpy(weights))
    assert {*batch.written.weights[~mine].tolist()} == {1.0}
    with_data = samples_of(_collator(DataCollatorForSeq2Seq)(rows))
    assert not any(WEIGHTS in sample for row in with_data for sample in row)
