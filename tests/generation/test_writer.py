"""Writing: what is drawn, what it depends on, and what a model is like afterwards."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_dskd.generation import Answer, Sampling, TransformersWriter, prompt_seed
from axolotl_dskd.models.student import Student
from tests.support import tiny

V, PAD, END = 61, 0, 7
PROMPTS = [[3, 4, 5], [11, 12, 13, 14, 15, 16, 17, 18], [9], [21, 22, 23, 24]]


def model(**overrides: Any) -> Any:
    return tiny.tiny_llama(64, 32, seed=3, **overrides)


def writer(model: Any, **keys: Any) -> TransformersWriter:
    student = Student(lambda: model, Accelerator(cpu=True), V)
    settings = {"end_ids": [END], "pad_id": PAD, "vocab_size": V, **keys}
    return TransformersWriter(student.running, **settings)


def seeds(prompts: Sequence[Sequence[int]], number: int = 0) -> list[int]:
    return [prompt_seed(prompt, number) for prompt in prompts]


def written(model: Any, sampling: Sampling, number: int = 0, **keys: Any) -> list[Answer]:
    return writer(model, **keys).write(PROMPTS, sampling, seeds(PROMPTS, number))


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """[len(ids), V] of each position, from one forward over the row alone."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, :, :V].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def test_greedy_takes_the_most_likely_token_of_a_plain_forward():
    student = model()
    for prompt, answer in zip(
        PROMPTS, written(student, Sampling(12, temperature=0.0)), strict=True
    ):
        assert answer.ids == logprobs(student, prompt, answer.ids).argmax(-1).tolist()
        assert len(answer.ids) == 12 or answer.ids[-1] == END


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("keys", [{}, {"top_k": 3}, {"top_p": 0.4}], ids=str)
def test_logprobs_are_those_of_a_plain_forward_over_the_whole_vocabulary(
    temperature: float, keys: dict[str, Any]
):
    student = model()
    answers = written(student, Sampling(12, temperature=temperature, **keys))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        plain = logprobs(student, prompt, answer.ids)
        expected = plain.gather(1, torch.tensor(answer.ids)[:, None]).squeeze(1)
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def assert_same(ours: list[Answer], theirs: list[Answer]) -> None:
    """The same texts, and log-probabilities but for rounding: that depends on where tensors lie."""
    assert [(a.ids, a.ended) for a in ours] == [(a.ids, a.ended) for a in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_text_depends_on_its_prompt_and_seed_alone():
    student, sampling = model(), Sampling(16)
    together = written(student, sampling)
    for batch_tokens in (1, 30, 60):
        assert [a.ids for a in written(student, sampling, batch_tokens=batch_tokens)] == [
            a.ids for a in together
        ]
    assert [a.ids for a in written(student, sampling, number=1)] != [a.ids for a in together]


def test_random_numbers_of_the_training_are_left_alone():
    student = model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    written(student, Sampling(8))
    assert torch.equal(torch.rand(3), expected)


def test_tokens_come_as_often_as_they_are_likely():
    student = model()
    prompts = [[3, 4, 5]] * 4000
    numbers = [prompt_seed(prompt, k) for k, prompt in enumerate(prompts)]
    answers = writer(student).write(prompts, Sampling(1), numbers)
    found = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=V) / 4000
    expected = logprobs(student, prompts[0], [1])[0].exp()
    assert float((found - expected).abs().max()) < 0.03


@pytest.mark.parametrize("keys", [{}, {"top_k": 3}, {"top_p": 0.3}], ids=str)
def test_a_model_that_is_no_more_writes_what_the_loss_will_refuse(keys: dict[str, Any]):
    student = model()
    with torch.no_grad():
        student.lm_head.weight.fill_(torch.nan)
    for answer in written(student, Sampling(3, **keys)):
        assert all(0 <= token < V for token in answer.ids)
        assert all(x != x for x in answer.logprobs)


@pytest.mark.parametrize("keys", [{"top_k": 3}, {"top_p": 0.3}], ids=str)
def test_what_is_filtered_is_never_drawn(keys: dict[str, Any]):
    student = model()
    prompts = [[3, 4, 5]] * 300
    numbers = [prompt_seed(prompt, k) for k, prompt in enumerate(prompts)]
    answers = writer(student).write(prompts, Sampling(1, **keys), numbers)
    probabilities = logprobs(student, prompts[0], [1])[0].exp().sort(descending=True)
    kept = 3
    if "top_p" in keys:
        kept = int((probabilities.values.cumsum(0) < 0.3).sum()) + 1
    assert {a.ids[0] for a in answers} == set(probabilities.indices[:kept].tolist())


def test_ids_that_the_tokenizer_has_not_are_never_drawn():
    student = model()
    with torch.no_grad():
        student.lm_head.weight[V:] *= 100
    drawn = Counter(i for k in range(5) for a in written(student, Sampling(12), k) for i in a.ids)
    assert max(drawn) < V


