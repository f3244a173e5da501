"""Trainings on what the student or the teacher writes: one training, whatever the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import tiny
from tests.support.equivalence import (
    BASE,
    ROWS,
    SAVED,
    VARIANTS,
    Training,
    assert_same_training,
    save_pair,
    train_variants,
    training_config,
)
from tests.support.ranks import Job, Result, launch, run
from tests.support.sharding import SHARDED, zero
from tests.support.taught import teach

pytestmark = pytest.mark.slow

WRITTEN, KEPT = "dskd/written_rows", "dskd/kept_rows"
#: The draws of this seed: written, data, kept, written.
STUDENT = {
    "from": "student",
    "share": 0.75,
    "replay": ROWS,
    "replay_schedule": "constant",
    "max_new_tokens": 16,
    "seed": 131,
}
#: Some rows are conversations of two turns: either may be the one that is written.
EVERY_TURN = {**STUDENT, "turns": "all"}
WAYS = ("packed", "1x8", "two ranks", "resumed")
PREFERENCE_WAYS = ("two ranks", "resumed", "qlora two ranks")
#: Of a part of each checkpoint.
STATE = {"share": 0.75, "reference": None, "evaluated_at": -1}


def make_pair(folder: Path, *, one_vocabulary: bool = False) -> Path:
    save_pair(folder, one_vocabulary=one_vocabulary)
    teach(folder / "student", tiny.chat_rows(ROWS))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("on-policy"))


@pytest.fixture(scope="module")
def trainings(folder: Path) -> dict[str, Training]:
    return train_variants(folder, {"samples": EVERY_TURN}, WAYS)


def test_steps_take_what_was_drawn_for_them(trainings: dict[str, Training]):
    taken = [(step[WRITTEN], step[KEPT]) for step in trainings[BASE].metrics]
    assert taken == [(1, 0), (0, 0), (0, 1), (1, 0)]


def test_written_rows_have_no_cross_entropy_and_data_have(trainings: dict[str, Training]):
    for step in trainings[BASE].metrics:
        is_data = step[WRITTEN] == step[KEPT] == 0
        assert ("dskd/reverse_kl" in step) != is_data
        for name in ("ce", "projector_ce", "projector_accuracy"):
            assert (f"dskd/{name}" in step) == is_data, name
        # On data it counts where the projected teacher agrees with the label: maybe nowhere.
        assert step["dskd/student_space"] > 0 or is_data
        assert step["dskd/teacher_space"] > 0
        if step[WRITTEN]:
            assert 0 < step["dskd/answer_tokens"] <= STUDENT["max_new_tokens"]
            assert 0 < step["dskd/answers_ended"] <= 1
            assert step["dskd/answers_refused"] == 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_is_the_same_training(trainings: dict[str, Training], way: str):
    """Packed or padded, one rank or two, interrupted or not: the same texts, so the same losses."""
    assert_same_training(trainings[BASE], trainings[way])


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    """Of preference distillation, whose every row is written beside its answer from the data."""
    where = make_pair(tmp_path_factory.mktemp("preference"))
    block = {
        "samples": {**EVERY_TURN, "share": 1.0, "replay": 0},
        "objective": {"name": "preference"},
    }
    return train_variants(where, block, PREFERENCE_WAYS)


@pytest.mark.parametrize("way", PREFERENCE_WAYS)
def test_preference_is_the_same_training_every_way(preferences: dict[str, Training], way: str):
    like = preferences[VARIANTS[way].like]
    within = VARIANTS[way].within
    assert_same_training(like, preferences[way], rel=within, atol=within)
    for step in preferences[way].metrics:
        assert step["dskd/written_rows"] == 0.5
        assert "dskd/won" in step


def test_a_checkpoint_holds_what_the_next_steps_draw_from(
    folder: Path, trainings: dict[str, Training]
):
    dskd = folder / BASE / f"checkpoint-{SAVED}" / "dskd"
    assert json.loads((dskd / "samples.json").read_text()) == STATE
    with safe_open(dskd / "replay.safetensors", "pt") as kept:
        assert kept.get_tensor("input_ids lengths").shape == (ROWS,)


def test_a_checkpoint_without_them_is_refused_in_words(
    folder: Path, trainings: dict[str, Training]
):
    plain = training_config(folder, {}, "plain", {"max_steps": 2, "save_steps": 2})
    run(1, {"do": "train", "config": {**plain, "save_strategy": "steps"}})
    config = training_config(folder, {"samples": STUDENT}, "on")
    config["resume_from_checkpoint"] = str(folder / "plain" / "checkpoint-2")
    ((result,),) = launch(1, [{"do": "train", "config": config}])
    assert "samples.json cannot be read" in result["error"]


@pytest.fixture(scope="module")
def read(folder: Path, trainings: dict[str, Training]) -> dict[str, list[Result]]:
    """The training again, ways of keeping by name, each rank counting what its teacher reads."""
    block = {"samples": EVERY_TURN}
    forgets = {"samples": {**EVERY_TURN, "replay_memory": 0}}
    cache = {"path": str(folder / "read cache"), "dtype": "float32"}
    half = {"micro_batch_size": ROWS // 2}
    on = {"resume_from_checkpoint": str(folder / BASE / f"checkpoint-{SAVED}")}
    one = {
        "kept": training_config(folder, block, "kept"),
        "not kept": training_config(folder, forgets, "not kept"),
        "resumed": training_config(folder, block, "resumed again", on),
        "cached": training_config(folder, {**block, "teacher": {"cache": cache}}, "cached again"),
    }
    two = {
        "two ranks": training_config(folder, block, "kept on two", half),
        "sharded": training_config(folder, block, "kept sharded", {**SHARDED, **half}),
    }
    found: dict[str, list[Result]] = {}
    for ranks, configs in ((1, one), (2, two)):
        jobs = [{"do": "train_counting_teacher_rows", "config": c} for c in configs.values()]
        results = launch(ranks, jobs, timeout=600)
        found |= zip(configs, results, strict=True)
    return found


#: By step: written, data, kept, written.
READ = {
    "kept": [ROWS, ROWS, 0],
    "not kept": [ROWS] * 4,
    # What is known is not in the checkpoint: it is asked for again.
    "resumed": [ROWS],
    # Its own teacher is not called where nothing is asked.
    "cached": [ROWS, ROWS],
    # Half of the kept rows are drawn where they were not written.
    "two ranks": [ROWS // 2, ROWS // 2, 0],
    "sharded": [ROWS // 2, ROWS // 2, 0],
}


@pytest.mark.parametrize("name", READ)
def test_the_teacher_reads_a_kept_row_once_and_the_training_is_the_same(
    read: dict[str, list[Result]], trainings: dict[str, Training], name: str
):
    for result in read[name]:
        assert "error" not in result, result
        # Of what the last step writes, some was written before, word for word.
        assert result["read"][: len(READ[name])] == READ[name]
        assert len(result["read"]) == len(READ[name]) + (name != "not kept")
        assert 0 < result["read"][-1] <= ROWS
    assert_same_training(trainings[BASE], Training.of(read[name][0]))


#: What is learned, and whether from one vocabulary. Short: does it work at all, and learn.
OBJECTIVES: dict[str, tuple[dict[str, Any], bool]] = {
    "token_kd": ({"name": "token_kd", "divergence": "skewed_reverse_kl"}, True),
    "one vocabulary": ({"name": "dual_space"}, True),
    "cma": ({"name": "dual_space", "alignment": "cma"}, False),
    "eta": ({"name": "dual_space", "alignment": "eta"}, False),
    "uld": ({"name": "uld"}, False),
    "chunk_likelihood": ({"name": "chunk_likelihood"}, False),
    "gold": ({"name": "gold"}, False),
    "min_edit": ({"name": "min_edit", "one_hot": True}, False),
    "sinkhorn": ({"name": "sinkhorn"}, True),
    "span_support": ({"name": "span_support"}, False),
    "policy": ({"name": "policy"}, False),
    "policy one vocabulary": ({"name": "policy"}, True),
    "preference": ({"name": "preference"}, False),
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
PACKED = {"micro_batch_size": 1, "sample_packing": True, "sequence_len": 1024}


@pytest.fixture(scope="module")
def learned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Two steps with each objective, all of them written, with LoRA and packed rows."""
    same = make_pair(tmp_path_factory.mktemp("same"), one_vocabulary=True)
    jobs: dict[str, Job] = {}
    for name, (objective, one_vocabulary) in OBJECTIVES.items():
        block = {"samples": {**STUDENT, "share": 1.0, "replay": 0}, "objective": objective}
        where = same if one_vocabulary else folder
        overrides = {"max_steps": 2, "gradient_checkpointing": True, **LORA, **PACKED}
        jobs[name] = {
            "do": "train",
            "config": training_config(where, block, f"learned {name}", overrides),
        }
    return dict(zip(jobs, run(1, *jobs.values(), timeout=600), strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_from_what_the_student_writes(learned: dict[str, Result], name: str):
    logs = learned[name]["logs"]
    assert len(logs) == 2
    for step, log in enumerate(logs):
        # Beside each written answer stands the data's where the two are compared.
        assert log[WRITTEN] == (0.5 if name == "preference" else 1)
        assert "dskd/reverse_kl" in log
        assert ("dskd/ce" in log) == (name == "preference")
        if name == "policy" and not step:  # no step before it says which reward is usual
            assert log["grad_norm"] == 0
        else:
            assert log["grad_norm"] > 0
        assert abs(log["loss"]) < 100


def test_a_row_that_packs_a_whole_micro_batch_has_room_for_what_is_written(folder: Path):
    """As Axolotl packs where attention tells samples apart: one row, as long as all together."""
    samples = {**STUDENT, "share": 1.0, "replay": 0}
    config = training_config(
        folder,
        {"samples": samples},
        "packed in one",
        {"max_steps": 1, **PACKED, "sequence_len": 128, "micro_batch_size": 4}
        | {"multipack_real_batches": False},
    )
    (result,) = run(1, {"do": "train", "config": config})
    assert result["logs"][0][WRITTEN] == 1


def test_answers_are_in_the_tracker_that_is_open(folder: Path):
    samples = {**STUDENT, "share": 1.0, "replay": 0, "show_every": 2, "show_count": 3}
    overrides = {"max_steps": 3, "use_tensorboard": True}
    config = training_config(folder, {"samples": samples}, "tracked", overrides)
    run(1, {"do": "train", "config": config})
    (path,) = (folder / "tracked").rglob("events.out.tfevents*")
    found = EventAccumulator(str(path))
    found.Reload()
    (tag,) = (tag for tag in found.Tags()["tensors"] if tag.startswith("dskd/answers"))
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)}
    assert {step: len(text.splitlines()) - 2 for step, text in texts.items()} == {1: 3, 3: 3}


