"""Which steps learn from what: the data set's rows, answers written anew, or kept ones.

DistiLLM's scheduler (Ko et al. 2024, arXiv 2402.03898), with one draw a step that all ranks share.
Knows numbers; nothing of rows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from typing import Any

from axolotl_dskd.config import StudentSamplesConfig

#: By how much the share of `adaptive` grows (DistiLLM's).
STEP = 0.1


class Take(Enum):
    """What a step learns from."""

    DATASET = "dataset"
    WRITTEN = "written"
    KEPT = "kept"


@dataclass
class Schedule:
    """Decides from a number that is drawn once a step.

    Attributes:
        config: shares, margins and the replay's schedule.
        share: of the steps that learn from the student's answers; moves where it is adaptive.
        reference: validation loss at the last move, or of the untrained student; None: not
            known yet.
        evaluated_at: step of the last evaluation that counted.
    """

    config: StudentSamplesConfig
    share: float = 0.0
    reference: float | None = None
    evaluated_at: int = -1

    def __post_init__(self) -> None:
        self.share = self.config.adaptive_start if self.is_adaptive else float(self.config.share)

    @property
    def is_adaptive(self) -> bool:
        """Whether the share follows the validation loss."""
        return self.config.share == "adaptive"

    def fresh(self, step: int, total: int) -> float:
        """Below which draws are answered anew although the buffer is full.

        Args:
            step: from 1.
            total: steps of the training.
        """
        done = step / total
        part = {"decreasing": 1 - done, "increasing": done, "constant": 0.5}
        return self.share * part[self.config.replay_schedule]

    def take(self, draw: float, step: int, total: int, *, full: bool) -> Take:
        """What a step learns from.

        Args:
            draw: uniform in [0, 1).
            step, total: see `fresh`.
            full: the buffer has all the rows that it keeps; never where none are kept.
        """
        if draw >= self.share:
            return Take.DATASET
        return Take.KEPT if full and draw >= self.fresh(step, total) else Take.WRITTEN

    def draw(self, step: int) -> float:
        """The number of a step, the same on every rank, whatever was drawn before."""
        return random.Random(f"{self.config.seed} {step}").random()

    def evaluated(self, loss: float, step: int) -> None:
        """Let an adaptive share grow where the validation loss has risen since its last move.

        Args:
            loss: cross-entropy per token.
            step: optimizer steps made; of several evaluations at one step the first counts.
        """
        if not self.is_adaptive or step <= self.evaluated_at:
            return
        self.evaluated_at = step
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.config.adaptive_margin:
            self.share, self.reference = min(self.share + STEP, 1.0), loss

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "share": self.share,
            "reference": self.reference,
            "evaluated_at": self.evaluated_at,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` returned."""
        if self.is_adaptive:
            self.share = float(state["share"])
            self.reference, self.evaluated_at = state["reference"], int(state["evaluated_at"])
