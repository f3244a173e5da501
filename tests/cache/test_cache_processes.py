"""The cache under real processes: killed at random moments, and several training ranks on one."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from axolotl_dskd.cache import ShardIndex, shard_paths, verify_shard
from tests.support import tiny
from tests.support.ranks import Result, kill_during, launch, run

EPOCHS, ROWS = 3, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of models, rows and what the runs write."""
    folder = tmp_path_factory.mktemp("cache-processes")
    tiny.save_pair(folder)
    tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(42))
    return folder


def config(folder: Path, cache: str | None, rows: int = ROWS, **overrides: Any) -> dict[str, Any]:
    """Four steps an epoch."""
    teacher: dict[str, Any] = {"base_model": str(folder / "teacher")}
    if cache:
        teacher["cache"] = {"path": str(folder / cache), "dtype": "float32"}
    settings = {
        "num_epochs": EPOCHS,
        "max_steps": None,
        "dskd": {"teacher": teacher},
        "output_dir": str(folder / f"out-{cache}"),
        "max_grad_norm": 1.0,
        "adam_epsilon": 1e-6,
    }
    made = tiny.base_config(folder, **{**settings, **overrides})
    made["datasets"] = [made["datasets"][0] | {"split": f"train[:{rows}]"}]
    return made


@pytest.fixture(scope="module")
def live(folder: Path) -> list[float]:
    """One process that runs the teacher in every step."""
    [result] = run(1, {"do": "train", "config": config(folder, None)})
    assert len(result["losses"]) == EPOCHS * ROWS // 4
    return result["losses"]


