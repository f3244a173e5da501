"""The published method's numbers, loss terms and gradients (see tests/data/golden/README.md)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from axolotl_dskd.objectives.dual_space.align import (
    Std,
    exchange_by_attention,
    exchange_pairs,
    sample_std,
)
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Side, View
from tests.support.dual_space import dual_space_loss, settings

FOLDER = Path(os.environ.get("DSKD_GOLDEN_DIR") or Path(__file__).parents[1] / "data" / "golden")
# ULD is another objective: see test_golden_methods.
FILES = sorted(p for p in FOLDER.glob("*.npz") if not p.name.startswith("uld-"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def published_std(z: dict[str, torch.Tensor], mask: torch.Tensor, everywhere: bool) -> Std:
    """The published code's standard deviations: over the batch, unsupervised positions included,
    whose ids it replaces by 0."""
    embed = z["teacher_embed"]
    inputs, labels = z["teacher_input_ids"] * mask, z["teacher_labels"] * mask
    key = torch.cat([embed[inputs], embed[labels]], -1)
    whole = {x.shape[-1]: x for x in (key, z["teacher_hidden"])}
    label = embed[labels]

    def std(states: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        if not everywhere:  # every position is supervised: our own function over one group
            return sample_std(states, torch.zeros(len(states), dtype=torch.long))
        is_label = torch.equal(states, label[mask])
        return (label if is_label else whole[states.shape[1]]).std().expand(len(states), 1)

    return std


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
    view, student_embed = z["teacher_hidden"][teacher_mask], z["student_embed"]
    ours = View(
        student,
        None,
        hidden[mask],
        (student_embed[student.input_ids], student_embed[student.labels]),
    )
    theirs = View(teacher, None, view, (embed[teacher.input_ids], embed[teacher.labels]))
    if method == "cma":
        std = published_std(z, teacher_mask, everywhere=seed != "s1")
        exchanged = exchange_by_attention(ours, theirs, projectors, std=std)
    else:
        pairs = torch.arange(len(student))[:, None].expand(-1, 2)
        exchanged = exchange_pairs(ours, theirs, pairs, projectors)
    out = dual_space_loss(
        student_hidden=hidden[mask],
        student_labels=student.labels,
        student_head=OutputHead(head),
        settings=settings(
            name,
            4,
            temperature=float(z["temperature"]),
            kd_ratio=1.0,
            mask_wrong=method == "cma",
        ),
        t2s_hidden=exchanged.t2s,
        s2t_hidden=exchanged.s2t,
        teacher_hidden=theirs.hidden,
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
