"""Trainings and Axolotl's other commands, and what goes wrong on one rank of several."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import axolotl.train
import torch
import torch.distributed as dist
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.utils.dict import DictDefault
from torch.distributed.tensor import DTensor

from axolotl_dskd.data.collator import DualCollator
from axolotl_dskd.ranks import gathered, raise_together
from axolotl_dskd.teacher import live
from axolotl_dskd.training.trainer import DSKDTrainer
from axolotl_dskd.types import Matches
from tests.support.jobs.common import process_group, this_rank, wrapped
from tests.support.jobs.registry import job

#: What a batch without supervised tokens has none of.
MATCHES = [field.name for field in dataclasses.fields(Matches)]


@job
def train(config: dict[str, Any]) -> dict[str, Any]:
    """`axolotl train`; returns losses, metrics, weights of student and projectors."""
    cfg = load_cfg(DictDefault(config))
    torch.manual_seed(cfg.seed)  # Axolotl seeds later than it makes adapters
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    model, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=meta)
    return _outcome(model, trainer)


@job
def command(
    name: str, config: str, stdin: str = "", arguments: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One of Axolotl's commands, as its CLI calls it; returns what it prints."""
    module = importlib.import_module(f"axolotl.cli.{name}")
    with (
        patch("sys.argv", [name]),
        patch("sys.stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        module.do_cli(config=config, **(arguments or {}))
    return {"output": printed.getvalue()}


@job
def train_in_small_forwards(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """`train`, where the teacher reads so few tokens at once that ranks need unlike many turns."""
    with patch.object(live, "MAX_TOKENS_PER_FORWARD", tokens):
        return train(config)


@job
def train_without_labels(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """`train`, where one rank finds no supervised token in its second batch."""
    seen = [0]

    def collate(original: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        seen[0] += 1
        if seen[0] == 2 and this_rank() == rank:
            batch["labels"] = torch.full_like(batch["labels"], -100)
            batch["dskd_teacher_labels"] = torch.full_like(batch["dskd_teacher_labels"], -100)
            for key in MATCHES:
                batch[f"dskd_{key}"] = batch[f"dskd_{key}"][:0]
            del batch["dskd_known"]  # of the labels that it had
        return batch

    with wrapped(DualCollator, "__call__", collate):
        return train(config)


@job
def train_out_of_memory(config: dict[str, Any], step: int) -> dict[str, Any]:
    """`train`, where memory runs out once, in a batch of this step."""
    failed: list[int] = []

    def divided(original: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(trainer, *args, **kwargs)
        if trainer.model.training and trainer.state.global_step == step - 1 and not failed:
            failed.append(step)
            raise RuntimeError("CUDA out of memory.")
        return loss

    with wrapped(DSKDTrainer, "_divided", divided):
        found = train(config)
    assert failed
    return found


@job
def stop(rank: int) -> dict[str, Any]:
    """One rank has a problem."""
    process_group()
    raise_together("too hot" if this_rank() == rank else None, torch.device("cpu"))
    return {}


@job
def traffic(config: dict[str, Any]) -> dict[str, Any]:
    """Train, and count what all ranks send over the loopback device; for a namespace of one's own.

    Returns:
        `bytes` with TCP's headers and answers; numbers of trained parameters of the `student` and
        of the `projectors`.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        process_group()
        dist.barrier()
    before = _sent_over_loopback()
    cfg = load_cfg(DictDefault(config))
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    model, _, trainer = axolotl.train.train(cfg=cfg, dataset_meta=meta)
    if several:
        dist.barrier()
    sent = _sent_over_loopback() - before
    return {
        "bytes": sent,
        "student": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "projectors": sum(tensor.numel() for tensor in _beside(trainer).values()),
    }


def _sent_over_loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise ValueError("there is no loopback device in /proc/net/dev")


def _beside(trainer: Any) -> dict[str, torch.Tensor]:
    """What is trained beside the student, by name; plain fine-tuning has nothing."""
    sidecar = getattr(trainer, "sidecar", None)
    return {} if sidecar is None else sidecar.tensors()


def _outcome(model: Any, trainer: Any) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    projectors = {name: tensor.clone() for name, tensor in _beside(trainer).items()}
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    ids = torch.arange(3, 19).unsqueeze(0)
    with gathered(unwrapped.parameters()), torch.no_grad():
        state = {
            k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
            for k, v in unwrapped.state_dict().items()
        }
        logits = model.eval()(input_ids=ids).logits
    distillation = getattr(trainer, "distillation", None)
    lessons = [] if distillation is None else distillation.lessons.values()
    # Behind what keeps what it said, where rows are kept.
    teachers = [getattr(lesson.teacher, "teacher", lesson.teacher) for lesson in lessons]
    models = [model for teacher in teachers if (model := getattr(teacher, "model", None))]
    return {
        "teacher_is_sharded": any(
            isinstance(parameter, DTensor) for model in models for parameter in model.parameters()
        ),
        "evaluations": [
            {k: float(v) for k, v in entry.items() if k == "eval_loss" or k.startswith("eval_dskd")}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ],
        "losses": [float(entry["loss"]) for entry in logs],
        "logs": [
            {k: float(v) for k, v in entry.items() if isinstance(v, int | float)} for entry in logs
        ],
        "student": state,
        "projectors": projectors,
        "logits": logits,
        "trainer": type(trainer.model_wrapped).__name__,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
    }
