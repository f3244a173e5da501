"""A teacher whose states come from its cache; it runs only for what is not in there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.cache import RowReader
from axolotl_dskd.teacher.cached.session import CacheSession
from axolotl_dskd.teacher.cached.states import CachedStates
from axolotl_dskd.teacher.protocol import CacheReader, Teacher
from axolotl_dskd.teacher.spec import TrainingRun
from axolotl_dskd.types import DualBatch, Needs, Side, View


class CachedTeacher(Teacher):
    """Gives what the live teacher gives, from packed states.

    Args:
        states: the open cache.
        run: the training run that fills and reads it.
    """

    def __init__(self, states: CachedStates, run: TrainingRun) -> None:
        self.states = states
        self.head = states.head
        self.embedding = states.embedding.weight
        self._session = CacheSession(states, run)

    @torch.no_grad()
    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        """The supervised teacher tokens with their final hidden states [M, D].

        Raises:
            ValueError: the teacher had to be loaded and could not be; its states are not finite.
        """
        side = batch.teacher_side()
        packed = self.states.packed(batch, side.sample_ids)
        hidden = self.states.codec.decode(packed, self.head.weight.dtype)
        return View(side, self.head, hidden, self.embedded(side) if needs.embeddings else None)

    def embedded(self, tokens: Side) -> tuple[Tensor, Tensor]:
        """See `Teacher`."""
        table = self.states.embedding
        return table(tokens.input_ids), table(tokens.labels)

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """Tell the teacher of the samples that are not cached."""
        self.states.expect(batches)

    def reader(self) -> CacheReader:
        """Looks samples up in the folder; picklable, for the data workers."""
        store = self.states.store
        return RowReader(store.folder, store.bytes_per_token, quiet=True).read_samples

    def running(self) -> AbstractContextManager[Any]:
        """The teacher itself, loaded if it is not."""
        return self.states.body.get().running()

    def begin(self) -> None:
        """See `CacheSession.begin`."""
        self._session.begin()

    def end_epoch(self, *, more: bool) -> None:
        """See `CacheSession.end_epoch`."""
        self._session.end_epoch(more=more)

    def end(self) -> None:
        """Write what is waiting."""
        self.states.store.flush()
