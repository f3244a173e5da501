"""Runs of supervised tokens, and the parts of them that both sides of a row share.

Knows token positions and bytes of one side; nothing of the other side, of rows or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from axolotl_dskd.data.byte_spans import IntArray, Spans
from axolotl_dskd.types import IGNORE_INDEX


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
    ids: Sequence[int], labels: Sequence[int], table: list[bytes], dummy_spaces: bool = False
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


def lay_out(parts: list[Part], runs: list[Run], apart: IntArray) -> Part:
    """All tokens of one side of a row that the other side shares, with spans in the row's text.

    The texts of the runs stand one behind the other with a gap of two bytes between, so that spans
    of different runs never touch. They are as long on the other side, so that both sides' spans
    are places in one text.

    Args:
        parts: of each matched run what is shared.
        runs: the matched runs.
        apart: positions of kept tokens that belong to no matched run and stand for no text; they
            take their place in the gap before the next run.
    """
    bases = (1 + np.cumsum([0, *(part.length + 2 for part in parts)])).tolist()
    inside = [part.spans.shifted(base) for part, base in zip(parts, bases, strict=False)]
    positions, spans = np.concatenate([part.positions for part in parts]), Spans.joined(inside)
    next_run = np.searchsorted([int(run.positions[0]) for run in runs], apart)
    gaps = np.array(bases, np.int64)[next_run] - 1
    places = np.minimum(gaps, _next_start(apart, positions, spans))
    order = np.argsort(np.concatenate([positions, apart]), kind="stable")
    everything = Spans.joined([spans, Spans(places, places)])
    return Part(
        np.concatenate([positions, apart])[order],
        Spans(everything.starts[order], everything.ends[order]),
        bases[-1],
    )


def _next_start(apart: IntArray, positions: IntArray, spans: Spans) -> IntArray:
    """Where the next token with a span begins, for each token apart; endless behind the last one.

    Matters where turns were joined to one run, so that tokens apart lie inside of it:

        position    3    4    5      6    7      8
        span      1-4  4-6    apart  6-9  9-11   apart
        place                 6                  endless

    Args:
        apart: [k] positions without a span.
        positions, spans: [n] of the tokens that have one.
    """
    starts = np.append(spans.starts, np.iinfo(np.int64).max)
    return starts[np.searchsorted(positions, apart)]
