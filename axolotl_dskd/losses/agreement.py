"""How far two models' distributions over one vocabulary are apart, as numbers for people.

For reports, so without gradients; the losses are `divergences`. Knows tensors; nothing of heads,
tokens, means or chunks: values are per token, so a caller may give as many tokens at once as it
has memory for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Agreement(NamedTuple):
    """Two distributions compared, token by token.

    Attributes:
        kl: [n] KL(p ‖ q) in nats, in the dtype of the log-probabilities.
        same_choice: [n] bool, whether p and q have the same most likely token.
    """

    kl: Tensor
    same_choice: Tensor


@torch.no_grad()
def agreement(log_p: Tensor, log_q: Tensor) -> Agreement:
    """Compare q with p, for each token:

        kl          = (p * (log_p - log_q)).sum(-1)      (Kullback and Leibler 1951)
        same_choice = log_p.argmax(-1) == log_q.argmax(-1)

    Args:
        log_p, log_q: [n, V] natural logarithms of probabilities, from `log_softmax` in float32 or
            wider: in 16 bits the logarithms alone err by more than what is looked for. A
            probability of exactly 0 gives NaN, which stays.
    """
    assert log_p.shape == log_q.shape, (log_p.shape, log_q.shape)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return Agreement(kl, log_p.argmax(-1) == log_q.argmax(-1))
