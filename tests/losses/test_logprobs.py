"""Log-probabilities of given tokens, chunk by chunk: values and gradients of the plain form."""

from __future__ import annotations

import pytest
import torch

from axolotl_dskd.losses import Budget, Stream, set_logprobs, token_logprobs
from axolotl_dskd.losses.logprobs import over_logprobs
from axolotl_dskd.output_head import OutputHead

n, d, V = 9, 5, 11


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, d, generator=generator).to(dtype) for k in (n, V))
    labels = torch.randint(V, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_values_and_gradients_equal_the_plain_form(chunk: int, softcap: float | None):
    hidden, weight, labels = case()
    slopes = torch.linspace(-2, 2, n, dtype=torch.float64)
    stream = Stream(hidden, OutputHead(weight, softcap=softcap), trains_head=True)
    ours = token_logprobs(stream, labels, Budget(chunk), temperature=2.0)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = (logits / 2.0).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(ours, plain)
    gradients = [
        torch.autograd.grad((values * slopes).exp().sum(), (hidden, weight))
        for values in (ours, plain)
    ]
    torch.testing.assert_close(*gradients)


def test_a_loss_scale_does_not_overflow_float16():
    hidden, weight, labels = case(torch.float16)
    stream = Stream(hidden, OutputHead(weight), trains_head=True)
    loss = token_logprobs(stream, labels, Budget(4)).sum() * 256.0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_an_improbable_set_of_tokens_gives_no_nan():
    """All probability lies outside of the set: e^88 is more than float32 holds."""
    hidden = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    stream = Stream(hidden, OutputHead(torch.eye(3)))
    members = torch.tensor([False, True, False])
    labels = torch.tensor([0])
    loss = over_logprobs(stream, labels, Budget(4), members, lambda of_label, _: of_label.sum())
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert torch.isfinite(gradient).all()


def test_no_set_of_tokens_is_likelier_than_all_of_them():
    """In float32 the probabilities of a large vocabulary add up to more than 1, of which
    chunk_likelihood would take the logarithm of what is left."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(k, 32, generator=generator) for k in (64, 50_000))
    stream = Stream(0.5 * hidden, OutputHead(weight))
    members = torch.ones(len(weight), dtype=torch.bool)
    members[:3] = False
    labels = torch.zeros(64, dtype=torch.long)
    _, within = set_logprobs(stream, labels, Budget(), members)
    assert float(within.min()) > -0.1 and float(within.max()) <= 0.0


def test_the_value_of_a_flat_function_keeps_its_digits():
    """Its slope may be larger than itself by orders: what stands for the gradient does not show."""
    hidden, weight, labels = case(torch.float32)
    stream = Stream(hidden, OutputHead(weight))

    def flat(of_label: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return 1e-3 + 1e6 * (of_label - of_label.detach()).sum()

    assert float(over_logprobs(stream, labels, Budget(4), None, flat)) == pytest.approx(
        1e-3, rel=1e-6
    )
