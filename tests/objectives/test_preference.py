"""Preference distillation: published numbers, and which pairs are compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_dskd.config import PreferenceConfig
from axolotl_dskd.losses import Budget
from axolotl_dskd.objectives import Facts, Setting
from axolotl_dskd.objectives.preference import Preference
from axolotl_dskd.objectives.preference.watch import FallWatch
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import LossOutput, Matches, Side, View, Written
from tests.support import tiny
from tests.support.golden_methods import files

Numbers = dict[str, Tensor]
NO_PAIRS = torch.zeros((0, 2), dtype=torch.long)
NO_MATCHES = Matches(*(NO_PAIRS,) * 4, NO_PAIRS[:, 0], NO_PAIRS[:, 0])


def read(path: Path) -> Numbers:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}


def preference(one_vocabulary: bool = False, kd_ratio: float = 1.0, **keys: Any) -> Preference:
    student = tiny.byte_level_tokenizer()
    teacher = student if one_vocabulary else tiny.sentencepiece_tokenizer()
    facts = Facts(student, teacher, (len(student), len(teacher)))
    setting = Setting(kd_ratio, Budget(4), written=True)
    return Preference(PreferenceConfig(**keys), facts, setting)


def view_of(logits: Tensor, labels: Tensor, written: Written | None = None) -> View:
    """Supervised tokens of rows whose states are their logits, [B, L, V] and [B, L]."""
    mask = labels != -100
    rows = torch.arange(len(labels))[:, None].expand_as(labels)[mask]
    head = OutputHead(torch.eye(logits.shape[-1], dtype=logits.dtype))
    tokens = Side(torch.zeros_like(rows), labels[mask], rows)
    return View(tokens, head, logits[mask], written=written)


def saying(logprobs: Tensor, mask: Tensor) -> View:
    """Tokens over two ids, of which id 0 is said with these log-probabilities, [B, L]."""
    logprobs = logprobs.double()
    logits = torch.stack([logprobs, torch.log1p(-logprobs.exp())], -1)
    return view_of(logits, torch.where(mask.bool(), 0, -100))


def pairs_of(samples: int, pairs: list[tuple[int, int]], tokens: int) -> Written:
    others = torch.zeros(samples, dtype=torch.bool)
    others[[b for _, b in pairs]] = True
    return Written(others, torch.zeros(tokens), None, torch.tensor(pairs).view(-1, 2))


# ---- published numbers ---------------------------------------------------------------------


def test_the_golden_files_are_there():
    assert len(files("dpkd-token")) >= 3
    assert len(files("dpkd-sequence")) >= 3


VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1},
    "reference_free": {"reference_free": True},
    "ipo": {"loss": "ipo"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", files("dpkd-token"), ids=lambda p: p.stem)
def test_the_token_form_equals_the_published_one_in_float32(path: Path, variant: str):
    z = read(path)
    logits = z["student_logits"].clone().requires_grad_()
    student, teacher = view_of(logits, z["labels"]), view_of(z["teacher_logits"], z["labels"])
    pairs = torch.arange(len(student))[:, None].expand(-1, 2)
    nothing = torch.zeros(0, dtype=torch.long)
    matches = Matches(NO_PAIRS, NO_PAIRS, pairs, pairs, nothing, nothing)
    objective = preference(one_vocabulary=True, form="token", **VARIANTS[variant])
    out = objective(student, teacher, matches)
    found = float(out.loss.detach()) / out.tokens
    assert found == pytest.approx(float(z[f"out_{variant}"]), abs=1e-5 if found > 10 else 1e-6)
    (gradient,) = torch.autograd.grad(out.loss / out.tokens, logits)
    torch.testing.assert_close(gradient, z[f"grad_{variant}"], atol=1e-6, rtol=1e-5)
    untouched = float(z[f"out_bf16_{variant}"])
    assert found == pytest.approx(untouched, rel=5e-3)


def test_published_code_errs_in_bfloat16():
    published = [(read(p)["out_sigmoid"], read(p)["out_bf16_sigmoid"]) for p in files("dpkd-token")]
    assert max(abs(float(a) - float(b)) for a, b in published) > 1e-3


@pytest.mark.parametrize("form", ["sigmoid_beta0.1", "sigmoid_norm_beta2"])
@pytest.mark.parametrize("path", files("dpkd-sequence"), ids=lambda p: p.stem)
def test_the_sequence_form_equals_dpo_with_the_teacher_as_reference(path: Path, form: str):
    """Its mean over pairs; a pair of ours counts by its tokens."""
    z = read(path)
    logits = z["student_logits"].double().requires_grad_()
    both = [(k, k + 3) for k in range(3)]
    tokens = int((z["labels"] != -100).sum())
    student = view_of(logits, z["labels"], pairs_of(6, both, tokens))
    teacher = saying(z["teacher_token_logprobs"], z["teacher_token_mask"])
    objective = preference(length_norm="norm" in form)
    out = objective(student, teacher, NO_MATCHES)
    term = out.terms["preference"]
    costs = [term.values[term.sample_ids == k] for k in range(6)]
    for a, b in both:
        assert len(torch.cat([costs[a], costs[b]]).unique()) == 1
    mean = sum(float(costs[a][0]) for a, _ in both) / 3
    assert mean == pytest.approx(float(z[f"out_{form}"]), abs=1e-6)
    weighted = sum(len(costs[a]) * costs[a][0] + len(costs[b]) * costs[b][0] for a, b in both)
    assert float(out.loss.detach()) == pytest.approx(float(weighted), rel=1e-9)
    # A pair's gradient over its tokens is what the published mean is of.
    (gradient,) = torch.autograd.grad(out.loss, logits)
    for a, b in both:
        count = len(costs[a]) + len(costs[b])
        for row in (a, b):
            published = 3 * z[f"grad_{form}"][row].double()
            torch.testing.assert_close(gradient[row] / count, published, atol=1e-6, rtol=1e-5)


# ---- pairs ---------------------------------------------------------------------------------


def answers(*labels: list[int], pairs: list[tuple[int, int]]) -> tuple[View, View]:
    """Both sides say the same with random logits over 7 ids."""
    generator = torch.Generator().manual_seed(1)
    width = max(len(row) for row in labels)
    table = torch.full((len(labels), width), -100)
    for k, row in enumerate(labels):
        table[k, : len(row)] = torch.tensor(row, dtype=torch.long)
    logits = torch.randn(2, len(labels), width, 7, generator=generator, dtype=torch.float64)
    written = pairs_of(len(labels), pairs, sum(len(row) for row in labels))
    student = logits[0].requires_grad_()
    return view_of(student, table, written), view_of(logits[1], table)


def run(objective: Preference, views: tuple[View, View]) -> LossOutput:
    return objective(*views, NO_MATCHES)


def loss_of(objective: Preference, views: tuple[View, View]) -> float:
    return float(run(objective, views).loss.detach())


def test_empty_and_equal_pairs_are_counted_and_left_out():
    views = answers([1, 2], [1, 2], [3, 4], [], [5], [6], [1, 2], [1, 3], pairs=PAIRS)
    out = run(preference(), views)
    assert out.terms["left_out"].values.tolist() == [1, 1, 0, 0]
    assert out.terms["left_out"].sample_ids.tolist() == [0, 2, 4, 6]
    assert len(out.terms["won"].values) == 2
    assert out.terms["aligned"].values.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    alone = run(preference(), answers([1, 2], [1, 2], [3, 4], [], pairs=PAIRS[:2]))
    assert float(alone.loss.detach()) == 0 == float(alone.sums()["preference"])


PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_an_answer_may_be_in_several_pairs():
    labels = [1, 2], [3, 4, 5], [6]
    both = loss_of(preference(), answers(*labels, pairs=[(0, 1), (0, 2)]))
    each = [loss_of(preference(), answers(*labels, pairs=[p])) for p in ((0, 1), (0, 2))]
    assert both == pytest.approx(sum(each), rel=1e-9)


def test_preferred_answers_have_cross_entropy_whoever_wrote_them():
    student, teacher = answers([1, 2], [3, 4, 5], [6], pairs=[(0, 1)])
    assert student.written is not None
    everyone = torch.ones(3, dtype=torch.bool)  # the teacher wrote the preferred one just now
    student = replace(student, written=replace(student.written, samples=everyone))
    out = run(preference(kd_ratio=0.5), (student, teacher))
    assert out.terms["ce"].sample_ids.tolist() == [0, 0]


def test_the_gradient_raises_the_preferred_answer_and_lowers_the_other():
    views = answers([1, 2], [3, 4, 5], pairs=[(0, 1)])
    hidden = views[0].hidden
    assert hidden is not None
    (gradient,) = torch.autograd.grad(run(preference(), views).loss, hidden)
    labels = views[0].tokens.labels
    of_labels = gradient[torch.arange(5), labels]
    assert (of_labels[:2] < 0).all()
    assert (of_labels[2:] > 0).all()


@pytest.mark.parametrize(
    ("setting", "keys", "words"),
    [
        ({}, {}, "answers that the student writes"),
        ({"written": True}, {"form": "token"}, "one vocabulary"),
    ],
)
def test_what_it_cannot_learn_from_is_refused_in_words(
    setting: dict[str, bool], keys: dict[str, Any], words: str
):
    tokenizers = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
    facts = Facts(*tokenizers, (len(tokenizers[0]), len(tokenizers[1])))
    with pytest.raises(ValueError, match=words):
        Preference(PreferenceConfig(**keys), facts, Setting(**setting))


def test_answers_without_one_to_prefer_are_refused_in_words():
    """Else nothing would be learned, and nobody would know."""
    student, teacher = answers([1, 2], [3, 4], pairs=[(0, 1)])
    assert student.written is not None
    alone = replace(student, written=replace(student.written, pairs=None))
    with pytest.raises(ValueError, match="a preferred answer beside each"):
        run(preference(), (alone, teacher))
    data = replace(student, written=None)  # evaluation
    assert loss_of(preference(), (data, teacher)) == 0


# ---- a warning -----------------------------------------------------------------------------


@pytest.mark.parametrize(("fall", "warns"), [((0.5, 0.5), True), ((0.5, -0.5), False)])
def test_it_is_said_once_when_both_answers_become_less_likely(
    fall: tuple[float, float], warns: bool
):
    watch = FallWatch()
    names = "logprob_preferred", "logprob_other"
    said = [
        watch.remark({n: -1.0 - f * log / 40 for n, f in zip(names, fall, strict=True)})
        for log in range(40)
    ]
    assert sum(text is not None for text in said) == warns
    assert watch.remark({"ce": 1.0}) is None  # a log without pairs


@pytest.mark.parametrize("key", ["margin", "label_smoothing"])
def test_ipo_has_a_target_of_its_own(key: str):
    with pytest.raises(ValueError, match="ipo has a target of its own"):
        PreferenceConfig(loss="ipo", **{key: 0.1})


def test_beta_goes_with_what_is_divided_by():
    assert PreferenceConfig(beta="auto").strength == PreferenceConfig().strength == 2.0
    assert PreferenceConfig(length_norm=False).strength == 0.1
    assert PreferenceConfig(form="token").strength == 0.1
    assert PreferenceConfig(beta=0.7).strength == 0.7
    with pytest.raises(ValueError, match="greater than 0"):
        PreferenceConfig(beta=0.0)
