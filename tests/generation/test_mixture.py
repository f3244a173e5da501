"""Writing beside a partner: what two models draw together, and what it depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from axolotl_dskd.generation import (
    Answer,
    MixedWriter,
    Partner,
    Sampling,
    TransformersWriter,
    prompt_seed,
)
from axolotl_dskd.models.student import Student
from tests.support import tiny

V, PAD, END, THEIR_END = 61, 0, 7, 9
PROMPTS = [[3, 4, 5], [11, 12, 13, 14, 15, 16, 17, 18], [9], [21, 22, 23, 24]]
#: The same questions in another template: shorter and longer ones.
BESIDE = [[50, 3, 4, 5, 51, 52], [13, 14], [30, 9, 31], [21, 22, 23, 24]]
SHARE = 0.3
SAMPLINGS = [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.0}]


def student() -> Any:
    return tiny.tiny_llama(64, 32, seed=3)


def teacher(**overrides: Any) -> Any:
    """Of another size, whose head has other rows of padding."""
    return tiny.tiny_llama(72, 48, seed=4, **{"initializer_range": 0.3, **overrides})


def mixed(ours: Any, theirs: Any, share: float = SHARE, **keys: Any) -> MixedWriter:
    @contextmanager
    def running() -> Iterator[Any]:
        yield theirs

    of_partner = {k: keys.pop(k) for k in ("ends", "max_length") if k in keys}
    settings = {"end_ids": [END], "pad_id": PAD, "vocab_size": V, **keys}
    running_student = Student(lambda: ours, Accelerator(cpu=True), V).running
    writer = TransformersWriter(running_student, **settings)
    return MixedWriter(writer, Partner(running, share, **of_partner))


def seeds(prompts: Sequence[Sequence[int]], number: int = 0) -> list[int]:
    return [prompt_seed(prompt, number) for prompt in prompts]


def written(writer: MixedWriter, sampling: Sampling, number: int = 0) -> list[Answer]:
    return writer.write(PROMPTS, BESIDE, sampling, seeds(PROMPTS, number))


@torch.no_grad()
def logits(model: Any, prompt: list[int], ids: list[int]) -> Tensor:
    """[len(ids) + 1, V] float32 before and behind each of some ids, from one forward."""
    found = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :, :V]
    return found.float()


def distribution(scores: Tensor, sampling: Sampling) -> Tensor:
    """[..., V] float64 what one model draws from alone, in plain words."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(-1), V).double()
    probability = (scores / sampling.temperature).softmax(-1).double()
    ordered, order = probability.sort(-1, descending=True)
    if sampling.top_k:
        ordered[..., sampling.top_k :] = 0
    if sampling.top_p < 1:
        ordered[(ordered.cumsum(-1) - ordered) >= sampling.top_p] = 0
    kept = torch.zeros_like(probability).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)


def both(ours: Any, theirs: Any, row: int, ids: list[int], sampling: Sampling) -> list[Tensor]:
    """[len(ids) + 1, V] each: the student's and the teacher's distribution."""
    sides = (ours, PROMPTS[row]), (theirs, BESIDE[row])
    return [distribution(logits(model, asked, ids), sampling) for model, asked in sides]


def plainly(ours: Any, theirs: Any, row: int, sampling: Sampling, room: int = 12) -> list[int]:
    """The answer of a row by a loop that runs both models on all of it for each token."""
    generator = torch.Generator().manual_seed(seeds(PROMPTS)[row])
    numbers = torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64)
    ids: list[int] = []
    while len(ids) < room and ids[-1:] != [END]:
        q, p = both(ours, theirs, row, ids, sampling)
        total = ((1 - SHARE) * q[-1] + SHARE * p[-1]).cumsum(0)
        ids.append(int((total <= numbers[len(ids)] * total[-1]).sum()))
    return ids


