"""States on disk: what comes back is what was written, or it is not there."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from axolotl_dskd.cache import (
    Codec,
    Damaged,
    RowReader,
    RowStore,
    dataset_keys,
    folder_status,
    plan_prune,
    prune,
    read_json,
    sample_key,
    write_json,
)
from axolotl_dskd.cache import places as places_module
from axolotl_dskd.cache import store as store_module

STORAGES = ("float32", "bfloat16", "int8", "int4")


def states(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Like final hidden states: a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, size, generator=generator)
    hidden[:, ::50] *= 20
    return hidden


@pytest.mark.parametrize("size", [48, 100, 576, 3584])
@pytest.mark.parametrize(
    ("storage", "error"), [("float32", 0), ("bfloat16", 4e-3), ("int8", 0.012), ("int4", 0.12)]
)
def test_what_is_packed_comes_back_within_the_storages_error(storage: str, error: float, size: int):
    codec = Codec(storage, size)
    hidden = states(7, size)
    packed = codec.encode(hidden)
    assert packed.dtype == torch.uint8
    assert packed.shape == (7, codec.bytes_per_token)
    back = codec.decode(packed, torch.float32)
    assert float((back - hidden).norm() / hidden.norm()) <= error


def test_bytes_per_token_are_those_of_the_table():
    assert [Codec(s, 4096).bytes_per_token for s in STORAGES] == [16384, 8192, 4224, 2304]


@pytest.mark.parametrize("storage", STORAGES)
def test_packing_depends_on_no_other_token_and_bfloat16_states_survive_exactly(storage: str):
    codec = Codec(storage, 96)
    hidden = states(9, 96).bfloat16()
    assert torch.equal(codec.encode(hidden)[3:5], codec.encode(hidden[3:5]))
    if storage in ("float32", "bfloat16"):
        assert torch.equal(codec.decode(codec.encode(hidden), torch.bfloat16), hidden)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [0.0, 1e-7, 6e4])
def test_tiny_and_huge_states_stay_finite_and_none_becomes_another(storage: str, value: float):
    codec = Codec(storage, 64)
    back = codec.decode(codec.encode(torch.full((2, 64), value)), torch.float32)
    assert torch.isfinite(back).all()
    assert float((back - value).norm()) <= (0.25 * value + 1e-7) * back.numel() ** 0.5


def test_a_key_is_decided_by_the_tokens_that_the_teacher_reads_and_by_what_is_supervised():
    ids = np.arange(5, 15)
    labels = np.where(np.arange(10) < 4, -100, ids)
    key = sample_key(ids, labels)
    assert len(key) == 16
    assert key == sample_key(ids.astype(np.int32), labels.astype(np.int32))
    other_ids, other_labels = ids.copy(), labels.copy()
    other_ids[1] += 1
    other_labels[5] = -100
    assert len({key, sample_key(other_ids, labels), sample_key(ids, other_labels)}) == 3
    longer = np.append(ids, 99), np.append(labels, -100)
    assert key == sample_key(*longer)  # what stands behind the last supervised token is not read


def test_keys_of_a_dataset_are_those_of_its_rows():
    rows = {
        "teacher_input_ids": [[1, 2, 3, 4], [5, 6, 7]],
        "teacher_labels": [[-100, -100, 3, 4], [5, 6, 7]],
        "other": [0, 1],
    }
    keys, tokens, lengths = dataset_keys(Dataset.from_dict(rows))
    expected = [
        sample_key(np.array(i), np.array(y))
        for i, y in zip(rows["teacher_input_ids"], rows["teacher_labels"], strict=True)
    ]
    assert [bytes(key) for key in keys] == expected
    assert tokens.tolist() == [2, 2]
    assert lengths.tolist() == [4, 3]


WIDTH = 16


def sample(number: int) -> tuple[bytes, np.ndarray]:
    generator = np.random.default_rng(number)
    return generator.bytes(16), generator.integers(0, 256, (1 + number % 5, 16), dtype=np.uint8)


def written(folder: Path, numbers: range, per_shard: int = 10) -> RowStore:
    store = RowStore(folder, WIDTH)
    for number in numbers:
        store.add(*sample(number))
        if number % per_shard == per_shard - 1:
            store.flush()
    store.flush()
    return store


def found(reader: RowReader, number: int) -> bool:
    """Whether a sample is there; what is there must be right."""
    key, packed = sample(number)
    out = np.empty_like(packed)
    if not reader.read_into(key, out):
        return False
    assert np.array_equal(out, packed)
    return True


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("states-*.safetensors"))


def test_every_sample_comes_back_from_any_reader(tmp_path: Path):
    written(tmp_path, range(57))
    assert len(shards(tmp_path)) == 6
    reader = RowReader(tmp_path, WIDTH)
    copied = pickle.loads(pickle.dumps(reader))
    for number in range(57):
        assert found(reader, number)
        assert found(copied, number)
    assert not found(reader, 57)
    keys = np.stack([np.frombuffer(sample(n)[0], np.uint8) for n in range(60)])
    assert reader.missing(keys).tolist() == [False] * 57 + [True] * 3


def test_a_reader_sees_what_another_process_writes_later(tmp_path: Path):
    reader = RowReader(tmp_path / "later", WIDTH)
    assert not found(reader, 3)
    written(tmp_path / "later", range(5))
    assert found(reader, 3)
    written(tmp_path / "later", range(5, 9))
    assert found(reader, 7)


def test_places_are_those_of_all_files_newest_first_and_a_file_more_costs_about_its_keys(
    monkeypatch: pytest.MonkeyPatch,
):
    """A cache of a million rows gets thousands of files, each seen by every data worker."""
    draws = np.random.default_rng(0)
    sorted_before, moved = places_module._sorted, 0

    def counted(*columns: np.ndarray) -> object:
        nonlocal moved
        moved += len(columns[0])
        return sorted_before(*columns)

    monkeypatch.setattr(places_module, "_sorted", counted)
    asked = [draws.bytes(16) for _ in range(5100)]
    places, plain = places_module.Places(), {}
    for number in range(1000):
        ids = draws.choice(5000, 8, replace=False)
        keys = np.frombuffer(b"".join(asked[i] for i in ids), np.uint8)
        places.add(keys.reshape(-1, 16), number)
        for row, i in enumerate(ids.tolist()):
            plain.setdefault(i, []).insert(0, (number, row))
    assert [places.of(key) for key in asked] == [plain.get(i, []) for i in range(5100)]
    flat = np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16)
    assert places.missing(flat).tolist() == [i not in plain for i in range(5100)]
    assert moved < 30 * 8000  # 500 times all keys, if each file had them sorted again


def test_a_folder_that_others_write_to_is_not_listed_for_every_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written(tmp_path, range(5))
    reader = RowReader(tmp_path, WIDTH)
    lately = time.time() - 0.5
    os.utime(tmp_path, (lately, lately))
    listed, list_folder = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or list_folder(path))
    assert not any(found(reader, number) for number in range(100, 200))
    assert len(listed) < 10


def test_a_shard_that_cannot_be_read_is_said_and_the_others_are(
    tmp_path: Path, cache_warnings: list[str]
):
    """As one that another user's umask keeps for himself."""
    written(tmp_path, range(5))
    (tmp_path / "states-1-f.safetensors").mkdir()
    reader = RowReader(tmp_path, WIDTH)
    assert all(found(reader, number) for number in range(5))
    assert not found(reader, 7)
    (warning,) = cache_warnings
    assert "states-1-f.safetensors" in warning
    assert "it cannot be read" in warning


