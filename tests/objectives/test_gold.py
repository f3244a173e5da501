"""GOLD: against published numbers, a plain form, and its properties."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from axolotl_dskd.config import DSKDConfig, GOLDConfig
from axolotl_dskd.data.token_bytes import shared_tokens
from tests.support import golden_methods
from tests.support.groups import Problem, equals_plain_form, problem, row_groups
from tests.support.plain_forms import by_name, cross_entropy, gold_groups


def plain_groups(made: Problem, config: GOLDConfig, *, published: bool = False) -> Tensor:
    """[G] each group's loss, weighted."""
    share = len(shared_tokens(*made.tokenizers)[0]) / made.logits()[1].shape[1]
    weights = (share, 1 - share) if config.weights == "share" else config.weights
    near, far = gold_groups(made, made.logits(), config, published=published)
    return weights[0] * near + weights[1] * far if config.hybrid else far


def plain_loss(made: Problem, config: GOLDConfig) -> Tensor:
    """Half cross-entropy, half GOLD."""
    ce = cross_entropy(made.logits()[0], made.student.tokens.labels)
    return 0.5 * ce + 0.5 * plain_groups(made, config).sum()


@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize("head", ["plain", "full"])
def test_loss_and_gradients_equal_the_plain_form(head: str, chunk: int):
    config = GOLDConfig(beta=0.3)
    equals_plain_form(problem(head=head), config, lambda made: plain_loss(made, config), chunk)


@pytest.mark.parametrize(
    "keys",
    [
        {"beta": 0.0},
        {"beta": 1.0},
        {"temperature": 2.0},
        {"weights": (1.0, 0.25)},
        {"hybrid": False},
    ],
    ids=str,
)
def test_every_setting_equals_the_plain_form(keys: dict[str, Any]):
    config = GOLDConfig(**keys)
    made = problem(seed=2, end_tokens=(2, 1))
    equals_plain_form(made, config, lambda made: plain_loss(made, config), 64)


@pytest.mark.parametrize("path", golden_methods.files("gold"), ids=lambda p: p.stem)
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("bayesian_hybrid", {}),
        ("bayesian_hybrid_beta0", {"beta": 0.0}),
        ("bayesian_hybrid_beta1", {"beta": 1.0}),
        ("bayesian_hybrid_T2_eos", {"temperature": 2.0, "weights": (0.7, 0.3)}),
        ("bayesian_sorted", {"hybrid": False}),
    ],
)
def test_published_numbers_but_for_their_faults(path: Path, name: str, keys: dict[str, Any]):
    """Published: means over groups, then samples; at β 0 and 1 no −P + Q, and clamps at 1e-8."""
    config = GOLDConfig(**keys)
    golden = golden_methods.load(path, end_tokens_meet=name.endswith("eos"))
    made = golden.problem
    samples = made.student.tokens.sample_ids
    sample = samples[[ours[0] for ours, _ in row_groups(made.matches)]]
    weight = 1.0 / (sample.bincount()[sample] * len(sample.unique()))

    published = (plain_groups(made, config, published=True) * weight).sum()
    expected = golden.numbers[f"out_{name}"]
    torch.testing.assert_close(published, expected, rtol=1e-6, atol=0.0)
    (gradient,) = torch.autograd.grad(published, made.leaves())
    torch.testing.assert_close(gradient, golden.gradient(name), rtol=1e-5, atol=1e-7)

    # Ours: a sum over groups, and never least elsewhere than where both sides agree.
    out = made.run(config, kd_ratio=1.0)
    corrected = plain_groups(made, config)
    torch.testing.assert_close(out.loss, corrected.sum())
    (expected,) = torch.autograd.grad(corrected.sum(), made.leaves())
    (found,) = torch.autograd.grad(out.loss, made.leaves())
    torch.testing.assert_close(found, expected)
    same = torch.allclose((corrected * weight).sum(), published, rtol=1e-4)
    assert same == (config.beta not in (0.0, 1.0))


@pytest.mark.parametrize("path", golden_methods.files("gold"), ids=lambda p: p.stem)
def test_shared_tokens_are_the_published_ones_and_observed_is_another_loss(path: Path):
    golden = golden_methods.load(path, end_tokens_meet=False)
    ours, theirs = shared_tokens(*golden.problem.tokenizers)
    published = golden.numbers["matched_teacher_student_ids"].tolist()
    assert sorted(zip(theirs, ours, strict=True)) == [tuple(pair) for pair in published]
    for name in ("hybrid", "sorted"):
        z = golden.numbers
        assert abs(float(z[f"out_observed_{name}"] / z[f"out_bayesian_{name}"]) - 1) > 0.01


def test_the_golden_files_are_there():
    assert len(golden_methods.files("gold")) >= 3


