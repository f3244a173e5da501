"""`axolotl-dskd cache`: the teacher run once ahead of training, and upkeep of what it wrote.

Joins Axolotl's data pipeline with the teacher and its cache, as the trainer does.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
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
    folder_status,
    write_json,
)
from axolotl_dskd.config import DSKDConfig
from axolotl_dskd.data.routing import rows_of_teacher
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.progress import quantity
from axolotl_dskd.teacher import TeacherSpec
from axolotl_dskd.teacher.cached.fidelity import Fidelity, storage_fidelity
from axolotl_dskd.teacher.cached.fill import CacheableRows, describe, fill, missing_rows
from axolotl_dskd.teacher.cached.open import (
    TABLES,
    cache_settings,
    open_cache,
)
from axolotl_dskd.teacher.cached.states import CachedStates

LOG = get_logger(__name__)

FIDELITY = "fidelity.json"
_PROBE_TOKENS = 2048


def spec_of(config: DSKDConfig) -> TeacherSpec:
    """The configured teacher, on the first GPU if there is one.

    Raises:
        ValueError: training needs none.
    """
    if not config.opens_teacher:
        raise ValueError(
            "kd_ratio is 0: training needs no teacher, so there is nothing to cache. With "
            "evaluation: {teacher: true} evaluations would."
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return TeacherSpec(config.one_teacher, vocabulary_size(load_teacher_tokenizer(config)), device)


def cached_teachers(config: DSKDConfig) -> Iterator[tuple[int, DSKDConfig]]:
    """Number and configuration of each teacher that has a cache; of the first where none has."""
    each = list(enumerate(config.each().items()))
    cached = [(number, named) for number, named in each if named[1].one_teacher.cache]
    for number, (name, one) in cached or each[:1]:
        if name:
            LOG.info(f"Teacher {name}")
        yield number, one


def rows_are_answered(config: DSKDConfig) -> bool:
    """Whether other rows than the data's are trained on: the teacher writes their answers when
    training begins, and nobody knows them before."""
    return config.uses_teacher and config.samples.source == "teacher"


def rows_of(cfg: Any, teacher: int = 0, *, ahead: bool = False) -> CacheableRows:
    """The distinct samples of a configuration's datasets, which are prepared if they are not; those
    of evaluations alone where training asks no teacher.

    Args:
        teacher: of several, the number of the one that the samples ask.
        ahead: leave out those that are still to be answered by a teacher.

    Raises:
        ValueError: no row would ask a teacher.
    """
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    evaluation = meta.eval_dataset
    parts = list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    config = DSKDConfig.of(cfg)
    trains = config is None or config.uses_teacher
    answered = ahead and config is not None and rows_are_answered(config)
    train = meta.train_dataset if trains and not answered else None
    datasets = [d for d in (train, *parts) if d is not None]
    if not datasets and answered:
        raise ValueError(
            "samples: teacher: the teacher answers the rows when training begins, and its states "
            "of them are cached then; nothing is held out, so there is nothing to cache ahead."
        )
    if not datasets:
        raise ValueError(
            "kd_ratio is 0 and nothing is held out, so there is nothing to cache. Set val_set_size "
            "or test_datasets."
        )
    return CacheableRows([rows_of_teacher(d, teacher) for d in datasets])


def write_cache(
    cfg: Any,
    config: DSKDConfig,
    out: TextIO,
    *,
    part: tuple[int, int] = (0, 1),
    teacher: int = 0,
) -> None:
    """Cache every row of the configuration's datasets; those that are cached are skipped.

    Args:
        cfg: Axolotl's validated configuration.
        config: its `dskd:` block with one teacher.
        out: what was done is said there.
        part: do the rows of this number out of so many, from 0: one process per GPU.
        teacher: its number.

    Raises:
        ValueError: the teacher cannot be used, or there is not enough room.
        OSError: the cache's folder cannot be written.
    """
    spec = spec_of(config)
    _check_writable(Path(cache_settings(spec).path))
    rows = rows_of(cfg, teacher, ahead=True)
    if not len(rows):
        print("No row asks this teacher: there is nothing to cache.", file=out)
        return
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
        print_fidelity(fidelity, int(rows.tokens.sum()), out)
        write_json(store.folder / FIDELITY, {f.storage: f.as_dict() for f in fidelity})
    left = missing_rows(states, rows)
    if not len(left):
        print(f"Complete: {_what_is_left(config)}.", file=out)
    elif part[1] > 1:
        print(f"This part is done; {len(left):,} samples are other parts'.", file=out)


def _what_is_left(config: DSKDConfig) -> str:
    """When training still needs the teacher's layers, in words."""
    if rows_are_answered(config):
        return (
            "training loads the teacher's layers to answer the rows and to read its answers, which "
            "are cached then; of what is held out it has all"
        )
    if config.samples.source == "student" and config.uses_teacher:
        return "training runs the teacher's layers for what the student writes alone"
    return "training on this configuration never loads the teacher's layers"


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


def print_fidelity(fidelity: list[Fidelity], tokens: int, out: TextIO) -> None:
    """Print what each storage type loses, and what so many tokens take in it."""
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
    console(out).print(table)


def console(out: TextIO) -> Console:
    """Rich takes 80 columns where there is no terminal, and would cut paths."""
    return Console(file=out, width=None if out.isatty() else 120)