def test_samples_that_wait_to_be_written_can_be_read_by_their_writer_alone(tmp_path: Path):
    store = RowStore(tmp_path, WIDTH)
    store.add(*sample(1))
    assert found(store, 1)
    assert not found(RowReader(tmp_path, WIDTH), 1)


def test_shards_are_plain_safetensors(tmp_path: Path):
    from safetensors.numpy import load_file

    written(tmp_path, range(3))
    tensors = load_file(shards(tmp_path)[0])
    assert np.array_equal(tensors["states"], np.concatenate([sample(n)[1] for n in range(3)]))


def test_any_flipped_byte_costs_samples_but_never_gives_a_wrong_one(tmp_path: Path):
    written(tmp_path, range(6), per_shard=6)
    path = shards(tmp_path)[0]
    intact = path.read_bytes()
    for at in range(len(intact)):
        damaged = bytearray(intact)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        reader = RowReader(tmp_path, WIDTH)
        there = [found(reader, number) for number in range(6)]
        if not all(there):
            assert str(path) in reader.damage[path]
    path.write_bytes(intact)
    assert all(found(RowReader(tmp_path, WIDTH), number) for number in range(6))


def test_a_file_cut_anywhere_also_while_it_is_open_is_noticed(tmp_path: Path):
    written(tmp_path, range(6), per_shard=6)
    path = shards(tmp_path)[0]
    intact = path.read_bytes()
    open_before = RowReader(tmp_path, WIDTH)
    assert found(open_before, 0)
    for size in range(0, len(intact), 7):
        os.truncate(path, size)
        reader = RowReader(tmp_path, WIDTH)
        assert not any(found(reader, number) for number in range(6))
        assert path in reader.damage
        path.write_bytes(intact)
    os.truncate(path, len(intact) - 20)
    assert not found(open_before, 5)
    assert "ends too early" in open_before.damage[path]