@pytest.mark.parametrize("batch_tokens", [1, 40, 16384])
@pytest.mark.parametrize("keys", SAMPLINGS, ids=str)
def test_texts_are_those_of_a_plain_loop_that_runs_both_models_on_each_row(
    keys: dict[str, Any], batch_tokens: int
):
    ours, theirs, sampling = student(), teacher(), Sampling(12, **keys)
    answers = written(mixed(ours, theirs, batch_tokens=batch_tokens), sampling)
    for row, answer in enumerate(answers):
        assert answer.ids == plainly(ours, theirs, row, sampling)
        assert answer.ended == (answer.ids[-1] == END)


@pytest.mark.parametrize("keys", SAMPLINGS, ids=str)
def test_weights_are_the_students_part_of_each_draw_and_logprobs_its_own(keys: dict[str, Any]):
    ours, theirs, sampling = student(), teacher(), Sampling(12, **keys)
    seen: list[float] = []
    for number in range(3):
        for row, answer in enumerate(written(mixed(ours, theirs), sampling, number)):
            at = torch.tensor(answer.ids)[:, None]
            q, p = (x[:-1].gather(1, at) for x in both(ours, theirs, row, answer.ids, sampling))
            expected = (q / ((1 - SHARE) * q + SHARE * p)).squeeze(1)
            assert answer.weights == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
            plain = logits(ours, PROMPTS[row], answer.ids)[:-1].log_softmax(-1).gather(1, at)
            assert answer.logprobs == pytest.approx(plain.squeeze(1).tolist(), abs=1e-5)
            seen += answer.weights
    assert max(seen) <= 1 / (1 - SHARE) + 1e-9
    assert min(seen) < 0.5


@pytest.mark.parametrize("keys", [{}, {"top_k": 4, "temperature": 0.7}, {"temperature": 0.0}])
def test_tokens_come_as_often_as_the_mixture_has_them(keys: dict[str, Any]):
    """Chi-square over tokens that are expected five times at least, those below together."""
    ours, theirs, sampling, count = student(), teacher(), Sampling(1, **keys), 6000
    writer = mixed(ours, theirs)
    numbers = [prompt_seed(PROMPTS[0], k) for k in range(count)]
    answers = writer.write([PROMPTS[0]] * count, [BESIDE[0]] * count, sampling, numbers)
    found = torch.bincount(torch.tensor([a.ids[0] for a in answers]), minlength=V).double()
    q, p = (x[0] for x in both(ours, theirs, 0, [], sampling))
    expected = ((1 - SHARE) * q + SHARE * p) * count
    assert int(found[expected == 0].sum()) == 0
    often = expected >= 5
    cells = [(found[often], expected[often])]
    if float(expected[~often].sum()) >= 5:
        cells.append((found[~often].sum()[None], expected[~often].sum()[None]))
    statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in cells)
    freedom = sum(len(e) for _, e in cells) - 1
    # Mean `freedom`, variance twice that: five standard deviations.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    # Neither model alone would do: the test can tell them from both.
    for alone in (q, p):
        assert float((expected / count - alone).abs().sum()) > 0.1


def test_without_a_share_the_student_writes_what_it_would_alone():
    ours, sampling = student(), Sampling(16)
    writer = mixed(ours, teacher(), share=0.0)
    alone = writer.writer.write(PROMPTS, sampling, seeds(PROMPTS))
    answers = written(writer, sampling)
    assert [a.ids for a in answers] == [a.ids for a in alone]
    assert {w for answer in answers for w in answer.weights or ()} == {1.0}
    assert [answer.weights for answer in alone] == [None] * len(PROMPTS)


def test_a_text_depends_on_its_two_prompts_and_its_seed_alone():
    writer = mixed(student(), teacher())
    together = written(writer, Sampling(16))
    order = [2, 0, 3, 1]
    apart = writer.write(
        [PROMPTS[k] for k in order],
        [BESIDE[k] for k in order],
        Sampling(16),
        [seeds(PROMPTS)[k] for k in order],
    )
    assert [a.ids for a in apart] == [together[k].ids for k in order]
    others = writer.write(PROMPTS, BESIDE[::-1], Sampling(16), seeds(PROMPTS))
    assert [a.ids for a in others] != [a.ids for a in together]


