"""Divergences between two distributions over one vocabulary, with their gradients in closed form.

Each function takes p, the teacher's side, for which no gradient is wanted, and q, the student's
side, both `Distribution`s over [..., V] in float32 or wider, and returns `(value, gradient)`: the
value per token `[...]`, and the gradient `[..., V]` of that value with respect to the *logits* x
of q, q = softmax(x). With G = d value / d log q, the gradient is `G - q * sum(G)`, which is how a
log-softmax propagates. Logarithms of p and q come from the logits, never from a probability that
may have underflowed; one that did only ever multiplies a finite number.

This module knows nothing of temperature, masks, reduction or chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """A distribution over the vocabulary, with its logarithm taken from the logits.

    Both forms are made when they are first asked for, since not every divergence needs them, and
    apart, because a softmax costs less than the exponential of a log-softmax.

    Attributes:
        logits: [..., V], float32 or wider, at temperature 1; they must not change.
    """

    logits: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> Distribution:
        """softmax(logits / temperature)."""
        return cls(logits / temperature if temperature != 1.0 else logits)

    @cached_property
    def log(self) -> Tensor:
        """[..., V] natural logarithms."""
        return torch.log_softmax(self.logits, -1)

    @cached_property
    def prob(self) -> Tensor:
        """[..., V] probabilities."""
        return torch.softmax(self.logits, -1)


Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Divergence:
    """A divergence by its name, with its parameter (λ, α or β) where it has one."""

    name: str
    parameter: float | None
    function: Function

    def __call__(self, p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
        """Value [...] and gradient [..., V], see the module."""
        return self.function(p, q, *([] if self.parameter is None else [self.parameter]))


def _through_softmax(grad_log_q: Tensor, q: Tensor) -> Tensor:
    return grad_log_q.addcmul_(q, grad_log_q.sum(-1, keepdim=True), value=-1)


def _mixture(weight: float, p: Tensor, q: Tensor) -> Tensor:
    """weight p + (1-weight) q, kept above 0: where it underflows, so do p and q."""
    return torch.lerp(q, p, weight).clamp_min_(torch.finfo(p.dtype).tiny)


def forward_kl(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) = Σ p (log p − log q); gradient q − p. Hinton et al. 2015, arXiv 1503.02531."""
    return (p.log - q.log).mul_(p.prob).sum(-1), q.prob - p.prob


