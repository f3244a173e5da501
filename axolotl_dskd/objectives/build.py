"""From the configuration's objective to the object that computes it."""

from __future__ import annotations

import importlib
from typing import Any

from axolotl_dskd.config import (
    DSKDConfig,
    ObjectiveConfig,
    StudentSamplesConfig,
    about_teacher,
)
from axolotl_dskd.data.tokenizers import load_teacher_tokenizer, vocabulary_size
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives.base import Facts, Objective, Setting
from axolotl_dskd.objectives.cross_entropy import FineTuning


def chunk_budget(config: DSKDConfig, memory: int) -> Budget:
    """How many tokens' logits a run may hold at once; memory as in `build_objective`."""
    return Budget(None if config.chunk_tokens == "auto" else config.chunk_tokens, memory)


def build_objective(config: DSKDConfig, facts: Facts, *, memory: int, seed: int) -> Objective[Any]:
    """The objective of a run; loads no weights.

    Args:
        config: the `dskd:` block.
        facts: of the pair.
        memory: bytes of the device in total, for `chunk_tokens: auto`.
        seed: for whatever is drawn at the start.

    Raises:
        ValueError: the pair is not one that the objective works for.
    """
    samples = config.samples
    writes = isinstance(samples, StudentSamplesConfig)
    setting = Setting(
        config.kd_ratio,
        chunk_budget(config, memory),
        seed,
        written=writes,
        gives=config.one_teacher.gives,
        references=not (isinstance(samples, StudentSamplesConfig) and samples.share == 1),
    )
    objective = objective_class(config.objective)(config.objective, facts, setting)
    if config.mixes:
        _check_mixing(objective)
    return objective


def _check_mixing(objective: Objective[Any]) -> None:
    """Refuse a teacher that takes part in drawing where it cannot, or must not.

    Raises:
        ValueError: in words.
    """
    if not objective.facts.one_vocabulary:
        raise ValueError(
            "dskd.samples.teacher_mix draws tokens from both models' distributions over one "
            "vocabulary, but student and teacher have different ones: "
            f"{objective.facts.differing()}. Set teacher_mix: 0."
        )
    if objective.needs.contrast:
        raise ValueError(
            f"dskd.objective: {objective.config.name} holds the student's own answer against a "
            "better one, and what the teacher has helped to write is not its own. Set "
            "dskd.samples.teacher_mix: 0."
        )


def fine_tuning(config: DSKDConfig, facts: Facts, *, memory: int) -> FineTuning:
    """What stands in an objective's place where evaluations alone ask the teacher.

    Args:
        config, facts, memory: as in `build_objective`.
    """
    setting = Setting(0.0, chunk_budget(config, memory), gives=config.one_teacher.gives)
    return FineTuning(config.objective, facts, setting)


def objective_class(config: ObjectiveConfig) -> type[Objective[Any]]:
    """The class that computes what these keys ask for; imports its module.

    Raises:
        ValueError: their module defines none.
    """
    kind = type(config)
    if kind not in Objective.known and kind.__module__.startswith("axolotl_dskd."):
        importlib.import_module(f"axolotl_dskd.objectives.{config.name}")
    if kind not in Objective.known:
        raise ValueError(
            f"dskd.objective: {kind.__module__} defines the keys of {config.name!r}, but no "
            "subclass of Objective with `config=` that class."
        )
    return Objective.known[kind]


def check_pair(config: DSKDConfig, student: Any) -> None:
    """Refuse what an objective can refuse by the two tokenizers alone.

    Args:
        student: its tokenizer.

    Raises:
        ValueError: a pair is not one that the objective works for.
    """
    for name, one in config.each().items():
        with about_teacher(name):
            teacher = load_teacher_tokenizer(one)
            facts = Facts(student, teacher, (vocabulary_size(student), vocabulary_size(teacher)))
            build_objective(one, facts, memory=0, seed=0)
