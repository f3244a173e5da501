"""Approximate likelihood matching: both models find a chunk of text equally likely.

    ℓ = Σ log-probabilities of a chunk's tokens (+ s),   s = log P(a word's boundary comes next)
    loss = (1 - kd_ratio) · CE + kd_ratio · τ Σ_chunks D(exp(ℓ_teacher / τ), exp(ℓ_student / τ))

over chunks between byte boundaries that both sides have (Minixhofer et al. 2025, arXiv 2503.20083;
tokenkit). A boundary is a token that begins with a space or a newline, or a special one.

`merge` joins chunks until the teacher's exp(s) behind one is above a threshold, a turn ends, or a
token has no counterpart. `debias` adds s to both sides' ℓ, gradient included. There is none behind
an end of turn nor where a side supervises no position there; published code adds one there, too.

Published code takes the mean over chunks; here chunks are summed, and divided, like everything, by
the supervised student tokens: the published mean is ours times tokens / chunks (the terms
`tokens_per_chunk` and `chunks`). At a large τ the published gradient of ℓ is 1/τ of
cross-entropy's, which the factor τ undoes: it is −(1 − ℓ_teacher / ℓ_student).

The s of a chunk is read in the next chunk's first row, and a merged chunk may be a whole answer, so
no cut of the logits would do for autograd. The student is passed over twice instead: three
products, four where the head trains, and one of the teacher's.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import ChunkLikelihoodConfig
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.losses import over_logprobs, set_logprobs
from axolotl_dskd.objectives.base import (
    Facts,
    Objective,
    Pair,
    Setting,
    label_logprobs,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.groups import STUDENT, TEACHER, Groups
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Needs, Per, Side, Term, View

#: Keeps log-likelihoods below 0, where log(1 − exp) is finite; as published.
_EPSILON = 1e-6


class ChunkLikelihood(Objective[ChunkLikelihoodConfig], config=ChunkLikelihoodConfig):
    """See the module."""

    without_states = "merge: false and debias: false, which ask for no boundary behind a chunk"
    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "chunk": "student_token",
        "tokens_per_chunk": "value",
        "chunks": "value",
        "aligned": "student_token",
    }

    def __init__(self, config: ChunkLikelihoodConfig, facts: Facts, setting: Setting) -> None:
        self.needs = Needs("states" if config.merge or config.debias else "labels")
        super().__init__(config, facts, setting)

    def describe(self) -> str:
        """Which chunks are compared."""
        config = self.config
        merged = f", merged to a boundary above {config.merge_threshold:g}" if config.merge else ""
        debiased = ", with the boundary behind them" if config.debias else ""
        return f"chunk_likelihood: {config.divergence} of chunks of equal bytes{merged}{debiased}"

    def begin(self, pair: Pair) -> None:
        """Find both vocabularies' word boundaries and special tokens."""
        self.boundaries, self.textless = [], []
        facts = self.facts
        for tokenizer, size in zip((facts.student, facts.teacher), facts.vocab_sizes, strict=True):
            boundary, textless = torch.zeros((2, size), dtype=torch.bool)
            spelled = token_bytes(tokenizer)
            used = sorted(i for i in tokenizer.get_vocab().values() if i < size)
            textless[[i for i in used if not spelled[i]]] = True
            boundary[[i for i in used if spelled[i][:1] in (b"", b" ", b"\n")]] = True
            self.boundaries.append(boundary.to(pair.device))
            self.textless.append(textless.to(pair.device))
        uses = self.config.merge or self.config.debias
        if uses and not all(boundary.any() for boundary in self.boundaries):
            raise ValueError(
                "dskd.objective: chunk_likelihood looks for words' boundaries, but a tokenizer has "
                "no token that begins with a space or a newline, nor a special one. Set merge: "
                "false and debias: false."
            )

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch; tokens without a counterpart have CE alone."""
        config, budget, ratio = self.config, self.setting.budget, self.setting.kd_ratio
        tokens, groups = student.tokens, Groups.of(matches)
        log_p, boundary = self._teachers(teacher)
        readable = [
            self._read(side, view.tokens, groups.last[:, side])
            for side, view in ((STUDENT, student), (TEACHER, teacher))
        ]
        known = readable[STUDENT] & readable[TEACHER]
        chunk = self._chunks(groups, known, boundary)
        count = int(chunk[-1]) + 1 if len(chunk) else 0
        ends = torch.searchsorted(chunk, torch.arange(count, device=chunk.device), right=True) - 1
        bounded = known[ends].nonzero().flatten() if config.debias else ends

        def likelihoods(side: int, logprobs: Tensor, boundary: Tensor) -> Tensor:
            total = logprobs.new_zeros(count).index_add(0, chunk, groups.sums(side, logprobs))
            if config.debias:
                behind = groups.last[ends[bounded], side] + 1
                total = total.index_add(0, bounded, boundary[behind])
            return total

        values: dict[str, Tensor] = {}
        theirs = likelihoods(TEACHER, log_p, boundary)

        def loss(log_q: Tensor, boundary: Tensor) -> Tensor:
            values["ce"] = torch.where(student.references == IGNORE_INDEX, 0.0, -log_q)
            values["chunk"] = self._divergence(theirs, likelihoods(STUDENT, log_q, boundary))
            return (1.0 - ratio) * values["ce"].sum() + ratio * values["chunk"].sum()

        begins = self.boundaries[STUDENT] if config.debias else None
        total = over_logprobs(student_stream(student), tokens.labels, budget, begins, loss)

        sizes = groups.last[:, STUDENT] - groups.first[:, STUDENT] + 1
        per_chunk = torch.zeros_like(theirs).index_add(0, chunk, sizes.to(theirs))
        samples = tokens.sample_ids[groups.last[ends, STUDENT]]
        seen, numbers = tokens.sample_ids.unique_consecutive(return_inverse=True)
        numbers = numbers[groups.last[ends, STUDENT]]
        ones = torch.ones_like(theirs)
        terms = {
            "ce": Term(values["ce"].detach(), tokens.sample_ids),
            "chunk": Term(values["chunk"].detach(), samples),
            "tokens_per_chunk": Term(per_chunk, samples),
            "chunks": Term(theirs.new_zeros(len(seen)).index_add(0, numbers, ones), seen),
            "aligned": participation(groups.rows(STUDENT, len(tokens)), tokens),
        }
        return LossOutput(total, len(tokens), terms)

    def _teachers(self, teacher: View) -> tuple[Tensor, Tensor]:
        """[M] each: log-probabilities of the labels, and that a boundary comes instead; 0 where
        nothing asks for the latter."""
        budget = self.setting.budget
        if not (self.config.merge or self.config.debias):
            log_p = label_logprobs(teacher, slice(None), budget)
            return log_p, torch.zeros_like(log_p)
        labels, begins = teacher.tokens.labels, self.boundaries[TEACHER]
        return set_logprobs(teacher_stream(teacher), labels, budget, begins)

    def _read(self, side: int, tokens: Side, last: Tensor) -> Tensor:
        """[G] bool: the row behind a group's last one has read its label, which is text."""
        if not len(tokens):
            return torch.zeros_like(last, dtype=torch.bool)
        behind = (last + 1).clamp_max(len(tokens) - 1)
        label = tokens.labels[last]
        follows = (tokens.input_ids[behind] == label) & (behind > last)
        same = tokens.sample_ids[behind] == tokens.sample_ids[last]
        return follows & same & ~self.textless[side][label]

    def _chunks(self, groups: Groups, known: Tensor, boundary: Tensor) -> Tensor:
        """[G] the chunk of each group, ascending from 0."""
        number = torch.arange(len(groups), device=known.device)
        if not self.config.merge or not len(groups):
            return number
        adjacent = (groups.first[1:] == groups.last[:-1] + 1).all(1)
        behind = groups.last[:-1, TEACHER] + 1
        inside = boundary[behind.clamp_max(len(boundary) - 1)] <= math.log(
            max(self.config.merge_threshold, 1e-38)
        )
        begins = ~(adjacent & known[:-1] & inside)
        return torch.nn.functional.pad(begins.long().cumsum(0), (1, 0))

    def _divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """[C] τ D of log-likelihoods [C]; 0 where they are equal, least there."""
        T, name = self.config.temperature, self.config.divergence
        if name == "abs":
            return (teacher - student).abs()
        a, c = teacher / T - _EPSILON, student / T - _EPSILON
        if name == "abs_exp":
            return T * (a.exp() - c.exp()).abs()
        not_a, not_c = log1mexp(a), log1mexp(c)
        if name == "binary_ce":
            # Less the teacher's own entropy, which no gradient sees.
            return T * (a.exp() * (a - c) + not_a.exp() * (not_a - not_c))
        if name == "reverse_binary_kl":
            return T * (c.exp() * (c - a) + not_c.exp() * (not_c - not_a))
        r = self.config.renyi_order
        mixed = torch.logaddexp(r * a + (1 - r) * c, r * not_a + (1 - r) * not_c)
        return T * mixed / (r - 1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, exact at both ends (Mächler 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
