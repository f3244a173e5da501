"""One process and several give the same training: losses at every step and the final weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.ranks import Result, launch, run
from tests.support.sharding import SHARDED, zero

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
        "output_dir": str(folder / name),
    }
    made = tiny.base_config(folder, **{**defaults, **overrides})
    made["base_model"] = str(folder / Path(made["base_model"]).name)
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


def test_projectors_start_alike_and_follow_the_mean_gradient():
    [ranks] = launch(2, [{"do": "projector_step"}])
    for name, start in ranks[0]["start"].items():
        torch.testing.assert_close(ranks[1]["start"][name], start, rtol=0, atol=0)
        for rank in ranks:  # gradients 1 and 2, learning rate 0.1
            torch.testing.assert_close(rank["end"][name], start - 0.15)


@pytest.mark.parametrize(("world_size", "hybrid"), [(2, False), (4, True)])
def test_a_sharded_weight_is_gathered_and_gets_the_mean_gradient(world_size: int, hybrid: bool):
    [ranks] = launch(world_size, [{"do": "gathered_weight", "hybrid": hybrid}])
    for rank in ranks:
        assert rank["same"]
        assert rank["shard"] < 7
        expected = torch.full((7, 5), (1 + world_size) / 2)
        torch.testing.assert_close(rank["grad"], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_teacher_is_the_teacher(tmp_path: Path, tied: bool):
    model = tiny.tiny_llama(600, 48, seed=3, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 19).unsqueeze(0)).logits
    [ranks] = launch(2, [{"do": "sharded_teacher", "model": str(tmp_path)}])
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], expected)
        assert rank["share"] == pytest.approx(0.5, abs=0.05)


def test_the_problem_of_one_rank_stops_all():
    [ranks] = launch(2, [{"do": "stop", "rank": 1}], timeout=200)
    assert [rank["error"] for rank in ranks] == ["ValueError: rank 1: too hot"] * 2


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(folder: Path):
    """The teacher is damaged in a token that one row has."""
    damaged = folder / "damaged"
    shutil.copytree(folder / "teacher", damaged)
    teacher = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    token = tiny.sentencepiece_tokenizer()("Say hello")["input_ids"][-1]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[token] = float("nan")
    teacher.save_pretrained(damaged)
    job = config(
        folder,
        "damaged-out",
        micro_batch_size=2,
        datasets=[dict(FORTY_ROWS[0], split="train[:4]")],
        dskd={
            "teacher": {"base_model": str(damaged)},
            "objective": {"projector": {"init": "random"}},
        },
    )
    [ranks] = launch(2, [{"do": "train", "config": job}], timeout=300)
    assert ranks[0]["error"] == ranks[1]["error"]
    found = re.findall(r"rank (\d): the loss is not finite at step \d+: dskd/", ranks[0]["error"])
    assert len(found) == 1
    assert "Say hello" in ranks[0]["error"]


@pytest.mark.parametrize("name", ["ddp", "teacher", "zero3", "zero3-lora", "fsdp2-lora"])
def test_a_rank_without_supervised_tokens_does_not_stop_the_others(folder: Path, name: str):
    settings = {"micro_batch_size": 2, "max_steps": 4, "datasets": FORTY_ROWS}
    sharding, _, adapter = name.partition("-")
    settings |= {**(way(folder, sharding) if name != "ddp" else {}), **(LORA if adapter else {})}
    job = config(folder, f"without-{name}", **settings)
    [ranks] = launch(2, [{"do": "train_without_labels", "config": job, "rank": 1}], timeout=300)
    assert all(len(rank["losses"]) == 4 for rank in ranks)
    assert all(value == value and value > 0 for value in ranks[0]["losses"])
    for part in ("student", "projectors"):
        for name, tensor in ranks[0][part].items():
            torch.testing.assert_close(ranks[1][part][name], tensor, rtol=0, atol=0)


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


# ---- sharded students --------------------------------------------------------------------------


def way(folder: Path, name: str) -> dict[str, Any]:
    """How a run is sharded."""
    if name.startswith("zero"):
        return zero(int(name.removeprefix("zero")))
    return {
        "fsdp2": SHARDED,
        "hybrid": {**SHARDED, "dp_shard_size": 2, "dp_replicate_size": 2},
        "rank 0 loads": {
            **SHARDED,
            "fsdp_config": {**SHARDED["fsdp_config"], "cpu_ram_efficient_loading": True},
        },
        "teacher": {"dskd": {"teacher": {"base_model": str(folder / "teacher"), "shard": "full"}}},
    }[name]


#: (way, ranks, variant). FSDP2 and ZeRO-3 cut the teacher, too (`shard: auto`).
SHARDINGS = [
    ("zero2", 2, "accumulated"),
    ("zero3", 2, "packed"),
    ("zero3", 2, "lora"),
    ("fsdp2", 2, "packed"),
    ("fsdp2", 2, "lora"),
    ("rank 0 loads", 2, "padded"),
    ("hybrid", 4, "padded"),
    ("teacher", 2, "padded"),
]
#: The trainer's model in each, so that no run is quietly one of plain DDP.
WRAPPERS = {"zero": "DeepSpeedEngine", "teac": "DistributedDataParallel"}


@pytest.mark.parametrize(("name", "world_size", "variant"), SHARDINGS)
def test_sharded_students_and_teachers_train_as_whole_ones(
    folder: Path,
    trained: dict[int, dict[str, Result]],
    name: str,
    world_size: int,
    variant: str,
):
    """The teacher reads few tokens at once: ranks need unlike many of its forwards."""
    settings = {**variants(world_size)[variant], **way(folder, name)}
    job = config(folder, f"{name}-{variant}", **settings)
    [found] = run(world_size, {"do": "train_in_small_forwards", "tokens": 110, "config": job})
    assert found["trainer"].startswith(WRAPPERS.get(name[:4], "FSDP"))
    assert found["teacher_is_sharded"] == (name != "zero2")
    assert_same_training(trained[1][variant], found)


def test_projectors_follow_a_schedule_that_deepspeed_moves_on_within_the_backward(folder: Path):
    """It does so where its configuration names the optimizer."""
    sharded = zero(1)
    rates = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    params = {**rates, "torch_adam": True}
    sharded["deepspeed"]["optimizer"] = {"type": "AdamW", "params": params}
    # Such an optimizer decays norms, too.
    settings = {"datasets": FORTY_ROWS, "weight_decay": 0.0}
    one = config(folder, "zero1-one", micro_batch_size=4, **settings)
    two = config(folder, "zero1-two", micro_batch_size=2, **settings, **sharded)
    [expected], [found] = (
        run(1, {"do": "train", "config": one}),
        run(2, {"do": "train", "config": two}),
    )
    assert found["trainer"] == "DeepSpeedEngine"
    assert_same_training(expected, found)


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_a_sharded_run_evaluates_resumes_and_exports(folder: Path, name: str):
    """Full fine-tuning: s2t follows the head, also from the checkpoint on."""
    settings = {
        "micro_batch_size": 2,
        "datasets": FORTY_ROWS,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 4,
        "val_set_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "gradient_checkpointing": True,
        **way(folder, name),
    }
    out = folder / f"{name}-straight"
    [straight] = run(2, {"do": "train", "config": config(folder, out.name, **settings)})
    again = config(
        folder,
        f"{name}-resumed",
        resume_from_checkpoint=str(out / "checkpoint-4"),
        **settings,
    )
    [resumed] = run(2, {"do": "train", "config": again})
    assert resumed["losses"][-2:] == pytest.approx(straight["losses"][-2:], rel=1e-6)
    assert resumed["evaluations"][-1] == pytest.approx(straight["evaluations"][-1], rel=1e-5)
    assert "eval_dskd/teacher_space" in straight["evaluations"][0]
    assert "s2t_solution" in straight["projectors"]
    for part in ("student", "projectors"):
        for key, tensor in straight[part].items():
            torch.testing.assert_close(resumed[part][key], tensor, rtol=0, atol=1e-6, msg=key)
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        logits = exported.eval()(input_ids=torch.arange(3, 19).unsqueeze(0)).logits
    torch.testing.assert_close(logits, straight["logits"], rtol=0, atol=1e-5)
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert not [key for key in tensors.keys() if "s2t" in key or "t2s" in key]  # noqa: SIM118
