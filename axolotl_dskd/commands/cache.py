"""`axolotl-dskd cache`: the teacher run once ahead of training, and upkeep of what it wrote.

Joins Axolotl's data pipeline with the teacher and its cache, as the trainer does.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.common.datasets import load_datasets
from axolotl.utils.logging import get_logger
from rich.console import Console
from rich.table import Table

from axolotl_dskd.cache import (
    TEMPORARY,
    Damaged,
    Plan,
    ShardIndex,
    folder_status,
    plan_prune,
    prune,
    read_json,
    shard_paths,
    verify_shard,
    write_json,
)
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.progress import Progress, quantity
from axolotl_dskd.teacher import TeacherSpec
from axolotl_dskd.teacher.cached.fidelity import STORAGES, Fidelity, storage_fidelity
from axolotl_dskd.teacher.cached.fill import CacheableRows, describe, fill, missing_rows
from axolotl_dskd.teacher.cached.open import (
    IDENTITY,
    TABLES,
    CacheFolder,
    cache_settings,
    open_cache,
)
from axolotl_dskd.teacher.cached.states import CachedStates
from axolotl_dskd.teacher.cached.tables import read_tables

LOG = get_logger(__name__)

FIDELITY = "fidelity.json"
_PROBE_TOKENS = 2048


def _spec(config: DSKDConfig) -> TeacherSpec:
    """The configured teacher, on the first GPU if there is one.

    Raises:
        ValueError: training needs none.
    """
    if not config.uses_teacher:
        raise ValueError("kd_ratio is 0: training needs no teacher, so there is nothing to cache.")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return TeacherSpec(config.one_teacher, vocabulary_size(load_teacher_tokenizer(config)), device)


def rows_of(cfg: Any) -> CacheableRows:
    """The distinct samples of a configuration's datasets, which are prepared if they are not."""
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    evaluation = meta.eval_dataset
    parts = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    return CacheableRows([d for d in (meta.train_dataset, *parts) if d is not None])


def write_cache(
    cfg: Any, config: DSKDConfig, out: TextIO, *, part: tuple[int, int] = (0, 1)
) -> None:
    """Cache every row of the configuration's datasets; those that are cached are skipped.

    Args:
        cfg: Axolotl's validated configuration.
        config: its `dskd:` block.
        out: what was done is said there.
        part: do the rows of this number out of so many, from 0: one process per GPU.

    Raises:
        ValueError: the teacher cannot be used, or there is not enough room.
        OSError: the cache's folder cannot be written.
    """
    spec = _spec(config)
    _check_writable(Path(cache_settings(spec).path))
    rows = rows_of(cfg)
    states = open_cache(spec)
    store = states.store
    missing = missing_rows(states, rows, part)
    width = states.codec.bytes_per_token
    print(f"{store.folder}: {describe(rows, missing_rows(states, rows), width)}", file=out)
    out.flush()
    if len(missing):
        _check_room(states, int(rows.tokens[missing].sum()) * width)
        fill(states, rows, missing)
    if store.full is not None or not (store.folder / TABLES).exists():
        raise ValueError(
            f"the cache takes no more: {store.full or 'no room for head and embedding'}. What was "
            "written stays; free space (or raise max_size, use dtype int8 or int4, or remove what "
            "other runs left with `axolotl-dskd cache prune CONFIG`) and run this again."
        )
    if states.body.is_loaded:
        fidelity = _measure(states, rows)
        _print_fidelity(fidelity, int(rows.tokens.sum()), out)
        write_json(store.folder / FIDELITY, {f.storage: f.as_dict() for f in fidelity})
    left = missing_rows(states, rows)
    if not len(left):
        print(
            "Complete: training on this configuration never loads the teacher's layers.", file=out
        )
    elif part[1] > 1:
        print(f"This part is done; {len(left):,} samples are other parts'.", file=out)


def _check_writable(root: Path) -> None:
    """Before hours of work, not after.

    Raises:
        ValueError: nothing can be written there.
    """
    probe = root / f".{secrets.token_hex(4)}{TEMPORARY}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"dskd.teacher.cache.path: nothing can be written to {root} ({error.strerror}). "
            "Name a folder on a disk with room."
        ) from error


