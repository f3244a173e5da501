"""How two tokenizers divide prepared rows: how much is aligned, and examples to look at.

Knows rows and what tokens spell; nothing of models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from axolotl_dskd.data.byte_spans import Group, Spans, aligned_groups
from axolotl_dskd.data.outcomes import CUT, KEPT
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.types import IGNORE_INDEX

#: Example rows of a report, and the groups that are shown of each.
EXAMPLES, EXAMPLE_GROUPS = 6, 80


def supervised(labels: Sequence[int]) -> list[int]:
    """The tokens that are trained on: nothing predicts the first one of a row."""
    return [label for label in labels[1:] if label != IGNORE_INDEX]


@dataclass(frozen=True)
class AlignedRow:
    """The supervised tokens of a prepared row.

    Attributes:
        student, teacher: their ids, in order.
        groups: which of them begin and end at the same bytes.
    """

    student: list[int]
    teacher: list[int]
    groups: list[Group]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> AlignedRow:
        """Of a row as preparation leaves it."""
        student, teacher = supervised(row["labels"]), supervised(row["teacher_labels"])
        spans = Spans.from_bytes(row[SPANS]), Spans.from_bytes(row[TEACHER_SPANS])
        assert (len(student), len(teacher)) == tuple(map(len, spans))
        return cls(student, teacher, aligned_groups(*spans))

    @property
    def exact(self) -> int:
        """Groups with one token on each side."""
        return sum(group.exact for group in self.groups)


@dataclass(frozen=True)
class Coverage:
    """How the two sides meet in the sampled rows of one dataset (or of all of them).

    Attributes:
        name: as in the configuration, with the subset's name where there is one.
        total: rows that the dataset has; `sampled` of them were read.
        outcomes: outcome -> rows (of the tokenized ones where a raw row becomes several).
        student_tokens, teacher_tokens: supervised ones; `exact` of them are 1:1 pairs.
    """

    name: str
    total: int = 0
    sampled: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    student_tokens: int = 0
    teacher_tokens: int = 0
    exact: int = 0

    @property
    def kept(self) -> int:
        """Rows that would be trained on."""
        return self.outcomes[KEPT] + self.outcomes[CUT]

    @property
    def share(self) -> float:
        """Of the student's supervised tokens, those with an exact partner."""
        return self.exact / max(1, self.student_tokens)

    def __add__(self, other: Coverage) -> Coverage:
        both = (vars(self)[name] + value for name, value in vars(other).items() if name != "name")
        return Coverage(self.name, *both)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the bytes that each of its ids stands for."""

    tokenizer: Any
    table: Sequence[bytes]

    def spelled(self, ids: Sequence[int]) -> bytes:
        """The text of some tokens."""
        return b"".join(self.table[i] for i in ids)

    def shown(self, ids: Sequence[int]) -> list[str]:
        """Tokens one by one, see `ExampleGroup`."""
        names = self.tokenizer.convert_ids_to_tokens
        return [_text(self.table[i]) if self.table[i] else f"‹{names(i)}›" for i in ids]


def _text(data: bytes) -> str:
    """Text, or the bytes in hexadecimal where they are a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"‹{data.hex(' ').upper()}›"


@dataclass(frozen=True)
class ExampleGroup:
    """Tokens of both sides that begin and end at the same bytes, as shown to people.

    A token is its text, or `‹name›` where it stands for no text, or `‹E2 82›` for loose bytes.
    `text` is what they spell together.
    """

    text: str
    student: list[str]
    teacher: list[str]
    exact: bool


@dataclass(frozen=True)
class Example:
    """One row's supervised text, divided by both tokenizers: the first of `shown_of` groups."""

    dataset: str
    groups: list[ExampleGroup]
    shown_of: int

    @property
    def exact(self) -> int:
        """Exact pairs among the groups."""
        return sum(group.exact for group in self.groups)


def _example(name: str, row: AlignedRow, student: Vocabulary, teacher: Vocabulary) -> Example:
    groups = []
    for group in row.groups[:EXAMPLE_GROUPS]:
        ours = [row.student[i] for i in group.student]
        theirs = [row.teacher[i] for i in group.teacher]
        # One side may have a space more, which its tokenizer wrote itself.
        text = min(student.spelled(ours), teacher.spelled(theirs), key=lambda s: (not s, len(s)))
        groups.append(
            ExampleGroup(_text(text), student.shown(ours), teacher.shown(theirs), group.exact)
        )
    return Example(name, groups, len(row.groups))


def pick_examples(
    datasets: Iterable[tuple[str, Sequence[AlignedRow]]], student: Vocabulary, teacher: Vocabulary
) -> list[Example]:
    """A few rows of every dataset (by name) in turn: a middling one, then those that the tokenizers
    divide least and most alike, so that what is special (code, other scripts) is seen."""
    ranked = []
    for name, rows in datasets:
        # Short rows show little.
        some = [row for row in rows if len(row.groups) >= 12] or [row for row in rows if row.groups]
        alike = sorted(some, key=lambda row: row.exact / len(row.groups))
        last = len(alike) - 1
        order = ((last + 1) // 2, 0, last, (last + 1) // 4, 3 * (last + 1) // 4)
        ranked.append([(name, alike[i]) for i in dict.fromkeys(order) if 0 <= i <= last])
    in_turn = filter(None, chain.from_iterable(zip_longest(*ranked)))
    return [_example(name, row, student, teacher) for name, row in list(in_turn)[:EXAMPLES]]
