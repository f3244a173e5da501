"""A memory plan can be made for every objective: each runs on tensors without numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from axolotl_dskd.commands.cli import read_config
from axolotl_dskd.commands.inspect.card import Card, configured_for
from axolotl_dskd.commands.inspect.command import inspect_run
from axolotl_dskd.config import DSKDConfig, ObjectiveConfig
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import Facts, Objective, Setting
from axolotl_dskd.objectives.build import objective_class
from axolotl_dskd.planning import run
from axolotl_dskd.planning.plan import Plan, writing
from tests.support import tiny

CARD = Card("a test card", 24 << 30, True)

#: Of the package, whatever other modules define; and one of a user's own.
NAMES = [
    *sorted(
        name
        for name, kind in ObjectiveConfig.known.items()
        if kind.__module__.startswith("axolotl_dskd.")
    ),
    "tests.support.toy_objective",
]
OF_ONE_VOCABULARY = {"token_kd"}
#: Learned from what the student writes.
OF_WRITTEN = {"policy", "preference"}


def with_answers(config: DSKDConfig, facts: Facts, *, memory: int, seed: int) -> Objective[Any]:
    """An objective that is told that the student writes answers."""
    setting = Setting(config.kd_ratio, Budget(None, memory), seed, written=True)
    return objective_class(config.objective)(config.objective, facts, setting)


def plan(folder: Path, **dskd: Any) -> Plan:
    """Of a step of wide rows, so that it is larger than the start of training."""
    sizes = {"pad_to_sequence_len": True, "micro_batch_size": 4}
    block = {"teacher": {"base_model": str(folder / "teacher")}, **dskd}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(tiny.base_config(folder, dskd=block, **sizes)))
    with configured_for(CARD):
        cfg, config = read_config(path)
    return inspect_run(str(path), cfg, config, card=CARD, rows=50).memory


@pytest.mark.parametrize(
    ("name", "one_vocabulary"),
    [
        pytest.param(name, same, id=f"{name}-{'one vocabulary' if same else 'two tokenizers'}")
        for name in NAMES
        for same in (False, True)
        if same or name not in OF_ONE_VOCABULARY
    ],
)
def test_every_objective_is_planned(
    tmp_path: Path, name: str, one_vocabulary: bool, monkeypatch: pytest.MonkeyPatch
):
    tiny.save_pair(tmp_path, same_vocabulary=one_vocabulary)
    if name in OF_WRITTEN:
        monkeypatch.setattr(run, "build_objective", with_answers)
    memory = plan(tmp_path, objective={"name": name})
    assert memory.fits
    assert memory.peak_phase == "alignment and loss"
    # At least one side's logits of some 200 supervised tokens, in float32.
    assert memory.at_peak["alignment and loss"] > 200 * 400 * 4


@pytest.mark.parametrize("one_vocabulary", [False, True])
def test_a_teacher_for_evaluations_alone_is_planned(tmp_path: Path, one_vocabulary: bool):
    tiny.save_pair(tmp_path, same_vocabulary=one_vocabulary)
    told = {"kd_ratio": 0.0, "evaluation": {"teacher": True}}
    folder = str(tmp_path / "teacher")
    live = plan(tmp_path, **told)
    learned = plan(tmp_path, objective={"name": "token_kd" if one_vocabulary else "uld"})
    for part in ("teacher layers", "teacher embedding and head"):
        assert live.at_peak[part] == learned.at_peak[part] > 0
    assert "teacher forward" not in live.phases
    for phase in ("alignment and loss", "backward"):
        assert live.phases[phase] < learned.phases[phase]
    cached = plan(tmp_path, teacher={"base_model": folder, "cache": {"path": "c"}}, **told)
    assert "teacher layers" not in cached.at_peak
    held = {"student weights", "optimizer states", "CUDA context", "fragmentation"}
    held |= {"teacher layers", "teacher embedding and head"}
    own = live.phases["evaluation"] - sum(live.at_peak[name] for name in held)
    # Student's and teacher's logits of some 100 tokens at least.
    assert own > 100 * (400 + (400 if one_vocabulary else 600)) * 4
    assert cached.phases["evaluation"] <= live.phases["evaluation"] - live.at_peak["teacher layers"]
    with pytest.raises(ValueError, match=r"uses no teacher.*evaluation: \{teacher: true\}"):
        plan(tmp_path, kd_ratio=0.0)


def test_a_share_of_the_teacher_space_is_planned_as_all_of_it(tmp_path: Path):
    """How many tokens a step draws is chance."""
    tiny.save_pair(tmp_path)
    whole, quarter = (
        plan(tmp_path, objective={"name": "dual_space", "teacher_space_share": share})
        for share in (1.0, 0.25)
    )
    assert quarter.total == pytest.approx(whole.total, rel=0.01)


def test_virtual_attention_is_planned_and_holds_no_second_head(tmp_path: Path):
    tiny.save_pair(tmp_path)
    plain, gated = (
        plan(tmp_path, virtual_attention=attention) for attention in (None, {"blocks": 4})
    )
    assert plain.total < gated.total < 1.05 * plain.total


@pytest.mark.parametrize(
    ("objective", "one_vocabulary"),
    [
        ({"name": "token_kd", "temperature": 1.0}, True),
        ({"name": "chunk_likelihood", "merge": False, "debias": False}, False),
    ],
    ids=["token_kd", "chunk_likelihood"],
)
def test_nothing_is_held_of_a_teacher_that_is_asked_for_log_probabilities(
    tmp_path: Path, objective: dict[str, Any], one_vocabulary: bool
):
    tiny.save_pair(tmp_path, same_vocabulary=one_vocabulary)
    server = {"url": "http://a", "gives": "logprobs", "top_k": 8}
    teacher = {"base_model": str(tmp_path / "teacher"), "server": server}
    memory = plan(tmp_path, teacher=teacher, objective=objective)
    assert memory.at_peak["alignment and loss"] > 200 * 400 * 4
    assert not {"teacher layers", "teacher embedding and head"} & memory.at_peak.keys()


def test_writing_is_planned_where_this_process_writes(tmp_path: Path):
    tiny.save_pair(tmp_path)
    samples = {"from": "student", "max_new_tokens": 100}
    less, more = (plan(tmp_path, samples={**samples, "batch_tokens": n}) for n in (100, 400))
    assert less.phases["writing"] < more.phases["writing"]
    served = {**samples, "engine": {"vllm": {"url": "http://127.0.0.1:1"}}}
    assert "writing" not in plan(tmp_path, samples=served).phases


def test_a_teacher_that_writes_before_training_is_planned(tmp_path: Path):
    """Also one whose layers are not there in training, and only where this process writes."""
    tiny.save_pair(tmp_path, hidden_sizes=(32, 192))
    phase, samples = "writing before training", {"from": "teacher", "max_new_tokens": 100}
    wide = {**samples, "batch_tokens": 200_000}
    narrow = plan(tmp_path, samples={**samples, "batch_tokens": 100_000})
    live = plan(tmp_path, samples=wide)
    # Layers, keys and values, two heads of 48 numbers in 16 bits, of all tokens.
    assert live.phases[phase] - narrow.phases[phase] > 2 * 2 * 2 * 48 * 2 * 100_000
    cached = {"base_model": str(tmp_path / "teacher"), "cache": {"path": "c"}}
    kept = plan(tmp_path, samples=wide, teacher=cached)
    ((there,), (here,)) = (made.on_top[phase].values() for made in (kept, live))
    assert there - here == live.held["teacher layers"] > 0
    served = {**wide, "engine": {"vllm": {"url": "http://127.0.0.1:1"}}}
    assert phase not in plan(tmp_path, samples=served).phases


def test_fewer_answers_at_once_are_proposed_where_writing_takes_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny.save_pair(tmp_path, hidden_sizes=(32, 192))
    samples = {"from": "teacher", "max_new_tokens": 100, "batch_tokens": 200_000}
    whole = plan(tmp_path, samples=samples)
    assert whole.peak_phase == "writing before training"
    monkeypatch.setattr(f"{__name__}.CARD", replace(CARD, memory=whole.total - (32 << 20)))
    (step,) = plan(tmp_path, samples=samples).steps
    assert step.change == "dskd.samples.batch_tokens: 100000"
    proposed = plan(tmp_path, samples={**samples, "batch_tokens": 100_000})
    assert step.total == proposed.total


def test_what_the_teacher_says_of_kept_answers_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the card's memory only where that is the host's."""
    tiny.save_pair(tmp_path, hidden_sizes=(32, 48))
    samples = {"from": "student", "max_new_tokens": 100}
    on_gpu = CARD
    monkeypatch.setattr(f"{__name__}.CARD", replace(CARD, gpu=False))

    def planned(**keys: Any) -> Plan:
        return plan(tmp_path, samples={**samples, **keys})

    one, two = (planned(replay=n).at_peak["kept answers"] for n in (500, 1000))
    # The teacher's tokens are fewer or more than the student's, but not by much.
    assert two == pytest.approx(2 * one, rel=1e-3)
    assert one / (500 * 100 * 48 * 4) == pytest.approx(1, rel=0.6)
    assert planned(replay=500, replay_memory=1000).at_peak["kept answers"] == 1000
    for keys in ({"replay": 0}, {"replay": 500, "replay_memory": 0}):
        assert "kept answers" not in planned(**keys).at_peak
    monkeypatch.setattr(f"{__name__}.CARD", on_gpu)
    report = planned(replay=500, replay_memory=1000)
    assert "kept answers" not in report.at_peak
    (note,) = (note for note in report.notes if "dskd.samples.replay_memory" in note)
    assert "up to 1.0 kB of the host's memory" in note


