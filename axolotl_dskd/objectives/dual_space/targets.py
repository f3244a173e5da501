"""What the teacher would say itself, in the student's vocabulary: targets of exact pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, Side


@torch.no_grad()
def greedy_tokens(head: OutputHead, hidden: Tensor, chunk_tokens: int) -> Tensor:
    """[P] the most likely token of each state, chunk by chunk: [P, D] -> [P] int64."""
    states = hidden.detach().to(head.weight.dtype)
    if not len(states):
        return torch.zeros(0, dtype=torch.long, device=hidden.device)
    return torch.cat([head.logits(rows).argmax(-1) for rows in states.split(chunk_tokens)])


def teacher_targets(
    greedy: Tensor, pairs: Tensor, student: Side, teacher: Side, translation: Tensor
) -> Tensor:
    """[P] what the projected teacher should say for each pair (arXiv 2504.11426, §3.4).

    That is the teacher's own most likely token, in the student's vocabulary: the student's label
    where the teacher would say its label (the two stand for the same bytes, or both end the turn),
    else the token of the same bytes. -100 where there is none: a token without equal is left out
    rather than mapped to one that says something else. So is any
    where one side's label has the space that sentencepiece writes before a text and the other's
    has not: there the teacher's tokens all begin with a space too much.

    Args:
        greedy: [P] the teacher's most likely token of each pair.
        pairs: [P, 2] indices of the student's and of the teacher's token.
        student, teacher: the supervised tokens.
        translation: [U] student id of the same bytes for each teacher id, -100 for none.
    """
    ours, theirs = pairs.unbind(1)
    labels, teacher_labels = student.labels[ours], teacher.labels[theirs]
    label_translated = translation[teacher_labels]
    comparable = (label_translated == labels) | (label_translated == IGNORE_INDEX)
    translated = torch.where(comparable, translation[greedy], IGNORE_INDEX)
    return torch.where(greedy == teacher_labels, labels, translated)
