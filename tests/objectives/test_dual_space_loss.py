"""The chunked closed-form loss against the plain one: terms and every gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from axolotl_dskd.losses import (
    DIVERGENCES,
    Budget,
    Divergence,
    Stream,
    elementwise,
    make_divergence,
)
from axolotl_dskd.objectives.dual_space.spaces import Terms
from axolotl_dskd.output_head import OutputHead
from tests.support import naive
from tests.support.dual_space import dual_space_loss

NAMES = DIVERGENCES
Settings = tuple[Terms, Budget]

N, M, d, D, V, U = 13, 17, 33, 21, 97, 61


def make_settings(divergence: Divergence, *, chunk_tokens: int = 256, **changes: Any) -> Settings:
    return Terms(divergence, **changes), Budget(chunk_tokens)


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
        #: Further arguments, the same for both forms.
        self.masks: dict[str, torch.Tensor] = {}

    def leaves(self) -> list[torch.Tensor]:
        return [
            self.hidden,
            self.t2s,
            self.s2t,
            *[t for t in self.head if t is not None and t.requires_grad],
        ]

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, self.leaves()))

    def ours(self, settings: Settings):
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
            **self.masks,
        )

    def naive(self, name: str, settings: Settings) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        s = settings[0]
        frozen = [None if t is None else t.detach() for t in self.head]
        terms = naive.dual_space(
            naive.head_logits(self.hidden, *self.head, **self.options),
            naive.head_logits(self.t2s, *frozen, **self.options),
            self.labels,
            naive.head_logits(self.teacher, self.teacher_weight),
            naive.head_logits(self.s2t, self.teacher_weight),
            name=name,
            temperature=s.temperature,
            mask_wrong=s.mask_wrong,
            **self.masks,
        )
        student_space = terms["projector_ce"] + terms["student_space"]
        loss = (1 - s.kd_ratio) * terms["ce"] + s.kd_ratio * (
            s.student_space_weight * student_space + s.teacher_space_weight * terms["teacher_space"]
        )
        return terms, loss


def compare(case: Case, name: str, settings: Settings, tolerance: float) -> None:
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
    settings = make_settings(make_divergence(name), kd_ratio=0.3, mask_wrong=mask, chunk_tokens=5)
    compare(Case("plain", trainable=True), name, settings, 1e-9)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_equals_the_plain_form(kind: str, trainable: bool):
    settings = make_settings(
        make_divergence("reverse_kl"),
        temperature=3.0,
        student_space_weight=0.7,
        teacher_space_weight=1.3,
        chunk_tokens=4,
    )
    compare(Case(kind, trainable), "reverse_kl", settings, 1e-9)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("mask_wrong", [False, True])
def test_masks_and_projector_labels_equal_the_plain_form(trainable: bool, mask_wrong: bool):
    case = Case("bias", trainable)
    targets = case.labels.roll(1)
    targets[::3] = case.labels[::3]
    targets[4] = -100
    case.masks = {
        "projector_labels": targets,
        "student_space_mask": (torch.arange(N) % 4 != 1) & (targets != -100),
        "teacher_space_mask": torch.arange(M) % 3 != 0,
    }
    settings = make_settings(
        make_divergence("skewed_forward_kl"), mask_wrong=mask_wrong, chunk_tokens=3
    )
    compare(case, "skewed_forward_kl", settings, 1e-9)
    out = case.ours(settings)
    # Only what is counted has a value.
    assert len(out.terms["student_space"].values) == int(case.masks["student_space_mask"].sum())
    assert len(out.terms["teacher_space"].values) == int(case.masks["teacher_space_mask"].sum())


@pytest.mark.parametrize("empty", ["student_space_mask", "teacher_space_mask"])
def test_a_mask_that_leaves_nothing_gives_cross_entropy_and_finite_zeros(empty: str):
    case = Case("plain", trainable=True)
    case.masks = {empty: torch.zeros(N if empty.startswith("student") else M, dtype=torch.bool)}
    compare(case, "forward_kl", make_settings(make_divergence("forward_kl"), chunk_tokens=4), 1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 13, 16, 4096])
def test_the_chunk_size_does_not_change_the_result(chunk: int):
    case = Case("all", trainable=True, dtype=torch.float32)
    one, other = (
        case.ours(make_settings(make_divergence("js_divergence"), chunk_tokens=c))
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
    settings = make_settings(make_divergence(name), chunk_tokens=8)
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


@pytest.mark.parametrize("trainable", [False, True])
def test_a_head_in_bfloat16_errs_no_more_than_the_plain_form(trainable: bool):
    # Its gradient is accumulated over chunks, in float32.
    truth_case, case = Case("all", trainable), Case("all", trainable, torch.bfloat16)
    with torch.no_grad():
        for name in ("hidden", "t2s", "s2t", "teacher", "teacher_weight", "labels"):
            getattr(truth_case, name).copy_(getattr(case, name))
        for exact, rounded in zip(truth_case.head, case.head, strict=True):
            exact.copy_(rounded)
    settings = make_settings(make_divergence("forward_kl"), chunk_tokens=2)
    truth = truth_case.gradients(truth_case.naive("forward_kl", settings)[1])

    def errors(loss: torch.Tensor) -> list[float]:
        found = zip(case.gradients(loss), truth, strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in found]

    ours, plain = case.ours(settings).loss, case.naive("forward_kl", settings)[1]
    for mine, theirs in zip(errors(ours), errors(plain), strict=True):
        assert mine <= max(theirs, 2**-8) * 1.1


@pytest.mark.parametrize("name", NAMES)
def test_a_large_vocabulary_in_bfloat16_errs_no_more_than_the_plain_form(name: str):
    # Elementwise, from given bfloat16 logits: the terms and the gradients of the logits.
    vocabulary = 151_936
    generator = torch.Generator().manual_seed(3)
    z, u = (3 * torch.randn(2, vocabulary, generator=generator) for _ in range(2))
    z, u = z.bfloat16(), u.bfloat16()
    labels = torch.tensor([17, 151_900])

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [z.clone().requires_grad_(), u.clone().requires_grad_()]
        wide = [x.to(dtype) for x in leaves]
        terms = naive.dual_space(
            *wide, labels, wide[0], wide[0], name=name, temperature=2.0, mask_wrong=False
        )
        loss = terms["ce"] + terms["projector_ce"] + terms["student_space"]
        # In float64 the leaves' gradients would be rounded to bfloat16 on their way.
        grads = torch.autograd.grad(loss, wide if dtype == torch.float64 else leaves)
        return [terms["student_space"], terms["ce"], *grads]

    student, projected = z.clone(), u.clone()
    head = OutputHead(torch.zeros(vocabulary, 1))
    terms = elementwise.pair_terms(
        student,
        projected,
        labels,
        labels,
        (head, head),
        make_divergence(name),
        elementwise.Weights(ce=1.0, source_ce=1.0, divergence=1.0, temperature=2.0),
    )
    ours = [terms.divergence.sum(), terms.ce.sum(), student, projected]
    for mine, theirs, truth in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        error, allowed = ((x.double() - truth).norm() for x in (mine, theirs))
        # Both values are float32 sums of 150,000 terms, which differ in their last bits.
        assert float(error) <= 1.02 * float(allowed) + 4e-6 * float(truth.norm())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("situation", ["huge", "one token", "equal", "opposite"])
def test_gradients_stay_finite_in_extreme_situations(name: str, situation: str):
    case = Case("plain", trainable=True, dtype=torch.float32)
    with torch.no_grad():
        if situation == "huge":  # logits up to about ±1e4
            for states in (case.hidden, case.t2s, case.s2t, case.teacher):
                states *= 1e3
        elif situation == "one token":  # the student puts all mass on one token
            case.hidden *= 1e3
        elif situation == "equal":
            case.t2s.copy_(case.hidden)
            case.teacher, case.s2t = case.teacher[:M], case.teacher.clone().requires_grad_()
        else:
            case.t2s.copy_(-1e3 * case.hidden)
            case.hidden *= 1e3
    for mask in (False, True):
        out = case.ours(make_settings(make_divergence(name), mask_wrong=mask))
        assert all(torch.isfinite(g).all() for g in case.gradients(out.loss))
        for term in ("ce", "projector_ce", "student_space", "teacher_space"):
            assert torch.isfinite(out.terms[term].values).all()
            assert float(out.terms[term].values.min()) >= -1e-6, term


def test_float16_keeps_the_small_gradients_of_a_large_vocabulary():
    # Of a student close to its teacher most gradients of logits are below 6e-8, float16's least.
    vocabulary, width = 151_936, 8
    generator = torch.Generator().manual_seed(9)
    t2s, step = (0.1 * torch.randn(3, width, generator=generator) for _ in range(2))
    hidden = t2s + 0.02 * step
    head = torch.randn(vocabulary, width, generator=generator).half()
    labels = torch.tensor([5, 60_000, 151_000])
    settings = make_settings(make_divergence("forward_kl"), kd_ratio=1.0, teacher_space_weight=0.0)

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        states = hidden.half().to(dtype).requires_grad_()
        out = dual_space_loss(
            student_hidden=states,
            student_labels=labels,
            student_head=OutputHead(head.to(dtype)),
            settings=settings,
            t2s_hidden=t2s.half().to(dtype),
        )
        return torch.autograd.grad(out.loss * 1024.0, states)[0].double()  # as a scaler does

    truth = gradient(torch.float64)
    assert float((gradient(torch.float16) - truth).norm() / truth.norm()) < 0.05


def test_weight_zero_leaves_a_space_without_gradient():
    case = Case("plain", trainable=False)
    settings = make_settings(make_divergence("forward_kl"), teacher_space_weight=0.0)
    _, _, s2t = case.gradients(case.ours(settings).loss)
    assert float(s2t.abs().max()) == 0.0


def test_kd_ratio_zero_is_plain_cross_entropy():
    case = Case("plain", trainable=True)
    settings = make_settings(make_divergence("forward_kl"), kd_ratio=0.0)
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
    out = case.ours(make_settings(make_divergence("forward_kl")))
    assert float(out.loss) < 1e3
    assert float(case.gradients(out.loss)[-1][90:].abs().max()) == 0.0


def test_no_gradients_are_computed_where_none_are_wanted():
    case = Case("plain", trainable=True)
    with torch.no_grad():
        out = case.ours(make_settings(make_divergence("forward_kl")))
    assert not out.loss.requires_grad
    assert float(out.loss) == pytest.approx(
        float(case.ours(make_settings(make_divergence("forward_kl"))).loss)
    )


def test_differentiating_twice_is_refused():
    case = Case("plain", trainable=False)
    out = case.ours(make_settings(make_divergence("forward_kl")))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        out.loss.backward()


def test_automatic_chunks_are_powers_of_two_and_shrink_with_the_vocabulary():
    def size(memory: int, vocabulary: int) -> int:
        head = OutputHead(torch.empty((vocabulary, 1), device="meta"))
        stream = Stream(torch.empty((5, 1), device="meta"), head)
        return Budget(memory=memory).size(stream, stream)

    sizes = [size(24 << 30, vocabulary) for vocabulary in (3000, 50_000, 152_000)]
    assert all(s & (s - 1) == 0 for s in sizes)
    assert all(a >= b for a, b in pairwise(sizes))
    assert size(1 << 20, 152_000) == 16
    assert size(80 << 30, 100) == 4096
