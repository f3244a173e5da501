"""How attention leaves the student: what is evaluated, written with and exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from axolotl_dskd.config import VirtualAttentionConfig
from axolotl_dskd.config.refusals import refusals
from axolotl_dskd.losses import Budget
from axolotl_dskd.models.heads import output_head
from axolotl_dskd.models.student import Student
from axolotl_dskd.training.attending import Attending
from axolotl_dskd.types import LossOutput, Side, View
from axolotl_dskd.virtual_attention import VirtualAttention
from tests.support import tiny
from tests.support.equivalence import (
    BASE,
    SAVED,
    assert_same_training,
    save_pair,
    train_variants,
)

IDS = torch.arange(3, 19).unsqueeze(0)


class Taught:
    """A small student whose attention has learned something.

    Attributes:
        model, student, attending: of it.
        state: the trainer's.
    """

    def __init__(self, tied: bool = False, **keys: Any) -> None:
        tokenizer = tiny.byte_level_tokenizer()
        V = len(tokenizer)
        self.model = tiny.tiny_llama(V, 32, 3, tie_word_embeddings=tied)
        self.student = Student(lambda: self.model, Accelerator(cpu=True), V)
        config = VirtualAttentionConfig(**{"blocks": 4, **keys})
        module = VirtualAttention(
            config, tokenizer, V, output_head(self.model), torch.device("cpu"), 1
        )
        generator = torch.Generator().manual_seed(5)
        module.logits.data = torch.randn(module.logits.shape, generator=generator)
        self.state = SimpleNamespace(global_step=2, max_steps=10)
        self.attending = Attending(config, module, self.student, Budget(4), lambda: self.state)

    @torch.no_grad()
    def own_logits(self) -> Tensor:
        return self.model(IDS).logits

    @torch.no_grad()
    def learned_logits(self, evaluates: bool = False) -> Tensor:
        """From its states and the head that the loss is computed with."""
        hidden = self.model.model(IDS).last_hidden_state
        return self.student.head(evaluates=evaluates).logits(hidden)

    def written_logits(self, evaluates: bool = False) -> Tensor:
        """Of the model as it writes."""
        with self.student.running(evaluates=evaluates) as model:
            return model(IDS).logits

    def end(self) -> None:
        """Training ends."""
        self.state.global_step = self.state.max_steps
        self.attending.on_train_end(None, self.state, None)


@pytest.mark.parametrize("leave", ["anneal", "merge"])
def test_a_student_writes_what_it_learns_from_with_its_attention(leave: str):
    taught = Taught(leave=leave)
    torch.testing.assert_close(taught.written_logits(), taught.learned_logits())
    assert not torch.allclose(taught.learned_logits(), taught.own_logits(), atol=1e-2)
    assert "forward" not in vars(taught.model.lm_head)


@pytest.mark.parametrize("leave", ["anneal", "merge"])
def test_what_is_evaluated_is_what_would_be_exported_now(leave: str):
    taught = Taught(leave=leave)
    expected = taught.own_logits() if leave == "anneal" else taught.learned_logits()
    torch.testing.assert_close(taught.learned_logits(evaluates=True), expected)
    torch.testing.assert_close(taught.written_logits(evaluates=True), expected)


def test_at_the_last_step_the_annealed_student_is_the_plain_one():
    taught = Taught()
    taught.state.global_step = taught.state.max_steps - 1
    torch.testing.assert_close(taught.learned_logits(), taught.own_logits())
    taught.end()
    torch.testing.assert_close(taught.learned_logits(), taught.own_logits())


def test_merged_the_plain_model_has_the_logits_of_training():
    taught = Taught(leave="merge")
    expected = taught.learned_logits()
    for _ in range(2):  # merged once, however often training ends
        taught.end()
        torch.testing.assert_close(taught.own_logits(), expected)
        torch.testing.assert_close(taught.learned_logits(), expected)


def test_a_training_that_ends_early_says_that_attention_was_not_gone(
    caplog: pytest.LogCaptureFixture,
):
    taught = Taught()
    with caplog.at_level("WARNING", "axolotl_dskd.training.attending"):
        taught.attending.on_train_end(None, taught.state, None)
    assert "at step 2 of 10, with virtual attention at strength 1.00" in caplog.text


@pytest.mark.parametrize(("rate", "says"), [(0.01, True), (0.3, False)])
def test_a_training_too_short_for_the_attention_to_move_says_so(
    caplog: pytest.LogCaptureFixture, rate: float, says: bool
):
    """Seven of ten steps are at full strength."""
    taught = Taught()
    taught.attending.beside(rate / 10)  # of the student
    with caplog.at_level("WARNING", "axolotl_dskd.training.attending"):
        taught.attending.on_train_begin(None, taught.state, None)
    assert ("in 7 steps at full strength its weights can move by 0.07" in caplog.text) == says
    assert ("dskd.virtual_attention.learning_rate to 0.3" in caplog.text) == says


def test_a_head_that_cannot_be_merged_is_refused_in_words():
    with pytest.raises(ValueError, match="is tied to its input embedding"):
        Taught(tied=True, leave="merge")
    frozen = Taught()
    frozen.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="does not train as a whole"):
        frozen.student.check_merging()


def test_entropy_enters_the_loss_once_a_token_and_fades_with_the_attention():
    taught = Taught(entropy_weight=0.5)
    tokens = Side(*(torch.zeros(6, dtype=torch.long),) * 3)
    entropy = float(taught.attending.module.entropy().detach())
    for step, share in ((0, 1.0), (7, 1.0), (8, 0.5), (9, 0.0)):
        taught.state.global_step = step
        out = LossOutput(torch.tensor(2.0), 6)
        taught.attending.add_entropy(out, View(tokens))
        expected = 2.0 + share * 0.5 * 6 * entropy
        assert float(out.loss) == pytest.approx(expected, rel=1e-6)
        assert float(out.sums()["attention_entropy"]) == pytest.approx(6 * entropy, rel=1e-6)


@pytest.mark.slow
def test_without_a_teacher_it_is_the_same_training_resumed_and_on_two_ranks(tmp_path: Path):
    folder, ways = save_pair(tmp_path), ("resumed", "two ranks")
    block = {"kd_ratio": 0, "virtual_attention": {"blocks": 4, "learning_rate": 0.05}}
    trainings = train_variants(folder, block, ways)
    for way in ways:
        assert_same_training(trainings[BASE], trainings[way])
    step = trainings[BASE].metrics[-1]
    assert step["dskd/attention_entropy"] < 1
    assert step["dskd/ce"] > 0


@pytest.mark.slow
def test_merged_on_two_sharded_ranks_it_is_the_same_plain_model(tmp_path: Path):
    folder = save_pair(tmp_path)
    block = {"virtual_attention": {"blocks": 4, "leave": "merge", "learning_rate": 0.05}}
    trainings = train_variants(folder, block, ["fsdp2"])
    whole = trainings[BASE]
    assert_same_training(whole, trainings["fsdp2"])
    exported = load_file(folder / BASE / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(exported, whole.student["lm_head.weight"])
    last = load_file(folder / BASE / f"checkpoint-{2 * SAVED}" / "model.safetensors")
    assert not torch.allclose(exported, last["lm_head.weight"], atol=1e-3)
    assert not (folder / BASE / "dskd").exists()


@pytest.mark.parametrize("key", ["load_best_model_at_end", "early_stopping_patience", "deepspeed"])
def test_a_merged_run_refuses_what_would_take_another_head(key: str):
    block = {"teacher": {"base_model": "x"}, "virtual_attention": {"leave": "merge"}}
    (problem,) = refusals({"dskd": block, key: 3})
    assert f"`{key}` with `dskd.virtual_attention.leave: merge`" in problem
    block["virtual_attention"] = {"leave": "anneal"}
    assert not refusals({"dskd": block, key: 3})
