"""One process and several give the same training: losses at every step and the final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.ranks import Result, run

STEPS = 20
ON_FOUR = ("padded", "packed")

LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj", "lm_head"],
}


#: Two epochs of ten steps.
FORTY_ROWS = [
    {"path": "rows.jsonl", "ds_type": "json", "type": "chat_template", "split": "train[:40]"}
]


def config(folder: Path, name: str, **overrides: Any) -> dict[str, Any]:
    """A run of `STEPS` steps over several epochs; clipping, decay and a schedule take part."""
    defaults = {
        "max_steps": STEPS,
        "num_epochs": 100,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        # Where a gradient is nearly 0, Adam otherwise turns rounding into whole steps.
        "adam_epsilon": 1e-6,
        "dataloader_num_workers": 0,
        "output_dir": str(folder / name),
    }
    made = tiny.base_config(folder, **{**defaults, **overrides})
    made["datasets"] = [d | {"path": str(folder / "rows.jsonl")} for d in made["datasets"]]
    return made


def variants(world_size: int) -> dict[str, dict[str, Any]]:
    """The global batch is four rows (or packs), however many ranks share it."""
    per_rank = 4 // world_size
    return {
        "padded": {"micro_batch_size": per_rank, "datasets": FORTY_ROWS},
        "accumulated": {"micro_batch_size": per_rank, "gradient_accumulation_steps": 2},
        # A packed row is a batch of its own: several ranks share what one accumulates.
        "packed": {
            "micro_batch_size": 1,
            "gradient_accumulation_steps": per_rank,
            "sample_packing": True,
            "sequence_len": 96,
            # Otherwise Axolotl draws other packs with another number of ranks.
            "curriculum_sampling": True,
        },
        "lora": {"micro_batch_size": per_rank, "datasets": FORTY_ROWS, **LORA},
    }


def assert_same_training(one: Result, other: Result, atol: float = 1e-5) -> None:
    assert len(one["losses"]) == STEPS
    for a, b in zip(one["logs"], other["logs"], strict=True):
        for key in a.keys() - {"grad_norm"}:
            if key == "loss" or key.startswith("dskd/"):
                # Against the loss: a divergence may be near 0.
                assert a[key] == pytest.approx(b[key], abs=1e-5 * a["loss"]), key
    assert one["student"].keys() == other["student"].keys()
    for part in ("student", "projectors"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(tensor, other[part][name], rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student and teacher with different tokenizers, and the same with one tokenizer."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save_pair(folder)
    tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(160))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, dict[str, Result]]:
    """Every variant on one and two ranks, two of them on four."""
    results: dict[int, dict[str, Result]] = {}
    for world_size in (1, 2, 4):
        jobs = {
            name: {"do": "train", "config": config(folder, f"{name}-{world_size}", **variant)}
            for name, variant in variants(world_size).items()
            if world_size < 4 or name in ON_FOUR
        }
        results[world_size] = dict(zip(jobs, run(world_size, *jobs.values()), strict=True))
    return results


@pytest.mark.parametrize(
    ("variant", "world_size"), [*((v, 2) for v in variants(1)), *((v, 4) for v in ON_FOUR)]
)
def test_several_ranks_train_as_one(
    trained: dict[int, dict[str, Result]], variant: str, world_size: int
):
    assert trained[world_size][variant]["trainer"] == "DistributedDataParallel"
    assert_same_training(trained[1][variant], trained[world_size][variant])