def test_an_answer_stops_at_its_end_token_and_says_so():
    student = model()
    with torch.no_grad():
        student.lm_head.weight[END] *= 3
    answers = [a for k in range(6) for a in written(student, Sampling(12), k)]
    assert {a.ended for a in answers} == {True, False}
    for answer in answers:
        assert (answer.ids[-1] == END) == answer.ended
        assert END not in answer.ids[:-1]
        assert len(answer.ids) == len(answer.logprobs) <= 12


def test_a_prompt_that_is_the_pad_token_is_read():
    """Masks are lengths, not ids: padding may be the end token, and stand in a prompt."""
    student = model()
    prompts = [[PAD, 4, PAD, PAD], [5] * 9]
    answers = writer(student).write(prompts, Sampling(6, temperature=0.0), seeds(prompts))
    plain = logprobs(student, prompts[0], answers[0].ids)
    assert answers[0].ids == plain.argmax(-1).tolist()


def test_no_row_is_longer_than_its_limit():
    answers = written(model(), Sampling(12, max_length=8))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer.ids) <= max(0, 8 - len(prompt))
    assert answers[1] == Answer([], [], ended=False)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_row_without_more_room_stays_within_a_table_of_positions(adapter: bool):
    """While others of its batch go on; what it says does not depend on them."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=9, n_embd=32, n_layer=1, n_head=2)
    student: Any = GPT2LMHeadModel(config).eval()
    if adapter:
        student = get_peft_model(student, LoraConfig(target_modules=["c_attn"], r=4))
    sampling = Sampling(12, max_length=9)
    together = written(student, sampling)
    assert [len(a.ids) for a in together if not a.ended] == [
        9 - len(p) for p, a in zip(PROMPTS, together, strict=True) if not a.ended
    ]
    assert_same(written(student, sampling, batch_tokens=1), together)


def test_rows_of_a_batch_take_no_more_than_it_may_have():
    """A short prompt beside a long one may have more room."""
    made = writer(model(), batch_tokens=30)
    for lengths, rooms in (([8, 1], [1, 12]), ([3] * 9, [2] * 9), ([40, 1, 1], [5, 5, 5])):
        batches = made._batches(lengths, rooms)
        assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
        for rows in batches:
            width = max(lengths[k] for k in rows) + max(rooms[k] for k in rows)
            assert len(rows) == 1 or len(rows) * width <= 30


def test_nothing_to_write_is_nothing_written_and_an_empty_prompt_is_refused():
    assert writer(model()).write([], Sampling(4), []) == []
    with pytest.raises(ValueError, match="no token"):
        writer(model()).write([[]], Sampling(4), [1])


def test_habits_that_come_with_a_model_change_nothing_and_stay_with_it():
    student = model()
    plain = written(student, Sampling(12))
    student.generation_config.repetition_penalty = 9.0
    student.generation_config.top_k = 1
    habits = copy.deepcopy(student.generation_config)
    assert_same(written(student, Sampling(12)), plain)
    assert student.generation_config == habits


@contextmanager
def same_modes(model: Any) -> Iterator[None]:
    modes = {name: module.training for name, module in model.named_modules()}
    yield
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_dropout_and_checkpointing_are_off_for_writing_and_on_again_after():
    student = model(attention_dropout=0.5)
    plain = written(student, Sampling(12))
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.config.use_cache = False
    student.train()
    student.model.layers[0].eval()  # what a user froze stays frozen
    with same_modes(student):
        assert_same(written(student, Sampling(12)), plain)
    assert student.is_gradient_checkpointing


def test_an_adapter_writes_along():
    student = model()
    plain = written(student, Sampling(12))
    torch.manual_seed(0)
    tuned = get_peft_model(
        student,
        LoraConfig(target_modules=["q_proj", "lm_head"], r=4, lora_dropout=0.5),
    )
    assert_same(written(tuned.train(), Sampling(12)), plain)  # it begins as nothing
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    answers = written(tuned, Sampling(12))
    assert [a.ids for a in answers] != [a.ids for a in plain]
    tuned.eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        plain_logprobs = logprobs(tuned, prompt, answer.ids)
        expected = plain_logprobs.gather(1, torch.tensor(answer.ids)[:, None]).squeeze(1)
        assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_seed_tells_prompts_steps_and_answers_apart():
    numbers = [
        prompt_seed([1, 2], 0, 0),
        prompt_seed([1, 2], 0, 1),
        prompt_seed([1, 2], 1, 0),
        prompt_seed([1], 2, 0, 0),
        prompt_seed([2, 1], 0, 0),
        prompt_seed([1, 2, 0], 0, 0),
    ]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 << 63 for number in numbers)
