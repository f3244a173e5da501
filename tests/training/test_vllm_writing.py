"""A real vLLM writes during training: the same training as with the student writing itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.equivalence import (
    ROWS,
    STEPS,
    Training,
    assert_same_training,
    training_config,
)
from tests.support.ranks import launch, run
from tests.support.sharding import SHARDED, zero
from tests.support.taught import teach
from tests.support.vllm import VLLM, free_port

pytestmark = [pytest.mark.slow]

#: Greedy: the two engines draw from other random numbers.
STUDENT = {"from": "student", "share": 1.0, "temperature": 0.0, "max_new_tokens": 16}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
HALF = {"micro_batch_size": ROWS // 2}
#: Whole or with LoRA, and how sharded: each on two ranks.
SHARDING = {"ddp": {}, "fsdp2": SHARDED, "zero3": zero(3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    tiny.save_pair(folder, hidden_sizes=(128, 48))  # vLLM wants heads of 32
    rows = tiny.chat_rows(ROWS)
    tiny.write_rows(folder / "rows.jsonl", rows)
    teach(folder / "student", rows)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[VLLM]:
    server = VLLM.that_writes(folder / "student", folder)
    server.start()
    yield server
    server.stop()


def config(
    folder: Path, name: str, overrides: dict[str, Any], server: VLLM | None, **keys: Any
) -> dict[str, Any]:
    samples: dict[str, Any] = {**STUDENT, **keys}
    if server is not None:
        samples["engine"] = {"vllm": {"url": server.url, "model": "student"}}
    return training_config(folder, {"samples": samples}, name, overrides)


@pytest.fixture(scope="module", params=["lora", "whole"])
def trained(
    request: pytest.FixtureRequest, folder: Path, server: VLLM
) -> tuple[dict[str, Training], dict[str, Any]]:
    """What trains, by who writes; and the keys of Axolotl's with which it does."""
    keys: dict[str, Any] = LORA if request.param == "lora" else {}
    server.reset_weights(folder / "student")
    configs = [
        config(folder, f"{request.param} {name}", keys, at)
        for name, at in (("itself", None), ("served", server))
    ]
    results = run(1, *({"do": "train", "config": c} for c in configs))
    return dict(zip(("itself", "served"), map(Training.of, results), strict=True)), keys


@pytest.mark.vllm
def test_who_writes_changes_nothing(trained: tuple[dict[str, Training], dict[str, Any]]):
    trainings, _ = trained
    assert_same_training(trainings["itself"], trainings["served"], rel=1e-4, atol=1e-4)
    assert trainings["served"].metrics[0]["dskd/written_rows"] == 1


@pytest.mark.vllm
def test_what_the_server_was_given_is_gone_after_training(
    trained: tuple[dict[str, Training], dict[str, Any]], folder: Path
):
    """It is as large as the student, and no part of what is exported."""
    name = "lora" if trained[1] else "whole"
    itself, served = (
        {path.name for path in (folder / f"{name} {who}").iterdir()} for who in ("itself", "served")
    )
    assert served <= itself
    assert "README.md" in served


@pytest.mark.vllm
@pytest.mark.parametrize("sharding", SHARDING)
def test_several_ranks_hand_over_one_student(
    trained: tuple[dict[str, Training], dict[str, Any]],
    folder: Path,
    server: VLLM,
    sharding: str,
):
    trainings, keys = trained
    server.reset_weights(folder / "student")
    overrides = {**SHARDING[sharding], **HALF, **keys}
    made = config(folder, f"{sharding} {len(keys)}", overrides, server)
    (result,) = run(2, {"do": "train", "config": made})
    assert_same_training(trainings["itself"], Training.of(result), rel=1e-4, atol=1e-4)


@pytest.mark.vllm
def test_the_teacher_answers_from_a_server(folder: Path, tmp_path: Path, server: VLLM):
    """The server has the student's weights; here it is the teacher, too."""
    server.reset_weights(folder / "student")
    samples = {"from": "teacher", "temperature": 0.0, "max_new_tokens": 16}
    logs = []
    for name, engine in (
        ("itself", "transformers"),
        ("served", {"vllm": {"url": server.url, "model": "student"}}),
    ):
        block = {
            "samples": {**samples, "engine": engine},
            "teacher": {"base_model": str(folder / "student"), "sequence_len": 256},
        }
        prepared = {"dataset_prepared_path": str(tmp_path / name), "max_steps": 2}
        made = training_config(folder, block, f"teacher {name}", prepared)
        (result,) = run(1, {"do": "train", "config": made})
        logs.append(Training.of(result).losses)
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_server_that_is_not_there_ends_all_ranks_in_words(folder: Path):
    engine = {"vllm": {"url": f"http://127.0.0.1:{free_port()}", "retries": 0}}
    made = config(folder, "nobody", HALF, None, engine=engine)
    (ranks,) = launch(2, [{"do": "train", "config": made}], timeout=300)
    for result in ranks:
        assert "gave no answer in 1 tries" in result["error"]
        assert "VLLM_SERVER_DEV_MODE=1 python -m vllm" in result["error"]


def test_an_adapter_is_not_to_be_had_of_a_student_without_one(folder: Path):
    engine = {"vllm": {"url": "http://127.0.0.1:1", "sync": "adapter"}}
    made = config(folder, "no adapter", {}, None, engine=engine)
    ((result,),) = launch(1, [{"do": "train", "config": made}])
    assert "what this student trains is its weights. Write sync: weights" in result["error"]


@pytest.mark.vllm
def test_a_server_that_dies_for_good_ends_all_ranks_in_words(folder: Path, server: VLLM):
    """The last test of its module."""
    server.reset_weights(folder / "student")
    engine = {"vllm": {"url": server.url, "model": "student", "retries": 1}}
    overrides = {**HALF, **LORA, "save_strategy": "steps", "save_steps": 1}
    made = config(folder, "dies", overrides, None, engine=engine)
    job = {
        "do": "train_killing",
        "config": made,
        "step": STEPS - 1,
        "pid": server.process.pid if server.process else 0,
        "number": int(signal.SIGKILL),
    }
    (ranks,) = launch(2, [job], timeout=300)
    for result in ranks:
        assert "gave no answer in 2 tries" in result["error"]
        assert f"resume_from_checkpoint: {folder}/dies/checkpoint-{STEPS - 1}" in result["error"]
