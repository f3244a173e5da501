"""Running statistics: what has been seen before a step, on all ranks, and nothing else."""

from __future__ import annotations

import pytest
import torch

from axolotl_dskd.objectives.returns import Moments, of_next, sums_ahead
from tests.support.ranks import launch

VALUES = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)


def test_sums_ahead_end_with_their_sample():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    samples = torch.tensor([0, 0, 0, 2, 2, 3])
    expected = [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16, 32]
    assert sums_ahead(values, 0.5, samples).tolist() == expected
    assert sums_ahead(values[:0], 0.5, samples[:0]).tolist() == []
    assert of_next(values, samples).tolist() == [2, 4, 0, 16, 0, 0]
    assert of_next(values[:0], samples[:0]).tolist() == []


def test_sums_ahead_of_a_long_sample_are_those_of_the_recursion():
    values = torch.randn(777, dtype=torch.float64)
    samples = torch.zeros(777, dtype=torch.long)
    samples[500:] = 1
    expected, ahead = [], 0.0
    for i in reversed(range(777)):
        ahead = float(values[i]) + 0.95 * (0.0 if i == 499 else ahead)
        expected.append(ahead)
    found = sums_ahead(values, 0.95, samples)
    torch.testing.assert_close(found, torch.tensor(expected[::-1], dtype=torch.float64))


def test_what_is_not_known_yet_whitens_to_zero():
    moments = Moments()
    moments.see(VALUES)
    assert moments.whiten(VALUES).tolist() == [0.0, 0.0, 0.0]


def test_whitened_by_themselves_values_have_mean_0_and_variance_1():
    moments = Moments()
    for value in VALUES:  # micro-batches
        moments.see(value[None])
    moments.end_step()
    found = moments.whiten(VALUES)
    assert float(found.mean()) == pytest.approx(0, abs=1e-9)
    assert float(found.square().mean()) == pytest.approx(1, rel=1e-6)


def test_what_a_step_sees_counts_from_the_next_step_on():
    moments = Moments()
    moments.see(VALUES)
    moments.end_step()
    before = moments.whiten(VALUES)
    moments.see(100 * VALUES)
    assert torch.equal(moments.whiten(VALUES), before)
    moments.end_step()
    assert float(moments.whiten(VALUES).mean()) < -0.5


def test_a_step_counts_less_with_every_other_one():
    moments = Moments()
    for _ in range(30):
        moments.see(100 + VALUES)
        moments.end_step()
    for _ in range(100):
        moments.see(VALUES)
        moments.end_step()
    assert float(moments.whiten(VALUES).mean()) == pytest.approx(0, abs=0.05)


def test_equal_values_are_whitened_to_zero():
    moments = Moments()
    moments.see(torch.full((5,), 0.1))
    moments.end_step()
    assert moments.whiten(torch.full((3,), 0.1)).abs().max() < 1e-3


def test_a_checkpoint_holds_the_statistics():
    moments, other = Moments(), Moments()
    moments.see(VALUES)
    moments.end_step()
    other.load_state_dict(moments.state_dict())
    assert torch.equal(other.whiten(VALUES), moments.whiten(VALUES))


def test_two_ranks_know_what_one_knows():
    steps = [[[1.0, 2.0, 4.0], [8.0]], [[16.0], []], [[], [0.5, 32.0]]]
    (both,) = launch(2, [{"do": "running_moments", "steps": steps}])
    alone = Moments()
    for ranks in steps:
        alone.see(torch.tensor(ranks[0] + ranks[1]))
        alone.end_step()
    for found in both:
        torch.testing.assert_close(found["sums"], alone.sums, rtol=1e-12, atol=0)


def test_values_without_a_spread_whiten_to_nothing():
    moments = Moments()
    moments.see(torch.tensor([0.7]))
    moments.end_step()
    assert moments.whiten(torch.tensor([0.2, -1.0])).tolist() == [0.0, 0.0]
    moments.see(torch.tensor([0.7, 0.5]))
    moments.end_step()
    assert bool((moments.whiten(torch.tensor([0.2, -1.0])) < 0).all())


def test_a_step_that_failed_counts_for_nothing():
    moments = Moments()
    moments.see(torch.tensor([5.0, 6.0]))
    moments.forget_step()
    moments.see(torch.tensor([1.0]))
    moments.end_step()
    assert moments.sums.tolist() == [1.0, 1.0, 1.0]
