"""Sinkhorn distillation: against its plain form, and against published numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from axolotl_dskd.config import DSKDConfig, SinkhornConfig
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import sinkhorn
from axolotl_dskd.objectives.base import Facts, Setting
from axolotl_dskd.objectives.sinkhorn import Sinkhorn, l1_cost, l1_cost_backward, transport
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Matches, Side, View
from tests.support import tiny
from tests.support.plain_forms import sinkhorn_distances
from tests.support.views import HEADS, RandomPair, no_tokens

DATA = Path(__file__).parents[1] / "data" / "golden" / "methods"
FILES = sorted(Path(os.environ.get("DSKD_GOLDEN_METHODS_DIR") or DATA).glob("sinkd-*.npz"))
V, U = 400, 600
R = 0.4


def plain_kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return (torch.xlogy(p, p) - p * q.log()).sum(-1)


def objective(
    pair: RandomPair, *, one: bool = True, chunk: int = 64, kd_ratio: float = R, **keys: Any
) -> Sinkhorn:
    ours, theirs = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    facts = Facts(ours, ours if one else theirs, (V, V if one else U))
    made = Sinkhorn(SinkhornConfig(**keys), facts, Setting(kd_ratio, Budget(chunk)))
    made.begin(pair.begun())
    return made


def same_vocabulary(kind: str = "plain", dtype: torch.dtype = torch.float64) -> RandomPair:
    """A pair whose exact tokens have one label."""
    pair = RandomPair(V, V, kind, dtype)
    i, j = pair.matches.exact.unbind(1)
    pair.sides[1].labels[j] = pair.sides[0].labels[i]
    return pair


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("keys", [{}, {"kl_weight": 0.0, "weight": 1.5}, {"weight": 3.0}])
def test_loss_and_gradients_equal_the_plain_form_in_every_chunk_size(kind: str, keys: dict):
    pair = same_vocabulary(kind)
    i, j = pair.matches.exact.unbind(1)
    z, t = (h.logits(x) for h, x in zip(pair.heads, pair.hidden, strict=True))
    q, p = (z / 2).softmax(-1)[i], (t / 2).softmax(-1)[j].detach()
    samples = pair.sides[0].sample_ids[i]
    assert set(samples.tolist()) == {0, 1}
    distance = sinkhorn_distances(q, p, samples)
    config = SinkhornConfig(**keys)
    expected = (1 - R) * F.cross_entropy(z, pair.sides[0].labels, reduction="sum")
    expected = expected + R * (config.kl_weight * plain_kl(q, p).sum() + config.weight * distance)
    for chunk in (1, 3, 64):
        made = objective(pair, chunk=chunk, **keys)
        out = made(*pair.views(), pair.matches)
        torch.testing.assert_close(out.loss, expected)
        found = pair.gradients(out.loss)
        plain = torch.autograd.grad(expected, pair.leaves, retain_graph=True)
        for ours, theirs in zip(found, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert out.terms.keys() <= made.terms.keys()
        assert float(out.sums()["sinkhorn"]) == pytest.approx(float(distance.detach()))
        assert float(out.sums()["aligned"]) == len(i) == len(out.terms["plan_diagonal"].values)


@pytest.mark.parametrize("alignment", ["eta", "cma"])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_across_tokenizers_the_projected_teacher_is_compared(alignment: str, kind: str):
    pair = RandomPair(V, U, kind)
    # Some of the teacher's choices are its labels, so that they are the student's to say.
    choices = pair.heads[1].logits(pair.hidden[1]).argmax(-1)
    pair.sides[1].labels[::2] = choices[::2].detach()
    made = objective(pair, one=False, alignment=alignment, kl_weight=0.7, weight=1.5)
    made.module.double()
    views = pair.views(embeddings=True)
    exchanged, targets = made._tokens.exchange(*views, pair.matches)
    rows = torch.arange(13) if exchanged.student_rows is None else exchanged.student_rows
    projected = exchanged.t2s
    if targets is not None:
        rows, projected = rows[targets >= 0], projected[targets >= 0]
        targets = targets[targets >= 0]
        assert 1 < len(rows) < 13
    else:
        targets = pair.sides[0].labels
    z = pair.heads[0].logits(pair.hidden[0])
    frozen = RandomPair(V, U, kind)  # the same head, which the projected teacher does not train
    for tensor in frozen.heads[0].trained():
        tensor.requires_grad_(False)
    u = frozen.heads[0].logits(projected)
    q, p = (z / 2).softmax(-1)[rows], (u / 2).softmax(-1).detach()
    right = (u.argmax(-1) == targets) if alignment == "cma" else torch.ones(len(u))
    samples = pair.sides[0].sample_ids[rows]
    distance = sinkhorn_distances(q, p, samples)
    expected = (1 - R) * F.cross_entropy(z, pair.sides[0].labels, reduction="sum") + R * (
        0.7 * (plain_kl(q, p) * right).sum()
        + F.cross_entropy(u, targets, reduction="sum")
        + 1.5 * distance
    )
    out = made(*views, pair.matches)
    torch.testing.assert_close(out.loss, expected)
    leaves = [*pair.leaves, made.module.t2s.weight]
    found = torch.autograd.grad(out.loss, leaves)
    for ours, theirs in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert out.terms.keys() == made.terms.keys() - {"teacher_accuracy"}


def test_a_sample_does_not_depend_on_the_others():
    pair = same_vocabulary()
    made = objective(pair, weight=1.0)
    both = made(*pair.views(), pair.matches).terms["sinkhorn"]
    i = pair.matches.exact[:, 0]
    for sample in (0, 1):
        mine = pair.sides[0].sample_ids[i] == sample
        alone = pair.matches.exact[mine]
        matches = Matches(*([pair.matches.spans] * 2), alone, alone, *([i] * 2))
        one = made(*pair.views(), matches).terms["sinkhorn"]
        torch.testing.assert_close(one.values, both.values[both.sample_ids == sample])


def test_slices_of_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 37, generator=generator, dtype=torch.float64)
    q, p = logits.softmax(-1)
    q.requires_grad_()
    slope = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    expected = (q[:, None] - p[None]).abs().sum(-1)
    (gradient,) = torch.autograd.grad(expected, q, slope)
    for numbers in (1, 36 * 5, 1 << 24):
        monkeypatch.setattr(sinkhorn, "_NUMBERS", numbers)
        torch.testing.assert_close(l1_cost(q.detach(), p), expected.detach())
        torch.testing.assert_close(l1_cost_backward(q.detach(), p.clone(), slope), gradient)


def test_log_space_does_not_underflow():
    cost = 2 * torch.rand(7, 7, generator=torch.Generator().manual_seed(2))
    plan, slope = transport(cost, 1e-3, 200)
    torch.testing.assert_close(plan.sum(0), torch.ones(7))
    assert slope is not None and slope.isfinite().all()
    assert (-cost / 1e-3).exp().sum(0).min() == 0  # what would be divided by


def test_without_gradients_there_is_the_same_loss():
    pair = same_vocabulary()
    made = objective(pair, weight=1.0)
    loss = made(*pair.views(), pair.matches).loss
    with torch.no_grad():
        torch.testing.assert_close(made(*pair.views(), pair.matches).loss, loss.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_give_what_float64_gives(dtype: torch.dtype):
    narrow, exact = same_vocabulary("all", dtype), same_vocabulary("all")
    for some, other in zip(exact.heads, narrow.heads, strict=True):
        some.tensors = [None if t is None else t.detach().double() for t in other.tensors]
    with torch.no_grad():
        for k in (0, 1):
            exact.hidden[k].copy_(narrow.hidden[k])
    exact.leaves = [exact.hidden[0], *exact.heads[0].trained()]
    losses = [
        objective(pair, weight=1.0)(*pair.views(), pair.matches).loss for pair in (narrow, exact)
    ]
    assert losses[0].dtype == torch.float32
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=2e-2)
    for ours, truth in zip(narrow.gradients(losses[0]), exact.gradients(losses[1]), strict=True):
        assert ours.dtype == dtype
        assert (ours - truth).norm() < 6e-2 * truth.norm()


@pytest.mark.parametrize("one", [True, False])
def test_a_batch_without_tokens_has_the_loss_zero(one: bool):
    pair = no_tokens(V, V if one else U)
    out = objective(pair, one=one, alignment="eta")(*pair.views(), pair.matches)
    assert float(out.loss.detach()) == 0.0 and out.tokens == 0
    assert all(float(g.abs().sum()) == 0.0 for g in pair.gradients(out.loss))


def test_a_batch_where_no_tokens_meet_has_its_cross_entropy():
    pair = RandomPair(V, V)
    pair.sides[1].labels[:] = 0
    pair.sides[0].labels[:] = 1
    out = objective(pair)(*pair.views(), pair.matches)
    sums = out.sums()
    assert float(out.loss.detach()) == pytest.approx((1 - R) * float(sums["ce"]))
    assert float(sums["sinkhorn"]) == 0.0


def test_a_sample_beyond_the_limit_is_refused_and_the_key_named():
    pair = same_vocabulary()
    most = int(pair.sides[0].sample_ids[pair.matches.exact[:, 0]].bincount().max())
    assert objective(pair, max_tokens=most)(*pair.views(), pair.matches).tokens == 13
    with pytest.raises(ValueError, match=rf"{most} supervised.*Raise dskd.objective.max_tokens"):
        objective(pair, max_tokens=most - 1)(*pair.views(), pair.matches)


@pytest.mark.parametrize(
    ("keys", "word"),
    [({"epsilon": 0}, "epsilon"), ({"iterations": 0}, "iterations"), ({"alignment": "x"}, "eta")],
)
def test_a_value_out_of_its_bounds_is_refused(keys: dict, word: str):
    with pytest.raises(ValidationError, match=word):
        SinkhornConfig(**keys)


def test_answers_that_may_be_written_longer_than_the_limit_are_refused_before_training():
    def block(most: int) -> dict[str, Any]:
        samples = {"from": "student", "max_new_tokens": most}
        keys = {"name": "sinkhorn", "max_tokens": 300}
        return {"teacher": {"base_model": "x"}, "objective": keys, "samples": samples}

    assert DSKDConfig.model_validate(block(300))
    with pytest.raises(ValidationError, match=r"300 at most, but the student may write 301"):
        DSKDConfig.model_validate(block(301))


def test_weights_of_zero_are_refused():
    block = {"name": "sinkhorn", "weight": 0, "kl_weight": 0}
    with pytest.raises(ValidationError, match="weight and kl_weight are both 0"):
        DSKDConfig.model_validate({"teacher": {"base_model": "x"}, "objective": block})


def test_what_is_compared_is_said():
    assert "the teacher's distributions" in objective(same_vocabulary()).describe()
    across = objective(RandomPair(V, U), one=False).describe()
    assert "the projected teacher's" in across and "cross-model attention" in across


class Golden:
    """A file's distributions; a head that is the identity gives its logits."""

    def __init__(self, path: Path) -> None:
        self.numbers = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
        self.mask = self.numbers["student_labels"] != -100
        self.logits = self.numbers["student_logits"].double().requires_grad_()

    def loss(self, by_sample: bool) -> Any:
        """The distance alone, over each sample, or over the batch as if it were one."""
        mask = self.mask
        ids = torch.arange(len(mask))[:, None].expand_as(mask)[mask] * by_sample
        labels = self.numbers["student_labels"][mask]
        tokens = Side(labels, labels, ids)
        size = self.logits.shape[-1]
        head = OutputHead(torch.eye(size, dtype=torch.float64))
        teacher = self.numbers["teacher_logits"].double()
        views = [View(tokens, head, logits[mask]) for logits in (self.logits, teacher)]
        rows = torch.arange(len(labels))
        pairs = rows[:, None].expand(-1, 2)
        matches = Matches(pairs, pairs, pairs, pairs, rows, rows)
        config = SinkhornConfig(weight=0.001, kl_weight=0.0)
        tokenizer = tiny.byte_level_tokenizer()
        setting = Setting(1.0, Budget(4))
        return Sinkhorn(config, Facts(tokenizer, tokenizer, (size, size)), setting)(*views, matches)


def test_the_golden_files_are_there():
    assert len(FILES) >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("by_sample", [True, False], ids=["sample", "batch"])
def test_loss_and_gradient_equal_the_published_ones(path: Path, by_sample: bool):
    golden = Golden(path)
    out = golden.loss(by_sample)
    out.loss.backward()
    name = "sample" if by_sample else "batch"
    expected = float(golden.numbers[f"out_{name}"].sum())
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-9)
    published = golden.numbers[f"grad_{name}"]
    torch.testing.assert_close(golden.logits.grad, published, rtol=1e-7, atol=1e-12)
    if not by_sample:
        diagonal = golden.numbers["plan"].diagonal()
        torch.testing.assert_close(out.terms["plan_diagonal"].values, diagonal)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_published_distance_depends_on_the_batch(path: Path):
    """Published: over the rows of a batch. Ours: over those of a sample; the numbers differ."""
    numbers = Golden(path).numbers
    batch, samples = float(numbers["out_batch"]), float(numbers["out_sample"].sum())
    ours = float(Golden(path).loss(by_sample=True).loss.detach())
    assert ours == pytest.approx(samples, rel=1e-9)
    assert abs(batch - ours) > 0.01 * ours, (batch, ours)
