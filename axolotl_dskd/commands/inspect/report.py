"""What `inspect` found, as plain data: the terminal, the page and `--json` all show this.

Knows nothing of how it is found or shown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from axolotl_dskd.commands.inspect.rows import Coverage, Example


@dataclass(frozen=True)
class SideFacts:
    """One model: its tokenizer, its output head, its size.

    Attributes:
        vocabulary: ids that its tokenizer can emit; `head_rows` that its output head has.
        parameters: of the whole model, adapters left out; `trained`: those that train.
        begins_with_bos: whether a row's first token is the beginning-of-sequence token.
        turn_end: the last supervised token of a row, where all rows agree on it.
        tokens_per_byte: supervised tokens per byte of supervised text, over the sample.
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
    begins_with_bos: bool
    turn_end: str | None
    tokens_per_byte: float
    prompt: str

    @property
    def padding_rows(self) -> int:
        """Rows of the head that no token has."""
        return max(0, self.head_rows - self.vocabulary)


@dataclass(frozen=True)
class Step:
    """One change of the configuration on the way to less memory: what it is, and what is left."""

    change: str
    total: int
    saves: int
    cost: str


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Report:
    """Everything that `inspect` says."""

    config: str
    student: SideFacts
    teacher: SideFacts
    shared_tokens: int
    objective: str
    advice: str | None
    coverage: Coverage
    datasets: list[Coverage]
    examples: list[Example]
    memory: MemoryReport
    remarks: list[str]
    probe: str | None

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
