"""Both sides of a row supervise one and the same text afterwards, or the row is gone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from axolotl.utils.collators import DataCollatorForSeq2Seq
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from axolotl_dskd.data.byte_spans import Spans, exact_pairs
from axolotl_dskd.data.collator import DualCollator
from axolotl_dskd.data.outcomes import CUT, DIFFERENT, EMPTY, KEPT, TOO_LONG
from axolotl_dskd.data.reconcile import (
    SPANS,
    STATUS,
    TEACHER_SPANS,
    Reconcile,
    reconcile_dataset,
)
from axolotl_dskd.data.shared_text import writes_dummy_space
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.types import DualBatch
from tests.support import tiny

BYTE_LEVEL, SENTENCEPIECE = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
TABLES = {id(t): token_bytes(t) for t in (BYTE_LEVEL, SENTENCEPIECE)}
LONG = 1 << 20
Turns = Sequence[tuple[str, str]]


@dataclass
class Side:
    """Ids and labels as Axolotl's strategies make them, and the turn of each supervised token."""

    tokenizer: PreTrainedTokenizerBase
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, text: str, supervised: bool, special: int | None = None) -> None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids = [*ids, *([] if special is None else [special])]
        self.ids += ids
        self.labels += ids if supervised else [-100] * len(ids)

    def spelled(self, labels: list[int]) -> bytes:
        """Bytes of the supervised tokens; one that starts a row is predicted by nothing."""
        table = TABLES[id(self.tokenizer)]
        pairs = list(zip(self.ids, labels, strict=False))[1:]
        assert all(i == y for i, y in pairs if y != -100)
        return b"".join(table[y] for _, y in pairs if y != -100)


def side(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, length: int = LONG, bos: bool = False
) -> Side:
    """Prompts unsupervised, answers with their end token supervised, cut to `length` tokens."""
    made = Side(tokenizer)
    if bos:
        made.add("", True, tokenizer.bos_token_id)
    for prompt, answer in turns:
        made.add(prompt + "\n", False)
        made.add(answer, True, tokenizer.eos_token_id)
    made.ids, made.labels = made.ids[:length], made.labels[:length]
    return made


def row(student: Side, teacher: Side) -> dict[str, Any]:
    return {
        "input_ids": student.ids,
        "attention_mask": [1] * len(student.ids),
        "labels": student.labels,
        "teacher_input_ids": teacher.ids,
        "teacher_labels": teacher.labels,
    }


def reconcile_for(
    student: PreTrainedTokenizerBase = BYTE_LEVEL,
    teacher: PreTrainedTokenizerBase = SENTENCEPIECE,
    **overrides: Any,
) -> Reconcile:
    settings_: dict[str, Any] = {
        "teacher_limit": LONG,
        "truncate_teacher": False,
        "student_dummy_spaces": writes_dummy_space(student, TABLES[id(student)]),
        "teacher_dummy_spaces": writes_dummy_space(teacher, TABLES[id(teacher)]),
    }
    return Reconcile(TABLES[id(student)], TABLES[id(teacher)], **{**settings_, **overrides})


def reconciled(ours: Side, theirs: Side, **overrides: Any) -> tuple[str, bytes, bytes]:
    """(status, supervised bytes of the student, of the teacher)."""
    out = reconcile_for(ours.tokenizer, theirs.tokenizer, **overrides)(row(ours, theirs))
    assert len(out["labels"]) == len(ours.ids)
    assert len(out["teacher_labels"]) == len(out["teacher_input_ids"])
    assert out["teacher_input_ids"] == theirs.ids[: len(out["teacher_input_ids"])]
    return out["dskd_status"], ours.spelled(out["labels"]), theirs.spelled(out["teacher_labels"])


def labelled(labels: list[int]) -> list[int]:
    return [y for y in labels if y != -100]


