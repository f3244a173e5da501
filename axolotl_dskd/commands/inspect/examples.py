"""Examples of how two tokenizers divide the user's rows, to look at.

Knows rows and what tokens spell; nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from axolotl_dskd.commands.sample import Sample
from axolotl_dskd.data.byte_spans import Spans, aligned_groups
from axolotl_dskd.data.reconcile import SPANS, TEACHER_SPANS
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.types import IGNORE_INDEX

#: Example rows of a report, and the groups that are shown of each.
EXAMPLES, EXAMPLE_GROUPS = 6, 80
#: Where among the rows of a data set, from those that are divided least alike (0) to the most (1).
_SHARES = 0.5, 0.0, 1.0, 0.25, 0.75


@dataclass(frozen=True)
class Example:
    """One row's supervised text, divided by both tokenizers.

    A token is its text, with `\\xe2` for bytes of a divided character, or, without text, `‹name›`.

    Attributes:
        dataset: its name.
        groups: the first of `shown_of` groups of student's and teacher's tokens.
    """

    dataset: str
    groups: list[tuple[list[str], list[str]]]
    shown_of: int


def divided(row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The supervised tokens of a prepared row in groups: ids of student and teacher that begin and
    end at the same bytes."""
    ours, theirs = (
        # Nothing predicts the first token of a row.
        [label for label in row[column][1:] if label != IGNORE_INDEX]
        for column in ("labels", "teacher_labels")
    )
    groups = aligned_groups(Spans.from_bytes(row[SPANS]), Spans.from_bytes(row[TEACHER_SPANS]))
    return [([ours[i] for i in g.student], [theirs[i] for i in g.teacher]) for g in groups]


def is_exact(group: tuple[list[Any], list[Any]]) -> bool:
    """Whether a group has one token on each side."""
    return len(group[0]) == len(group[1]) == 1


def pick_examples(datasets: Sequence[Sample], student: Any, teacher: Any) -> list[Example]:
    """A few rows of every dataset in turn: a middling one, then those that the tokenizers divide
    least and most alike, so that what is special (code, other scripts) is seen.

    Args:
        student, teacher: the tokenizers.
    """
    ours, theirs = _texts(student), _texts(teacher)
    found = []
    for sample in datasets:
        rows = [divided(row) for row in sample.rows]
        # Short rows show little.
        some = [groups for groups in rows if len(groups) >= 12] or rows
        some.sort(key=lambda groups: sum(map(is_exact, groups)) / len(groups))
        examples = []
        for place in dict.fromkeys(round(share * (len(some) - 1)) for share in _SHARES if some):
            groups = [
                ([ours[i] for i in student_ids], [theirs[i] for i in teacher_ids])
                for student_ids, teacher_ids in some[place][:EXAMPLE_GROUPS]
            ]
            examples.append(Example(sample.name, groups, len(some[place])))
        found.append(examples)
    return list(filter(None, chain.from_iterable(zip_longest(*found))))[:EXAMPLES]


def _texts(tokenizer: Any) -> list[str]:
    """Each token of a vocabulary, see `Example`."""
    table, name = token_bytes(tokenizer), tokenizer.convert_ids_to_tokens
    texts = (data.decode(errors="backslashreplace") for data in table)
    return [text or f"‹{name(i)}›" for i, text in enumerate(texts)]
