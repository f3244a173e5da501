"""Teachers that evaluations alone ask: their numbers, what training notices, their cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_dskd.training import comparing
from tests.support import tiny, two_teachers
from tests.support.ranks import run
from tests.support.runs import dskd, losses
from tests.support.sharding import SHARDED, zero

Train = Callable[[dict[str, Any]], Any]
HELD_OUT = 8
KL, SAME = "eval_dskd/teacher_kl", "eval_dskd/teacher_agreement"


def config(folder: Path, name: str, teacher: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """Plain fine-tuning with a teacher at its evaluations, unless `dskd` says otherwise."""
    held_out = folder / "held-out.jsonl"
    if not held_out.exists():
        tiny.write_rows(held_out, tiny.chat_rows(30)[-HELD_OUT:])
    block = dskd(folder, kd_ratio=0.0, evaluation={"teacher": True})
    block["teacher"] |= teacher or {}
    rows = {"ds_type": "json", "type": "chat_template", "split": "train"}
    defaults = {
        "test_datasets": [{"path": str(held_out), **rows}],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "output_dir": str(folder / name),
        "dskd": block,
    }
    return tiny.base_config(folder, **{**defaults, **overrides})


def evaluations(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def plain(student: Path, teacher: Path, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean KL(teacher ‖ student) and share of equal first choices, from whole logits, at every
    token of the answers; both have one tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(path).double() for path in (student, teacher)]
    kl, same = [], []
    for row in rows:
        turns = row["messages"]
        ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        with torch.no_grad():
            log_q, log_p = (
                model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for model in models
            )
        for k in range(1, len(turns), 2):
            before = tokenizer.apply_chat_template(
                turns[:k], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            end = ids.index(tokenizer.eos_token_id, len(before)) + 1
            here = slice(len(before) - 1, end - 1)
            p, q = log_p[here], log_q[here]
            kl.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).double())
    return float(torch.cat(kl).mean()), float(torch.cat(same).mean())


def test_they_are_whole_divergences_and_training_does_not_notice(
    same_vocabulary_folder: Path, train: Train
):
    folder = same_vocabulary_folder
    _, trainer = train(config(folder, "compared", save_strategy="steps", save_steps=2))
    alone = dskd(folder, kd_ratio=0.0)
    _, without = train(config(folder, "alone", dskd=alone))
    assert losses(trainer) == losses(without)
    assert not any(KL in entry for entry in evaluations(without))
    found = evaluations(trainer)
    rows = tiny.chat_rows(30)[-HELD_OUT:]
    for entry, student in ((found[0], "student"), (found[-1], "compared/checkpoint-4")):
        kl, same = plain(folder / student, folder / "teacher", rows)
        assert entry[KL] == pytest.approx(kl, rel=1e-5)
        assert entry[SAME] == pytest.approx(same, abs=1e-6)
    assert found[0][KL] != pytest.approx(found[-1][KL], rel=1e-3)
    assert [e["eval_loss"] for e in found] == [e["eval_loss"] for e in evaluations(without)]
    assert not any("dskd/teacher_kl" in entry for entry in trainer.state.log_history)


def test_across_tokenizers_it_is_the_number_of_a_distillation(pair_folder: Path, train: Train):
    """Before the first step; a distillation that is told not to compare has none."""
    _, tuned = train(config(pair_folder, "tuned", max_steps=1))
    _, distilled = train(config(pair_folder, "distilled", dskd=dskd(pair_folder), max_steps=1))
    never = dskd(pair_folder, evaluation={"teacher": False})
    _, silent = train(config(pair_folder, "silent", dskd=never, max_steps=1))
    first, like, other = (evaluations(trainer)[0] for trainer in (tuned, distilled, silent))
    assert first[KL] == pytest.approx(like[KL], rel=1e-6)
    assert first[SAME] == pytest.approx(like[SAME], abs=1e-6)
    assert KL not in other
    assert "eval_dskd/teacher_space" in other


def test_a_cache_gets_what_is_evaluated_before_training_and_the_layers_go(
    pair_folder: Path, train: Train, loads: list[int], monkeypatch: pytest.MonkeyPatch
):
    from axolotl_dskd.teacher import live

    ran: list[int] = []
    states = live.LiveTeacher.states

    def counted(self: live.LiveTeacher, batch: Any) -> Any:
        ran.append(len(batch.teacher_labels))
        return states(self, batch)

    monkeypatch.setattr(live.LiveTeacher, "states", counted)
    _, live_run = train(config(pair_folder, "live"))
    assert len(ran) > 1
    ran.clear()
    cache = {"cache": {"path": str(pair_folder / "cache"), "dtype": "float32"}}
    for name in ("first", "second"):
        _, trainer = train(config(pair_folder, name, cache, dataloader_num_workers=1))
        assert len(loads) == 1
        assert sum(ran) == HELD_OUT
        (lesson,) = trainer.compared.lessons.values()
        assert not lesson.teacher.states.body.is_loaded
        for entry, like in zip(evaluations(trainer), evaluations(live_run), strict=True):
            assert entry[KL] == pytest.approx(like[KL], rel=1e-5)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
def test_axolotl_evaluate_opens_a_teacher_where_it_is_asked_to(
    pair_folder: Path, train: Train, validated: Callable[[dict[str, Any]], Any], kd_ratio: float
):
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.evaluate import evaluate

    def evaluated(asked: bool | str) -> dict[str, float]:
        block = dskd(pair_folder, kd_ratio=kd_ratio, evaluation={"teacher": asked})
        cfg = config(pair_folder, "evaluated", dskd=block)
        meta = load_datasets(cfg=validated(cfg), cli_args=TrainerCliArgs())
        return evaluate(cfg=validated(cfg), dataset_meta=meta)

    _, trainer = train(config(pair_folder, "trained", max_steps=1))
    metrics, plainly = evaluated(True), evaluated("auto")
    assert metrics[KL] == pytest.approx(evaluations(trainer)[0][KL], rel=1e-6)
    assert metrics["train_dskd/teacher_kl"] > 0
    assert KL not in plainly
    for name in ("eval_loss", "eval_dskd/ce", "eval_dskd/bits_per_byte"):
        assert metrics[name] == plainly[name]


def test_packing_ranks_shards_and_adapters_do_not_change_them(pair_folder: Path):
    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
    packed = {"sample_packing": True, "eval_sample_packing": True, "sequence_len": 2048}
    ways = {"plain": {}, "packed": {**packed, "micro_batch_size": 1}, "lora": lora}
    configs = [config(pair_folder, name, max_steps=1, **way) for name, way in ways.items()]
    results = run(1, *({"do": "train", "config": made} for made in configs))
    cache = {"cache": {"path": str(pair_folder / "cache"), "dtype": "float32"}}
    two = [config(pair_folder, f"ranks {n}", n, max_steps=1) for n in ({}, cache)]
    results += run(2, *({"do": "train", "config": made} for made in two))
    for name, shards in (("fsdp2", SHARDED), ("zero3", zero(3))):
        made = config(pair_folder, name, max_steps=1, **shards)
        results += run(2, {"do": "train", "config": made})
    first = results[0]["evaluations"][0]
    for result in results[1:]:
        for name in (KL, SAME):
            assert result["evaluations"][0][name] == pytest.approx(first[name], rel=1e-5), name


def test_several_teachers_are_each_compared_on_their_rows(tmp_path: Path, train: Train):
    folder = two_teachers.save(tmp_path)
    tiny.write_rows(folder / "held-out.jsonl", two_teachers.rows(30)[-HELD_OUT:])
    told = {"kd_ratio": 0.0, "evaluation": {"teacher": True}}
    tuned = config(folder, "tuned", dskd=two_teachers.block(folder, **told), max_steps=1)
    learned = config(folder, "learned", dskd=two_teachers.block(folder), max_steps=1)
    first, like = (evaluations(train(made)[1])[0] for made in (tuned, learned))
    for name in (KL, "eval_dskd/math/teacher_kl", "eval_dskd/chat/teacher_kl"):
        assert first[name] == pytest.approx(like[name], rel=1e-5), name


def test_where_nothing_is_evaluated_no_teacher_is_opened_and_the_log_says_so(
    pair_folder: Path, train: Train, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    monkeypatch.setattr(comparing.LOG, "warning", said.append)
    _, trainer = train(
        config(pair_folder, "blind", test_datasets=None, eval_strategy=None, eval_steps=None)
    )
    assert trainer.compared is None
    assert "nothing is evaluated" in said[0]
