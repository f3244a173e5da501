"""`axolotl train` with a `dskd:` block: what users get, compared step by step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_dskd.config import DivergenceName
from tests.support import tiny
from tests.support.runs import dskd, losses, objective_of, steps, teacher_of

Train = Callable[[dict[str, Any]], Any]

TERMS = ["ce", "student_space", "projector_ce", "teacher_space"]
METRICS = [*TERMS, "projector_accuracy", "teacher_accuracy", "supervised_tokens"]


LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
}


def test_every_metric_is_logged_with_every_step_and_adds_up_to_the_loss(
    pair_folder: Path, train: Train
):
    block = dskd(pair_folder, kd_ratio=0.3, student_space_weight=0.5, teacher_space_weight=2.0)
    _, trainer = train(tiny.base_config(pair_folder, dskd=block))
    assert len(steps(trainer)) == 4
    for entry in steps(trainer):
        assert {f"dskd/{name}" for name in METRICS} <= entry.keys()
        ce, student_space, projector_ce, teacher_space = (entry[f"dskd/{t}"] for t in TERMS)
        expected = 0.7 * ce + 0.3 * (0.5 * (student_space + projector_ce) + 2.0 * teacher_space)
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_compiled_student_learns_as_any_other(pair_folder: Path, train: Train):
    block = dskd(pair_folder)
    plain = train(tiny.base_config(pair_folder, dskd=block, max_steps=2))[1]
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    other = train(tiny.base_config(pair_folder, dskd=block, max_steps=2, **compiled))[1]
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


def test_a_mixture_of_experts_keeps_the_loss_of_its_router(tmp_path: Path, train: Train):
    """Without a teacher the loss is that of plain fine-tuning, the router's part with it."""
    tiny.save_pair(tmp_path)
    tiny.save_mixture_of_experts(tmp_path / "student", router_weight=1.0)
    experts = {"max_steps": 2, "experts_implementation": "eager"}
    plain = train(tiny.base_config(tmp_path, dskd=None, plugins=None, **experts))[1]
    without = train(tiny.base_config(tmp_path, dskd={**dskd(tmp_path), "kd_ratio": 0}, **experts))
    assert losses(without[1]) == pytest.approx(losses(plain), rel=1e-5)
    divided = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    parts = tiny.base_config(tmp_path, dskd={**dskd(tmp_path), "kd_ratio": 0}, **experts, **divided)
    # Which experts a part uses is not what the whole does: near, where an undivided sum is not.
    assert losses(train(parts)[1]) == pytest.approx(losses(plain), rel=0.05)


@pytest.mark.parametrize("same_vocabulary", [False, True], ids=["cma", "positions"])
def test_training_lowers_the_distillation_terms(
    tmp_path: Path, train: Train, same_vocabulary: bool
):
    tiny.save_pair(tmp_path, same_vocabulary)
    config = tiny.base_config(
        tmp_path,
        max_steps=24,
        micro_batch_size=8,
        learning_rate=5e-3,
        dskd=dskd(tmp_path, projector={"learning_rate": 1e-2}),
    )
    _, trainer = train(config)
    assert objective_of(trainer).alignment == ("positions" if same_vocabulary else "cma")
    first, last = steps(trainer)[0], steps(trainer)[-1]
    for name in ("loss", "dskd/ce", "dskd/projector_ce", "dskd/teacher_space"):
        assert last[name] < 0.9 * first[name], name


@pytest.fixture(scope="module", params=[False, True], ids=["cma", "positions"])
def ten_steps(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, train: Train
) -> tuple[Path, Any]:
    """The pair, and the trainer of ten steps of eight padded rows each."""
    folder = tmp_path_factory.mktemp("ten-steps")
    tiny.save_pair(folder, request.param)
    return folder, train(tiny.base_config(folder, max_steps=10, micro_batch_size=8))[1]


