"""How the projectors begin: from the shared tokens, following a head that trains, and how well.

Knows heads, hidden states and which ids of the two vocabularies are shared; nothing of tokenizers,
batches or the training loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.objectives.dual_space import Aligned
from axolotl_dskd.objectives.dual_space.projectors import (
    ROWS_AT_ONCE,
    Gram,
    Projectors,
    SharedTokens,
    start_from_shared_tokens,
)
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.ranks import is_first

LOG = get_logger(__name__)

#: A projection that keeps less than this share of first choices says too little to distil from.
POOR_AGREEMENT = 0.2
#: Tokens whose logits the report holds at once.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class SharedIds:
    """The k ids of both vocabularies that stand for the same bytes: [k] int64 each."""

    student: Tensor
    teacher: Tensor

    def __len__(self) -> int:
        return len(self.student)


def shared_rows(
    ids: SharedIds,
    heads: tuple[OutputHead, OutputHead],
    embeddings: tuple[Tensor, Tensor],
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


class HeadFollower:
    """Keeps `s2t` right for a student head that trains.

    The start of s2t solves `teacher_head @ s2t ≈ student_head` for the head as it was. Each time
    the head has changed, the solution's change is added to the weights, so what training has added
    to them stays. The teacher's side of the normal equations is factorised once.

    The solution for the head that was followed last is a buffer of the projectors,
    `s2t_solution` [D, d] float32, and so part of their checkpoints.

    Args:
        projectors: in least squares, on every rank.
        ids: the tokens that both vocabularies share.
        teacher: its output head.
    """

    def __init__(self, projectors: Projectors, ids: SharedIds, teacher: OutputHead) -> None:
        self.projectors = projectors
        self.ids = ids
        self.teacher = teacher
        self.gram = Gram(teacher.rows(index)[0] for index in ids.teacher.split(ROWS_AT_ONCE))
        projectors.register_buffer("s2t_solution", projectors.s2t.weight.detach().clone())
        LOG.info("s2t follows the student's output head, which trains")

    @torch.no_grad()
    def follow(self, student: OutputHead) -> None:
        """After an update of the student, with its head as it is now, whole."""
        rows = (self.teacher.rows(index)[0] for index in self.ids.teacher.split(ROWS_AT_ONCE))
        targets = (student.rows(index)[0] for index in self.ids.student.split(ROWS_AT_ONCE))
        weight, before = self.projectors.s2t.weight, self.projectors.s2t_solution
        solution = self.gram.solve(zip(rows, targets, strict=True)).to(weight)
        weight += solution - before
        before.copy_(solution)


def start_projectors(
    projectors: Projectors,
    init: str,
    ids: SharedIds,
    heads: tuple[OutputHead, OutputHead],
    embeddings: tuple[Tensor, Tensor],
) -> bool:
    """Least squares over the shared tokens, where configured and where these are enough.

    On rank 0, which alone may have the student's weights yet; the others take over its result.

    Args:
        init: `dskd.projector.init`.
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


