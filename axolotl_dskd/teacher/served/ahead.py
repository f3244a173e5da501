"""Answers about samples, asked for before they are needed: while the student runs its forward.

Knows samples and requests; not what is asked about them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from axolotl_dskd.cache import sample_key, supervised_positions
from axolotl_dskd.servers import Servers
from axolotl_dskd.types import DualBatch

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A text that has supervised tokens.

    Attributes:
        key: of its ids and labels.
        ids: its tokens up to the last label.
        positions: [m] int64 of those that predict a label, which is the token behind each.
    """

    key: bytes
    ids: list[int]
    positions: Tensor


class Ahead(Generic[T]):
    """Every sample is a request of its own, so that servers batch as they like, and what batch a
    sample is in changes nothing.

    Args:
        servers: who is asked.
        ask: what about.
    """

    def __init__(self, servers: Servers, ask: Callable[[Sample], Coroutine[Any, Any, T]]) -> None:
        self.servers = servers
        self._ask = ask
        self._asked: dict[bytes, Future[T]] = {}
        self._gone: ValueError | None = None

    def __len__(self) -> int:
        return len(self._asked)

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """Ask for what a call on each of these batches will need; forget what was expected before
        and never came."""
        before, self._asked = self._asked, {}
        for batch in batches:
            for sample in _samples(batch):
                if sample.key in before:
                    self._asked[sample.key] = before.pop(sample.key)
                else:
                    self._begin(sample)
        for request in before.values():
            request.cancel()

    def take(self, batch: DualBatch) -> list[T]:
        """The answers about a batch, one for each of its samples that has supervised tokens.

        Raises:
            ValueError: no server answers in time, or an answer is not what was asked for.
        """
        if self._gone is not None:  # the ranks stop together after the last micro-batch of a step
            raise self._gone
        samples = _samples(batch)
        for sample in samples:  # all of them, before the first is waited for
            self._begin(sample)
        try:
            answers = [self._asked[sample.key].result() for sample in samples]
        except BaseException as error:  # the run ends here: nobody waits for the other answers
            self.end()
            if isinstance(error, ValueError):
                self._gone = error
            raise
        for sample in samples:  # one may be there twice
            self._asked.pop(sample.key, None)
        return answers

    def end(self) -> None:
        """Leave the servers alone; another call asks them again."""
        self._asked.clear()
        self.servers.close()

    def _begin(self, sample: Sample) -> None:
        if sample.key not in self._asked:
            self._asked[sample.key] = self.servers.start(self._ask(sample))


def _samples(batch: DualBatch) -> list[Sample]:
    lengths = batch.sizes.lengths
    rows = zip(
        batch.teacher_input_ids.cpu().numpy(),
        batch.teacher_labels.cpu().numpy(),
        lengths,
        strict=True,
    )
    samples = []
    for ids, labels, length in rows:
        positions = supervised_positions(labels[:length])
        if len(positions):
            key = sample_key(ids[:length], labels[:length])
            read = ids[: positions[-1] + 2].tolist()
            samples.append(Sample(key, read, torch.from_numpy(positions)))
    return samples
