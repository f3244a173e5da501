"""What was written, before the student says what it thinks of it now: rewards and what follows.

Knows log-probabilities of written tokens and groups of them; no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from axolotl_dskd.config import PolicyConfig
from axolotl_dskd.losses import Budget
from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.objectives.base import equal_ids, label_logprobs
from axolotl_dskd.objectives.groups import STUDENT, TEACHER, Groups
from axolotl_dskd.objectives.returns import of_next, sums_ahead
from axolotl_dskd.types import IGNORE_INDEX, Matches, View


@dataclass(frozen=True)
class Rollout:
    """What is known of a batch before the student says what it thinks of it now.

    Attributes:
        data: [N] bool, tokens of the data set's rows, which have cross-entropy.
        acts: [N] bool, written tokens that a reward is known behind; the others have no loss.
        old: [N] log-probability at which a token was written.
        weight: [N] w, 0 where nothing acts.
        advantage: [N].
        gap: [N] log q_old − log p of a chunk at its last token, 0 elsewhere.
        pairs: [P, 2] acting tokens and the teacher's with the single-step term.
    """

    data: Tensor
    acts: Tensor
    old: Tensor
    weight: Tensor
    advantage: Tensor
    gap: Tensor
    pairs: Tensor

    @classmethod
    def of(
        cls,
        student: View,
        teacher: View,
        matches: Matches,
        *,
        config: PolicyConfig,
        single_step: bool,
        budget: Budget,
        whiten: Callable[[Tensor, Tensor], Tensor],
    ) -> Rollout:
        """Of a batch.

        Args:
            single_step: tokens that both sides have by the same id get that term.
            budget: of the teacher's chunks.
            whiten: from advantages [N] and which of them act, to advantages.
        """
        assert student.hidden is not None
        samples, written = student.tokens.sample_ids, student.references == IGNORE_INDEX
        old = torch.zeros_like(samples, dtype=torch.float64)
        weight = torch.ones_like(old)
        if student.written is not None:
            old = student.written.logprobs.double()
            if student.written.weights is not None:
                weight = student.written.weights.double()
        groups = Groups.of(matches)
        acts = written & (groups.owner(STUDENT, len(samples)) < len(groups))
        last = groups.last[:, STUDENT]
        log_p = teachers_logprobs(teacher, student, budget)
        ahead = groups.sums(STUDENT, old) - groups.sums(TEACHER, log_p)
        gap = torch.zeros_like(old).index_copy(0, last, ahead * written[last])
        bound = config.reward_clip
        reward = (-gap / config.reward_scale).clamp(-bound, bound)

        returns = sums_ahead(reward, config.gamma, samples)
        lengths = sums_ahead(acts.double(), 1.0, samples)
        pairs = matches.exact[:0]
        if single_step:
            pairs = equal_ids(matches.exact, student.tokens, teacher.tokens)
            pairs = pairs[acts[pairs[:, 0]]]
            exactly = torch.zeros_like(acts)
            exactly[pairs[:, 0]] = True
            returns = torch.where(exactly, of_next(returns, samples), returns)
            lengths = torch.where(exactly, of_next(lengths, samples), lengths)
        advantage = returns / lengths.clamp_min(1) if config.length_norm else returns
        advantage = whiten(advantage, acts)
        numbers = old * acts, weight * acts, advantage, gap
        old, weight, advantage, gap = (x.to(wide(student.hidden.dtype)) for x in numbers)
        return cls(~written, acts, old, weight, advantage, gap, pairs)


def teachers_logprobs(teacher: View, student: View, budget: Budget) -> Tensor:
    """[M] float64 of what was written; 0 on the data set's rows, which need none."""
    tokens = teacher.tokens
    log_p = torch.zeros_like(tokens.sample_ids, dtype=torch.float64)
    if student.written is None:
        return log_p
    rows = student.written.samples[tokens.sample_ids].nonzero().flatten()
    found = label_logprobs(teacher, rows, budget)
    return log_p.index_copy(0, rows, found.double())