class StartReport:
    """What the projectors' start gives, measured on the exact pairs of the first batches.

    Over the tokens that both vocabularies share, at temperature 1:

        teacher → student   the teacher's distribution and that of its projected states
        student → teacher   the student's distribution and that of its projected states
        as it is            the teacher's distribution and the student's own

    each as the share of pairs whose first choices are the same, and KL in nats.
    """

    def __init__(self, ids: SharedIds, wanted: int = 1024, per_batch: int = 256) -> None:
        self.ids = ids
        self.wanted = wanted
        self.per_batch = per_batch
        self.pairs = 0
        self.sums = torch.zeros(3, 2, dtype=torch.float64)

    @property
    def complete(self) -> bool:
        """Enough pairs were seen."""
        return self.pairs >= self.wanted

    @torch.no_grad()
    def add(
        self,
        pairs: Tensor,
        aligned: Aligned,
        states: tuple[Tensor, Tensor],
        heads: tuple[OutputHead, OutputHead],
    ) -> None:
        """Count some pairs of a batch in.

        Args:
            pairs: [P, 2] indices of the student's and of the teacher's token.
            aligned: the projected states.
            states, heads: student's first.
        """
        ours, theirs = pairs[: self.per_batch].unbind(1)
        rows = theirs
        if aligned.teacher_rows is not None:  # row of s2t_hidden of each teacher token
            place = torch.full((len(states[1]),), -1, dtype=torch.long, device=theirs.device)
            place[aligned.teacher_rows] = torch.arange(
                len(aligned.teacher_rows), device=place.device
            )
            rows = place[theirs]
        met = rows >= 0
        if aligned.student_mask is not None:
            met &= aligned.student_mask[ours]
        ours, theirs, rows = ours[met], theirs[met], rows[met]
        if not len(ours):
            return
        heads = heads[0].frozen(), heads[1]
        for some in torch.arange(len(ours), device=ours.device).split(_ROWS_AT_ONCE):
            self._compare(
                heads,
                (states[0][ours[some]], states[1][theirs[some]]),
                (aligned.t2s_hidden[ours[some]], aligned.s2t_hidden[rows[some]]),
            )
        self.pairs += len(ours)

    def _compare(
        self,
        heads: tuple[OutputHead, OutputHead],
        states: tuple[Tensor, Tensor],
        projected: tuple[Tensor, Tensor],
    ) -> None:
        def log_p(side: int, hidden: Tensor) -> Tensor:
            logits = heads[side].logits(hidden.to(heads[side].weight.dtype))
            index = (self.ids.student, self.ids.teacher)[side].to(logits.device)
            return logits[:, index].float().log_softmax(-1)

        student, teacher = log_p(0, states[0]), log_p(1, states[1])
        compared = (
            (teacher, log_p(0, projected[0])),
            (student, log_p(1, projected[1])),
            (teacher, student),
        )
        for k, (p, q) in enumerate(compared):
            same = (p.argmax(-1) == q.argmax(-1)).sum()
            divergence = (p.exp() * (p - q)).sum()
            self.sums[k] += torch.stack([same.double(), divergence.double()]).cpu()

    def means(self) -> dict[str, tuple[float, float]]:
        """`{"t2s", "s2t", "as it is": (agreement, KL)}`."""
        means = (self.sums / max(self.pairs, 1)).tolist()
        return dict(zip(("t2s", "s2t", "as it is"), map(tuple, means), strict=True))

    def text(self) -> str:
        """The report, one sentence."""
        if not self.pairs:
            return "Projectors at the start: no exact pair to measure them on"
        m = self.means()
        return (
            f"Projectors at the start, on {self.pairs} exact pairs over {len(self.ids)} shared "
            f"tokens: the teacher's first choice stays first for {m['t2s'][0]:.1%} after "
            f"projection (KL {m['t2s'][1]:.2f} nats), the student's own for {m['s2t'][0]:.1%} "
            f"(KL {m['s2t'][1]:.2f}); unprojected, the student's is the teacher's for "
            f"{m['as it is'][0]:.1%} (KL {m['as it is'][1]:.2f})"
        )

    def warning(self) -> str | None:
        """What is wrong with the start and what to change, or None."""
        means = self.means()
        poor = [name for name in ("t2s", "s2t") if means[name][0] < POOR_AGREEMENT]
        if not self.pairs or not poor:
            return None
        which = {"t2s": "projected teacher", "s2t": "projected student"}
        names = " and ".join(f"the {which[name]}" for name in poor)
        return (
            f"{names} hardly says what it said before projection (see above), so the first steps "
            "distil noise. Give the projectors time: dskd.projector.warmup_steps: 100 to 500 lets "
            "them train alone; and leave dskd.projector.init at auto or lstsq."
        )
