"""Alignment: nothing but a sample's own tokens decides its projected states."""

from __future__ import annotations

import pytest
import torch

from axolotl_dskd.objectives.dual_space import align_positions, align_with_attention, sample_std
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.types import Side, View

d, D = 6, 10


def sample(seed: int, n: int, m: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "student": randn(n, d),
        "embedded_x": randn(n, d),
        "embedded_y": randn(n, d),
        "teacher": randn(m, D),
        "teacher_x": randn(m, D),
        "teacher_y": randn(m, D),
    }


def aligned(samples: list[dict[str, torch.Tensor]]):
    def column(name: str) -> torch.Tensor:
        return torch.cat([s[name] for s in samples])

    def side(name: str) -> Side:
        sample_ids = torch.cat([torch.full((len(s[name]),), i) for i, s in enumerate(samples)])
        nothing = torch.zeros(len(sample_ids), dtype=torch.long)
        return Side(nothing, nothing, sample_ids)

    signal = View(
        side("teacher"),
        hidden=column("teacher"),
        embedded=(column("teacher_x"), column("teacher_y")),
    )
    out = align_with_attention(
        column("student"),
        (column("embedded_x"), column("embedded_y")),
        side("student"),
        signal,
        Projectors(d, D, with_query=True, seed=0),
    )
    return out.t2s_hidden, out.s2t_hidden


def test_a_sample_aligns_alike_alone_and_among_others():
    first, second, third = sample(0, 5, 7), sample(1, 1, 1), sample(2, 4, 2)
    t2s, s2t = aligned([first, second, third])
    alone_t2s, alone_s2t = zip(*(aligned([s]) for s in (first, second, third)), strict=True)
    torch.testing.assert_close(t2s, torch.cat(alone_t2s))
    torch.testing.assert_close(s2t, torch.cat(alone_s2t))


def test_attention_is_the_plain_formula():
    s = sample(3, 4, 6)
    projectors = Projectors(d, D, with_query=True, seed=0)
    query = projectors.query(torch.cat([s["embedded_x"], s["embedded_y"]], 1))
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


def test_positions_refuse_sides_that_supervise_other_tokens():
    s = sample(5, 3, 3)
    ids = torch.zeros(3, dtype=torch.long)
    student, teacher = Side(ids, ids, ids), Side(ids, ids + 1, ids)
    signal = View(teacher, hidden=s["teacher"], embedded=(s["teacher_x"], s["teacher_y"]))
    projectors = Projectors(d, D, with_query=False, seed=0)
    with pytest.raises(ValueError, match=r"same supervised tokens.*alignment: cma"):
        align_positions(s["student"], student, signal, projectors)


def test_a_sample_that_only_one_side_supervises_is_an_invariant_violation():
    s = sample(6, 2, 2)
    ids = torch.zeros(2, dtype=torch.long)
    signal = View(
        Side(ids, ids, ids), hidden=s["teacher"], embedded=(s["teacher_x"], s["teacher_y"])
    )
    with pytest.raises(AssertionError, match="one side only"):
        align_with_attention(
            s["student"],
            (s["embedded_x"], s["embedded_y"]),
            Side(ids, ids, ids + 1),
            signal,
            Projectors(d, D, with_query=True, seed=0),
        )
