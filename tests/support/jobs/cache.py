"""The command that fills the teacher's cache, and trainings on a cache where something is amiss."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from axolotl_dskd.cache import files, store
from axolotl_dskd.commands import cache as cache_command
from axolotl_dskd.commands import cli
from axolotl_dskd.teacher import live
from axolotl_dskd.teacher.cached import fill, identity, session, states
from axolotl_dskd.teacher.cached import open as cache_open
from axolotl_dskd.teacher.cached.teacher import CachedTeacher
from axolotl_dskd.teacher.live import LiveTeacher
from tests.support.jobs.common import on_a_full_disk, this_rank, wrapped
from tests.support.jobs.registry import job, run_job
from tests.support.jobs.training import train


@job
def cache(arguments: list[str]) -> dict[str, Any]:
    """`axolotl-dskd cache CONFIG.yml …`; returns what went to stdout."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as answer, os.fdopen(os.dup(1)) as before:
        os.dup2(answer.fileno(), 1)
        try:
            cli.main(["cache", *arguments], standalone_mode=False)
        finally:
            sys.stdout.flush()
            os.dup2(before.fileno(), 1)
        answer.seek(0)
        return {"stdout": answer.read().decode()}


#: (where, name, stage, seconds that it takes longer): every step of work on the cache. Syncing
#: takes a while, as on a disk: more moments at which files are half-way.
STAGES = [
    (cache_open, "teacher_identity", "identity", 0.0),
    (identity, "hash_file", "weights", 0.1),
    (CachedTeacher, "__call__", "step", 0.0),
    (cache_command, "_measure", "measure", 0.0),
    (cache_open, "write_tables", "head", 0.0),
    (states.CachedStates, "compute", "teacher", 0.0),
    (store, "write_shard", "shard", 0.0),
    (files.os, "fsync", "sync", 0.03),
    (session.CacheSession, "end_epoch", "epoch", 0.0),
]


@job
def noting_stages(folder: str, job: dict[str, Any]) -> dict[str, Any]:
    """A job whose every step of work on the cache is noted in `<folder>/stages` as it begins."""
    notes = os.open(f"{folder}/stages", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noting(stage: str, slow: float) -> Callable[..., Any]:
        def note(original: Any, *args: Any, **kwargs: Any) -> Any:
            os.write(notes, f"{stage}\n".encode())
            time.sleep(slow)
            return original(*args, **kwargs)

        return note

    with contextlib.ExitStack() as patches:
        for where, name, stage, slow in STAGES:
            patches.enter_context(wrapped(where, name, noting(stage, slow)))
        patches.enter_context(patch.object(store, "SHARD_BYTES", 10_000))
        patches.enter_context(patch.object(fill, "_ROWS_AT_ONCE", 2))
        patches.callback(os.close, notes)
        os.write(notes, b"begin\n")
        return run_job(job)


@job
def train_counting_loads(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; how often this rank loaded the teacher, for how many samples it ran it, and whether
    it still holds it at the end."""
    loads: list[int] = []
    ran: list[int] = []
    kept: list[Any] = []

    def load(original: Any, *args: Any) -> Any:
        loads.append(1)
        return original(*args)

    def run(original: Any, teacher: Any, batch: Any) -> Any:
        ran.append(len(batch.teacher_labels))
        return original(teacher, batch)

    def begin(original: Any, cache_session: Any) -> None:
        kept.append(cache_session.states)
        original(cache_session)

    with (
        wrapped(live, "load_teacher", load),
        wrapped(LiveTeacher, "states", run),
        wrapped(session.CacheSession, "begin", begin),
    ):
        outcome = train(config)
    return {
        **outcome,
        "loads": len(loads),
        "ran": sum(ran),
        "body": kept[-1].body.is_loaded,
    }


@job
def train_where_files_show_late(
    config: dict[str, Any], rank: int, seconds: float, patience: float
) -> dict[str, Any]:
    """As `train_counting_loads`, where a rank sees shards of others some seconds late.

    Args:
        patience: how long ranks that see unlike files wait for them.
    """
    own: set[str] = set()

    def write(original: Any, *args: Any) -> Any:
        path = original(*args)
        own.add(path.name)
        return path

    def old_or_own(listdir: Any, folder: Any) -> list[str]:
        before = time.time_ns() - int(seconds * 1e9)
        return [
            name
            for name in listdir(folder)
            if not store.is_shard(name) or name in own or int(name.split("-")[1]) < before
        ]

    with contextlib.ExitStack() as patches:
        if this_rank() == rank:
            patches.enter_context(wrapped(store, "write_shard", write))
            patches.enter_context(wrapped(os, "listdir", old_or_own))
        patches.enter_context(_patience(patience))
        return train_counting_loads(config)


@job
def train_on_a_full_disk(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """As `train_counting_loads`, where one rank can write no samples."""
    with on_a_full_disk(store, "write_shard", rank), _patience(0.4):
        return train_counting_loads(config)


@job
def train_on_a_disk_of_its_own(config: dict[str, Any]) -> dict[str, Any]:
    """As `train_counting_loads`, where ranks are on two machines and share no folder."""
    config["dskd"]["teacher"]["cache"]["path"] += f"-{this_rank()}"
    with _patience(0.4):
        return train_counting_loads(config)


@job
def train_where_the_teacher_fails(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """`train`, where one rank cannot load the teacher."""

    def load(original: Any, *args: Any) -> Any:
        if this_rank() == rank:
            raise ValueError("no memory for the teacher")
        return original(*args)

    with wrapped(live, "load_teacher", load):
        return train(config)


def _patience(seconds: float) -> Any:
    """A context in which ranks that see unlike files wait so long for them."""
    return patch.object(session, "_LATE_SECONDS", seconds)
