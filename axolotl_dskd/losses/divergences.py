"""Divergences between two distributions over one vocabulary, with their gradients in closed form.

Each function takes log-probabilities in float32 or wider,

    log_p  [..., V]  the teacher's side, no gradient wanted
    log_q  [..., V]  the student's side

and returns `(value, gradient)`: the value per token `[...]`, and the gradient `[..., V]` of that
value with respect to the *logits* x of q, q = softmax(x). With G = d value / d log q, the gradient
is `G - q * sum(G)`, which is how a log-softmax propagates. Everything stays in log space: a
probability that underflows to 0 only ever multiplies a finite number.

This module knows nothing of temperature, masks, reduction or chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _through_softmax(grad_log_q: Tensor, q: Tensor) -> Tensor:
    return grad_log_q - q * grad_log_q.sum(-1, keepdim=True)


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) = Σ p (log p − log q); gradient q − p. Hinton et al. 2015, arXiv 1503.02531."""
    p = log_p.exp()
    value = (p * (log_p - log_q)).sum(-1)
    return value, log_q.exp().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) = Σ q (log q − log p). Gu et al. 2023, MiniLLM, arXiv 2306.08543."""
    ratio = log_q - log_p
    q = log_q.exp()
    value = (q * ratio).sum(-1)
    return value, ratio.sub_(value.unsqueeze(-1)).mul_(q)


def js_divergence(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """β KL(p ‖ m) + (1−β) KL(q ‖ m), m = β p + (1−β) q.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649); 0.5
    is the symmetric one.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p, q = log_p.exp(), log_q.exp()
    grad_log_q = (1 - beta) * q * (log_q - log_m)
    value = beta * (p * (log_p - log_m)).sum(-1) + grad_log_q.sum(-1)
    return value, _through_softmax(grad_log_q, q)


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(p ‖ λ p + (1−λ) q). Ko et al. 2024, DistiLLM, arXiv 2402.03898."""
    log_m = torch.logaddexp(log_p + math.log(lam), log_q + math.log1p(-lam))
    p, q = log_p.exp(), log_q.exp()
    value = (p * (log_p - log_m)).sum(-1)
    return value, _through_softmax(-(1 - lam) * p * (log_q - log_m).exp(), q)


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(q ‖ (1−λ) p + λ q). Ko et al. 2024, DistiLLM, arXiv 2402.03898."""
    log_m = torch.logaddexp(log_p + math.log1p(-lam), log_q + math.log(lam))
    q = log_q.exp()
    ratio = log_q - log_m
    value = (q * ratio).sum(-1)
    # d/d log q of q (log q − log m); the constant 1 of the product rule drops out in the softmax.
    return value, _through_softmax(q * (ratio - lam * ratio.exp()), q)


def adaptive_kl(log_p: Tensor, log_q: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """w KL(p ‖ q) + (1−w) KL(q ‖ p), w = Σ_head |p−q| / Σ |p−q| per token, held constant.

    The tail of the vocabulary is the tokens of lowest p whose probabilities add up to at most
    α, the head is the rest. Wu et al. 2024, AKL, arXiv 2404.02657, as in DSKD's code. Where
    p = q both divergences vanish and w is set to 1/2.
    """
    p, q = log_p.exp(), log_q.exp()
    gap = (p - q).abs()
    ascending, order = p.sort(-1)
    tail = ascending.cumsum(-1) <= alpha
    total = gap.sum(-1, keepdim=True)
    tail_gap = gap.gather(-1, order).mul_(tail).sum(-1, keepdim=True)
    weight = torch.where(total > 0, (total - tail_gap) / total.clamp_min(1e-30), 0.5)
    del ascending, order, tail, gap
    forward, grad_forward = forward_kl(log_p, log_q)
    reverse, grad_reverse = reverse_kl(log_p, log_q)
    value = weight.squeeze(-1) * forward + (1 - weight.squeeze(-1)) * reverse
    return value, grad_forward.mul_(weight).add_(grad_reverse.mul_(1 - weight))


def tvd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation ½ Σ |p − q|. Wen et al. 2023, f-distill, arXiv 2307.15190."""
    q = log_q.exp()
    gap = q - log_p.exp()
    value = 0.5 * gap.abs().sum(-1)
    return value, _through_softmax(gap.sign_().mul_(q).mul_(0.5), q)


def make_divergence(
    name: str, *, skew_lambda: float = 0.1, adaptive_alpha: float = 0.5, js_beta: float = 0.5
) -> Divergence:
    """The divergence of that name with its parameter bound.

    Raises:
        ValueError: unknown name.
    """
    divergences: dict[str, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "js_divergence": partial(js_divergence, beta=js_beta),
        "skewed_forward_kl": partial(skewed_forward_kl, lam=skew_lambda),
        "skewed_reverse_kl": partial(skewed_reverse_kl, lam=skew_lambda),
        "adaptive_kl": partial(adaptive_kl, alpha=adaptive_alpha),
        "tvd": tvd,
    }
    if name not in divergences:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(divergences)}")
    return divergences[name]
