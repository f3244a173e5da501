"""Universal logit distillation: probabilities compared by rank, whatever the tokens are called.

    Σ_(i,j) Σ_r |q_i,(r) − p_j,(r)|    both sorted descending, the smaller vocabulary padded by 0

over pairs of student and teacher tokens (Boizard et al. 2024, arXiv 2402.12030). Published code
pairs the k-th supervised tokens of both sides, which after the first unlike split are about
different text; default here are tokens that begin at the same byte. `top_k` compares the largest
probabilities only: what that leaves out is at most the two tails' mass, which is reported.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import ULDConfig
from axolotl_dskd.losses import Part, TermSpec, Values, by_rows, over, with_ce
from axolotl_dskd.objectives.base import (
    Objective,
    ordinal_pairs,
    pair_chunks,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.types import LossOutput, Matches, Per, Term, View


class ULD(Objective[ULDConfig], config=ULDConfig):
    """See the module."""

    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "uld": "student_token",
        "uld_left_out": "student_token",
        "aligned": "student_token",
    }

    def describe(self) -> str:
        """Which tokens are compared."""
        which = {
            "starts": "tokens that begin at the same byte",
            "ordinal": "the k-th supervised tokens of both sides",
        }
        return f"uld: probabilities by rank, {which[self.config.pairs]}"

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch."""
        tokens, weight = student.tokens, self.setting.kd_ratio
        pairs = matches.starts
        if self.config.pairs == "ordinal":
            pairs = ordinal_pairs(tokens, teacher.tokens)
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}
        sums = over(
            streams,
            pair_chunks(pairs, streams, self.setting.budget),
            by_rows(with_ce(self._by_rank, student.references, 1.0 - weight)),
            {
                "ce": TermSpec("student", 1.0 - weight),
                "uld": TermSpec("student", weight),
                "uld_left_out": TermSpec("student"),
            },
        )
        terms = {name: Term(values, tokens.sample_ids) for name, values in sums.values.items()}
        terms["aligned"] = participation(pairs[:, 0], tokens)
        return LossOutput(sums.loss, len(tokens), terms)

    def _by_rank(self, _: Part, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
        T = self.config.temperature
        q, p = ((logits[side] / T).softmax(-1) for side in ("student", "teacher"))
        wide = max(q.shape[1], p.shape[1])
        kept = wide if self.config.top_k == "all" else min(wide, self.config.top_k)
        ranked_q, places = q.topk(min(kept, q.shape[1]), dim=-1)
        ranked_p = p.topk(min(kept, p.shape[1]), dim=-1).values
        gap = torch.nn.functional.pad(ranked_q, (0, kept - ranked_q.shape[1]))
        gap[:, : ranked_p.shape[1]] -= ranked_p
        left_out = (2.0 - ranked_q.sum(-1) - ranked_p.sum(-1)).clamp_min(0.0)
        sign = gap.sign()[:, : ranked_q.shape[1]]
        # d/dz of Σ s_v q_v with s constant: q (s − Σ q s) / T.
        slope = torch.zeros_like(q).scatter_(-1, places, sign)
        slope -= (ranked_q * sign).sum(-1, keepdim=True)
        gradient = slope.mul_(q).mul_(self.setting.kd_ratio / T)
        values = {"uld": gap.abs().sum(-1), "uld_left_out": left_out}
        return values, {"student": gradient}
