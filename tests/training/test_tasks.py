"""Axolotl's lm_eval plugin beside ours: it evaluates what was trained, also an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import tiny
from tests.support.ranks import Result, run

pytestmark = pytest.mark.slow

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
TASK = {
    "task": "tiny_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


def trained(folder: Path, others: list[str], **overrides: Any) -> Result:
    rows = [{"question": q, "choices": [a, a[::-1]], "answer": 0} for q, a in tiny.QUESTIONS]
    questions = tiny.write_rows(folder / "questions.jsonl", rows)
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(questions)}}}
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    config = tiny.base_config(folder, learning_rate=0.02, **overrides)
    config["plugins"] = [*config["plugins"], "axolotl.integrations.lm_eval.LMEvalPlugin"]
    config["lm_eval_tasks"] = ["tiny_choice"]
    job = {"do": "train_for_tasks", "config": config, "folder": str(folder), "others": others}
    return run(1, job)[0]


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_tasks_are_asked_of_the_student_that_was_trained(
    pair_folder: Path, adapter: dict[str, Any]
):
    student = "merged" if adapter else ""
    models = [pair_folder / "out" / student, pair_folder / "student"]
    others = [f"pretrained={path},dtype=float32" for path in models]
    result = trained(pair_folder, others, **adapter)
    assert len(result["commands"]) == 1
    told, after, before = result["loglikelihoods"]
    assert len(told) == 2 * len(tiny.QUESTIONS)
    assert told == pytest.approx(after, rel=1e-2)  # in 16 bits
    assert told != pytest.approx(before, rel=5e-2)


def test_a_model_that_the_user_names_stays(pair_folder: Path):
    named = str(pair_folder / "student")
    result = trained(pair_folder, [], lm_eval_model=named, **LORA)
    assert f"pretrained={named},dtype=float16" in result["commands"][0]
