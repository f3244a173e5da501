"""The live teacher: what it says depends on the samples alone, and on its own dtype."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from axolotl_dskd.teacher import live
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.training.callbacks import TeacherEpochs
from axolotl_dskd.types import Needs
from tests.support import tiny
from tests.support.batches import batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("step", "stopped", "more"), [(5, False, True), (9, False, False), (5, True, False)]
)
def test_a_training_that_stops_early_has_no_more_epochs(step: int, stopped: bool, more: bool):
    """A cache would complete itself, for epochs that never come."""
    asked: list[bool] = []
    epochs = TeacherEpochs(SimpleNamespace(end_epoch=lambda *, more: asked.append(more)))
    state = SimpleNamespace(global_step=step, max_steps=9)
    epochs.on_epoch_end(None, state, SimpleNamespace(should_training_stop=stopped))
    assert asked == [more]


def teacher(max_tokens: int | None = None) -> LiveTeacher:
    return LiveTeacher(tiny.tiny_llama(97, 32, seed=0), 97, CPU, max_tokens)


def test_states_are_those_of_the_positions_before_each_label():
    model = tiny.tiny_llama(97, 32, seed=0)
    view = LiveTeacher(model, 97, CPU)(batch([8]), Needs())
    with torch.no_grad():
        states = model.model(batch([8]).teacher_input_ids).last_hidden_state[0]
    torch.testing.assert_close(view.hidden, states[3:7])
    assert view.tokens.labels.tolist() == batch([8]).teacher_labels[0, 4:].tolist()


@pytest.mark.parametrize("budget", [1, 13, 40, 10_000])
def test_neither_groups_nor_padding_change_the_states(budget: int):
    lengths = [6, 20, 3, 11, 20, 7]
    whole = teacher()(batch(lengths), Needs())
    other = teacher(budget)(batch(lengths, width=33), Needs())
    torch.testing.assert_close(other.hidden, whole.hidden)
    torch.testing.assert_close(other.tokens.labels, whole.tokens.labels)
    torch.testing.assert_close(other.tokens.sample_ids, whole.tokens.sample_ids)


def test_groups_hold_every_row_once_within_the_budget():
    lengths = [1024, *[20] * 51, 300]
    groups = live._groups(lengths, 2048)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * max(lengths[r] for r in group) <= 2048
    assert len(groups) <= 3


def test_the_students_autocast_does_not_reach_the_teacher():
    expected = teacher()(batch([9, 5]), Needs()).hidden
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher()(batch([9, 5]), Needs()).hidden
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_offloaded_head_is_refused_in_words():
    model = tiny.tiny_llama(97, 32, seed=0)
    model.lm_head.to_empty(device="meta")
    with pytest.raises(ValueError, match=r"device_map offloads the teacher's output head"):
        LiveTeacher(model, 97, CPU)


def test_a_tokenizer_larger_than_the_head_is_refused():
    with pytest.raises(ValueError, match=r"ids up to 99.*only 97 rows"):
        LiveTeacher(tiny.tiny_llama(97, 32, seed=0), 100, CPU)


def test_layers_may_be_offloaded_and_the_head_stays(pair_folder: Path):
    """accelerate moves them in for each forward; a CPU has only the disk to offload to."""
    from axolotl_dskd.config import TeacherConfig
    from axolotl_dskd.teacher import load_teacher

    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    whole = {"base_model": str(pair_folder / "teacher"), "dtype": "float32"}
    here, spread = (
        load_teacher(TeacherConfig.model_validate({**whole, **more}), CPU)
        for more in ({}, {"device_map": device_map})
    )
    assert any(parameter.is_meta for parameter in spread.model.layers[1].parameters())
    expected = LiveTeacher(here, 600, CPU)(batch([9, 14]), Needs())
    found = LiveTeacher(spread, 600, CPU)(batch([9, 14]), Needs())
    torch.testing.assert_close(found.hidden, expected.hidden)


def test_embeddings_are_given_where_they_are_asked_for():
    asked, rows = teacher(), batch([9, 5])
    assert asked(rows, Needs()).embedded is None
    view = asked(rows, Needs(embeddings=True))
    assert view.embedded is not None
    embed = asked.model.get_input_embeddings()
    for ids, embedded in zip(
        (view.tokens.input_ids, view.tokens.labels), view.embedded, strict=True
    ):
        torch.testing.assert_close(embedded, embed(ids), rtol=0, atol=0)
