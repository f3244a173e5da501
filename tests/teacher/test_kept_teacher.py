"""Kept rows cost no second forward, and what is said of them does not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from axolotl_dskd.teacher.kept import KeepingTeacher, row_key
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.types import DualBatch, Logprobs, Needs, View, Written
from tests.support import tiny
from tests.support.batches import batch

CPU = torch.device("cpu")
LENGTHS = [8, 5, 11]
EVERYTHING = 1 << 30


def written(whole: DualBatch, samples: Sequence[int]) -> DualBatch:
    """Some rows of a batch as one that the student wrote."""
    at = torch.tensor(samples, dtype=torch.long)
    return replace(
        whole,
        teacher_input_ids=whole.teacher_input_ids[at],
        teacher_labels=whole.teacher_labels[at],
        teacher_attention_mask=whole.teacher_attention_mask[at],
        written=Written(torch.ones(len(at), dtype=torch.bool), torch.zeros(0)),
    )


def keys(found: DualBatch) -> list[bytes]:
    """As a prepared row has them: without the batch's padding."""
    return [
        row_key({"teacher_input_ids": ids[:n].tolist(), "teacher_labels": labels[:n].tolist()})
        for ids, labels, n in zip(
            found.teacher_input_ids,
            found.teacher_labels,
            found.teacher_attention_mask.sum(1).tolist(),
            strict=True,
        )
    ]


class Counting(Teacher):
    """Another teacher, with what it was asked and told: the lengths of the samples."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.head, self.embedding = teacher.head, teacher.embedding
        self.asked: list[list[int]] = []
        self.expected: list[list[list[int]]] = []

    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        self.asked.append(batch.teacher_attention_mask.sum(1).tolist())
        return self.teacher(batch, needs)

    def embedded(self, tokens: Any) -> Any:
        return self.teacher.embedded(tokens)

    def expect(self, batches: Sequence[DualBatch]) -> None:
        self.expected.append([b.teacher_attention_mask.sum(1).tolist() for b in batches])


class LogprobsOf(Teacher):
    """Log-probabilities of another teacher, as a server gives them."""

    head = embedding = None

    def __init__(self, teacher: LiveTeacher) -> None:
        self.teacher = teacher

    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        view = self.teacher(batch, Needs())
        assert view.hidden is not None
        logprobs = (view.hidden @ self.teacher.head.weight.T).log_softmax(-1)
        top, ids = logprobs.topk(3)
        labels = logprobs.gather(1, view.tokens.labels[:, None])[:, 0]
        return View(view.tokens, logprobs=Logprobs(labels, ids, top))


def live(dtype: torch.dtype = torch.float32) -> LiveTeacher:
    return LiveTeacher(tiny.tiny_llama(97, 32, seed=0).to(dtype), 97, CPU)


def keeping(
    teacher: Teacher | None = None, max_bytes: int = EVERYTHING
) -> tuple[KeepingTeacher, Counting]:
    counting = Counting(teacher or live())
    return KeepingTeacher(counting, max_bytes), counting


def tensors(view: View) -> dict[str, torch.Tensor]:
    said = view.logprobs
    found = {
        "input_ids": view.tokens.input_ids,
        "labels": view.tokens.labels,
        "samples": view.tokens.sample_ids,
        "hidden": view.hidden,
        "inputs": None if view.embedded is None else view.embedded[0],
        "outputs": None if view.embedded is None else view.embedded[1],
        "said": None if said is None else said.labels,
        "ids": None if said is None else said.ids,
        "top": None if said is None else said.top,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("first", [[0, 1, 2], [1], [2, 0], []], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "logprobs"])
def test_a_kept_row_is_asked_for_once_and_said_the_same_of(kind: str, first: list[int]):
    """Whatever it stands beside: rows that are held, and rows that are not."""
    inner = live(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    teacher, counting = keeping(LogprobsOf(inner) if kind == "logprobs" else inner)
    needs = Needs("top") if kind == "logprobs" else Needs(embeddings=True)
    whole = batch(LENGTHS)
    teacher.keep(keys(whole))
    teacher(written(whole, first), needs)
    order = [2, 0, 1, 0]
    found = tensors(teacher(written(whole, order), needs))
    assert counting.asked == [
        [LENGTHS[k] for k in first],
        [LENGTHS[k] for k in order if k not in first],
    ]
    for name, tensor in tensors(counting.teacher(written(whole, order), needs)).items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor)


def test_rows_of_the_data_and_rows_that_are_not_kept_pass_through():
    teacher, counting = keeping()
    whole = batch(LENGTHS)
    teacher.keep(keys(whole)[:1])
    for _ in range(2):
        teacher(whole, Needs())
        teacher(written(whole, [1, 2]), Needs())
    assert counting.asked == [LENGTHS, LENGTHS[1:]] * 2
    assert teacher.bytes == 0
    for _ in range(2):
        teacher(written(whole, [0, 1]), Needs())
    assert counting.asked[4:] == [LENGTHS[:2], LENGTHS[1:2]]


def test_what_is_kept_no_more_is_not_held_but_for_those_that_are_kept_twice():
    teacher, counting = keeping()
    whole = batch(LENGTHS)
    names = keys(whole)
    teacher.keep([*names, names[0]])
    teacher(written(whole, [0, 1, 2]), Needs())
    tokens = [len(batch([n]).teacher_side()) for n in LENGTHS]
    assert teacher.bytes == sum(tokens) * 32 * 4
    teacher.forget(names)
    assert teacher.bytes == tokens[0] * 32 * 4
    teacher(written(whole, [0, 1, 2]), Needs())
    assert counting.asked[1] == LENGTHS[1:]
    teacher.forget(names[:1])
    assert teacher.bytes == 0


def test_no_more_is_held_than_there_is_room_for(caplog: pytest.LogCaptureFixture):
    whole = batch(LENGTHS)
    one = len(batch(LENGTHS[:1]).teacher_side()) * 32 * 4
    teacher, counting = keeping(max_bytes=one)
    teacher.keep(keys(whole))
    expected = teacher.teacher(written(whole, [0, 1, 2]), Needs())
    with caplog.at_level("WARNING", "axolotl_dskd.teacher.kept"):
        for _ in range(3):
            found = teacher(written(whole, [0, 1, 2]), Needs())
            assert teacher.bytes <= one
            torch.testing.assert_close(found.hidden, expected.hidden)
    assert counting.asked[2:] == [LENGTHS[1:]] * 2
    assert len(caplog.records) == 1
    assert "replay_memory" in caplog.text


def test_a_teacher_is_told_ahead_only_of_what_it_will_be_asked():
    teacher, counting = keeping()
    whole = batch(LENGTHS)
    teacher.keep(keys(whole))
    teacher(written(whole, [1]), Needs())
    teacher.expect([whole, written(whole, [0, 1]), written(whole, [1])])
    assert counting.expected == [[LENGTHS, LENGTHS[:1], []]]
