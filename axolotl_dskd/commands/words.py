"""Numbers and texts of users' data, as people read them. Knows nothing of reports."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

_SIGNS = {
    **{"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"},
    **{"\u00a0": "⍽", "\u200d": "ZWJ", "\ufe0f": "VS16"},
}


def signs(text: str) -> Iterator[tuple[str, bool]]:
    """Character by character, what is shown and whether it is a sign that stands for the character.

    What has no ink gets one: spaces, breaks, tabs, joiners, controls.
    """
    for place, char in enumerate(text):
        kind = unicodedata.category(char)[0]
        if char in _SIGNS:
            yield _SIGNS[char], True
        elif kind in "CZ":
            yield f"U+{ord(char):04X}", True
        elif kind == "M" and place == 0:
            yield "◌" + char, False  # a mark without its letter
        else:
            yield char, False


def visible(text: str) -> str:
    """The text with its signs, in one line."""
    return "".join(shown for shown, _ in signs(text))


def gib(count: int) -> str:
    """Bytes for people."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    mib = count / (1 << 20)
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def count(number: int) -> str:
    """Parameters for people."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
