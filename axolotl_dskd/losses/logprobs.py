"""Log-probabilities of given tokens, for losses over whole sequences or chunks of text.

Such a loss knows each token's gradient only once it has seen them all. So a first pass keeps one
number a token, and a second one computes each chunk's logits again: three products, four where the
head trains, and never [N, V]. `token_logprobs` makes the second pass in its backward;
`over_logprobs` makes both in the forward, for a loss that is a function of these numbers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses.chunks import Budget, Stream, Sums, TermSpec, Values, over
from axolotl_dskd.losses.functions import by_rows
from axolotl_dskd.losses.parts import even_parts


def token_logprobs(
    stream: Stream, labels: Tensor, budget: Budget, temperature: float = 1.0
) -> Tensor:
    """log softmax(logits / temperature)[labels], [n] float32 or wider.

    Equals `(head.logits(hidden) / temperature).log_softmax(-1).gather(-1, labels)`, differentiable
    in the stream's states and, where it says so, its head.

    Args:
        stream: [n, d].
        labels: [n] int64, all of them ids of the head.
        budget: of a chunk.
        temperature: of the distribution.
    """
    head = stream.trained_tensors()
    return _LogProbs.apply(stream, labels, budget, temperature, stream.hidden, *head)


def set_logprobs(
    stream: Stream, labels: Tensor, budget: Budget, members: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[labels] and log Σ_{v in members} softmax(logits)_v, without gradient.

    Args:
        stream, labels, budget: as for `token_logprobs`.
        members: [V] bool, not all of them False; None: the second is 0.

    Returns:
        [n] each, float32 or wider, never above 0.
    """
    with torch.no_grad():
        values = _pass(stream, labels, budget, 1.0, None, members).values
    return values["logprob"], values["within"]


def over_logprobs(
    stream: Stream,
    labels: Tensor,
    budget: Budget,
    members: Tensor | None,
    function: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A scalar that is a plain function of what `set_logprobs` returns, differentiable.

    Equals `function(log_q.gather(labels), log_q[:, members].logsumexp(-1))` with log_q the
    log_softmax of all logits. Both passes are made at once; `backward()` needs neither the head nor
    another product. Without gradients one pass is enough.

    Args:
        stream, labels, budget, members: as for `set_logprobs`.
        function: of two tensors [n].
    """
    leaves = [x.requires_grad_() for x in set_logprobs(stream, labels, budget, members)]
    with torch.enable_grad():
        loss = function(*leaves)
    wanted = (stream.hidden, *stream.trained_tensors())
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in wanted):
        return loss.detach()
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    linear = _pass(stream, labels, budget, 1.0, slopes[0], members, slopes[1]).loss
    # Its gradient is the loss's; its value, which may be far larger, is not.
    return loss.detach() + (linear - linear.detach())


def _pass(
    stream: Stream,
    labels: Tensor,
    budget: Budget,
    temperature: float,
    slope: Tensor | None,
    members: Tensor | None = None,
    slope_within: Tensor | None = None,
) -> Sums:
    """One pass over the chunks: the values, and gradients of Σ slope · value where it is given."""

    def function(rows: Any, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
        index = rows["student"]
        at = labels[index].unsqueeze(-1)
        log_q = (logits["student"] / temperature).log_softmax(-1)
        value = log_q.gather(-1, at).squeeze(-1)
        within = torch.zeros_like(value)
        if members is not None:
            # Rounding of 100,000 terms may leave more than all there is, whose log(1 - p) is none.
            within = log_q.masked_fill(~members, -torch.inf).logsumexp(-1).clamp_max_(0.0)
        if slope is None:
            return {"logprob": value, "within": within}, {}
        values = {"logprob": value * slope[index]}
        share = (slope[index] / temperature).unsqueeze(-1)
        if members is not None and slope_within is not None:
            values["within"] = within * slope_within[index]
            more = (slope_within[index] / temperature).unsqueeze(-1)
            # d/dz of log Σ_members q: q / Σ_members q in the members, less q everywhere.
            # Others than members are masked before exp, where they may be beyond all bounds.
            inside = (log_q - within.unsqueeze(-1)).masked_fill_(~members, -torch.inf)
            inside = inside.exp_().mul_(more)
            gradient = log_q.exp_().mul_(-(share + more)).add_(inside)
        else:
            gradient = log_q.exp_().mul_(-share)
        return values, {"student": gradient.scatter_add_(-1, at, share)}

    parts = even_parts({"student": len(stream)}, budget.size(stream))
    terms = {"logprob": TermSpec("student", 1), "within": TermSpec("student", 1)}
    return over({"student": stream}, parts, by_rows(function), terms)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Stream,
        labels: Tensor,
        budget: Budget,
        temperature: float,
        hidden: Tensor,
        *head: Tensor | None,
    ) -> Tensor:
        ctx.call = stream, labels, budget, temperature
        ctx.save_for_backward(hidden, *head)
        return _pass(stream, labels, budget, temperature, None).values["logprob"]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        stream, labels, budget, temperature = ctx.call
        hidden, *head = ctx.saved_tensors
        leaves = [hidden, *head]
        wanted = [k for k, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        # Slopes may carry a loss scale, and float16's gradients are enlarged once more within.
        largest = slope.abs().amax().clamp_min(torch.finfo(slope.dtype).tiny) if len(slope) else 1.0
        with torch.enable_grad():
            loss = _pass(stream, labels, budget, temperature, slope / largest).loss
            back = torch.autograd.grad(loss, [leaves[k] for k in wanted])
        gradients: list[Tensor | None] = [None] * len(leaves)
        for k, gradient in zip(wanted, back, strict=True):
            gradients[k] = (gradient.to(slope.dtype) * largest).to(gradient.dtype)
        return None, None, None, None, *gradients
