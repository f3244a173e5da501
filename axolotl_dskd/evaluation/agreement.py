"""How far the student is from the teacher on held-out rows, whatever their tokenizers.

Where a student's and a teacher's token begin at the same byte both models have read the same text,
so what they expect next can be compared: over the tokens that both vocabularies have, and all
others as one outcome. Over one vocabulary that is the whole divergence. Across tokenizers a token's
probability also says how text is cut, so the number compares students of one pair, and no pairs;
and ends of turns that are not each other's (`Facts.turn_ends`) are left out, at which both models
would say the same thing by names that do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.losses import Budget, Stream
from axolotl_dskd.losses.agreement import agreement
from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Per, Term, View

#: What is left to all other tokens is known to the rounding of float32 and no better.
_LEAST = 1e-7


class TeacherAgreement:
    """Compares the two models where they have read the same text.

    Args:
        shared: ids that both vocabularies have, student's first, each at most once.
        budget: how many tokens' logits may be held at once.
        ends: end tokens that are shared as each other's under unlike names, student's first.
    """

    terms: ClassVar[dict[str, Per]] = {"teacher_kl": "value", "teacher_agreement": "value"}

    def __init__(
        self,
        shared: tuple[Sequence[int], Sequence[int]],
        budget: Budget,
        ends: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._shared = tuple(torch.tensor(ids, dtype=torch.long) for ids in shared)
        self._budget = budget
        self._ends = ends

    @torch.no_grad()
    def __call__(self, student: View, teacher: View, starts: Tensor) -> dict[str, Term]:
        """Two terms with a value for each pair that is compared: `teacher_kl`, KL(teacher ‖
        student) in nats, and `teacher_agreement`, whether their most likely tokens are the same.

        Args:
            student, teacher: with states and head.
            starts: [Q, 2] pairs of tokens that begin at the same byte.
        """
        assert student.hidden is not None and student.head is not None
        assert teacher.hidden is not None and teacher.head is not None
        sides = (student.hidden, student.head.frozen()), (teacher.hidden, teacher.head)
        for pair in self._ends:
            ours, theirs = (
                view.tokens.labels[starts[:, k]] == pair[k]
                for k, view in enumerate((student, teacher))
            )
            starts = starts[ours == theirs]
        rows = self._budget.size(*(Stream(*side) for side in sides), copies=2)
        kl, same = [starts.new_zeros(0, dtype=torch.float32)], [starts.new_zeros(0).bool()]
        for pairs in starts.split(rows) if len(starts) else ():
            log_q, log_p = (
                self._log_probabilities(hidden[pairs[:, k]], head, k)
                for k, (hidden, head) in enumerate(sides)
            )
            found = agreement(log_p, log_q)
            kl.append(found.kl.to(torch.float32))
            # All others are one outcome, and two of them are not the same token.
            same.append(found.same_choice & (log_p.argmax(-1) < log_p.shape[1] - 1))
        ids = student.tokens.sample_ids[starts[:, 0]]
        return {
            "teacher_kl": Term(torch.cat(kl), ids),
            "teacher_agreement": Term(torch.cat(same).float(), ids),
        }

    def _log_probabilities(self, hidden: Tensor, head: OutputHead, side: int) -> Tensor:
        """[q, K + 1] log-probabilities of the shared tokens and of all others."""
        self._shared = tuple(ids.to(hidden.device) for ids in self._shared)
        logits = head.logits(hidden.to(head.weight.dtype))
        log_p = logits.to(wide(logits.dtype)).log_softmax(-1)
        shared = log_p[:, self._shared[side]]
        others = (1 - shared.exp().sum(-1, keepdim=True)).clamp_min(_LEAST).log()
        return torch.cat([shared, others], -1)
