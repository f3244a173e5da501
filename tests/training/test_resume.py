"""A run that was killed and resumed ends as one that was not: bit for bit on as many ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tiny
from tests.support.ranks import Result, launch

pytestmark = pytest.mark.slow

STEPS, SAVED, KILLED = 6, 3, 5

#: Four optimizer steps an epoch: the checkpoint lies within the first one, the kill in the second.
ROWS = 16

LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj", "v_proj", "lm_head"],
}

AUTO = {"auto_resume_from_checkpoints": True}

Job = dict[str, Any]


def config(folder: Path, name: str, **overrides: Any) -> dict[str, Any]:
    """Clipping, decay and a schedule take part."""
    defaults = {
        "max_steps": STEPS,
        "num_epochs": 100,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "adam_epsilon": 1e-6,  # else Adam turns rounding into steps where a gradient is nearly 0
        "output_dir": str(folder / name),
    }
    return tiny.base_config(folder, **defaults | overrides)


def full(folder: Path, name: str, world_size: int, **overrides: Any) -> dict[str, Any]:
    """Everything trains, the head too, and s2t starts from it and follows it."""
    block = {
        "teacher": {"base_model": str(folder / "teacher")},
        "objective": {"alignment": "cma", "projector": {"init": "lstsq"}},
    }
    return config(folder, name, micro_batch_size=4 // world_size, dskd=block, **overrides)


def packed(folder: Path, name: str, **overrides: Any) -> dict[str, Any]:
    """LoRA with dropout on packed rows, accumulated, while the teacher's cache is being filled."""
    cache = {"path": str(folder / f"{name}-cache"), "dtype": "float32"}
    return config(
        folder,
        name,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        sample_packing=True,
        # Axolotl 0.19 shuffles packs anew where a run resumes within an epoch, in plain
        # fine-tuning too.
        curriculum_sampling=True,
        dskd={"teacher": {"base_model": str(folder / "teacher"), "cache": cache}},
        **LORA,
        **overrides,
    )


def accumulated(folder: Path, name: str, **overrides: Any) -> dict[str, Any]:
    """LoRA with dropout on padded rows, two micro-batches a step on each of two ranks."""
    sizes = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    return config(folder, name, **sizes, **LORA, **overrides)


def train(config: dict[str, Any]) -> Job:
    return {"do": "train", "config": config}


def killed(config: dict[str, Any], rank: int = 0, saving: bool = False) -> Job:
    """A run of which one rank dies after its first checkpoint, or while it writes its second."""
    step = STEPS if saving else KILLED
    return {"do": "train_and_die", "config": config, "step": step, "saving": saving, "rank": rank}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_pair(folder)
    tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(ROWS))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Result]:
    """By name: runs without interruption, and the resumed ones. Their checkpoints are in folder."""
    results: dict[str, Result] = {}

    def on(world_size: int, jobs: dict[str, Job]) -> None:
        outcomes = launch(world_size, list(jobs.values()), timeout=600)
        results.update(zip(jobs, (ranks[-1] for ranks in outcomes), strict=True))

    on(
        1,
        {
            "full": train(full(folder, "full", 1)),
            "packed": train(packed(folder, "packed")),
            "packed-1": killed(packed(folder, "packed-1"), saving=True),
        },
    )
    on(1, {"full-1": killed(full(folder, "full-1", 1))})
    on(
        2,
        {
            "accumulated": train(accumulated(folder, "accumulated")),
            "accumulated-2": killed(accumulated(folder, "accumulated-2"), rank=1),
        },
    )
    on(2, {"full-2": killed(full(folder, "full-2", 2), rank=1)})
    shutil.copytree(folder / "full-1", folder / "full-1-on-2")
    shutil.copytree(folder / "full-2", folder / "full-2-on-1")
    shutil.copytree(folder / "packed-1", folder / "half")
    shutil.rmtree(folder / "packed-1" / f"checkpoint-{STEPS}")
    on(
        1,
        {
            "full, 1 to 1": train(full(folder, "full-1", 1, **AUTO)),
            "full, 2 to 1": train(full(folder, "full-2-on-1", 1, **AUTO)),
            "packed, 1 to 1": train(packed(folder, "packed-1", **AUTO)),
            "half": train(packed(folder, "half", **AUTO)),
        },
    )
    on(
        2,
        {
            "full, 1 to 2": train(full(folder, "full-1-on-2", 2, **AUTO)),
            "accumulated, 2 to 2": train(accumulated(folder, "accumulated-2", **AUTO)),
        },
    )
    return results


