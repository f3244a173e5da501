"""A folder of shards as one mapping from samples to packed states.

Any number of processes may read and write one folder at once, without locks: a writer only adds
files under names of its own, a reader looks again when the folder has changed. A sample that
stands in several shards (two processes computed it, or a damaged one was computed anew) is read
from the newest that is intact.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.cache.files import Damaged, folder_status
from axolotl_dskd.cache.keys import KEY_BYTES, sample_key, supervised_positions
from axolotl_dskd.cache.shards import Shard, is_shard, open_shard, write_shard

LOG = get_logger(__name__)

_OPEN_FILES = 64
#: A shard is written when it has this many bytes or, if samples come slowly, after so many seconds:
#: that is what a killed run loses.
SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0


class ShardIndex:
    """Which samples a folder holds, and where. Does not read their states.

    Args:
        folder: where shards are; it need not exist yet.
        bytes_per_token: of their packed states; None takes any.
        quiet: leave it to another reader to report damage.
    """

    def __init__(
        self, folder: Path, bytes_per_token: int | None = None, *, quiet: bool = False
    ) -> None:
        self.folder = folder
        self.quiet = quiet
        self.damage: dict[Path, str] = {}
        self._width = bytes_per_token
        self._shards: dict[str, Shard] = {}
        self._order: list[Shard] = []
        # Sorted by the first half of the key, newest first where that is the same.
        self._first = self._second = np.zeros(0, np.uint64)
        self._place = np.zeros((0, 2), np.int64)
        self._changed = -1
        self.rescan()

    def rescan(self, *, list_anyway: bool = False) -> bool:
        """Take in what was added to or removed from the folder; whether anything was.

        Args:
            list_anyway: where the folder's time of change says that nothing was, too. A network
                file system may answer that from memory, but asks its server for a listing.
        """
        try:
            changed = self.folder.stat().st_mtime_ns
            settled = changed == self._changed and time.time_ns() - changed > 2_000_000_000
            if settled and not list_anyway:
                return False
            names = sorted(filter(is_shard, os.listdir(self.folder)))
        except FileNotFoundError:
            return False
        self._changed = changed
        if names == list(self._shards):
            return False
        shards = {}
        for name in names:
            path = self.folder / name
            if (known := self._shards.get(name)) is None:
                try:
                    known = open_shard(path, self._width)
                except Damaged as error:
                    self._report(error)
                    # Stands for the file, so that it is not opened again at every look.
                    none = np.zeros(0, np.uint64)
                    known = Shard(path, np.zeros((0, KEY_BYTES), np.uint8), none, none, 0, 0)
                except OSError:  # pruned between listing and opening
                    continue
            shards[name] = known
        self._shards = shards
        self._order = list(reversed(shards.values()))  # newest first
        halves = [_halves(shard.keys) for shard in self._order]
        places = [
            np.stack([np.full(len(shard.keys), number), np.arange(len(shard.keys))], 1)
            for number, shard in enumerate(self._order)
        ]
        both = np.concatenate(halves) if halves else np.zeros((0, 2), np.uint64)
        order = np.argsort(both[:, 0], kind="stable")
        self._first, self._second = (np.ascontiguousarray(both[order, i]) for i in (0, 1))
        self._place = np.concatenate(places)[order] if places else np.zeros((0, 2), np.int64)
        return True

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[n] bool: which of the keys [n, 16] no shard holds."""
        wanted = _halves(keys)
        if not len(self._first):
            return np.ones(len(wanted), bool)
        at = np.minimum(np.searchsorted(self._first, wanted[:, 0]), len(self._first) - 1)
        return (self._first[at] != wanted[:, 0]) | (self._second[at] != wanted[:, 1])

    def _places(self, key: bytes) -> list[tuple[Shard, int]]:
        first, second = _halves(np.frombuffer(key, np.uint8)[None])[0]
        places = []
        for at in range(int(np.searchsorted(self._first, first)), len(self._first)):
            if self._first[at] != first:
                break
            if self._second[at] == second:
                number, row = self._place[at]
                places.append((self._order[number], int(row)))
        return places

    def _report(self, error: Damaged) -> None:
        if error.path not in self.damage and not self.quiet:
            LOG.warning(
                f"Teacher cache: {error}. What it lacks is computed again. "
                "`axolotl-dskd cache verify CONFIG` looks for more."
            )
        self.damage.setdefault(error.path, str(error))

    @property
    def shards(self) -> list[Shard]:
        """The readable ones, newest first."""
        return [shard for shard in self._order if shard.bytes_per_token]


