"""A batch that asks several teachers, taken apart: each part is what its samples alone would be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from axolotl.utils.collators import DataCollatorForSeq2Seq, V2BatchSamplerDataCollatorForSeq2Seq

from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.collator import GROUP, LOGPROBS, WEIGHTS, DualCollator, samples_of
from axolotl_dskd.data.hooks import make_reconcile
from axolotl_dskd.data.reconcile import STATUS, TEACHER
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.training.parts import Found, part_of, together
from axolotl_dskd.types import DualBatch, LossOutput, Matches, Term, View, Written
from tests.support import tiny

COUNT = 9
#: Which teacher each sample asks: neither by turns nor one after the other.
ASKED = [1, 0, 0, 2, 1, 1, 2, 0, 1]
KINDS = {"padded": DataCollatorForSeq2Seq, "packed": V2BatchSamplerDataCollatorForSeq2Seq}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Prepared rows; two of them are an answer of the data and a written one to one prompt."""
    folder = tmp_path_factory.mktemp("pair")
    tiny.save_pair(folder)
    student, teacher = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    config = DSKDConfig.model_validate({"teacher": {"base_model": str(folder / "teacher")}})
    reconcile = make_reconcile(config, student, truncate_teacher=False)
    made = []
    for k in range(COUNT):
        prompt, answer = tiny.QUESTIONS[k % len(tiny.QUESTIONS)]
        row: dict[str, Any] = {TEACHER: ASKED[k]}
        for side, tokenizer in (("", student), ("teacher_", teacher)):
            before = tokenizer(prompt * (1 + k % 3))["input_ids"]
            said = tokenizer(answer, add_special_tokens=False)["input_ids"]
            row[f"{side}input_ids"] = before + said + [tokenizer.eos_token_id]
            row[f"{side}labels"] = [-100] * len(before) + row[f"{side}input_ids"][len(before) :]
        row |= reconcile(row)
        assert row.pop(STATUS) in ("kept", "cut")
        row["attention_mask"] = [1] * len(row["input_ids"])
        row["position_ids"] = list(range(len(row["input_ids"])))
        made.append(row)
    preferred, written = made[4], made[8]
    preferred[GROUP] = written[GROUP] = 3
    count = sum(label >= 0 for label in written["labels"][1:])
    written[LOGPROBS] = torch.arange(count).float().neg().numpy().tobytes()
    written[WEIGHTS] = torch.arange(count).float().numpy().tobytes()
    return made


def collate(kind: str, rows: list[dict[str, Any]]) -> DualBatch:
    inner = KINDS[kind](tiny.byte_level_tokenizer())
    features: list[Any] = [rows[:4], rows[4:]] if kind == "packed" and len(rows) > 4 else rows
    if kind == "packed" and features is rows:
        features = [rows]
    return DualBatch.pop_from(DualCollator(inner, padding_side="right", teacher_pad_id=0)(features))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", [0, 1, 2])
