"""Checking shards byte by byte, and taking out what is damaged or no longer wanted.

What stays of a shard is written to a new one before the old one goes, so that a kill at any
moment loses nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from axolotl_dskd.cache.files import Damaged
from axolotl_dskd.cache.shards import Shard, is_shard, open_shard, write_shard


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, oldest first."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for name in names if is_shard(name)]


def _copied(shard: Shard, rows: list[int]) -> tuple[list[bytes], list[np.ndarray], list[int]]:
    """Keys and states of the intact ones among some samples, and which are not."""
    keys, states, lost = [], [], []
    descriptor = os.open(shard.path, os.O_RDONLY)
    try:
        for row in rows:
            out = np.empty((shard.tokens(row), shard.bytes_per_token), np.uint8)
            try:
                shard.read_into(descriptor, row, out)
            except (Damaged, OSError):
                lost.append(row)
                continue
            keys.append(bytes(shard.keys[row]))
            states.append(out)
    finally:
        os.close(descriptor)
    return keys, states, lost


def verify_shard(path: Path) -> str | None:
    """Read every byte of a shard; of a damaged one, keep what is intact. What was lost, in words.

    Raises:
        OSError: what is intact cannot be written again; the damaged file stays.
    """
    try:
        shard = open_shard(path)
    except Damaged as error:
        path.unlink(missing_ok=True)
        return f"{error}; its samples are lost"
    except FileNotFoundError:
        return None  # pruned by another process
    keys, states, lost = _copied(shard, list(range(len(shard.keys))))
    if not lost:
        return None
    if keys:
        write_shard(path.parent, keys, states)
    path.unlink(missing_ok=True)
    return f"{path} is damaged: {len(lost)} of {len(shard.keys)} samples are lost"


@dataclass
class Plan:
    """What pruning would do.

    Attributes:
        remove: files to delete, with the reason.
        rewrite: shards of which only some samples stay: the shard and these.
        saved: bytes.
    """

    remove: list[tuple[Path, str]] = field(default_factory=list)
    rewrite: list[tuple[Shard, list[int]]] = field(default_factory=list)
    saved: int = 0

    def drop(self, path: Path, why: str) -> None:
        """Plan to delete a file."""
        with contextlib.suppress(FileNotFoundError):
            self.saved += path.stat().st_size
            self.remove.append((path, why))


def plan_prune(folder: Path, wanted: np.ndarray) -> Plan:
    """What in a folder of shards is damaged, stands there twice or is no wanted sample.

    Args:
        folder: of one teacher.
        wanted: [n, 16] uint8, keys to keep.
    """
    plan = Plan()
    left = {bytes(key) for key in wanted}
    for path in reversed(shard_paths(folder)):  # the newest of several is kept
        try:
            shard = open_shard(path)
        except Damaged:
            plan.drop(path, "damaged")
            continue
        except FileNotFoundError:
            continue
        keys = [bytes(key) for key in shard.keys]
        stay = [row for row, key in enumerate(keys) if key in left]
        left -= {keys[row] for row in stay}
        if not stay:
            plan.drop(path, "samples that this configuration does not use")
        elif len(stay) < len(keys):
            tokens = sum(shard.tokens(row) for row in range(len(keys)))
            gone = tokens - sum(shard.tokens(row) for row in stay)
            plan.saved += gone * shard.bytes_per_token
            plan.rewrite.append((shard, stay))
    return plan


def prune(plan: Plan, advance: Callable[[int], None] = lambda _: None) -> None:
    """Carry a plan out.

    Raises:
        OSError: the disk has no room for what stays of a shard, which is then left as it is.
    """
    for path, _ in plan.remove:  # first, to make room
        path.unlink(missing_ok=True)
        advance(1)
    for shard, stay in plan.rewrite:
        keys, states, _ = _copied(shard, stay)
        if keys:
            write_shard(shard.path.parent, keys, states)
        shard.path.unlink(missing_ok=True)
        advance(1)
