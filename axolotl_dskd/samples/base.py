"""What a source of samples is."""

from __future__ import annotations

from typing import Any, Protocol


class Samples(Protocol):
    """Gives the micro-batches of an optimizer step."""

    def __call__(self, batches: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """The micro-batches to train on.

        Args:
            batches: those that the data loader gave, collated.
            step: optimizer steps made so far.
        """
        ...