ANSWER = "Water boils, naïve 😀 你好, because its molecules move fast enough. " * 3
PAIRS = [
    pytest.param(BYTE_LEVEL, SENTENCEPIECE, id="byte-level student"),
    pytest.param(SENTENCEPIECE, BYTE_LEVEL, id="sentencepiece student"),
    pytest.param(BYTE_LEVEL, BYTE_LEVEL, id="both byte-level"),
    pytest.param(SENTENCEPIECE, SENTENCEPIECE, id="both sentencepiece"),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize(
    "turns",
    [
        [("Why?", "Because.")],
        [("Why?", ANSWER), ("And?", "Because."), ("So?", "é")],
        [("", "no no no")],
        [("Same", "yes"), ("Same", "yes"), ("Same", "yes")],
    ],
)
def test_equal_texts_are_kept_untouched(student: Any, teacher: Any, turns: Turns) -> None:
    ours, theirs = side(student, turns), side(teacher, turns)
    out = reconcile_for(student, teacher)(row(ours, theirs))
    assert out["dskd_status"] == KEPT
    assert out["labels"] == ours.labels
    assert out["teacher_labels"] == theirs.labels
    assert out["teacher_input_ids"] == theirs.ids


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@pytest.mark.parametrize("cut_student", [True, False])
def test_a_truncated_side_cuts_the_other_to_the_same_text(
    student: Any, teacher: Any, cut_student: bool
) -> None:
    whole = side(student, [("Why?", ANSWER)]), side(teacher, [("Why?", ANSWER)])
    prompts = [len(s.ids) - len(labelled(s.labels)) for s in whole]
    for tokens in range(8, len(labelled(whole[0 if cut_student else 1].labels)) - 1, 5):
        lengths = [prompts[0] + tokens if cut_student else LONG]
        lengths += [LONG if cut_student else prompts[1] + tokens]
        ours, theirs = (
            side(s.tokenizer, [("Why?", ANSWER)], length)
            for s, length in zip(whole, lengths, strict=True)
        )
        shorter = ours if cut_student else theirs
        status, spelled, spelled_by_teacher = reconciled(ours, theirs)
        assert status == CUT
        assert spelled.lstrip(b" ") == spelled_by_teacher.lstrip(b" ")
        assert ANSWER.encode().startswith(spelled.lstrip(b" "))
        # Not more is lost than the tokens that straddle the cut.
        assert len(spelled.lstrip(b" ")) > len(shorter.spelled(shorter.labels).lstrip()) - 24


def test_the_teacher_reads_no_further_than_its_last_supervised_token() -> None:
    theirs = side(SENTENCEPIECE, [("Why?", "Because."), ("What then?", "")])
    theirs.labels[-1] = -100  # the end token of the empty answer
    out = reconcile_for()(row(side(BYTE_LEVEL, [("Why?", "Because.")]), theirs))
    assert out["dskd_status"] == KEPT
    assert out["teacher_labels"][-1] == SENTENCEPIECE.eos_token_id
    assert len(out["teacher_input_ids"]) < len(theirs.ids)


@pytest.mark.parametrize(
    ("truncate", "status"), [(False, TOO_LONG), (True, CUT)], ids=["drop", "truncate"]
)
def test_a_teacher_side_over_its_limit_is_dropped_or_cut(truncate: bool, status: str) -> None:
    turns = [("Why?", ANSWER)]
    ours, theirs = side(BYTE_LEVEL, turns), side(SENTENCEPIECE, turns)
    limit = len(theirs.ids) // 2
    out = reconcile_for(teacher_limit=limit, truncate_teacher=truncate)(row(ours, theirs))
    assert out["dskd_status"] == status
    assert len(out["teacher_input_ids"]) <= limit
    if truncate:
        assert ours.spelled(out["labels"]) == theirs.spelled(out["teacher_labels"])[1:]
        assert len(labelled(out["labels"])) < len(labelled(ours.labels))


def test_a_teacher_side_at_its_limit_is_kept() -> None:
    turns = [("Why?", "Because.")]
    ours, theirs = side(BYTE_LEVEL, turns), side(SENTENCEPIECE, turns)
    assert reconciled(ours, theirs, teacher_limit=len(theirs.ids))[0] == KEPT


def test_a_bos_on_one_side_is_no_difference() -> None:
    turns = [("", "Because.")]
    ours, theirs = Side(BYTE_LEVEL), Side(SENTENCEPIECE)
    ours.add("Because.", True)
    theirs.add("", True, SENTENCEPIECE.bos_token_id)
    theirs.add("Because.", True)
    # Nothing predicts the student's first token, but BOS predicts the teacher's.
    status, spelled, by_teacher = reconciled(ours, theirs)
    assert status == CUT
    assert spelled == by_teacher
    assert b"Because.".endswith(spelled)
    assert reconciled(side(BYTE_LEVEL, turns), side(SENTENCEPIECE, turns, bos=True))[0] == KEPT


@pytest.mark.parametrize("answer", ["Because.", " Because.", "  two", "é", " "])
def test_the_leading_space_of_sentencepiece_is_no_difference(answer: str) -> None:
    turns = [("Why?", answer)]
    for student, teacher in [(BYTE_LEVEL, SENTENCEPIECE), (SENTENCEPIECE, BYTE_LEVEL)]:
        assert reconciled(side(student, turns), side(teacher, turns))[0] == KEPT


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Because of light.", "Because of night."),
        ("a b", "b a"),
        ("Zürich", "Zu\u0308rich"),
        ("UPPER case", "upper case"),
        ("a\n\nb c", "a\nb c"),
    ],
)
def test_texts_that_differ_are_dropped(ours: str, theirs: str) -> None:
    status, *_ = reconciled(side(BYTE_LEVEL, [("", ours)]), side(SENTENCEPIECE, [("", theirs)]))
    assert status == DIFFERENT


