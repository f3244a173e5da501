"""How the projectors begin: from the tokens that both vocabularies share.

Knows heads, embeddings and which ids of the two vocabularies are shared; nothing of tokenizers,
batches or the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.objectives.dual_space.projectors import (
    ROWS_AT_ONCE,
    Projectors,
    SharedTokens,
    start_from_shared_tokens,
)
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.ranks import is_first

LOG = get_logger(__name__)


@dataclass(frozen=True)
class SharedIds:
    """The k ids of both vocabularies that stand for the same bytes: [k] int64 each."""

    student: Tensor
    teacher: Tensor

    def __len__(self) -> int:
        return len(self.student)


def shared_rows(
    ids: SharedIds,
    heads: tuple[OutputHead, ...],
    embeddings: tuple[Tensor, ...],
    rows_at_once: int = ROWS_AT_ONCE,
) -> Iterator[SharedTokens]:
    """The shared tokens' rows of both models (student's first), on the device of the ids.

    Block by block: all rows together would take gigabytes beside large models.
    """
    device = ids.student.device
    for block in zip(ids.student.split(rows_at_once), ids.teacher.split(rows_at_once), strict=True):
        (ours, our_bias, our_embedding), (theirs, their_bias, their_embedding) = (
            (
                *head.rows(index.to(head.weight.device)),
                embedding.detach()[index.to(embedding.device)],
            )
            for head, embedding, index in zip(heads, embeddings, block, strict=True)
        )
        yield SharedTokens(
            student_head=ours.to(device),
            student_embedding=our_embedding.to(device),
            teacher_head=theirs.to(device),
            teacher_embedding=their_embedding.to(device),
            student_bias=None if our_bias is None else our_bias.to(device),
            teacher_bias=None if their_bias is None else their_bias.to(device),
        )


def start_projectors(
    projectors: Projectors,
    init: str,
    ids: SharedIds,
    heads: tuple[OutputHead, ...],
    embeddings: tuple[Tensor, ...],
) -> bool:
    """Least squares over the shared tokens, where configured and where these are enough.

    On rank 0, which alone may have the student's weights yet; the others take over its result.

    Args:
        init: `dskd.objective.projector.init`.
        ids: the tokens that both vocabularies share.
        heads, embeddings: student's first.

    Returns:
        Whether the projectors start in least squares.
    """
    needed = max(head.hidden_size for head in heads)
    if init == "random" or (init == "auto" and len(ids) < needed):
        why = f"{len(ids)} tokens are shared, {needed} would determine a least-squares start"
        LOG.info(f"Projectors start at random: {'as configured' if init == 'random' else why}")
        return False
    if is_first():
        start_from_shared_tokens(projectors, shared_rows(ids, heads, embeddings))
    LOG.info(f"Projectors start in least squares over {len(ids)} shared tokens")
    return True
