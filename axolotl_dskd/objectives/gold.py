"""GOLD: next-token distributions of groups of tokens, shared tokens by name and others by rank.

    Q_g = q_last · Π_{earlier k of g} q_k[y_k]    over the student's vocabulary, P_g the teacher's
    loss = (1 - kd_ratio) · CE + kd_ratio · Σ_g (w · D_β(Q_g, P_g on shared tokens)
                                               + w' · Σ_r |Q_(r) − P_(r)| on the others, sorted)

over groups between byte boundaries that both sides have (TRL's GOLD trainer; by rank it is ULD on
groups, arXiv 2402.12030). Q_g is a token's share of the group's own probability, so it does not
sum to 1. For 0 < β < 1, D_β = β KL(P ‖ M) + (1 − β) KL(Q ‖ M) with M = βP + (1 − β)Q; for β = 0
it is KL(P ‖ Q), for β = 1 KL(Q ‖ P).

Where this is not TRL's: its default merge (`observed`) reads logits one position late, and is not
offered. Its KL at β 0 and 1 over a part of a vocabulary is not least at Q = P; the generalised KL,
which adds −P + Q (or P − Q), is. Tokens are equal by bytes, not by string, and those with which
the data's turns end are each other's; ends of another kind have cross-entropy alone, since by name
the teacher's end would speak against them. There are no clamps, which cut gradients off. TRL
takes the mean over groups, then over samples; here groups are summed, and divided once.

Gradients are autograd's within chunks that tear no group apart.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.config import GOLDConfig
from axolotl_dskd.data.token_bytes import shared_tokens, token_bytes
from axolotl_dskd.losses import Part, TermSpec, Values, by_autograd, over, plain_with_ce
from axolotl_dskd.objectives.base import (
    Objective,
    Pair,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.groups import STUDENT, TEACHER, Groups, group_chunks
from axolotl_dskd.types import LossOutput, Matches, Per, Side, Term, View

#: float32 copies of a chunk's logits that autograd holds, measured.
_COPIES = 10


class GOLD(Objective[GOLDConfig], config=GOLDConfig):
    """See the module."""

    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "shared": "student_token",
        "by_rank": "student_token",
        "aligned": "student_token",
    }

    def describe(self) -> str:
        """Which tokens are compared."""
        if self.config.hybrid:
            return "gold: groups of equal bytes, shared tokens by name and the others by rank"
        return "gold: groups of equal bytes, all tokens by rank"

    def begin(self, pair: Pair) -> None:
        """Find the tokens that both vocabularies have."""
        facts, sizes = self.facts, [head.vocab_size for head in pair.heads]
        found = zip(*shared_tokens(facts.student, facts.teacher, facts.turn_ends), strict=True)
        both = sorted({(i, j) for i, j in found if i < sizes[0] and j < sizes[1]})
        if not self.config.hybrid:
            both = []
        columns = torch.tensor(both, dtype=torch.long).reshape(-1, 2).T.to(pair.device)
        self.columns = list(columns)
        self.others, self._column = [], []
        for ids, size in zip(columns, sizes, strict=True):
            column = torch.full((size,), -1, device=pair.device)
            column[ids] = torch.arange(len(ids), device=pair.device)
            self._column.append(column)
            self.others.append((column < 0).nonzero().flatten())
        spelled = token_bytes(self.facts.student)
        self._textless = torch.tensor([not s for s in spelled], device=pair.device)
        share = len(both) / sizes[1]
        weights = self.config.weights
        self.weights = (share, 1.0 - share) if weights == "share" else weights

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch; a group's values stand at its last student token."""
        tokens, ratio = student.tokens, self.setting.kd_ratio
        groups = self._compared(Groups.of(matches), tokens, teacher.tokens)
        labels = {"student": tokens.labels, "teacher": teacher.tokens.labels}
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}

        def compare(part: Part, logits: dict[str, Tensor]) -> tuple[Tensor, Values]:
            here, merged = groups.within(part), []
            for side, name in enumerate(logits):
                z = logits[name] / self.config.temperature
                last = here.last[:, side]
                log_q = z.gather(-1, labels[name][part[name]].unsqueeze(-1)).squeeze(-1)
                before = (log_q - z.logsumexp(-1)).index_fill(0, last, 0.0)
                share = here.sums(side, before).unsqueeze(-1)
                merged.append(z[last].log_softmax(-1) + share)
            by_name = self._by_name(*(x[:, i] for x, i in zip(merged, self.columns, strict=True)))
            by_rank = _by_rank(*(x[:, i].exp() for x, i in zip(merged, self.others, strict=True)))
            loss = ratio * (self.weights[0] * by_name.sum() + self.weights[1] * by_rank.sum())
            nothing = by_rank.new_zeros(len(logits["student"]))
            last = here.last[:, STUDENT]
            values = {"shared": by_name, "by_rank": by_rank}
            return loss, {n: nothing.index_put((last,), v.detach()) for n, v in values.items()}

        sums = over(
            streams,
            group_chunks(matches, streams, self.setting.budget, _COPIES),
            by_autograd(plain_with_ce(compare, student.references, 1.0 - ratio)),
            {
                "ce": TermSpec("student", 1.0 - ratio),
                "shared": TermSpec("student", ratio * self.weights[0]),
                "by_rank": TermSpec("student", ratio * self.weights[1]),
            },
        )
        terms = {name: Term(values, tokens.sample_ids) for name, values in sums.values.items()}
        terms["aligned"] = participation(groups.rows(STUDENT, len(tokens)), tokens)
        return LossOutput(sums.loss, len(tokens), terms)

    def _compared(self, groups: Groups, student: Side, teacher: Side) -> Groups:
        """Those whose ends of turns are not two tokens of which one is shared with a third."""
        labels = student.labels[groups.last[:, STUDENT]], teacher.labels[groups.last[:, TEACHER]]
        ours, theirs = (column[label] for column, label in zip(self._column, labels, strict=True))
        kept = (ours == theirs) | ~self._textless[labels[0]]
        at = kept.nonzero().flatten()
        return Groups(groups.first[at], groups.last[at])

    def _by_name(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """[G] D_β of log-measures [G, K] that need not sum to 1; never negative."""
        beta = self.config.beta

        def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
            a = log_a.exp()
            return (a * (log_a - log_b) - a + log_b.exp()).sum(-1)

        if beta == 0.0:
            return kl(log_p, log_q)
        if beta == 1.0:
            return kl(log_q, log_p)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)


def _by_rank(q: Tensor, p: Tensor) -> Tensor:
    """[G] Σ_r |q_(r) − p_(r)|, both sorted, the narrower padded by 0; 0 if a side has nothing."""
    if not q.shape[1] or not p.shape[1]:
        return q.sum(-1) * 0.0
    wide = max(q.shape[1], p.shape[1])
    ranked = (x.sort(-1, descending=True).values for x in (q, p))
    padded_q, padded_p = (F.pad(x, (0, wide - x.shape[1])) for x in ranked)
    return (padded_q - padded_p).abs().sum(-1)