# ---- several ranks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(folder: Path, live: list[float]) -> dict[str, list[Result]]:
    """What both of two ranks found, one job after the other."""

    def job(do: str, cache: str, **arguments: Any) -> dict[str, Any]:
        return {"do": do, "config": config(folder, cache, micro_batch_size=2), **arguments}

    late = "train_where_files_show_late"
    jobs = {
        "filled": job("train_counting_loads", "shared"),
        "read": job("train_counting_loads", "shared"),
        "late": job(late, "late", rank=1, seconds=1.0, patience=10.0),
        "too late": job(late, "too-late", rank=1, seconds=1e4, patience=0.4),
        "full": job("train_on_a_full_disk", "full", rank=1),
        "apart": job("train_on_a_disk_of_its_own", "apart"),
    }
    path = folder / "forty.yaml"
    path.write_text(yaml.safe_dump(config(folder, "few", 40)))
    run(1, {"do": "cache", "arguments": ["write", str(path)]})
    few = config(folder, "few", 42, micro_batch_size=2, max_steps=1)
    jobs["few"] = {"do": "train_counting_loads", "config": few}
    results = launch(2, list(jobs.values()), timeout=600)
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("what", ["filled", "read", "late", "too late", "full", "apart"])
def test_two_ranks_on_a_cache_train_as_one_process_with_the_live_teacher(
    ranks: dict[str, list[Result]], live: list[float], what: str
):
    one, two = ranks[what]
    assert one["losses"] == pytest.approx(live, rel=1e-5), one
    for part in ("student", "projectors"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(two[part][name], tensor, rtol=0, atol=0)


def test_ranks_share_the_work_of_the_first_epoch_and_none_loads_a_cached_teacher(
    ranks: dict[str, list[Result]],
):
    assert sum(rank["ran"] for rank in ranks["filled"]) == ROWS
    assert [rank["loads"] for rank in ranks["filled"]] == [1, 1]
    assert [rank["ran"] for rank in ranks["read"]] == [0, 0]
    assert [rank["loads"] for rank in ranks["read"]] == [0, 0]


def test_ranks_share_the_few_samples_that_are_missing_and_compute_them_before_training(
    ranks: dict[str, list[Result]],
):
    assert sum(rank["ran"] for rank in ranks["few"]) == 2
    assert not any(rank["body"] for rank in ranks["few"])


def test_files_that_show_late_are_waited_for_or_computed_again(ranks: dict[str, list[Result]]):
    assert sum(rank["ran"] for rank in ranks["late"]) == ROWS
    first, late = (rank["ran"] for rank in ranks["too late"])
    assert first < ROWS
    assert late == ROWS
    assert [rank["body"] for rank in ranks["too late"]] == [False, False]


def test_a_rank_whose_disk_is_full_keeps_the_teacher_and_so_do_the_others(
    ranks: dict[str, list[Result]],
):
    assert [rank["body"] for rank in ranks["full"]] == [True, True]


def test_ranks_with_a_disk_each_have_all_they_need_after_the_first_epoch(
    ranks: dict[str, list[Result]],
):
    for rank in ranks["apart"]:
        assert rank["ran"] == ROWS
        assert not rank["body"]


def test_a_rank_that_cannot_load_the_teacher_stops_all(folder: Path, live: list[float]):
    job = config(folder, "fails", micro_batch_size=2)
    done = launch(2, [{"do": "train_where_the_teacher_fails", "config": job, "rank": 1}], 300)
    assert [rank["error"] for rank in done[0]] == [
        "ValueError: rank 1: no memory for the teacher"
    ] * 2


def test_what_is_logged_is_no_part_of_the_answer(folder: Path):
    path = folder / "answer.yaml"
    path.write_text(yaml.safe_dump(config(folder, "answer")))
    [shown] = run(1, {"do": "cache", "arguments": ["info", str(path)]})
    first, *_ = shown["stdout"].splitlines()
    assert "answer: " in first and " used, " in first
    assert "INFO" not in shown["stdout"]
    assert "This configuration: 0 of 16 samples cached" in shown["stdout"]


# ---- killed ------------------------------------------------------------------------------------


def complete(cache: Path) -> bool:
    """Whether every sample is there and whole, and head and embedding."""
    [folder] = cache.glob("*/")
    assert not any(verify_shard(path) for path in shard_paths(folder))
    reader = ShardIndex(folder)
    keys = {bytes(key) for shard in reader.shards for key in shard.keys}
    return len(keys) == ROWS and (folder / "head.safetensors").exists()


def came(seen: Callable[[], list[str]], wanted: int, late: float) -> bool:
    """Whether that many stages have begun, the last of them that many seconds ago."""
    if len(seen()) < wanted:
        return False
    time.sleep(late)
    return True


@pytest.mark.slow
def test_command_and_training_killed_at_twenty_random_moments_end_in_the_live_runs_training(
    folder: Path, live: list[float]
):
    """On ten empty folders a command and a training are killed, in either order."""
    chance = random.Random(0)
    path, stages = folder / "config.yaml", folder / "stages"

    def job(do: str, cache: str) -> dict[str, Any]:
        content = config(folder, cache, num_epochs=2)
        path.write_text(yaml.safe_dump(content))
        arguments = {"arguments": ["write", str(path)]} if do == "cache" else {"config": content}
        return {"do": "noting_stages", "folder": str(folder), "job": {"do": do, **arguments}}

    def seen() -> list[str]:
        return stages.read_text().split() if stages.exists() else []

    lengths, killed_in = {}, {}
    for do in ("cache", "train"):
        stages.unlink(missing_ok=True)
        assert kill_during(job(do, f"unhindered-{do}"), lambda: False) == 0
        lengths[do], killed_in[do] = len(seen()), Counter()
        assert complete(folder / f"unhindered-{do}")
    caches = []
    for number in range(10):
        cache = f"killed-{number}"
        for do in sorted(lengths, reverse=number % 2 == 1):
            # Some milliseconds into a stage: how fast the machine is decides nothing else.
            wanted, late = chance.randint(1, lengths[do]), chance.uniform(0, 0.03)
            while True:
                stages.unlink(missing_ok=True)
                code = kill_during(job(do, cache), partial(came, seen, wanted, late))
                if code == -signal.SIGKILL:
                    break
                assert code == 0 and wanted > 1, "no kill came in time"
                wanted //= 2  # it ended before that, since little was left to do
            passed = seen()
            last = [stage for stage in passed if stage != "sync"][-1]
            killed_in[do][f"{last}, syncing" if passed[-1] == "sync" else last] += 1
        caches.append(cache)
    print(killed_in)
    ends = [config(folder, cache, num_epochs=2) for cache in caches]
    for result in run(1, *({"do": "train_counting_loads", "config": end} for end in ends)):
        assert result["losses"] == pytest.approx(live[: len(result["losses"])], rel=1e-6)
        assert len(result["losses"]) == 2 * ROWS // 4
        assert not result["body"]
    assert all(complete(folder / cache) for cache in caches)
    assert sum(counter.total() for counter in killed_in.values()) == 20
    assert len(killed_in["cache"]) >= 3
    assert len(killed_in["train"]) >= 3
