"""Trainings on what the student writes beside the teacher: one training, whatever the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.support import tiny, two_teachers
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
from tests.support.ranks import Result, launch, run
from tests.support.sharding import SHARDED
from tests.support.taught import teach

pytestmark = pytest.mark.slow

SHARE = 0.4
#: Rows that are kept: fewer than a step has, for not every answer can be used.
KEPT = ROWS // 2
#: The draws of this seed: written, data, kept, written.
SAMPLES = {
    "from": "student",
    "share": 0.75,
    "replay": KEPT,
    "replay_schedule": "constant",
    "max_new_tokens": 16,
    "turns": "all",
    "teacher_mix": SHARE,
    "seed": 131,
}
#: One vocabulary, but other prompts on the teacher's side.
TEMPLATE = (
    "{% for m in messages %}{{ '<|system|>' + m['role'] + ':<|' + m['role'] + '|>' }}"
    "{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|system|>assistant:<|assistant|>' }}{% endif %}"
)
TEACHER = {"chat_template": "jinja", "chat_template_jinja": TEMPLATE}
#: Sums of squared advantages would be too large to compare in absolute terms.
POLICY = {"name": "policy", "whiten": "none"}
BLOCK = {"samples": SAMPLES, "teacher": TEACHER, "objective": POLICY}
#: Row by row, so that one rank's answer ends while another's goes on.
BY_ONE = {**BLOCK, "samples": {**SAMPLES, "batch_tokens": 1}}
#: Of parameters: other batches round otherwise, which Adam turns into steps of nearly no gradient.
ROUNDING = 1e-4
WAYS = ("packed", "1x8", "two ranks", "fsdp2", "zero3", "resumed", "qlora two ranks")
WEIGHT, LIGHT = "dskd/mixed_weight", "dskd/mixed_below_half"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("mixed"), one_vocabulary=True)
    teach(folder / "student", tiny.chat_rows(ROWS))
    tokenizer = tiny.byte_level_tokenizer()
    tiny.tiny_llama(len(tokenizer), 40, seed=2).save_pretrained(folder / "second")
    tokenizer.save_pretrained(folder / "second")
    tiny.write_rows(folder / "rows.jsonl", two_teachers.rows(ROWS))
    return folder


@pytest.fixture(scope="module")
def trainings(folder: Path) -> dict[str, Training]:
    return train_variants(folder, BLOCK, WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_is_the_same_training(trainings: dict[str, Training], way: str):
    """Also where both models are cut over the ranks."""
    like, within = trainings[VARIANTS[way].like], VARIANTS[way].within
    assert_same_training(like, trainings[way], rel=within, atol=within)


def test_weights_are_logged_where_text_was_drawn_together(trainings: dict[str, Training]):
    steps = trainings[BASE].metrics
    assert [WEIGHT in step for step in steps] == [True, False, False, True]
    for step in (steps[0], steps[3]):
        assert 0.3 < step[WEIGHT] < 1 / (1 - SHARE)
        assert 0 < step[LIGHT] < 1


@pytest.fixture(scope="module")
def noted(folder: Path) -> list[Result]:
    """Steps of written, data and kept rows; without a share; and with a teacher on disk."""
    cache = {"path": str(folder / "cache"), "dtype": "float32"}
    alone = {**SAMPLES, "teacher_mix": 0.0}
    blocks = [BLOCK, {**BLOCK, "samples": alone}, {**BLOCK, "teacher": {**TEACHER, "cache": cache}}]
    configs = [training_config(folder, b, f"noted {k}") for k, b in enumerate(blocks)]
    return run(1, *({"do": "train_noting_weights", "config": c} for c in configs))


def of_step(result: Result, step: int) -> list[dict[str, Any]]:
    return [sample for sample in result["samples"] if sample["step"] == step]


def test_the_weights_of_a_batch_are_those_of_both_models_on_its_rows(
    folder: Path, noted: list[Result]
):
    """w = q / ((1 - a) q + a p), q of the student that wrote and p of the teacher, each in one
    forward over the row in its own template. Where the teacher reads the text as other tokens, it
    has read those that were drawn when it took part, and the row has them no more."""
    models = [AutoModelForCausalLM.from_pretrained(folder / who) for who in ("student", "teacher")]
    compared = 0
    for sample in of_step(noted[0], 0):
        said = [y for y in sample["labels"] if y != -100]
        start = sample["labels"].index(said[0])
        answers = [sample["ids"][start:], sample["teacher_ids"][-len(said) :]]
        assert len(sample["weights"]) == len(said)
        if answers[0] != said or answers[1] != said:
            continue
        at = torch.tensor(said)[:, None]
        q, p = (
            model(torch.tensor([ids])).logits[0, -len(said) - 1 : -1].softmax(-1).gather(1, at)
            for model, ids in zip(models, (sample["ids"], sample["teacher_ids"]), strict=True)
        )
        expected = (q / ((1 - SHARE) * q + SHARE * p)).flatten().tolist()
        assert sample["weights"] == pytest.approx(expected, rel=1e-3)
        assert sample["logprobs"] == pytest.approx(q.log().flatten().tolist(), abs=1e-4)
        compared += 1
    assert compared >= 3


def test_a_kept_row_keeps_its_weights(noted: list[Result]):
    of_text = {tuple(sample["ids"]): sample["weights"] for sample in of_step(noted[0], 0)}
    kept = of_step(noted[0], 2)
    assert len(kept) == ROWS
    for sample in kept:
        assert min(sample["weights"]) < 1
        assert sample["weights"] == of_text[tuple(sample["ids"])]


def test_a_student_that_draws_alone_has_no_weights(noted: list[Result]):
    assert noted[1]["samples"]
    assert {sample["weights"] is None for sample in noted[1]["samples"]} == {True}
    assert all(WEIGHT not in log for log in noted[1]["logs"])
    texts = [[sample["ids"] for sample in of_step(result, 0)] for result in noted[:2]]
    assert texts[0] != texts[1]


def test_a_cached_teacher_takes_part(trainings: dict[str, Training], noted: list[Result]):
    assert_same_training(trainings[BASE], Training.of(noted[2]))


def test_a_checkpoint_keeps_the_weights(folder: Path, trainings: dict[str, Training]):
    path = folder / BASE / f"checkpoint-{SAVED}" / "dskd" / "replay.safetensors"
    with safe_open(path, "pt") as kept:
        weights = kept.get_tensor("dskd_weights lengths")
        assert torch.equal(weights, kept.get_tensor("dskd_logprobs lengths"))
        assert int(weights.min()) > 0


@pytest.mark.parametrize("share", [0.0, 0.4], ids=["off", "on"])
def test_a_share_may_change_where_a_training_is_resumed(folder: Path, share: float):
    """Kept rows are then of both kinds, and so are those of the next checkpoint."""
    samples = {**SAMPLES, "replay": 2 * ROWS, "share": 1.0}
    other = SHARE - share
    first, then = (
        training_config(
            folder, {**BLOCK, "samples": {**samples, "teacher_mix": mix}}, f"{name} {share}"
        )
        for name, mix in (("before", other), ("after", share))
    )
    first |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    then |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    then["resume_from_checkpoint"] = str(folder / f"before {share}" / "checkpoint-1")
    results = run(1, {"do": "train", "config": first}, {"do": "train", "config": then})
    path = folder / f"after {share}" / "checkpoint-2" / "dskd" / "replay.safetensors"
    with safe_open(path, "pt") as kept:
        of_rows = (kept.get_tensor("dskd_weights lengths") > 0).tolist()
    before = round(ROWS * results[0]["logs"][0]["dskd/written_rows"])
    assert 0 < before < len(of_rows)
    assert of_rows == [other > 0] * before + [share > 0] * (len(of_rows) - before)


def test_a_teacher_alone_is_cut_over_the_ranks(folder: Path, trainings: dict[str, Training]):
    """Its forwards need all ranks, the student's do not."""
    block = {**BY_ONE, "teacher": {**TEACHER, "shard": "full"}}
    config = training_config(folder, block, "teacher cut", {"micro_batch_size": ROWS // 2})
    results = launch(2, [{"do": "train", "config": config}], timeout=600)[0]
    assert all(result["teacher_is_sharded"] for result in results)
    assert_same_training(trainings[BASE], Training.of(results[0]), atol=ROUNDING)


def test_a_student_alone_is_cut_over_the_ranks(folder: Path, trainings: dict[str, Training]):
    block = {**BY_ONE, "teacher": {**TEACHER, "shard": "none"}}
    overrides = {**SHARDED, "micro_batch_size": ROWS // 2}
    config = training_config(folder, block, "student cut", overrides)
    results = launch(2, [{"do": "train", "config": config}], timeout=600)[0]
    assert not any(result["teacher_is_sharded"] for result in results)
    assert_same_training(trainings[BASE], Training.of(results[0]), atol=ROUNDING)


def test_of_several_teachers_each_rows_own_takes_part(folder: Path):
    """A row is written as if there were its teacher alone."""
    block: dict[str, Any] = {**BLOCK, "samples": {**SAMPLES, "share": 1.0, "replay": 0}}
    each = {
        name: {**TEACHER, "base_model": str(folder / path)}
        for name, path in two_teachers.FOLDERS.items()
    }
    several = {key: value for key, value in block.items() if key != "teacher"}
    several |= {"teachers": each, "route": {"field": two_teachers.FIELD}}
    blocks = [several, *({**block, "teacher": teacher} for teacher in each.values())]
    jobs = [
        {
            "do": "train_noting_weights",
            "config": training_config(folder, one, f"several {k}", {"max_steps": 1}),
        }
        for k, one in enumerate(blocks)
    ]
    both, *alone = (
        {tuple(sample["ids"]): sample["weights"] for sample in result["samples"]}
        for result in run(1, *jobs)
    )
    assert not alone[0].keys() & alone[1].keys()
    assert both
    of_each = [both.keys() & one.keys() for one in alone]
    assert all(of_each)
    assert both.keys() == of_each[0] | of_each[1]
    for one, mine in zip(alone, of_each, strict=True):
        for ids in mine:
            assert both[ids] == pytest.approx(one[ids], rel=1e-4)


def test_other_objectives_learn_from_mixed_text_as_it_is(folder: Path):
    """Also those that compare it otherwise than the data's answers, as DistiLLM-2 does."""
    samples: dict[str, Any] = {**SAMPLES, "replay": 0}
    two = {"divergence": "skewed_forward_kl", "divergence_written": "skewed_reverse_kl"}
    objectives = [
        {"name": name, **keys} for name in ("token_kd", "dual_space") for keys in ({}, two)
    ]
    configs = [
        training_config(
            folder, {**BLOCK, "samples": samples, "objective": one}, f"other {k}", {"max_steps": 2}
        )
        for k, one in enumerate(objectives)
    ]
    for result in run(1, *({"do": "train", "config": config} for config in configs)):
        assert all(log["grad_norm"] > 0 for log in result["logs"])
        assert [WEIGHT in log for log in result["logs"]] == [True, False]
