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

    def shifted(self, offset: int) -> Spans:
        """The same spans `offset` bytes further on."""
        return Spans(self.starts + offset, self.ends + offset)

    def flat(self) -> NDArray[np.int32]:
        """[2n] `start, end, start, end, …`, the form in which rows store them."""
        return np.stack([self.starts, self.ends], axis=1).astype(np.int32).reshape(-1)

    @classmethod
    def from_flat(cls, flat: Sequence[int]) -> Spans:
        """What `flat` returned."""
        both = np.asarray(flat, dtype=np.int64).reshape(-1, 2)
        return cls(both[:, 0], both[:, 1])

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
        number = np.arange(len(at)) - np.searchsorted(at, at, "left")
        starts[textless] = at + before[np.searchsorted(places, at, "left")] + number
        ends[textless] = starts[textless] + 1
        return Spans(starts, np.maximum(starts, ends))

    return moved(student, student_textless), moved(teacher, teacher_textless)


def exact_pairs(student: Spans, teacher: Spans) -> tuple[IntArray, IntArray]:
    """Indices of the tokens that have the same, non-empty span on both sides: [P] each, ascending.

    These are the groups of `aligned_groups` with one token on each side. Both models have read
    the same bytes before such a pair and read the same ones with it.
    """
    ours, theirs = (np.flatnonzero(s.ends > s.starts) for s in (student, teacher))
    key, other = ((s.starts[i] << 32) | s.ends[i] for s, i in ((student, ours), (teacher, theirs)))
    if not len(other):
        return ours[:0], theirs[:0]
    at = np.minimum(np.searchsorted(other, key), len(other) - 1)
    equal = other[at] == key
    return ours[equal], theirs[at[equal]]


@dataclass(frozen=True)
class Group:
    """Fewest tokens of both sides that together stand for the same bytes [start, end).

    `student`, `teacher`: the indices of the tokens. Either range may be empty, where only one
    side has a token (a second end token).
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
    """The text cut wherever both sides have a token's boundary.

    Every token of both sides is in exactly one group. A token without bytes (the space that a
    sentencepiece tokenizer writes before a text) goes with the token behind it.
    """
    edges = [np.unique(np.concatenate([s.starts, s.ends])) for s in (student, teacher)]
    covered = [
        np.intersect1d(edges[0], edges[1], assume_unique=True),
        # Where one side alone has a token, its edges cut too.
        *(_edges_of_gaps(a, b) for a, b in ((student, teacher), (teacher, student))),
    ]
    cuts = np.unique(np.concatenate(covered))
    # Tokens from one cut to the next; one without bytes belongs to the cut it stands at.
    first = [np.searchsorted(spans.starts, cuts[:-1], "left") for spans in (student, teacher)]
    bounds = [np.append(f, len(s)).tolist() for f, s in zip(first, (student, teacher), strict=True)]
    groups = []
    for k, (low, high) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
        ours, theirs = (range(b[k], b[k + 1]) for b in bounds)
        if ours or theirs:
            groups.append(Group(low, high, ours, theirs))
    return groups


def _edges_of_gaps(spans: Spans, other: Spans) -> IntArray:
    """Edges of the tokens of `spans` that no token of `other` overlaps."""
    wide = spans.ends > spans.starts
    starts, ends = spans.starts[wide], spans.ends[wide]
    begun = np.searchsorted(other.starts, ends, "left")
    done = np.searchsorted(other.ends, starts, "right")
    alone = begun <= done
    return np.concatenate([starts[alone], ends[alone]])
