"""Where each of many keys stands. Knows numbers only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from axolotl_dskd.cache.keys import KEY_BYTES

#: Runs are put together where the older one is at most so many times as long.
_TIMES = 4


class _Run(NamedTuple):
    """Keys in order. `first`, `second`: [n] uint64, their halves, sorted by the first, the newest
    first where that is the same; `place`: [n, 2] int64, number of the file, row."""

    first: np.ndarray
    second: np.ndarray
    place: np.ndarray


class Places:
    """A map from keys to the files that hold them, to which files are added.

    As in a log-structured merge tree it is a few sorted runs, each some times longer than the next
    one. So a file more costs about as much as it has keys, however many there are before.
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def add(self, keys: np.ndarray, number: int) -> None:
        """Take in the keys [n, 16] of a file, which is newer than those before."""
        if not len(keys):
            return
        halves = _halves(keys)
        place = np.stack([np.full(len(keys), number), np.arange(len(keys))], 1)
        run = _sorted(halves[:, 0], halves[:, 1], place)
        while self._runs and len(self._runs[-1].first) <= _TIMES * len(run.first):
            both = zip(run, self._runs.pop(), strict=True)  # the newer first
            run = _sorted(*(np.concatenate(columns) for columns in both))
        self._runs.append(run)

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[n] bool: which of the keys [n, 16] no file holds."""
        wanted = _halves(keys)
        missing = np.ones(len(wanted), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run.first, wanted[:, 0]), len(run.first) - 1)
            missing &= (run.first[at] != wanted[:, 0]) | (run.second[at] != wanted[:, 1])
        return missing

    def of(self, key: bytes) -> list[tuple[int, int]]:
        """File and row of a key, the newest first."""
        first, second = _halves(np.frombuffer(key, np.uint8)[None])[0]
        places = []
        for run in reversed(self._runs):
            for at in range(int(np.searchsorted(run.first, first)), len(run.first)):
                if run.first[at] != first:
                    break
                if run.second[at] == second:
                    places.append((int(run.place[at, 0]), int(run.place[at, 1])))
        return places


def _sorted(first: np.ndarray, second: np.ndarray, place: np.ndarray) -> _Run:
    order = np.argsort(first, kind="stable")
    return _Run(first[order], second[order], place[order])


def _halves(keys: np.ndarray) -> np.ndarray:
    assert keys.shape[-1] == KEY_BYTES
    return np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
