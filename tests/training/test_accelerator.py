"""Whole trainings on an accelerator that is not there: the same as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

from tests.support import tiny, two_teachers
from tests.support.equivalence import save_pair
from tests.support.on_accelerator import on_accelerator
from tests.support.pretend import DEVICE
from tests.support.taught import teach

pytestmark = pytest.mark.slow

Train = Callable[[dict[str, Any]], Any]

#: The fused kernels of CPUs round otherwise than those that this accelerator is left with.
EAGER = {"attn_implementation": "eager"}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
WRITTEN = {"from": "student", "share": 0.75, "max_new_tokens": 16, "seed": 131}
#: Keys of Axolotl, and blocks without their teachers. Together they have every part of a training.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eta, cached, evaluated": (
        {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2},
        {
            "objective": {"alignment": "eta", "teacher_space_share": 0.5},
            "evaluation": {"answers": 2, "record": True},
        },
    ),
    "several teachers, packed, attending": (
        {"sample_packing": True, "micro_batch_size": 1, **LORA, "lora_target_linear": True},
        {
            "objective": {"agreement_mask": False},  # a threshold, at which rounding decides
            "virtual_attention": {"blocks": 4, "entropy_weight": 0.1, "learning_rate": 1e-3},
        },
    ),
    "policy on mixed and kept answers": (
        {},
        {
            "objective": {"name": "policy"},
            "samples": {**WRITTEN, "replay": 8, "replay_schedule": "constant", "teacher_mix": 0.4},
        },
    ),
    "preference": (
        {"micro_batch_size": 2},
        {"objective": {"name": "preference"}, "samples": {**WRITTEN, "share": 1.0}},
    ),
}


def config(folder: Path, case: str, name: str) -> dict[str, Any]:
    keys, block = CASES[case]
    teacher: dict[str, Any] = {"base_model": str(folder / "teacher"), **EAGER}
    if "cached" in case:
        teacher["cache"] = {"path": str(folder / f"cache {name}"), "dtype": "float32"}
    if "evaluated" in case:
        held_out = {"path": str(folder / "reversed.jsonl"), "ds_type": "json", "split": "train"}
        keys = {**keys, "test_datasets": [held_out | {"type": "chat_template"}]}
    teachers = {"teacher": teacher}
    if "several" in case:
        teachers = two_teachers.block(folder)
        for one in teachers["teachers"].values():
            one |= EAGER
    return tiny.base_config(
        folder,
        dskd=teachers | block,
        max_steps=4,
        **EAGER,
        output_dir=str(folder / name),
        dataset_prepared_path=str(folder / f"prepared {case}"),
        **keys,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_the_same_on_an_accelerator(tmp_path: Path, train: Train, case: str):
    if "several" in case:
        two_teachers.save(tmp_path)
    else:
        save_pair(tmp_path, one_vocabulary="mixed" in case)
    teach(tmp_path / "student", tiny.chat_rows(16))
    set_seed(1)  # adapters begin by chance, before Axolotl seeds it
    _, expected = train(config(tmp_path, case, "cpu"))
    set_seed(1)
    with on_accelerator():
        model, found = train(config(tmp_path, case, "accelerator"))
    assert {p.device for p in model.parameters()} == {DEVICE}
    logs = [
        [{k: v for k, v in entry.items() if "dskd" in k or "loss" in k} for entry in of]
        for of in (found.state.log_history, expected.state.log_history)
    ]
    assert len(logs[0]) == len(logs[1]) > 3
    for ours, theirs in zip(*logs, strict=True):
        ours.pop("dskd/written_tokens_per_second", None)
        theirs.pop("dskd/written_tokens_per_second", None)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
