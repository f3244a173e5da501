"""Upkeep of what `axolotl-dskd cache write` has written: what is there, damaged, or not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from rich.table import Table

from axolotl_dskd.cache import (
    Damaged,
    Plan,
    ShardIndex,
    folder_status,
    plan_prune,
    prune,
    read_json,
    shard_paths,
    verify_shard,
)
from axolotl_dskd.commands.cache import (
    FIDELITY,
    cached_teachers,
    console,
    print_fidelity,
    rows_are_answered,
    rows_of,
    spec_of,
)
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.progress import Progress, quantity
from axolotl_dskd.teacher.cached.fidelity import STORAGES, Fidelity
from axolotl_dskd.teacher.cached.fill import describe
from axolotl_dskd.teacher.cached.open import IDENTITY, TABLES, CacheFolder
from axolotl_dskd.teacher.cached.tables import read_tables

LOG = get_logger(__name__)


def verify_cache(config: DSKDConfig) -> list[str]:
    """Read every byte and take damaged samples out.

    Returns:
        What was damaged, file by file.

    Raises:
        ValueError: there is no such teacher, or nothing of it is cached.
    """
    spec = spec_of(config)
    folder = CacheFolder.of(spec)
    if not folder.path.exists():
        content = folder.identity.content
        what = " ".join(filter(None, (content[key] for key in ("dtype", "quantisation"))))
        raise ValueError(
            f"nothing is cached of this teacher ({what}) yet: there is no {folder.path}"
        )
    damage = []
    paths = shard_paths(folder.path)
    sizes = [path.stat().st_size for path in paths]
    with Progress(f"Checking {folder.path}", sum(sizes), "bytes") as progress:
        for path, size in zip(paths, sizes, strict=True):
            if lost := verify_shard(path):
                damage.append(lost)
            progress.advance(size)
    for name, read in (
        (TABLES, lambda path: read_tables(path, spec.vocab_size, torch.device("cpu"))),
        (IDENTITY, read_json),
        (FIDELITY, read_json),
    ):
        path = folder.path / name
        try:
            read(path)
        except Damaged as error:
            path.unlink(missing_ok=True)
            damage.append(str(error))
    return damage


def show_cache(cfg: Any, config: DSKDConfig, out: TextIO, *, teacher: int = 0) -> None:
    """Say what the folder holds, and how much of the configuration's rows.

    Raises:
        ValueError: there is no such teacher, or nothing of it is to be cached.
    """
    folder = CacheFolder.of(spec_of(config))
    status = folder_status(folder.root)
    used, free = quantity(status.used, "bytes"), quantity(status.free, "bytes")
    print(f"{folder.root}: {used} used, {free} free", file=out)
    table = Table()
    for head in ("teacher", "dtype", "storage", "samples", "tokens", "bytes", ""):
        table.add_column(
            head, justify="right" if head in ("samples", "tokens", "bytes") else "left"
        )
    for path in _teachers(folder.root):
        table.add_row(*_line(path), "this configuration" if path == folder.path else "")
    console(out).print(table)
    if rows_are_answered(config):
        print(
            "This configuration: the teacher answers its rows when training begins (samples: "
            "teacher); which of the samples are theirs is known then.",
            file=out,
        )
        return
    rows = rows_of(cfg, teacher)
    index = ShardIndex(folder.path)
    width = index.shards[0].bytes_per_token if index.shards else 0
    missing = np.flatnonzero(index.missing(rows.keys))
    print(f"This configuration: {describe(rows, missing, width)}", file=out)
    if (note := _note(folder.path / FIDELITY)) is not None:
        fidelity = [Fidelity(**note[storage]) for storage in STORAGES]
        print_fidelity(fidelity, int(rows.tokens.sum()), out)
    if status.abandoned:
        count = len(status.abandoned)
        print(f"{count} files of killed processes; `cache prune` removes them.", file=out)


def _teachers(root: Path) -> list[Path]:
    """The folders of all teachers below a root."""
    return sorted(path.parent for path in root.glob(f"*/{IDENTITY}"))


def _note(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except Damaged as error:
        LOG.warning(str(error))
        return None


def _line(folder: Path) -> list[str]:
    note = _note(folder / IDENTITY) or {}
    content = note.get("content", {})
    shards = ShardIndex(folder).shards
    return [
        str(note.get("base_model", "?")),
        " ".join(filter(None, (content.get("dtype", "?"), content.get("quantisation")))),
        folder.name.rpartition("-")[2],
        f"{sum(len(shard.keys) for shard in shards):,}",
        f"{sum(int(shard.ends[-1]) for shard in shards):,}",
        quantity(folder_status(folder).used, "bytes"),
    ]


def prune_cache(
    cfg: Any, config: DSKDConfig, *, teacher: int = 0, others: Sequence[Path] = ()
) -> tuple[Plan, list[str]]:
    """What in the cache's folder this configuration has no use for; nothing is removed yet.

    Args:
        cfg: Axolotl's validated configuration.
        config: its `dskd:` block with one teacher.
        teacher: its number.
        others: folders of its other teachers, which stay.

    Returns:
        The plan and its lines in words.

    Raises:
        ValueError: there is no such teacher, or nothing of it is to be cached.
    """
    folder = CacheFolder.of(spec_of(config))
    if rows_are_answered(config):
        LOG.warning(
            f"{folder.path} stays as it is: training asks about rows that the teacher answers when "
            "it begins (samples: teacher), so which samples are used is not known here"
        )
        plan = Plan()
    else:
        plan = plan_prune(folder.path, rows_of(cfg, teacher).keys)
    for path in folder_status(folder.root).abandoned:
        plan.drop(path, "left by a killed process")
    lines = [f"{path}: {why}" for path, why in plan.remove]
    lines += [
        f"{shard.path}: {len(shard.keys) - len(stay)} of {len(shard.keys)} samples that this "
        "configuration does not use, or that stand there twice"
        for shard, stay in plan.rewrite
    ]
    for other in _teachers(folder.root):
        if other == folder.path or other in others:
            continue
        if config.one_teacher.dtype == "auto" and _only_dtype_differs(folder, other):
            LOG.warning(f"{other} stays: it is of this teacher where dtype auto is another")
            continue
        lines.append(f"{other}: another teacher or storage ({', '.join(_line(other)[:3])})")
        for path in other.iterdir():
            plan.drop(path, "")
    return plan, lines


def prune_caches(cfg: Any, config: DSKDConfig) -> Iterator[tuple[Plan, list[str]]]:
    """`prune_cache` for each cached teacher of a configuration.

    Raises:
        ValueError: see there.
    """
    cached = list(cached_teachers(config))
    folders = [CacheFolder.of(spec_of(one)).path for _, one in cached]
    for number, one in cached:
        yield prune_cache(cfg, one, teacher=number, others=folders)


def _only_dtype_differs(folder: CacheFolder, other: Path) -> bool:
    """Whether another folder may be this one on another machine, say one that has a GPU."""
    content = (_note(other / IDENTITY) or {}).get("content", {})
    ours = folder.identity.content
    return {**content, "dtype": ours["dtype"]} == ours and other.name.endswith(f"-{folder.storage}")


def carry_out(plan: Plan) -> str:
    """Remove what is planned.

    Returns:
        How much that freed, in words.
    """
    steps = len(plan.remove) + len(plan.rewrite)
    with Progress("Pruning", steps, "files") as progress:
        prune(plan, progress.advance)
    for folder in {path.parent for path, _ in plan.remove}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return f"Freed about {quantity(plan.saved, 'bytes')}"
