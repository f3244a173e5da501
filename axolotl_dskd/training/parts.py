"""A batch whose samples ask several teachers, taken apart: one batch for each teacher.

A part is a batch like any other: its samples are numbered from 0, the other samples of its rows are
padding there. So neither teacher nor objective knows of the others.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_dskd.types import DualBatch, LossOutput, Matches, Side, Term, View, Written


@dataclass(frozen=True)
class Part:
    """What one teacher is asked of a batch.

    Attributes:
        batch: of this teacher's samples.
        samples: [S'] their numbers in the whole batch, ascending.
        tokens: [N] bool, which supervised student tokens of the whole batch are theirs.
        numbers: [S] the number in the part of each of the batch's samples, -1: not in it.
    """

    batch: DualBatch
    samples: Tensor
    tokens: Tensor
    numbers: Tensor

    def view(self, student: View) -> View:
        """The student on the part's samples.

        Args:
            student: on the whole batch.
        """
        embedded = student.embedded
        if embedded is not None:
            embedded = embedded[0][self.tokens], embedded[1][self.tokens]
        side = student.tokens.at(self.tokens)
        return replace(
            student,
            tokens=Side(side.input_ids, side.labels, self.numbers[side.sample_ids]),
            hidden=None if student.hidden is None else student.hidden[self.tokens],
            embedded=embedded,
            written=self.batch.written,
        )


def part_of(batch: DualBatch, teacher: int) -> Part:
    """The samples of a batch that ask one of several teachers, maybe none."""
    assert batch.teachers is not None
    mine = batch.teachers == teacher
    samples = mine.nonzero().flatten()
    numbers = torch.where(mine, mine.cumsum(0) - 1, -1)
    tokens = mine[batch.student_side().sample_ids]
    teacher_tokens = mine[batch.teacher_side().sample_ids]
    states, cached = batch.cached_states, batch.cached
    longest = int(batch.teacher_attention_mask[samples].sum(1).max()) if len(samples) else 1
    part = replace(
        batch,
        # -1, padding, is the last number here, too.
        segment_ids=torch.cat([numbers, numbers.new_tensor([-1])])[batch.segment_ids],
        teacher_input_ids=batch.teacher_input_ids[samples, :longest],
        teacher_labels=batch.teacher_labels[samples, :longest],
        teacher_attention_mask=batch.teacher_attention_mask[samples, :longest],
        cached_states=None if states is None else states[teacher_tokens],
        cached=None if cached is None else cached[samples],
        teachers=None,
        known=None,
        matches=_matches(batch.matches, tokens, teacher_tokens),
        written=_written(batch.written, samples, numbers, tokens),
    )
    return Part(part, samples, tokens, numbers)


def _matches(whole: Matches, tokens: Tensor, teacher_tokens: Tensor) -> Matches:
    """Those of some samples' tokens, numbered anew.

    Args:
        tokens, teacher_tokens: [N], [M] bool, which they are.
    """
    at, teacher_at = tokens.cumsum(0) - 1, teacher_tokens.cumsum(0) - 1

    def pairs(found: Tensor) -> Tensor:
        ours, theirs = found[tokens[found[:, 0]]].unbind(1)  # both are of one sample
        return torch.stack([at[ours], teacher_at[theirs]], 1)

    groups, teacher_groups = whole.groups[tokens], whole.teacher_groups[teacher_tokens]
    _, number = torch.cat([groups, teacher_groups]).unique(return_inverse=True)
    return Matches(
        spans=whole.spans[tokens],
        teacher_spans=whole.teacher_spans[teacher_tokens],
        exact=pairs(whole.exact),
        starts=pairs(whole.starts),
        groups=number[: len(groups)],
        teacher_groups=number[len(groups) :],
    )


def _written(
    whole: Written | None, samples: Tensor, numbers: Tensor, tokens: Tensor
) -> Written | None:
    if whole is None:
        return None
    pairs = whole.pairs
    if pairs is not None:  # two answers to one prompt: both are the same teacher's
        pairs = numbers[pairs][(numbers[pairs] >= 0).all(1)]
    return Written(
        samples=whole.samples[samples],
        logprobs=whole.logprobs[tokens],
        weights=None if whole.weights is None else whole.weights[tokens],
        pairs=pairs,
    )


class Found(NamedTuple):
    """The sums over a part of a batch."""

    part: Part
    out: LossOutput


def together(parts: Collection[Found]) -> LossOutput:
    """The sums over a batch from those over all of its parts."""
    terms: dict[str, list[Term]] = {}
    for part, out in parts:
        for name, term in out.terms.items():
            named = Term(term.values, part.samples[term.sample_ids])
            terms.setdefault(name, []).append(named)
    return LossOutput(
        loss=torch.stack([out.loss for _, out in parts]).sum(),
        tokens=sum(out.tokens for _, out in parts),
        terms={
            name: Term(
                torch.cat([term.values for term in found]),
                torch.cat([term.sample_ids for term in found]),
            )
            for name, found in terms.items()
        },
        references=sum(
            out.tokens if out.references is None else out.references for _, out in parts
        ),
    )
