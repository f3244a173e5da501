"""Which positions of a batch predict a label that counts, and how many do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def labels_ahead(labels_BL: Tensor) -> Tensor:
    """[B, L] the label that each position predicts (that of its successor; -100 at the end)."""
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_mask(labels_BL: Tensor, segment_ids_BL: Tensor) -> Tensor:
    """[B, L] bool: the successor is labelled and belongs to the same sample.

    The first token of a sample is predicted by nothing, also where the sample is packed behind
    another one: so a packed row supervises exactly what padded rows do.
    """
    successor_BL = F.pad(segment_ids_BL[:, 1:], (0, 1), value=-1)
    same_BL = (segment_ids_BL == successor_BL) & (segment_ids_BL >= 0)
    return same_BL & (labels_ahead(labels_BL) != IGNORE_INDEX)


def places_of(mask: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows and columns where a mask is set, without asking the GPU how many they are."""
    rows, columns = mask.nonzero_static(size=sum(counts)).unbind(1)
    return rows, columns


def indices_of(*masks: Tensor) -> list[Tensor]:
    """[k] int64 each, ascending: where some masks [n] are set. For all of them together the host
    waits for the GPU once."""
    counts = torch.stack([mask.sum() for mask in masks])
    # What a plan of memory is made with has no numbers: there a mask may be set everywhere.
    sizes = [len(mask) for mask in masks] if counts.is_meta else counts.tolist()
    return [m.nonzero_static(size=n).flatten() for m, n in zip(masks, sizes, strict=True)]


@dataclass(frozen=True)
class Sizes:
    """What the host knows of a batch, so that it need not wait for the GPU to say it.

    Attributes:
        student, teacher: supervised tokens of each sample.
        lengths: tokens of each sample on the teacher's side.
        cached: whether each sample was found in the teacher's cache; None: nobody has looked.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    lengths: tuple[int, ...]
    cached: tuple[bool, ...] | None = None

    def with_teachers(self, samples: Sequence[int]) -> Sizes:
        """Of the batch with some of its samples on the teacher's side."""
        teacher, lengths = (tuple(of[k] for k in samples) for of in (self.teacher, self.lengths))
        cached = None if self.cached is None else tuple(self.cached[k] for k in samples)
        return Sizes(self.student, teacher, lengths, cached)
