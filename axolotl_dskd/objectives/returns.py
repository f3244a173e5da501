"""What is still to come in an answer: sums ahead, and statistics that advantages are whitened by.

For objectives that learn from rewards. Knows compact tokens of a batch; no logits, no rewards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from axolotl_dskd.ranks import sum_over_ranks

#: What the statistics of a step count one step later.
_DECAY = 0.9
#: A smaller variance is that of one value, or of equal ones.
_SPREAD = 1e-6


def sums_ahead(values: Tensor, factor: float, sample_ids: Tensor) -> Tensor:
    """[n] Σ_{j ≥ i} factor^(j − i) values_j over the tokens of i's sample.

    By doubling: log n steps instead of n.

    Args:
        values: [n] of compact tokens.
        sample_ids: [n] ascending.
    """
    total, step = values, 1
    link = factor * _has_next(sample_ids).to(values)  # what is taken over from `step` rows ahead
    while step < len(values):
        total = total + link * _ahead(total, step)
        link, step = link * _ahead(link, step), 2 * step
    return total


def of_next(values: Tensor, sample_ids: Tensor) -> Tensor:
    """[n] the value of the next token of the same sample; 0 at its last one."""
    return _ahead(values, 1) * _has_next(sample_ids).to(values)


def _ahead(values: Tensor, step: int) -> Tensor:
    return torch.nn.functional.pad(values[step:], (0, min(step, len(values))))


def _has_next(sample_ids: Tensor) -> Tensor:
    return _ahead(sample_ids + 1, 1) == sample_ids + 1


class Moments(nn.Module):
    """Running mean and variance of a value per token, over the steps and ranks before this one.

    Statistics of a micro-batch would make a token's loss depend on what else is in it, and so on
    packing, accumulation and ranks. Those of the steps before are the same numbers in all micro-
    batches of a step, and a baseline that does not depend on what is drawn in it keeps a policy's
    gradient unbiased. A step counts `_DECAY` as much one step later. Kept in checkpoints.
    """

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        # How many values, their sum, and that of their squares.
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))
        self._seen = torch.zeros(3, dtype=torch.float64)

    def see(self, values: Tensor) -> None:
        """Count some values [k] of this step in."""
        x = values.detach().double()
        found = torch.stack([torch.ones_like(x), x, x.square()]).sum(1)
        self._seen = self._seen.to(found.device) + found

    def end_step(self) -> None:
        """What this step has seen counts from the next one on. A collective."""
        seen = sum_over_ranks(self._seen.to(self.sums.device))
        self.sums.mul_(_DECAY).add_(seen)
        self._seen = torch.zeros_like(self.sums)

    def forget_step(self) -> None:
        """Drop what this step has seen."""
        self._seen = torch.zeros_like(self._seen)

    def whiten(self, values: Tensor) -> Tensor:
        """(values − mean) / standard deviation; 0 as long as no spread is known."""
        count, total, squares = self.sums.unbind()
        mean = total / count.clamp_min(1e-300)
        variance = (squares / count.clamp_min(1e-300) - mean.square()).clamp_min(0)
        known = variance > _SPREAD
        return known * (values - mean) / (torch.where(known, variance, 1.0) + 1e-8).sqrt()
