"""Edit distances between byte strings: nearest tokens of a vocabulary, and alignment by warping.

Compiled by numba, which Axolotl brings. Knows byte strings; no tokenizer, batch or loss.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@njit(nogil=True)
def _nearest(
    text, ends, letters, near, candidates, candidate_ends, candidate_letters, order, shared
):
    """See `nearest`.

    Candidates come in the order of their bytes, `shared[k]` of which are those of the one before.
    So rows of the table are kept for what follows (the rows of a walk through their trie), and a
    row that is above the least distance so far ends all candidates that share it.

    Args:
        near: [n] where in the order each string would stand: the walk begins there, since a good
            candidate at once leaves little to do.
        letters, candidate_letters: [n], [m] see `_Joined.letters`.
    """
    found = np.full(len(ends), -1, np.int64)
    longest = 0
    for v in order:
        longest = max(longest, candidate_ends[v] - (candidate_ends[v - 1] if v else 0))
    for u in range(len(ends)):
        a = text[(ends[u - 1] if u else 0) : ends[u]]
        n = len(a)
        if n == 0:
            continue
        table = np.empty((longest + 1, n + 2), np.int64)
        table[0] = np.arange(n + 2)
        best, at = n + longest, len(candidate_ends)
        ready, dead = 0, longest + 1
        for step in range(len(order)):
            k = (near[u] + step) % len(order)
            ready = min(ready, shared[k])
            if shared[k] >= dead:
                continue
            dead = longest + 1
            v = order[k]
            begin = candidate_ends[v - 1] if v else 0
            length = candidate_ends[v] - begin
            # A letter that the other has not costs an edit.
            limit = best if v < at else best - 1
            if (
                abs(length - n) > limit
                or _more_bits(letters[u] & ~candidate_letters[v], limit)
                or _more_bits(candidate_letters[v] & ~letters[u], limit)
            ):
                continue
            for i in range(ready + 1, length + 1):
                if _next_row(table, a, candidates[begin + i - 1], i, best) > best:
                    dead = i
                    break
                ready = i
            else:
                if table[length, n] <= limit:
                    best, at = table[length, n], v
        found[u] = at
    return found


@njit(nogil=True)
def _next_row(table, a, letter, i, limit):
    """Row i of the table of edit distances from the one before; its least cell within `limit` of
    the diagonal, beyond which cells are not read."""
    n = len(a)
    low, high = max(1, i - limit), min(n, i + limit)
    left = least = i if low == 1 else limit + 1
    table[i, low - 1] = left
    for j in range(low, high + 1):
        replaced = table[i - 1, j - 1] + (a[j - 1] != letter)
        left = min(replaced, table[i - 1, j] + 1, left + 1)
        table[i, j] = left
        least = min(least, left)
    if high < n:
        table[i, high + 1] = limit + 1
    return least


@njit(nogil=True)
def _more_bits(mask, limit):
    """Whether more than `limit` bits are set."""
    count = 0
    while mask:
        mask &= mask - np.uint64(1)
        count += 1
        if count > limit:
            return True
    return False


@dataclass(frozen=True)
class _Joined:
    """Byte strings in one array.

    Attributes:
        text: [bytes] uint8. ends: [n] where each string ends in it.
    """

    text: NDArray[np.uint8]
    ends: IntArray

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> _Joined:
        lengths = np.array([len(s) for s in strings], np.int64)
        return cls(np.frombuffer(b"".join(strings), np.uint8), np.cumsum(lengths))

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.ends, prepend=0)

    def letters(self) -> NDArray[np.uint64]:
        """[n] which bytes, modulo 64, each string has, as bits."""
        bits = np.uint64(1) << (self.text % 64).astype(np.uint64)
        masks = np.zeros(len(self.ends), np.uint64)
        np.bitwise_or.at(masks, np.repeat(np.arange(len(self.ends)), self.lengths), bits)
        return masks


def _common(a: bytes, b: bytes) -> int:
    """Length of the beginning that two strings share."""
    unlike = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unlike, min(len(a), len(b)))


def nearest(strings: Sequence[bytes], candidates: Sequence[bytes]) -> IntArray:
    """[n] for each string the first candidate at the least edit distance, -1 for an empty string.

    Exact; insertions, deletions and replacements of bytes count 1. Empty candidates are none.
    """
    b = _Joined.of(candidates)
    order = sorted((v for v, text in enumerate(candidates) if text), key=candidates.__getitem__)
    if not order:
        return np.full(len(strings), -1, np.int64)
    ordered = [candidates[v] for v in order]
    shared = [_common(*two) for two in pairwise(ordered)]
    rest = b.text, b.ends, b.letters(), np.array(order), np.array([0, *shared])

    def some(block: Sequence[bytes]) -> IntArray:
        a = _Joined.of(block)
        near = np.array([bisect_left(ordered, text) for text in block])
        return _nearest(a.text, a.ends, a.letters(), near, *rest)

    blocks = [strings[k : k + 512] for k in range(0, len(strings), 512)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiled code needs no lock
        return np.concatenate([np.zeros(0, np.int64), *threads.map(some, blocks)])


@njit
def _warp(text, ends, other, other_ends):
    """See `warp`."""
    n, m = len(ends), len(other_ends)
    total = np.full((n + 1, m + 1), 1 << 40, np.int64)
    total[0, 0] = 0
    widest, longest = 0, 0
    for i in range(n):
        widest = max(widest, ends[i] - (ends[i - 1] if i else 0))
    for j in range(m):
        longest = max(longest, other_ends[j] - (other_ends[j - 1] if j else 0))
    table = np.empty((longest + 1, widest + 1), np.int64)
    table[0] = np.arange(widest + 1)
    for i in range(n):
        a = text[(ends[i - 1] if i else 0) : ends[i]]
        for j in range(m):
            b = other[(other_ends[j - 1] if j else 0) : other_ends[j]]
            for k in range(len(b)):
                _next_row(table, a, b[k], k + 1, len(a) + len(b))
            step = min(total[i, j], total[i + 1, j], total[i, j + 1])
            total[i + 1, j + 1] = step + table[len(b), len(a)]
    partners = np.zeros((n, 2), np.int64)
    i, j = n, m
    partners[i - 1] = j - 1
    while i > 1 or j > 1:
        step = min(total[i - 1, j - 1], total[i, j - 1], total[i - 1, j])
        if total[i - 1, j - 1] == step:
            i, j = i - 1, j - 1
            partners[i - 1] = j - 1
        elif total[i, j - 1] == step:
            j -= 1
            partners[i - 1, 0] = j - 1
        else:
            i -= 1
            partners[i - 1] = j - 1
    return partners


def warp(strings: Sequence[bytes], others: Sequence[bytes]) -> IntArray:
    """[n, 2] the first and the last of the others that dynamic time warping gives each string.

    The path from the first pair to the last whose edit distances sum to the least; among equal
    ones a step on both sides goes before one on the others' side, and that before one on ours.

    Args:
        strings, others: n and m of them, both at least 1.
    """
    a, b = _Joined.of(strings), _Joined.of(others)
    return _warp(a.text, a.ends, b.text, b.ends)