@pytest.mark.parametrize(
    "other",
    [
        {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
        {"micro_batch_size": 8, "pad_to_sequence_len": True},
        {"gradient_checkpointing": True, "micro_batch_size": 8},
    ],
    ids=["accumulated", "padded further", "checkpointed"],
)
def test_how_a_batch_is_cut_does_not_change_ten_steps(
    ten_steps: tuple[Path, Any], train: Train, other: dict
):
    folder, one = ten_steps
    two = train(tiny.base_config(folder, max_steps=10, **other))[1]
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    for (name, a), b in zip(
        one.model.state_dict().items(), two.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=name)
    for a, b in zip(*(objective_of(r).module.parameters() for r in (one, two)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_packed_rows_give_the_loss_of_padded_rows(pair_folder: Path, train: Train):
    """All sixteen rows in one step, once as a padded batch, once packed into one row."""
    padded = tiny.base_config(pair_folder, max_steps=1, micro_batch_size=16)
    packed = tiny.base_config(
        pair_folder,
        max_steps=1,
        micro_batch_size=1,
        sequence_len=2048,
        sample_packing=True,
        eval_sample_packing=True,
    )
    one, two = train(padded)[1], train(packed)[1]
    first, second = steps(one)[0], steps(two)[0]
    assert second["dskd/supervised_tokens"] == first["dskd/supervised_tokens"]
    for name in ("loss", *(f"dskd/{t}" for t in TERMS)):
        assert first[name] == pytest.approx(second[name], rel=1e-5), name


@pytest.mark.parametrize(
    "samples",
    ["dataset", {"from": "student", "share": 0.5, "max_new_tokens": 4}],
    ids=["dataset", "student"],
)
def test_batches_of_other_processes_are_the_same(pair_folder: Path, train: Train, samples: Any):
    """Of so many as Axolotl starts by default, and of two that are ahead of training."""
    ahead = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}
    block = dskd(pair_folder) | {"samples": samples}
    here, *others = (
        train(tiny.base_config(pair_folder, dskd=block, **keys))[1]
        for keys in ({}, {"dataloader_num_workers": None}, ahead)
    )
    assert here.args.dataloader_num_workers == 0
    assert all(other.args.dataloader_num_workers > 0 for other in others)
    for other in others:
        assert losses(other) == losses(here)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, train: Train) -> tuple[Path, list[float]]:
    """The pair, and the losses of Axolotl's own fine-tuning of the student."""
    folder = tmp_path_factory.mktemp("plain")
    tiny.save_pair(folder)
    return folder, losses(train(tiny.base_config(folder, dskd=None, plugins=None))[1])


def test_kd_ratio_zero_is_axolotls_own_fine_tuning(plain: tuple[Path, list[float]], train: Train):
    folder, expected = plain
    none = train(tiny.base_config(folder, dskd=dskd(folder, kd_ratio=0.0)))[1]
    assert losses(none) == pytest.approx(expected, rel=1e-6)


def test_the_cross_entropy_is_axolotls_own(plain: tuple[Path, list[float]], train: Train):
    """With a vanishing kd_ratio, distillation's own path gives plain SFT's losses."""
    folder, expected = plain
    tiny_ratio = train(tiny.base_config(folder, dskd=dskd(folder, kd_ratio=1e-9)))[1]
    assert losses(tiny_ratio) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("space", ["student_space", "teacher_space"])
def test_a_space_with_weight_zero_is_not_computed(pair_folder: Path, train: Train, space: str):
    block = dskd(pair_folder, **{f"{space}_weight": 0.0})
    _, trainer = train(tiny.base_config(pair_folder, max_steps=2, dskd=block))
    assert all(f"dskd/{space}" not in entry for entry in steps(trainer))


@pytest.mark.parametrize(
    "divergence",
    [name for name in get_args(DivergenceName) if name != "forward_kl"],
)
def test_every_divergence_trains(same_vocabulary_folder: Path, train: Train, divergence: str):
    block = dskd(same_vocabulary_folder, divergence=divergence)
    _, trainer = train(tiny.base_config(same_vocabulary_folder, max_steps=2, dskd=block))
    assert all(entry["dskd/student_space"] > 0 for entry in steps(trainer))


def test_evaluation_reports_the_distillation_loss_and_its_terms(pair_folder: Path, train: Train):
    _, trainer = train(
        tiny.base_config(pair_folder, val_set_size=0.25, eval_steps=2, eval_strategy="steps")
    )
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluations) >= 2
    for entry in evaluations:
        assert {f"eval_dskd/{name}" for name in METRICS} <= entry.keys()
        ce, student_space, projector_ce, teacher_space = (entry[f"eval_dskd/{t}"] for t in TERMS)
        mixed = 0.5 * ce + 0.5 * (student_space + projector_ce + teacher_space)
        assert entry["eval_loss"] == pytest.approx(mixed, rel=0.05)  # HF averages over batches


