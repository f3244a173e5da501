"""What every teacher gives and is told, whatever its kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import DualBatch, Needs, Side, View

#: Ids and labels of samples, each [L] without padding, to `DualBatch.cached_states` and `.cached`.
CacheReader = Callable[[list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]


class Teacher(Protocol):
    """A frozen model that says something about each batch.

    The trainer calls `begin` once the teacher is open, `end_epoch` after each epoch and `end` when
    training stops, on every rank alike. A kind that has nothing to do there inherits just that.

    Attributes:
        head: its output head, frozen, on the device where the loss is computed; None where it gives
            no states.
        embedding: [rows, D] the matrix of its input embedding, for whoever starts projectors;
            likewise.
    """

    head: OutputHead | None
    embedding: Tensor | None

    @abstractmethod
    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        """The supervised teacher tokens of a batch, with what is needed of them.

        Raises:
            ValueError: the teacher cannot read them, in words.
        """

    def nothing(self, tokens: Side) -> View:
        """What it says where there is no token; `tokens` are none."""
        assert self.head is not None
        states = self.head.weight.new_empty((0, self.head.hidden_size))
        return View(tokens, self.head, states, (states, states))

    def embedded(self, tokens: Side) -> tuple[Tensor, Tensor]:
        """[n, D] its input embeddings of the tokens' inputs and of their labels, where it has
        any."""
        raise AssertionError("a teacher that gives no states embeds nothing")

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """These batches will be asked about soon: begin with them, where that is of use.

        Those that were named before and not asked about come no more. A call may also come for a
        batch that was never named.
        """
        return

    def idle(self, batch: DualBatch) -> None:
        """Do what a rank without supervised tokens owes the others in their call."""
        return

    def reader(self) -> CacheReader | None:
        """What data workers call to find cached states; None where there is no cache."""
        return None

    def running(self) -> AbstractContextManager[Any]:
        """A context with the model itself, for writing with it; on every rank alike.

        Raises:
            ValueError: there is no model in this process.
        """
        raise ValueError(
            "this teacher is not in the training's own process, so it cannot write there: let a "
            "vLLM write (dskd.samples.engine)."
        )

    @property
    def runs_together(self) -> bool:
        """Whether each of its model's forwards needs all ranks."""
        return False

    def begin(self) -> None:
        """Training begins.

        Raises:
            ValueError: on every rank, if one of them cannot begin.
        """
        return

    def start_again(self) -> None:
        """An attempt at training has failed and another one begins: nothing is kept for it."""
        return

    def end_epoch(self, *, more: bool) -> None:
        """An epoch has ended; `more` of them are to come, or none.

        Raises:
            ValueError: on every rank, if one of them cannot go on.
        """
        return

    def end(self) -> None:
        """Training ends, maybe within an epoch."""
        return
