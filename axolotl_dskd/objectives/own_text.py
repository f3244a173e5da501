"""How far a student is from its teacher on text of its own, whatever it learns there.

    reverse KL ≈ (1 / n) Σ (log q(y_g) − log p(y_g))

over pieces of text g between byte boundaries that both sides have, with n tokens in all: each
model's own tokens of the same bytes, so it needs no common vocabulary. q is the student as it was
when it wrote. An estimate from what was drawn: of the divergence itself where the student draws
from its own distribution, at temperature 1 and alone. Takes a product of few tokens with the
teacher's head.
"""

from __future__ import annotations

import torch

from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives.base import label_logprobs
from axolotl_dskd.objectives.groups import STUDENT, TEACHER, Groups
from axolotl_dskd.types import Matches, Per, Term, View

TERMS: dict[str, Per] = {"reverse_kl": "value"}
#: One piece in so many is looked at, by where in its text it begins: so which they are does not
#: depend on batches, and it costs next to nothing.
ONE_IN = 16


@torch.no_grad()
def reverse_kl(student: View, teacher: View, matches: Matches, budget: Budget) -> Term:
    """Of some pieces of a batch: a value for each of their student tokens, in nats, that of a piece
    at its last one, 0 at the others.

    Args:
        student: of a batch with written answers.
        teacher: with states and head, or with log-probabilities of labels.
        matches: of both.
        budget: of a chunk of the teacher's logits.
    """
    assert student.written is not None
    groups = Groups.of(matches)
    first = groups.first[:, STUDENT]
    written = student.written.samples[student.tokens.sample_ids[first]]
    chosen = (written & (matches.spans[first, 0] % ONE_IN == 0)).nonzero().flatten()
    few = Groups(groups.first[chosen], groups.last[chosen])
    rows, theirs = few.rows(STUDENT, len(student)), few.rows(TEACHER, len(teacher))
    log_q = student.written.logprobs.double()
    log_p = log_q.new_zeros(len(teacher))
    log_p = log_p.index_copy(0, theirs, label_logprobs(teacher, theirs, budget).double())
    gap = few.sums(STUDENT, log_q) - few.sums(TEACHER, log_p)
    values = torch.zeros_like(log_q).index_copy(0, few.last[:, STUDENT], gap)
    return Term(values[rows], student.tokens.sample_ids[rows])
