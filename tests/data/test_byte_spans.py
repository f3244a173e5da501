"""Byte spans: exactly the pairs that character offsets allow, and never a pair of unlike bytes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from axolotl_dskd.data.byte_spans import (
    Spans,
    aligned_groups,
    exact_pairs,
    give_textless_tokens_room,
    group_numbers,
    kept_apart,
    start_pairs,
    tile,
)
from axolotl_dskd.data.outcomes import KEPT
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS, Reconcile
from axolotl_dskd.data.shared_text import writes_dummy_space
from tests.support.tokenizers import FRAGMENTS, TOKENIZERS, end_token, one_side
from tests.support.tokenizers import byte_table as _table

PAIRS = [
    ("tiny byte-level", "tiny sentencepiece"),
    ("tiny sentencepiece", "tiny byte-level"),
    ("tiny byte-level", "DeepSeek"),
    ("DeepSeek", "Mistral v1"),
    ("Mistral v3", "DeepSeek"),
    ("tiny sentencepiece", "DeepSeek"),
]
#: Where both write a space before a text, " x" of one side is no pair of the other's "x".
BOTH_WITH_DUMMY_SPACES = ("Mistral v1", "tiny sentencepiece")


def mixed_rows(count: int) -> list[list[tuple[str, str]]]:
    """Conversations of one to three turns whose answers mix all kinds of text."""
    pick = random.Random(0)
    kinds = list(FRAGMENTS)
    rows = []
    for i in range(count):
        turns = []
        for turn in range(pick.choice([1, 1, 2, 3])):
            if turn == 0 and i % 5 == 4:
                answer = pick.choice(FRAGMENTS["short"])
            else:
                parts = pick.sample(kinds[:4], pick.randint(1, 3))
                parts = [FRAGMENTS[kinds[i % 4]][i % 3]] + [
                    pick.choice(FRAGMENTS[p]) for p in parts
                ]
                answer = pick.choice(["", " ", "\n"]).join(parts)
            turns.append((f"Question {i}?", answer))
        rows.append(turns)
    return rows


def prepared(student: str, teacher: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    reconcile = Reconcile(
        _table(student),
        _table(teacher),
        teacher_limit=1 << 20,
        truncate_teacher=False,
        student_dummy_spaces=writes_dummy_space(TOKENIZERS[student](), _table(student)),
        teacher_dummy_spaces=writes_dummy_space(TOKENIZERS[teacher](), _table(teacher)),
    )
    (ids, labels), (teacher_ids, teacher_labels) = (
        one_side(name, turns) for name in (student, teacher)
    )
    return reconcile(
        {
            "input_ids": ids,
            "labels": labels,
            "teacher_input_ids": teacher_ids,
            "teacher_labels": teacher_labels,
        }
    )


def pairs_of(row: dict[str, Any]) -> list[tuple[int, int]]:
    spans = (Spans.from_bytes(row[column]) for column in (SPANS, TEACHER_SPANS))
    return as_tuples(exact_pairs(*spans))


def spans_by_offsets(name: str, text: str) -> list[tuple[int, int]]:
    """Byte spans from the tokenizer's own character offsets.

    Where several tokens share one character, which offsets cannot tell apart, each takes as many
    bytes as its spelling has: one a character in the byte-level alphabet, one a byte token.
    """
    tokenizer = TOKENIZERS[name]()
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    byte_at = [len(text[:c].encode()) for c in range(len(text) + 1)]
    tokens, offsets = tokenizer.convert_ids_to_tokens(out["input_ids"]), out["offset_mapping"]
    spans, end = [], 0
    for i, (token, (first, last)) in enumerate(zip(tokens, offsets, strict=True)):
        before = i and offsets[i - 1][1] > first
        behind = i + 1 < len(offsets) and offsets[i + 1][0] < last
        start = end if before else byte_at[first]
        if not (before or behind):
            end = byte_at[last]
        elif "Mistral" in name or "sentencepiece" in name:
            dummy = token == "▁" and i == 0 and not text.startswith(" ")
            end = start + (0 if dummy else 1 if token.startswith("<0x") else len(token.encode()))
        else:
            end = start + len(token)
        spans.append((start, end))
    return spans


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_pairs_are_those_that_character_offsets_allow(student: str, teacher: str) -> None:
    shares = []
    for turns in mixed_rows(200):
        expected, at, teacher_at = [], 0, 0
        for _, answer in turns:
            ours, theirs = (spans_by_offsets(name, answer) for name in (student, teacher))
            place = {span: j for j, span in enumerate(theirs) if span[0] < span[1]}
            expected += [(at + i, teacher_at + place[s]) for i, s in enumerate(ours) if s in place]
            at, teacher_at = at + len(ours), teacher_at + len(theirs)
            expected.append((at, teacher_at))  # the end tokens
            at, teacher_at = at + 1, teacher_at + 1
        row = prepared(student, teacher, turns)
        assert row["dskd_status"] == KEPT
        assert pairs_of(row) == expected
        shares.append(len(expected) / at)
    assert 0.1 < sum(shares) / len(shares) < 1


@pytest.mark.parametrize(("student", "teacher"), [*PAIRS, BOTH_WITH_DUMMY_SPACES])
def test_both_tokens_of_a_pair_have_the_same_bytes(student: str, teacher: str) -> None:
    for turns in mixed_rows(200):
        row = prepared(student, teacher, turns)
        ours = [_table(student)[y] for y in row["labels"] if y != -100]
        theirs = [_table(teacher)[y] for y in row["teacher_labels"] if y != -100]
        starts = [0, *np.flatnonzero([not t for t in ours]) + 1]
        for i, j in pairs_of(row):
            if ours[i] != theirs[j]:  # the space that sentencepiece writes before an answer
                assert i in starts
                assert ours[i].removeprefix(b" ") == theirs[j].removeprefix(b" ")


STRINGS = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40)


@pytest.mark.parametrize("name", ["tiny byte-level", "tiny sentencepiece", "DeepSeek"])
@settings(max_examples=60, deadline=None, database=None)
@given(text=STRINGS)
def test_the_spans_of_a_text_tile_it(name: str, text: str) -> None:
    tokenizer, table = TOKENIZERS[name](), _table(name)
    assume(not any(special in text for special in tokenizer.all_special_tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = tile([len(table[i]) for i in ids])
    spelled = text.encode() if len(spans) == 0 or not spans.ends[-1] > len(text.encode()) else None
    spelled = spelled if spelled is not None else b" " + text.encode()
    edges = [0, *spans.ends.tolist()]
    assert edges[:-1] == spans.starts.tolist()
    assert edges[-1] == len(spelled)
    pieces = [spelled[a:b] for a, b in zip(spans.starts, spans.ends, strict=True)]
    assert pieces == [table[i] for i in ids]


TURNS = st.lists(st.tuples(st.just("Why?"), STRINGS), min_size=1, max_size=3)


@pytest.mark.parametrize(("student", "teacher"), PAIRS[:3])
@settings(max_examples=60, deadline=None, database=None)
@given(turns=TURNS)
def test_the_groups_of_a_row_hold_every_token_once_and_the_same_bytes(
    student: str, teacher: str, turns: list[tuple[str, str]]
) -> None:
    specials = {s for name in (student, teacher) for s in TOKENIZERS[name]().all_special_tokens}
    assume(not any(special in text for special in specials for _, text in turns))
    row = prepared(student, teacher, turns)
    assert row["dskd_status"] == KEPT
    ours, theirs = (Spans.from_bytes(row[column]) for column in (SPANS, TEACHER_SPANS))
    labels = (
        [y for y in row["labels"] if y != -100],
        [y for y in row["teacher_labels"] if y != -100],
    )
    groups = aligned_groups(ours, theirs)
    assert (
        [i for g in groups for i in g.student]
        == list(range(len(labels[0])))
        == list(range(len(ours)))
    )
    assert [j for g in groups for j in g.teacher] == list(range(len(labels[1])))
    for g in groups:
        spelled = [
            b"".join(table[side[i]] for i in tokens)
            for table, side, tokens in (
                (_table(student), labels[0], g.student),
                (_table(teacher), labels[1], g.teacher),
            )
        ]
        assert (
            spelled[0] == spelled[1]
            or b" " + spelled[0] == spelled[1]
            or (spelled[0] == b" " + spelled[1])
        )
    exact = [(g.student[0], g.teacher[0]) for g in groups if g.exact]
    assert set(exact) <= set(pairs_of(row))
    # A pair is not a group of two only where a token without bytes stands beside it.
    for i, j in set(pairs_of(row)) - set(exact):
        group = next(g for g in groups if i in g.student)
        lengths = [ours.ends[k] - ours.starts[k] for k in group.student if k != i]
        lengths += [theirs.ends[k] - theirs.starts[k] for k in group.teacher if k != j]
        assert set(lengths) == {0}


#: Any spans of one side: gaps between tokens, tokens without bytes, nothing at all.
GAPS_AND_LENGTHS = st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 3]), st.integers(0, 3)))


def spans_of(gaps_and_lengths: list[tuple[int, int]]) -> Spans:
    starts, ends, at = [], [], 0
    for gap, length in gaps_and_lengths:
        starts.append(at + gap)
        ends.append(at := at + gap + length)
    return Spans(np.array(starts, np.int64), np.array(ends, np.int64))


def plain(spans: Spans) -> list[tuple[int, int]]:
    return list(zip(spans.starts.tolist(), spans.ends.tolist(), strict=True))


def as_tuples(pairs: tuple[Any, Any]) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in zip(*pairs, strict=True)]


def groups_by_merging(student: Spans, teacher: Spans) -> list[list[int]]:
    """Group of each token of each side: tokens that overlap are one block, however many."""
    blocks: list[tuple[int, int]] = []
    for start, end in sorted(plain(student) + plain(teacher)):
        if start < end and blocks and start < blocks[-1][1]:
            blocks[-1] = blocks[-1][0], max(blocks[-1][1], end)
        elif start < end:
            blocks.append((start, end))
    # Without bytes: in the block that holds the byte at this place, else a block of its own.
    for start, end in plain(student) + plain(teacher):
        if not any(low <= start < high or (low, high) == (start, end) for low, high in blocks):
            blocks.append((start, end))
    blocks.sort()
    return [
        [
            next(k for k, b in enumerate(blocks) if b[0] <= start < b[1] or b == (start, end))
            for start, end in plain(side)
        ]
        for side in (student, teacher)
    ]


@settings(max_examples=300, deadline=None, database=None)
@given(GAPS_AND_LENGTHS, GAPS_AND_LENGTHS)
def test_pairs_and_groups_are_those_of_a_plain_search(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]]
) -> None:
    student, teacher = spans_of(ours), spans_of(theirs)
    with_bytes = [
        (i, j, span, other)
        for i, span in enumerate(plain(student))
        for j, other in enumerate(plain(teacher))
        if span[0] < span[1] and other[0] < other[1]
    ]
    starts, exact = start_pairs(student, teacher), exact_pairs(student, teacher)
    assert as_tuples(starts) == [(i, j) for i, j, span, other in with_bytes if span[0] == other[0]]
    assert as_tuples(exact) == [(i, j) for i, j, span, other in with_bytes if span == other]
    assert all(len(set(side.tolist())) == len(side) for side in starts)
    numbers = group_numbers(student, teacher)
    assert [side.tolist() for side in numbers] == groups_by_merging(student, teacher)
    groups = aligned_groups(student, teacher)
    for side, name in zip(numbers, ("student", "teacher"), strict=True):
        members = [i for g in groups for i in getattr(g, name)]
        assert members == list(range(len(side)))
        assert side.tolist() == [k for k, g in enumerate(groups) for _ in getattr(g, name)]
    assert all(g.student or g.teacher for g in groups)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(GAPS_AND_LENGTHS, GAPS_AND_LENGTHS), max_size=5))
def test_samples_kept_apart_have_the_pairs_and_groups_of_each(
    samples: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]],
) -> None:
    sides = [[spans_of(sample[side]) for sample in samples] for side in (0, 1)]
    student, teacher = (Spans.of_rows([spans.to_bytes() for spans in side]) for side in sides)
    joined = kept_apart(*student, *teacher)
    found = {find: as_tuples(find(*joined)) for find in (start_pairs, exact_pairs)}
    expected: dict[Any, list[tuple[int, int]]] = {find: [] for find in found}
    numbers, expected_numbers = group_numbers(*joined), [[], []]
    at, to, group = 0, 0, 0
    for ours, theirs in zip(*sides, strict=True):
        for find, pairs in expected.items():
            pairs += [(at + i, to + j) for i, j in as_tuples(find(ours, theirs))]
        alone = group_numbers(ours, theirs)
        for side, more in zip(expected_numbers, alone, strict=True):
            side += (group + more).tolist()
        at, to = at + len(ours), to + len(theirs)
        group += len(set(np.concatenate(alone).tolist()))
    assert found == expected
    assert [side.tolist() for side in numbers] == expected_numbers


@settings(max_examples=100, deadline=None, database=None)
@given(GAPS_AND_LENGTHS, GAPS_AND_LENGTHS)
def test_a_group_holds_the_bytes_of_its_tokens_and_no_other_groups(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]]
) -> None:
    student, teacher = spans_of(ours), spans_of(theirs)
    groups = aligned_groups(student, teacher)
    for group in groups:
        members = [plain(student)[i] for i in group.student]
        members += [plain(teacher)[j] for j in group.teacher]
        assert group.start == min(start for start, _ in members)
        assert group.end == max(end for _, end in members)
    assert all(a.end <= b.start for a, b in itertools.pairwise(groups))


def test_a_multibyte_character_split_unlike_on_both_sides_is_one_group() -> None:
    student, teacher = tile([1, 2, 1, 3]), tile([2, 1, 1, 3])
    assert [list(map(int, side)) for side in exact_pairs(student, teacher)] == [[2, 3], [2, 3]]
    groups = aligned_groups(student, teacher)
    assert [(g.start, g.end, len(g.student), len(g.teacher)) for g in groups] == [
        (0, 3, 2, 2),
        (3, 4, 1, 1),
        (4, 7, 1, 1),
    ]


def test_end_tokens_pair_in_order_and_one_too_many_pairs_with_nothing() -> None:
    student, teacher = tile([3, 0]), tile([1, 2, 0, 0])
    spans = give_textless_tokens_room(
        student, np.array([False, True]), teacher, np.array([False, False, True, True])
    )
    assert [side.tolist() for side in exact_pairs(*spans)] == [[1], [2]]
    assert spans[1].ends.tolist() == [1, 3, 4, 5]
    groups = aligned_groups(*spans)
    assert [(len(g.student), len(g.teacher)) for g in groups] == [(1, 2), (1, 1), (0, 1)]


#: Of one side: bytes left out before each token, its bytes, whether it stands for no text.
TOKENS = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 2]),
        st.sampled_from([(0, True), (0, True), (0, False), (1, False), (3, False)]),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None, database=None)
@given(TOKENS, TOKENS)
def test_room_for_textless_tokens_leaves_all_tokens_in_their_order(
    ours: list[tuple[int, tuple[int, bool]]], theirs: list[tuple[int, tuple[int, bool]]]
) -> None:
    """Also where text without bytes, such as a space before nothing, stands among them."""
    sides = [
        (
            spans_of([(gap, length) for gap, (length, _) in side]),
            np.array([textless for _, (_, textless) in side], bool),
        )
        for side in (ours, theirs)
    ]
    for (before, textless), after in zip(
        sides, give_textless_tokens_room(*sides[0], *sides[1]), strict=True
    ):
        assert (after.ends[:-1] <= after.starts[1:]).all()
        lengths, given_lengths = (spans.ends - spans.starts for spans in (before, after))
        assert (given_lengths[textless] == 1).all()
        assert (given_lengths[~textless] >= lengths[~textless]).all()
        assert (given_lengths[~textless & (lengths == 0)] == 0).all()


def test_a_space_before_nothing_begins_where_the_end_token_behind_it_does() -> None:
    """A turn of white space, as a template may write of an empty message, under sentencepiece."""
    student, teacher = tile([2, 0, 0]), tile([2, 0])
    spans = give_textless_tokens_room(
        student, np.array([False, False, True]), teacher, np.array([False, True])
    )
    assert plain(spans[0]) == [(0, 2), (2, 2), (2, 3)]
    assert plain(spans[1]) == [(0, 2), (2, 3)]
    assert as_tuples(exact_pairs(*spans)) == [(0, 0), (2, 1)]
    assert [side.tolist() for side in group_numbers(*spans)] == [[0, 1, 1], [0, 1]]


def test_an_end_token_ends_behind_the_text_before_it() -> None:
    """What `causal` attention relies on: the last word does not see the end token."""
    row = prepared(*PAIRS[0], [("Why?", "Because."), ("And?", "So.")])
    spans = Spans.from_bytes(row[SPANS])
    assert (np.diff(spans.ends) > 0).all()


def test_an_end_token_apart_from_its_answer_pairs_with_the_other_sides() -> None:
    student, teacher = PAIRS[0]
    sides = []
    for name in (student, teacher):
        ids, labels = one_side(name, [("Why?", "Because."), ("And?", "")])
        newline = TOKENIZERS[name]()("\n", add_special_tokens=False)["input_ids"]
        ids, labels = ids + newline + [end_token(name)], labels + [-100] * len(newline)
        sides += [ids, [*labels, end_token(name)]]
    reconcile = Reconcile(
        _table(student), _table(teacher), 1 << 20, False, teacher_dummy_spaces=True
    )
    keys = ("input_ids", "labels", "teacher_input_ids", "teacher_labels")
    row = reconcile(dict(zip(keys, sides, strict=True)))
    assert row["dskd_status"] == KEPT
    ends, teacher_ends = (
        [k for k, y in enumerate(y for y in row[column] if y != -100) if y == end_token(name)]
        for column, name in (("labels", student), ("teacher_labels", teacher))
    )
    assert len(ends) == 3
    assert set(zip(ends, teacher_ends, strict=True)) <= set(pairs_of(row))


def test_tokens_without_bytes_are_no_pair_by_standing_at_one_place() -> None:
    student, teacher = tile([0, 3, 2]), tile([0, 3, 0, 2])
    assert [side.tolist() for side in exact_pairs(student, teacher)] == [[1, 2], [1, 3]]


def test_no_shared_tokens_give_no_pairs() -> None:
    nothing = tile([])
    assert [len(side) for side in exact_pairs(nothing, tile([1, 2]))] == [0, 0]
    assert [len(side) for side in exact_pairs(tile([1, 2]), nothing)] == [0, 0]
    assert [side.tolist() for side in group_numbers(nothing, nothing)] == [[], []]
    assert aligned_groups(nothing, nothing) == []
    assert [side.tolist() for side in group_numbers(tile([1, 2]), nothing)] == [[0, 1], []]
