"""Numbers of exact token alignment as published (tests/data/golden/README.md).

Published code has a divisor of its own for each term and drops pairs without translation from the
teacher space, too; here all of these are weights and pairs of the same functions.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from axolotl_dskd.losses import Budget, Stream, make_divergence
from axolotl_dskd.objectives.dual_space.align import exchange_pairs
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.objectives.dual_space.spaces import Terms, student_space, teacher_space
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Side, View

DATA = Path(__file__).parents[1] / "data" / "golden" / "methods"
FILES = sorted(Path(os.environ.get("DSKD_GOLDEN_METHODS_DIR") or DATA).glob("eta-*.npz"))


def view(z: dict[str, Tensor], side: str, hidden: Tensor) -> tuple[View, Tensor]:
    """The supervised tokens of a side, and [B, L] where each of them stands among these."""
    labels = z[f"{side}_labels"]
    mask = labels != -100
    rows = torch.arange(len(mask))[:, None].expand_as(mask)
    place = (mask.flatten().cumsum(0) - 1).view_as(mask)
    tokens = Side(z[f"{side}_input_ids"][mask], labels[mask], rows[mask])
    return View(tokens, hidden=hidden[mask]), place


def test_the_golden_files_are_there():
    assert len(FILES) >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("counted", ["agreeing", "all"])
def test_terms_and_gradients_equal_the_published_ones(path: Path, name: str, counted: str):
    z = {k: torch.from_numpy(v) for k, v in np.load(path).items() if v.dtype.kind in "if"}
    projectors = Projectors(14, 10, with_query=False, seed=0)
    with torch.no_grad():
        for part in ("t2s", "s2t"):
            linear = torch.nn.Linear(*z[f"{part}_weight"].shape[::-1])
            linear.weight.copy_(z[f"{part}_weight"])
            linear.bias.zero_()
            setattr(projectors, part, linear)
    hidden = z["student_hidden"].clone().requires_grad_()
    weight = z["student_head"].clone().requires_grad_()
    (student, ours), (teacher, theirs) = (
        view(z, "student", hidden),
        view(z, "teacher", z["teacher_hidden"]),
    )
    at = z["aligned_teacher_position"]
    kept = (at >= 0) & (z["projector_labels"] != -100)
    rows = torch.arange(len(at))[:, None].expand_as(at)[kept]
    pairs = torch.stack([ours[kept], theirs[rows, at[kept]]], 1)
    targets = z["projector_labels"][kept]
    exchanged = exchange_pairs(student, teacher, pairs, projectors)

    projected = exchanged.t2s @ z["student_head"].T
    agreeing = int((projected.argmax(-1) == targets).sum()) if counted == "agreeing" else len(pairs)
    terms = Terms(
        make_divergence(name),
        temperature=2.0,
        kd_ratio=1.0,
        student_space_weight=1 / len(pairs),
        teacher_space_weight=1 / len(pairs),
        mask_wrong=counted == "agreeing",
        divergence_weight=len(pairs) / agreeing,
    )
    assert student.hidden is not None and teacher.hidden is not None
    stream = Stream(student.hidden, OutputHead(weight), trains_head=True)
    i = pairs[:, 0]
    out = student_space(stream, student.tokens, exchanged.t2s, i, targets, terms, Budget(4))
    source = Stream(teacher.hidden, OutputHead(z["teacher_head"]))
    space, values = teacher_space(
        source, teacher.tokens, exchanged.s2t, pairs[:, 1], terms, Budget(4)
    )
    sums = out.sums()

    def published(term: str) -> float:
        return float(z[f"out_{term}_{name}_{counted}"])

    assert float(sums["projector_ce"]) / len(pairs) == pytest.approx(published("t2s_ce"), rel=1e-5)
    assert float(sums["student_space"]) / agreeing == pytest.approx(published("t2s_kd"), rel=1e-5)
    total = float(values["teacher_space"].values.sum()) / len(pairs)
    leaves = {
        "student_hidden": hidden,
        "student_head": weight,
        "t2s_weight": projectors.t2s.weight,
        "s2t_weight": projectors.s2t.weight,
    }
    if name == "forward_kl":
        assert total == pytest.approx(published("s2t_kd"), rel=1e-5)
    else:  # published turns the teacher space's divergence, too; ours is always forward
        assert total != pytest.approx(published("s2t_kd"), rel=1e-3)
        leaves = {"t2s_weight": projectors.t2s.weight}
    gradients = torch.autograd.grad(out.loss + space, list(leaves.values()))
    for of, gradient in zip(leaves, gradients, strict=True):
        expected = z[f"grad_{of}_{name}_{counted}"]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
