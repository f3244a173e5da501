"""The vLLM that writes for a training, from its configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from axolotl_dskd.config import DSKDConfig, StudentWriterConfig, WriterConfig
from axolotl_dskd.generation import (
    FixedModel,
    Served,
    StudentAdapter,
    StudentWeights,
    VLLMWriter,
)
from axolotl_dskd.models.student import Student
from axolotl_dskd.samples import writing_server
from axolotl_dskd.servers import Servers
from axolotl_dskd.training.callbacks import RemoveAtEnd
from axolotl_dskd.training.opening import how_to_resume
from axolotl_dskd.vllm import TEXT

#: Folder in `output_dir` of what the server is given. What begins so is not pushed to a hub.
HANDED_OVER = "_dskd-writer"


def vllm_writer(
    trainer: Any,
    config: DSKDConfig,
    server: WriterConfig,
    student: Student,
    tokenizer: Any,
    end_ids: list[int],
) -> VLLMWriter:
    """The writer of a training, after its server was tried.

    Args:
        trainer: that is about to train.
        config: the `dskd:` block.
        server: its part of it: for the student, or for the teacher.
        student: that writes, or is given nothing.
        tokenizer: of who writes.
        end_ids: tokens that end an answer.

    Raises:
        ValueError: the server cannot be reached, or serves something else.
    """
    wanted = writing_server(trainer.axolotl_cfg, config, server, student.adapter_rank)
    servers = Servers(
        server, f"Start it with\n{wanted.in_words()}", partial(how_to_resume, trainer)
    )
    served: Served = FixedModel(wanted.name)
    of_student = isinstance(server, StudentWriterConfig)
    if isinstance(server, StudentWriterConfig):
        folder = Path(trainer.args.output_dir) / HANDED_OVER
        trainer.add_callback(RemoveAtEnd(folder))  # exports are plain
        kind = StudentWeights if wanted.takes_weights else StudentAdapter
        served = kind(
            servers,
            wanted.name,
            step=lambda: trainer.state.global_step,
            every=server.sync_every,
            save=student.save,
            folder=folder,
            device=trainer.accelerator.device,
        )
    return VLLMWriter(
        servers,
        served,
        end_ids=end_ids,
        longest=wanted.longest,
        shorter="sequence_len" if of_student else "dskd.teacher.sequence_len",
        text_ids=tokenizer(TEXT, add_special_tokens=False)["input_ids"],
        device=trainer.accelerator.device,
        model=student.running if of_student else None,
    )
