"""Divergences against their definitions: values, gradients, extremes."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from axolotl_dskd.config import DivergenceName
from axolotl_dskd.losses import Distribution, make_divergence
from tests.support import naive

NAMES = get_args(DivergenceName)


def logits(seed: int, shape: tuple[int, ...] = (5, 37), scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def value_of(name: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return make_divergence(name)(Distribution.of(teacher), Distribution.of(student))[0]


def gradient_of(name: str, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return make_divergence(name)(Distribution.of(teacher), Distribution.of(student))[1]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_definition_under_autograd(name: str):
    teacher, student = logits(0), logits(1).requires_grad_()
    expected = naive.divergence(name, teacher.softmax(-1), student.softmax(-1))
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(value_of(name, teacher, student.detach()), expected.detach())
    torch.testing.assert_close(gradient_of(name, teacher, student.detach()), gradient)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "adaptive_kl"])
def test_gradient_passes_gradcheck_in_float64(name: str):
    # adaptive_kl holds its weight constant, so its gradient is not that of its value.
    teacher = logits(2, (3, 11))

    class Closed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student):
            value, ctx.gradient = make_divergence(name)(
                Distribution.of(teacher), Distribution.of(student)
            )
            return value

        @staticmethod
        def backward(ctx, grad):
            return grad.unsqueeze(-1) * ctx.gradient

    assert torch.autograd.gradcheck(Closed.apply, logits(3, (3, 11)).requires_grad_())


@pytest.mark.parametrize("name", NAMES)
def test_equal_distributions_have_no_divergence_and_no_gradient(name: str):
    same = logits(4).float()
    assert value_of(name, same, same.clone()).abs().max() < 1e-6
    assert gradient_of(name, same, same.clone()).abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_extreme_logits_give_finite_values_and_gradients(name: str, scale: float):
    for teacher, student in (
        (logits(5, scale=scale), logits(6, scale=scale)),
        (logits(5), torch.nn.functional.one_hot(torch.arange(5), 37) * scale),
        (torch.nn.functional.one_hot(torch.arange(5), 37) * scale, logits(6)),
    ):
        teacher, student = teacher.float(), student.float()
        value, gradient = value_of(name, teacher, student), gradient_of(name, teacher, student)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        assert (value >= -1e-6).all()


@pytest.mark.parametrize(
    ("name", "keyword", "value"),
    [
        ("skewed_forward_kl", "skew_lambda", 0.3),
        ("skewed_reverse_kl", "skew_lambda", 0.3),
        ("js_divergence", "js_beta", 0.2),
        ("adaptive_kl", "adaptive_alpha", 0.8),
    ],
)
def test_parameters_change_the_value(name: str, keyword: str, value: float):
    p, q = Distribution.of(logits(7)), Distribution.of(logits(8))
    default = make_divergence(name)(p, q)[0]
    other = make_divergence(name, **{keyword: value})(p, q)[0]
    assert not torch.allclose(default, other, rtol=1e-3)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown divergence 'kl'.*forward_kl"):
        make_divergence("kl")
