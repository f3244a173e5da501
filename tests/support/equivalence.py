"""Trainings that should be one and the same: what every objective promises, by name.

`train_variants` runs a `dskd:` block through Axolotl's own trainer in every way that is asked for,
and `assert_same_training` compares two of them step by step. Every optimizer step sees all
`ROWS` rows, so neither packs nor ranks nor the order of rows decide which rows a step has. Knows
no objective: a block is handed on as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import tiny
from tests.support.ranks import Job, Result, run
from tests.support.sharding import SHARDED, zero

ROWS = 8
STEPS = 4
#: Optimizer step whose checkpoint "resumed" goes on from.
SAVED = 2

#: What all others are compared with: one process, its eight rows in one padded batch (8x1).
BASE = "padded"


#: Its head is frozen. No dropout: ranks draw other masks than one process.
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        overrides: keys of Axolotl's.
        world_size: ranks.
        like: the way that is the same training.
        trainer: how the trainer's model on several ranks is called, so that no sharded run is
            quietly one of plain DDP.
        within: how near it must be to that, see `assert_same_training`.
    """

    overrides: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    like: str = BASE
    trainer: str = "DistributedDataParallel"
    within: float = 1e-5


def on_two(
    overrides: dict[str, Any], like: str = BASE, trainer: str = "DistributedDataParallel"
) -> Variant:
    """A way on two ranks, which share the rows of a step."""
    return Variant({"micro_batch_size": ROWS // 2, **overrides}, 2, like, trainer)


VARIANTS = {
    BASE: Variant({"save_strategy": "steps", "save_steps": SAVED}),
    "padded further": Variant({"pad_to_sequence_len": True}),
    "1x8": Variant({"micro_batch_size": 1, "gradient_accumulation_steps": ROWS}),
    "packed": Variant({"micro_batch_size": 1, "sample_packing": True, "sequence_len": 1024}),
    "reversed": Variant(),
    "two ranks": on_two({}),
    # The student sharded, with a head that trains; so is the teacher's body.
    "fsdp2": on_two(SHARDED, trainer="FSDP"),
    "zero3": on_two(zero(3), trainer="DeepSpeedEngine"),
    # Rows by turns: where two teachers are asked by turns, each rank has rows of one alone.
    "fsdp2 1x4": on_two(
        {**SHARDED, "micro_batch_size": 1, "gradient_accumulation_steps": ROWS // 2},
        trainer="FSDP",
    ),
    # From the base's checkpoint; its log has the steps before, too.
    "resumed": Variant(),
    # All states from a cache in float32 that another training has filled.
    "cached": Variant(),
    "lora": Variant(LORA, like="lora"),
    "fsdp2 lora": on_two({**SHARDED, **LORA}, "lora", "FSDP"),
    "zero3 lora": on_two({**zero(3), **LORA}, "lora", "DeepSpeedEngine"),
    "qlora": Variant(QLORA, like="qlora"),
    # Products with quantised weights round otherwise with another number of rows.
    "qlora two ranks": replace(on_two(QLORA, "qlora"), within=1e-4),
}


@dataclass(frozen=True)
class Training:
    """What a training leaves.

    Attributes:
        losses: of each optimizer step.
        metrics: of each optimizer step, `dskd/…` by name.
        student: its parameters and buffers by name.
        sidecar: those of what is trained beside the student.
    """

    losses: list[float]
    metrics: list[dict[str, float]]
    student: dict[str, Tensor]
    sidecar: dict[str, Tensor]

    @classmethod
    def of(cls, result: Result) -> Training:
        """From what the job `train` returns."""
        metrics = [
            {
                name: value
                for name, value in log.items()
                if name.startswith("dskd/") and not name.endswith("per_second")
            }
            for log in result["logs"]
        ]
        student = {
            name: tensor
            for name, tensor in result["student"].items()
            # Codes of 4-bit weights are no numbers, and no training moves them.
            if f"{name}.absmax" not in result["student"]
        }
        return cls(result["losses"], metrics, student, result["projectors"])


def save_pair(folder: Path, *, one_vocabulary: bool = False) -> Path:
    """Student, teacher and rows in `folder`; one tokenizer for both sides, or one for each."""
    # 64: what 4-bit blocks divide.
    tiny.save_pair(folder, same_vocabulary=one_vocabulary, hidden_sizes=(64, 48))
    rows = tiny.chat_rows(ROWS)
    tiny.write_rows(folder / "rows.jsonl", rows)
    tiny.write_rows(folder / "reversed.jsonl", rows[::-1])
    return folder


def train_variants(
    folder: Path, block: dict[str, Any], names: Iterable[str], **overrides: Any
) -> dict[str, Training]:
    """Train by the same `dskd:` block in several ways.

    Args:
        folder: from `save_pair`; a block at a time has its outputs there.
        block: without its cache, and without the model of one teacher; both are added.
        names: keys of `VARIANTS`.
        overrides: keys of Axolotl's that hold for all.

    Returns:
        By name; `BASE` and what the ways are to be like are among them.
    """
    (trained,) = train_all([Asked(folder, block, names, overrides)])
    return trained


@dataclass(frozen=True)
class Asked:
    """Trainings that are asked for; see `train_variants`."""

    folder: Path
    block: dict[str, Any]
    names: Iterable[str]
    overrides: dict[str, Any] = field(default_factory=dict)


def train_all(asked: Sequence[Asked]) -> list[dict[str, Training]]:
    """`train_variants` several times, in as few processes as can be: to start one takes as long as
    a training."""
    wanted = [
        list(dict.fromkeys([BASE, *(VARIANTS[name].like for name in one.names), *one.names]))
        for one in asked
    ]
    # A process is set up for one kind of run.
    jobs: dict[tuple[int, str], dict[tuple[int, str], Job]] = {}
    for number, one in enumerate(asked):
        for name in wanted[number]:
            variant = VARIANTS[name]
            named = jobs.setdefault((variant.world_size, variant.trainer), {})
            overrides = {**one.overrides, **variant.overrides}
            made = training_config(one.folder, one.block, name, overrides)
            if name == "cached":
                filling = {**made, "output_dir": str(one.folder / "filling")}
                named[number, "filling"] = {"do": "train", "config": filling}
            do = "train_counting_loads" if name == "cached" else "train"
            named[number, name] = {"do": do, "config": made}
    results: dict[tuple[int, str], Result] = {}
    for (world_size, _), named in jobs.items():
        found = run(world_size, *named.values(), timeout=max(600, 60 * len(named)))
        results |= zip(named, found, strict=True)
    for (_, name), result in results.items():
        if name == "cached":
            assert result["loads"] == 0, "the teacher was loaded beside a full cache"
        if name in VARIANTS and VARIANTS[name].world_size > 1:
            assert result["trainer"].startswith(VARIANTS[name].trainer), name
    return [
        {name: Training.of(results[number, name]) for name in names}
        for number, names in enumerate(wanted)
    ]


def assert_same_training(
    one: Training, other: Training, *, rel: float = 1e-5, atol: float = 1e-5
) -> None:
    """Losses and metrics of every step, and all parameters at the end.

    Args:
        rel: of losses and metrics, relative to the loss: a divergence may be near 0.
        atol: of parameters.
    """
    assert len(one.losses) == len(other.losses) == STEPS
    for step, (a, b) in enumerate(zip(one.losses, other.losses, strict=True), 1):
        assert b == pytest.approx(a, rel=rel), f"loss of step {step}"
    for step, (ours, theirs) in enumerate(zip(one.metrics, other.metrics, strict=True), 1):
        assert ours
        assert ours.keys() == theirs.keys(), f"metrics of step {step}"
        for name, a in ours.items():
            near = pytest.approx(a, abs=rel * one.losses[step - 1])
            assert theirs[name] == near, f"{name} of step {step}"
    for part in ("student", "sidecar"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert ours.keys() == theirs.keys(), part
        for name, tensor in ours.items():
            torch.testing.assert_close(
                theirs[name],
                tensor,
                rtol=0,
                atol=atol,
                msg=lambda text, where=f"{part}: {name}": f"{where}: {text}",
            )


def training_config(
    folder: Path, block: dict[str, Any], name: str, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Axolotl's config of one way to train. Clipping, decay and a schedule take part.

    Args:
        folder, block: as `train_variants` takes them.
        name: of the way, whose outputs lie in a folder of that name.
        overrides: keys of Axolotl's.
    """
    teachers = block.get("teachers") or {"": block.get("teacher", {})}
    teachers = {
        name: {"base_model": str(folder / "teacher"), **keys} for name, keys in teachers.items()
    }
    rows = folder / ("reversed.jsonl" if name == "reversed" else "rows.jsonl")
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "num_epochs": 100,
        "micro_batch_size": ROWS,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        # Where a gradient is nearly 0, Adam otherwise turns rounding into whole steps.
        "adam_epsilon": 1e-6,
        "output_dir": str(folder / name),
        "datasets": [{"path": str(rows), "ds_type": "json", "type": "chat_template"}],
    }
    if name == "resumed":
        settings["resume_from_checkpoint"] = str(folder / BASE / f"checkpoint-{SAVED}")
    if name == "cached":
        for keys in teachers.values():
            keys["cache"] = {"path": str(folder / "cache"), "dtype": "float32"}
    asked = {"teachers": teachers} if "teachers" in block else {"teacher": teachers[""]}
    settings["dskd"] = {**block, **asked}
    return tiny.base_config(folder, **{**settings, **(overrides or {})})
