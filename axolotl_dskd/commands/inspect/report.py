"""What `inspect` found, as plain data: `document` puts it into words, and `--json` is this.

Knows nothing of how it is found or shown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from axolotl_dskd.commands.inspect.rows import Coverage, Example
from axolotl_dskd.commands.inspect.sides import SideFacts


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


@dataclass(frozen=True)
class Report:
    """Everything that `inspect` found."""

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

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, with the derived numbers."""
        return asdict(self) | {
            "memory": asdict(self.memory) | {"fits": self.memory.fits},
            "coverage": self.coverage.as_dict(),
            "datasets": [part.as_dict() for part in self.datasets],
        }
