"""Whatever happens to the cache's files, training ends as it would have without a cache."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from axolotl_dskd.cache import Codec, RowStore, folder_status, shard_paths, verify_shard
from axolotl_dskd.cache import store as store_module
from axolotl_dskd.teacher.cached.fill import CacheableRows, fill, missing_rows
from axolotl_dskd.teacher.cached.session import CacheSession
from axolotl_dskd.teacher.cached.states import Body, CachedStates
from axolotl_dskd.teacher.cached.tables import EmbeddingTable
from axolotl_dskd.teacher.live import LiveTeacher
from tests.support import tiny

pytestmark = pytest.mark.slow

Train = Callable[[dict[str, Any]], Any]
CPU = torch.device("cpu")


def rows(count: int) -> CacheableRows:
    generator = np.random.default_rng(0)
    ids = [generator.integers(3, 97, generator.integers(4, 40)).tolist() for _ in range(count)]
    labels = [[-100] * (len(i) // 3) + i[len(i) // 3 :] for i in ids]
    return CacheableRows([Dataset.from_dict({"teacher_input_ids": ids, "teacher_labels": labels})])


def opened(folder: Path) -> CachedStates:
    teacher = LiveTeacher(tiny.tiny_llama(97, 32, seed=0), 97, CPU)
    codec = Codec("float32", 32)
    store = RowStore(folder, codec.bytes_per_token)
    table = EmbeddingTable.of(teacher.model.get_input_embeddings())
    return CachedStates(store, codec, teacher.head, table, Body(lambda: teacher))


def fill_all(folder: Path, some: CacheableRows, seed: int) -> None:
    """What a process of `axolotl-dskd cache write` does, in small shards."""
    torch.set_num_threads(1)
    store_module.SHARD_BYTES = 20_000
    states = opened(folder)
    todo = missing_rows(states, some)
    for part in np.array_split(np.random.default_rng(seed).permutation(todo), 1 + len(todo) // 8):
        fill(states, some, part)


def fork(*args: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=fill_all, args=args)
    process.start()
    return process


def assert_right(folder: Path, some: CacheableRows) -> int:
    """Every sample that is there is the live teacher's; how many there are."""
    states = opened(folder)
    missing = set(missing_rows(states, some).tolist())
    batch = some.batch(np.arange(len(some)), 0, CPU)
    hidden, tokens = states.body.get().states(batch)
    there = 0
    for row, key in enumerate(some.keys):
        expected = hidden[tokens.sample_ids == row]
        out = np.empty((len(expected), states.codec.bytes_per_token), np.uint8)
        if states.store.read_into(bytes(key), out):
            found = states.codec.decode(torch.from_numpy(out), torch.float32)
            torch.testing.assert_close(found, expected)
            there += 1
        else:
            assert row in missing
    assert not states.store.damage
    return there


def test_killed_twenty_times_at_random_it_loses_no_written_sample_and_ends_complete(
    tmp_path: Path,
):
    some, chance = rows(600), random.Random(1)
    there = 0
    for number in range(20):
        process = fork(tmp_path, some, number)
        time.sleep(chance.uniform(0.05, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = assert_right(tmp_path, some)
        assert now >= there
        there = now
    assert there > 0
    fork(tmp_path, some, 99).join()
    assert assert_right(tmp_path, some) == len(some)


def test_what_was_computed_before_an_interruption_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    some, compute, calls = rows(200), CachedStates.compute, [0]

    def interrupted(self: CachedStates, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return compute(self, *args)

    monkeypatch.setattr(CachedStates, "compute", interrupted)
    states = opened(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill(states, some, missing_rows(states, some))
    assert assert_right(tmp_path, some) == 128


def test_four_processes_fill_one_folder_at_once(tmp_path: Path):
    some = rows(200)
    processes = [fork(tmp_path, some, seed) for seed in range(4)]
    while any(process.is_alive() for process in processes):
        assert_right(tmp_path, some)
    assert [process.exitcode for process in processes] == [0] * 4
    assert assert_right(tmp_path, some) == len(some)


# ---- training on damaged files -----------------------------------------------------------------


def config(folder: Path, cache: Path | None, **overrides: Any) -> dict[str, Any]:
    teacher: dict[str, Any] = {"base_model": str(folder / "teacher")}
    if cache is not None:
        teacher["cache"] = {"path": str(cache), "dtype": "float32"}
    settings = {"max_steps": None, "num_epochs": 1, "dskd": {"teacher": teacher}, **overrides}
    return tiny.base_config(folder, **settings)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def kinds(cache: Path) -> dict[str, Path]:
    """One file of every kind."""
    return {
        "shard": next(cache.glob("*/states-*.safetensors")),
        "head": next(cache.glob("*/head.safetensors")),
        "teacher": next(cache.glob("*/teacher.json")),
        "weights": cache / "weights.json",
    }


def test_every_kind_of_file_cut_or_flipped_ends_in_the_same_training(
    pair_folder: Path, train: Train, cache_warnings: list[str]
):
    plain = losses(train(config(pair_folder, None))[1])
    cache = pair_folder / "cache"
    assert losses(train(config(pair_folder, cache))[1]) == pytest.approx(plain, rel=1e-6)
    files = {p.relative_to(cache) for p in cache.rglob("*") if p.is_file()}
    assert len(files) == len(kinds(cache))  # there is no kind that this test forgets
    damage = [("shard", flip, 0.9), ("shard", flip, 0.001), ("shard", cut, 0.5), ("shard", cut, 0)]
    damage += [("head", flip, 0.7), ("head", cut, 0.4)]
    damage += [("teacher", cut, 0.5), ("weights", flip, 0.5), ("weights", cut, 0.3)]
    for kind, harm, share in damage:
        path = kinds(cache)[kind]
        harm(path, share)
        cache_warnings.clear()
        found = losses(train(config(pair_folder, cache))[1])
        assert found == pytest.approx(plain, rel=1e-6), (kind, harm.__name__, share)
        if kind in ("shard", "head", "weights"):
            assert any(f"{path} is damaged" in said for said in cache_warnings), (kind, share)
        for shard in shard_paths(path.parent):
            verify_shard(shard)


def test_damage_while_a_run_reads_is_computed_anew_by_that_run(
    pair_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    cache = pair_folder / "cache"
    plain = losses(train(config(pair_folder, None, num_epochs=3))[1])
    train(config(pair_folder, cache))
    start = CacheSession.end_epoch

    def harmed(self: Any, *, more: bool) -> None:
        if more:
            for shard in cache.glob("*/states-*.safetensors"):
                cut(shard, 0.6)
        start(self, more=more)

    monkeypatch.setattr(CacheSession, "end_epoch", harmed)
    _, trainer = train(config(pair_folder, cache, num_epochs=3))
    assert losses(trainer) == pytest.approx(plain, rel=1e-6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_in_the_same_training(
    pair_folder: Path,
    small_disk: Path,
    train: Train,
    cache_warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 20_000)
    plain = losses(train(config(pair_folder, None, num_epochs=2))[1])
    found = losses(train(config(pair_folder, small_disk, num_epochs=2))[1])
    assert found == pytest.approx(plain, rel=1e-6)
    assert any("takes no more samples" in said for said in cache_warnings)
    assert any("No space left" in said for said in cache_warnings)
    assert folder_status(small_disk).free < 40_000
    assert not list(small_disk.rglob("*.tmp"))
    again = losses(train(config(pair_folder, small_disk, num_epochs=2))[1])
    assert again == pytest.approx(plain, rel=1e-6)