def test_where_the_teacher_would_end_the_students_own_end_is_drawn():
    theirs = teacher()  # whose answers end at once
    sure = torch.zeros(72)
    sure[THEIR_END] = 100.0
    theirs.lm_head.bias = torch.nn.Parameter(sure)
    ours = student()
    apart = written(mixed(ours, theirs, share=0.9), Sampling(12))
    assert any(THEIR_END in answer.ids for answer in apart)
    answers = written(mixed(ours, theirs, share=0.9, ends={THEIR_END: END}), Sampling(12))
    for row, answer in enumerate(answers):
        assert THEIR_END not in answer.ids
        assert answer.ended and answer.ids[-1] == END
        q = logits(ours, PROMPTS[row], answer.ids).softmax(-1)[len(answer.ids) - 1, END].double()
        assert answer.weights is not None
        assert answer.weights[-1] == pytest.approx(float(q / (0.1 * q + 0.9)), rel=1e-4)


def test_no_answer_is_longer_than_either_side_has_room_for():
    answers = written(mixed(student(), teacher(), max_length=6), Sampling(12, max_length=10))
    for ours, theirs, answer in zip(PROMPTS, BESIDE, answers, strict=True):
        assert len(answer.ids) <= max(0, min(10 - len(ours), 6 - len(theirs)))
    assert answers[0] == Answer([], [], ended=False)
    assert max(len(answer.ids) for answer in answers) > 0


def test_padding_and_rows_that_have_ended_move_no_position():
    """Of a teacher with a table of them, which has no more: rows with more room go on."""
    config = GPT2Config(vocab_size=64, n_positions=9, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # so that they decide something
        theirs.transformer.wpe.weight.normal_()
        theirs.transformer.wte.weight.mul_(20)
    ours, sampling = student(), Sampling(12)
    answers = written(mixed(ours, theirs, max_length=9), sampling)
    for row, answer in enumerate(answers):
        room = 9 - len(BESIDE[row])
        assert answer.ids == plainly(ours, theirs, row, sampling, room)
        assert answer.ended or len(answer.ids) == room


def test_a_partner_runs_as_often_as_the_student_also_for_other_ranks():
    """Where forwards need all ranks, one whose rows have ended goes on for the others."""
    ours, theirs = student(), teacher()
    counts = {id(ours): 0, id(theirs): 0}
    for model in (ours, theirs):
        model.register_forward_pre_hook(
            lambda module, args: counts.update({id(module): counts[id(module)] + 1})
        )
    written(mixed(ours, theirs, batch_tokens=40), Sampling(12))
    assert counts[id(ours)] == counts[id(theirs)] > 12


def test_a_teacher_that_is_no_more_has_weights_that_the_loss_will_refuse():
    theirs = teacher()
    with torch.no_grad():
        theirs.lm_head.weight.fill_(torch.nan)
    for answer in written(mixed(student(), theirs), Sampling(3)):
        assert all(0 <= token < V for token in answer.ids)
        assert all(weight != weight for weight in answer.weights or ())
        assert all(number == number for number in answer.logprobs)


class Forgetful(torch.nn.Module):
    """A model that gives logits and no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(V, 4)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, **keys: Any) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, V))


def test_a_teacher_without_a_cache_is_refused_in_words():
    with pytest.raises(ValueError, match="Forgetful gives no past_key_values"):
        written(mixed(student(), Forgetful()), Sampling(3))


def test_nothing_to_write_is_nothing_written_and_an_empty_prompt_is_refused():
    writer = mixed(student(), teacher())
    assert writer.write([], [], Sampling(4), []) == []
    for prompts, beside in (([[]], [[1]]), ([[1]], [[]])):
        with pytest.raises(ValueError, match="no token"):
            writer.write(prompts, beside, Sampling(4), [1])


def test_nothing_stays_at_the_models():
    ours, theirs = student(), teacher()
    written(mixed(ours, theirs), Sampling(4))
    assert not ours._forward_hooks
    assert not theirs._forward_hooks
