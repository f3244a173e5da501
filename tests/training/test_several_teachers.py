"""Trainings with several teachers: of one model they are one teacher; of unlike ones, one training
whatever the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support import tiny, two_teachers
from tests.support.equivalence import (
    BASE,
    ROWS,
    SAVED,
    Training,
    assert_same_training,
    train_variants,
    training_config,
)
from tests.support.ranks import launch
from tests.support.runs import losses, steps
from tests.support.taught import teach

pytestmark = pytest.mark.slow

Train = Callable[[dict[str, Any]], Any]
WAYS = ("packed", "1x8", "two ranks", "resumed", "cached", "lora", "fsdp2 1x4")
NAMES = list(two_teachers.FOLDERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = two_teachers.save(tmp_path_factory.mktemp("teachers"))
    teach(folder / "student", tiny.chat_rows(ROWS))
    return folder


# ---- the same model twice ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "max_steps"),
    # Projectors of two teachers step apart from each other, so only the first step is the same.
    [("uld", 3), ({"name": "dual_space", "alignment": "cma"}, 1)],
    ids=["uld", "dual_space"],
)
def test_two_teachers_of_one_model_are_one_teacher(
    folder: Path, train: Train, objective: Any, max_steps: int
):
    """Losses, metrics, and the student after its updates."""
    twice = {name: {"base_model": str(folder / "teacher")} for name in NAMES}
    route = {"field": two_teachers.FIELD}
    overrides = {"max_steps": max_steps, "micro_batch_size": 4, "adam_epsilon": 1e-6}
    one, two = (
        train(tiny.base_config(folder, dskd={"objective": objective, **block}, **overrides))[1]
        for block in (
            {"teacher": {"base_model": str(folder / "teacher")}},
            {"teachers": twice, "route": route},
        )
    )
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        for name in (name for name in ours if name.startswith("dskd/")):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-6), name
        of_each = [theirs[f"dskd/{name}/supervised_tokens"] for name in NAMES]
        assert sum(of_each) == theirs["dskd/supervised_tokens"]
        mean = sum(n * theirs[f"dskd/{k}/ce"] for n, k in zip(of_each, NAMES, strict=True))
        assert mean / sum(of_each) == pytest.approx(theirs["dskd/ce"], rel=1e-6)
    for (name, a), b in zip(
        one.model.state_dict().items(), two.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_where_all_rows_ask_one_of_two_teachers_the_other_changes_nothing(
    folder: Path, train: Train
):
    rows = [row | {two_teachers.FIELD: "math"} for row in tiny.chat_rows(ROWS)]
    path = tiny.write_rows(folder / "all-math.jsonl", rows)
    data = [{"path": str(path), "ds_type": "json", "type": "chat_template"}]
    blocks = ({"teacher": {"base_model": str(folder / "teacher")}}, two_teachers.block(folder))
    one, two = (train(tiny.base_config(folder, dskd=b, datasets=data))[1] for b in blocks)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    for name, tensor in one.sidecar.tensors().items():
        torch.testing.assert_close(two.sidecar.tensors()[f"math.{name}"], tensor)
    assert "dskd/chat/ce" not in steps(two)[0]


# ---- two unlike models -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainings(folder: Path) -> dict[str, Training]:
    return train_variants(folder, two_teachers.block(folder), WAYS)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "lora"])
def test_every_way_to_train_is_the_same_training(trainings: dict[str, Training], way: str):
    """Packed or padded, with rows of one teacher alone in a batch or on a rank, sharded, from
    their caches, interrupted or not."""
    assert_same_training(trainings[BASE], trainings[way])


def test_lora_is_trained_by_two_teachers(trainings: dict[str, Training]):
    assert trainings["lora"].losses[-1] < trainings["lora"].losses[0]


def test_each_teacher_has_projectors_of_its_own_sizes(folder: Path, trainings: dict[str, Training]):
    shapes = {name: tuple(t.shape) for name, t in trainings[BASE].sidecar.items()}
    assert shapes["math.t2s.weight"] == (64, 48)
    assert shapes["chat.t2s.weight"] == (64, 40)
    # Unlike tokenizers meet in cross-model attention, one vocabulary position by position.
    assert any(name.startswith("math.query") for name in shapes)
    assert not any(name.startswith("chat.query") for name in shapes)
    path = folder / BASE / f"checkpoint-{SAVED}" / "dskd" / "module.safetensors"
    with safe_open(path, "pt") as kept:
        assert set(kept.keys()) == set(shapes)


def test_a_checkpoint_of_other_teachers_is_refused_in_words(
    folder: Path, trainings: dict[str, Training]
):
    block = two_teachers.block(folder)
    block["teachers"]["talk"] = block["teachers"].pop("chat")
    rows = [
        row | {two_teachers.FIELD: ["math", "talk"][k % 2]}
        for k, row in enumerate(tiny.chat_rows(ROWS))
    ]
    path = tiny.write_rows(folder / "talk.jsonl", rows)
    config = training_config(folder, block, "talk")
    config["datasets"][0]["path"] = str(path)
    config["resume_from_checkpoint"] = str(folder / BASE / f"checkpoint-{SAVED}")
    [[result]] = launch(1, [{"do": "train", "config": config}])
    assert "Teachers, student" in result["error"]
    assert "talk.t2s.weight" in result["error"]


# ---- answers that are written ------------------------------------------------------------------

STUDENT = {"from": "student", "share": 0.75, "replay": ROWS, "max_new_tokens": 16, "seed": 131}


@pytest.fixture(scope="module")
def on_policy(folder: Path) -> dict[str, Training]:
    block = two_teachers.block(folder, samples=STUDENT | {"replay_schedule": "constant"})
    return train_variants(folder, block, ("packed", "two ranks", "resumed"))


@pytest.mark.parametrize("way", ["packed", "two ranks", "resumed"])
def test_the_student_writes_for_each_rows_own_teacher(on_policy: dict[str, Training], way: str):
    base = on_policy[BASE]
    taken = [(step["dskd/written_rows"], step["dskd/kept_rows"]) for step in base.metrics]
    assert taken == [(1, 0), (0, 0), (0, 1), (1, 0)]
    for name in NAMES:  # each corrects its own rows of every step
        assert all(step[f"dskd/{name}/teacher_space"] > 0 for step in base.metrics)
    assert_same_training(base, on_policy[way])


def test_each_teacher_answers_its_own_prompts(folder: Path, train: Train):
    """As it does where it is the only teacher and its rows are all there are."""
    samples = {"from": "teacher", "max_new_tokens": 8, "temperature": 0}
    block = two_teachers.block(folder, samples=samples)
    rows = two_teachers.rows(ROWS)

    def answered(name: str, block: dict[str, Any], rows: list[dict[str, Any]]) -> list[Any]:
        path = tiny.write_rows(folder / f"answered-{name}.jsonl", rows)
        data = [{"path": str(path), "ds_type": "json", "type": "chat_template"}]
        config = tiny.base_config(folder, max_steps=1, dskd=block, datasets=data)
        return list(train(config)[1].train_dataset)

    together = answered("all", block, rows)
    assert [row["dskd_teacher"] for row in together] == [0, 1] * (ROWS // 2)
    for number, name in enumerate(NAMES):
        alone = answered(
            name, {"teacher": block["teachers"][name], "samples": samples}, rows[number::2]
        )
        mine = [
            {column: value for column, value in row.items() if column != "dskd_teacher"}
            for row in together[number::2]
        ]
        assert mine == alone
