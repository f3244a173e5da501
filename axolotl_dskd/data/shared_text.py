"""Which tokens of two sides spell one and the same text.

Knows token positions and bytes; nothing of rows, models or datasets.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from axolotl_dskd.types import IGNORE_INDEX

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


@dataclass(frozen=True)
class Run:
    """Supervised tokens in a row without a gap: their positions and where each ends in `text`.

    `dummy_spaces`: the tokenizer writes a space before any piece of text (`writes_dummy_space`).
    """

    positions: list[int]
    ends: list[int]
    text: bytes
    dummy_spaces: bool = False

    def variants(self) -> list[Run]:
        """The run, and if its text starts with a space the run without that space.

        A sentencepiece tokenizer writes a space before a text that has none, so one leading space
        on one side alone is no difference.
        """
        if not self.text.startswith(b" "):
            return [self]
        shorter = [max(end - 1, 0) for end in self.ends]
        return [self, Run(self.positions, shorter, self.text[1:], self.dummy_spaces)]

    def within(self, offset: int, low: int, high: int) -> list[int]:
        """Positions of the tokens inside [low, high], both counted from `offset` in the text.

        A token that stands for no text (an end token) is kept where its place is inside; at the
        very end only if the run's text ends there too.
        """
        ends_there = offset + high == len(self.text)
        kept, start = [], -offset
        for position, end in zip(self.positions, (e - offset for e in self.ends), strict=True):
            textless_at_cut = start == end == high and not ends_there
            if start >= low and end <= high and not textless_at_cut:
                kept.append(position)
            start = end
        return kept


def supervised_runs(
    ids: list[int], labels: list[int], table: list[bytes], dummy_spaces: bool = False
) -> list[Run]:
    """Runs of supervised tokens; the first token of a row is predicted by nothing."""
    runs: list[Run] = []
    positions: list[int] = []
    for i in range(1, len(labels) + 1):
        if i < len(labels) and labels[i] != IGNORE_INDEX:
            positions.append(i)
        elif positions:
            pieces = [table[ids[p]] for p in positions]
            ends, total = [], 0
            for piece in pieces:
                total += len(piece)
                ends.append(total)
            runs.append(Run(positions, ends, b"".join(pieces), dummy_spaces))
            positions = []
    return runs


def joined(runs: list[Run]) -> Run:
    """Several runs as one."""
    positions, ends, text = [], [], b""
    for run in runs:
        positions += run.positions
        ends += [len(text) + end for end in run.ends]
        text += run.text
    return Run(positions, ends, text, any(run.dummy_spaces for run in runs))


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


def _without_spaces_of_one_side(
    a: Run, b: Run, at_a: int = 0, at_b: int = 0
) -> tuple[Run, Run] | None:
    """Both runs without the spaces that only one of them has before a token, as far as both go.

    Compared from `at_a` and `at_b` on.

    Where pieces of a text are tokenized apart (alpaca's prompt and answer, the segments of
    input_output, turns), a sentencepiece tokenizer writes a space before each. None if the texts
    differ otherwise.
    """
    runs, at = (a, b), [at_a, at_b]
    begins = [{0, *run.ends} for run in runs]
    dropped: tuple[list[int], list[int]] = ([], [])

    def droppable(which: int) -> bool:
        if not runs[which].dummy_spaces:
            return False
        text, i = runs[which].text, at[which]
        while text[i : i + 1] == b" ":
            if i in begins[which]:
                return True
            i -= 1
            if i < 0:
                break
        return False

    while at[0] < len(a.text) and at[1] < len(b.text):
        if a.text[at[0]] != b.text[at[1]]:
            which = 0 if droppable(0) else 1
            if not droppable(which):
                return None
            dropped[which].append(at[which])
            at[which] += 1
        else:
            at = [at[0] + 1, at[1] + 1]

    def without(run: Run, places: list[int]) -> Run:
        text = bytearray(run.text)
        for place in reversed(places):
            del text[place]
        ends = [end - bisect_left(places, end) for end in run.ends]
        return Run(run.positions, ends, bytes(text), run.dummy_spaces)

    return without(a, dropped[0]), without(b, dropped[1])


def common_positions(a: Run, b: Run) -> tuple[list[int], list[int]] | None:
    """Positions on both sides that spell one and the same text, or None if the texts differ."""
    variants = [(x, y) for x in a.variants() for y in b.variants()]
    if any(x.text == y.text for x, y in variants):
        return a.positions, b.positions
    if spaceless := _without_spaces_of_one_side(a, b):
        variants.append(spaceless)
        if spaceless[0].text == spaceless[1].text:
            return a.positions, b.positions
    # Truncation leaves a prefix. Looked for first: a text that repeats itself also fits elsewhere.
    for x, y in variants:
        if x.text and y.text and (x.text.startswith(y.text) or y.text.startswith(x.text)):
            return _between_shared_edges(x, 0, y, 0)
    for x, y in variants:
        at_x, at_y = _offset(x.text, y.text), _offset(y.text, x.text)
        if at_x is not None:
            return _between_shared_edges(x, at_x, y, 0)
        if at_y is not None:
            return _between_shared_edges(x, 0, y, at_y)
    # One side lacks its first token, which nothing predicts, and has other spaces.
    for at_a, at_b in _late_starts(a, b):
        if spaceless := _without_spaces_of_one_side(a, b, at_a, at_b):
            return _between_shared_edges(spaceless[0], at_a, spaceless[1], at_b)
    return None


def _late_starts(a: Run, b: Run) -> Iterator[tuple[int, int]]:
    """Places near the front of one text where the other one's first word stands."""
    for first, other, order in ((a, b, 1), (b, a, -1)):
        word = first.text.lstrip(b" ").split(b" ")[0]
        start = first.text.find(word)
        for at in range(1, min(_LONGEST_TOKEN, len(other.text) // 2 + 1) if word else 0):
            if other.text.startswith(word, at):
                yield (start, at) if order == 1 else (at, start)


def _between_shared_edges(x: Run, at_x: int, y: Run, at_y: int) -> tuple[list[int], list[int]]:
    """Positions between the first and the last place where both sides have a token's edge."""
    length = min(len(x.text) - at_x, len(y.text) - at_y)
    bounds = {e - at_x for e in [0, *x.ends]} & {e - at_y for e in [0, *y.ends]}
    shared = sorted(e for e in bounds if 0 <= e <= length)
    if len(shared) < 2:
        return [], []
    low, high = shared[0], shared[-1]
    return x.within(at_x, low, high), y.within(at_y, low, high)
