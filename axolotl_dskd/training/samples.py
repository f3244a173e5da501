"""What a training tells its source of samples."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from axolotl_dskd.config import DSKDConfig, WritingConfig
from axolotl_dskd.data.answers import AnsweredRows
from axolotl_dskd.data.hooks import make_reconcile
from axolotl_dskd.data.tokenizers import vocabulary_size
from axolotl_dskd.generation import TransformersWriter, Writer
from axolotl_dskd.models.student import Student
from axolotl_dskd.samples import SamplesRun
from axolotl_dskd.teacher import Teacher, TeacherSpec
from axolotl_dskd.teacher.cached.identity import teacher_identity
from axolotl_dskd.training.vllm import vllm_writer

#: Rows from which is learned how answers end.
_ROWS = 1000


def samples_run(
    trainer: Any,
    config: DSKDConfig,
    student: Student,
    teacher: Teacher,
    tokenizers: tuple[Any, Any],
) -> SamplesRun:
    """Of a trainer that is about to train; loads and computes nothing yet.

    Args:
        config: the `dskd:` block.
        student, teacher: the models that may write.
        tokenizers: student's and teacher's.
    """
    device, cfg = trainer.accelerator.device, trainer.axolotl_cfg
    folder = Path(cfg.dataset_prepared_path or "last_run_prepared")

    def answered() -> AnsweredRows:
        reconcile = make_reconcile(config, tokenizers[0], truncate_teacher=False)
        return AnsweredRows(reconcile, *tokenizers, islice(trainer.train_dataset, _ROWS))

    def writer(who: str, end_ids: list[int], batch_tokens: int) -> Writer:
        model = student if who == "student" else teacher
        tokenizer = tokenizers[0 if who == "student" else 1]
        if isinstance(config.samples, WritingConfig) and config.samples.engine != "transformers":
            server = config.samples.engine.vllm
            return vllm_writer(trainer, config, server, student, tokenizer, end_ids)
        return TransformersWriter(
            model.running,
            end_ids=end_ids,
            pad_id=tokenizer.pad_token_id or 0,
            vocab_size=vocabulary_size(tokenizer),
            batch_tokens=batch_tokens,
            together=model.runs_together,
        )

    def identity() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        spec = TeacherSpec(config.teacher, vocabulary_size(tokenizers[1]), device)
        return teacher_identity(spec.config, spec.dtype, folder).digest

    return SamplesRun(
        answered=answered,
        collator=trainer.data_collator,
        writer=writer,
        max_length=int(cfg.sequence_len),
        contrast=trainer.objective.needs.contrast,
        evaluates=trainer.eval_dataset is not None and trainer.args.eval_strategy != "no",
        total_steps=lambda: trainer.state.max_steps,
        identity=identity,
        folder=folder,
        decode=partial(tokenizers[0].decode, skip_special_tokens=False),
        device=device,
        rank=trainer.args.process_index,
    )