def _check_room(states: CachedStates, needed: int) -> None:
    store = states.store
    status = folder_status(store.root)
    what = (
        f"{quantity(needed, 'bytes')} are to be written as {states.codec.storage}, but "
        "{room}. Smaller: dskd.teacher.cache.dtype int8 takes about half of bfloat16, int4 about "
        "a quarter. What other runs left goes with `axolotl-dskd cache prune CONFIG`."
    )
    if store.max_bytes is not None and status.used + needed > store.max_bytes:
        used, limit = quantity(status.used, "bytes"), quantity(store.max_bytes, "bytes")
        raise ValueError(what.format(room=f"{store.root} has {used} of max_size {limit} already"))
    if needed > status.free:
        room = f"the disk of {store.root} has {quantity(status.free, 'bytes')} free"
        raise ValueError(what.format(room=room))


def _measure(states: CachedStates, rows: CacheableRows) -> list[Fidelity]:
    """What each storage type loses, on random rows of about two thousand supervised tokens."""
    order = np.random.default_rng(0).permutation(len(rows))
    count = int(np.searchsorted(rows.tokens[order].cumsum(), _PROBE_TOKENS)) + 1
    hidden, _ = states.body.get().states(rows.batch(order[:count], 0, states.device))
    return storage_fidelity(hidden[:_PROBE_TOKENS], states.head)


def _print_fidelity(fidelity: list[Fidelity], tokens: int, out: TextIO) -> None:
    table = Table(title=f"What a stored state loses, on {fidelity[0].tokens:,} supervised tokens")
    heads = ("bytes/token", "these datasets", "KL from bfloat16", "its p99", "same first choice")
    table.add_column("dtype")
    for head in heads:
        table.add_column(head, justify="right")
    for line in fidelity:
        same = line.storage == "bfloat16"
        table.add_row(
            line.storage,
            f"{line.bytes_per_token:,}",
            quantity(line.bytes_per_token * tokens, "bytes"),
            "-" if same else f"{line.kl_mean:.1e}",
            "-" if same else f"{line.kl_p99:.1e}",
            "-" if same else f"{line.agreement:.1%}",
        )
    _console(out).print(table)


def _console(out: TextIO) -> Console:
    """Rich takes 80 columns where there is no terminal, and would cut paths."""
    return Console(file=out, width=None if out.isatty() else 120)


def verify_cache(config: DSKDConfig) -> list[str]:
    """Read every byte and take damaged samples out.

    Returns:
        What was damaged, file by file.

    Raises:
        ValueError: there is no such teacher, or nothing of it is cached.
    """
    spec = _spec(config)
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


def show_cache(cfg: Any, config: DSKDConfig, out: TextIO) -> None:
    """Say what the folder holds, and how much of the configuration's rows.

    Raises:
        ValueError: there is no such teacher, or nothing of it is to be cached.
    """
    folder = CacheFolder.of(_spec(config))
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
    _console(out).print(table)
    rows = rows_of(cfg)
    index = ShardIndex(folder.path)
    width = index.shards[0].bytes_per_token if index.shards else 0
    missing = np.flatnonzero(index.missing(rows.keys))
    print(f"This configuration: {describe(rows, missing, width)}", file=out)
    if (note := _note(folder.path / FIDELITY)) is not None:
        fidelity = [Fidelity(**note[storage]) for storage in STORAGES]
        _print_fidelity(fidelity, int(rows.tokens.sum()), out)
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


def prune_cache(cfg: Any, config: DSKDConfig) -> tuple[Plan, list[str]]:
    """What in the cache's folder this configuration has no use for; nothing is removed yet.

    Returns:
        The plan and its lines in words.

    Raises:
        ValueError: there is no such teacher, or nothing of it is to be cached.
    """
    folder = CacheFolder.of(_spec(config))
    plan = plan_prune(folder.path, rows_of(cfg).keys)
    for path in folder_status(folder.root).abandoned:
        plan.drop(path, "left by a killed process")
    lines = [f"{path}: {why}" for path, why in plan.remove]
    lines += [
        f"{shard.path}: {len(shard.keys) - len(stay)} of {len(shard.keys)} samples that this "
        "configuration does not use, or that stand there twice"
        for shard, stay in plan.rewrite
    ]
    for other in _teachers(folder.root):
        if other == folder.path:
            continue
        if config.one_teacher.dtype == "auto" and _only_dtype_differs(folder, other):
            LOG.warning(f"{other} stays: it is of this teacher where dtype auto is another")
            continue
        lines.append(f"{other}: another teacher or storage ({', '.join(_line(other)[:3])})")
        for path in other.iterdir():
            plan.drop(path, "")
    return plan, lines


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
