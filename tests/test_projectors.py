"""Projectors and their optimizer: schedule, clipping, saving, resuming."""

from __future__ import annotations

import copy

import pytest
import torch

from axolotl_dskd.projectors import ProjectorOptimizer, Projectors


def optimizer(**overrides) -> ProjectorOptimizer:
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.0} | overrides
    return ProjectorOptimizer(Projectors(4, 6, with_query=True, seed=3), **settings)


def step(which: ProjectorOptimizer, seed: int, factor: float = 1.0, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    loss = sum(p(torch.randn(5, p.in_features)).square().sum() for p in which.projectors.children())
    (loss * scale).backward()
    which.step(factor, scale)


def weights(which: ProjectorOptimizer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(which.projectors.state_dict())


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = Projectors(4, 6, with_query=False, seed=5).state_dict()
    before = torch.get_rng_state()
    other = Projectors(4, 6, with_query=False, seed=5).state_dict()
    assert torch.equal(before, torch.get_rng_state())  # and the run's own randomness is untouched
    torch.testing.assert_close(one, other)


def test_saved_and_loaded_goes_on_exactly(tmp_path):
    straight = optimizer()
    for seed in range(3):
        step(straight, seed)
    straight.save(tmp_path)
    resumed = optimizer()
    resumed.load(tmp_path)
    for which in (straight, resumed):
        step(which, 9)
    torch.testing.assert_close(weights(straight), weights(resumed), rtol=0, atol=0)
    assert {p.suffix for p in (tmp_path / "dskd").iterdir()} == {".safetensors"}


def test_a_checkpoint_without_projectors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be resumed as a distillation.*base_model"):
        optimizer().load(tmp_path)


def test_projectors_of_another_pair_are_refused(tmp_path):
    optimizer().save(tmp_path)
    other = ProjectorOptimizer(
        Projectors(4, 8, with_query=True, seed=3),
        learning_rate=0.01,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(ValueError, match="do not fit this run"):
        other.load(tmp_path)


def test_the_schedule_factor_scales_the_step():
    whole, half = optimizer(weight_decay=0.0), optimizer(weight_decay=0.0)
    start = weights(whole)
    step(whole, 0, 1.0)
    step(half, 0, 0.5)
    for name, value in weights(half).items():
        torch.testing.assert_close(2 * (value - start[name]), weights(whole)[name] - start[name])


def test_a_scaled_loss_gives_the_same_step():
    plain, scaled = optimizer(), optimizer()
    step(plain, 0)
    step(scaled, 0, scale=1024.0)
    torch.testing.assert_close(weights(plain), weights(scaled))


def test_an_overflow_under_a_loss_scaler_skips_the_step():
    which = optimizer()
    start = weights(which)
    step(which, 0, scale=float("inf"))
    torch.testing.assert_close(weights(which), start, rtol=0, atol=0)


def test_gradients_that_are_not_finite_stop_the_run():
    which = optimizer()
    which.projectors.t2s.weight.grad = torch.full((4, 6), float("nan"))
    with pytest.raises(ValueError, match=r"gradients are not finite.*learning_rate"):
        which.step(1.0)


def test_a_step_without_any_gradient_is_a_step_of_zeros():
    which = optimizer(weight_decay=0.0)
    start = weights(which)
    which.step(1.0)
    torch.testing.assert_close(weights(which), start)
