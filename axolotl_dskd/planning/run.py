"""What a memory plan is made from: a configuration, its rows' sizes, and a skeleton.

Knows configurations and numbers; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from axolotl.utils.dict import DictDefault

from axolotl_dskd.config import DSKDConfig, StudentSamplesConfig, TeacherSamplesConfig
from axolotl_dskd.objectives import Facts, Objective, build_objective, fine_tuning
from axolotl_dskd.planning.skeleton import teacher_skeleton


@dataclass(frozen=True)
class Card:
    """What is planned for: a GPU's memory, or this machine's."""

    name: str
    memory: int
    gpu: bool

    @property
    def device(self) -> torch.device:
        """The device that it stands for, which need not be here."""
        return torch.device("cuda" if self.gpu else "cpu")


class RowSize(NamedTuple):
    """Tokens of a row with two sides, and those of them that are trained on."""

    length: int
    supervised: int
    teacher_length: int
    teacher_supervised: int


class BatchShape(NamedTuple):
    """The largest batch of one process and one micro-step.

    Attributes:
        rows, length: of the student's input; `samples` in it (more than rows where packed).
        supervised: student tokens that are trained on.
        teacher_length: longest teacher side of a sample; `teacher_supervised` in the whole batch.
        words: all that matters of it, and what it was taken from.
    """

    rows: int
    length: int
    samples: int
    supervised: int
    teacher_length: int
    teacher_supervised: int
    words: str


@dataclass(frozen=True)
class Run:
    """A training with one of its teachers.

    Attributes:
        cfg: Axolotl's validated configuration.
        config: the `dskd:` block, with this teacher alone.
        card: what is planned for.
        sizes: of rows that would be trained on.
        all_rows: whether there are no others.
        facts: of the pair.
        name: the teacher's, where there are several.
    """

    cfg: Any
    config: DSKDConfig
    card: Card
    sizes: Sequence[RowSize]
    all_rows: bool
    facts: Facts
    name: str = ""

    @property
    def prefix(self) -> str:
        """How the YAML names the teacher's keys."""
        return f"dskd.teachers.{self.name}." if self.name else "dskd.teacher."

    def changed(self, changes: dict[str, Any]) -> Run:
        """The same with other values of keys, named as in the YAML; another teacher's are none."""

        def under(prefix: str) -> dict[str, Any]:
            return {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}

        rest = {k: v for k, v in changes.items() if not k.startswith("dskd.")}
        block = {
            "teacher": self.config.one_teacher.model_copy(update=under(self.prefix)),
            "samples": self.config.samples.model_copy(update=under("dskd.samples.")),
        }
        return replace(
            self,
            cfg=DictDefault({**self.cfg, **rest}),
            config=self.config.model_copy(update=block),
        )

    @cached_property
    def teacher(self) -> Any:
        """Its skeleton."""
        return teacher_skeleton(self.config.one_teacher, self.card.device)

    def objective(self) -> Objective[Any]:
        """As the trainer builds it, not begun."""
        if self.config.uses_teacher:
            return build_objective(self.config, self.facts, memory=self.card.memory, seed=0)
        return fine_tuning(self.config, self.facts, memory=self.card.memory)

    @property
    def layers_are_loaded(self) -> bool:
        """Whether the teacher's layers are in memory: also a cached one's, where steps have text
        that no cache has seen."""
        teacher = self.config.one_teacher
        writes = self.config.samples.source == "student" and self.config.uses_teacher
        return teacher.server is None and (teacher.layers_are_loaded or writes)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of mixed precision, if any."""
        return torch.bfloat16 if self.cfg.bf16 else torch.float16 if self.cfg.fp16 else None

    @property
    def sums(self) -> RowSize:
        """Tokens of all rows together."""
        return RowSize(*map(sum, zip(*self.sizes, strict=True)))

    @cached_property
    def batch(self) -> BatchShape:
        """The largest batch of one micro-step."""
        cfg, sums, most = self.cfg, self.sums, RowSize(*map(max, zip(*self.sizes, strict=True)))
        rows, length = cfg.micro_batch_size or 1, cfg.sequence_len
        if cfg.sample_packing:
            tokens, scale, stretch = sums, rows * length / sums.length, 1.0
            samples = max(1, round(len(self.sizes) * scale))
            words = f"{rows} packed row(s) of {length} tokens, {samples} samples in all"
        else:
            # Rows that were not seen may be as long as sequence_len allows.
            stretch = 1.0 if self.all_rows else length / most.length
            tokens, scale, samples = most, rows * stretch, rows
            why = "sequence_len: the sample may miss the longest row"
            if cfg.pad_to_sequence_len:
                why = "sequence_len, to which rows are padded"
            elif self.all_rows:
                length, why = min(length, -(-most.length // 64) * 64), "the longest row"
            words = f"{rows} row(s) of {length} tokens ({why})"
        return BatchShape(
            rows=rows,
            length=length,
            samples=max(samples, rows),
            supervised=min(rows * length, round(tokens.supervised * scale)),
            teacher_length=round(most.teacher_length * stretch),
            teacher_supervised=round(tokens.teacher_supervised * scale),
            words=words,
        )

    @property
    def writing(self) -> tuple[int, int] | None:
        """Rows and tokens that the student writes at once, in this process; None: none.

        Answers are as long as they may be; of prompts there is no telling how short they are, and
        short ones make more rows.
        """
        cfg, samples = self.cfg, self.config.samples
        if not isinstance(samples, StudentSamplesConfig) or samples.engine != "transformers":
            return None
        rows = max(1, samples.batch_tokens // min(samples.max_new_tokens, cfg.sequence_len))
        if not cfg.sample_packing:
            of_a_step = (cfg.micro_batch_size or 1) * (cfg.gradient_accumulation_steps or 1)
            rows = min(rows, of_a_step)
        return rows, min(samples.batch_tokens // rows, cfg.sequence_len)

    @property
    def writing_before(self) -> tuple[int, int] | None:
        """Rows and tokens that the teacher writes at once in this process, before training; None:
        none. As for the student."""
        samples, teacher = self.config.samples, self.config.one_teacher
        if not isinstance(samples, TeacherSamplesConfig) or samples.engine != "transformers":
            return None
        if teacher.server is not None:
            return None
        longest = teacher.sequence_len or samples.batch_tokens
        rows = max(1, samples.batch_tokens // min(samples.max_new_tokens, longest))
        return rows, min(samples.batch_tokens // rows, longest)
