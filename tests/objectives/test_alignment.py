"""Alignment: nothing but a sample's own tokens decides its projected states."""

from __future__ import annotations

import pytest
import torch

from axolotl_dskd.objectives.base import equal_ids
from axolotl_dskd.objectives.dual_space.align import (
    exchange_by_attention,
    exchange_pairs,
    sample_std,
)
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.types import Side, View
from tests.support.waits import Waits

d, D = 6, 10


def sample(seed: int, n: int, m: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "student": randn(n, d),
        "student_x": randn(n, d),
        "student_y": randn(n, d),
        "teacher": randn(m, D),
        "teacher_x": randn(m, D),
        "teacher_y": randn(m, D),
    }


def aligned(samples: list[dict[str, torch.Tensor]], counted: bool = False):
    def column(name: str) -> torch.Tensor:
        return torch.cat([s[name] for s in samples])

    def side(name: str) -> Side:
        sample_ids = torch.cat([torch.full((len(s[name]),), i) for i, s in enumerate(samples)])
        nothing = torch.zeros(len(sample_ids), dtype=torch.long)
        counts = tuple(len(s[name]) for s in samples)
        return Side(nothing, nothing, sample_ids, counts if counted else None)

    def view(name: str) -> View:
        embedded = column(f"{name}_x"), column(f"{name}_y")
        return View(side(name), hidden=column(name), embedded=embedded)

    projectors = Projectors(d, D, with_query=True, seed=0)
    out = exchange_by_attention(view("student"), view("teacher"), projectors)
    assert out.student_rows is out.teacher_rows is None  # every token has a state
    return out.t2s, out.s2t


def test_a_sample_aligns_alike_alone_and_among_others():
    first, second, third = sample(0, 5, 7), sample(1, 1, 1), sample(2, 4, 2)
    t2s, s2t = aligned([first, second, third])
    alone_t2s, alone_s2t = zip(*(aligned([s]) for s in (first, second, third)), strict=True)
    torch.testing.assert_close(t2s, torch.cat(alone_t2s))
    torch.testing.assert_close(s2t, torch.cat(alone_s2t))


def test_attention_is_the_plain_formula():
    s = sample(3, 4, 6)
    projectors = Projectors(d, D, with_query=True, seed=0)
    query = projectors.query(torch.cat([s["student_x"], s["student_y"]], 1))
    key = torch.cat([s["teacher_x"], s["teacher_y"]], 1)
    scores = query @ (key / key.std()).T / (2 * D) ** 0.5
    value = projectors.t2s(
        s["teacher"] / s["teacher"].std() + s["teacher_y"] / s["teacher_y"].std()
    )
    t2s, s2t = aligned([s])
    torch.testing.assert_close(t2s, scores.softmax(1) @ value)
    torch.testing.assert_close(s2t, scores.softmax(0).T @ projectors.s2t(s["student"]))


def test_sample_std_is_torchs_per_sample():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([0, 0, 0, 2, 2, 2])  # sample 1 has no token
    expected = torch.stack([x[:3].std()] * 3 + [x[3:].std()] * 3).unsqueeze(1)
    torch.testing.assert_close(sample_std(x, ids), expected)


def side_of(labels: list[int], sample: int = 0) -> Side:
    ids = torch.tensor(labels)
    return Side(ids, ids, torch.full_like(ids, sample))


def views(student: Side, teacher: Side) -> tuple[View, View]:
    s = sample(5, len(student), len(teacher))
    return tuple(
        View(side, hidden=s[name], embedded=(s[f"{name}_x"], s[f"{name}_y"]))
        for name, side in (("student", student), ("teacher", teacher))
    )


def test_over_one_vocabulary_only_tokens_of_one_id_meet():
    """The end tokens of two templates stand at one place, but are different tokens."""
    student, teacher = views(side_of([4, 5, 2]), side_of([4, 5, 3]))
    pairs = torch.arange(3)[:, None].expand(-1, 2)
    met = equal_ids(pairs, student.tokens, teacher.tokens)
    projectors = Projectors(d, D, with_query=False, seed=0)
    out = exchange_pairs(student, teacher, met, projectors)
    assert out.student_rows.tolist() == out.teacher_rows.tolist() == [0, 1]
    torch.testing.assert_close(out.t2s, projectors.t2s(teacher.hidden[:2]))
    torch.testing.assert_close(out.s2t, projectors.s2t(student.hidden[:2]))


def test_paired_states_are_those_of_the_pair_whatever_their_places():
    student, teacher = views(side_of([4, 5, 2]), side_of([7, 4, 5, 2]))
    pairs = torch.tensor([[0, 1], [2, 3]])
    projectors = Projectors(d, D, with_query=False, seed=0)
    out = exchange_pairs(student, teacher, pairs, projectors)
    assert out.student_rows.tolist() == [0, 2]
    assert out.teacher_rows.tolist() == [1, 3]
    torch.testing.assert_close(out.t2s, projectors.t2s(teacher.hidden[[1, 3]]))
    torch.testing.assert_close(out.s2t, projectors.s2t(student.hidden[[0, 2]]))


@pytest.mark.parametrize("samples", [(0, 1), (1, 0)])
def test_a_sample_that_only_one_side_supervises_is_an_invariant_violation(samples: tuple[int, int]):
    student, teacher = views(*(side_of([1, 2], sample) for sample in samples))
    projectors = Projectors(d, D, with_query=True, seed=0)
    with pytest.raises(AssertionError, match="one side is not supervised"):
        exchange_by_attention(student, teacher, projectors)


def test_a_host_that_knows_the_counts_waits_for_nothing():
    samples = [sample(k, 3 + k, 9 - k) for k in range(6)]
    with Waits() as waits:
        found = aligned(samples, counted=True)
    assert waits.count == 0
    for one, other in zip(found, aligned(samples), strict=True):
        assert torch.equal(one, other)
