"""What a training tells its objectives and its teachers before it begins.

Knows a trainer that is constructed; holds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from transformers.trainer_utils import get_last_checkpoint

from axolotl_dskd.config import (
    DSKDConfig,
    SamplesConfig,
    StudentSamplesConfig,
    WritingConfig,
    about_teacher,
)
from axolotl_dskd.data.routing import rows_of_teacher
from axolotl_dskd.data.tokenizers import (
    exact_share,
    longest_supervised,
    teacher_position_limit,
    turn_ends,
    vocabulary_size,
)
from axolotl_dskd.objectives import Facts
from axolotl_dskd.ranks import raise_together
from axolotl_dskd.teacher import Teacher, TeacherSpec, TrainingRun, open_teacher
from axolotl_dskd.teacher.kept import KeepingTeacher
from axolotl_dskd.types import Needs


def facts(trainer: Any, number: int, student: Any, teacher: Any) -> Facts:
    """What is known of the student and one of the teachers without weights.

    Args:
        number: the teacher's.
        student, teacher: their tokenizers.
    """
    rows = rows_of_teacher(trainer.train_dataset, number)
    longest = longest_supervised(_datasets(trainer, number))
    samples = trainer.dskd.samples
    if longest is not None and isinstance(samples, WritingConfig):
        longest = max(longest, samples.max_new_tokens)
    sizes = vocabulary_size(student), vocabulary_size(teacher)
    ends = turn_ends(rows, student, teacher)
    return Facts(student, teacher, sizes, exact_share(rows), longest, ends)


def open_teachers(
    trainer: Any,
    config: DSKDConfig,
    needs: dict[str, Needs],
    evaluated: Sequence[Any] | None = None,
) -> dict[str, Teacher]:
    """All teachers of a run, by name; they have not begun.

    Args:
        config: the `dskd:` block.
        needs: what each will be asked for, by name.
        evaluated: the data sets that it will be asked about where that is in evaluations alone;
            None: it is asked in training.
    """
    return {
        name: open_one(trainer, config, name, needs.get(name, Needs()), evaluated)
        for name in config.each()
    }


def open_one(
    trainer: Any,
    config: DSKDConfig,
    name: str,
    needs: Needs,
    evaluated: Sequence[Any] | None = None,
) -> Teacher:
    """One teacher of a run; see `open_teachers`."""
    each = config.each()
    number, one = list(each).index(name), each[name]
    with about_teacher(name):
        size = vocabulary_size(trainer.teacher_tokenizers[name])
        spec = TeacherSpec(one.one_teacher, size, trainer.accelerator.device)
        run = training_run(trainer, number, one, needs, evaluated)
        teacher = open_teacher(spec, run)
    if not samples_are_kept(config.samples):
        return teacher
    return KeepingTeacher(teacher, config.samples.replay_memory // len(each))


def samples_are_kept(samples: SamplesConfig) -> TypeGuard[StudentSamplesConfig]:
    """Whether what teachers say of kept rows is to stay in memory."""
    if not isinstance(samples, StudentSamplesConfig):
        return False
    return samples.replay > 0 and samples.replay_memory > 0


def training_run(
    trainer: Any,
    number: int,
    config: DSKDConfig,
    needs: Needs,
    evaluated: Sequence[Any] | None = None,
) -> TrainingRun:
    """What a teacher is told of a run.

    Args:
        number: the teacher's.
        config: with this teacher alone.
        needs: what it will be asked for.
        evaluated: see `open_teachers`.
    """
    device = trainer.accelerator.device
    source = "dataset" if evaluated is not None else config.samples.source

    def datasets() -> list[Any]:
        if evaluated is None:
            return _datasets(trainer, number)
        return [rows_of_teacher(rows, number) for rows in evaluated]

    return TrainingRun(
        datasets=datasets,
        student_is_sharded=trainer.student.is_sharded,
        rank=trainer.args.process_index,
        gather=lambda number: trainer.accelerator.gather(
            torch.tensor([number], device=device)
        ).tolist(),
        stop_together=partial(raise_together, device=device),
        local_main_first=trainer.accelerator.local_main_process_first,
        longest_written=0 if source == "dataset" else teacher_position_limit(config),
        writes=source == "student",
        how_to_resume=partial(how_to_resume, trainer),
        needs=needs,
        only_evaluates=evaluated is not None,
    )


def how_to_resume(trainer: Any) -> str:
    """From which checkpoint, in words; nothing where there is none."""
    folder = Path(trainer.args.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return f"Then go on with resume_from_checkpoint: {last}" if last else ""


def _datasets(trainer: Any, number: int) -> list[Any]:
    """The rows of a teacher that training and evaluation will see."""
    datasets = [trainer.train_dataset, *evaluation_sets(trainer)]
    return [rows_of_teacher(rows, number) for rows in datasets if rows is not None]


def evaluation_sets(trainer: Any) -> list[Any]:
    """Those that training evaluates on."""
    sets = trainer.eval_dataset
    return [rows for rows in (sets.values() if isinstance(sets, dict) else [sets]) if rows]