def assert_same_logs(resumed: Result, straight: Result, rel: float) -> None:
    """Losses and metrics of every step, those before the checkpoint as it carries them."""
    assert len(straight["logs"]) == len(resumed["logs"]) == STEPS
    for step, (a, b) in enumerate(zip(straight["logs"], resumed["logs"], strict=True), 1):
        names = {k for k in a if k.startswith("dskd/")} | {"loss", "learning_rate", "grad_norm"}
        assert len(names) >= 10
        assert names <= b.keys()
        for name in names:
            # Against the loss: a divergence may be near 0.
            assert b[name] == pytest.approx(a[name], rel=rel, abs=rel * a["loss"]), (step, name)


@pytest.mark.parametrize(
    ("resumed", "straight"),
    [
        ("full, 1 to 1", "full"),
        ("packed, 1 to 1", "packed"),
        ("accumulated, 2 to 2", "accumulated"),
    ],
)
def test_a_killed_run_goes_on_exactly(
    folder: Path, runs: dict[str, Result], resumed: str, straight: str
):
    """Every file of the last checkpoint is the one of the run that was not killed."""
    assert_same_logs(runs[resumed], runs[straight], rel=0.0)
    two = resumed.endswith("2 to 2")
    last = Path(f"checkpoint-{STEPS}")
    ours = folder / f"{straight}-{2 if two else 1}" / last
    theirs = folder / straight / last
    names = {str(p.relative_to(theirs)) for p in theirs.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(ours)) for p in ours.rglob("*") if p.is_file()}
    assert {"dskd/module.safetensors", "dskd/optimizer.safetensors"} <= names
    assert ({"rng_state_0.pth", "rng_state_1.pth"} if two else {"rng_state.pth"}) <= names
    compared = 0
    for name in names:
        if name.endswith(".safetensors"):
            a, b = load_file(theirs / name), load_file(ours / name)
        elif name.endswith((".pt", ".pth")) and name != "training_args.bin":
            a, b = (torch.load(p / name, weights_only=False) for p in (theirs, ours))
        else:
            continue
        compared += 1
        assert_equal(a, b, name)
    assert compared >= (7 if two else 6)


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Nested containers, the same to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}: {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}: {i}")
    elif hasattr(a, "tolist"):
        assert a.tolist() == b.tolist(), where
    else:
        assert a == b, where


@pytest.mark.parametrize("resumed", ["full, 1 to 2", "full, 2 to 1"])
def test_another_number_of_ranks_goes_on_alike(folder: Path, runs: dict[str, Result], resumed: str):
    assert runs[resumed]["world_size"] == int(resumed[-1])
    assert_same_logs(runs[resumed], runs["full"], rel=1e-5)
    for part in ("student", "projectors"):
        for name, tensor in runs["full"][part].items():
            torch.testing.assert_close(
                runs[resumed][part][name], tensor, rtol=0, atol=1e-5, msg=name
            )
    name = f"checkpoint-{STEPS}/dskd/optimizer.safetensors"
    ours = load_file(folder / f"full-{resumed[6]}-on-{resumed[-1]}" / name)
    for key, tensor in load_file(folder / "full" / name).items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_a_killed_rank_ends_the_others(runs: dict[str, Result]):
    for name in ("full-1", "full-2", "accumulated-2", "packed-1"):
        assert runs[name] == {"exit": -9}, name


def test_a_checkpoint_that_was_being_written_is_refused_with_the_one_to_take(
    folder: Path, runs: dict[str, Result]
):
    error = runs["half"]["error"]
    for text in ("half/checkpoint-6", "not complete", "Delete", "half/checkpoint-3"):
        assert text in error
    left = {p.name for p in (folder / "half" / f"checkpoint-{STEPS}" / "dskd").iterdir()}
    assert left == {"module.safetensors"}
