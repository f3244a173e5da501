"""Log-probabilities of given tokens, for losses over whole sequences or chunks of text.

Such a loss knows each token's gradient only once it has seen them all. So the forward keeps one
number a token, and the backward computes each chunk's logits again: three products, four where the
head trains, and never [N, V].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses.chunks import Budget, Stream, TermSpec, Values, over
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
    head = stream.head.tensors() if stream.trains_head else (None,) * 4
    return _LogProbs.apply(stream, labels, budget, temperature, stream.hidden, *head)


def _pass(
    stream: Stream, labels: Tensor, budget: Budget, temperature: float, slope: Tensor | None
) -> Any:
    """One pass over the chunks: the values, and gradients of Σ slope · value where it is given."""

    def function(rows: Any, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
        index = rows["student"]
        at = labels[index].unsqueeze(-1)
        log_q = (logits["student"] / temperature).log_softmax(-1)
        value = log_q.gather(-1, at).squeeze(-1)
        if slope is None:
            return {"logprob": value}, {}
        share = (slope[index] / temperature).unsqueeze(-1)
        gradient = log_q.exp_().mul_(-share).scatter_add_(-1, at, share)
        return {"logprob": value * slope[index]}, {"student": gradient}

    parts = even_parts({"student": len(stream)}, budget.size(stream))
    return over({"student": stream}, parts, by_rows(function), {"logprob": TermSpec("student", 1)})


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
        with torch.enable_grad():
            loss = _pass(stream, labels, budget, temperature, slope).loss
            found = torch.autograd.grad(loss, [leaves[k] for k in wanted])
        gradients: list[Tensor | None] = [None] * len(leaves)
        for k, gradient in zip(wanted, found, strict=True):
            gradients[k] = gradient
        return None, None, None, None, *gradients
