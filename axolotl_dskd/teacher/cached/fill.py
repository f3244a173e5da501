"""Run the teacher over rows of datasets that are not cached yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger

from axolotl_dskd.cache import dataset_keys
from axolotl_dskd.progress import Progress, quantity
from axolotl_dskd.teacher.cached.states import CachedStates
from axolotl_dskd.teacher.part import of_rows
from axolotl_dskd.types import DualBatch

LOG = get_logger(__name__)

_ROWS_AT_ONCE = 64


class CacheableRows:
    """The distinct samples of some prepared datasets, and what each is filed under.

    Attributes:
        keys: [n, 16] uint8.
        tokens: [n] supervised teacher tokens.
        lengths: [n] teacher tokens that the teacher has to read.
    """

    def __init__(self, datasets: list[Any]) -> None:
        self._datasets = datasets
        parts = [dataset_keys(dataset) for dataset in datasets]
        which = [np.full(len(keys), number) for number, (keys, _, _) in enumerate(parts)]
        rows = [np.arange(len(keys)) for keys, _, _ in parts]
        keys, tokens, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        place = np.stack([np.concatenate(which), np.concatenate(rows)], 1)
        _, first = np.unique(keys, axis=0, return_index=True)
        kept = first[tokens[first] > 0]
        self.keys, self.tokens, self.lengths = keys[kept], tokens[kept], lengths[kept]
        self._place = place[kept]

    def __len__(self) -> int:
        return len(self.keys)

    def batch(self, rows: np.ndarray, pad_id: int, device: torch.device) -> DualBatch:
        """Some samples' teacher sides, padded; the student's side is empty."""
        samples = (self._datasets[number][row] for number, row in self._place[rows].tolist())
        return of_rows(list(samples), pad_id, device)


def missing_rows(
    states: CachedStates, rows: CacheableRows, part: tuple[int, int] = (0, 1)
) -> np.ndarray:
    """Indices of the samples that no shard holds.

    Args:
        states, rows: the cache, and the samples that it should hold.
        part: only those of this process, (its number from 0, how many there are). Which these are
            does not depend on what the others have written meanwhile.
    """
    states.store.rescan(list_anyway=True)
    missing = np.flatnonzero(states.store.missing(rows.keys))
    number, parts = part
    return missing[missing % parts == number]


def fill(states: CachedStates, rows: CacheableRows, todo: np.ndarray) -> None:
    """Compute and write samples, longest first; what is out of memory runs in smaller groups.

    Returns when all are written, or the disk is full (`states.store.full`).

    Raises:
        ValueError: the teacher cannot be loaded, its states are not finite, or one sample alone
            is out of memory.
    """
    if not len(todo):
        return
    teacher = states.body.get()
    todo = todo[np.argsort(-rows.lengths[todo], kind="stable")]
    total = int(rows.lengths[todo].sum())
    at = 0
    try:
        with Progress("Teacher states", total, "tokens") as progress:
            while at < len(todo) and states.store.full is None:
                group = todo[at : at + _ROWS_AT_ONCE]
                longest = int(rows.lengths[group[0]])
                size = max(1, min(len(group), teacher.max_tokens // max(1, longest)))
                group = group[:size]
                try:
                    states.compute(rows.batch(group, 0, states.device), list(range(size)))
                except torch.OutOfMemoryError as error:
                    if size == 1:
                        raise ValueError(
                            f"out of memory on one sample of {longest} teacher tokens. Set "
                            "dskd.teacher.load_in_4bit: true, a device_map that offloads layers, "
                            f"or a smaller dskd.teacher.sequence_len. ({error})"
                        ) from error
                    teacher.read_less(size * longest // 2)
                    LOG.warning(
                        "Out of memory; the teacher goes on with "
                        f"{teacher.max_tokens} tokens at once"
                    )
                else:
                    at += size
                    progress.advance(int(rows.lengths[group].sum()))
                    continue
                torch.cuda.empty_cache()  # only here has the failed forward let go of its memory
    finally:  # also what was computed before an error, or before Ctrl-C
        states.store.flush()


def describe(rows: CacheableRows, missing: np.ndarray, bytes_per_token: int) -> str:
    """How much of the rows is cached, in words; `bytes_per_token` is 0 where it is not known."""
    cached = len(rows) - len(missing)
    text = f"{cached:,} of {len(rows):,} samples cached"
    if len(missing):
        size = int(rows.tokens[missing].sum()) * bytes_per_token
        text += f", {quantity(rows.tokens[missing].sum(), 'supervised tokens')} to go"
        text += f" ({quantity(size, 'bytes')})" if size else ""
    return text