def test_evaluating_without_training_loads_no_teacher(
    pair_folder: Path, validated: Callable[[dict[str, Any]], Any]
):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.evaluate import evaluate

    config = tiny.base_config(pair_folder, val_set_size=0.25)
    meta = load_datasets(cfg=validated(config), cli_args=TrainerCliArgs())
    shutil.rmtree(pair_folder / "teacher" / "model.safetensors", ignore_errors=True)
    (pair_folder / "teacher" / "model.safetensors").unlink(missing_ok=True)
    metrics = evaluate(cfg=validated(config), dataset_meta=meta)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_dskd/ce"], rel=0.05)
    assert "eval_dskd/teacher_space" not in metrics


def test_resumed_goes_on_as_uninterrupted(pair_folder: Path, train: Train):
    save = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler": "cosine"}
    straight = train(tiny.base_config(pair_folder, max_steps=8, **save))[1]
    checkpoint = pair_folder / "out" / "checkpoint-4"
    assert {p.name for p in (checkpoint / "dskd").iterdir()} == {
        "module.safetensors",
        "optimizer.safetensors",
        "objective.json",
    }
    resumed = train(
        tiny.base_config(
            pair_folder,
            max_steps=8,
            output_dir=str(pair_folder / "again"),
            resume_from_checkpoint=str(checkpoint),
            **save,
        )
    )[1]
    # The log of the first half came with the checkpoint.
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-6)
    for a, b in zip(
        *(objective_of(r).module.parameters() for r in (straight, resumed)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_resuming_from_plain_fine_tuning_is_refused(pair_folder: Path, train: Train):
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(tiny.base_config(pair_folder, dskd=None, plugins=None, **save))
    checkpoint = str(pair_folder / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match="cannot be resumed as a distillation"):
        train(tiny.base_config(pair_folder, max_steps=4, resume_from_checkpoint=checkpoint))


def logits_of(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_exported_student_is_a_clean_model(pair_folder: Path, train: Train):
    trained, _ = train(tiny.base_config(pair_folder, learning_rate=1e-2))
    out = pair_folder / "out"
    tokenizer = AutoTokenizer.from_pretrained(out)
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits_of(exported, tokenizer), logits_of(trained, tokenizer))
    start = AutoModelForCausalLM.from_pretrained(pair_folder / "student", dtype=torch.float32)
    assert not torch.allclose(logits_of(exported, tokenizer), logits_of(start, tokenizer))
    assert not (out / "dskd").exists()
    assert (
        load_file(out / "model.safetensors").keys()
        == load_file(pair_folder / "student" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("head", [False, True], ids=["attention", "attention and head"])
def test_the_exported_adapter_is_a_clean_adapter(pair_folder: Path, train: Train, head: bool):
    lora = {**LORA, "lora_target_modules": [*LORA["lora_target_modules"], *["lm_head"] * head]}
    trained, trainer = train(tiny.base_config(pair_folder, learning_rate=1e-2, **lora))
    assert losses(trainer)[-1] < losses(trainer)[0]
    tokenizer = AutoTokenizer.from_pretrained(pair_folder / "out")
    base = AutoModelForCausalLM.from_pretrained(pair_folder / "student", dtype=torch.float32)
    start = logits_of(base, tokenizer)
    exported = PeftModel.from_pretrained(base, pair_folder / "out")
    found = logits_of(exported, tokenizer)
    torch.testing.assert_close(found, logits_of(trained, tokenizer))
    assert not torch.allclose(found, start)
    keys = load_file(pair_folder / "out" / "adapter_model.safetensors").keys()
    assert not any(ours in key for key in keys for ours in ("t2s", "s2t", "query.", "projector"))


@pytest.mark.parametrize("quantised", ["load_in_4bit", "load_in_8bit"])
def test_a_qlora_student_learns_from_a_quantised_teacher(
    tmp_path: Path, train: Train, quantised: str
):
    pytest.importorskip("bitsandbytes")
    pair_folder = tmp_path
    tiny.save_pair(pair_folder, hidden_sizes=(64, 128))  # 4-bit blocks are 64 wide
    block = dskd(pair_folder)
    block["teacher"][quantised] = True
    config = tiny.base_config(
        pair_folder,
        dskd=block,
        max_steps=12,
        learning_rate=1e-2,
        **{**LORA, "adapter": "qlora", "load_in_4bit": True},
    )
    model, trainer = train(config)
    kinds = {type(m).__name__ for m in teacher_of(trainer).model.modules()}
    assert ("Linear4bit" if quantised == "load_in_4bit" else "Linear8bitLt") in kinds
    assert "Linear4bit" in {type(m).__name__ for m in model.modules()}
    first, last = steps(trainer)[0], steps(trainer)[-1]
    assert last["dskd/ce"] < first["dskd/ce"]
    assert last["dskd/projector_ce"] < first["dskd/projector_ce"]


def test_the_teacher_is_frozen_and_its_adapter_merged(pair_folder: Path, train: Train):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(pair_folder / "teacher", dtype=torch.float32)
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapter.save_pretrained(pair_folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(pair_folder / "teacher")
    expected = logits_of(adapter, tokenizer)

    block = dskd(pair_folder)
    block["teacher"]["adapter"] = str(pair_folder / "adapter")
    _, trainer = train(tiny.base_config(pair_folder, dskd=block, max_steps=2))
    teacher = teacher_of(trainer).model
    torch.testing.assert_close(logits_of(teacher, tokenizer), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_no_forward_makes_logits_over_the_vocabulary(pair_folder: Path, train: Train):
    """The largest float tensor over either vocabulary has twice a chunk's rows, not a batch's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[tuple[int, ...]] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            matrix = isinstance(out, torch.Tensor) and out.is_floating_point() and out.dim() > 1
            if matrix and out.shape[-1] in (400, 600):
                seen.add(tuple(out.shape))
            return out

    from axolotl_dskd.training.trainer import DSKDTrainer

    original = DSKDTrainer.compute_loss

    def watched(self, *args, **kwargs):
        with Watch():
            return original(self, *args, **kwargs)

    DSKDTrainer.compute_loss = watched
    try:
        block = dskd(pair_folder, chunk_tokens=8)
        train(tiny.base_config(pair_folder, max_steps=2, dskd=block))
    finally:
        DSKDTrainer.compute_loss = original
    rows = {shape[0] for shape in seen if shape[0] not in (32, 48)}  # not transposed heads
    assert seen
    assert max(rows) <= 2 * 8


def test_a_loss_that_is_not_finite_names_term_step_and_rows(pair_folder: Path, train: Train):
    teacher = AutoModelForCausalLM.from_pretrained(pair_folder / "teacher", dtype=torch.float32)
    damaged = tiny.sentencepiece_tokenizer()("Say hello")["input_ids"][-1]
    with torch.no_grad():
        teacher.model.embed_tokens.weight[damaged] = float("nan")
    teacher.save_pretrained(pair_folder / "teacher")
    message = r"not finite at step \d+: dskd/\w+ on \d+ tokens of 1 rows, first: .*Say hello"
    with pytest.raises(ValueError, match=message):
        train(tiny.base_config(pair_folder, dskd=dskd(pair_folder, projector={"init": "random"})))


def test_runs_without_a_block_are_untouched_after_one_with_it(pair_folder: Path, train: Train):
    train(tiny.base_config(pair_folder))
    _, trainer = train(tiny.base_config(pair_folder, dskd=None, plugins=None))
    assert type(trainer).__name__ == "AxolotlTrainer"
    assert "teacher_input_ids" not in trainer.train_dataset.column_names
    assert not any("dskd" in key for entry in steps(trainer) for key in entry)


def test_logs_on_disk_carry_the_metrics(pair_folder: Path, train: Train):
    train(tiny.base_config(pair_folder, save_strategy="steps", save_steps=2, max_steps=2))
    state = json.loads((pair_folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert all("dskd/ce" in entry for entry in state["log_history"] if "loss" in entry)
