"""What has to be known to open a teacher: what it is, and which run asks for it.

Knows the configuration; loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

from axolotl_dskd.config import TeacherConfig
from axolotl_dskd.teacher.load import resolve_dtype
from axolotl_dskd.types import Needs

T = TypeVar("T")


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher that is wanted.

    Attributes:
        config: where it comes from and how it is loaded.
        vocab_size: ids that its tokenizer can emit.
        device: where the loss is computed; the teacher's layers go there unless
            `config.device_map` says otherwise.
    """

    config: TeacherConfig
    vocab_size: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, with `auto` resolved."""
        return resolve_dtype(self.config.dtype, self.device)


def _stop_alone(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


@dataclass(frozen=True)
class TrainingRun:
    """What a training run tells its teacher. The defaults are those of a run in one process.

    Attributes:
        datasets: gives the rows that training and evaluation will see, the same on every rank;
            others before answers are written for them.
        student_is_sharded: whether ranks hold parts of the student.
        rank: this process' number.
        gather: an integer of every rank, by rank; returns when each has given its own.
        stop_together: called by all ranks with what went wrong here, or None; raises ValueError
            on all of them if anything did on one.
        local_main_first: while open, the others of this machine wait until its main process
            has left.
        longest_written: tokens of the longest row whose answer is yet to be written, before or
            in training.
        writes: answers are written in training, and the teacher is asked about each of them.
        how_to_resume: in words, from which checkpoint; nothing where there is none.
        needs: what the teacher will be asked for.
        only_evaluates: no training step asks the teacher. What a cache lacks is computed before
            training then, so that layers need not stay for it.
    """

    datasets: Callable[[], Sequence[Any]] = tuple
    student_is_sharded: bool = False
    rank: int = 0
    gather: Callable[[int], list[int]] = lambda number: [number]
    stop_together: Callable[[str | None], None] = _stop_alone
    local_main_first: Callable[[], AbstractContextManager[Any]] = nullcontext
    longest_written: int = 0
    writes: bool = False
    how_to_resume: Callable[[], str] = lambda: ""
    needs: Needs = field(default_factory=Needs)
    only_evaluates: bool = False

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail on one rank alone.

        Raises:
            ValueError: on all of them, if it does.
        """
        result, problem = None, None
        try:
            result = work()
        except ValueError as error:
            problem = str(error)
        self.stop_together(problem)
        return cast(T, result)
