"""Which bytes of the text each token stands for, and which tokens of two sides stand for the same.

Both sides of a row spell one text. A token's *span* is the half-open range [start, end) of bytes
that it stands for in that text, so two tokens of different tokenizers are the same piece of text
exactly where their spans are equal. This module knows numbers only: no tokenizer, row or model.

All functions are vectorised and pure; spans of a side ascend, as its tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

_STORED = np.dtype("<i4")
#: What a token takes in a stored row.
BYTES_PER_TOKEN = 2 * _STORED.itemsize


@dataclass(frozen=True)
class Spans:
    """Spans of the tokens of one side, in order.

    Attributes:
        starts, ends: [n] int64, `starts <= ends`, both ascending.
    """

    starts: IntArray
    ends: IntArray

    def __len__(self) -> int:
        return len(self.starts)

    def shifted(self, offset: int | IntArray) -> Spans:
        """The same spans `offset` bytes further on (each its own, or all the same)."""
        return Spans(self.starts + offset, self.ends + offset)

    def array(self) -> IntArray:
        """[n, 2] start and end."""
        return np.stack([self.starts, self.ends], axis=1)

    def to_bytes(self) -> bytes:
        """`start, end, start, end, …` as little-endian int32, the form in which rows store them:
        a data set reads bytes many times faster than lists of numbers."""
        return self.array().astype(_STORED).tobytes()

    @classmethod
    def from_bytes(cls, stored: bytes) -> Spans:
        """What `to_bytes` returned."""
        both = np.frombuffer(stored, _STORED).astype(np.int64).reshape(-1, 2)
        return cls(both[:, 0], both[:, 1])

    @classmethod
    def of_rows(cls, stored: Sequence[bytes]) -> tuple[Spans, IntArray]:
        """Spans of several rows, one row behind the other, and the number of each token's row."""
        counts = [len(row) // BYTES_PER_TOKEN for row in stored]
        return cls.from_bytes(b"".join(stored)), np.repeat(np.arange(len(stored)), counts)

    @classmethod
    def joined(cls, parts: Sequence[Spans]) -> Spans:
        """Several spans in a row."""
        if not parts:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))
        return cls(
            np.concatenate([p.starts for p in parts]), np.concatenate([p.ends for p in parts])
        )


def tile(lengths: Sequence[int] | IntArray) -> Spans:
    """Spans of tokens that stand for `lengths` bytes each, one behind the other from 0 on."""
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    return Spans(np.concatenate([[0], ends])[: len(ends)], ends)


def give_textless_tokens_room(
    student: Spans, student_textless: NDArray[np.bool_], teacher: Spans, teacher_textless: NDArray
) -> tuple[Spans, Spans]:
    """Let tokens that stand for no text (end-of-turn tokens) take one unit each, behind the text.

    The k-th textless token at a place of one side then has the same span as the k-th one at that
    place of the other side: the end of a turn meets the end of a turn, whatever its name. And an
    end token ends behind the last token of the text, which it comes after.

    A token of text that stands for no bytes here (the space that a sentencepiece tokenizer writes
    before a text) keeps its turn among the textless ones at its place: the one before an end token
    begins and ends where that one begins, the one behind all of them where the text goes on.

    Args:
        student, teacher: spans in one text, textless tokens with `start == end`.
        student_textless, teacher_textless: [n] which tokens are textless.
    """
    places = np.union1d(student.starts[student_textless], teacher.starts[teacher_textless])
    if not len(places):
        return student, teacher

    def count(at: IntArray) -> IntArray:
        return np.searchsorted(at, places, "right") - np.searchsorted(at, places, "left")

    room = np.maximum(
        count(student.starts[student_textless]), count(teacher.starts[teacher_textless])
    )
    before = np.concatenate([[0], np.cumsum(room)])

    def moved(spans: Spans, textless: NDArray[np.bool_]) -> Spans:
        starts = spans.starts + before[np.searchsorted(places, spans.starts, "right")]
        ends = spans.ends + before[np.searchsorted(places, spans.ends, "left")]
        at = spans.starts[textless]
        first = np.searchsorted(at, spans.starts, "left")
        #: Textless tokens at each token's place that come before it.
        number = np.cumsum(textless) - textless - first
        early = number < np.searchsorted(at, spans.starts, "right") - first
        early &= spans.starts == spans.ends
        starts[early] = (ends + number)[early]
        ends[textless] = starts[textless] + 1
        return Spans(starts, np.maximum(starts, ends))

    return moved(student, student_textless), moved(teacher, teacher_textless)


