"""Which blocks a token's margin comes from, by numbers that a cross-entropy's backward has."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_dskd.losses import Budget, Stream, TermSpec, by_rows, even_parts, over, with_ce
from axolotl_dskd.types import View


def block_margins(student: View, blocks: int, budget: Budget) -> Tensor:
    """Each block's share of the margin z_y − E_q z of the label's logit over the mean logit:

        c_ij = −⟨h_ij, ∂CE_i/∂h_ij⟩,   Σ_j c_ij = z_iy − Σ_v q_iv z_iv

    (without a bias and a softcap, of which the sum has what the states say). One product with the
    head forward, one backward.

    Args:
        student: with states and head.
        blocks: n, of equal size.
        budget: how many tokens' logits may be held at once.

    Returns:
        [N, n] float32 or wider.
    """
    assert student.hidden is not None and student.head is not None
    with torch.enable_grad():
        hidden = student.hidden.detach().requires_grad_()
        stream = Stream(hidden, student.head.frozen())
        found = over(
            {"student": stream},
            even_parts({"student": len(hidden)}, budget.size(stream)),
            by_rows(with_ce(None, student.tokens.labels, 1.0)),
            {"ce": TermSpec("student", 1.0)},
        )
        (gradient,) = torch.autograd.grad(found.loss, hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shares = -(hidden.detach().to(wide) * gradient.to(wide))
    return shares.unflatten(1, (blocks, -1)).sum(-1)