def test_a_turn_that_differs_drops_the_row() -> None:
    ours = side(BYTE_LEVEL, [("Why?", "Because."), ("And?", "yes")])
    theirs = side(SENTENCEPIECE, [("Why?", "Because."), ("And?", "no")])
    assert reconciled(ours, theirs)[0] == DIFFERENT


def test_white_space_that_one_template_trims_is_unsupervised_on_both_sides() -> None:
    ours = side(BYTE_LEVEL, [("Why?", "\nBecause.")])
    theirs = side(BYTE_LEVEL, [("Why?", "Because.")])
    status, spelled, by_teacher = reconciled(ours, theirs)
    assert (status, spelled, by_teacher) == (CUT, b"Because.", b"Because.")


@pytest.mark.parametrize("unsupervised", ["student", "teacher", "both"])
def test_rows_without_supervised_tokens_are_empty(unsupervised: str) -> None:
    ours, theirs = side(BYTE_LEVEL, [("Why?", "So.")]), side(SENTENCEPIECE, [("Why?", "So.")])
    for name, made in (("student", ours), ("teacher", theirs)):
        if unsupervised in (name, "both"):
            made.labels = [-100] * len(made.labels)
    assert reconciled(ours, theirs)[0] == EMPTY


def test_an_answer_that_is_only_an_end_token_is_kept() -> None:
    ours, theirs = side(BYTE_LEVEL, [("Why?", "")]), side(SENTENCEPIECE, [("Why?", "")])
    out = reconcile_for()(row(ours, theirs))
    assert out["dskd_status"] == KEPT
    assert labelled(out["labels"]) == [BYTE_LEVEL.eos_token_id]
    assert labelled(out["teacher_labels"]) == [SENTENCEPIECE.eos_token_id]


@pytest.mark.parametrize("turns", [[("a", "one"), ("b", ""), ("c", "two")], [("a", ""), ("b", "")]])
def test_empty_answers_between_others_keep_their_end_tokens(turns: Turns) -> None:
    ours, theirs = side(BYTE_LEVEL, turns), side(SENTENCEPIECE, turns)
    out = reconcile_for()(row(ours, theirs))
    assert out["dskd_status"] == KEPT
    assert out["labels"] == ours.labels
    assert out["teacher_labels"] == theirs.labels


def test_an_end_token_apart_from_its_answer_stays_supervised() -> None:
    sides = []
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        made = side(tokenizer, [("Why?", "Because.")])
        made.labels[-1] = -100
        made.add("\n", False)
        made.add("", True, tokenizer.eos_token_id)
        sides.append(made)
    out = reconcile_for()(row(*sides))
    assert out["dskd_status"] == KEPT
    assert [out["labels"], out["teacher_labels"]] == [made.labels for made in sides]


