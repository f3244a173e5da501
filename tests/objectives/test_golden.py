"""The published method's numbers, loss terms and gradients (see tests/data/golden/README.md)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from axolotl_dskd.losses import make_divergence
from axolotl_dskd.objectives.dual_space import align_positions, align_with_attention, sample_std
from axolotl_dskd.objectives.dual_space.loss import LossSettings, dual_space_loss
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Side, TeacherSignal

FOLDER = Path(os.environ.get("DSKD_GOLDEN_DIR") or Path(__file__).parents[1] / "data" / "golden")
# ULD is no method of this package.
FILES = sorted(p for p in FOLDER.glob("*.npz") if not p.name.startswith("uld-"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def published_stds(z: dict, mask: torch.Tensor, everywhere: bool) -> tuple[torch.Tensor, ...]:
    """The published code's standard deviations: over the batch, unsupervised positions included,
    whose ids it replaces by 0."""
    count, embed = int(mask.sum()), z["teacher_embed"]
    inputs, labels = z["teacher_input_ids"] * mask, z["teacher_labels"] * mask
    key = torch.cat([embed[inputs], embed[labels]], -1)
    if not everywhere:  # every position is supervised: our own function over one group
        group = torch.zeros(count, dtype=torch.long)
        return tuple(sample_std(x[mask], group) for x in (key, z["teacher_hidden"], embed[labels]))
    return tuple(x.std().expand(count, 1) for x in (key, z["teacher_hidden"], embed[labels]))


def test_the_golden_files_are_there():
    assert len(FILES) >= 36


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_terms_and_gradients_equal_the_published_ones(path: Path):
    z = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    method, name, _, seed = path.stem.split("-")
    d, D = z["t2s_weight"].shape
    projectors = Projectors(d, D, with_query=True, seed=0)
    with torch.no_grad():
        for part in ("t2s", "s2t", "query"):
            getattr(projectors, part).weight.copy_(z[f"{part}_weight"])
            getattr(projectors, part).bias.copy_(z[f"{part}_bias"])
    hidden = z["student_hidden"].clone().requires_grad_()
    head = z["student_head"].clone().requires_grad_()
    sides, masks = [], []
    for side in ("student", "teacher"):
        mask = z[f"{side}_labels"] != -100
        sample_ids = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
        sides.append(Side(z[f"{side}_input_ids"][mask], z[f"{side}_labels"][mask], sample_ids))
        masks.append(mask)
    (student, teacher), (mask, teacher_mask) = sides, masks
    embed = z["teacher_embed"]
    signal = TeacherSignal(
        z["teacher_hidden"][teacher_mask], teacher, embed[teacher.input_ids], embed[teacher.labels]
    )
    if method == "cma":
        student_embed = z["student_embed"]
        aligned = align_with_attention(
            hidden[mask],
            (student_embed[student.input_ids], student_embed[student.labels]),
            student,
            signal,
            projectors,
            published_stds(z, teacher_mask, everywhere=seed != "s1"),
        )
    else:
        aligned = align_positions(hidden[mask], student, signal, projectors)
    out = dual_space_loss(
        student_hidden=hidden[mask],
        student_labels=student.labels,
        student_head=OutputHead(head),
        settings=LossSettings(
            make_divergence(name),
            temperature=float(z["temperature"]),
            kd_ratio=1.0,
            mask_wrong_projections=method == "cma",
            chunk_tokens=4,
        ),
        t2s_hidden=aligned.t2s_hidden,
        s2t_hidden=aligned.s2t_hidden,
        teacher_hidden=signal.hidden,
        teacher_labels=teacher.labels,
        teacher_head=OutputHead(z["teacher_head"]),
    )
    out.loss.backward()

    sums = out.sums()
    expected = {
        "projector_ce": "t2s_ce_loss",
        "student_space": "t2s_kd_loss",
        "teacher_space": "s2t_kd_loss",
        "projector_accuracy": "t2s_acc",
        "teacher_accuracy": None,
    }
    for ours, theirs in expected.items():
        if theirs is not None:
            assert float(sums[ours]) == pytest.approx(float(z[f"out_{theirs}"]), rel=1e-5), ours
    assert float(out.loss.detach()) == pytest.approx(float(z["out_kd_loss"]), rel=1e-5)
    gradients = {"student_hidden": hidden.grad, "student_head": head.grad}
    parts = ("t2s", "s2t", "query") if method == "cma" else ("t2s", "s2t")
    for part in parts:
        linear = getattr(projectors, part)
        gradients |= {f"{part}_weight": linear.weight.grad, f"{part}_bias": linear.bias.grad}
    for ours, gradient in gradients.items():
        published = z[f"grad_{ours}"]
        # A bias of the query shifts all scores of a row alike in one direction: its gradient is
        # noise around 0 where no key differs, so compare against the largest gradient of all.
        if float(published.norm()) < 1e-6:
            assert float(gradient.norm()) < 1e-5, ours
        else:
            assert relative(gradient, published) < 1e-4, ours
