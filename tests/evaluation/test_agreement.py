"""How far the student is from the teacher: against whole distributions, and what chunks change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from axolotl_dskd.evaluation.agreement import TeacherAgreement
from axolotl_dskd.losses import Budget
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Side, View

V, N = 31, 40
PAIRS = torch.stack([torch.arange(N)[::2], torch.arange(N)[1::2]], 1)


def view(vocabulary: int, width: int, seed: int) -> View:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(N, dtype=torch.long)
    head = OutputHead(torch.randn(vocabulary, width, generator=generator))
    return View(
        Side(ids, ids, torch.arange(N) // 10), head, torch.randn(N, width, generator=generator)
    )


def probabilities(view: View, rows: torch.Tensor) -> torch.Tensor:
    return view.head.logits(view.hidden[rows]).double().softmax(-1)


@pytest.mark.parametrize("tokens", [16, None])
def test_over_one_vocabulary_it_is_the_whole_divergence(tokens: int | None):
    student, teacher = view(V, 8, 0), view(V, 12, 1)
    found = TeacherAgreement((range(V), range(V)), Budget(tokens))(student, teacher, PAIRS)
    q, p = probabilities(student, PAIRS[:, 0]), probabilities(teacher, PAIRS[:, 1])
    kl, same = (p * (p / q).log()).sum(-1), p.argmax(-1) == q.argmax(-1)
    torch.testing.assert_close(found["teacher_kl"].values.double(), kl, rtol=1e-5, atol=1e-5)
    assert found["teacher_agreement"].values.tolist() == same.float().tolist()
    assert found["teacher_kl"].sample_ids.tolist() == (PAIRS[:, 0] // 10).tolist()


def test_what_one_vocabulary_has_alone_is_one_outcome_and_no_agreement():
    student, teacher = view(V, 8, 0), view(V + 9, 12, 1)
    ours, theirs = list(range(5, 25)), list(range(29, 9, -1))
    found = TeacherAgreement((ours, theirs), Budget())(student, teacher, PAIRS)
    q, p = probabilities(student, PAIRS[:, 0]), probabilities(teacher, PAIRS[:, 1])
    first = dict(zip(ours, theirs, strict=True))
    same = [
        first.get(a) == b for a, b in zip(q.argmax(-1).tolist(), p.argmax(-1).tolist(), strict=True)
    ]
    q, p = q[:, ours], p[:, theirs]
    kl = (p * (p / q).log()).sum(-1)
    rest_q, rest_p = 1 - q.sum(-1), 1 - p.sum(-1)
    kl += rest_p * (rest_p / rest_q).log()
    torch.testing.assert_close(found["teacher_kl"].values.double(), kl, rtol=1e-4, atol=1e-5)
    agreed = found["teacher_agreement"].values.bool()
    assert not bool((agreed & ~torch.tensor(same)).any())


def test_an_end_of_turn_that_is_not_the_students_end_is_left_out():
    student, teacher = view(V, 8, 0), view(V + 9, 12, 1)
    ends = 3, 7
    labels = student.tokens.labels.clone(), teacher.tokens.labels.clone()
    # Both ends, the teacher's alone, the student's alone, then text.
    for pair, which in enumerate(((0, 1), (1,), (0,))):
        for side in which:
            labels[side][PAIRS[pair, side]] = ends[side]
    views = [
        replace(one, tokens=replace(one.tokens, labels=ids))
        for one, ids in zip((student, teacher), labels, strict=True)
    ]
    shared = [ends[0], *range(10, 20)], [ends[1], *range(10, 20)]
    every = TeacherAgreement(shared, Budget())(*views, PAIRS)
    found = TeacherAgreement(shared, Budget(), [ends])(*views, PAIRS)
    for name, term in found.items():
        kept = [0, *range(3, len(PAIRS))]
        assert term.values.tolist() == every[name].values[kept].tolist()
        assert term.sample_ids.tolist() == every[name].sample_ids[kept].tolist()


def test_a_batch_without_pairs_has_no_values():
    student, teacher = view(V, 8, 0), view(V, 12, 1)
    found = TeacherAgreement((range(V), range(V)), Budget())(student, teacher, PAIRS[:0])
    assert [len(term.values) for term in found.values()] == [0, 0]
