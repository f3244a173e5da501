"""Span support: against a plain form that lists the classes, and its properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from axolotl_dskd.config import DSKDConfig, SpanSupportConfig
from axolotl_dskd.data.token_bytes import shared_tokens
from tests.support.groups import Problem, equals_plain_form, problem, row_groups
from tests.support.plain_forms import laws, span_support

CONFIG = SpanSupportConfig()


def plain_loss(made: Problem) -> Tensor:
    """Half cross-entropy, half reverse KL."""
    return 0.5 * sum(span_support(made, made.logits()).values())


def test_every_class_of_both_sides_is_counted_once():
    made = problem()
    for both in laws(made, made.logits()):
        for side in both:
            assert float(side.sum().detach()) == pytest.approx(1.0)
            assert float(side.min().detach()) >= -1e-12


@pytest.mark.parametrize("head, chunk", [("plain", 1), ("plain", 1000), ("full", 16)])
def test_loss_and_gradients_equal_the_plain_form(head: str, chunk: int):
    equals_plain_form(problem(head=head, end_tokens=(2, 1)), CONFIG, plain_loss, chunk, 1e-8)


def test_gradients_reach_all_tokens_of_a_path():
    made = problem()
    out = made.run(CONFIG, kd_ratio=1.0)
    gradient, _ = torch.autograd.grad(out.loss, made.leaves())
    later = [row for ours, _ in row_groups(made.matches) for row in ours[1:]]
    assert len(later) > 20
    assert float(gradient[later].abs().amax(1).min()) > 0.0


def test_a_student_equal_to_its_teacher_learns_nothing():
    made = problem(one_vocabulary=True, end_tokens=(1, 1))
    made = replace(made, teacher=replace(made.student, hidden=made.student.hidden.detach()))
    out = made.run(CONFIG, kd_ratio=1.0)
    assert float(out.loss.detach().abs()) < 1e-9
    for gradient in torch.autograd.grad(out.loss, made.leaves()):
        assert float(gradient.abs().max()) < 1e-9


def test_the_divergence_is_never_negative():
    for sharpness in (0.1, 4.0):
        out = problem(sharpness=sharpness).run(CONFIG)
        assert float(out.terms["support"].values.min()) >= 0.0


def test_groups_of_one_token_give_reverse_kl_over_shared_tokens_and_the_rest():
    made = problem(one_vocabulary=True, end_tokens=(1, 1))
    out = made.run(CONFIG)
    q, p = (x.softmax(-1) for x in made.logits())
    shared = sorted(set(shared_tokens(*made.tokenizers)[0]))
    others = sorted(set(range(400)) - set(shared))
    q_rest, p_rest = (x[:, others].sum(-1) + 1e-6 for x in (q, p))
    expected = (q * (q / p).log())[:, shared].sum(-1) + q_rest * (q_rest / p_rest).log()
    torch.testing.assert_close(out.terms["support"].values, expected.detach())
    torch.testing.assert_close(out.terms["teacher_rest"].values, p_rest - 1e-6)


def test_sure_models_have_finite_losses():
    """A path that is certain leaves its first token nothing, and a rest may be impossible."""
    made = problem(sharpness=300.0, dtype=torch.float32)
    out = made.run(CONFIG)
    assert bool(torch.isfinite(out.loss.detach()))
    for gradient in torch.autograd.grad(out.loss, made.leaves()):
        assert bool(torch.isfinite(gradient).all())


def test_tokens_without_a_counterpart_have_cross_entropy_alone():
    made = problem(end_tokens=(2, 1))
    out = made.run(CONFIG, kd_ratio=1.0)
    left = out.terms["aligned"].values == 0
    assert int(left.sum()) == 8
    (gradient, _) = torch.autograd.grad(out.loss, made.leaves())
    assert float(gradient[left].abs().max()) == 0.0
    assert len(out.terms["teacher_rest"].values) == len(row_groups(made.matches))


def test_no_tokens_give_a_loss_of_zero_that_can_be_differentiated():
    made = problem(head="full").without_tokens()
    out = made.run(CONFIG)
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    assert set(out.terms) == set(made.objective(CONFIG).terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_its_own_products(dtype: torch.dtype):
    low = problem(dtype=torch.float32).to(dtype)
    out, truth = low.run(CONFIG), low.to(torch.float64)
    expected = truth.run(CONFIG).loss  # held against the plain form above
    torch.testing.assert_close(out.loss.double(), expected, rtol=2e-2, atol=0.0)
    for a, b in zip(
        torch.autograd.grad(out.loss, low.leaves()),
        torch.autograd.grad(expected, truth.leaves()),
        strict=True,
    ):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < 2e-2


def test_keys_of_other_objectives_are_refused_in_words():
    block = {"teacher": {"base_model": "t"}, "objective": {"name": "span_support", "beta": 0.5}}
    with pytest.raises(ValidationError, match="beta"):
        DSKDConfig.model_validate(block)


def test_the_description_says_what_is_compared():
    assert "span" in problem().objective(CONFIG).describe()