@pytest.mark.parametrize(
    "keys", [{"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}, {"hybrid": False}], ids=str
)
def test_a_student_equal_to_its_teacher_learns_nothing(keys: dict[str, Any]):
    made = problem(one_vocabulary=True, end_tokens=(1, 1))
    made = replace(made, teacher=replace(made.student, hidden=made.student.hidden.detach()))
    out = made.run(GOLDConfig(**keys), kd_ratio=1.0)
    assert float(out.loss.detach().abs()) < 1e-9
    for gradient in torch.autograd.grad(out.loss, made.leaves()):
        assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_shared_tokens_alone_are_least_where_both_sides_agree(beta: float):
    """The published KL at 0 and 1 over a part of the vocabulary is negative somewhere."""
    p = torch.tensor([0.2, 0.1], dtype=torch.float64)
    q = p.clone().requires_grad_()
    log = [x.log()[None] for x in (q, p)]
    objective = problem().objective(GOLDConfig(beta=beta))
    (gradient,) = torch.autograd.grad(objective._by_name(*log).sum(), q)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    if beta in (0.0, 1.0):
        (gradient,) = torch.autograd.grad(by_name(q, p, beta, published=True), q)
        assert float(gradient.abs().min()) > 0.5


def test_groups_of_one_token_give_the_token_divergence():
    made = problem(one_vocabulary=True, end_tokens=(1, 1))
    out = made.run(GOLDConfig(beta=0.0))
    q, p = (x.log_softmax(-1) for x in made.logits())
    shared = sorted(set(shared_tokens(*made.tokenizers)[0]))  # all but special tokens
    expected = (p.exp() * (p - q) - p.exp() + q.exp())[:, shared].sum(-1).detach()
    torch.testing.assert_close(out.terms["shared"].values, expected)
    others = sorted(set(range(400)) - set(shared))
    ranked = (x.exp()[:, others].sort().values for x in (q, p))
    expected = torch.sub(*ranked).abs().sum(-1).detach()
    torch.testing.assert_close(out.terms["by_rank"].values, expected)


def test_tokens_without_a_counterpart_have_cross_entropy_alone():
    made = problem(end_tokens=(2, 1))
    out = made.run(GOLDConfig(), kd_ratio=1.0)
    left = out.terms["aligned"].values == 0
    assert int(left.sum()) == 8
    (gradient, _) = torch.autograd.grad(out.loss, made.leaves())
    assert float(gradient[left].abs().max()) == 0.0 < float(gradient[~left].abs().min(0)[0].max())
    assert bool((out.terms["ce"].values[left] > 0).all())


@pytest.mark.parametrize("hybrid", [True, False])
def test_an_end_of_turn_that_is_not_the_students_end_is_not_compared_by_name(hybrid: bool):
    """As of Gemma, whose template writes another token than its tokenizer's end: by name the
    teacher's end is the latter, and would speak against the label."""
    made = problem(end_tokens=(1, 1))
    labels, ends = made.student.tokens.labels, made.tokenizers[0].eos_token_id
    other = made.tokenizers[0].convert_tokens_to_ids("<|system|>")
    at = (labels == ends).nonzero().flatten()[1]
    labels[at] = other
    out = made.run(GOLDConfig(hybrid=hybrid), kd_ratio=1.0)
    assert (float(out.terms["aligned"].values[at]) == 0.0) == hybrid
    gradient, _ = torch.autograd.grad(out.loss, made.leaves())
    assert (float(gradient[at].abs().max()) == 0.0) == hybrid
    assert int((out.terms["aligned"].values == 0).sum()) == int(hybrid)
    # Nor do two ends clash that are nobody's partner: they are among the others.
    theirs = made.teacher.tokens.labels
    theirs[made.matches.teacher_groups == made.matches.groups[at]] = made.tokenizers[1].bos_token_id
    assert (made.run(GOLDConfig(hybrid=hybrid)).terms["aligned"].values == 1).all()


def test_no_tokens_give_a_loss_of_zero_that_can_be_differentiated():
    made = problem(head="full").without_tokens()
    out = made.run(GOLDConfig())
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    assert set(out.terms) == set(made.objective(GOLDConfig()).terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_its_own_products(dtype: torch.dtype):
    low = problem(dtype=torch.float32).to(dtype)
    out, truth = low.run(GOLDConfig()), low.to(torch.float64)
    expected = plain_loss(truth, GOLDConfig())
    torch.testing.assert_close(out.loss.double(), expected, rtol=2e-2, atol=0.0)
    for a, b in zip(
        torch.autograd.grad(out.loss, low.leaves()),
        torch.autograd.grad(expected, truth.leaves()),
        strict=True,
    ):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta": 1.5}, "less than or equal to 1"),
        ({"weights": [0, 0]}, "both 0"),
        ({"weights": [1, 1], "hybrid": False}, "hybrid: true"),
        ({"merge": "observed"}, "merge"),
    ],
)
def test_bad_settings_are_refused_in_words(keys: dict[str, Any], words: str):
    block = {"teacher": {"base_model": "t"}, "objective": {"name": "gold", **keys}}
    with pytest.raises(ValidationError, match=words):
        DSKDConfig.model_validate(block)


def test_the_description_says_what_is_compared():
    assert "by name" in problem().objective(GOLDConfig()).describe()
    assert "all tokens by rank" in problem().objective(GOLDConfig(hybrid=False)).describe()
