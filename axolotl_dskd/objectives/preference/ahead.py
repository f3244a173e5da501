"""What it costs that the preferred one of two is not far enough ahead of the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.config import PreferenceConfig


def cost(ahead: Tensor, config: PreferenceConfig) -> Tensor:
    """[k] from how far the preferred one is ahead, [k]; differentiable.

    sigmoid is DPO's (arXiv 2305.18290), with SimPO's target margin (2405.14734) and the smoothing
    of cDPO; ipo is that of arXiv 2310.12036.
    """
    beta = config.strength
    if config.loss == "ipo":
        return (ahead - 1 / (2 * beta)).square()
    x, smoothing = beta * ahead - config.margin, config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def cost_and_slope(ahead: Tensor, config: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """[k] each: the cost, and its derivative."""
    with torch.enable_grad():
        leaf = ahead.detach().requires_grad_()
        value = cost(leaf, config)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope
