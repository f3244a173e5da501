"""A training run's use of the teacher's cache: what is missing, and when the teacher may go.

Every decision is made from numbers of all ranks, so that they stay in step: files may show on one
later than on another, each may have a disk of its own, and one may be full.
"""

from __future__ import annotations

import hashlib
import time
from functools import cached_property

import numpy as np
from axolotl.utils.logging import get_logger

from axolotl_dskd.cache import folder_status
from axolotl_dskd.progress import quantity
from axolotl_dskd.teacher.cached.fill import CacheableRows, describe, fill, missing_rows
from axolotl_dskd.teacher.cached.states import CachedStates
from axolotl_dskd.teacher.spec import TrainingRun

LOG = get_logger(__name__)

#: So few samples missing are computed before training, so that the teacher need not stay for them.
_FEW = 0.05
#: How long ranks that see unlike files wait for them to show.
_LATE_SECONDS = 10.0


class CacheSession:
    """Fills the cache during a run, and frees the teacher once no rank needs it.

    Args:
        states: the cache as this rank has opened it.
        run: its rows and its ranks.
    """

    def __init__(self, states: CachedStates, run: TrainingRun) -> None:
        self.states = states
        self.run = run

    @cached_property
    def rows(self) -> CacheableRows:
        """The samples of the run's datasets."""
        return CacheableRows(list(self.run.datasets()))

    def begin(self) -> None:
        """Free the teacher if no rank misses anything; else load it, and say what is to come.

        Few samples are computed here, and all of them for evaluations alone.

        Raises:
            ValueError: the teacher cannot be loaded, or fails, on one of the ranks.
        """
        missing = missing_rows(self.states, self.rows)
        width = self.states.codec.bytes_per_token
        LOG.info(f"Teacher cache {self.states.store.folder}: {describe(self.rows, missing, width)}")
        most = max(self.run.gather(len(missing)))
        few = len(self.rows) * (1.0 if self.run.only_evaluates else _FEW)
        if 0 < most <= few:
            most = self._complete()
            missing = missing_rows(self.states, self.rows)
        if not most:
            self._free()
            return
        self._warn_of_space(int(self.rows.tokens[missing].sum()) * width)
        self.run.together(self.states.body.get)

    def end_epoch(self, *, more: bool) -> None:
        """Write what is waiting; with more epochs to come, complete the cache and free the
        teacher.

        Rows that the epoch left out (the last ones of an uneven batch) are computed now.

        Raises:
            ValueError: the teacher cannot be loaded, or fails, on one of the ranks.
        """
        self.states.store.flush()
        if more and not self._complete():
            self._free()

    def _free(self) -> None:
        """Nothing of the data is missing; answers that the student writes are asked about anew."""
        if self.run.writes:
            self.run.together(self.states.body.get)
        else:
            self.states.body.free()

    def _complete(self) -> int:
        """Compute what is missing, each rank its part.

        Returns:
            How many samples are still missing on the rank that misses most.
        """
        missing, numbers = self._missing_on_ranks()
        if not any(numbers):
            return 0
        # Those that miss the same share the work; a rank with a disk of its own does all of it.
        alike = [rank for rank, number in enumerate(numbers) if number == numbers[self.run.rank]]
        mine = missing[missing % len(alike) == alike.index(self.run.rank)]
        self.run.together(lambda: fill(self.states, self.rows, mine))
        # Only now have all of them written.
        return max(self.run.gather(len(self._missing_on_ranks()[0])))

    def _missing_on_ranks(self) -> tuple[np.ndarray, list[int]]:
        """What is missing here, and a number for what is missing on each rank.

        Ranks that miss the same have the same number, those that miss nothing 0. They may
        differ for a moment, while files that one has written do not show on another (NFS), or for
        good, where every machine has a disk of its own.
        """
        self.run.gather(0)  # all have written
        until = time.monotonic() + _LATE_SECONDS
        while True:
            missing = missing_rows(self.states, self.rows)
            numbers = self.run.gather(_number_of(missing))
            late = self.run.gather(int(time.monotonic() > until))
            if len(set(numbers)) == 1 or any(late):
                return missing, numbers
            time.sleep(_LATE_SECONDS / 20)

    def _warn_of_space(self, needed: int) -> None:
        store = self.states.store
        status = folder_status(store.root)
        room, why = status.free, "free on its disk"
        if store.max_bytes is not None and store.max_bytes - status.used < room:
            room, why = max(0, store.max_bytes - status.used), "left of max_size"
        if needed > room:
            LOG.warning(
                f"Teacher cache: {quantity(needed, 'bytes')} are to be written, but only "
                f"{quantity(room, 'bytes')} are {why}. Samples beyond need the teacher in every "
                "epoch. dskd.teacher.cache.dtype int8 takes half of bfloat16, int4 a quarter."
            )


def _number_of(missing: np.ndarray) -> int:
    """63 bits that tell sets of rows apart, 0 for none."""
    if not len(missing):
        return 0
    digest = hashlib.blake2b(missing.astype("<i8").data, digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (2**63 - 1)
