"""Teachers that evaluations compare the student with, and that training never asks.

Knows a trainer that is constructed; holds nothing.
"""

from __future__ import annotations

from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_dskd.config import about_teacher
from axolotl_dskd.data.routing import rows_of_teacher
from axolotl_dskd.data.tokenizers import turn_ends, vocabulary_size
from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.machine import total_memory
from axolotl_dskd.objectives import Facts, fine_tuning
from axolotl_dskd.training.callbacks import TeacherEpochs
from axolotl_dskd.training.opening import evaluation_sets, open_teachers
from axolotl_dskd.training.step import Distillation, Lesson

LOG = get_logger(__name__)


def open_for_evaluations(trainer: Any, *, trains: bool) -> Distillation | None:
    """The teachers of a run that learns nothing from them; None where there is nothing to ask.

    What their caches lack is computed now, and their layers go again.

    Args:
        trains: evaluations are those of a training, so they are about its evaluation sets alone.

    Raises:
        ValueError: on every rank, if a teacher cannot be opened.
    """
    evaluated = evaluation_sets(trainer)
    if not trains and trainer.train_dataset is not None:
        evaluated.insert(0, trainer.train_dataset)
    if not evaluated or (trains and trainer.args.eval_strategy == "no"):
        LOG.warning(
            "dskd.evaluation.teacher: true, but nothing is evaluated, so no teacher is opened. Set "
            "val_set_size or test_datasets, and evals_per_epoch."
        )
        return None
    config, device = trainer.dskd, trainer.accelerator.device
    student, memory = trainer.processing_class, total_memory(device)
    teachers = open_teachers(trainer, config, {}, evaluated)
    lessons = {}
    for number, (name, one) in enumerate(config.each().items()):
        tokenizer = trainer.teacher_tokenizers[name]
        sizes = vocabulary_size(student), vocabulary_size(tokenizer)
        rows = rows_of_teacher(trainer.train_dataset, number)
        facts = Facts(student, tokenizer, sizes, turn_ends=turn_ends(rows, student, tokenizer))
        objective = fine_tuning(one, facts, memory=memory)
        with about_teacher(name):
            teachers[name].begin()
        budget = objective.setting.budget
        compare = TeacherAgreement(facts.shared_ids, budget, facts.shared_ends)
        lessons[name] = Lesson(teachers[name], objective, compare)
        trainer.add_callback(TeacherEpochs(teachers[name]))
    trainer.eval_data_collator.readers = [teacher.reader() for teacher in teachers.values()]
    return Distillation(lessons)
