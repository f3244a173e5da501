"""Teacher space over a share of the tokens: the same in the mean, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from axolotl_dskd.objectives.dual_space.share import TokenShare
from tests.support.contract import Case, dual_space
from tests.support.inputs import Inputs

WAYS = [
    dual_space("cma", alignment="cma"),
    dual_space("causal", alignment="cma", causal=True),
    dual_space("eta", alignment="eta"),
]
of_any_way = pytest.mark.parametrize("case", WAYS, ids=lambda c: c.name)


def with_share(case: Case, share: float) -> Case:
    config = {**case.config, "teacher_space_share": share, "student_space_weight": 0.0}
    return Case(case.name, config, case.plain, case.one_vocabulary)


def found(
    objective: Any, inputs: Inputs, samples: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the term, and the gradient of the loss in the projector that only it trains."""
    out = objective(*inputs.batch(samples))
    (gradient,) = torch.autograd.grad(out.loss, [objective.module.s2t.weight])
    return out.sums()["teacher_space"], gradient


@of_any_way
def test_the_mean_over_all_draws_is_the_whole(case: Case):
    """Over shifts on a fine grid, whose mean is the expectation but for the grid's edges."""
    inputs = case.inputs()
    objective = with_share(case, 0.25).objective(inputs)
    begins = inputs.batch().matches.teacher_spans[:, 0]
    draws, of_tokens = [], {}
    for shift in torch.linspace(0, 1, 401)[:-1].tolist():
        objective._share._shift = shift
        # Few of the shifts take tokens that no other one takes.
        tokens = tuple(objective._share.taken(begins).tolist())
        if tokens not in of_tokens:
            of_tokens[tokens] = found(objective, inputs)
        draws.append(of_tokens[tokens])
    whole = found(with_share(case, 1.0).objective(inputs), inputs)
    for k in range(2):
        mean = torch.stack([draw[k] for draw in draws]).mean(0)
        assert float((mean - whole[k]).norm()) < 0.01 * float(whole[k].norm())
    assert len({float(value) for value, _ in draws}) > 4


@of_any_way
def test_which_tokens_are_taken_does_not_depend_on_the_batch(case: Case):
    inputs = case.inputs()
    objective = with_share(case, 0.5).objective(inputs)
    objective._share.draw(3)
    value, gradient = found(objective, inputs)
    alone = [found(objective, inputs, [sample]) for sample in (6, 1, 0, 2, 7, 4, 3, 5)]
    torch.testing.assert_close(value, sum(v for v, _ in alone))
    torch.testing.assert_close(gradient, sum(g for _, g in alone))
    assert float(value) != pytest.approx(
        float(found(with_share(case, 1.0).objective(inputs), inputs)[0]), rel=1e-3
    )


def test_the_gradient_is_that_of_the_terms_value():
    """The term is what the loss is made of, with its weight."""
    case = with_share(WAYS[0], 0.5)
    inputs = case.inputs()
    out = case.objective(inputs, kd_ratio=1.0)(*inputs.batch())
    assert float(out.loss.detach()) == pytest.approx(float(out.sums()["teacher_space"]))


def test_evaluations_take_all_tokens():
    inputs = WAYS[0].inputs()
    with torch.no_grad():
        sums = [
            with_share(WAYS[0], share).objective(inputs)(*inputs.batch()).sums()
            for share in (0.1, 1.0)
        ]
    torch.testing.assert_close(sums[0]["teacher_space"], sums[1]["teacher_space"])


def test_a_share_of_so_few_tokens_that_none_is_taken_has_a_gradient_of_zero():
    case = with_share(WAYS[0], 1e-9)
    inputs = case.inputs()
    value, gradient = found(case.objective(inputs), inputs)
    assert float(value) == 0.0
    assert float(gradient.norm()) == 0.0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_every_text_has_its_share_in_every_step(share: float, width: int):
    """Also where all tokens are of one width, three bytes in Chinese: never all or none."""
    tokens, begins = TokenShare(share, seed=0), torch.arange(0, 300 * width, width)
    counts = []
    for step in range(50):
        tokens.draw(step)
        taken = tokens.taken(begins)
        counts.append(int(taken.sum()))
        torch.testing.assert_close(tokens.taken(begins[100:]), taken[100:])
    assert all(abs(count - 300 * share) <= 12 for count in counts)
    assert len(set(counts)) > 1


def test_draws_are_those_of_the_seed_and_the_step():
    begins = torch.arange(0, 400, 4)
    drawn = {}
    for seed in (0, 1):
        for step in (0, 1, 7):
            tokens = TokenShare(0.5, seed)
            tokens.draw(step)
            drawn[seed, step] = tuple(tokens.taken(begins).tolist())
    assert len(set(drawn.values())) == 6
    again = TokenShare(0.5, 1)
    again.draw(7)
    assert tuple(again.taken(begins).tolist()) == drawn[1, 7]
