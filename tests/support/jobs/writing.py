"""Trainings in which what is written is noted."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

from axolotl_dskd.generation import TransformersWriter
from axolotl_dskd.objectives.uld import ULD
from axolotl_dskd.samples import teacher
from axolotl_dskd.samples.student import StudentSamples
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.training.trainer import DSKDTrainer
from axolotl_dskd.types import DualBatch, Needs
from tests.support.jobs.common import on_a_full_disk, this_rank, wrapped
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
def train_in_contrast(config: dict[str, Any]) -> dict[str, Any]:
    """`train` with an objective that needs a preferred answer beside each written one; of every
    batch the written samples, the pairs, and the student's rows up to their answers."""
    batches: list[dict[str, Any]] = []

    def compute_loss(
        original: Any, trainer: Any, model: Any, inputs: Any, *more: Any, **keys: Any
    ) -> Any:
        batch = DualBatch.pop_from(dict(inputs))
        ids, segments = batch.input_ids, batch.segment_ids
        asked = (batch.labels == -100) & (segments >= 0)
        rows = [ids[asked & (segments == k)].tolist() for k in range(len(batch.teacher_labels))]
        assert batch.written is not None
        assert batch.written.pairs is not None
        batches.append(
            {
                "written": batch.written.samples.tolist(),
                "pairs": batch.written.pairs.tolist(),
                "prompts": rows,
            }
        )
        return original(trainer, model, inputs, *more, **keys)

    with (
        patch.object(ULD, "needs", Needs(contrast=True)),
        wrapped(DSKDTrainer, "compute_loss", compute_loss),
    ):
        return train(config) | {"batches": batches}


@job
def train_noting_weights(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; of every sample whose answer was written both sides' ids, the student's labels, and
    what is known of each supervised token: `logprobs`, `weights` (None: there are none); and the
    `step`, from 0."""
    samples: list[dict[str, Any]] = []

    def compute_loss(
        original: Any, trainer: Any, model: Any, inputs: Any, *more: Any, **keys: Any
    ) -> Any:
        batch = DualBatch.pop_from(dict(inputs))
        written, side = batch.written, batch.student_side()
        for k in [] if written is None else written.samples.nonzero().flatten().tolist():
            assert written is not None
            mine, here = side.sample_ids == k, batch.segment_ids == k
            theirs = batch.teacher_input_ids[k][batch.teacher_attention_mask[k].bool()]
            weights = None if written.weights is None else written.weights[mine].tolist()
            samples.append(
                {
                    "step": trainer.state.global_step,
                    "ids": batch.input_ids[here].tolist(),
                    "labels": batch.labels[here].tolist(),
                    "teacher_ids": theirs.tolist(),
                    "logprobs": written.logprobs[mine].tolist(),
                    "weights": weights,
                }
            )
        return original(trainer, model, inputs, *more, **keys)

    with wrapped(DSKDTrainer, "compute_loss", compute_loss):
        return train(config) | {"samples": samples}


@job
def train_counting_teacher_rows(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; how many samples the teacher itself read in each call."""
    read: list[int] = []

    def states(original: Any, teacher: Any, batch: Any) -> Any:
        read.append(len(batch.teacher_labels))
        return original(teacher, batch)

    with wrapped(LiveTeacher, "states", states):
        return train(config) | {"read": read}


@job
def train_counting_writing(config: dict[str, Any]) -> dict[str, Any]:
    """`train`; how many prompts this rank answered."""
    found = train_noting_prompts(config)
    return found | {"written": len(found["prompts"])}


@job
def train_with_answers_of_its_own(config: dict[str, Any]) -> dict[str, Any]:
    """`train`, where each rank keeps the teacher's answers on a disk of its own."""

    def folder(original: Any, answers: Any) -> Any:
        return original(answers) / f"rank-{this_rank()}"

    with (
        wrapped(teacher.TeacherAnswers, "_folder", folder),
        patch.object(teacher, "_LATE_SECONDS", 0.5),
    ):
        return train(config)


@job
def train_on_a_disk_without_room(config: dict[str, Any], rank: int) -> dict[str, Any]:
    """`train`, where one rank cannot save what the teacher has answered."""
    with on_a_full_disk(teacher, "_save", rank):
        return train(config)


@job
def train_killing(config: dict[str, Any], step: int, pid: int, number: int) -> dict[str, Any]:
    """`train`; before it writes after so many steps, a process group gets a signal."""

    def write(original: Any, samples: Any, micro: Any, now: int, columns: Any) -> Any:
        if now == step and this_rank() == 0:
            os.killpg(pid, number)
        return original(samples, micro, now, columns)

    with wrapped(StudentSamples, "_write", write):
        return train(config)
