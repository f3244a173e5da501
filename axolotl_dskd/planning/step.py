"""What one process runs while it trains, piece by piece, on skeletons and made-up batches.

The batches are the largest ones, without numbers but for those that decide shapes. Knows models and
objectives; nothing of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.losses import elementwise
from axolotl_dskd.models.heads import captured_head_input, output_head, single
from axolotl_dskd.objectives import Pair
from axolotl_dskd.planning.run import Run
from axolotl_dskd.planning.simulate import LiveBytes, attend, simulation
from axolotl_dskd.planning.skeleton import tensors_of
from axolotl_dskd.teacher.live import MAX_TOKENS_PER_FORWARD
from axolotl_dskd.types import Logprobs, Matches, Side, View, Written
from axolotl_dskd.virtual_attention import VirtualAttention

META = torch.device("meta")


class TrainingStep:
    """A run's step, each piece to be called in order while `watched` is open.

    Args:
        student: its skeleton.
        run: what is trained, with the teacher's skeleton.
    """

    def __init__(self, student: Any, run: Run) -> None:
        self.student, self.teacher, self.run = student, run.teacher, run
        self.objective = run.objective()
        batch, cfg = run.batch, run.cfg
        #: Rows of the largest group that a live teacher reads at once.
        self._group = min(batch.samples, max(1, MAX_TOKENS_PER_FORWARD // batch.teacher_length))
        padded = not cfg.sample_packing and (batch.rows > 1 or bool(cfg.pad_to_sequence_len))
        attend(student, cfg.attn_implementation, padded=padded)
        attend(run.teacher, run.config.one_teacher.attn_implementation, padded=self._group > 1)
        student.gradient_checkpointing_disable()
        if cfg.gradient_checkpointing:
            reentrant = (cfg.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
            # Random states cannot be kept for the meta device.
            kwargs = {"use_reentrant": bool(reentrant), "preserve_rng_state": False}
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    @property
    def beside(self) -> list[nn.Module]:
        """What is trained beside the student, once the objective has begun."""
        return [] if self.objective.module is None else [self.objective.module]

    @contextmanager
    def watched(self) -> Iterator[LiveBytes]:
        """While open, bytes beyond those of weights are counted."""
        weights = tensors_of(self.student, self.teacher, *self.beside)
        # Between the loss' products one kernel works in place, or small blocks of rows do.
        blocks = mock.patch.dict(elementwise._BLOCK, meta=elementwise._BLOCK["cpu"])
        with blocks, simulation(weights, self.run.autocast) as memory:
            yield memory

    @property
    def pair(self) -> Pair:
        """Both models as an objective begins with them."""
        V, U = self.run.facts.vocab_sizes
        head, keys = output_head(self.student, V), self.run.config.virtual_attention
        if keys is not None:
            attention = VirtualAttention(keys, self.run.facts.student, V, head, META, 0)
            head = replace(head, gate=attention.gate(1.0))
        heads, models = [head], [self.student]
        if self.run.config.one_teacher.gives == "states":
            heads.append(output_head(self.teacher, U).frozen())
            models.append(self.teacher)
        embeddings = (model.get_input_embeddings().weight for model in models)
        return Pair((*heads,), (*embeddings,), META)

    def read(self) -> None:
        """The student's forward, up to its final states."""
        ids = torch.zeros(self.run.batch[:2], dtype=torch.long, device=META)
        with captured_head_input(self.student) as captured:
            self.student(input_ids=ids, use_cache=False)
        self._hidden = single(captured, self.student)

    def ask(self) -> None:
        """One forward of the largest group of teacher rows, where its layers are loaded."""
        if not self.run.layers_are_loaded:
            return
        shape = self._group, self.run.batch.teacher_length
        ids = torch.zeros(shape, dtype=torch.long, device=META)
        apart = torch.autocast("meta", enabled=False)
        with apart, torch.no_grad(), captured_head_input(self.teacher):
            self.teacher(input_ids=ids, use_cache=False)

    def loss(self) -> Tensor:
        """From what has been read to the loss, as the trainer computes it."""
        self.objective.follow(1, self.pair.heads[0])
        loss = self.objective(*self._views(asks=self.run.config.uses_teacher)).loss
        del self._hidden
        return loss

    @torch.no_grad()
    def compare(self) -> None:
        """A batch of an evaluation that asks the teacher."""
        self.read()
        self.ask()
        # No ends of turns: of labels that are none, all would be left out.
        student, teacher, matches = self._views(asks=True)
        shared, budget = self.run.facts.shared_ids, self.objective.setting.budget
        TeacherAgreement(shared, budget)(student, teacher, matches.starts)

    def _views(self, *, asks: bool) -> tuple[View, View, Matches]:
        """What is compared; `asks`: with what the teacher says."""
        batch, needs = self.run.batch, self.objective.needs
        N, M = batch.supervised, batch.teacher_supervised
        # Two answers that are compared are in one batch, however small it is.
        samples = max(batch.samples, 2) if needs.contrast else batch.samples
        ours, theirs = _tokens(N, samples), _tokens(M, samples)
        written = None
        if needs.written:  # by the student: every answer, or the second one of each pair
            number = torch.arange(samples)
            by_student = number % 2 == 1 if needs.contrast else number >= 0
            pairs = number[: samples // 2 * 2].view(-1, 2) if needs.contrast else None
            written = Written(by_student, torch.zeros(N), None, pairs)
        states = self._hidden.flatten(0, 1)[torch.arange(N)]
        embedded = self._embedded(self.student, ours)
        student = View(ours, self.pair.heads[0], states, embedded, written)
        return student, self._said(theirs) if asks else View(theirs), _matches(N, M)

    def _said(self, tokens: Side) -> View:
        """What the teacher says of its tokens."""
        M, server = len(tokens), self.run.config.one_teacher.server
        if server is not None and server.gives == "logprobs":
            said = torch.empty(M, device=META)
            ids = torch.empty((M, server.top_k), dtype=torch.long, device=META)
            return View(tokens, logprobs=Logprobs(said, ids, ids.float()))
        head = self.pair.heads[1]
        hidden = head.weight.new_empty((M, head.hidden_size))
        return View(tokens, head, hidden, self._embedded(self.teacher, tokens))

    def _embedded(self, model: Any, tokens: Side) -> tuple[Tensor, Tensor] | None:
        if not self.objective.needs.embeddings:
            return None
        weight = model.get_input_embeddings().weight.detach()
        return weight[tokens.input_ids], weight[tokens.labels]


def _tokens(count: int, samples: int) -> Side:
    """Supervised tokens, evenly divided among samples. Real numbers: who belongs to which sample,
    and to whom of the other side, decides shapes."""
    nothing = torch.zeros(count, dtype=torch.long)
    return Side(nothing, nothing, torch.arange(count) * samples // max(count, 1))


def _matches(N: int, M: int) -> Matches:
    """As if every token had a partner, as far as the shorter side goes."""
    both = min(N, M)
    pairs = torch.arange(both)[:, None].expand(-1, 2)
    spans = torch.arange(max(N, M))[:, None] + torch.tensor([0, 1])
    groups = (torch.arange(count) * both // max(count, 1) for count in (N, M))
    return Matches(spans[:N], spans[:M], pairs, pairs, *groups)
