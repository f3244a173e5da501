"""A teacher whose states come from servers: asked for ahead, while the student runs its forward."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axolotl_dskd.cache import sample_key, supervised_positions
from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.reading import ReadingTeacher
from axolotl_dskd.teacher.served.ends import load_ends
from axolotl_dskd.teacher.served.probe import probe
from axolotl_dskd.teacher.served.wire import HINT, ask_for_states
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun
from axolotl_dskd.types import DualBatch, Side

#: Tokens that a cache asks for at once: enough for servers to fill their own batches.
MAX_TOKENS_AT_ONCE = 65536


class ServedTeacher(ReadingTeacher):
    """Gives what the live teacher gives; its layers run elsewhere.

    Every sample is a request of its own, so that servers batch as they like, and what batch a
    sample is in changes nothing.

    Args:
        model: the teacher's ends, see `load_ends`.
        spec: what it is.
        servers: who has its layers.
    """

    def __init__(self, model: Any, spec: TeacherSpec, servers: Servers) -> None:
        super().__init__(model, spec.vocab_size, spec.device, MAX_TOKENS_AT_ONCE)
        self.servers = servers
        self._name = served_name(spec)
        self._asked: dict[bytes, Future[Tensor]] = {}
        self._gone: ValueError | None = None

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """Ask for what a call on each of these batches will need; forget what was expected before
        and never came."""
        before, self._asked = self._asked, {}
        for batch in batches:
            for key, ids, positions in _samples(batch):
                if key in before:
                    self._asked[key] = before.pop(key)
                elif key not in self._asked:
                    self._asked[key] = self._ask(ids, positions)
        for request in before.values():
            request.cancel()

    def states(self, batch: DualBatch) -> tuple[Tensor, Side]:
        """See `ReadingTeacher`.

        Raises:
            ValueError: no server answers in time, or an answer is not what was asked for.
        """
        if self._gone is not None:  # the ranks stop together after the last micro-batch of a step
            raise self._gone
        _, side = batch.teacher_side()
        samples = _samples(batch)
        for key, ids, positions in samples:  # all of them, before the first is waited for
            if key not in self._asked:
                self._asked[key] = self._ask(ids, positions)
        try:
            parts = [self._asked[key].result() for key, *_ in samples]
        except BaseException as error:  # the run ends here: nobody waits for the other answers
            self.end()
            if isinstance(error, ValueError):
                self._gone = error
            raise
        for key, *_ in samples:  # one may be there twice
            self._asked.pop(key, None)
        nothing = self.head.weight.new_empty((0, self.head.hidden_size), device="cpu")
        hidden = torch.cat(parts) if parts else nothing
        return hidden.to(batch.teacher_input_ids.device, self.head.weight.dtype), side

    def end(self) -> None:
        """Leave the servers alone; another call asks them again."""
        self._asked.clear()
        self.servers.close()

    def _ask(self, ids: list[int], positions: Tensor) -> Future[Tensor]:
        async def at_positions() -> Tensor:
            states = await ask_for_states(
                self.servers,
                self._name,
                ids,
                width=self.head.hidden_size,
                dtype=self.head.weight.dtype,
            )
            return states[positions]  # prompts need not wait in memory

        return self.servers.start(at_positions())


def _samples(batch: DualBatch) -> list[tuple[bytes, list[int], Tensor]]:
    """Each sample that has supervised tokens: its key, its ids up to the last of them, and where
    they are."""
    lengths = batch.teacher_attention_mask.sum(1).tolist()
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
            read: np.ndarray = ids[: positions[-1] + 1]
            samples.append((key, read.tolist(), torch.from_numpy(positions)))
    return samples


def served_name(spec: TeacherSpec) -> str:
    """The name by which the servers know the teacher."""
    assert spec.config.server is not None
    return spec.config.server.model or spec.config.base_model


def open_served(spec: TeacherSpec, run: TrainingRun | None = None) -> ServedTeacher:
    """The teacher behind its servers, after they were tried.

    Args:
        spec: the teacher that is wanted.
        run: who asks; None: a command beside training.

    Raises:
        ValueError: its ends cannot be read, no server answers, or one gives something else than
            this teacher's final hidden states.
    """
    run = run or TrainingRun()
    assert spec.config.server is not None
    servers = Servers(spec.config.server, HINT, run.how_to_resume)
    model = load_ends(spec.config, spec.dtype, spec.device)
    teacher = ServedTeacher(model, spec, servers)
    probe(servers, served_name(spec), spec, model, teacher.head, run)
    return teacher
