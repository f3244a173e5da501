"""The chunked closed-form loss against the plain one: terms and every gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from axolotl_dskd.losses import LossSettings, auto_chunk_tokens, dual_space_loss, make_divergence
from axolotl_dskd.types import OutputHead
from tests import naive
from tests.test_divergences import NAMES

N, M, d, D, V, U = 13, 17, 33, 21, 97, 61

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.25},
    "lora": {"lora": True},
    "padded": {"vocab_size": 90},
    "all": {"bias": True, "softcap": 5.0, "scale": 2.0, "lora": True, "vocab_size": 90},
}


class Case:
    """Random inputs of one comparison, in float64 unless told."""

    def __init__(self, kind: str, trainable: bool, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(11)

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        options = dict(HEADS[kind])
        bias, lora = options.pop("bias", False), options.pop("lora", False)
        self.options = options | ({"lora_scale": 0.5} if lora else {})
        self.hidden = randn(N, d).requires_grad_()
        self.t2s = randn(N, d).requires_grad_()
        self.s2t = randn(M, D).requires_grad_()
        self.teacher = randn(M, D)
        self.teacher_weight = randn(U, D, scale=D**-0.5 * 2)
        self.head = [randn(V, d, scale=d**-0.5 * 2), None, None, None]
        if bias:
            self.head[1] = randn(V)
        if lora:
            self.head[2], self.head[3] = randn(4, d, scale=0.3), randn(V, 4, scale=0.3)
        if trainable:
            self.head = [None if t is None else t.requires_grad_() for t in self.head]
        limit = options.get("vocab_size", V)
        self.labels = torch.randint(limit, (N,), generator=generator)
        # Some projections must be right for the mask to matter.
        frozen = [None if t is None else t.detach() for t in self.head]
        right = naive.head_logits(self.t2s.detach(), *frozen, **self.options).argmax(-1)
        self.labels[::2] = right[::2]
        self.teacher_labels = torch.randint(U, (M,), generator=generator)

    def leaves(self) -> list[torch.Tensor]:
        return [
            self.hidden,
            self.t2s,
            self.s2t,
            *[t for t in self.head if t is not None and t.requires_grad],
        ]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, self.leaves()))

    def ours(self, settings: LossSettings):
        names = ("weight", "bias", "lora_A", "lora_B")
        head = OutputHead(**dict(zip(names, self.head, strict=True)), **self.options)
        return dual_space_loss(
            student_hidden=self.hidden,
            student_labels=self.labels,
            student_head=head,
            settings=settings,
            t2s_hidden=self.t2s,
            s2t_hidden=self.s2t,
            teacher_hidden=self.teacher,
            teacher_labels=self.teacher_labels,
            teacher_head=OutputHead(self.teacher_weight),
        )

    def naive(self, name: str, s: LossSettings) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        frozen = [None if t is None else t.detach() for t in self.head]
        terms = naive.dual_space(
            naive.head_logits(self.hidden, *self.head, **self.options),
            naive.head_logits(self.t2s, *frozen, **self.options),
            self.labels,
            naive.head_logits(self.teacher, self.teacher_weight),
            naive.head_logits(self.s2t, self.teacher_weight),
            name=name,
            temperature=s.temperature,
            mask_wrong=s.mask_wrong_projections,
        )
        student_space = terms["projector_ce"] + terms["student_space"]
        loss = (1 - s.kd_ratio) * terms["ce"] + s.kd_ratio * (
            s.student_space_weight * student_space + s.teacher_space_weight * terms["teacher_space"]
        )
        return terms, loss


def compare(case: Case, name: str, settings: LossSettings, tolerance: float) -> None:
    out = case.ours(settings)
    terms, loss = case.naive(name, settings)
    sums = out.sums()
    for term, expected in terms.items():
        assert float(sums[term]) == pytest.approx(float(expected), rel=tolerance), term
    assert float(out.loss) == pytest.approx(float(loss), rel=tolerance)
    pairs = zip(case.gradients(out.loss), case.gradients(loss), strict=True)
    for i, (found, expected) in enumerate(pairs):
        assert found.dtype == expected.dtype
        assert float((found - expected).norm()) <= tolerance * float(expected.norm()) + 1e-12, i


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [False, True])
def test_every_divergence_equals_the_plain_form(name: str, mask: bool):
    settings = LossSettings(
        make_divergence(name), kd_ratio=0.3, mask_wrong_projections=mask, chunk_tokens=5
    )
    compare(Case("plain", trainable=True), name, settings, 1e-9)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_equals_the_plain_form(kind: str, trainable: bool):
    settings = LossSettings(
        make_divergence("reverse_kl"),
        temperature=3.0,
        student_space_weight=0.7,
        teacher_space_weight=1.3,
        chunk_tokens=4,
    )
    compare(Case(kind, trainable), "reverse_kl", settings, 1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 13, 16, 4096])
def test_the_chunk_size_does_not_change_the_result(chunk: int):
    case = Case("all", trainable=True, dtype=torch.float32)
    one, other = (
        case.ours(LossSettings(make_divergence("js_divergence"), chunk_tokens=c))
        for c in (4096, chunk)
    )
    assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-6)
    pairs = zip(case.gradients(one.loss), case.gradients(other.loss), strict=True)
    for a, b in pairs:
        assert float((a - b).norm()) <= 2e-6 * float(a.norm())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_errs_no_more_than_the_plain_form_in_bfloat16(name: str):
    truth_case = Case("plain", trainable=False)
    case = Case("plain", trainable=False, dtype=torch.bfloat16)
    with torch.no_grad():  # the same rounded inputs on both sides
        truth_case.hidden.copy_(case.hidden)
        truth_case.t2s.copy_(case.t2s)
        truth_case.s2t.copy_(case.s2t)
        truth_case.teacher.copy_(case.teacher)
        truth_case.teacher_weight.copy_(case.teacher_weight)
        truth_case.head[0].copy_(case.head[0])
        truth_case.labels.copy_(case.labels)
    settings = LossSettings(make_divergence(name), chunk_tokens=8)
    _, truth = truth_case.naive(name, settings)
    _, plain = case.naive(name, settings)
    ours = case.ours(settings).loss
    truth_gradients = truth_case.gradients(truth)

    def errors(loss: torch.Tensor) -> list[float]:
        pairs = zip(case.gradients(loss), truth_gradients, strict=True)
        found = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        return [abs(float(loss) / float(truth) - 1), *found]

    # Gradients come out in bfloat16, which alone is off by up to 2^-9.
    for mine, theirs in zip(errors(ours), errors(plain), strict=True):
        assert mine <= max(theirs, 2**-8) * 1.1


def test_weight_zero_leaves_a_space_without_gradient():
    case = Case("plain", trainable=False)
    settings = LossSettings(make_divergence("forward_kl"), teacher_space_weight=0.0)
    _, _, s2t = case.gradients(case.ours(settings).loss)
    assert float(s2t.abs().max()) == 0.0


def test_kd_ratio_zero_is_plain_cross_entropy():
    case = Case("plain", trainable=True)
    settings = LossSettings(make_divergence("forward_kl"), kd_ratio=0.0)
    out = case.ours(settings)
    expected = torch.nn.functional.cross_entropy(
        case.hidden @ case.head[0].T, case.labels, reduction="sum"
    )
    torch.testing.assert_close(out.loss, expected)
    hidden, t2s, s2t, head = case.gradients(out.loss)
    torch.testing.assert_close(
        [hidden, head], list(torch.autograd.grad(expected, [case.hidden, case.head[0]]))
    )
    assert float(t2s.abs().max()) == float(s2t.abs().max()) == 0.0


def test_padding_rows_of_the_head_get_no_probability():
    case = Case("padded", trainable=True)
    with torch.no_grad():
        case.head[0][90:] = 1e4  # would swallow everything
    out = case.ours(LossSettings(make_divergence("forward_kl")))
    assert float(out.loss) < 1e3
    assert float(case.gradients(out.loss)[-1][90:].abs().max()) == 0.0


def test_no_gradients_are_computed_where_none_are_wanted():
    case = Case("plain", trainable=True)
    with torch.no_grad():
        out = case.ours(LossSettings(make_divergence("forward_kl")))
    assert not out.loss.requires_grad
    assert float(out.loss) == pytest.approx(
        float(case.ours(LossSettings(make_divergence("forward_kl"))).loss)
    )


def test_differentiating_twice_is_refused():
    case = Case("plain", trainable=False)
    out = case.ours(LossSettings(make_divergence("forward_kl")))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        out.loss.backward()


def test_automatic_chunks_are_powers_of_two_and_shrink_with_the_vocabulary():
    sizes = [auto_chunk_tokens(24 << 30, (3000, vocab)) for vocab in (3000, 50_000, 152_000)]
    assert all(s & (s - 1) == 0 for s in sizes)
    assert all(a >= b for a, b in pairwise(sizes))
    assert auto_chunk_tokens(1 << 20, (152_000,)) == 16
    assert auto_chunk_tokens(80 << 30, (100,)) == 4096
