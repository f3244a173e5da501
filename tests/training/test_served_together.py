"""Real vLLMs beside each other: a served teacher among several, and one beside a served student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny, two_teachers
from tests.support.equivalence import ROWS, Training, assert_same_training, training_config
from tests.support.ranks import run
from tests.support.sharding import SHARDED
from tests.support.taught import teach
from tests.support.vllm import VLLM

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

WRITTEN = {"from": "student", "share": 1.0, "temperature": 0.0, "max_new_tokens": 16}
#: Of losses and of weights: states that a server computes differ by its order of sums.
NEAR = {"rel": 1e-3, "atol": 1e-4}
HALF = {"micro_batch_size": ROWS // 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = two_teachers.save(tmp_path_factory.mktemp("together"))
    tiny.save_pair(folder, hidden_sizes=(128, 128))  # vLLM wants heads of 32
    teach(folder / "student", tiny.chat_rows(ROWS))
    return folder


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, VLLM]]:
    """The first teacher's and one for the student, beginning; `wait` before they are asked."""
    of_teacher, of_student = (folder / name for name in ("of-teacher", "of-student"))
    of_teacher.mkdir()
    of_student.mkdir()
    found = {
        "teacher": VLLM.of_teacher(folder / "teacher", of_teacher),
        "student": VLLM.that_writes(folder / "student", of_student),
    }
    for server in found.values():
        server.launch()
    yield found
    for server in found.values():
        server.stop()


def trained(
    folder: Path, name: str, block: dict[str, Any], world_size: int = 1, **keys: Any
) -> Training:
    """A training of `STEPS` steps."""
    made = training_config(folder, block, name, {"adam_epsilon": 1e-6, **keys})
    return Training.of(run(world_size, {"do": "train", "config": made})[0])


def teacher(folder: Path, server: VLLM | None) -> dict[str, Any]:
    """The block of the first teacher, here or served."""
    served = {} if server is None else {"server": {"url": server.url, "retries": 10}}
    return {"base_model": str(folder / "teacher"), "dtype": "float32", **served}


@pytest.fixture(scope="module")
def routed(folder: Path) -> Training:
    """With both teachers in the training's process."""
    block = two_teachers.block(folder)
    block["teachers"]["math"] = teacher(folder, None)
    return trained(folder, "routed", block)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_of_several_teachers_is_served(
    folder: Path, servers: dict[str, VLLM], routed: Training, ranks: int
):
    """The other one is in the training's processes; on two ranks its layers are sharded."""
    servers["teacher"].wait()
    block = two_teachers.block(folder)
    block["teachers"]["math"] = teacher(folder, servers["teacher"])
    keys = {} if ranks == 1 else {**SHARDED, **HALF}
    found = trained(folder, f"routed-{ranks}", block, ranks, **keys)
    assert_same_training(routed, found, **NEAR)


@pytest.mark.parametrize("ranks", [1, 2])
def test_student_and_teacher_are_served_at_once(folder: Path, servers: dict[str, VLLM], ranks: int):
    """One server writes what the student would, another one says what the teacher thinks of it."""
    for server in servers.values():
        server.wait()
    here = {"samples": WRITTEN, "teacher": teacher(folder, None)}
    engine = {"vllm": {"url": servers["student"].url, "model": "student"}}
    served = {
        "samples": {**WRITTEN, "engine": engine},
        "teacher": teacher(folder, servers["teacher"]),
    }
    expected = trained(folder, f"here-{ranks}", here)
    servers["student"].reset_weights(folder / "student")
    keys = {} if ranks == 1 else HALF
    found = trained(folder, f"both-{ranks}", served, ranks, **keys)
    assert found.metrics[0]["dskd/written_rows"] == 1
    assert_same_training(expected, found, **NEAR)
