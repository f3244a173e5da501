"""How two tokenizers divide the same text: groups of tokens with the same byte boundaries.

Knows rows and bytes of tokens; nothing of models or datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from axolotl_dskd.data.shared_text import Run, joined, supervised_runs


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens of both sides that begin and end at the same bytes.

    Attributes:
        student, teacher: positions in the two rows.
    """

    student: list[int]
    teacher: list[int]

    @property
    def exact(self) -> bool:
        """One token on each side: an exact pair."""
        return len(self.student) == len(self.teacher) == 1


def _groups_of(ours: Run, theirs: Run) -> list[Group]:
    """Groups of two runs; tokens that stand for no bytes (end tokens) close a group."""
    for a in ours.variants():
        for b in theirs.variants():
            if a.text == b.text:
                return _split(a, b)
    return [Group(ours.positions, theirs.positions)]


def _split(a: Run, b: Run) -> list[Group]:
    groups: list[Group] = []
    i = j = 0
    while i < len(a.ends) or j < len(b.ends):
        first_i, first_j = i, j
        i, j = min(i + 1, len(a.ends)), min(j + 1, len(b.ends))
        while i < len(a.ends) or j < len(b.ends):
            end_a, end_b = a.ends[i - 1] if i else 0, b.ends[j - 1] if j else 0
            if end_a == end_b:
                break
            if (end_a < end_b and i < len(a.ends)) or j == len(b.ends):
                i += 1
            else:
                j += 1
        groups.append(Group(a.positions[first_i:i], b.positions[first_j:j]))
    return groups


def token_groups(
    row: dict[str, list[int]], student: Sequence[bytes], teacher: Sequence[bytes]
) -> list[Group]:
    """Groups of a row's supervised tokens; a run whose texts differ is one group.

    Args:
        row: two-sided, as preparation leaves it.
        student, teacher: bytes of each id (`token_bytes`).
    """
    ours = supervised_runs(row["input_ids"], row["labels"], list(student))
    theirs = supervised_runs(row["teacher_input_ids"], row["teacher_labels"], list(teacher))
    if len(ours) != len(theirs):
        ours, theirs = [joined(ours)], [joined(theirs)]
    return [group for a, b in zip(ours, theirs, strict=True) for group in _groups_of(a, b)]
