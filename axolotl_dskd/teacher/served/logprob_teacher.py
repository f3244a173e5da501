"""A teacher that is asked for log-probabilities: nothing of it is loaded but its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from axolotl_dskd.servers import Servers
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.teacher.served.ahead import Ahead, Sample
from axolotl_dskd.teacher.served.launch import HINT, served_name
from axolotl_dskd.teacher.served.logprobs import Question, ask_for_logprobs
from axolotl_dskd.teacher.served.probe_logprobs import probe_logprobs
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun
from axolotl_dskd.types import DualBatch, Logprobs, Needs, Side, View


class LogprobTeacher(Teacher):
    """Says how likely labels are, and which tokens are likeliest.

    Args:
        question: what servers are asked.
        servers: who runs the teacher.
    """

    head = embedding = None

    def __init__(self, question: Question, servers: Servers) -> None:
        self.question = question
        self.ahead = Ahead(servers, self._ask)

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """See `Ahead.expect`."""
        self.ahead.expect(batches)

    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        """The supervised teacher tokens with what is said of them.

        Raises:
            ValueError: no server answers in time, or an answer is not what was asked for.
        """
        assert needs.of_teacher != "states"
        side = batch.teacher_side()
        return self._view(side, self.ahead.take(batch))

    def nothing(self, tokens: Side) -> View:
        """See `Teacher`."""
        return self._view(tokens, [])

    def end(self) -> None:
        """Leave the servers alone; another call asks them again."""
        self.ahead.end()

    def _view(self, side: Side, answers: list[Logprobs]) -> View:
        device, k = side.labels.device, self.question.top_k
        labels = torch.cat([torch.zeros(0), *(a.labels for a in answers)]).to(device)
        if not k:
            return View(side, logprobs=Logprobs(labels))
        ids = torch.zeros((0, k), dtype=torch.long)
        ids = torch.cat([ids, *(a.ids for a in answers if a.ids is not None)])
        top = torch.cat([torch.zeros((0, k)), *(a.top for a in answers if a.top is not None)])
        return View(side, logprobs=Logprobs(labels, ids.to(device), top.to(device)))

    async def _ask(self, sample: Sample) -> Logprobs:
        return await ask_for_logprobs(
            self.ahead.servers, self.question, sample.ids, sample.positions
        )


def open_logprobs(spec: TeacherSpec, run: TrainingRun) -> LogprobTeacher:
    """The teacher behind its servers, after they were tried.

    Args:
        spec: the teacher that is wanted.
        run: who asks, and what it has to be given.

    Raises:
        ValueError: no server answers, or one gives something else than this teacher's
            log-probabilities.
    """
    server = spec.config.server
    assert server is not None
    top_k = server.top_k if run.needs.of_teacher == "top" else 0
    if top_k >= spec.vocab_size:
        raise ValueError(
            f"dskd.teacher.server.top_k is {top_k}, but the teacher has {spec.vocab_size} tokens. "
            "Take fewer."
        )
    question = Question(served_name(spec), top_k, spec.vocab_size)
    servers = Servers(server, HINT, run.how_to_resume)
    probe_logprobs(servers, spec, question, run)
    return LogprobTeacher(question, servers)
