"""What the teacher has answered, and what it is then asked: what is kept, for whom, and where."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axolotl_dskd.cache import ShardIndex
from axolotl_dskd.teacher.cached.fill import CacheableRows
from tests.support import tiny
from tests.support.equivalence import ROWS, save_pair, training_config
from tests.support.ranks import launch, run
from tests.support.runs import teacher_of
from tests.support.taught import teach
from tests.support.vllm import free_port

pytestmark = pytest.mark.slow

Train = Callable[[dict[str, Any]], Any]
TEACHER = {"from": "teacher", "max_new_tokens": 12, "seed": 3}
STUDENT = {"from": "student", "share": 0.5, "max_new_tokens": 12, "seed": 131}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("answers"))
    for name in ("student", "teacher"):
        teach(folder / name, tiny.chat_rows(ROWS), steps=40)
    return folder


def test_answers_under_one_limit_are_not_those_under_another(folder: Path):
    """Neither of the answer nor of the teacher's whole row; and those of equal ones are."""
    ways: list[tuple[dict[str, Any], dict[str, Any], int]] = [
        ({}, {}, ROWS),
        ({"max_new_tokens": 6}, {}, ROWS),
        ({}, {"sequence_len": 200}, ROWS),
        ({}, {"sequence_len": 201}, ROWS),
        ({"batch_tokens": 64}, {"sequence_len": 201}, 0),
        ({}, {}, 0),
    ]
    jobs = []
    for number, (samples, teacher, _) in enumerate(ways):
        block = {"samples": {**TEACHER, **samples}, "teacher": teacher}
        made = training_config(folder, block, f"limit {number}", {"max_steps": 1})
        jobs.append({"do": "train_counting_writing", "config": made})
    found = [result["written"] for result in run(1, *jobs)]
    assert found == [written for _, _, written in ways]


