"""What `inspect` found, as plain data: the terminal, the page and `--json` all show this.

Knows nothing of how it is found or shown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from axolotl_dskd.commands.inspect.rows import Coverage, Example
from axolotl_dskd.commands.inspect.sides import SideFacts
from axolotl_dskd.commands.inspect.words import gib


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
        steps: changes, each on top of those before it, until it fits.
    """

    card: int
    card_name: str
    total: int
    peak_phase: str
    at_peak: dict[str, int]
    phases: dict[str, int]
    batch: str
    notes: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the fullest moment is smaller than the card."""
        return self.total <= self.card

    @property
    def verdict(self) -> str:
        """Fits or not, in a sentence."""
        total, card = gib(self.total), gib(self.card)
        if self.fits:
            return f"Fits: {total} of {card}, {gib(self.card - self.total)} to spare."
        return f"Does not fit: {total}, the card has {card}."

    @property
    def leads_to(self) -> str:
        """What the steps lead to, where it does not fit."""
        if not self.steps:
            return "No setting of this configuration saves enough: take smaller models."
        if self.steps[-1].total <= self.card:
            return "With these changes, each on top of those before it, it fits:"
        return "These changes save most, but it does not fit with all of them; take smaller models:"


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
    def shared(self) -> str:
        """How much of the two vocabularies is the same."""
        shares = (
            f"{self.shared_tokens / side.vocabulary:.0%} of the {name}'s"
            for side, name in ((self.student, "student"), (self.teacher, "teacher"))
        )
        both = f"{self.shared_tokens:,} tokens stand for the same bytes in both vocabularies"
        return f"{both}: {' and '.join(shares)}."

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
