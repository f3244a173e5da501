"""The linear maps between the two models' spaces, and the least squares that they start from.

They are a sidecar of the training run, not part of the student: exported students carry no trace
of them. This module knows sizes and gradients; nothing of models, tokens or losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

#: Rows of a vocabulary whose float64 copies are held at once.
ROWS_AT_ONCE = 2048


class _Linear(nn.Linear):
    """float32 weights, products in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)


class Projectors(nn.Module):
    """`t2s` [D -> d], `s2t` [d -> D] and, for cross-model attention, `query` [2d -> 2D].

    Initialised as `nn.Linear` is (uniform in ±1/sqrt(fan-in)), from a generator of their own:
    adding distillation to a run changes neither the student's initial weights nor its data order.
    """

    #: [D, d] what s2t follows a training head by, a buffer where it does (`HeadFollower`).
    s2t_solution: Tensor

    def __init__(self, d: int, D: int, *, with_query: bool, seed: int) -> None:
        super().__init__()
        self.t2s = skip_init(_Linear, D, d)  # nn.Linear's own start draws from the global generator
        self.s2t = skip_init(_Linear, d, D)
        self.query = skip_init(_Linear, 2 * d, 2 * D) if with_query else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for linear in self.children():
                assert isinstance(linear, nn.Linear)
                bound = 1 / math.sqrt(linear.in_features)
                linear.weight.uniform_(-bound, bound, generator=generator)
                linear.bias.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class SharedTokens:
    """A block of rows of both models, for k tokens that both vocabularies spell the same.

    Attributes:
        student_head, student_embedding: [k, d] rows of the output head and of the input embedding.
        teacher_head, teacher_embedding: [k, D].
        student_bias, teacher_bias: [k] of the output heads, or None.
    """

    student_head: Tensor
    student_embedding: Tensor
    teacher_head: Tensor
    teacher_embedding: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None


class Gram:
    """The left side of the normal equations `(xᵀx + ridge) W = xᵀy`, factorised once.

    The ridge, relative to the mean diagonal of xᵀx, only matters where columns of x are dependent.

    Args:
        x: blocks of rows, [k', a] each; products are in float64, a block at a time.
    """

    def __init__(self, x: Iterable[Tensor], ridge: float = 1e-9) -> None:
        products = Products()
        for rows in x:
            wide = rows.double()
            products.add("xx", wide, wide)
        self.factor = _factor(products["xx"], ridge)

    @classmethod
    def of_product(cls, gram: Tensor, ridge: float = 1e-9) -> Gram:
        """From xᵀx, [a, a] float64, which is overwritten."""
        made = cls.__new__(cls)
        made.factor = _factor(gram, ridge)
        return made

    def solve(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """[a, b] float64: W for the blocks' rows of x and y, [k', a] and [k', b] each."""
        products = Products()
        for x, y in blocks:
            products.add("xy", x.double(), y.double())
        return self.solve_product(products["xy"])

    def solve_product(self, moment: Tensor) -> Tensor:
        """[a, b] float64: W for xᵀy, [a, b] float64."""
        return torch.cholesky_solve(moment, self.factor)


def _factor(gram: Tensor, ridge: float) -> Tensor:
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.cholesky(gram)


class Products(dict[str, Tensor]):
    """Sums over blocks of rows of xᵀy, by name."""

    def add(self, name: str, x: Tensor, y: Tensor) -> None:
        """Count a block in: [k', a] and [k', b] float64."""
        if name in self:
            self[name].addmm_(x.T, y)
        else:
            self[name] = x.T @ y


@torch.no_grad()
def start_from_shared_tokens(projectors: Projectors, shared: Iterable[SharedTokens]) -> None:
    """Projectors such that projected states give the shared tokens the logits they had before.

    In least squares over the shared tokens (arXiv 2504.11426, §3.3 for the first two):

        t2s: student_head @ t2s.weight ≈ teacher_head
        s2t: teacher_head @ s2t.weight ≈ student_head
        query: maps a student embedding to the teacher's of the same token, so that a pair of
               equal tokens attends to each other from the first step; scaled as the keys are

    Cross-model attention normalises what t2s receives by the standard deviation of the teacher's
    embeddings; there t2s starts with that factor put back.

    Args:
        shared: blocks of rows, read once: only one is held at a time.
    """
    sums, numbers = Products(), 0
    for rows in shared:
        ours, theirs = rows.student_head.double(), rows.teacher_head.double()
        sums.add("ours²", ours, ours)
        sums.add("theirs²", theirs, theirs)
        sums.add("ours·theirs", ours, theirs)
        if rows.student_bias is not None or rows.teacher_bias is not None:
            gap = ours.new_zeros(len(ours), 1)
            for bias, sign in ((rows.teacher_bias, 1), (rows.student_bias, -1)):
                if bias is not None:
                    gap += sign * bias.double().unsqueeze(1)
            sums.add("ours·gap", ours, gap)
            sums.add("theirs·gap", theirs, gap)
        if projectors.query is not None:
            ours, theirs = rows.student_embedding.double(), rows.teacher_embedding.double()
            sums.add("embedded²", ours, ours)
            sums.add("embedded", ours, theirs)
            flat = theirs.reshape(-1, 1)
            sums.add("sum", flat, torch.ones_like(flat))
            sums.add("squares", flat, flat)
            numbers += flat.numel()
    for linear in projectors.children():
        assert isinstance(linear, nn.Linear)
        linear.bias.zero_()
    student, teacher = Gram.of_product(sums["ours²"]), Gram.of_product(sums["theirs²"])
    t2s = student.solve_product(sums["ours·theirs"])
    projectors.s2t.weight.copy_(teacher.solve_product(sums["ours·theirs"].T))
    if "ours·gap" in sums:
        projectors.t2s.bias.copy_(student.solve_product(sums["ours·gap"]).squeeze(1))
        projectors.s2t.bias.copy_(-teacher.solve_product(sums["theirs·gap"]).squeeze(1))
    if projectors.query is not None:
        variance = (sums["squares"] - sums["sum"].square() / numbers) / (numbers - 1)
        std = variance.sqrt().squeeze()
        t2s *= std
        d, D = projectors.s2t.in_features, projectors.s2t.out_features
        block = Gram.of_product(sums["embedded²"]).solve_product(sums["embedded"]).T / std
        projectors.query.weight.zero_()
        projectors.query.weight[:D, :d] = block
        projectors.query.weight[D:, d:] = block
    projectors.t2s.weight.copy_(t2s)
