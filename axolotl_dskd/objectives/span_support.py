"""Reverse KL over what two vocabularies share, with each aligned span as one more class.

    loss = (1 - kd_ratio) · CE + kd_ratio · Σ_g KL(law of the student's class ‖ teacher's class)

over groups g between byte boundaries that both sides have: both models have read the same bytes
where a group begins. SimCT (arXiv 2605.07711) compares the shared vocabulary and one class for each
aligned span by reverse KL; only its abstract was at hand, and what follows is this package's.

**Classes.** Let a group's text be the student's labels y_1 … y_m and the teacher's x_1 … x_n, and
S the tokens that both vocabularies have (equal bytes, and the end tokens). Each model goes on with
some token. From this its class is:

    span   the tokens are those of its own labels (its *path*, whose probability is the product of
           theirs), or the first token is the whole span: y_1 if m = 1 and it is in S, x_1 likewise
    t      the first token is t in S, which is neither the whole span nor y_1 nor x_1
    rest   everything else

**Both sides have a law over the same classes.** W, the whole-span tokens, and F, the tokens of S
that begin a path of several tokens, depend on the group alone and not on the side; so the labels
are the same set, one for each of S − W − F and two more. A class is a function of what a model goes
on with, so the probabilities of one side sum to 1, if no outcome has two classes. First tokens
differ between the t, and from W. A path begins with a token of W (then it lies within that token's
event, and is not counted again), of F, or outside of S; of the latter two none is a t or in W. So
`span` meets no t. `rest` is what F and the unshared tokens have left: their probability, less the
path's where it begins with one of them. Hence the KL divergence is never negative, and 0 exactly
where the laws agree.

Why a path's first token is no class of its own: "un" before "happy" is all words with un- to one
side, and only those that it can't spell at once to the other. In a group of one token each there
is no F, and what is left is reverse KL over shared tokens and the rest.

A rest may be impossible on one side (a vocabulary within the other), where reverse KL is infinite;
both sides' rest is therefore raised by 1e-6, which keeps all of the above: the masses stay equal.

Temperature is 1: only there is a path's probability the product of its tokens'. Gradients reach
all tokens of a path; they are autograd's, within chunks that tear no group apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import SpanSupportConfig
from axolotl_dskd.data.token_bytes import shared_tokens
from axolotl_dskd.losses import Part, TermSpec, Values, by_autograd, over, plain_with_ce
from axolotl_dskd.objectives.base import (
    Objective,
    Pair,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.groups import STUDENT, TEACHER, Groups, group_chunks
from axolotl_dskd.types import LossOutput, Matches, Per, Term, View

#: float32 copies of a chunk's logits that autograd holds, measured.
_COPIES = 8
_EPSILON = 1e-6


@dataclass(frozen=True)
class Law:
    """Probabilities of one side's classes in G groups.

    Attributes:
        shared: [G, K] log-probabilities of the shared tokens, whatever their class.
        span: [G] log-probability of the span.
        rest: [G] probability of the rest.
    """

    shared: Tensor
    span: Tensor
    rest: Tensor


class SpanSupport(Objective[SpanSupportConfig], config=SpanSupportConfig):
    """See the module."""

    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "support": "student_token",
        "teacher_rest": "value",
        "aligned": "student_token",
    }

    def describe(self) -> str:
        """What is compared."""
        return "span_support: reverse KL over shared tokens, the aligned span and the rest"

    def begin(self, pair: Pair) -> None:
        """Find the tokens that both vocabularies have."""
        facts, sizes = self.facts, [head.vocab_size for head in pair.heads]
        shared = zip(*shared_tokens(facts.student, facts.teacher, facts.turn_ends), strict=True)
        pairs = [(i, j) for i, j in shared if i < sizes[0] and j < sizes[1]]
        both = torch.tensor(pairs, dtype=torch.long)
        self.ids = list(both.reshape(-1, 2).T.to(pair.device))
        self.column = []
        for ids, size in zip(self.ids, sizes, strict=True):
            column = torch.full((size,), -1, device=pair.device)
            column[ids] = torch.arange(len(ids), device=pair.device)
            self.column.append(column)

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch; a group's values stand at its first student token."""
        tokens, ratio, groups = student.tokens, self.setting.kd_ratio, Groups.of(matches)
        labels = {"student": tokens.labels, "teacher": teacher.tokens.labels}
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}

        def compare(part: Part, logits: dict[str, Tensor]) -> tuple[Tensor, Values]:
            here = groups.within(part)
            labels_here = [labels[name][part[name]] for name in ("student", "teacher")]
            whole, start = self._special(here, labels_here)
            q, p = (
                self._law(side, here, logits[name], labels_here[side], whole, start)
                for side, name in ((STUDENT, "student"), (TEACHER, "teacher"))
            )
            kept = ~(_marked(whole, q.shared) | _marked(start, q.shared))
            named = (q.shared.exp() * (q.shared - p.shared) * kept).sum(-1)
            span = q.span.exp() * (q.span - p.span)
            q_rest, p_rest = q.rest + _EPSILON, p.rest + _EPSILON
            kl = named + span + q_rest * (q_rest / p_rest).log()
            nothing = kl.new_zeros(len(logits["student"]))
            first = (here.first[:, STUDENT],)
            values = {"support": kl.detach(), "teacher_rest": p.rest}
            return ratio * kl.sum(), {n: nothing.index_put(first, v) for n, v in values.items()}

        sums = over(
            streams,
            group_chunks(matches, streams, self.setting.budget, _COPIES),
            by_autograd(plain_with_ce(compare, student.references, 1.0 - ratio)),
            {
                "ce": TermSpec("student", 1.0 - ratio),
                "support": TermSpec("student", ratio),
                "teacher_rest": TermSpec("student"),
            },
        )
        terms = {name: Term(values, tokens.sample_ids) for name, values in sums.values.items()}
        first = groups.first[:, STUDENT]
        terms["teacher_rest"] = Term(sums.values["teacher_rest"][first], tokens.sample_ids[first])
        terms["aligned"] = participation(groups.rows(STUDENT, len(tokens)), tokens)
        return LossOutput(sums.loss, len(tokens), terms)

    def _special(self, groups: Groups, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """W and F of each group: [G, 2] columns of shared tokens, -1 where there is none."""
        first = [labels[side][groups.first[:, side]] for side in (STUDENT, TEACHER)]
        column = torch.stack([self.column[side][first[side]] for side in (STUDENT, TEACHER)], 1)
        single = groups.first == groups.last
        return torch.where(single, column, -1), torch.where(single, -1, column)

    def _law(
        self,
        side: int,
        groups: Groups,
        logits: Tensor,
        labels: Tensor,
        whole: Tensor,
        start: Tensor,
    ) -> Law:
        """One side's probabilities; logits [n, V] and labels [n] of its rows."""
        first = groups.first[:, side]
        log_q = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        behind = groups.sums(side, log_q.index_fill(0, first, 0.0))
        every = logits[first].log_softmax(-1)
        shared = every[:, self.ids[side]]
        own = log_q[first]
        column = self.column[side][labels[first]].unsqueeze(-1)
        apart = ~((column == whole) & (whole >= 0)).any(1)  # the path lies in no whole token

        counted = whole >= 0
        counted[:, 1] &= whole[:, 0] != whole[:, 1]
        if shared.shape[1]:
            pieces = shared.gather(1, whole.clamp_min(0)).masked_fill(~counted, -torch.inf)
        else:
            pieces = shared.new_full(whole.shape, -torch.inf)
        path = (own + behind).masked_fill(~apart, -torch.inf)
        span = torch.cat([pieces, path.unsqueeze(-1)], 1).logsumexp(-1)

        # Without the path's first token, of which only what does not go on as the path is left.
        others = (self.column[side] < 0).expand_as(every)
        others = others.scatter(1, labels[first].unsqueeze(-1), False)
        left = own.exp() * -torch.expm1(behind) * apart
        begun = _marked(start, shared) & ~_marked(whole, shared) & ~_marked(column, shared)
        rest = (every.exp() * others).sum(-1) + (shared.exp() * begun).sum(-1) + left
        return Law(shared, span, rest)


def _marked(columns: Tensor, shared: Tensor) -> Tensor:
    """[G, K] bool: which shared tokens stand in `columns` [G, k], where -1 is none."""
    every = torch.arange(shared.shape[1], device=columns.device)
    return (every == columns.unsqueeze(-1)).any(1)
