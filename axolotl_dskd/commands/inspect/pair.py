"""How two tokenizers divide the same text: groups of tokens with the same byte boundaries.

Knows prepared rows; nothing of models or datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_dskd.data.byte_spans import Spans, aligned_groups
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.types import IGNORE_INDEX


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


def token_groups(row: dict[str, Any]) -> list[Group]:
    """Groups of a prepared row's supervised tokens, in order."""
    ours, theirs = _supervised(row["labels"]), _supervised(row["teacher_labels"])
    spans = Spans.from_bytes(row[SPANS]), Spans.from_bytes(row[TEACHER_SPANS])
    assert (len(ours), len(theirs)) == tuple(map(len, spans))
    return [
        Group([ours[i] for i in group.student], [theirs[j] for j in group.teacher])
        for group in aligned_groups(*spans)
    ]


def _supervised(labels: Sequence[int]) -> list[int]:
    # Nothing predicts the first token of a row.
    return [i for i, y in enumerate(labels) if i and y != IGNORE_INDEX]