def test_a_sample_written_again_is_read_from_the_intact_shard(tmp_path: Path):
    written(tmp_path, range(3), per_shard=3)
    first = shards(tmp_path)[0]
    written(tmp_path, range(3), per_shard=3)
    second = shards(tmp_path)[1]
    for damaged in (first, second):
        intact = damaged.read_bytes()
        damaged.write_bytes(intact[:-30] + bytes(30))
        assert all(found(RowReader(tmp_path, WIDTH), number) for number in range(3))
        damaged.write_bytes(intact)


def test_a_shard_that_was_pruned_under_a_reader_is_no_error(tmp_path: Path):
    written(tmp_path, range(3))
    reader = RowReader(tmp_path, WIDTH)
    shards(tmp_path)[0].unlink()
    assert not found(reader, 1)
    written(tmp_path, range(3))
    assert found(reader, 1)


def test_of_samples_that_stand_there_twice_pruning_keeps_the_newer(tmp_path: Path):
    written(tmp_path, range(4), per_shard=4)
    written(tmp_path, range(2, 6), per_shard=6)
    old, new = shards(tmp_path)
    wanted = np.stack([np.frombuffer(sample(n)[0], np.uint8) for n in range(5)])
    prune(plan_prune(tmp_path, wanted))
    assert not {old, new} & set(shards(tmp_path))
    assert all(found(RowReader(tmp_path, WIDTH), number) for number in range(5))
    assert not found(RowReader(tmp_path, WIDTH), 5)
    assert sum(len(shard.keys) for shard in RowReader(tmp_path, WIDTH).shards) == 5
    assert not plan_prune(tmp_path, wanted).rewrite


def test_max_size_is_kept_and_said(tmp_path: Path, cache_warnings: list[str]):
    store = RowStore(tmp_path, WIDTH, max_bytes=3000)
    for number in range(100):
        store.add(*sample(number))
        store.flush()
    assert store.full is not None
    assert 1500 < folder_status(tmp_path).used <= 3000
    assert len(cache_warnings) == 1
    assert "takes no more samples" in cache_warnings[0]
    assert "would exceed max_size" in cache_warnings[0]


def test_a_disk_that_takes_no_more_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(store_module, "SHARD_BYTES", 400)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = RowStore(tmp_path, WIDTH)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # smaller than any shard here
    try:
        for number in range(50):
            store.add(*sample(number))
        store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert store.full is not None
    assert not list(tmp_path.iterdir())


def test_a_file_gets_its_name_after_its_content_is_on_the_disk_and_then_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "content")
        fsync(descriptor)

    def renaming(self: Path, target: Path) -> Path:
        done.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", renaming)
    write_json(tmp_path / "note.json", {})
    assert done == ["content", "name", "folder"]


def test_json_that_was_damaged_is_noticed(tmp_path: Path):
    path = tmp_path / "note.json"
    assert read_json(path) is None
    write_json(path, {"a": "b", "n": [1, 2]})
    intact = path.read_bytes()
    assert read_json(path) == {"a": "b", "n": [1, 2]}
    for at in range(len(intact)):
        path.write_bytes(intact[:at] + bytes([intact[at] ^ 2]) + intact[at + 1 :])
        try:
            assert read_json(path) == {"a": "b", "n": [1, 2]}  # only white space changed
        except Damaged as error:
            assert str(path) in str(error)
