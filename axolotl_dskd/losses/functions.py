"""Chunk functions from closed forms or from plain PyTorch, and the student's cross-entropy added.

Knows logits of one chunk; nothing of heads' products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.losses.chunks import Chunk, ChunkFunction, Part, Rows, Values
from axolotl_dskd.losses.elementwise import blocks, cross_entropy, wide

#: From float32 logits of one block, by stream, to values per token and gradients by stream.
BlockFunction = Callable[[Part, dict[str, Tensor]], tuple[Values, dict[str, Tensor]]]
#: From float32 logits of a chunk, by stream, to the loss and values per token, by autograd.
PlainFunction = Callable[[Part, dict[str, Tensor]], tuple[Tensor, Values]]


def by_rows(function: BlockFunction) -> ChunkFunction:
    """A chunk function from one that is given a few rows at a time, as float32 logits.

    All streams of a part must have equally many rows: row i of one goes with row i of the others.

    Args:
        function: takes the rows and the logits [k, V] of each stream (scale and softcap applied;
            may be overwritten), returns values [k] by term and gradients [k, V] of their weighted
            sum by stream. A stream without gradient learns nothing.
    """

    def compute(chunk: Chunk) -> Values:
        length = len(next(iter(chunk.linear.values())))
        widest = max(chunk.linear.values(), key=lambda linear: linear.shape[1])
        values: dict[str, list[Tensor]] = {}
        for block in blocks(widest):
            rows = {name: _within(chunk.rows[name], block, length) for name in chunk.linear}
            linear = {name: x[block] for name, x in chunk.linear.items()}
            logits = {n: chunk.heads[n].activation(x.to(wide(x.dtype))) for n, x in linear.items()}
            # A function may work in place; softcap's gradient needs what it was given.
            kept = {n: x.clone() for n, x in logits.items() if chunk.heads[n].softcap is not None}
            block_values, gradients = function(rows, logits)
            for name, value in block_values.items():
                values.setdefault(name, []).append(value)
            for name in chunk.learns & linear.keys():
                gradient = gradients.get(name)
                if gradient is None:
                    linear[name].zero_()
                    continue
                back = chunk.heads[name].activation_backward(kept.get(name, gradient), gradient)
                linear[name].copy_(back.mul_(chunk.scale))
        return {name: torch.cat(parts) for name, parts in values.items()}

    return compute


def _within(rows: Rows, block: slice, length: int) -> Rows:
    """Some of a chunk's rows."""
    if isinstance(rows, Tensor):
        return rows[block]
    start = rows.start or 0
    return slice(start + block.start, start + min(block.stop, length))


def by_autograd(function: PlainFunction) -> ChunkFunction:
    """A chunk function from plain PyTorch over a whole chunk: autograd finds its gradients.

    Args:
        function: takes the rows and the float32 logits [n, V] of each stream, returns the weighted
            sum that is learned from and the values by term.
    """

    def compute(chunk: Chunk) -> Values:
        leaves = {n: x.to(wide(x.dtype), copy=True) for n, x in chunk.linear.items()}
        for name in chunk.learns & leaves.keys():
            leaves[name].requires_grad_()
        with torch.enable_grad():
            logits = {name: chunk.heads[name].activation(x) for name, x in leaves.items()}
            loss, values = function(chunk.rows, logits)
        learning = [name for name in leaves if name in chunk.learns]
        if learning:
            if loss.requires_grad:
                wanted = [leaves[name] for name in learning]
                gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
            else:
                gradients = tuple(torch.zeros_like(leaves[name]) for name in learning)
            for name, gradient in zip(learning, gradients, strict=True):
                chunk.linear[name].copy_(gradient.mul_(chunk.scale))
        return {name: value.detach() for name, value in values.items()}

    return compute


def with_ce(
    function: BlockFunction | None, labels: Tensor, weight: float, stream: str = "student"
) -> BlockFunction:
    """A block function that adds a stream's cross-entropy at temperature 1 as the term `ce`.

    Args:
        function: of the rows that several streams share, or None where there is cross-entropy
            alone; rows of `stream` alone never reach it.
        labels: [n] int64 of all rows of the stream; -100 counts nowhere.
        weight: of the cross-entropy in the loss.
    """

    def both(rows: Part, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
        ce, gradient = cross_entropy(logits[stream], labels[rows[stream]], weight)
        values, gradients = ({}, {})  # type: tuple[Values, dict[str, Tensor]]
        if function is not None and len(logits) > 1:
            values, gradients = function(rows, logits)
        total = gradients.get(stream)
        gradients[stream] = gradient if total is None else total.add_(gradient)
        return values | {"ce": ce}, gradients

    return both


def plain_with_ce(
    function: PlainFunction, labels: Tensor, weight: float, stream: str = "student"
) -> PlainFunction:
    """A plain function that adds a stream's cross-entropy at temperature 1 as the term `ce`.

    The streams of a part may have unequally many rows, as `grouped_parts` gives them.

    Args:
        function: of all streams' rows.
        labels: [n] int64 of all rows of the stream; -100 counts nowhere.
        weight: of the cross-entropy in the loss.
    """

    def both(rows: Part, logits: dict[str, Tensor]) -> tuple[Tensor, Values]:
        ce = F.cross_entropy(logits[stream], labels[rows[stream]], reduction="none")
        loss, values = function(rows, logits)
        return loss + weight * ce.sum(), values | {"ce": ce}

    return both