def test_several_answers_to_a_prompt_stand_in_the_places_of_as_many_rows(folder: Path):
    samples = {**STUDENT, "share": 1.0, "replay": 0, "per_prompt": 4}
    jobs = [
        {
            "do": "train_noting_prompts",
            "config": training_config(
                folder, {"samples": samples}, f"several {k}", {"max_steps": 1, **extra}
            ),
        }
        for k, extra in enumerate(({}, PACKED))
    ]
    for result in run(1, *jobs):
        assert len(result["prompts"]) == ROWS
        assert len({tuple(ids) for ids in result["prompts"]}) == ROWS // 4
        assert len(set(result["seeds"])) == ROWS


@pytest.mark.parametrize("packed", [False, True])
def test_a_contrast_has_the_datas_answer_beside_each_written_one(folder: Path, packed: bool):
    samples = {**EVERY_TURN, "share": 1.0, "replay": 0}
    block = {"samples": samples, "objective": {"name": "uld"}}
    overrides = {"max_steps": 1, **(PACKED if packed else {})}
    config = training_config(folder, block, f"contrast {packed}", overrides)
    (result,) = run(1, {"do": "train_in_contrast", "config": config})
    (batch,) = result["batches"]
    assert len(batch["pairs"]) == ROWS // 2
    assert sorted(k for pair in batch["pairs"] for k in pair) == list(range(ROWS))
    for preferred, written in batch["pairs"]:
        assert (batch["written"][preferred], batch["written"][written]) == (False, True)
        asked = batch["prompts"][written]
        assert batch["prompts"][preferred][: len(asked)] == asked


