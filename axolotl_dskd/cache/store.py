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
from axolotl_dskd.cache.places import Places
from axolotl_dskd.cache.shards import Shard, is_shard, open_shard, write_shard

LOG = get_logger(__name__)

_OPEN_FILES = 64
#: A shard is written when it has this many bytes or, if samples come slowly, after so many seconds:
#: that is what a killed run loses.
SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0
#: Nanoseconds between two ticks of a file system's clock, as they are and as they may be, and
#: between two listings meanwhile.
_TICK, _COARSE_TICK, _LISTED_EVERY = 50_000_000, 2_000_000_000, 200_000_000


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
        self._numbered: list[Shard] = []
        self._keys = Places()
        self._changed = self._listed = -1
        self.rescan()

    def rescan(self, *, list_anyway: bool = False) -> bool:
        """Take in what was added to or removed from the folder; whether anything was.

        Args:
            list_anyway: where the folder's time of change says that nothing was, too. A network
                file system may answer that from memory, but asks its server for a listing.
        """
        try:
            changed = self.folder.stat().st_mtime_ns
            if changed == self._changed and not list_anyway and self._is_settled(time.time_ns()):
                return False
            self._listed = time.time_ns()
            names = sorted(filter(is_shard, os.listdir(self.folder)))
        except FileNotFoundError:
            return False
        self._changed = changed
        gone = self._shards.keys() - names
        known, before = self._shards, len(self._numbered)
        if gone:
            self._shards, self._numbered, self._keys, before = {}, [], Places(), 0
        for name in names:
            if name not in self._shards and (shard := known.get(name) or self._open(name)):
                self._shards[name] = shard
                self._keys.add(shard.keys, len(self._numbered))
                self._numbered.append(shard)
        return bool(gone) or len(self._numbered) > before

    def _is_settled(self, now: int) -> bool:
        """Whether nothing can have come since the last listing under the same time of change.

        Clocks of file systems tick every few milliseconds, some every two seconds: where one may
        be of those, a folder that others write to is listed a few times a second, and not for
        every sample.
        """
        if now - self._changed > _COARSE_TICK:
            return True
        return self._listed - self._changed > _TICK and now - self._listed < _LISTED_EVERY

    def _open(self, name: str) -> Shard | None:
        """A shard; None where it cannot be read now."""
        path = self.folder / name
        try:
            return open_shard(path, self._width)
        except Damaged as error:
            self._report(error)
            # Stands for the file, so that it is not opened again at every look.
            none = np.zeros(0, np.uint64)
            return Shard(path, np.zeros((0, KEY_BYTES), np.uint8), none, none, 0, 0)
        except FileNotFoundError:  # pruned between listing and opening
            return None
        except OSError as error:
            self._report(Damaged(path, f"it cannot be read ({error})"))
            return None

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """[n] bool: which of the keys [n, 16] no shard holds."""
        return self._keys.missing(keys)

    def _places(self, key: bytes) -> list[tuple[Shard, int]]:
        return [(self._numbered[number], row) for number, row in self._keys.of(key)]

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
        names = sorted(self._shards, reverse=True)
        return [self._shards[name] for name in names if self._shards[name].bytes_per_token]


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