def test_ranks_that_see_unlike_answers_all_stop_in_words(folder: Path):
    block = {"samples": {**TEACHER, "seed": 5}}
    made = training_config(folder, block, "apart", {"micro_batch_size": ROWS // 2})
    (ranks,) = launch(2, [{"do": "train_with_answers_of_its_own", "config": made}])
    for result in ranks:
        assert "dataset_prepared_path must be one folder for all" in result["error"]
        for rank in (0, 1):  # each has written its half, where the other one cannot see it
            assert f"rank {rank}: {ROWS // 2} answers of the teacher are not in" in result["error"]


def test_a_rank_without_room_on_its_disk_ends_all_in_words_and_no_saved_answer_is_lost(
    folder: Path,
):
    block = {"samples": {**TEACHER, "seed": 6}}
    made = training_config(folder, block, "no room", {"micro_batch_size": ROWS // 2})
    full = {"do": "train_on_a_disk_without_room", "config": made, "rank": 1}
    (ranks,) = launch(2, [full], timeout=120)
    for result in ranks:
        assert "rank 1: the teacher's answers cannot be saved in" in result["error"]
        assert "No space left on device. Make room, or name another folder" in result["error"]
    again = run(1, {"do": "train_counting_writing", "config": made | {"max_steps": 1}})
    assert again[0]["written"] == ROWS // 2


def test_of_rows_that_the_teacher_answers_the_cache_holds_the_answered_alone(
    folder: Path, train: Train, loads: list[int]
):
    """Nobody trains on the data's own answers."""
    cache = {"path": str(folder / "cache of answers"), "dtype": "float32"}
    block = {"samples": TEACHER, "teacher": {"cache": cache}}
    epochs = {"max_steps": None, "num_epochs": 2}
    _, trainer = train(training_config(folder, block, "cached answers", epochs))
    held = np.concatenate(
        [s.keys for s in ShardIndex(teacher_of(trainer).states.store.folder).shards]
    )
    wanted = CacheableRows([trainer.train_dataset]).keys
    assert len(wanted) == ROWS
    assert {key.tobytes() for key in held} == {key.tobytes() for key in wanted}


@pytest.mark.parametrize("kd_ratio", [0, 0.5])
def test_epochs_are_those_of_the_answered_rows_where_they_are_packed(
    folder: Path, train: Train, kd_ratio: float
):
    """Shorter answers make fewer packed rows."""
    block = {"samples": {**TEACHER, "max_new_tokens": 1}, "kd_ratio": kd_ratio}
    packed = {"micro_batch_size": 1, "sample_packing": True, "sequence_len": 96}
    epochs = {"max_steps": None, "num_epochs": 4, "warmup_ratio": 0.5}
    length = {}
    for name, samples in (("data", {"samples": "dataset"}), ("answered", {})):
        made = training_config(folder, {**block, **samples}, f"{name} {kd_ratio}", packed | epochs)
        _, trainer = train(made)
        assert trainer.state.epoch == 4
        length[name] = trainer.state.max_steps
        assert trainer.args.warmup_steps == length[name] // 2
    assert length["answered"] < length["data"]


def test_a_cached_teacher_stays_where_the_student_writes(
    folder: Path, train: Train, loads: list[int]
):
    """Its cache never holds what it will be asked about."""
    cache = {"path": str(folder / "cache of data"), "dtype": "float32"}
    block = {"samples": STUDENT, "teacher": {"cache": cache}}
    epochs = {"max_steps": None, "num_epochs": 4, "micro_batch_size": ROWS // 2}
    for name in ("filling", "filled"):
        _, trainer = train(training_config(folder, block, f"{name} data", epochs))
        written = [e["dskd/written_rows"] for e in trainer.state.log_history if "loss" in e]
        assert 1 in written
        assert 0 in written
        assert len(loads) == 1
        assert teacher_of(trainer).states.body.is_loaded
        loads.clear()


def test_rows_without_a_neighbour_are_counted_and_said(
    folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    """A packed row that one sample fills: nothing stands beside its answer."""
    from axolotl_dskd.samples import pairs

    said: list[str] = []
    monkeypatch.setattr(pairs.LOG, "warning", said.append)
    block = {
        "samples": {**STUDENT, "share": 1.0},
        "objective": {"name": "preference"},
    }
    packed = {"micro_batch_size": 1, "sample_packing": True, "max_steps": 2}
    unpaired = []
    for length in (48, 1024):
        made = training_config(
            folder, block, f"rows of {length}", {**packed, "sequence_len": length}
        )
        _, trainer = train(made)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        unpaired.append(logs[0]["dskd/unpaired_rows"])
        if unpaired[-1] == 1:
            assert logs[0]["dskd/written_rows"] == 0
            assert logs[0].get("dskd/preference", 0) == 0
    assert unpaired == [1, 0]
    assert len(said) == 1
    assert "100% of the rows that the student answers stand alone" in said[0]


def test_fine_tuning_on_answers_loads_the_teacher_for_missing_ones_and_frees_it(
    folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dskd.teacher.live import LiveTeacher
    from axolotl_dskd.training.trainer import DSKDTrainer

    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    construct, compute_loss = LiveTeacher.__init__, DSKDTrainer.compute_loss

    def constructed(teacher: Any, model: Any, *more: Any, **keys: Any) -> None:
        loaded.append(weakref.ref(model))
        construct(teacher, model, *more, **keys)

    def computing(*more: Any, **keys: Any) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        return compute_loss(*more, **keys)

    monkeypatch.setattr(LiveTeacher, "__init__", constructed)
    monkeypatch.setattr(DSKDTrainer, "compute_loss", computing)
    nobody = {"vllm": {"url": f"http://127.0.0.1:{free_port()}", "retries": 0}}
    cache = {"path": str(folder / "shared by runs"), "dtype": "float32"}
    for name, samples, count, trains in (
        ("to be written", {}, 1, True),
        ("written", {}, 0, True),  # beside the cache, whatever the prepared rows' folder
        ("written by a server", {"engine": nobody}, 0, True),
        ("to be written by a server", {"engine": nobody, "seed": 4}, 0, False),
    ):
        loaded.clear()
        alive.clear()
        block = {
            "kd_ratio": 0,
            "samples": {**TEACHER, **samples},
            "teacher": {"cache": cache},
        }
        keys = {"max_steps": 1, "dataset_prepared_path": str(folder / f"prepared {name}")}
        made = training_config(folder, block, f"tuned {name}", keys)
        if trains:
            train(made)
        else:
            with pytest.raises(ValueError, match="gave no answer"):
                train(made)
        assert len(loaded) == count, name
        assert alive == [0] * trains, name
