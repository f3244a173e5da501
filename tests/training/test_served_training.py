"""A real vLLM as the teacher: the same training as with the teacher in this process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from axolotl_dskd import servers
from axolotl_dskd.commands.cli import main
from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.teacher import TeacherSpec, TrainingRun, open_teacher
from axolotl_dskd.teacher.served.teacher import ServedTeacher
from axolotl_dskd.types import DualBatch, Needs
from tests.support import tiny
from tests.support.batches import batch
from tests.support.ranks import run
from tests.support.runs import losses, objective_of, teacher_of
from tests.support.sharding import SHARDED
from tests.support.vllm import VLLM

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

Train = Callable[[dict[str, Any]], Any]

STEPS = 20

#: Two micro-batches a step, epochs that end within, an evaluation.
COMMON = {
    "max_steps": STEPS,
    "num_epochs": 100,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "val_set_size": 0.25,
    "eval_steps": 10,
    "adam_epsilon": 1e-6,  # else Adam turns rounding into steps where a gradient is nearly 0
}
PACKED = {
    "sample_packing": True,
    "eval_sample_packing": True,
    "micro_batch_size": 1,
    "max_steps": 8,
    "eval_steps": 4,
}
#: The rows are the student's own, but where it writes no text.
WRITTEN = {
    "max_steps": 4,
    "val_set_size": 0.25,
    "eval_steps": 4,
    "dskd": {"samples": {"from": "student", "share": 1.0, "max_new_tokens": 12}},
}
#: Two of them are the global batch of one rank above.
RANK = {"micro_batch_size": 1, "max_steps": 8}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLM]:
    """Beginning to serve the teacher of the folder where its log is; `wait` before it is asked."""
    folder = tmp_path_factory.mktemp("served")
    tiny.save_pair(folder, hidden_sizes=(32, 128))  # vLLM wants heads of 32
    server = VLLM.of_teacher(folder / "teacher", folder)
    server.launch()
    yield server
    server.stop()


def config(server: VLLM, name: str, served: bool = True, **overrides: Any) -> dict[str, Any]:
    folder = server.log.parent
    teacher: dict[str, Any] = {"base_model": str(folder / "teacher"), "dtype": "float32"}
    if served:
        teacher["server"] = {"url": server.url, "retries": 60}
    teacher |= overrides.pop("teacher", {})
    block = {"teacher": teacher, **overrides.pop("dskd", {})}
    made = {**COMMON, "dskd": block, "output_dir": str(folder / name), **overrides}
    return tiny.base_config(folder, **made)


@pytest.fixture(scope="module")
def live(server: VLLM, train: Train) -> tuple[Any, Any]:
    """The training with the teacher in this process: (model, trainer)."""
    return train(config(server, "live", served=False))


def same_training(found: tuple[Any, Any], expected: tuple[Any, Any], steps: int = STEPS) -> None:
    """Losses of steps and evaluations, and what all gradients have made of all weights."""
    ours, theirs = (losses(trainer) for _, trainer in (found, expected))
    assert len(theirs) == steps
    assert ours == pytest.approx(theirs, rel=1e-3)
    ours, theirs = (
        [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        for _, trainer in (found, expected)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert theirs
    for part in (lambda run: run[0], lambda run: objective_of(run[1]).module):
        ours, theirs = (part(run).state_dict() for run in (found, expected))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_twenty_steps_are_those_of_the_live_teacher(
    server: VLLM, live: tuple[Any, Any], train: Train
):
    server.wait()
    found = train(config(server, "found"))
    assert isinstance(teacher_of(found[1]), ServedTeacher)
    same_training(found, live)


def test_packing_changes_nothing(server: VLLM, train: Train):
    server.wait()
    expected = train(config(server, "live-packed", served=False, **PACKED))
    same_training(train(config(server, "packed", **PACKED)), expected, steps=8)


@pytest.fixture(scope="module")
def one_rank(server: VLLM) -> dict[str, Any]:
    """The training of one rank with the teacher in its process."""
    whole = config(server, "one", served=False, **RANK | {"micro_batch_size": 2})
    return run(1, {"do": "train", "config": whole})[0]


@pytest.mark.parametrize(
    ("keys", "trainer"), [({}, "DistributedDataParallel"), (SHARDED, "FSDP")], ids=["ddp", "fsdp2"]
)
def test_two_ranks_train_as_one(
    server: VLLM, one_rank: dict[str, Any], keys: dict[str, Any], trainer: str
):
    server.wait()
    expected = one_rank
    found = run(2, {"do": "train", "config": config(server, trainer, **RANK, **keys)})[0]
    assert found["world_size"] == 2
    assert trainer in found["trainer"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    for name, tensor in expected["student"].items():
        torch.testing.assert_close(found["student"][name], tensor, rtol=1e-3, atol=1e-4)


def test_evaluations_alone_ask_as_they_ask_a_live_teacher(server: VLLM, train: Train):
    """Plain fine-tuning that is compared with its teacher."""
    server.wait()
    tuning = {"dskd": {"kd_ratio": 0.0, "evaluation": {"teacher": True}}, "max_steps": 10}
    found, expected = (
        train(config(server, f"compared-{served}", served=served, **tuning))[1]
        for served in (True, False)
    )
    assert losses(found) == losses(expected)
    ours, theirs = (
        [e["eval_dskd/teacher_kl"] for e in trainer.state.log_history if "eval_loss" in e]
        for trainer in (found, expected)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert theirs


def test_what_the_student_writes_is_asked_about(server: VLLM, train: Train):
    """Its answers are named ahead as rows of the data are."""
    server.wait()
    runs = [
        train(config(server, f"written {served}", served, **WRITTEN)) for served in (True, False)
    ]
    logs = [entry for entry in runs[0][1].state.log_history if "loss" in entry]
    assert min(log["dskd/written_rows"] for log in logs) > 0  # some that it writes are no text
    same_training(*runs, steps=4)


def test_states_travel_in_bfloat16(server: VLLM):
    """Rounded on the server, whatever it computes in."""
    server.wait()
    teacher = str(server.log.parent / "teacher")
    where = {"url": server.url}
    cpu = torch.device("cpu")
    found, expected = (
        open_teacher(TeacherSpec(TeacherConfig.model_validate(block), 600, cpu), TrainingRun())(
            batch([12, 7, 30]), Needs()
        ).hidden
        for block in (
            {"base_model": teacher, "dtype": "bfloat16", "server": where},
            {"base_model": teacher, "dtype": "float32"},
        )
    )
    assert found is not None and expected is not None
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-3)


def test_a_server_that_dies_and_comes_back_changes_nothing(
    server: VLLM, live: tuple[Any, Any], train: Train, monkeypatch: pytest.MonkeyPatch
):
    server.wait()
    monkeypatch.setattr(servers, "_LONGEST_WAIT", 5.0)
    expect, steps = ServedTeacher.expect, [0]

    def dying(teacher: ServedTeacher, batches: Sequence[DualBatch]) -> None:
        steps[0] += 1
        expect(teacher, batches)
        if steps[0] == 7:  # in the midst of its answers
            server.stop(signal.SIGKILL)
            server.launch()

    monkeypatch.setattr(ServedTeacher, "expect", dying)
    same_training(train(config(server, "restarted")), live)
    assert steps[0] > 20


def test_a_cache_is_written_against_a_server_and_then_needs_none(
    server: VLLM, live: tuple[Any, Any], train: Train
):
    server.wait()
    folder = server.log.parent
    cache = {"path": str(folder / "cache"), "dtype": "float32"}
    cached = config(server, "cached", teacher={"cache": cache})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(cached))
    result = CliRunner().invoke(main, ["cache", "write", str(path)])
    assert result.exit_code == 0, result.output
    assert "Complete" in result.output
    server.stop()
    same_training(train(cached), live)
