"""From a configured cache to a teacher that reads it, and what happens to it during training."""

from __future__ import annotations

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
from axolotl_dskd.heads import output_head
from axolotl_dskd.progress import quantity
from axolotl_dskd.teacher.cached import CachedTeacher
from axolotl_dskd.teacher.fill import CacheableRows, describe, fill, missing_rows
from axolotl_dskd.teacher.identity import TeacherIdentity, teacher_identity
from axolotl_dskd.teacher.live import LiveTeacher, check_sizes
from axolotl_dskd.teacher.load import load_teacher, resolve_dtype
from axolotl_dskd.teacher.tables import EmbeddingTable, read_tables, write_tables
from axolotl_dskd.types import OutputHead

LOG = get_logger(__name__)

IDENTITY, TABLES = "teacher.json", "head.safetensors"
#: So few samples missing are computed before training, so that its body need not stay for them.
_FEW = 0.05


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
    bodies: list[LiveTeacher] = []

    def load_body() -> LiveTeacher:
        return (
            bodies.pop()
            if bodies
            else LiveTeacher(load_teacher(config, device), vocab_size, device)
        )

    try:
        tables = read_tables(folder / TABLES, vocab_size, device)
    except Damaged as error:
        LOG.warning(f"Teacher cache: {error}. It is written again from the teacher.")
        tables = None
    if tables is None:
        _say_what_differs(root, identity)
        bodies.append(load_body())
        tables = _keep_tables(folder, bodies[0], identity, device)
    head, embedding = tables
    check_sizes(head, embedding.weight, vocab_size)
    codec = Codec(config.cache.storage, head.hidden_size)
    store = RowStore(folder, codec.bytes_per_token, root=root, max_bytes=config.cache.max_bytes)
    return CachedTeacher(store, codec, head, embedding, load_body)


def cache_folder(config: TeacherConfig, device: torch.device) -> tuple[TeacherIdentity, Path]:
    """Whose states a configuration reads and writes, and the folder they are in.

    Raises:
        ValueError: there is no such teacher.
    """
    assert config.cache is not None
    root = Path(config.cache.path)
    identity = teacher_identity(config, resolve_dtype(config.dtype, device), root)
    return identity, root / f"{identity.digest}-{config.cache.storage}"


def _keep_tables(
    folder: Path, body: LiveTeacher, identity: TeacherIdentity, device: torch.device
) -> tuple[OutputHead, EmbeddingTable]:
    table = EmbeddingTable.of(body.embedding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / IDENTITY, {"base_model": identity.base_model, "content": identity.content}
        )
        write_tables(folder / TABLES, output_head(body.model), table)
    except OSError as error:
        LOG.warning(f"Teacher cache: {folder} cannot be written: {error}. The work goes on.")
    return body.head, EmbeddingTable(table.weight.to(device), table.scale)


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

    Args:
        teacher: on this process.
        datasets: the rows that training and evaluation will see.
        device: where the loss is computed.
        part: this process' number and how many there are.
        most: the largest of a number over all processes; returns when each has given its own.
    """

    def __init__(
        self,
        teacher: CachedTeacher,
        datasets: list[Any],
        device: torch.device,
        *,
        part: tuple[int, int] = (0, 1),
        most: Callable[[int], int] = lambda number: number,
    ) -> None:
        self.teacher = teacher
        self.rows = CacheableRows(datasets)
        self.device = device
        self.part = part
        self.most = most

    def reader(self) -> RowReader:
        """For the data workers."""
        return RowReader(self.teacher.store.folder, self.teacher.codec.bytes_per_token, quiet=True)

    def start(self) -> None:
        """Free the body if nothing is missing; else load it, and say what is to come."""
        missing = missing_rows(self.teacher, self.rows)
        width = self.teacher.codec.bytes_per_token
        LOG.info(
            f"Teacher cache {self.teacher.store.folder}: {describe(self.rows, missing, width)}"
        )
        # Files may show on one process later than on another: all must decide the same.
        if 0 < self.most(len(missing)) <= _FEW * len(self.rows):
            missing = self._complete()
        if not len(missing):
            self.teacher.free_body()
            return
        self._warn_of_space(int(self.rows.tokens[missing].sum()) * width)
        self.teacher.load_body()

    def end_epoch(self, *, more: bool) -> None:
        """Write what is waiting; with more epochs to come, complete the cache and free the body.

        Rows that the epoch left out (the last ones of an uneven batch) are computed now.
        """
        self.teacher.store.flush()
        if not more:
            return
        self.most(0)  # all have written
        missing = missing_rows(self.teacher, self.rows)
        if self.most(len(missing)):
            missing = self._complete()
        if not len(missing):
            self.teacher.free_body()

    def _complete(self) -> np.ndarray:
        """Compute what is missing, each process its part; what is missing then."""
        mine = missing_rows(self.teacher, self.rows, self.part)
        fill(self.teacher, self.rows, mine, self.device)
        self.most(0)
        return missing_rows(self.teacher, self.rows)

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
