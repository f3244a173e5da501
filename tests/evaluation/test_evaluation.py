"""Bits per byte and answers: against plain computations, in training, `evaluate`, best models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerState,
)

from axolotl_dskd.config import EvaluationConfig
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.evaluation.answers import RougeL
from axolotl_dskd.evaluation.record import read_record
from axolotl_dskd.evaluation.scores import row_keys
from axolotl_dskd.models.student import Student
from axolotl_dskd.training.answering import Answering, evaluations_before
from tests.support import tiny
from tests.support.batches import batch
from tests.support.ranks import run
from tests.support.runs import dskd, steps

Train = Callable[[dict[str, Any]], Any]
HELD_OUT = 6


def plain_bits_per_byte(folder: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Of the answers of all turns with their end tokens, over the bytes of the answers; and the
    share of tokens that are the model's first choice."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, text_bytes, right, tokens = 0.0, 0, 0, 0
    for row in rows:
        turns = row["messages"]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for k in range(1, len(turns), 2):
            begin = len(
                tokenizer.apply_chat_template(
                    turns[:k], add_generation_prompt=True, return_dict=True
                )["input_ids"]
            )
            end = ids.index(tokenizer.eos_token_id, begin) + 1
            for place in range(begin, end):
                nats -= float(log_p[place - 1, ids[place]])
                right += int(log_p[place - 1].argmax()) == ids[place]
                tokens += 1
            text_bytes += len(turns[k]["content"].encode())
    return nats / math.log(2) / text_bytes, right / tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with two tokenizers, and rows held out, a multiple of no batch."""
    folder = tmp_path_factory.mktemp("bits")
    tiny.save_pair(folder)
    rows = tiny.chat_rows(30)[-HELD_OUT:]
    for row in rows:  # nothing of what training learns by heart
        for turn in row["messages"][1::2]:
            turn["content"] = turn["content"][::-1]
    tiny.write_rows(folder / "held-out.jsonl", rows)
    return folder


def config(folder: Path, name: str, **overrides: Any) -> dict[str, Any]:
    """Learns by heart so quickly that later checkpoints are worse than the first."""
    held_out = {
        "path": str(folder / "held-out.jsonl"),
        "ds_type": "json",
        "type": "chat_template",
        "split": "train",
    }
    answers = {"answers": 4, "answers_every": 3, "max_new_tokens": 12}
    block = dskd(folder, evaluation={"record": True, **answers})
    defaults = {
        "test_datasets": [held_out],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_strategy": None,
        "save_total_limit": 20,
        "output_dir": str(folder / name),
        "dskd": block,
    }
    return tiny.base_config(folder, **{**defaults, **overrides})


