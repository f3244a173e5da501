"""What the projectors' start gives, measured on the first batches of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.losses.agreement import agreement
from axolotl_dskd.objectives.dual_space.align import Exchanged, rows_of
from axolotl_dskd.objectives.dual_space.start import SharedIds
from axolotl_dskd.output_head import OutputHead

#: A projection that keeps less than this share of first choices says too little to distil from.
POOR_AGREEMENT = 0.2
#: Tokens whose logits the report holds at once.
_ROWS_AT_ONCE = 16


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
        self.pairs = self.batches = 0
        self.sums = torch.zeros(3, 2, dtype=torch.float64)

    @property
    def complete(self) -> bool:
        """Enough pairs were seen."""
        return self.pairs >= self.wanted

    @torch.no_grad()
    def add(
        self,
        pairs: Tensor,
        exchanged: Exchanged,
        states: tuple[Tensor, Tensor],
        heads: tuple[OutputHead, OutputHead],
    ) -> None:
        """Count some pairs of a batch in.

        Args:
            pairs: [P, 2] indices of the student's and of the teacher's token.
            exchanged: the projected states.
            states, heads: student's first.
        """
        self.batches += 1
        ours, theirs = pairs[: self.per_batch].unbind(1)
        t2s = rows_of(ours, exchanged.student_rows, len(states[0]))
        s2t = rows_of(theirs, exchanged.teacher_rows, len(states[1]))
        met = ((t2s >= 0) & (s2t >= 0)).nonzero().flatten()
        heads = heads[0].frozen(), heads[1]
        for index in met.split(_ROWS_AT_ONCE):
            self._compare(
                heads,
                (states[0][ours[index]], states[1][theirs[index]]),
                (exchanged.t2s[t2s[index]], exchanged.s2t[s2t[index]]),
            )
        self.pairs += len(met)

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
            kl, same_choice = agreement(p, q)
            self.sums[k] += torch.stack([same_choice.double().sum(), kl.double().sum()]).cpu()

    def means(self) -> dict[str, tuple[float, float]]:
        """`{"t2s", "s2t", "as it is": (agreement, KL)}`."""
        means = (self.sums / max(self.pairs, 1)).tolist()
        return dict(zip(("t2s", "s2t", "as it is"), map(tuple, means), strict=True))

    def say(self, log: Any) -> None:
        """Write it to a log, and what is wrong with it."""
        log.info(self.text())
        if warning := self.warning():
            log.warning(warning)

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
            "distil noise. Give the projectors time: dskd.objective.projector.warmup_steps: 100 to "
            "500 lets them train alone; and leave dskd.objective.projector.init at auto or lstsq."
        )
