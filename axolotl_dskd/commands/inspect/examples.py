"""Examples of how two tokenizers divide the user's rows, to look at.

Knows rows and what tokens spell; nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from axolotl_dskd.commands.inspect.sample import AlignedRow, Sample
from axolotl_dskd.data.token_bytes import token_bytes

#: Example rows of a report, and the groups that are shown of each.
EXAMPLES, EXAMPLE_GROUPS = 6, 80
#: Places among the rows of a data set, from those that are divided least alike (0) to the most.
_PLACES = 0.5, 0.0, 1.0, 0.25, 0.75


@dataclass(frozen=True)
class Example:
    """One row's supervised text, divided by both tokenizers.

    A token is its text, or `‹name›` where it stands for no text, or `‹E2 82›` for loose bytes.

    Attributes:
        dataset: its name.
        groups: the first of `shown_of` groups: student's and teacher's tokens that begin and end
            at the same bytes.
    """

    dataset: str
    groups: list[tuple[list[str], list[str]]]
    shown_of: int


def pick_examples(datasets: Sequence[Sample], student: Any, teacher: Any) -> list[Example]:
    """A few rows of every dataset in turn: a middling one, then those that the tokenizers divide
    least and most alike, so that what is special (code, other scripts) is seen.

    Args:
        student, teacher: the tokenizers.
    """
    ours, theirs = _texts(student), _texts(teacher)

    def example(name: str, row: AlignedRow) -> Example:
        groups = [
            ([ours[row.student[i]] for i in g.student], [theirs[row.teacher[i]] for i in g.teacher])
            for g in row.groups[:EXAMPLE_GROUPS]
        ]
        return Example(name, groups, len(row.groups))

    found = []
    for sample in datasets:
        # Short rows show little.
        some = [row for row in sample.rows if len(row.groups) >= 12] or sample.rows
        alike = sorted(some, key=lambda row: row.exact / len(row.groups))
        places = dict.fromkeys(round(place * (len(alike) - 1)) for place in _PLACES if alike)
        found.append([example(sample.name, alike[i]) for i in places])
    return list(filter(None, chain.from_iterable(zip_longest(*found))))[:EXAMPLES]


def _texts(tokenizer: Any) -> list[str]:
    """Each token of a vocabulary, see `Example`."""
    table, name = token_bytes(tokenizer), tokenizer.convert_ids_to_tokens
    return [_text(data) if data else f"‹{name(i)}›" for i, data in enumerate(table)]


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"‹{data.hex(' ').upper()}›"
