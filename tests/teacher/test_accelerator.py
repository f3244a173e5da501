"""Teachers and writers on an accelerator: nothing of theirs is left on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_dskd.cache import Codec, RowStore
from axolotl_dskd.generation import MixedWriter, Partner, Sampling, TransformersWriter
from axolotl_dskd.teacher import TrainingRun
from axolotl_dskd.teacher.cached.states import Body, CachedStates
from axolotl_dskd.teacher.cached.tables import EmbeddingTable, read_tables, write_tables
from axolotl_dskd.teacher.cached.teacher import CachedTeacher
from axolotl_dskd.teacher.kept import KeepingTeacher, row_key
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.types import DualBatch, Needs, View, Written
from tests.support import tiny
from tests.support.batches import batch
from tests.support.pretend import CPU, accelerator, moved

LENGTHS, NEEDS = [6, 20, 3, 11], Needs(embeddings=True)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with accelerator() as device:
        yield device


def live(device: torch.device) -> LiveTeacher:
    return LiveTeacher(tiny.tiny_llama(97, 32, seed=0).to(device), 97, device, max_tokens=40)


def cached(device: torch.device, folder: Path, storage: str) -> CachedTeacher:
    """Its head and embedding from the folder, its layers there for what is not in it."""
    teacher, codec = live(device), Codec(storage, 32)
    embedding = EmbeddingTable.of(teacher.model.get_input_embeddings())
    write_tables(folder / "head", teacher.head, embedding)
    tables = read_tables(folder / "head", 97, device)
    assert tables is not None
    store = RowStore(folder, codec.bytes_per_token)
    states = CachedStates(store, codec, *tables, Body(lambda: teacher))
    return CachedTeacher(states, TrainingRun())


def assert_says_the_same(teacher: Teacher, asked: DualBatch, tolerance: float = 1e-5) -> None:
    """As a live teacher on the CPU says of the same batch."""
    found: View = teacher(asked, NEEDS)
    expected = live(CPU)(moved(asked, CPU), NEEDS)
    assert found.hidden is not None and found.embedded is not None
    assert expected.hidden is not None and expected.embedded is not None
    for ours, theirs in zip(
        (found.hidden, *found.embedded, found.tokens.labels, found.tokens.sample_ids),
        (expected.hidden, *expected.embedded, expected.tokens.labels, expected.tokens.sample_ids),
        strict=True,
    ):
        assert ours.device == asked.teacher_labels.device
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


def test_a_live_teacher(device: torch.device):
    assert_says_the_same(live(device), moved(batch(LENGTHS), device))


@pytest.mark.parametrize("here", [[], [1, 2], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-5), ("int8", 0.1)])
def test_a_cached_teacher(
    device: torch.device, tmp_path: Path, storage: str, tolerance: float, here: list[int]
):
    """Of which the data workers have found some samples."""
    teacher, whole = cached(device, tmp_path, storage), batch(LENGTHS)
    if here:
        teacher.states.compute(moved(whole, device), here)
        teacher.end()
    sides = whole.teacher_input_ids, whole.teacher_labels
    ids, labels = ([row[:n] for row, n in zip(s, LENGTHS, strict=True)] for s in sides)
    states, found = RowStore(tmp_path, teacher.states.codec.bytes_per_token).read_samples(
        ids, labels
    )
    assert found.nonzero().flatten().tolist() == here
    asked = replace(whole, cached_states=states, cached=found)
    assert_says_the_same(teacher, moved(asked, device), tolerance)


def test_a_teacher_whose_words_are_kept(device: torch.device):
    teacher, whole = KeepingTeacher(live(device), 1 << 30), batch(LENGTHS)
    marked = Written(torch.ones(len(LENGTHS), dtype=torch.bool), torch.zeros(0))
    rows = [
        {"teacher_input_ids": ids[:n], "teacher_labels": labels[:n]}
        for ids, labels, n in zip(
            whole.teacher_input_ids.tolist(), whole.teacher_labels.tolist(), LENGTHS, strict=True
        )
    ]
    teacher.keep(row_key(row) for row in rows[:2])
    for _ in range(2):
        assert_says_the_same(teacher, moved(replace(whole, written=marked), device))
    assert len(teacher._held) == 2


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.6}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("mixes", [False, True], ids=["alone", "beside a partner"])
def test_answers(device: torch.device, mixes: bool, sampling: dict[str, Any]):
    prompts, beside = [[3, 4, 5], [9]], [[8, 3, 4, 5], [9, 2]]

    def written(device: torch.device) -> Any:
        @contextmanager
        def running(seed: int) -> Iterator[Any]:
            with torch.no_grad():
                yield tiny.tiny_llama(97, 32, seed=seed).to(device).eval()

        keys = {"end_ids": [7], "pad_id": 0, "vocab_size": 97}
        writer = TransformersWriter(lambda: running(0), **keys)
        how = Sampling(max_new_tokens=6, **sampling)
        if not mixes:
            return writer.write(prompts, how, [1, 2])
        theirs = tiny.tiny_llama(97, 32, seed=4).to(device).eval()

        @contextmanager
        def partner() -> Iterator[Any]:
            yield theirs

        return MixedWriter(writer, Partner(partner, 0.5)).write(prompts, beside, how, [1, 2])

    expected, found = written(CPU), written(device)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert (ours.weights is not None) == mixes
        if mixes:
            assert ours.weights == pytest.approx(theirs.weights, abs=1e-4)