def test_an_end_token_beyond_the_shared_text_is_unsupervised() -> None:
    ours = side(BYTE_LEVEL, [("Why?", ANSWER)], length=30)
    theirs = side(SENTENCEPIECE, [("Why?", ANSWER)])
    out = reconcile_for()(row(ours, theirs))
    assert out["dskd_status"] == CUT
    assert SENTENCEPIECE.eos_token_id not in out["teacher_labels"]


def test_an_end_token_inside_a_run_is_unsupervised_where_the_other_side_was_cut_before_it() -> None:
    table = [b"", b"a", b"b"]
    row = {"input_ids": [0, 1, 0, 2, 0], "labels": [-100, 1, 0, 2, 0]}
    row |= {"teacher_input_ids": [0, 1], "teacher_labels": [-100, 1]}
    out = Reconcile(table, table, LONG, False)(row)
    assert out["dskd_status"] == CUT
    assert out["labels"] == [-100, 1, -100, -100, -100]
    assert out["teacher_labels"] == [-100, 1]


def test_an_end_token_apart_is_unsupervised_where_the_other_side_was_cut_before_it() -> None:
    table = [b"", b"a", b"b"]
    row = {"input_ids": [0, 1, 2, 1, 0], "labels": [-100, 1, 2, -100, 0]}
    row |= {"teacher_input_ids": [0, 1], "teacher_labels": [-100, 1]}
    out = Reconcile(table, table, LONG, False)(row)
    assert out["dskd_status"] == CUT
    assert out["labels"] == [-100, 1, -100, -100, -100]


def test_a_lost_last_turn_leaves_the_others_whole() -> None:
    turns = [("a", "The first answer."), ("b", "The second answer."), ("c", "The third answer.")]
    for student, teacher in [(BYTE_LEVEL, SENTENCEPIECE), (SENTENCEPIECE, BYTE_LEVEL)]:
        ours, theirs = side(student, turns[:2]), side(teacher, turns)
        status, spelled, by_teacher = reconciled(ours, theirs)
        assert status == CUT
        for text in (spelled, by_teacher):
            assert text.replace(b" ", b"") == b"Thefirstanswer.Thesecondanswer."


def test_pieces_tokenized_apart_are_one_text() -> None:
    """As alpaca does with train_on_inputs, and input_output: each piece gets its own `▁`."""
    pieces = ["Say it.\n", "Because of", "light", " and  air."]
    sides = []
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        made = Side(tokenizer)
        made.add("Q", False)
        for piece in pieces:
            made.add(piece, True)
        made.add("", True, tokenizer.eos_token_id)
        sides.append(made)
    for ours, theirs in (sides, sides[::-1]):
        out = reconcile_for(ours.tokenizer, theirs.tokenizer)(row(ours, theirs))
        assert out["dskd_status"] == KEPT
        assert (out["labels"], out["teacher_labels"]) == (ours.labels, theirs.labels)


def in_single_letters(text: str) -> Side:
    """An answer whose tokens are not those that the tokenizer would make of it."""
    made = Side(BYTE_LEVEL)
    made.add("Why?\n", False)
    for letter in text:
        made.add(letter, True)
    made.add("", True, BYTE_LEVEL.eos_token_id)
    return made


def test_one_vocabulary_is_no_reason_to_drop_a_text_of_other_tokens() -> None:
    ours, theirs = side(BYTE_LEVEL, [("Why?", "The quick")]), in_single_letters("The quick")
    assert len(labelled(ours.labels)) < len(labelled(theirs.labels))
    out = reconcile_for(teacher=BYTE_LEVEL)(row(ours, theirs))
    assert out["dskd_status"] == KEPT
    assert (out["labels"], out["teacher_labels"]) == (ours.labels, theirs.labels)