def test_a_part_is_the_batch_of_its_samples_alone(
    rows: list[dict[str, Any]], kind: str, teacher: int
):
    mine = [row for row in rows if row[TEACHER] == teacher]
    part, alone = part_of(collate(kind, rows), teacher).batch, collate(kind, mine)
    assert part.teachers is None
    for name in ("teacher_input_ids", "teacher_labels", "teacher_attention_mask"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    assert torch.equal(part.teacher_side().sample_ids, alone.teacher_side().sample_ids)
    ours, theirs = (batch.student_side() for batch in (part, alone))
    for name in ("input_ids", "labels", "sample_ids"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for field in fields(Matches):
        one, other = (getattr(batch.matches, field.name) for batch in (part, alone))
        assert torch.equal(one, other), field.name
    if teacher == 1:
        assert part.written is not None
        assert alone.written is not None
        for name in ("samples", "logprobs", "weights", "pairs"):
            assert torch.equal(getattr(part.written, name), getattr(alone.written, name)), name
        assert part.written.pairs is not None
        assert len(part.written.pairs) == 1


def test_a_teacher_that_nobody_asks_has_an_empty_part(rows: list[dict[str, Any]]):
    part = part_of(collate("padded", rows), 3)
    assert not len(part.batch.teacher_labels)
    assert not part.tokens.any()
    assert not part.batch.student_mask().any()
    assert all(not len(getattr(part.batch.matches, field.name)) for field in fields(Matches))


def test_parts_give_sums_of_the_whole_batch_and_the_student_its_gradient(
    rows: list[dict[str, Any]],
):
    """A loss of each token, its sample and its row: nothing is lost, doubled or interchanged."""
    batch = collate("packed", rows)
    side = batch.student_side()
    hidden = torch.randn(len(side), 4, requires_grad=True)
    head = OutputHead(torch.randn(8, 4))
    written = Written(torch.zeros(COUNT, dtype=torch.bool), torch.zeros(len(side)))
    student = View(side, head, hidden, (hidden.detach(), hidden.detach() + 1), written)
    weight = torch.arange(1.0, 1 + len(side))
    found = []
    for teacher in range(3):
        part = part_of(batch, teacher)
        view = part.view(student)
        assert view.embedded is not None
        torch.testing.assert_close(view.embedded[1], view.hidden.detach() + 1)
        values = view.hidden.sum(1) * weight[part.tokens]
        term = Term(values.detach(), view.tokens.sample_ids)
        found.append(Found(part, LossOutput(values.sum(), len(view), {"t": term})))
    out = together(found)
    assert out.tokens == out.references == len(side)
    out.loss.backward()
    torch.testing.assert_close(hidden.grad, weight[:, None].expand(-1, 4))
    by_sample = torch.zeros(COUNT).index_add(0, side.sample_ids, (hidden.sum(1) * weight).detach())
    term = out.terms["t"]
    torch.testing.assert_close(
        torch.zeros(COUNT).index_add(0, term.sample_ids, term.values), by_sample
    )


def test_samples_taken_out_of_a_batch_keep_their_teacher(rows: list[dict[str, Any]]):
    inner = KINDS["padded"](tiny.byte_level_tokenizer())
    collator = DualCollator(inner, padding_side="right", teacher_pad_id=0)
    taken = samples_of(collator(rows))
    assert [row[0][TEACHER] for row in taken] == ASKED
    again = DualBatch.pop_from(collator.again(taken))
    assert again.teachers is not None
    assert again.teachers.tolist() == ASKED


def test_each_sample_is_looked_up_in_its_own_teachers_cache(rows: list[dict[str, Any]]):
    """Rows of unlike width, one teacher without a cache, one sample that is not there."""

    def reader(width: int, lacking: int) -> Any:
        def read(ids: list[Any], labels: list[Any]) -> Any:
            counts = [int((label[1:] >= 0).sum()) for label in labels]
            states = [
                torch.full((n, width), int(i[-1]) % 200) for n, i in zip(counts, ids, strict=True)
            ]
            cached = torch.arange(len(ids)) != lacking
            return torch.cat(states).to(torch.uint8), cached

        return read

    inner = KINDS["padded"](tiny.byte_level_tokenizer())
    collator = DualCollator(inner, padding_side="right", teacher_pad_id=0)
    collator.readers = [reader(3, lacking=1), None, reader(5, lacking=-1)]
    batch = DualBatch.pop_from(collator(rows))
    assert batch.cached is not None
    found = [asked == 2 or (asked == 0 and k != 2) for k, asked in enumerate(ASKED)]
    assert batch.cached.tolist() == found
    for teacher, width in ((0, 3), (2, 5)):
        mine = [row for row in rows if row[TEACHER] == teacher]
        part = part_of(batch, teacher).batch
        alone, cached = collator.readers[teacher](
            [torch.tensor(row["teacher_input_ids"]) for row in mine],
            [torch.tensor(row["teacher_labels"]) for row in mine],
        )
        assert part.cached_states is not None
        assert torch.equal(part.cached_states[:, :width], alone)
        assert torch.equal(part.cached, cached)