def test_a_teacher_that_draws_along_is_planned_with_a_cache_of_its_own(tmp_path: Path):
    """Where it is larger than the student; else the student's own forward is the fullest moment."""
    tiny.save_pair(tmp_path, same_vocabulary=True, hidden_sizes=(32, 192))
    samples = {"from": "student", "max_new_tokens": 100, "batch_tokens": 1600}
    block = {"objective": {"name": "token_kd"}, "samples": samples}
    alone = plan(tmp_path, **block).phases["writing"]
    mixed = plan(tmp_path, **{**block, "samples": {**samples, "teacher_mix": 0.2}})
    # Layers, keys and values, two heads of 48 numbers in float32, of all tokens.
    assert mixed.phases["writing"] - alone > 2 * 2 * 2 * 48 * 4 * 1600


def test_the_layers_of_a_cached_teacher_stay_where_the_student_writes(tmp_path: Path):
    """What is written in a step is in no cache."""
    tiny.save_pair(tmp_path)
    cached = {"base_model": str(tmp_path / "teacher"), "cache": {"path": "c"}}
    samples = {"from": "student", "max_new_tokens": 100}
    live, kept = (plan(tmp_path, samples=samples, **keys) for keys in ({}, {"teacher": cached}))
    assert kept.at_peak["teacher layers"] == live.at_peak["teacher layers"] > 0
    assert "teacher layers" not in plan(tmp_path, teacher=cached).at_peak


def test_the_cache_of_writing_is_keys_and_values_of_all_tokens():
    with torch.device("meta"):
        student = tiny.tiny_llama(400, 32, 0)
        teacher = tiny.tiny_llama(400, 64, 0)
    found = writing(student, (4, 256), None)
    # Layers, k and v, two heads of 8 (of 16 in the teacher), float32.
    assert found["KV cache"] == 2 * 2 * 2 * 8 * 4 * (4 * 256)
    assert "teacher's KV cache" not in found
    both = writing(student, (4, 256), None, teacher)
    assert both["KV cache"] == found["KV cache"]
    assert both["teacher's KV cache"] == 2 * found["KV cache"]
