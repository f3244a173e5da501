"""Which tokens of two sides spell one and the same text.

Knows token positions and bytes; nothing of rows, models or datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from axolotl_dskd.data.runs import Part, Run

#: A late start is looked for this many bytes into a text.
_LONGEST_TOKEN = 64


def writes_dummy_space(tokenizer: Any, table: list[bytes]) -> bool:
    """Whether the tokenizer puts a space before a text that has none (sentencepiece's default).

    Args:
        tokenizer: a transformers tokenizer.
        table: its `token_bytes`.
    """
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return b"".join(table[i] for i in ids).startswith(b" ")


def _offset(text: bytes, other: bytes) -> int | None:
    """Where `other` begins inside `text` such that they agree as far as both go, or None.

    At least half of the longer one must be shared.
    """
    at = text.find(other[:64]) if other else -1
    while at >= 0:
        shared = min(len(text) - at, len(other))
        # A short text stands in many longer ones by accident.
        if 2 * shared >= max(len(text), len(other)) and text[at : at + shared] == other[:shared]:
            return at
        at = text.find(other[:64], at + 1)
    return None


class _Reading:
    """A run read byte by byte, and the places of the spaces that were left out."""

    def __init__(self, run: Run, at: int) -> None:
        self.run = run
        self.at = at
        self.left_out: list[int] = []
        self._token_starts = {0, *run.ends.tolist()}

    @property
    def ended(self) -> bool:
        return self.at >= len(self.run.text)

    @property
    def byte(self) -> int:
        return self.run.text[self.at]

    def at_added_space(self) -> bool:
        """Whether the byte is a space, behind nothing but spaces in a token that the tokenizer may
        have begun with one of its own."""
        if not self.run.dummy_spaces:
            return False
        place = self.at
        while place >= 0 and self.run.text[place : place + 1] == b" ":
            if place in self._token_starts:
                return True
            place -= 1
        return False

    def leave_out(self) -> None:
        self.left_out.append(self.at)
        self.at += 1

    def remaining(self) -> Run:
        """The run without what was left out."""
        text = bytearray(self.run.text)
        for place in reversed(self.left_out):
            del text[place]
        before = np.searchsorted(np.asarray(self.left_out, np.int64), self.run.ends, "left")
        return replace(self.run, ends=self.run.ends - before, text=bytes(text))


def _without_spaces_of_one_side(
    a: Run, b: Run, at_a: int = 0, at_b: int = 0
) -> tuple[Run, Run] | None:
    """Both runs without the spaces that only one of them has before a token, as far as both go.

    Compared from `at_a` and `at_b` on.

    Where pieces of a text are tokenized apart (alpaca's prompt and answer, the segments of
    input_output, turns), a sentencepiece tokenizer writes a space before each. None if the texts
    differ otherwise.
    """
    ours, theirs = _Reading(a, at_a), _Reading(b, at_b)
    while not ours.ended and not theirs.ended:
        if ours.byte == theirs.byte:
            ours.at, theirs.at = ours.at + 1, theirs.at + 1
        elif ours.at_added_space():
            ours.leave_out()
        elif theirs.at_added_space():
            theirs.leave_out()
        else:
            return None
    return ours.remaining(), theirs.remaining()


@dataclass(frozen=True)
class _TwoRuns:
    """Runs of two sides that should spell the same, and how their texts may be read."""

    a: Run
    b: Run

    @cached_property
    def variants(self) -> list[tuple[Run, Run]]:
        """Each with and without one leading space."""
        return [(x, y) for x in self.a.variants() for y in self.b.variants()]

    @cached_property
    def spaceless(self) -> list[tuple[Run, Run]]:
        """Without the spaces of one side alone; empty where the texts differ otherwise."""
        both = _without_spaces_of_one_side(self.a, self.b)
        return [] if both is None else [both]


def common_text(a: Run, b: Run) -> tuple[Part, Part] | None:
    """The tokens on both sides that spell one and the same text, or None if the texts differ."""
    runs = _TwoRuns(a, b)
    # A prefix, which truncation leaves, is looked for before other places: a text that repeats
    # itself also fits elsewhere.
    for match in (_equal, _equal_without_spaces, _prefix, _inside, _late_start):
        parts = match(runs)
        if parts is not None:
            return parts
    return None


def _equal(runs: _TwoRuns) -> tuple[Part, Part] | None:
    """Both texts whole."""
    return _whole(runs.variants)


def _equal_without_spaces(runs: _TwoRuns) -> tuple[Part, Part] | None:
    """Both texts whole, but for spaces that one tokenizer adds."""
    return _whole(runs.spaceless)


def _whole(readings: list[tuple[Run, Run]]) -> tuple[Part, Part] | None:
    for x, y in readings:
        if x.text == y.text:
            return x.whole(), y.whole()
    return None


def _prefix(runs: _TwoRuns) -> tuple[Part, Part] | None:
    """One text begins with the other: that one was cut."""
    for x, y in runs.variants + runs.spaceless:
        if x.text and y.text and (x.text.startswith(y.text) or y.text.startswith(x.text)):
            return _between_shared_edges(x, 0, y, 0)
    return None


def _inside(runs: _TwoRuns) -> tuple[Part, Part] | None:
    """One text begins later in the other one, and they agree from there on."""
    for x, y in runs.variants + runs.spaceless:
        at_x, at_y = _offset(x.text, y.text), _offset(y.text, x.text)
        if at_x is not None:
            return _between_shared_edges(x, at_x, y, 0)
        if at_y is not None:
            return _between_shared_edges(x, 0, y, at_y)
    return None


def _late_start(runs: _TwoRuns) -> tuple[Part, Part] | None:
    """One side lacks its first token, which nothing predicts, and has other spaces."""
    for at_a, at_b in _late_starts(runs.a, runs.b):
        spaceless = _without_spaces_of_one_side(runs.a, runs.b, at_a, at_b)
        if spaceless is not None:
            return _between_shared_edges(spaceless[0], at_a, spaceless[1], at_b)
    return None


def _late_starts(a: Run, b: Run) -> Iterator[tuple[int, int]]:
    """Places near the front of one text where the other one's first word stands."""
    yield from _places_of_first_word(a, b)
    for at_b, at_a in _places_of_first_word(b, a):
        yield at_a, at_b


def _places_of_first_word(run: Run, other: Run) -> Iterator[tuple[int, int]]:
    """Where the first word of a run stands in it, and in the other one behind its front."""
    word = run.text.lstrip(b" ").split(b" ")[0]
    if not word:
        return
    for place in range(1, min(_LONGEST_TOKEN, len(other.text) // 2 + 1)):
        if other.text.startswith(word, place):
            yield run.text.find(word), place


def _between_shared_edges(x: Run, at_x: int, y: Run, at_y: int) -> tuple[Part, Part]:
    """The tokens between the first and the last place where both sides have a token's edge."""
    length = min(len(x.text) - at_x, len(y.text) - at_y)
    edges = [np.concatenate([[0], run.ends]) - at for run, at in ((x, at_x), (y, at_y))]
    shared = np.intersect1d(edges[0], edges[1])
    shared = shared[(shared >= 0) & (shared <= length)]
    if len(shared) < 2:
        return x.within(at_x, 0, -1), y.within(at_y, 0, -1)
    low, high = int(shared[0]), int(shared[-1])
    return x.within(at_x, low, high), y.within(at_y, low, high)