def held_out_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "held-out.jsonl").read_text().splitlines()]


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a run has recorded of its evaluations."""
    return [line for line in read_record(folder / name) if "evaluation" in line]


def found(trainer: Any) -> list[float]:
    history = trainer.state.log_history
    return [e["eval_dskd/bits_per_byte"] for e in history if "eval_loss" in e]


@pytest.fixture(scope="module")
def trained(folder: Path, train: Train) -> Any:
    """A training that picks its best checkpoint."""
    made = config(
        folder,
        "best",
        max_steps=12,
        learning_rate=2e-2,
        metric_for_best_model="eval_dskd/bits_per_byte",
        load_best_model_at_end=True,
        early_stopping_patience=20,
    )
    return train(made)[1]


def test_it_is_the_likelihood_of_the_answers_over_their_bytes(folder: Path, trained: Any):
    """Before the first step, of the student as it came."""
    bits, accuracy = plain_bits_per_byte(folder / "student", held_out_rows(folder))
    first = next(e for e in trained.state.log_history if "eval_loss" in e)
    assert first["eval_dskd/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert first["eval_dskd/accuracy"] == pytest.approx(accuracy, abs=1e-6)
    checkpoint = folder / "best" / "checkpoint-4"
    at_four = [e for e in trained.state.log_history if e.get("step") == 4 and "eval_loss" in e]
    bits, _ = plain_bits_per_byte(checkpoint, held_out_rows(folder))
    assert at_four[0]["eval_dskd/bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_best_model_has_the_fewest(folder: Path, trained: Any):
    values = found(trained)
    assert min(values[1:]) < values[-1], "learns by heart too slowly for this test"
    assert trained.state.best_metric == pytest.approx(min(values[1:]))
    bits, _ = plain_bits_per_byte(folder / "best", held_out_rows(folder))
    assert bits == pytest.approx(min(values[1:]), rel=1e-5)


def test_training_logs_it_of_its_own_rows(trained: Any):
    for entry in steps(trained):
        nats = entry["dskd/ce"] * entry["dskd/supervised_tokens"]
        text_bytes = nats / math.log(2) / entry["dskd/bits_per_byte"]
        assert text_bytes == pytest.approx(round(text_bytes), rel=1e-5)
        assert text_bytes > entry["dskd/supervised_tokens"]


def test_the_distance_from_the_teacher_is_measured_in_evaluations_alone(trained: Any):
    history = trained.state.log_history
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert all(entry["eval_dskd/teacher_kl"] > 0 for entry in evaluations)
    assert all(0 <= entry["eval_dskd/teacher_agreement"] <= 1 for entry in evaluations)
    assert not any("dskd/teacher_kl" in entry for entry in history)


def test_rows_add_up_to_it(folder: Path, trained: Any):
    first, *lines = read_record(folder / "best")
    assert first["train"]["rows"] == 16
    assert [line["log"]["dskd/ce"] for line in lines if "log" in line] == [
        entry["dskd/ce"] for entry in steps(trained)
    ]
    evaluations = lines_of(folder, "best")
    assert len(evaluations) == len(found(trained))
    for record, bits in zip(evaluations, found(trained), strict=True):
        assert len(record["rows"]) == HELD_OUT
        nats, text_bytes, *_ = map(sum, zip(*record["rows"].values(), strict=True))
        assert nats / math.log(2) / text_bytes == pytest.approx(bits, rel=1e-9)


def test_answers_are_the_students_own_and_written_at_every_third_evaluation(
    folder: Path, trained: Any
):
    evaluations = lines_of(folder, "best")
    turns = [k for k, line in enumerate(evaluations) if line["answers"]]
    assert turns == list(range(0, len(evaluations), 3))
    rouge = {"eval_dskd/rouge_l", "eval_dskd/rouge_l_sampled"}
    assert all(rouge <= evaluations[k]["metrics"].keys() for k in turns)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    for row, found_here in zip(held_out_rows(folder), evaluations[0]["answers"], strict=False):
        question, reference = row["messages"][:2]
        assert found_here["reference"] == reference["content"]
        ids = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        out = model.generate(ids, max_new_tokens=12, do_sample=False, **ends)[0, ids.shape[1] :]
        assert found_here["greedy"] == tokenizer.decode(out, skip_special_tokens=True)
    assert any(a["greedy"] != a["sampled"] for a in evaluations[0]["answers"])


def test_a_resumed_training_answers_at_the_same_evaluations(
    folder: Path, trained: Any, train: Train
):
    """Axolotl evaluates before the first step, of a resumed training once more."""
    checkpoint = {"resume_from_checkpoint": str(folder / "best" / "checkpoint-8")}
    train(config(folder, "resumed", max_steps=12, learning_rate=2e-2, **checkpoint))
    whole, resumed = (
        [(line["step"], len(line["answers"])) for line in lines_of(folder, name)]
        for name in ("best", "resumed")
    )
    assert resumed == [(step, count) for step, count in whole if step >= 8]
    assert {count for _, count in resumed} == {0, 4}


def test_a_step_that_is_evaluated_again_is_counted_once_and_each_set_by_itself():
    state = TrainerState()
    for step, prefix in ((0, "eval_a"), (2, "eval_a"), (2, "eval_a"), (2, "eval_b"), (4, "eval_a")):
        state.log_history.append({f"{prefix}_runtime": 0.1, "step": step})
        state.log_history.append({"loss": 1.0, "step": step})
    state.global_step = 4
    assert evaluations_before(state, "eval_a") == 2
    assert evaluations_before(state, "eval_b") == 1
    assert evaluations_before(state, "eval") == 0


def test_rows_of_the_same_tokens_that_are_trained_on_elsewhere_are_others():
    row = batch([4])
    assert row_keys(row) == row_keys(batch([4]))
    assert row_keys(row) != row_keys(replace(row, labels=row.input_ids))


def test_an_answer_ends_where_the_student_has_no_position_left():
    """As GPT-2, whose table of positions ends."""
    tokenizer = tiny.byte_level_tokenizer()
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    student = Student(lambda: model, Accelerator(cpu=True), len(tokenizer))
    config = EvaluationConfig(answers=2, max_new_tokens=16)
    answering = Answering(config, student, tokenizer, token_bytes(tokenizer), seed=0)
    full, short = [5] * 24 + [6], [5] * 20 + [6, 6]
    labels = [[-100] * 24 + [6], [-100] * 20 + [6, 6]]
    rows = Dataset.from_dict({"input_ids": [full, short], "labels": labels})
    none, _ = answering(0, rows)
    assert (none.greedy, none.sampled, none.rouge_l) == ("", "", 0)


def test_rouge_l_is_the_share_of_words_in_the_same_order():
    score = RougeL()
    assert score("The cat sat on the mat.", "the cats on the mat") == pytest.approx(10 / 11)
    assert score("one two", "three") == 0


@pytest.mark.parametrize("block", [{}, {"kd_ratio": 0.0}], ids=["dual space", "no teacher"])
def test_axolotl_evaluate_gives_the_number_of_the_training(
    folder: Path, trained: Any, validated: Callable[[dict[str, Any]], Any], block: dict[str, Any]
):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.evaluate import evaluate

    evaluation = {"answers": 4, "max_new_tokens": 12}
    same = config(folder, "evaluated", dskd=dskd(folder, evaluation=evaluation, **block))
    meta = load_datasets(cfg=validated(same), cli_args=TrainerCliArgs())
    metrics = evaluate(cfg=validated(same), dataset_meta=meta)
    assert metrics["eval_dskd/bits_per_byte"] == pytest.approx(found(trained)[0], rel=1e-6)
    assert metrics["train_dskd/bits_per_byte"] > 0
    first = next(e for e in trained.state.log_history if "eval_loss" in e)
    for name in ("eval_dskd/rouge_l", "eval_dskd/rouge_l_sampled"):
        assert metrics[name] == pytest.approx(first[name])


def test_packing_and_ranks_do_not_change_it(folder: Path, trained: Any):
    """Of six rows, two ranks with batches of four see two twice: neither bits per byte nor any
    other mean of ours counts them so."""
    packed = config(
        folder,
        "packed",
        max_steps=1,
        micro_batch_size=1,
        sequence_len=2048,
        sample_packing=True,
        eval_sample_packing=True,
    )
    # Training reads nothing of what a comparison would do.
    ranks = config(folder, "ranks", max_steps=1, compare={"runs": ["sft", "dskd"], "seeds": [1]})
    [one] = run(1, {"do": "train", "config": packed})
    [two] = run(2, {"do": "train", "config": ranks})
    alone = next(entry for entry in trained.state.log_history if "eval_loss" in entry)
    ours = {name: mean for name, mean in alone.items() if name.startswith("eval_dskd/")}
    assert {"eval_dskd/ce", "eval_dskd/teacher_kl", "eval_dskd/supervised_tokens"} <= ours.keys()
    for result in (one, two):
        first = result["evaluations"][0]
        assert {name: first[name] for name in ours} == pytest.approx(ours, rel=1e-4)
    answered = [lines_of(folder, name)[0]["answers"] for name in ("best", "packed", "ranks")]
    assert len(answered[0]) == 4
    assert answered[0] == answered[1] == answered[2]