def test_what_leaves_no_room_or_is_no_text_leaves_the_rows_of_the_data(tmp_path: Path):
    """An untrained student, and rows that are as long as they may be."""
    folder = save_pair(tmp_path)
    samples = {**STUDENT, "share": 1.0, "replay": 0}
    block = {"samples": samples}
    longest = training_config(folder, block, "no room", {"max_steps": 2, "sequence_len": 44})
    packed = training_config(
        folder, block, "packed", {"max_steps": 2, **PACKED, "sequence_len": 100}
    )
    for result in run(1, *({"do": "train", "config": c} for c in (longest, packed))):
        assert result["logs"][0]["dskd/answers_refused"] > 0
        assert all(log["loss"] > 0 for log in result["logs"])


def test_an_adaptive_share_asks_for_an_evaluation_first_and_grows(folder: Path):
    samples = {**STUDENT, "share": "adaptive", "adaptive_margin": 0.0, "replay": 0}
    overrides = {
        "val_set_size": 0.25,
        "eval_steps": 1,
        "learning_rate": 0.2,
        "micro_batch_size": 6,
    }
    config = training_config(folder, {"samples": samples}, "adaptive", overrides)
    ((result,),) = launch(1, [{"do": "train", "config": config}])
    shares = [log["dskd/share"] for log in result["logs"]]
    validation = [e["eval_dskd/ce"] for e in result["evaluations"]]
    assert len(validation) == len(shares) + 1  # one before the first step
    assert shares[0] == 0.0
    share, reference, expected = 0.0, validation[0], []
    for loss in validation[1:]:
        expected.append(share)
        if loss >= reference:
            share, reference = share + 0.1, loss
    assert shares == pytest.approx(expected)
    assert share > 0


