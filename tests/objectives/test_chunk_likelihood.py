"""Approximate likelihood matching: against published numbers, a plain form, and its properties."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from axolotl_dskd.config import ChunkLikelihoodConfig, DSKDConfig
from axolotl_dskd.objectives.chunk_likelihood import log1mexp
from axolotl_dskd.output_head import OutputHead
from tests.support import golden_methods, plain_forms
from tests.support.groups import Problem, equals_plain_form, problem, row_groups
from tests.support.plain_forms import (
    boundaries,
    boundary_behind,
    chunk_divergence,
    likelihoods_of_chunks,
)

DIVERGENCES = ("binary_ce", "reverse_binary_kl", "abs_exp", "abs", "renyi")


def plain_loss(made: Problem, config: ChunkLikelihoodConfig) -> Tensor:
    """Half cross-entropy, half divergence of chunks, all logits at once."""
    return 0.5 * sum(plain_forms.chunk_likelihood(made, made.logits(), config).values())


@pytest.mark.parametrize("chunk", [1, 16, 1000])
@pytest.mark.parametrize("head", ["plain", "full"])
def test_loss_and_gradients_equal_the_plain_form(head: str, chunk: int):
    config = ChunkLikelihoodConfig()
    equals_plain_form(problem(head=head), config, lambda made: plain_loss(made, config), chunk)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("changes", [{}, {"merge": False}, {"debias": False}], ids=str)
def test_every_setting_equals_the_plain_form(divergence: Any, changes: dict[str, Any]):
    for temperature in (2.0, 100.0):
        config = ChunkLikelihoodConfig(divergence=divergence, temperature=temperature, **changes)
        made = problem(seed=3)
        equals_plain_form(made, config, lambda made, c=config: plain_loss(made, c), 64, 1e-6)


@pytest.mark.parametrize("end_tokens", [(2, 2), (0, 1), (1, 0)], ids=str)
def test_a_boundary_counts_only_behind_text_and_where_both_sides_read_on(end_tokens: Any):
    for merge in (True, False):
        config = ChunkLikelihoodConfig(merge=merge)
        made = problem(end_tokens=end_tokens)
        equals_plain_form(made, config, lambda made, c=config: plain_loss(made, c), 64)


@pytest.mark.parametrize("path", golden_methods.files("alm"), ids=lambda p: p.stem)
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("naive_ce_T100", {"merge": False, "debias": False}),
        ("debiased_ce_T100", {"merge": False}),
        ("merged_ce_T100", {}),
        ("merged_ce_T1", {"temperature": 1.0}),
        ("merged_rkl_T1", {"temperature": 1.0, "divergence": "reverse_binary_kl"}),
        ("debiased_tv_T1", {"merge": False, "temperature": 1.0, "divergence": "abs_exp"}),
        ("naive_abs", {"merge": False, "debias": False, "divergence": "abs"}),
    ],
)
def test_published_numbers_but_for_their_faults(path: Path, name: str, keys: dict[str, Any]):
    """Published: a mean, over too few chunks where they are merged, with s behind end tokens."""
    config = ChunkLikelihoodConfig(**keys)
    golden = golden_methods.load(path)
    made, z = golden.problem, golden.numbers
    leaf = z["student_logits"].double().requires_grad_()
    logprobs, published_read, read = [], [], []
    for side, (label, logits) in enumerate(
        zip(("student", "teacher"), (leaf, z["teacher_logits"].double()), strict=True)
    ):
        view = (made.student, made.teacher)[side]
        begins = z[f"{label}_space"]
        found, special = boundaries(made.tokenizers[side])
        assert torch.equal(found, begins)
        log_q = logits.log_softmax(-1).flatten(0, 1)
        places = golden.places[side]
        logprobs.append(log_q[places].gather(-1, view.tokens.labels[:, None])[:, 0])
        within = log_q[:, begins].logsumexp(-1)
        published_read.append([within[i + 1] for i in places.tolist()])
        read.append(boundary_behind(view.tokens, within[places], special))
    both = (logprobs[0], logprobs[1])
    ours, theirs = likelihoods_of_chunks(made, both, (published_read[0], published_read[1]), config)
    assert len(ours) == int(z["merged_chunks" if config.merge else "chunks"])
    divisor = int(z["merged_divisor_published"]) if config.merge else len(ours)
    scale = divisor * (1.0 if config.divergence == "abs" else config.temperature)
    published = chunk_divergence(ours, theirs, config).sum() / scale
    entropy = torch.zeros(())
    if config.divergence == "binary_ce":
        p = torch.exp(theirs / config.temperature - 1e-6)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum() / divisor
    torch.testing.assert_close(published + entropy, z[f"out_{name}"].double(), rtol=2e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(published, leaf, retain_graph=True)
    expected = z[f"grad_{name}"].double()
    assert float((gradient - expected).norm() / expected.norm()) < 5e-6

    # Ours: no s behind the end; a sum.
    ours, theirs = likelihoods_of_chunks(made, both, (read[0], read[1]), config)
    corrected = chunk_divergence(ours, theirs, config).sum()
    out = made.run(config, kd_ratio=1.0)
    torch.testing.assert_close(out.loss, corrected)
    (expected,) = torch.autograd.grad(corrected, leaf)
    (found,) = torch.autograd.grad(out.loss, made.leaves())
    torch.testing.assert_close(found, expected.flatten(0, 1)[golden.places[0]])
    faulty = config.debias or config.merge
    same = torch.allclose(out.loss.detach() / scale, published.detach(), rtol=1e-4)
    assert same == (not faulty)


def test_the_golden_files_are_there():
    assert len(golden_methods.files("alm")) >= 3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_learns_nothing(divergence: Any):
    made = problem(one_vocabulary=True, end_tokens=(1, 1))
    same = replace(made.student, hidden=made.student.hidden.detach(), head=made.student.head)
    made = replace(made, teacher=same)
    out = made.run(ChunkLikelihoodConfig(divergence=divergence), kd_ratio=1.0)
    assert float(out.loss.detach().abs()) < 1e-9
    for gradient in torch.autograd.grad(out.loss, made.leaves()):
        assert float(gradient.abs().max()) < 1e-7


def test_a_large_temperature_gives_gradients_of_cross_entropys_size():
    """−τ ∂/∂ℓ is 1 − ℓ_teacher / ℓ_student: here, for a sure teacher, nearly 1 a token."""
    made = problem(one_vocabulary=True, end_tokens=(1, 1), head="frozen", sharpness=0.3)
    sure = torch.nn.functional.one_hot(made.student.tokens.labels, 400).double() * 30
    head = OutputHead(torch.eye(400, dtype=torch.float64))
    made = replace(made, teacher=replace(made.student, hidden=sure, head=head))
    config = ChunkLikelihoodConfig(merge=False, debias=False)
    (chunk,) = torch.autograd.grad(made.run(config, kd_ratio=1.0).loss, made.leaves())
    (ce,) = torch.autograd.grad(made.run(config, kd_ratio=0.0).loss, made.leaves())
    assert float((chunk - ce).norm() / ce.norm()) < 0.05


def test_chunks_of_one_token_are_binary_divergences_of_its_probability():
    made = problem(one_vocabulary=True, end_tokens=(1, 1))
    config = ChunkLikelihoodConfig(temperature=1.0, merge=False, debias=False)
    out = made.run(config)
    p, q = (
        (x.log_softmax(-1).gather(-1, made.student.tokens.labels[:, None])[:, 0] - 1e-6).exp()
        for x in made.logits()[::-1]
    )
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(out.terms["chunk"].values, expected.detach())
    assert out.terms["tokens_per_chunk"].values.unique().tolist() == [1.0]


def test_reports_count_chunks_and_their_tokens():
    made = problem(end_tokens=(2, 1))  # a second end token of the student's meets nothing
    single = made.run(ChunkLikelihoodConfig(merge=False))
    merged = made.run(ChunkLikelihoodConfig())
    groups = len(row_groups(made.matches))
    assert float(single.terms["chunks"].values.sum()) == groups
    assert single.terms["chunks"].sample_ids.tolist() == list(range(8))
    assert 8 < float(merged.terms["chunks"].values.sum()) < groups
    for out in (single, merged):
        in_groups = float(out.terms["aligned"].values.sum())
        assert in_groups == len(made.student) - 8
        assert float(out.terms["tokens_per_chunk"].values.sum()) == in_groups
        chunks = out.terms["chunk"].sample_ids.bincount(minlength=8)
        assert chunks.tolist() == out.terms["chunks"].values.tolist()


def test_a_threshold_of_zero_merges_nothing():
    made = problem()
    merged = made.run(ChunkLikelihoodConfig(merge_threshold=0.0))
    torch.testing.assert_close(merged.loss, made.run(ChunkLikelihoodConfig(merge=False)).loss)


def test_no_tokens_give_a_loss_of_zero_that_can_be_differentiated():
    made = problem(head="full").without_tokens()
    out = made.run(ChunkLikelihoodConfig())
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    assert set(out.terms) == set(made.objective(ChunkLikelihoodConfig()).terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_its_own_products(dtype: torch.dtype):
    made = problem(dtype=torch.float32)
    low = made.to(dtype)
    out, truth = low.run(ChunkLikelihoodConfig()), low.to(torch.float64)
    expected = plain_loss(truth, ChunkLikelihoodConfig())
    torch.testing.assert_close(out.loss.double(), expected, rtol=2e-2, atol=0.0)
    for a, b in zip(
        torch.autograd.grad(out.loss, low.leaves()),
        torch.autograd.grad(expected, truth.leaves()),
        strict=True,
    ):
        assert a.dtype == dtype and float((a.double() - b).norm() / b.norm()) < 2e-2


def test_log1mexp_keeps_its_digits_at_both_ends():
    x = torch.tensor([-1e-6, -0.1, -math.log(2), -1.0, -20.0, -80.0])
    expected = torch.log(-torch.expm1(x.double()))
    torch.testing.assert_close(log1mexp(x).double()[:-1], expected[:-1], rtol=1e-5, atol=0.0)
    assert float(log1mexp(x)[-1]) == pytest.approx(-math.exp(-80.0), rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temperature": 0}, "greater than 0"),
        ({"merge_threshold": 1.0}, "less than 1"),
        ({"divergence": "kl"}, "binary_ce"),
        ({"beta": 0.5}, "beta"),
    ],
)
def test_bad_settings_are_refused_in_words(keys: dict[str, Any], words: str):
    block = {"teacher": {"base_model": "t"}, "objective": {"name": "chunk_likelihood", **keys}}
    with pytest.raises(ValidationError, match=words):
        DSKDConfig.model_validate(block)


def test_the_description_says_what_is_compared():
    said = problem().objective(ChunkLikelihoodConfig()).describe()
    assert "merged" in said and "0.1" in said
