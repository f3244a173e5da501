"""Whether the projected teacher still speaks for the teacher, or recites the training data.

Projectors that learn the labels too fast know the training answers by heart: what the student then
gets through them is its labels once more, sharpened, and no longer what the teacher thinks. Where a
student's and a teacher's token stand for the same bytes, their log-likelihoods can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.objectives.dual_space.align import Exchanged, rows_of
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, Matches, Term, View

#: One exact pair in so many is looked at, by where in its text it begins: so which they are does
#: not depend on batches, and it costs next to nothing.
ONE_IN = 16
#: The projected teacher recites where its loss on the labels is below this share of the teacher's
#: (on the demo it falls below when held-out answers begin to get worse, RESULTS.md).
RECITES = 0.5
#: Share of the newest log in the running means: single logs are of few pairs.
_NEWEST = 0.1
#: Logs before the running means say anything.
_LOGS = 10
#: Tokens whose logits are held at once: each block reads a whole head, which for few tokens is what
#: a GPU spends its time on.
_ROWS_AT_ONCE = 128


def watched_pairs(matches: Matches, exchanged: Exchanged, student: View) -> Tensor:
    """[P] bool, the exact pairs that are looked at."""
    ours = matches.exact[:, 0]
    met = rows_of(ours, exchanged.student_rows, len(student)) >= 0
    known = student.references[ours] != IGNORE_INDEX
    return (matches.spans[ours, 0] % ONE_IN == 0) & met & known


@torch.no_grad()
def label_losses(
    pairs: Tensor, exchanged: Exchanged, student: View, teacher: View
) -> dict[str, Term]:
    """The terms `teacher_nll` and `projected_nll`: -log p(label) in nats.

    Args:
        pairs: [W, 2] exact pairs, each student token with a projected state.
        exchanged: these states.
        student, teacher: both sides' tokens.
    """
    assert student.head is not None and teacher.head is not None and teacher.hidden is not None
    ours, theirs = pairs.unbind(1)
    t2s = rows_of(ours, exchanged.student_rows, len(student))
    ids = student.tokens.sample_ids[ours]
    losses = {
        "teacher_nll": (teacher.head, teacher.hidden[theirs], teacher.tokens.labels[theirs]),
        "projected_nll": (student.head, exchanged.t2s[t2s], student.tokens.labels[ours]),
    }
    return {name: Term(_nll(*of), ids) for name, of in losses.items()}


def _nll(head: OutputHead, hidden: Tensor, labels: Tensor) -> Tensor:
    head, losses = head.frozen(), [hidden.new_zeros(0, dtype=torch.float32)]
    blocks = zip(hidden.split(_ROWS_AT_ONCE), labels.split(_ROWS_AT_ONCE), strict=True)
    for states, targets in blocks if len(labels) else ():
        logits = head.logits(states.to(head.weight.dtype))
        losses.append(F.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="none"))
    return torch.cat(losses)


class RecitalWatch:
    """Says once that the projected teacher recites, from the means of the logs."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._logs = 0
        self._said = False

    def remark(self, means: Mapping[str, float]) -> str | None:
        """What to change, or None.

        Args:
            means: of the terms in the newest log.
        """
        if self._said or not {"teacher_nll", "projected_nll"} <= means.keys():
            return None
        self._logs += 1
        newest = max(_NEWEST, 1 / self._logs)
        for name in ("teacher_nll", "projected_nll"):
            before = self._means.get(name, means[name])
            self._means[name] = before + newest * (means[name] - before)
        teacher, projected = self._means["teacher_nll"], self._means["projected_nll"]
        if self._logs < _LOGS or projected >= RECITES * teacher:
            return None
        self._said = True
        return (
            f"the projected teacher knows the training answers better ({projected:.2f} nats a "
            f"token) than the teacher itself ({teacher:.2f}): the projectors have learned them by "
            "heart, and pass the labels on instead of the teacher. Lower "
            "dskd.objective.projector.learning_rate, or train fewer epochs."
        )
