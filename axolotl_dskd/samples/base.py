"""What a source of samples is, and what it is told of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from axolotl_dskd.data.answers import AnsweredRows, RoutedAnswers
from axolotl_dskd.data.collator import DualCollator
from axolotl_dskd.generation import MixedWriter, Writer

Batch = dict[str, Any]


@dataclass(frozen=True)
class SamplesRun:
    """What a run tells its source of samples; the same on every rank but for `rank`.

    Attributes:
        answered: takes prompts out of rows, puts answers in; made when it is first asked for.
        collator: of the training's batches.
        writer: by who writes ("student", "teacher"), ids that end an answer, and how many tokens
            at once.
        mixed_writer: the student beside the teacher, by the teacher's share of each draw, the rows
            of the pair, ids that end an answer, and how many tokens at once.
        max_length: of a sample, in the student's tokens.
        pack_length: of a padded or packed row, which may hold a whole micro-batch.
        batch: rows of a micro-batch; None where they are packed.
        contrast: the data's own answer must stand beside each written one.
        evaluates: whether there are evaluations during training.
        total_steps: of the training, once it has begun.
        identity: what tells the teacher from others, for what is kept of it.
        folder: in which what the teacher writes is kept.
        decode: the student's ids to text.
        table: shows rows of plain values in open trackers: name, step from 1, rows.
        device: of collectives.
        rank: this process' number.
        memory: told of rows that are kept, or None.
        by_teacher: the same run with each of several teachers and its rows; none: there is one.
    """

    answered: Callable[[], AnsweredRows | RoutedAnswers]
    collator: DualCollator
    writer: Callable[[str, list[int], int], Writer]
    mixed_writer: Callable[[float, AnsweredRows, list[int], int], MixedWriter]
    max_length: int
    pack_length: int
    batch: int | None
    contrast: bool
    evaluates: bool
    total_steps: Callable[[], int]
    identity: Callable[[], str]
    folder: Path
    decode: Callable[[list[int]], str]
    table: Callable[[str, int, list[dict[str, Any]]], None]
    device: torch.device
    rank: int = 0
    memory: Memory | None = None
    by_teacher: Sequence[SamplesRun] = ()


class Memory(Protocol):
    """What is told of rows that are kept for later steps; on every rank alike."""

    def turn(self, kept: Iterable[dict[str, Any]], gone: Iterable[dict[str, Any]]) -> None:
        """Rows that are kept from now on, and those that are kept no more."""
        ...

    def fetch(self, rows: Sequence[dict[str, Any]]) -> None:
        """This rank will see these kept rows now."""
        ...


class Samples(Protocol):
    """Gives the micro-batches of each optimizer step. A kind that has nothing to do somewhere
    inherits just that. All is called on every rank alike."""

    #: It wants to be told of an evaluation before the first step.
    begins_with_evaluation: bool = False

    @abstractmethod
    def __call__(self, batches: list[Batch], step: int) -> list[Batch]:
        """The micro-batches to train on, as many as were given.

        Args:
            batches: those that the data loader gave, collated.
            step: optimizer steps made so far.
        """

    def dataset(self, rows: Any) -> Any:
        """The rows that the data loader is to read; before training.

        Args:
            rows: as they were prepared.
        """
        return rows

    def evaluated(self, metrics: dict[str, float], step: int) -> None:
        """Told after each evaluation.

        Args:
            metrics: means over the evaluation set, such as `dskd/ce`.
            step: optimizer steps made so far.
        """
        return

    def metrics(self) -> dict[str, float]:
        """What it has to say of the steps since it was last asked, over all ranks."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what the next step depends on; on one rank alone.

        Args:
            folder: our part of a checkpoint.
        """
        return

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not there, or damaged.
        """
        return
