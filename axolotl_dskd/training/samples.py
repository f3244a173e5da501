"""What a training tells its source of samples."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import calculate_total_num_steps

from axolotl_dskd.config import DSKDConfig, WritingConfig
from axolotl_dskd.data.answers import AnsweredRows, RoutedAnswers
from axolotl_dskd.data.hooks import make_reconcile
from axolotl_dskd.data.routing import rows_of_teacher
from axolotl_dskd.data.tokenizers import vocabulary_size
from axolotl_dskd.generation import MixedWriter, Partner, TransformersWriter, Writer
from axolotl_dskd.models.student import Student
from axolotl_dskd.samples import Samples, SamplesRun, open_samples
from axolotl_dskd.samples.base import Memory
from axolotl_dskd.teacher import Teacher, TeacherSpec
from axolotl_dskd.teacher.cached.identity import teacher_identity
from axolotl_dskd.teacher.kept import KeepingTeacher
from axolotl_dskd.training.opening import open_one
from axolotl_dskd.training.remembering import TeachersMemory
from axolotl_dskd.training.step import Distillation
from axolotl_dskd.training.tables import Tables
from axolotl_dskd.training.vllm import vllm_writer
from axolotl_dskd.types import Needs

#: Rows from which is learned how answers end.
_ROWS = 1000
#: What Axolotl notes of the rows of which it counts steps.
_COUNTED = ("total_num_tokens", "total_supervised_tokens", "sample_packing_eff_est")


def samples_run(
    trainer: Any,
    config: DSKDConfig,
    student: Student,
    teachers: Mapping[str, Callable[[], Teacher]],
    memory: Memory | None = None,
) -> SamplesRun:
    """Of a trainer that is about to train; loads and computes nothing yet.

    Args:
        config: the `dskd:` block.
        student: the model that may write.
        teachers: what gives those that may, by name; called where one is about to write in this
            process, on every rank alike.
        memory: see `SamplesRun`.
    """
    if not config.teachers:
        (teacher,) = teachers.values()
        only = _of_one(trainer, config, student, teacher, trainer.teacher_tokenizers[""], None)
        return replace(only, memory=memory)
    runs = [
        _of_one(trainer, one, student, teachers[name], trainer.teacher_tokenizers[name], number)
        for number, (name, one) in enumerate(config.each().items())
    ]

    def answered() -> RoutedAnswers:
        return RoutedAnswers([cast(AnsweredRows, run.answered()) for run in runs])

    return replace(runs[0], answered=answered, memory=memory, by_teacher=runs)


def _of_one(
    trainer: Any,
    config: DSKDConfig,
    student: Student,
    teacher: Callable[[], Teacher],
    teacher_tokenizer: Any,
    number: int | None,
) -> SamplesRun:
    """With one teacher.

    Args:
        number: the teacher's, where there are several.
    """
    device, cfg = trainer.accelerator.device, trainer.axolotl_cfg
    folder = answers_folder(config, cfg.dataset_prepared_path)
    tokenizers = trainer.processing_class, teacher_tokenizer

    def answered() -> AnsweredRows:
        reconcile = make_reconcile(config, tokenizers[0], truncate_teacher=False)
        rows = rows_of_teacher(trainer.train_dataset, number or 0)
        return AnsweredRows(reconcile, *tokenizers, islice(rows, _ROWS), number)

    def of_process(
        model: Student | Teacher,
        tokenizer: Any,
        end_ids: list[int],
        batch_tokens: int,
        together: bool,
    ) -> TransformersWriter:
        return TransformersWriter(
            model.running,
            end_ids=end_ids,
            pad_id=tokenizer.pad_token_id or 0,
            vocab_size=vocabulary_size(tokenizer),
            batch_tokens=batch_tokens,
            together=together,
        )

    def writer(who: str, end_ids: list[int], batch_tokens: int) -> Writer:
        tokenizer = tokenizers[0 if who == "student" else 1]
        if isinstance(config.samples, WritingConfig) and config.samples.engine != "transformers":
            server = config.samples.engine.vllm
            return vllm_writer(trainer, config, server, student, tokenizer, end_ids)
        model = student if who == "student" else teacher()
        return of_process(model, tokenizer, end_ids, batch_tokens, model.runs_together)

    def mixed_writer(
        share: float, rows: AnsweredRows, end_ids: list[int], batch_tokens: int
    ) -> MixedWriter:
        limit = rows.reconcile.teacher_limit
        beside = teacher()
        partner = Partner(beside.running, share, rows.teachers_own_ends, limit)
        together = student.runs_together or beside.runs_together
        ours = of_process(student, tokenizers[0], end_ids, batch_tokens, together)
        return MixedWriter(ours, partner)

    def identity() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        spec = TeacherSpec(config.one_teacher, vocabulary_size(tokenizers[1]), device)
        return teacher_identity(spec.config, spec.dtype, folder).digest

    return SamplesRun(
        answered=answered,
        collator=trainer.data_collator,
        writer=writer,
        mixed_writer=mixed_writer,
        max_length=int(cfg.sequence_len),
        pack_length=_pack_length(trainer),
        batch=None if cfg.sample_packing else int(trainer._train_batch_size),
        contrast=trainer.distillation is not None and trainer.distillation.needs.contrast,
        evaluates=trainer.eval_dataset is not None and trainer.args.eval_strategy != "no",
        total_steps=lambda: trainer.state.max_steps,
        identity=identity,
        folder=folder,
        decode=partial(tokenizers[0].decode, skip_special_tokens=False),
        table=Tables(lambda: trainer.callback_handler.callbacks),
        device=device,
        rank=trainer.args.process_index,
    )


def _pack_length(trainer: Any) -> int:
    """Tokens of a row that the collator makes. Where attention can tell samples apart, Axolotl
    packs all rows of a micro-batch into one, which is as long as they together."""
    cfg, args = trainer.axolotl_cfg, trainer.args
    in_one = cfg.sample_packing and not args.multipack_real_batches
    return int(cfg.sequence_len) * (int(trainer._train_batch_size) if in_one else 1)


def answers_folder(config: DSKDConfig, prepared: str | None) -> Path:
    """Where what a teacher writes is kept: beside its cached states, which all runs with it share,
    whatever their seeds and rows; without a cache with the prepared rows.

    Args:
        config: the `dskd:` block with one teacher.
        prepared: `dataset_prepared_path`.
    """
    cache = config.one_teacher.cache
    return Path(prepared or "last_run_prepared") if cache is None else Path(cache.path)


def samples_of_lessons(trainer: Any, distillation: Distillation) -> Samples:
    """The configured source of samples of a training that learns from teachers."""
    teachers = {name: lesson.teacher for name, lesson in distillation.lessons.items()}
    keeping = [teacher for teacher in teachers.values() if isinstance(teacher, KeepingTeacher)]
    told = samples_run(
        trainer,
        trainer.dskd,
        trainer.student,
        {name: partial(_the_same, teacher) for name, teacher in teachers.items()},
        TeachersMemory(keeping) if keeping else None,
    )
    return open_samples(trainer.dskd.samples, told)


def _the_same(teacher: Teacher) -> Teacher:
    return teacher


def answered_by_teachers(trainer: Any, config: DSKDConfig, student: Student) -> Any:
    """The training rows with answers of their teachers, for fine-tuning on them alone: a teacher is
    loaded to write what is missing, where no server writes it, and goes again."""
    uncached = config.without_caches()
    teachers = {name: partial(open_one, trainer, uncached, name, Needs()) for name in config.each()}
    told = samples_run(trainer, config, student, teachers)
    rows = open_samples(config.samples, told).dataset(trainer.train_dataset)
    # Its weights would stay until some later collection, and their memory with this process.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def train_on(trainer: Any, rows: Any) -> None:
    """Let a training that is about to begin go over other rows.

    Axolotl has counted the steps of its epochs on the rows that it has prepared. Packed, the same
    prompts with longer or shorter answers make more or fewer: they are counted again.

    Args:
        rows: in place of those.
    """
    if rows is trainer.train_dataset:
        return
    trainer.train_dataset = rows
    cfg, args = trainer.axolotl_cfg, trainer.args
    if cfg.max_steps or not cfg.sample_packing:
        return
    before = args.max_steps
    anew = DictDefault({**cfg, **dict.fromkeys(_COUNTED)})
    args.max_steps = calculate_total_num_steps(anew, rows, update=False) or -1
    if cfg.warmup_steps is None and min(before, args.max_steps) > 0:  # a share of the steps
        args.warmup_steps = round(args.warmup_steps * args.max_steps / before)
