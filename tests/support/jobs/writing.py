"""Trainings in which what is written is noted."""

from __future__ import annotations

from typing import Any

from axolotl_dskd.generation import TransformersWriter
from tests.support.jobs.common import wrapped
from tests.support.jobs.registry import job
from tests.support.jobs.training import train


@job
def train_noting_prompts(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; the prompts that were answered, and their seeds."""
    prompts: list[list[int]] = []
    seeds: list[int] = []

    def write(original: Any, writer: Any, asked: Any, sampling: Any, numbers: Any) -> Any:
        prompts.extend(list(ids) for ids in asked)
        seeds.extend(numbers)
        return original(writer, asked, sampling, numbers)

    with wrapped(TransformersWriter, "write", write):
        return train(config) | {"prompts": prompts, "seeds": seeds}


@job
def train_counting_writing(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; how many prompts this rank answered."""
    found = train_noting_prompts(config)
    return found | {"written": len(found["prompts"])}