def test_an_adaptive_share_without_evaluations_is_refused_in_words(folder: Path):
    samples = {**STUDENT, "share": "adaptive"}
    config = training_config(folder, {"samples": samples}, "never evaluated")
    ((result,),) = launch(1, [{"do": "train", "config": config}])
    assert "nothing is evaluated" in result["error"]


# ---- the teacher's cache -----------------------------------------------------------------------


def test_a_cache_keeps_no_written_answer(folder: Path, trainings: dict[str, Training]):
    cache = {"path": str(folder / "cache"), "dtype": "float32"}
    block = {"samples": EVERY_TURN, "teacher": {"cache": cache}}
    config = training_config(folder, block, "cached student")
    (result,) = run(1, {"do": "train", "config": config})
    assert_same_training(trainings[BASE], Training.of(result))
    tokens = 0
    for path in (folder / "cache").rglob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            if "states" in shard.keys():  # noqa: SIM118
                tokens += shard.get_slice("states").get_shape()[0]
    data = trainings[BASE].metrics[1]["dskd/supervised_tokens"]
    assert tokens < 2 * data


# ---- the teacher's answers ----------------------------------------------------------------------

TEACHER = {"from": "teacher", "max_new_tokens": 12, "seed": 3}


def test_the_teacher_answers_once_and_its_answers_are_references(tmp_path: Path):
    folder = save_pair(tmp_path)
    teach(folder / "teacher", tiny.chat_rows(ROWS), steps=40)
    block = {"samples": TEACHER}
    configs = [
        training_config(folder, block, "first", {"max_steps": 2}),
        training_config(folder, block, "second", {"max_steps": 2, **PACKED}),
        training_config(
            folder, {"samples": {**TEACHER, "temperature": 0.5}}, "other", {"max_steps": 1}
        ),
        training_config(folder, block | {"kd_ratio": 0}, "fine-tuned", {"max_steps": 1}),
    ]
    first, second, other, tuned = run(
        1, *({"do": "train_counting_writing", "config": c} for c in configs)
    )
    assert first["written"] == ROWS
    assert second["written"] == 0
    assert other["written"] == ROWS
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-5)
    for log in first["logs"]:
        assert log["dskd/ce"] > 0
        assert log["dskd/projector_ce"] > 0
    assert tuned["written"] == 0
    assert tuned["losses"][0] == pytest.approx(first["logs"][0]["dskd/ce"], rel=1e-5)
    data = training_config(folder, {}, "data", {"max_steps": 1})
    (plain,) = run(1, {"do": "train", "config": data})
    assert plain["losses"][0] != pytest.approx(first["losses"][0], rel=1e-3)
    two = training_config(folder, {"samples": {**TEACHER, "seed": 4}}, "two", {"max_steps": 2})
    ranks = launch(
        2,
        [{"do": "train_counting_writing", "config": {**two, "micro_batch_size": ROWS // 2}}],
    )[0]
    assert [rank["written"] for rank in ranks] == [ROWS // 2] * 2
    again = training_config(folder, {"samples": {**TEACHER, "seed": 4}}, "one", {"max_steps": 2})
    (one,) = run(1, {"do": "train_counting_writing", "config": again})
    assert one["written"] == 0
    assert ranks[0]["losses"] == pytest.approx(one["losses"], rel=1e-5)


# ---- sharded students ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_lora(folder: Path) -> Training:
    config = training_config(folder, {"samples": EVERY_TURN}, "lora", LORA)
    return Training.of(run(1, {"do": "train", "config": config})[0])


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_a_sharded_student_writes_what_a_whole_one_does(
    folder: Path,
    trainings: dict[str, Training],
    with_lora: Training,
    name: str,
    adapter: dict[str, Any],
):
    overrides = {**(SHARDED if name == "fsdp2" else zero(3)), "micro_batch_size": ROWS // 2}
    where = f"sharded {name} {len(adapter)}"
    config = training_config(folder, {"samples": EVERY_TURN}, where, {**overrides, **adapter})
    (result,) = run(2, {"do": "train", "config": config})
    assert_same_training(with_lora if adapter else trainings[BASE], Training.of(result))
