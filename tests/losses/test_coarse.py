"""Divergences over the likeliest tokens and all others as one, against their definition."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from axolotl_dskd.config import DivergenceName
from axolotl_dskd.losses import coarse_divergence, make_divergence
from tests.support import naive

NAMES = get_args(DivergenceName)
V = 37


def logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn((5, V), generator=generator, dtype=torch.float64)


def likeliest(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities."""
    top, ids = t.log_softmax(-1).topk(k)
    return ids, top


def plain(name: str, t: Tensor, z: Tensor, ids: Tensor) -> Tensor:
    pq = []
    for x in (t, z):
        named = x.softmax(-1).gather(-1, ids)
        pq.append(torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1))
    return naive.divergence(name, *pq)


@pytest.mark.parametrize("k", [1, 6])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_definition_under_autograd(name: str, k: int):
    t, z = logits(0), logits(1).requires_grad_()
    ids, top = likeliest(t, k)
    expected = plain(name, t, z, ids)
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    found = coarse_divergence(make_divergence(name), ids, top, z.detach())
    torch.testing.assert_close(found[0], expected.detach())
    torch.testing.assert_close(found[1], gradient)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adaptive_kl"])
def test_it_is_at_most_the_divergence_of_all_tokens_and_with_all_but_one_equal(name: str):
    t, z = logits(2), logits(3)
    whole = naive.divergence(name, t.softmax(-1), z.softmax(-1))
    values = [
        coarse_divergence(make_divergence(name), *likeliest(t, k), z)[0] for k in (1, 4, 16, V - 1)
    ]
    for fewer, more in zip(values, [*values[1:], whole], strict=True):
        assert (fewer <= more + 1e-12).all()  # it grows with what is known
    torch.testing.assert_close(values[-1], whole)


def test_places_without_a_token_change_nothing():
    t, z = logits(4), logits(5)
    t[:, 0] += 9  # token 0, to which such places point, is known
    ids, top = likeliest(t, 6)
    expected = coarse_divergence(make_divergence("reverse_kl"), ids[:, :4], top[:, :4], z)
    ids[:, 4:], top[:, 4:] = -1, -torch.inf
    found = coarse_divergence(make_divergence("reverse_kl"), ids, top, z)
    torch.testing.assert_close(found, expected)


def test_a_teacher_that_is_sure_gives_finite_numbers():
    """In float32 what it leaves for all others rounds to 0."""
    t, z = logits(6).float(), logits(7).float()
    t[:, 3] += 60
    for name in NAMES:
        value, gradient = coarse_divergence(make_divergence(name), *likeliest(t, 2), z)
        assert value.isfinite().all(), name
        assert gradient.isfinite().all(), name
        assert (value > 0).all(), name
