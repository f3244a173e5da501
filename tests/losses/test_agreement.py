"""KL and first-choice agreement of two distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from axolotl_dskd.losses.agreement import agreement


def log_probabilities(seed: int, n: int = 7, vocabulary: int = 50) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((n, vocabulary), generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def test_kl_is_the_divergence_of_the_second_from_the_first():
    p, q = log_probabilities(0), log_probabilities(1)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(agreement(p, q).kl, expected)
    assert not torch.allclose(agreement(q, p).kl, expected)


def test_a_known_pair_has_its_known_values():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log()
    kl, same_choice = agreement(p, q)
    torch.testing.assert_close(kl, torch.tensor([0.25 * torch.log(torch.tensor(2.0)), 0.0]))
    assert same_choice.tolist() == [False, True]


def test_a_distribution_agrees_with_itself():
    p = log_probabilities(2)
    kl, same_choice = agreement(p, p.clone())
    assert kl.abs().max() == 0
    assert same_choice.all()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_chunks_do_not_change_the_values(size: int):
    p, q = log_probabilities(3), log_probabilities(4)
    parts = [agreement(*pair) for pair in zip(p.split(size), q.split(size), strict=True)]
    kl, same_choice = agreement(p, q)
    assert torch.equal(torch.cat([part.kl for part in parts]), kl)
    assert torch.equal(torch.cat([part.same_choice for part in parts]), same_choice)


def test_no_tokens_give_no_values():
    kl, same_choice = agreement(log_probabilities(0, n=0), log_probabilities(1, n=0))
    assert kl.shape == same_choice.shape == (0,)


def test_nan_stays_in_its_token():
    p, q = log_probabilities(5), log_probabilities(6)
    q[2] = float("nan")
    assert agreement(p, q).kl.isnan().nonzero().flatten().tolist() == [2]


def test_distributions_over_different_vocabularies_are_refused():
    with pytest.raises(AssertionError):
        agreement(log_probabilities(0), log_probabilities(0, vocabulary=1))


def test_no_gradient_is_kept():
    p = log_probabilities(7).requires_grad_()
    assert not agreement(p, p).kl.requires_grad