class RowReader(ShardIndex):
    """Looks samples up in a folder. Picklable, so that data workers can have one each.

    Args:
        folder, quiet: see `ShardIndex`.
        bytes_per_token: of their packed states.
    """

    def __init__(self, folder: Path, bytes_per_token: int, *, quiet: bool = False) -> None:
        self.bytes_per_token = bytes_per_token
        self._files: OrderedDict[Path, int] = OrderedDict()
        super().__init__(folder, bytes_per_token, quiet=quiet)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)

    def read_into(self, key: bytes, out: np.ndarray) -> bool:
        """Fill `out` [tokens, bytes_per_token] uint8 with a sample's states, if they are there."""
        for again in (False, True):
            if again and not self.rescan():
                return False
            for shard, row in self._places(key):
                try:
                    shard.read_into(self._descriptor(shard.path), row, out)
                    return True
                except Damaged as error:
                    self._report(error)
                except FileNotFoundError:
                    pass  # pruned; its samples stand elsewhere or are computed again
                except OSError as error:
                    self._report(Damaged(shard.path, f"it cannot be read ({error})"))
        return False

    def read_samples(self, ids: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Packed states of a batch's samples, one after the other, and which were found.

        Args:
            ids, labels: per sample [L], without padding.

        Returns:
            [M, bytes_per_token] uint8, zeros where a sample was not found, and [S] bool.
        """
        sides = [(i.numpy(), y.numpy()) for i, y in zip(ids, labels, strict=True)]
        counts = [len(supervised_positions(y)) for _, y in sides]
        packed = np.zeros((sum(counts), self.bytes_per_token), np.uint8)
        found, at = [], 0
        for (i, y), count in zip(sides, counts, strict=True):
            found.append(not count or self.read_into(sample_key(i, y), packed[at : at + count]))
            if not found[-1]:
                packed[at : at + count] = 0  # a damaged sample was read before it was found out
            at += count
        return torch.from_numpy(packed), torch.tensor(found, dtype=torch.bool)

    def _descriptor(self, path: Path) -> int:
        descriptor = self._files.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        self._files[path] = descriptor
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor


class RowStore(RowReader):
    """A reader that also writes.

    Args:
        folder, bytes_per_token: see `RowReader`.
        root: the folder whose size `max_bytes` limits.
        max_bytes: stop writing where the folder would grow beyond.
    """

    def __init__(
        self,
        folder: Path,
        bytes_per_token: int,
        *,
        root: Path | None = None,
        max_bytes: int | None = None,
    ) -> None:
        self.root = root or folder
        self.max_bytes = max_bytes
        self.full: str | None = None
        self._pending: dict[bytes, np.ndarray] = {}
        self._pending_bytes = 0
        self._since = time.monotonic()
        super().__init__(folder, bytes_per_token)

    def read_into(self, key: bytes, out: np.ndarray) -> bool:
        """As `RowReader.read_into`; sees samples that are not written yet, too."""
        waiting = self._pending.get(key)
        if waiting is not None and waiting.shape == out.shape:
            out[:] = waiting
            return True
        return super().read_into(key, out)

    def add(self, key: bytes, packed: np.ndarray) -> None:
        """Keep a sample's states [tokens, bytes_per_token] uint8; written with the next shard."""
        if self.full is not None:
            return
        if not self._pending:
            self._since = time.monotonic()
        self._pending_bytes += packed.nbytes if key not in self._pending else 0
        self._pending[key] = packed
        late = time.monotonic() - self._since > SHARD_SECONDS
        if late or self._pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting. A full disk is no error here: see `full`."""
        if not self._pending:
            return
        pending, size = self._pending, self._pending_bytes
        self._pending, self._pending_bytes = {}, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.max_bytes is not None:
                size += len(pending) * 32 + 1024  # the index
                after = folder_status(self.root).used + size
                if after > self.max_bytes:
                    raise OSError(f"{after:,} bytes would exceed max_size ({self.max_bytes:,})")
            write_shard(self.folder, list(pending), list(pending.values()))
        except OSError as error:
            self.full = str(error)
            LOG.warning(
                f"Teacher cache: {self.folder} takes no more samples: {error}. The work goes on; "
                "samples that are not cached need the teacher every time. Free space, raise "
                "dskd.teacher.cache.max_size, use dtype int8 or int4, or remove what other runs "
                "left with `axolotl-dskd cache prune CONFIG`."
            )
            return
        self.rescan()


def _halves(keys: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(keys).view("<u8").reshape(-1, 2)