def test_end_tokens_of_two_templates_over_one_vocabulary_stay_supervised() -> None:
    ours, theirs = (side(SENTENCEPIECE, [("Why?", "So.")]) for _ in range(2))
    theirs.ids[-1] = theirs.labels[-1] = SENTENCEPIECE.bos_token_id
    # One behind its answer, and one apart from it.
    for made, end in ((ours, SENTENCEPIECE.eos_token_id), (theirs, SENTENCEPIECE.bos_token_id)):
        made.add("And?\n", False)
        made.add("", True, end)
    out = reconcile_for(SENTENCEPIECE, SENTENCEPIECE)(row(ours, theirs))
    assert out["dskd_status"] == KEPT
    assert (out["labels"], out["teacher_labels"]) == (ours.labels, theirs.labels)
    assert labelled(out["labels"]) != labelled(out["teacher_labels"])
    spans, teacher_spans = (Spans.from_bytes(out[column]) for column in (SPANS, TEACHER_SPANS))
    pairs = exact_pairs(spans, teacher_spans)
    assert [side.tolist() for side in pairs] == [list(range(len(spans)))] * 2


def test_sides_of_one_vocabulary_are_cut_to_the_same_tokens() -> None:
    for length in range(6, 40):
        ours = side(BYTE_LEVEL, [("Why?", ANSWER)], length)
        out = reconcile_for(teacher=BYTE_LEVEL)(
            row(ours, side(BYTE_LEVEL, [("Well then", ANSWER)]))
        )
        if out["dskd_status"] in (KEPT, CUT):
            assert labelled(out["labels"]) == labelled(out["teacher_labels"])


def test_a_row_made_elsewhere_is_reconciled_and_collated() -> None:
    """As when the student has written the answer: its own ids, the teacher's template around."""
    answer, theirs = in_single_letters("The quick"), side(SENTENCEPIECE, [("Well", "The quick")])
    made = {
        "input_ids": np.array(answer.ids),
        "labels": np.array(answer.labels),
        "teacher_input_ids": np.array(theirs.ids),
        "teacher_labels": np.array(theirs.labels),
    }
    made |= reconcile_for()(made)
    assert made.pop(STATUS) == KEPT
    inner = DataCollatorForSeq2Seq(BYTE_LEVEL)
    collate = DualCollator(inner, padding_side="right", teacher_pad_id=0)
    one = made | {"input_ids": answer.ids, "attention_mask": [1] * len(answer.ids)}
    batch = DualBatch.pop_from(collate([one, one]))
    student, teacher = batch.student_side(), batch.teacher_side()
    assert len(student) == len(batch.matches.spans) == 2 * len("The quick.")
    assert len(teacher) == len(batch.matches.teacher_spans)
    ours, theirs_too = batch.matches.exact.unbind(1)
    ends = student.labels[ours] == BYTE_LEVEL.eos_token_id
    assert int(ends.sum()) == 2
    assert (teacher.labels[theirs_too[ends]] == SENTENCEPIECE.eos_token_id).all()


# ---- random rows ---------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["no ", "no", " yes", "é", "😀", "你好", "\n", "  ", " ", "The ", "\t", "👩‍👩‍👧", "ש", "▂", "a"]
)
TEXT = st.one_of(
    st.lists(WORDS, max_size=14).map("".join),
    st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=20),
)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
LENGTH = st.one_of(st.just(LONG), st.integers(1, 60))


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=250, deadline=None, database=None)
@given(turns=TURNS, length=LENGTH, teacher_length=LENGTH, limit=LENGTH, bos=st.booleans())
@example(turns=[("", "😀" * 9)], length=7, teacher_length=LONG, limit=LONG, bos=False)
@example(turns=[("", "no no no no")] * 3, length=13, teacher_length=LONG, limit=LONG, bos=True)
@example(turns=[("a", ""), ("", " "), ("", "")], length=LONG, teacher_length=6, limit=9, bos=True)
def test_what_is_kept_has_the_same_text_on_both_sides(
    student: Any,
    teacher: Any,
    turns: Turns,
    length: int,
    teacher_length: int,
    limit: int,
    bos: bool,
) -> None:
    ours = side(student, turns, length, bos and student is SENTENCEPIECE)
    theirs = side(teacher, turns, teacher_length, bos and teacher is SENTENCEPIECE)
    if not (len(ours.ids) and len(theirs.ids)):
        return
    status, spelled, by_teacher = reconciled(
        ours, theirs, teacher_limit=limit, truncate_teacher=True
    )
    assert status in (KEPT, CUT, EMPTY, DIFFERENT)
    text = "".join(answer for _, answer in turns)
    if status in (KEPT, CUT):
        if len(turns) == 1:
            assert (
                spelled == by_teacher
                or b" " + spelled == by_teacher
                or spelled == (b" " + by_teacher)
            )
            whole = b" " + text.encode()
            assert spelled in whole
            assert by_teacher in whole
        squeezed = re.sub(b" ", b"", spelled)
        assert squeezed == re.sub(b" ", b"", by_teacher)
        assert squeezed in text.replace(" ", "").encode()
    whole_sides = length == LONG and teacher_length == LONG and limit >= len(theirs.ids)
    if whole_sides and all(prompt or i for i, (prompt, _) in enumerate(turns)):
        assert status == KEPT


