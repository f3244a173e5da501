"""Which tokens of two sides spell one and the same text.

Knows token positions and bytes; nothing of rows, models or datasets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from axolotl_dskd.data.byte_spans import IntArray, Spans
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

    positions: IntArray
    ends: IntArray
    text: bytes
    dummy_spaces: bool = False

    @property
    def spans(self) -> Spans:
        """Spans of the tokens in `text`, which they tile."""
        return Spans(np.concatenate([[0], self.ends])[: len(self.ends)], self.ends)

    def variants(self) -> list[Run]:
        """The run, and if its text starts with a space the run without that space.

        A sentencepiece tokenizer writes a space before a text that has none, so one leading space
        on one side alone is no difference.
        """
        if not self.text.startswith(b" "):
            return [self]
        shorter = np.maximum(self.ends - 1, 0)
        return [self, Run(self.positions, shorter, self.text[1:], self.dummy_spaces)]

    def whole(self) -> Part:
        """All of the run's tokens."""
        return Part(self.positions, self.spans, len(self.text))

    def within(self, offset: int, low: int, high: int) -> Part:
        """The tokens inside [low, high], both counted from `offset` in the text.

        A token that stands for no text (an end token) is kept where its place is inside; at the
        very end only if the run's text ends there too.
        """
        ends_there = offset + high == len(self.text)
        spans = self.spans.shifted(-offset)
        kept = (spans.starts >= low) & (spans.ends <= high)
        if not ends_there:
            kept &= ~((spans.starts == high) & (spans.ends == high))
        spans = Spans(spans.starts[kept] - low, spans.ends[kept] - low)
        return Part(self.positions[kept], spans, high - low)


@dataclass(frozen=True)
class Part:
    """Tokens of one side that stand for a text of `length` bytes which the other side has too.

    Attributes:
        positions: [n] of the tokens in the row.
        spans: of the tokens in that text.
    """

    positions: IntArray
    spans: Spans
    length: int

    def __len__(self) -> int:
        return len(self.positions)


NO_TOKENS = Part(np.zeros(0, np.int64), Spans.joined([]), 0)


def supervised_runs(
    ids: list[int], labels: list[int], table: list[bytes], dummy_spaces: bool = False
) -> list[Run]:
    """Runs of supervised tokens; the first token of a row is predicted by nothing."""
    supervised = np.flatnonzero(np.asarray(labels[1:], dtype=np.int64) != IGNORE_INDEX) + 1
    runs = []
    for positions in np.split(supervised, np.flatnonzero(np.diff(supervised) > 1) + 1):
        if len(positions):
            pieces = [table[i] for i in ids[positions[0] : positions[-1] + 1]]
            ends = np.cumsum([len(piece) for piece in pieces])
            runs.append(Run(positions, ends, b"".join(pieces), dummy_spaces))
    return runs


def joined(runs: list[Run]) -> Run:
    """Several runs as one."""
    before = np.cumsum([0, *(len(run.text) for run in runs)]).tolist()
    return Run(
        np.concatenate([run.positions for run in runs]),
        np.concatenate([run.ends + at for run, at in zip(runs, before, strict=False)]),
        b"".join(run.text for run in runs),
        any(run.dummy_spaces for run in runs),
    )


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
    begins = [{0, *run.ends.tolist()} for run in runs]
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
        ends = run.ends - np.searchsorted(np.asarray(places, np.int64), run.ends, "left")
        return Run(run.positions, ends, bytes(text), run.dummy_spaces)

    return without(a, dropped[0]), without(b, dropped[1])


def common_text(a: Run, b: Run) -> tuple[Part, Part] | None:
    """The tokens on both sides that spell one and the same text, or None if the texts differ."""
    variants = [(x, y) for x in a.variants() for y in b.variants()]
    for x, y in variants:
        if x.text == y.text:
            return x.whole(), y.whole()
    if spaceless := _without_spaces_of_one_side(a, b):
        variants.append(spaceless)
        if spaceless[0].text == spaceless[1].text:
            return spaceless[0].whole(), spaceless[1].whole()
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


def lay_out(
    parts: list[tuple[Part, Part]],
    runs: tuple[list[Run], list[Run]],
    apart: tuple[IntArray, IntArray],
) -> tuple[Part, Part]:
    """All tokens of a row that both sides share, with their spans in the row's shared text.

    The texts of the runs stand one behind the other with a gap between, so that spans of different
    runs never touch.

    Args:
        parts: of each pair of matched runs what they share.
        runs: the matched runs of student and teacher.
        apart: positions of kept tokens of both sides that belong to no matched run and stand for
            no text; they take their place in the gaps.
    """
    bases = (1 + np.cumsum([0, *(part.length + 2 for part, _ in parts)])).tolist()
    sides = []
    for side, (own_runs, alone) in enumerate(zip(runs, apart, strict=True)):
        own = [common[side] for common in parts]
        first = [int(run.positions[0]) for run in own_runs]
        gaps = np.array(bases, np.int64)[np.searchsorted(first, alone)] - 1
        positions = np.concatenate([*(part.positions for part in own), alone])
        spans = Spans.joined(
            [part.spans.shifted(at) for part, at in zip(own, bases, strict=False)]
            + [Spans(gaps, gaps)]
        )
        order = np.argsort(positions, kind="stable")
        # A token apart inside a run (of turns joined to one) stands where the next one starts.
        starts = np.minimum.accumulate(spans.starts[order][::-1])[::-1]
        ends = np.minimum.accumulate(spans.ends[order][::-1])[::-1]
        ends = np.where(np.isin(positions[order], alone), starts, ends)
        sides.append(Part(positions[order], Spans(starts, ends), bases[-1]))
    return sides[0], sides[1]
