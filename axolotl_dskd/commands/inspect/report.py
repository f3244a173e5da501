"""What `inspect` found, as plain data: the terminal, the page and `--json` all show this.

Knows how the parts are joined; nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from axolotl_dskd.commands.inspect.pair import Group, token_groups
from axolotl_dskd.commands.inspect.sample import DatasetSample

#: Example rows of a report, and the groups that are shown of each.
EXAMPLES, EXAMPLE_GROUPS = 6, 80


@dataclass
class SideFacts:
    """One model: its tokenizer, its output head, its size.

    Attributes:
        vocabulary: ids that its tokenizer can emit; `head_rows` that its output head has.
        parameters: of the whole model, adapters left out; `trained`: those that train.
        tokens_per_byte: supervised tokens per byte of supervised text, over the sample.
        begins_with_bos: whether a row's first token is the beginning-of-sequence token.
        turn_end: the last supervised token of a row, where all rows agree on it.
        prompt: the tokens of one row in front of its supervised ones, as text.
    """

    name: str
    architecture: str
    tokenizer: str
    vocabulary: int
    head_rows: int
    hidden_size: int
    parameters: int
    trained: int
    tied: bool
    softcap: float | None
    scale: float
    bias: bool
    bos: str | None
    eos: str | None
    begins_with_bos: bool = False
    turn_end: str | None = None
    tokens_per_byte: float = 0.0
    prompt: str = ""

    @property
    def padding_rows(self) -> int:
        """Rows of the head that no token has."""
        return max(0, self.head_rows - self.vocabulary)


@dataclass
class Coverage:
    """How the two sides meet in one dataset (or in all of them).

    Attributes:
        total, sampled, kept: rows; `outcomes`: outcome -> rows, all outcomes of the sample.
        student_tokens, teacher_tokens: supervised ones; `exact` of them are 1:1 pairs.
        text_bytes: of supervised text, as the student spells it.
    """

    name: str
    total: int = 0
    sampled: int = 0
    kept: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    student_tokens: int = 0
    teacher_tokens: int = 0
    exact: int = 0
    text_bytes: int = 0
    teacher_bytes: int = 0

    @property
    def share(self) -> float:
        """Of the student's supervised tokens, those with an exact partner."""
        return self.exact / self.student_tokens if self.student_tokens else 0.0

    def add(self, other: Coverage) -> None:
        """Count another dataset in."""
        for key, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, key, getattr(self, key) + value)
        for outcome, rows in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + rows


@dataclass
class ExampleGroup:
    """Tokens of both sides that begin and end at the same bytes, as shown to people.

    A token is its text, or `‹name›` where it stands for no text, or `‹E2 82›` for loose bytes.
    `text` is what they spell together.
    """

    text: str
    student: list[str]
    teacher: list[str]
    exact: bool


@dataclass
class Example:
    """One row's supervised text, divided by both tokenizers."""

    dataset: str
    groups: list[ExampleGroup]
    shown_of: int

    @property
    def exact(self) -> int:
        """Exact pairs among the groups."""
        return sum(group.exact for group in self.groups)


@dataclass
class Step:
    """One change of the configuration on the way to less memory: what it is, and what is left."""

    change: str
    total: int
    saves: int
    cost: str


@dataclass
class MemoryReport:
    """The plan against the card.

    Attributes:
        card: bytes, and `card_name`, what it is.
        at_peak: part -> bytes at the fullest moment, which is in `peak_phase`.
        phases: phase -> bytes in all at that phase's fullest moment.
        batch: what the largest batch is, in words.
        teacher_weights: how it may be loaded -> bytes of all of its weights.
        steps: changes, each on top of those before it, until it fits.
    """

    card: int
    card_name: str
    total: int
    peak_phase: str
    at_peak: dict[str, int]
    phases: dict[str, int]
    batch: str
    teacher_weights: dict[str, int]
    notes: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the fullest moment is smaller than the card."""
        return self.total <= self.card


@dataclass
class Report:
    """Everything that `inspect` says."""

    config: str
    student: SideFacts
    teacher: SideFacts
    shared_tokens: int
    alignment: str
    alignment_why: str
    recommended: str
    recommended_why: str
    coverage: Coverage
    datasets: list[Coverage]
    examples: list[Example]
    memory: MemoryReport
    remarks: list[str] = field(default_factory=list)
    probe: str | None = None

    @property
    def parts(self) -> list[Coverage]:
        """Dataset by dataset, and all of them where there are several."""
        return [*self.datasets, self.coverage] if len(self.datasets) > 1 else self.datasets

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, with the derived numbers."""
        out = asdict(self)
        out["memory"]["fits"] = self.memory.fits
        out["coverage"]["share"] = self.coverage.share
        for coverage, entry in zip(self.datasets, out["datasets"], strict=True):
            entry["share"] = coverage.share
        return out