def kept_apart(
    student: Spans, student_samples: IntArray, teacher: Spans, teacher_samples: IntArray
) -> tuple[Spans, Spans]:
    """Spans of many samples as if their texts stood one behind the other, a byte between them.

    Pairs and groups of all samples are then found at once, and none is of two samples.

    Args:
        student_samples, teacher_samples: number of each token's sample, ascending from 0.
    """
    stride = 1 + max(int(side.ends.max(initial=0)) for side in (student, teacher))
    return student.shifted(stride * student_samples), teacher.shifted(stride * teacher_samples)


def start_pairs(student: Spans, teacher: Spans) -> tuple[IntArray, IntArray]:
    """Indices of the tokens that begin at the same byte: [Q] each, ascending.

    Both models have read the same bytes before such a pair. Tokens without bytes are in none, and
    no token is in two, as those with bytes do not overlap on either side.
    """
    ours, theirs = (np.flatnonzero(s.ends > s.starts) for s in (student, teacher))
    _, i, j = np.intersect1d(
        student.starts[ours], teacher.starts[theirs], assume_unique=True, return_indices=True
    )
    return ours[i], theirs[j]


def exact_pairs(student: Spans, teacher: Spans) -> tuple[IntArray, IntArray]:
    """Indices of the tokens that have the same, non-empty span on both sides: [P] each, ascending.

    These are the start pairs that end together too. Both models have read the same bytes before
    such a pair and read the same ones with it.
    """
    ours, theirs = start_pairs(student, teacher)
    equal = student.ends[ours] == teacher.ends[theirs]
    return ours[equal], theirs[equal]


def group_numbers(student: Spans, teacher: Spans) -> tuple[IntArray, IntArray]:
    """The text cut wherever no token of either side reaches across: each token's group.

    A group is the fewest tokens that together stand for the same bytes on both sides. Every token
    is in exactly one. A token without bytes (the space that a sentencepiece tokenizer writes
    before a text) goes with the token behind it. Where only one side has a token (a second end
    token), the other side has none in its group.

    Returns:
        [N] and [M], ascending, every number from 0 up to the last group's.
    """
    sides = student, teacher
    # Stable sorting is fastest for what consists of ascending parts. Edges may repeat.
    edges = np.sort(np.concatenate([e for s in sides for e in (s.starts, s.ends)]), kind="stable")
    reached_across = np.zeros(len(edges), dtype=bool)
    for side in sides:
        wide = side.ends > side.starts
        begun = np.searchsorted(side.starts[wide], edges, "left")
        ended = np.searchsorted(side.ends[wide], edges, "right")
        reached_across |= begun > ended
    cuts = edges[~reached_across]
    ours, theirs = (np.searchsorted(cuts, side.starts, "right") - 1 for side in sides)
    used = np.zeros(len(cuts), dtype=bool)
    used[ours] = used[theirs] = True
    number = np.cumsum(used) - 1
    return number[ours], number[theirs]


@dataclass(frozen=True)
class Group:
    """One group of `group_numbers`: tokens that together stand for the bytes [start, end).

    `student`, `teacher`: the indices of the tokens. Either range may be empty, where only one
    side has a token.
    """

    start: int
    end: int
    student: range
    teacher: range

    @property
    def exact(self) -> bool:
        """One token on each side."""
        return len(self.student) == len(self.teacher) == 1


def aligned_groups(student: Spans, teacher: Spans) -> list[Group]:
    """The groups of `group_numbers`, in order."""
    numbers = group_numbers(student, teacher)
    both = Spans.joined([student, teacher])
    count = 1 + max((int(side[-1]) for side in numbers if len(side)), default=-1)
    starts, ends = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
    np.minimum.at(starts, np.concatenate(numbers), both.starts)
    np.maximum.at(ends, np.concatenate(numbers), both.ends)
    ours, theirs = (np.searchsorted(side, np.arange(count + 1)).tolist() for side in numbers)
    return [
        Group(int(starts[k]), int(ends[k]), range(*ours[k : k + 2]), range(*theirs[k : k + 2]))
        for k in range(count)
    ]