def reverse_kl(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """KL(q ‖ p) = Σ q (log q − log p). Gu et al. 2023, MiniLLM, arXiv 2306.08543."""
    grad_log_q = (q.log - p.log).mul_(q.prob)
    return grad_log_q.sum(-1), _through_softmax(grad_log_q, q.prob)


def js_divergence(p: Distribution, q: Distribution, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """β KL(p ‖ m) + (1−β) KL(q ‖ m), m = β p + (1−β) q.

    The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649); 0.5
    is the symmetric one.
    """
    log_m = _mixture(beta, p.prob, q.prob).log_()
    forward = (p.log - log_m).mul_(p.prob).sum(-1)
    grad_log_q = torch.sub(q.log, log_m, out=log_m).mul_(q.prob).mul_(1 - beta)
    value = beta * forward + grad_log_q.sum(-1)
    return value, _through_softmax(grad_log_q, q.prob)


def skewed_forward_kl(p: Distribution, q: Distribution, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(p ‖ λ p + (1−λ) q). Ko et al. 2024, DistiLLM, arXiv 2402.03898."""
    m = _mixture(lam, p.prob, q.prob)
    share = q.prob / m
    value = (p.log - m.log_()).mul_(p.prob).sum(-1)
    return value, _through_softmax(share.mul_(p.prob).mul_(lam - 1), q.prob)


def skewed_reverse_kl(p: Distribution, q: Distribution, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(q ‖ (1−λ) p + λ q). Ko et al. 2024, DistiLLM, arXiv 2402.03898."""
    m = _mixture(1 - lam, p.prob, q.prob)
    share = q.prob / m
    summands = torch.sub(q.log, m.log_(), out=m).mul_(q.prob)
    value = summands.sum(-1)
    # d/d log q of q (log q − log m); the constant 1 of the product rule drops out in the softmax.
    return value, _through_softmax(summands.addcmul_(share, q.prob, value=-lam), q.prob)


def tail_border(p: Distribution, alpha: float) -> Tensor:
    """[..., 1] log-probability below which lies the tail of p, whose mass is at most α.

    By bisection, which takes a tenth of the time of sorting the vocabulary. The border is found to
    the last bit but a few; tokens whose log-probabilities differ by less fall on the same side.
    """
    narrow = p.log.dtype == torch.float32
    above = p.log.amax(-1, keepdim=True) + 1e-3
    # V tokens below α / V can't add up to more than α.
    below = torch.full_like(above, math.log(alpha / p.log.shape[-1])).minimum(above)
    below_it = torch.empty_like(p.log)
    for _ in range(30 if narrow else 60):
        middle = (below + above) / 2
        torch.lt(p.log, middle, out=below_it)
        in_tail = below_it.mul_(p.prob).sum(-1, keepdim=True) <= alpha
        below = torch.where(in_tail, middle, below)
        above = torch.where(in_tail, above, middle)
    return below


def adaptive_kl(p: Distribution, q: Distribution, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """w KL(p ‖ q) + (1−w) KL(q ‖ p), w = Σ_head |p−q| / Σ |p−q| per token, held constant.

    The tail of the vocabulary is the tokens of lowest p whose probabilities add up to at most
    α, the head is the rest. Wu et al. 2024, AKL, arXiv 2404.02657, as in DSKD's code. Where
    p = q both divergences vanish and w is set to 1/2.
    """
    forward, grad = forward_kl(p, q)  # the gradient is q − p
    gap = grad.abs()
    total = gap.sum(-1, keepdim=True)
    in_head = torch.ge(p.log, tail_border(p, alpha), out=torch.empty_like(gap))
    head = in_head.mul_(gap).sum(-1, keepdim=True)
    weight = torch.where(total > 0, head / total.clamp_min(1e-30), 0.5)
    reverse, grad_reverse = reverse_kl(p, q)
    value = weight.squeeze(-1) * forward + (1 - weight.squeeze(-1)) * reverse
    return value, grad.mul_(weight).add_(grad_reverse.mul_(1 - weight))


def tvd(p: Distribution, q: Distribution) -> tuple[Tensor, Tensor]:
    """Total variation ½ Σ |p − q|. Wen et al. 2023, f-distill, arXiv 2307.15190."""
    gap = q.prob - p.prob
    value = 0.5 * gap.abs().sum(-1)
    return value, _through_softmax(gap.sign_().mul_(q.prob).mul_(0.5), q.prob)


#: By name: the function, and which parameter it takes.
_FUNCTIONS: dict[str, tuple[Function, str | None]] = {
    "forward_kl": (forward_kl, None),
    "reverse_kl": (reverse_kl, None),
    "js_divergence": (js_divergence, "js_beta"),
    "skewed_forward_kl": (skewed_forward_kl, "skew_lambda"),
    "skewed_reverse_kl": (skewed_reverse_kl, "skew_lambda"),
    "adaptive_kl": (adaptive_kl, "adaptive_alpha"),
    "tvd": (tvd, None),
}
DIVERGENCES = tuple(_FUNCTIONS)


def make_divergence(
    name: str, *, skew_lambda: float = 0.1, adaptive_alpha: float = 0.5, js_beta: float = 0.5
) -> Divergence:
    """The divergence of that name with its parameter bound.

    Raises:
        ValueError: unknown name.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"unknown divergence {name!r}; known: {', '.join(DIVERGENCES)}")
    function, parameter = _FUNCTIONS[name]
    values = {"skew_lambda": skew_lambda, "adaptive_alpha": adaptive_alpha, "js_beta": js_beta}
    return Divergence(name, None if parameter is None else values[parameter], function)
