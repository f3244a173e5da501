"""A teacher whose states come from servers: asked for ahead, while the student runs its forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.reading import ReadingTeacher
from axolotl_dskd.teacher.served.ahead import Ahead, Sample
from axolotl_dskd.teacher.served.ends import load_ends
from axolotl_dskd.teacher.served.launch import HINT, served_name
from axolotl_dskd.teacher.served.probe_states import probe_states
from axolotl_dskd.teacher.served.wire import ask_for_states
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun
from axolotl_dskd.types import DualBatch, Side

#: Tokens that a cache asks for at once: enough for servers to fill their own batches.
MAX_TOKENS_AT_ONCE = 65536


class ServedTeacher(ReadingTeacher):
    """Gives what the live teacher gives; its layers run elsewhere.

    Args:
        model: the teacher's ends, see `load_ends`.
        spec: what it is.
        servers: who has its layers.
    """

    def __init__(self, model: Any, spec: TeacherSpec, servers: Servers) -> None:
        super().__init__(model, spec.vocab_size, spec.device, MAX_TOKENS_AT_ONCE)
        self._name = served_name(spec)
        self.ahead = Ahead(servers, self._ask)

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """See `Ahead.expect`."""
        self.ahead.expect(batches)

    def states(self, batch: DualBatch) -> tuple[Tensor, Side]:
        """See `ReadingTeacher`.

        Raises:
            ValueError: no server answers in time, or an answer is not what was asked for.
        """
        side = batch.teacher_side()
        nothing = self.head.weight.new_empty((0, self.head.hidden_size), device="cpu")
        hidden = torch.cat([nothing, *self.ahead.take(batch)])
        return hidden.to(batch.teacher_input_ids.device, self.head.weight.dtype), side

    def end(self) -> None:
        """Leave the servers alone; another call asks them again."""
        self.ahead.end()

    async def _ask(self, sample: Sample) -> Tensor:
        states = await ask_for_states(
            self.ahead.servers,
            self._name,
            sample.ids[:-1],  # the last label is read by nobody
            width=self.head.hidden_size,
            dtype=self.head.weight.dtype,
        )
        return states[sample.positions]  # prompts need not wait in memory


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
    probe_states(servers, spec, model, teacher.head, run)
    return teacher
