"""From logits to terms and gradients, in place: the part of the loss that is no matrix product.

A chunk's logits are read, and overwritten with their gradients, a few rows at a time: every
temporary of these rows stays in the processor's cache, and none has the size of the chunk. On CUDA
`kernels.py` does the same in one launch a chunk; this form is the reference, and what runs where
there is no Triton.

liger-kernel, which comes with Axolotl, offers fused losses for a student and a teacher that share
one vocabulary. None of them fits here: they have neither the projector's cross-entropy nor a
gradient for the second states, know no softcap, scale, LoRA or padded rows of a head, lack most of
the divergences and give sums instead of values per token; separate kernels for cross-entropy and
divergence would read each logit twice as often.

This module knows logits, labels and weights; nothing of hidden states or of matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_dskd.losses.divergences import Distribution, Divergence
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX

#: Numbers of one matrix that are worked on at once: a block's temporaries fit into a CPU's cache,
#: or are many enough for a GPU without Triton.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class Weights:
    """What each term's gradient is multiplied by.

    Attributes:
        ce: of the learner's cross-entropy.
        source_ce: of the source's cross-entropy; 0: the source learns nothing.
        divergence: of the divergence at `temperature`.
        temperature: of the divergence.
        mask_wrong: the divergence counts only where no token is more likely for the source than
            its label, or it has no label.
    """

    ce: float
    source_ce: float
    divergence: float
    temperature: float
    mask_wrong: bool = False


class PairTerms(NamedTuple):
    """Per token [n], float32 or wider, of logits that learn and logits that they learn from."""

    ce: Tensor
    source_ce: Tensor
    divergence: Tensor
    correct: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def pair_terms(
    learner: Tensor,
    source: Tensor | None,
    labels: Tensor | None,
    source_labels: Tensor,
    heads: tuple[OutputHead, OutputHead],
    divergence: Divergence,
    weights: Weights,
) -> PairTerms:
    """Terms of logits z that learn from logits u; both become their gradients.

    `ce` = CE(z, labels), `source_ce` = CE(u, source_labels), `divergence` = D(softmax(u / T) ‖
    softmax(z / T)) and `correct` = [u is largest at source_labels]. The gradient of the divergence
    goes to z alone.

    Args:
        learner: [n, V] `head.linear` of the states that learn.
        source: [n, V] the same of the states that they learn from, or None: then only `ce`. Left
            as it is where `source_ce` weighs nothing.
        labels: [n] int64, -100 counts nowhere; None: no `ce`.
        source_labels: [n] int64; `source_ce`, computed if it weighs anything, leaves -100 out.
        heads: of learner and source, for their scale and softcap.
        divergence, weights: see there.
    """
    terms = PairTerms(*learner.new_zeros((4, len(learner)), dtype=wide(learner.dtype)))
    T = weights.temperature
    for rows in blocks(learner):
        z = heads[0].activation(learner[rows].to(terms.ce.dtype))
        grad_z = None
        if labels is not None:
            terms.ce[rows], grad_z = cross_entropy(z, labels[rows], weights.ce)
        if source is not None:
            u = heads[1].activation(source[rows].to(terms.ce.dtype))
            targets = source_labels[rows]
            correct = first_choice(u, targets)
            value, grad = divergence(Distribution.of(u, T), Distribution.of(z, T))
            counted = torch.ones_like(value)
            if weights.mask_wrong:
                counted = torch.where(targets == IGNORE_INDEX, 1.0, correct)
            terms.divergence[rows], terms.correct[rows] = value * counted, correct
            factor = (counted * (weights.divergence / T)).unsqueeze(-1)
            grad_z = grad.mul_(factor) if grad_z is None else grad_z.addcmul_(grad, factor)
            if weights.source_ce:
                found, grad_u = cross_entropy(u, targets, weights.source_ce)
                terms.source_ce[rows] = found
                source[rows] = heads[1].activation_backward(u, grad_u)
        if grad_z is None:
            grad_z = torch.zeros_like(z)
        learner[rows] = heads[0].activation_backward(z, grad_z)
    return terms


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix that are worked on at once, see `_BLOCK`."""
    rows = max(1, _BLOCK.get(matrix.device.type, 1 << 24) // matrix.shape[1])
    for start in range(0, len(matrix), rows):
        yield slice(start, start + rows)


def first_choice(logits: Tensor, labels: Tensor) -> Tensor:
    """[n] 1 where no token is more likely than the label, else 0, also where that is -100.

    Args:
        logits: [n, V] float32 or wider.
        labels: [n] int64.
    """
    own = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    # argmax, which says which token it is, takes as long as two softmaxes.
    return ((own >= logits.amax(-1)) & (labels != IGNORE_INDEX)).to(logits.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token [n] at temperature 1 and its gradient [n, V] times `weight`.

    Args:
        logits: [n, V] float32 or wider.
        labels: [n] int64; -100 counts nowhere.
    """
    counted = (labels != IGNORE_INDEX).to(logits.dtype)
    at = labels.clamp_min(0).unsqueeze(-1)
    prob = torch.softmax(logits, -1)
    # The largest probability is 1 / Σ exp(logits − largest logit), and never underflows.
    log_sum = -prob.amax(-1).log_()
    value = (logits.amax(-1) - logits.gather(-1, at).squeeze(-1) + log_sum) * counted
    share = (counted * weight).unsqueeze(-1)
    return value, prob.mul_(share).scatter_add_(-1, at, -share)