def cover(
    sample: DatasetSample, student_bytes: Sequence[bytes], teacher_bytes: Sequence[bytes]
) -> tuple[Coverage, list[list[Group]]]:
    """A dataset's coverage, and the token groups of each of its kept rows."""
    found = Coverage(sample.name, sample.total, sample.sampled, sample.kept, dict(sample.outcomes))
    groups_of_rows = []
    for row in sample.rows:
        groups = token_groups(row)
        groups_of_rows.append(groups)
        for group in groups:
            found.student_tokens += len(group.student)
            found.teacher_tokens += len(group.teacher)
            found.exact += group.exact
            found.text_bytes += sum(len(student_bytes[row["input_ids"][i]]) for i in group.student)
            found.teacher_bytes += sum(
                len(teacher_bytes[row["teacher_input_ids"][i]]) for i in group.teacher
            )
    return found, groups_of_rows


def _shown(
    ids: Sequence[int], positions: Sequence[int], table: Sequence[bytes], tokenizer: Any
) -> list[str]:
    return [
        _spelled(table[ids[i]]) if table[ids[i]] else f"‹{tokenizer.convert_ids_to_tokens(ids[i])}›"
        for i in positions
    ]


def _spelled(data: bytes) -> str:
    """Text, or the bytes in hexadecimal where they are a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"‹{data.hex(' ').upper()}›"


def _text(
    row: dict[str, list[int]], group: Group, tables: tuple[Sequence[bytes], Sequence[bytes]]
) -> str:
    """What a group spells. One side may have a space more, which its tokenizer wrote itself."""
    spelled = [
        b"".join(table[row[ids][i]] for i in positions)
        for table, ids, positions in (
            (tables[0], "input_ids", group.student),
            (tables[1], "teacher_input_ids", group.teacher),
        )
    ]
    return _spelled(min(spelled, key=lambda s: (not s, len(s))))


def pick_examples(
    samples: Sequence[DatasetSample],
    groups: Sequence[Sequence[list[Group]]],
    tables: tuple[Sequence[bytes], Sequence[bytes]],
    tokenizers: tuple[Any, Any],
) -> list[Example]:
    """A few rows: of every dataset in turn, first those that the tokenizers divide least alike,
    so that what is special (code, other scripts) is seen."""
    ranked = []
    for sample, rows in zip(samples, groups, strict=True):
        pairs = [(row, g) for row, g in zip(sample.rows, rows, strict=True) if g]
        pairs.sort(key=lambda pair: sum(g.exact for g in pair[1]) / len(pair[1]))
        # The least alike, a middle one, the most alike, and so on.
        order = [0, len(pairs) // 2, len(pairs) - 1, len(pairs) // 4, 3 * len(pairs) // 4]
        ranked.append([(sample.name, *pairs[i]) for i in dict.fromkeys(order) if i < len(pairs)])
    chosen: list[tuple[str, dict[str, list[int]], list[Group]]] = []
    for place in range(5):
        chosen += [rows[place] for rows in ranked if place < len(rows)]
    return [
        Example(
            name,
            [
                ExampleGroup(
                    _text(row, g, tables),
                    _shown(row["input_ids"], g.student, tables[0], tokenizers[0]),
                    _shown(row["teacher_input_ids"], g.teacher, tables[1], tokenizers[1]),
                    g.exact,
                )
                for g in row_groups[:EXAMPLE_GROUPS]
            ],
            len(row_groups),
        )
        for name, row, row_groups in chosen[:EXAMPLES]
    ]
