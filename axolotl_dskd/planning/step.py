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
from axolotl_dskd.output_head import OutputHead
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
        attend(student, cfg.attn_implementation, padded=batch.padded)
        of_teacher = run.config.one_teacher.attn_implementation
        attend(self.teacher, of_teacher, padded=self._group > 1)
        student.gradient_checkpointing_disable()
        if cfg.gradient_checkpointing:
            reentrant = (cfg.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
            # Random states cannot be kept for the meta device.
            kwargs = {"use_reentrant": bool(reentrant), "preserve_rng_state": False}
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    @property
    def models(self) -> list[nn.Module]:
        """All that have weights: what is trained beside the student, once it has begun, too."""
        beside = self.objective.module
        return [self.student, self.teacher, *([] if beside is None else [beside])]

    @contextmanager
    def watched(self) -> Iterator[LiveBytes]:
        """While open, bytes beyond those of weights are counted."""
        weights = tensors_of(*self.models)
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

    def read(self) -> Tensor:
        """[B, L, d] the student's final states."""
        ids = torch.zeros(self.run.batch[:2], dtype=torch.long, device=META)
        with captured_head_input(self.student) as captured:
            self.student(input_ids=ids, use_cache=False)
        return single(captured, self.student)

    def ask(self) -> None:
        """One forward of the largest group of teacher rows, where its layers are loaded."""
        if not self.run.layers_are_loaded:
            return
        shape = self._group, self.run.batch.teacher_length
        ids = torch.zeros(shape, dtype=torch.long, device=META)
        apart = torch.autocast("meta", enabled=False)
        with apart, torch.no_grad(), captured_head_input(self.teacher):
            self.teacher(input_ids=ids, use_cache=False)

    def loss(self, hidden: Tensor) -> Tensor:
        """From the student's states [B, L, d] to the loss, as the trainer computes it."""
        self.objective.follow(1, self.pair.heads[0])
        return self.objective(*self._views(hidden, asks=self.run.config.uses_teacher)).loss

    @torch.no_grad()
    def compare(self) -> None:
        """A batch of an evaluation that asks the teacher."""
        hidden = self.read()
        self.ask()
        student, teacher, matches = self._views(hidden, asks=True)
        facts, budget = self.run.facts, self.objective.setting.budget
        compare = TeacherAgreement(facts.shared_ids, budget, facts.shared_ends)
        compare(student, teacher, matches.starts)

    def _views(self, hidden: Tensor, *, asks: bool) -> tuple[View, View, Matches]:
        """What is compared, given the student's states; `asks`: with what the teacher says."""
        batch, needs, heads = self.run.batch, self.objective.needs, self.pair.heads
        N, M = batch.supervised, batch.teacher_supervised
        # Two answers that are compared are in one batch, however small it is.
        samples = max(batch.samples, 2) if needs.contrast else batch.samples
        ours, theirs = _tokens(N, samples), _tokens(M, samples)
        embedded = None
        if needs.embeddings:
            weight = self.student.get_input_embeddings().weight.detach()
            embedded = weight[ours.input_ids], weight[ours.labels]
        states = hidden.flatten(0, 1)[torch.arange(N)]
        student = View(ours, heads[0], states, embedded, self._written(N, samples))
        return student, self._said(theirs, heads) if asks else View(theirs), _matches(N, M)

    def _written(self, count: int, samples: int) -> Written | None:
        """As if the student had written every answer; where two are compared, every other one."""
        if not self.objective.needs.written:
            return None
        if not self.objective.needs.contrast:
            return Written(torch.ones(samples, dtype=torch.bool), torch.zeros(count))
        pairs = torch.arange(samples // 2 * 2).view(-1, 2)
        return Written(torch.arange(samples) % 2 == 1, torch.zeros(count), None, pairs)

    def _said(self, tokens: Side, heads: tuple[OutputHead, ...]) -> View:
        """What the teacher says of its tokens."""
        M, server = len(tokens), self.run.config.one_teacher.server
        if server is not None and server.gives == "logprobs":
            said = torch.empty(M, device=META)
            ids = torch.empty((M, server.top_k), dtype=torch.long, device=META)
            return View(tokens, logprobs=Logprobs(said, ids, ids.float()))
        head = heads[1]
        hidden, *embedded = (head.weight.new_empty((M, head.hidden_size)) for _ in range(3))
        embeddings = self.objective.needs.embeddings
        return View(tokens, head, hidden, (embedded[0], embedded[1]) if embeddings else None)


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
