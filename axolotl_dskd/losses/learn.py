"""One stream of logits learns from another over the same vocabulary: the fused chunk function.

The closed form of nearly every distillation: cross-entropy of the learner, cross-entropy of the
source (where the source is a projection that is trained, too) and a divergence between the two,
in one pass over the logits. On CUDA that is one Triton kernel a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from axolotl_dskd.losses import elementwise
from axolotl_dskd.losses.chunks import Chunk, Values
from axolotl_dskd.losses.divergences import Divergence
from axolotl_dskd.losses.elementwise import PairTerms, Weights
from axolotl_dskd.types import IGNORE_INDEX


@dataclass(frozen=True)
class Learn:
    """Chunk function: the stream `learner` learns from the stream `source`.

    Gives the terms `ce`, `divergence`, `source_ce`, `correct` under the names of `terms`. Rows of
    the learner that come without a source have `ce` alone.

    Attributes:
        learner, source: names of the streams.
        divergence: D(source ‖ learner) at `weights.temperature`.
        divergence_without: another one for tokens without label, where it is to be another.
        weights: of the terms in the loss.
        labels: [n] of all rows of the learner for its cross-entropy, or None for none.
        source_labels: [m] of all rows of the source: what its first choice is compared with and
            its cross-entropy is taken of, -100 nowhere.
        terms: what the caller calls each term that it wants.
    """

    learner: str
    source: str
    divergence: Divergence
    weights: Weights
    labels: Tensor | None
    source_labels: Tensor
    terms: dict[str, str]
    divergence_without: Divergence | None = None

    def __call__(self, chunk: Chunk) -> Values:
        """See `losses.chunks.over`."""
        z, u = chunk.linear[self.learner], chunk.linear.get(self.source)
        labels = None if self.labels is None else self.labels[chunk.rows[self.learner]]
        paired = u is not None
        # Without a source its labels are not read.
        source_labels = self.source_labels[chunk.rows[self.source]] if paired else labels
        assert source_labels is not None
        scale = chunk.scale
        heads = chunk.heads[self.learner], chunk.heads[self.source]
        weights = replace(
            self.weights,
            ce=self.weights.ce * scale,
            source_ce=self.weights.source_ce * scale,
            divergence=self.weights.divergence * scale,
        )
        compute = _implementation(z).pair_terms
        if u is None or labels is None or self.divergence_without is None:
            values = compute(z, u, labels, source_labels, heads, self.divergence, weights)
        else:
            found = []
            for rows, has_label in runs_of(labels != IGNORE_INDEX):
                divergence = self.divergence if has_label else self.divergence_without
                some = (x[rows] for x in (z, u, labels, source_labels))
                found.append(compute(*some, heads, divergence, weights))
            values = PairTerms(*map(torch.cat, zip(*found, strict=True)))
        if u is not None and not self.weights.source_ce and self.source in chunk.learns:
            u.zero_()  # it learns nothing
        wanted = self.terms if paired else {"ce": self.terms["ce"]}
        return {name: getattr(values, term) for term, name in wanted.items()}


def runs_of(flags: Tensor) -> Iterator[tuple[slice, bool]]:
    """Ranges of rows with the same flag [n], in order. The host waits for the GPU."""
    kinds, counts = flags.unique_consecutive(return_counts=True)
    start = 0
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        yield slice(start, start + count), kind
        start += count


def _implementation(logits: Tensor) -> ModuleType:
    """Triton kernels on CUDA, where there is Triton; PyTorch elsewhere and for float64."""
    if logits.is_cuda and logits.element_size() < 8 and find_spec("triton") is not None:
        return import_module("axolotl_dskd.losses.kernels")
    return elementwise
