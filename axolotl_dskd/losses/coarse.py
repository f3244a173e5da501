"""Divergences where only the likeliest tokens of p are known: over these and all others as one.

With S those tokens of a position,

    p' = (p_i for i in S, 1 − Σ_S p),   q' = (q_i for i in S, 1 − Σ_S q)

are distributions over |S| + 1 outcomes. To treat outcomes as one makes no two distributions easier
to tell apart (the data-processing inequality), so D(p' ‖ q') ≤ D(p ‖ q) for every f-divergence: all
of `divergences` but adaptive_kl, whose weights depend on p and q. They are equal where q divides
the rest as p does. How much is known is Σ_S p, the kept mass.

Knows logits and log-probabilities at temperature 1; nothing of where they come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_dskd.losses.divergences import Distribution, Divergence

#: The rest of p is known to the rounding of float32 and no better.
_LEAST = 1e-7
#: Log-probability, on both sides, of a place of S that holds no token: e^-80 changes no sum.
_NOBODY = -80.0


def coarse_divergence(
    divergence: Divergence, ids: Tensor, top: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """D(p' ‖ q') per token [n], and its gradient [n, V] with respect to the logits of q.

    Args:
        divergence: D.
        ids: [n, k] int64, the tokens S, each once and fewer than V; -1 where there is none.
        top: [n, k] their log p; what stands at -1 is not read.
        logits: [n, V] of q, float32 or wider.
    """
    known, at = ids >= 0, ids.clamp_min(0)
    log_p = torch.where(known, top.to(logits.dtype), _NOBODY)
    others = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(_LEAST).log()
    log_p = torch.cat([log_p, others], -1)

    whole = logits.logsumexp(-1, keepdim=True)
    # A place without token points to token 0, which stays as it is.
    taken = torch.where(known, -torch.inf, torch.inf).to(logits.dtype)
    left = logits.scatter_reduce(-1, at, taken, "amin")
    rest = left.logsumexp(-1, keepdim=True)
    named = torch.where(known, logits.gather(-1, at), whole + _NOBODY)
    # softmax of these is q': they are logits of it, through which the gradient goes on to q's.
    q = Distribution.of(torch.cat([named, rest], -1))
    value, slope = divergence(Distribution(log_p), q)
    gradient = left.sub_(rest).exp_().mul_(slope[:, -1:])
    return value, gradient.scatter_add_(-1, at, torch.where(known, slope[:, :-1], 0.0))
