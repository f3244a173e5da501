"""Sums over the supervised tokens of held-out rows, and what is said of many rows.

Knows numbers only, so that what reads them imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """Sums over the supervised tokens of one row: nats, bytes of text, tokens, first choices that
    are right."""

    nats: float
    text_bytes: int
    tokens: int
    right: float

    def as_list(self) -> list[float]:
        """In the order of the fields."""
        return list(astuple(self))


def means(rows: Mapping[str, Row]) -> dict[str, float]:
    """Bits per byte and the share of right first choices over rows; nothing without rows."""
    nats, text_bytes, tokens, right = totals(rows.values())
    if not text_bytes:
        return {}
    return {
        "dskd/bits_per_byte": bits_per_byte(nats, text_bytes),
        "dskd/accuracy": right / tokens,
    }


def totals(rows: Iterable[Row]) -> tuple[float, int, int, float]:
    """The sums of all fields."""
    columns: Any = list(zip(*(astuple(row) for row in rows), strict=True)) or [(0,)] * 4
    nats, text_bytes, tokens, right = columns
    return math.fsum(nats), sum(text_bytes), sum(tokens), math.fsum(right)


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Nats of some tokens and bytes of their text, as bits per byte."""
    return nats / math.log(2) / text_bytes