# ---- whole data sets -----------------------------------------------------------------------


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows)


def _good(count: int) -> list[dict[str, Any]]:
    return [
        row(side(BYTE_LEVEL, [("Why?", text)]), side(SENTENCEPIECE, [("Why?", text)]))
        for text in (f"Because {i}." for i in range(count))
    ]


def _different(count: int) -> list[dict[str, Any]]:
    return [
        row(side(BYTE_LEVEL, [("Why?", f"yes {i}")]), side(SENTENCEPIECE, [("Why?", f"no {i}")]))
        for i in range(count)
    ]


def _apply(rows: list[dict[str, Any]], raise_if_long: bool = False, **overrides: Any) -> Dataset:
    """Without the columns of the spans, which have tests of their own."""
    return reconcile_dataset(
        _dataset(rows), reconcile_for(**overrides), num_proc=None, raise_if_long=raise_if_long
    ).remove_columns([SPANS, TEACHER_SPANS])


def test_good_rows_come_out_as_they_went_in() -> None:
    rows = _good(5)
    assert _apply(rows).to_list() == rows


def test_few_rows_with_another_text_are_dropped() -> None:
    rows = [*_good(5), *_different(1), *_good(4)]
    assert _apply(rows).to_list() == rows[:5] + rows[6:]


def test_many_rows_with_another_text_stop_the_run_with_three_examples() -> None:
    with pytest.raises(ValueError, match=r"5 of 14 rows do not have the same supervised text") as e:
        _apply([*_good(9), *_different(5)])
    message = str(e.value)
    assert message.count("student: ") == message.count("teacher: ") == 3
    assert "student: 'yes 0'" in message
    assert "teacher: ' no 0'" in message
    assert "dskd.teacher.chat_template" in message


def test_rows_without_supervised_text_are_dropped_silently_however_many() -> None:
    ours, theirs = side(BYTE_LEVEL, [("Why?", "So.")]), side(SENTENCEPIECE, [("Why?", "So.")])
    ours.labels = [-100] * len(ours.labels)
    assert _apply([row(ours, theirs)] * 9 + _good(1)).to_list() == _good(1)


def test_a_data_set_of_which_nothing_is_left_is_refused() -> None:
    ours, theirs = side(BYTE_LEVEL, [("Why?", "So.")]), side(SENTENCEPIECE, [("Why?", "So.")])
    ours.labels = [-100] * len(ours.labels)
    with pytest.raises(
        ValueError,
        match=r"none of the 3 rows can be distilled on\.\n3 dropped: one side supervises no text",
    ):
        _apply([row(ours, theirs)] * 3)


def test_a_data_set_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no row is left to distil on"):
        reconcile_dataset(
            _dataset(_good(2)).select([]), reconcile_for(), num_proc=None, raise_if_long=False
        )


def test_a_long_teacher_side_is_dropped_cut_or_refused() -> None:
    rows = _good(3)
    turns = [("Why?", ANSWER)]
    rows.append(row(side(BYTE_LEVEL, turns), side(SENTENCEPIECE, turns)))
    limit = max(len(r["teacher_input_ids"]) for r in rows[:3])
    assert _apply(rows, teacher_limit=limit).to_list() == rows[:3]
    cut = _apply(rows, teacher_limit=limit, truncate_teacher=True)
    assert len(cut) == 4
    assert len(cut[3]["teacher_input_ids"]) <= limit
    with pytest.raises(ValueError, match=rf"raise, and 1 of 4 rows have more than {limit} teacher"):
        _apply(rows, raise_if_long=True, teacher_limit=limit)
