"""Training with each alignment: batches, warm-up, what the log says, resuming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny
from tests.support.runs import dskd, losses, objective_of, steps

Train = Callable[[dict[str, Any]], Any]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the exchange logs; Axolotl takes pytest's own handler away."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("axolotl_dskd.objectives.dual_space.objective")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_exact_pairs_train_and_a_causal_student_too(
    pair_folder: Path, train: Train, said: list[str]
):
    for keys in ({"alignment": "eta"}, {"alignment": "cma", "causal": True}):
        said.clear()
        config = tiny.base_config(pair_folder, dskd=dskd(pair_folder, **keys), num_epochs=4)
        _, trainer = train(config | {"max_steps": 16, "val_set_size": 0.25, "eval_steps": 8})
        first, *_, last = steps(trainer)
        assert last["dskd/ce"] < first["dskd/ce"]
        assert 0 < first["dskd/aligned"] <= 1
        evaluated = [e for e in trainer.state.log_history if "eval_loss" in e]
        assert evaluated[-1]["eval_dskd/aligned"] > 0
        assert sum(m.startswith("Projectors at the start, on") for m in said) == 1
        # Random models say nothing that a projection could keep, and the log says so in words.
        assert any("hardly says what it said before projection" in m for m in said)


@pytest.mark.slow
def test_packed_rows_give_the_loss_of_padded_rows_with_every_alignment(
    pair_folder: Path, train: Train
):
    for keys in ({"alignment": "eta"}, {"alignment": "cma", "causal": True}):
        both = []
        for packed in (False, True):
            config = tiny.base_config(pair_folder, dskd=dskd(pair_folder, **keys), max_steps=1)
            config |= {"micro_batch_size": 16, "gradient_accumulation_steps": 1}
            if packed:
                config |= {"micro_batch_size": 1, "sample_packing": True, "sequence_len": 2048}
                config |= {"pad_to_sequence_len": True, "dataset_prepared_path": None}
            _, trainer = train(config)
            both.append(steps(trainer)[0])
        assert both[0]["dskd/supervised_tokens"] == both[1]["dskd/supervised_tokens"]
        for term in ("ce", "student_space", "projector_ce", "teacher_space", "aligned"):
            assert both[0][f"dskd/{term}"] == pytest.approx(both[1][f"dskd/{term}"], rel=1e-3), term


def test_in_warm_up_only_the_projectors_train(pair_folder: Path, train: Train):
    block = dskd(pair_folder, alignment="eta", projector={"warmup_steps": 2})
    config = tiny.base_config(pair_folder, dskd=block, weight_decay=0.1, max_steps=2)
    model, trainer = train(config)
    from transformers import AutoModelForCausalLM

    untrained = AutoModelForCausalLM.from_pretrained(pair_folder / "student")
    torch.testing.assert_close(weights(model), weights(untrained), rtol=0, atol=0)
    assert objective_of(trainer).module is not None
    assert float(objective_of(trainer).module.t2s.bias.abs().max()) > 0  # starts at 0
    longer, _ = train(config | {"max_steps": 3})
    changed = weights(longer)
    assert any(not torch.equal(p, changed[n]) for n, p in weights(untrained).items())


def test_auto_takes_exact_pairs_where_most_tokens_have_one(
    pair_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dskd.objectives.dual_space import choice

    monkeypatch.setattr(choice, "ETA_SHARE", 0.3)
    _, trainer = train(tiny.base_config(pair_folder, max_steps=1))
    assert objective_of(trainer).alignment == "eta"
    monkeypatch.setattr(choice, "ETA_SHARE", 0.9)
    _, trainer = train(tiny.base_config(pair_folder, max_steps=1))
    assert objective_of(trainer).alignment == "cma"


@pytest.mark.slow
def test_resumed_goes_on_as_uninterrupted_also_where_s2t_follows(
    pair_folder: Path, train: Train, said: list[str]
):
    block = dskd(pair_folder, alignment="eta")
    base = tiny.base_config(pair_folder, dskd=block, max_steps=6, save_strategy="steps")
    base |= {"save_steps": 3, "learning_rate": 0.01}
    _, straight = train(base | {"output_dir": str(pair_folder / "straight")})
    assert objective_of(straight)._follower is not None
    checkpoint = pair_folder / "straight" / "checkpoint-3"
    said.clear()
    _, resumed = train(
        base
        | {"output_dir": str(pair_folder / "resumed"), "resume_from_checkpoint": str(checkpoint)}
    )
    assert losses(resumed)[-3:] == pytest.approx(losses(straight)[-3:], rel=1e-5)
    assert not any("Projectors at the start" in m for m in said)  # they are past it


def test_the_log_says_once_what_share_of_the_tokens_takes_part(
    pair_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dskd.training import reports as module

    said: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(module.LOG, level, said.append)
    _, trainer = train(
        tiny.base_config(pair_folder, max_steps=2, dskd=dskd(pair_folder, name="uld"))
    )
    share = steps(trainer)[0]["dskd/aligned"]
    lines = [line for line in said if "take part in the distillation" in line]
    assert 0 < share < 1
    assert lines == [
        f"{share:.1%} of the student's supervised tokens take part in the distillation, the others "
        "have cross-entropy alone"
    ]
