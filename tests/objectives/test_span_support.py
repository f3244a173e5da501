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

CONFIG = SpanSupportConfig()


def law(
    q: Tensor, labels: Tensor, rows: list[int], ids: list[int], whole: set[int], start: set[int]
) -> Tensor:
    """[K + 2] probabilities of one side's classes: shared tokens by number, span, rest.

    Args:
        q: [n, V] probabilities.
        ids: [K] of this side, by the shared token's number.
        whole, start: numbers of shared tokens that are the span, or begin a longer path.
    """
    span, rest = len(ids), len(ids) + 1
    classes = torch.full((q.shape[1],), rest)
    for k, token in enumerate(ids):
        classes[token] = span if k in whole else rest if k in start else k
    total = q.new_zeros(len(ids) + 2).index_add(0, classes, q[rows[0]])
    first = int(classes[labels[rows[0]]])
    if first != span:  # going on as the path is another outcome than the first token's others
        assert first == rest
        path = torch.stack([q[row, labels[row]] for row in rows]).prod()
        total = total.index_add(0, torch.tensor([span, rest]), torch.stack([path, -path]))
    return total


def laws(made: Problem) -> list[tuple[Tensor, Tensor]]:
    """Both sides' laws of each group, without classes that neither side can be in."""
    probabilities = [x.softmax(-1) for x in made.logits()]
    ids = shared_tokens(*made.tokenizers)
    numbers = [{i: k for k, i in enumerate(side)} for side in ids]
    views, found = (made.student, made.teacher), []
    for rows in row_groups(made.matches):
        whole, start = set(), set()
        for view, own, number in zip(views, rows, numbers, strict=True):
            k = number.get(int(view.tokens.labels[own[0]]))
            if k is not None:
                (whole if len(own) == 1 else start).add(k)
        q, p = (
            law(x, view.tokens.labels, own, side, whole, start - whole)
            for x, view, own, side in zip(probabilities, views, rows, ids, strict=True)
        )
        there = torch.ones(len(q), dtype=torch.bool)
        there[list(whole | start)] = False
        assert bool((q[~there] == 0).all() and (p[~there] == 0).all())
        found.append((q[there], p[there]))
    return found


def plain_loss(made: Problem) -> Tensor:
    """Half cross-entropy, half reverse KL, class by class."""
    labels = made.student.tokens.labels
    ce = torch.nn.functional.cross_entropy(made.logits()[0], labels, reduction="sum")
    total = ce * 0.5
    for q, p in laws(made):
        raised = torch.zeros_like(q)
        raised[-1] = 1e-6
        q, p = q + raised, p + raised
        total = total + 0.5 * (q * (q / p).log()).sum()
    return total


def test_every_class_of_both_sides_is_counted_once():
    for both in laws(problem()):
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
