"""From a configured cache to a teacher that reads it, and what happens to it during training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger

from axolotl_dskd.cache import (
    Codec,
    Damaged,
    RowReader,
    RowStore,
    folder_status,
    read_json,
    write_json,
)
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.progress import quantity
from axolotl_dskd.teacher.cached.fill import CacheableRows, describe, fill, missing_rows
from axolotl_dskd.teacher.cached.identity import TeacherIdentity, teacher_identity
from axolotl_dskd.teacher.cached.tables import EmbeddingTable, read_tables, write_tables
from axolotl_dskd.teacher.cached.teacher import CachedTeacher
from axolotl_dskd.teacher.live import LiveTeacher, check_sizes
from axolotl_dskd.teacher.load import load_teacher, resolve_dtype

LOG = get_logger(__name__)

IDENTITY, TABLES = "teacher.json", "head.safetensors"
#: So few samples missing are computed before training, so that its body need not stay for them.
_FEW = 0.05
#: How long processes that see unlike files wait for them to show.
_LATE_SECONDS = 10.0


def open_cached_teacher(
    config: TeacherConfig, vocab_size: int, device: torch.device
) -> CachedTeacher:
    """The teacher behind its cache. Loads its body only if head and embedding are not cached yet.

    Args:
        config: with a `cache` block.
        vocab_size: ids that its tokenizer can emit.
        device: where the loss is computed.

    Raises:
        ValueError: there is no such teacher, or it cannot be used as one.
    """
    assert config.cache is not None
    root = Path(config.cache.path)
    identity, folder = cache_folder(config, device)

    def load_body() -> LiveTeacher:
        return LiveTeacher(load_teacher(config, device), vocab_size, device)

    body = None
    try:
        tables = read_tables(folder / TABLES, vocab_size, device)
    except Damaged as error:
        LOG.warning(f"Teacher cache: {error}. It is written again from the teacher.")
        tables = None
    if tables is None:
        _say_what_differs(root, identity)
        body = load_body()
        tables = _keep_tables(folder, body, device)
    if not (folder / IDENTITY).exists():
        _keep_identity(folder, identity)
    head, embedding = tables
    check_sizes(head, embedding.weight, vocab_size)
    codec = Codec(config.cache.storage, head.hidden_size)
    store = RowStore(folder, codec.bytes_per_token, root=root, max_bytes=config.cache.max_size)
    teacher = CachedTeacher(store, codec, head, embedding, load_body)
    teacher.body = body
    return teacher


def cache_folder(config: TeacherConfig, device: torch.device) -> tuple[TeacherIdentity, Path]:
    """Whose states a configuration reads and writes, and the folder they are in.

    Raises:
        ValueError: there is no such teacher.
    """
    assert config.cache is not None
    root = Path(config.cache.path)
    identity = teacher_identity(config, resolve_dtype(config.dtype, device), root)
    return identity, root / f"{identity.digest}-{config.cache.storage}"


def _keep_identity(folder: Path, identity: TeacherIdentity) -> None:
    content = {"base_model": identity.base_model, "content": identity.content}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / IDENTITY, content)
    except OSError as error:
        LOG.warning(f"Teacher cache: {folder} cannot be written: {error}. The work goes on.")


def _keep_tables(
    folder: Path, body: LiveTeacher, device: torch.device
) -> tuple[OutputHead, EmbeddingTable]:
    table = EmbeddingTable.of(body.embedding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(folder / TABLES, output_head(body.model), table)
    except OSError as error:
        LOG.warning(f"Teacher cache: {folder} cannot be written: {error}. The work goes on.")
    return body.head, EmbeddingTable(table.weight.to(device), table.scale)


def _stop_alone(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


def _number_of(missing: np.ndarray) -> int:
    """63 bits that tell sets of rows apart, 0 for none."""
    if not len(missing):
        return 0
    digest = hashlib.blake2b(missing.astype("<i8").data, digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (2**63 - 1)


def _say_what_differs(root: Path, identity: TeacherIdentity) -> None:
    """Say it where the folder holds the states of what looks like the same teacher."""
    for path in sorted(root.glob(f"*/{IDENTITY}")):
        try:
            known = read_json(path) or {}
        except Damaged:
            continue
        if known.get("base_model") != identity.base_model:
            continue
        theirs = known["content"]
        names = sorted(
            name
            for name in theirs.keys() | identity.content.keys()
            if theirs.get(name) != identity.content.get(name)
        )
        if names:
            LOG.warning(
                f"Teacher cache: {path.parent} is of {identity.base_model} too, but cannot be "
                f"used: it differs in {', '.join(names)}."
            )


class CacheRun:
    """A training run's use of the cache: what is missing, and when the body may go.

    Every decision is made from numbers of all processes, so that they stay in step: files may show
    on one later than on another, each may have a disk of its own, and one may be full.

    Args:
        teacher: on this process.
        datasets: the rows that training and evaluation will see, the same on every process.
        device: where the loss is computed.
        rank: this process' number.
        gather: an integer of every process, by rank; returns when each has given its own.
        stop_together: called by all with what went wrong here, or None; raises on all if anything
            did on one.
    """

    def __init__(
        self,
        teacher: CachedTeacher,
        datasets: list[Any],
        device: torch.device,
        *,
        rank: int = 0,
        gather: Callable[[int], list[int]] = lambda number: [number],
        stop_together: Callable[[str | None], None] = _stop_alone,
    ) -> None:
        self.teacher = teacher
        self.rows = CacheableRows(datasets)
        self.device = device
        self.rank = rank
        self.gather = gather
        self.stop_together = stop_together

    def reader(self) -> RowReader:
        """For the data workers."""
        return RowReader(self.teacher.store.folder, self.teacher.codec.bytes_per_token, quiet=True)

    def start(self) -> None:
        """Free the body if no process misses anything; else load it, and say what is to come.

        Raises:
            ValueError: the teacher cannot be loaded, or fails, on one of the processes.
        """
        missing = missing_rows(self.teacher, self.rows)
        width = self.teacher.codec.bytes_per_token
        LOG.info(
            f"Teacher cache {self.teacher.store.folder}: {describe(self.rows, missing, width)}"
        )
        most = max(self.gather(len(missing)))
        if 0 < most <= _FEW * len(self.rows):
            most = self._complete()
            missing = missing_rows(self.teacher, self.rows)
        if not most:
            self.teacher.free_body()
            return
        self._warn_of_space(int(self.rows.tokens[missing].sum()) * width)
        self._together(self.teacher.load_body)

    def end_epoch(self, *, more: bool) -> None:
        """Write what is waiting; with more epochs to come, complete the cache and free the body.

        Rows that the epoch left out (the last ones of an uneven batch) are computed now.

        Raises:
            ValueError: the teacher cannot be loaded, or fails, on one of the processes.
        """
        self.teacher.store.flush()
        if more and not self._complete():
            self.teacher.free_body()

    def _complete(self) -> int:
        """Compute what is missing, each process its part; how many the worst off still lacks."""
        missing, views = self._views()
        if not any(view for view in views):
            return 0
        alike = [rank for rank, view in enumerate(views) if view == views[self.rank]]
        part = alike.index(self.rank), len(alike)
        mine = missing[missing % part[1] == part[0]]
        self._together(lambda: fill(self.teacher, self.rows, mine, self.device))
        # Only now have all of them written.
        return max(self.gather(len(self._views()[0])))

    def _views(self) -> tuple[np.ndarray, list[int]]:
        """What is missing here, and a number for what is missing on each process.

        Processes that miss the same have the same number, those that miss nothing 0. They may
        differ for a moment, while files that one has written do not show on another (NFS), or for
        good, where every machine has a disk of its own.
        """
        self.gather(0)  # all have written
        until = time.monotonic() + _LATE_SECONDS
        while True:
            missing = missing_rows(self.teacher, self.rows)
            views = self.gather(_number_of(missing))
            late = self.gather(int(time.monotonic() > until))
            if len(set(views)) == 1 or any(late):
                return missing, views
            time.sleep(_LATE_SECONDS / 20)

    def _together(self, work: Callable[[], Any]) -> None:
        problem = None
        try:
            work()
        except ValueError as error:
            problem = str(error)
        self.stop_together(problem)

    def _warn_of_space(self, needed: int) -> None:
        store = self.teacher.store
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
