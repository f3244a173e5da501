"""Virtual attention in a training: in front of the student's head, in the loss, in the record.

What is evaluated is what would be exported at that moment. Where attention fades out, that is the
student without it; where it is merged into the head, the student with it. What the student writes
to learn from, it writes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from transformers import TrainerCallback

from axolotl_dskd.config import VirtualAttentionConfig
from axolotl_dskd.losses import Budget
from axolotl_dskd.models.student import Student
from axolotl_dskd.objectives.base import Beside
from axolotl_dskd.output_head import Gate
from axolotl_dskd.ranks import sum_over_ranks
from axolotl_dskd.types import LossOutput, Per, Term, View
from axolotl_dskd.virtual_attention import VirtualAttention, block_margins

LOG = get_logger(__name__)

#: The student's learning rate, times this, is that of the attention.
_FASTER = 10.0
#: How far a weight must be able to move, in steps of about the learning rate as AdamW has them, or
#: attention stays even (RESULTS.md).
_FAR = 2.0


class Attending(TrainerCallback):
    """See the module.

    Args:
        config: its keys.
        module: attention over the student's blocks.
        student: whose head it stands in front of, from now on.
        budget: of chunks where margins are looked at.
        state: gives the trainer's state as it is now.
    """

    terms: ClassVar[dict[str, Per]] = {"attention_entropy": "student_token"}

    def __init__(
        self,
        config: VirtualAttentionConfig,
        module: VirtualAttention,
        student: Student,
        budget: Budget,
        state: Callable[[], Any],
    ) -> None:
        if config.leave == "merge":
            student.check_merging()
        self.config, self.module, self.student = config, module, student
        self._budget, self._state = budget, state
        self._is_merged = False
        self._sums: Tensor | None = None
        self._rate = 0.0
        student.gate = self.gate
        LOG.info(
            f"virtual attention: {len(module.names)} groups of tokens ({config.groups}) attend to "
            f"{config.blocks} blocks of the student's final state"
        )

    def beside(self, learning_rate: float) -> Beside:
        """How it is optimised.

        Args:
            learning_rate: the student's.
        """
        given = self.config.learning_rate
        self._rate = _FASTER * learning_rate if given == "auto" else given
        return Beside(self._rate)

    @property
    def strength(self) -> float:
        """λ at this moment."""
        return self.module.strength(self._state().global_step, self._state().max_steps)

    def gate(self, evaluates: bool) -> Gate | None:
        """What stands in front of the head; None where attention has left it."""
        if self._is_merged or (evaluates and self.config.leave == "anneal"):
            return None
        return self.module.gate(self.strength)

    def add_entropy(self, out: LossOutput, student: View) -> None:
        """Add γ N H̄ to the loss of a batch that is learned from; γ fades out as λ does."""
        entropy = self.module.entropy()
        weight = self.config.entropy_weight * self.strength / self.config.strength
        out.loss = out.loss + weight * out.tokens * entropy.to(out.loss.dtype)
        values = entropy.detach().expand(out.tokens)
        out.terms["attention_entropy"] = Term(values, student.tokens.sample_ids)

    # ---- what it shows -----------------------------------------------------------------------

    def begin_evaluation(self) -> None:
        """The batches to come are of one evaluation."""
        self._sums = None

    def observe(self, student: View, gate: Gate | None) -> None:
        """Where the margins of a batch that is evaluated come from.

        Args:
            gate: of the student that learns; the view is of the one that is evaluated.
        """
        assert student.head is not None
        view = replace(student, head=replace(student.head, gate=gate))
        margins = block_margins(view, self.config.blocks, self._budget).double()
        counted = torch.cat([margins, torch.ones_like(margins[:, :1])], 1)
        groups = self.module.group_of_token[student.tokens.labels]
        K = len(self.module.names)
        sums = counted.new_zeros(K, counted.shape[1]).index_add_(0, groups, counted)
        self._sums = sums if self._sums is None else self._sums + sums

    def margins(self) -> dict[str, Any]:
        """Of the evaluation that ends, over all ranks: the mean share of each block in the margin
        [K, n] by the label's group, and how many tokens of each group there were."""
        K, n = self.module.logits.shape
        sums = self._sums
        if sums is None:
            sums = torch.zeros(K, n + 1, dtype=torch.float64, device=self.module.logits.device)
        counts = sum_over_ranks(sums)[:, -1:]
        means = sums[:, :-1] / counts.clamp_min(1)
        return {"margins": _plain(means), "tokens": [int(count) for count in counts.flatten()]}

    def groups(self, tokens: list[bytes]) -> dict[str, Any]:
        """What does not change in a run, for its record."""
        return {
            "names": self.module.names,
            "sizes": self.module.group_of_token.bincount().tolist(),
            "examples": self.module.examples(tokens),
        } | self.config.model_dump()

    def attention(self) -> dict[str, Any]:
        """Of this moment, for the record."""
        return {
            "alpha": _plain(self.module.alpha()),
            "entropy": float(self.module.entropy().detach()),
            "strength": self.strength,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say it where the training is too short for the attention to move."""
        steps = round(state.max_steps * (1 - self.config.anneal * (self.config.leave == "anneal")))
        if self._rate * steps < _FAR:
            LOG.warning(
                f"virtual attention learns at a rate of {self._rate:g}: in {steps} steps at full "
                f"strength its weights can move by {self._rate * steps:.2g}, so it will stay "
                "nearly even and change nothing. Train longer, or set "
                f"dskd.virtual_attention.learning_rate to {_FAR / max(steps, 1):.1g}."
            )

    # ---- leaving -----------------------------------------------------------------------------

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Merge, or say that training ended before the attention had faded out."""
        if self.config.leave == "merge" and not self._is_merged:
            with torch.no_grad():
                self.student.merge(self.module.gate(self.config.strength))
            self._is_merged = True
        elif state.global_step < state.max_steps:
            LOG.warning(
                f"training ended at step {state.global_step} of {state.max_steps}, with virtual "
                f"attention at strength {self.strength:.2f}: the student that is exported was "
                "trained with it and is used without it. Its evaluations measured it without."
            )


def attend(trainer: Any, config: VirtualAttentionConfig, budget: Budget) -> Attending:
    """Virtual attention of a trainer that is about to train, from now on.

    Args:
        config: its keys.
        budget: of chunks where margins are looked at.
    """
    student, device = trainer.student, trainer.accelerator.device
    tokenizer, seed = trainer.processing_class, trainer.args.seed
    with student.gathered() as (head, _):
        module = VirtualAttention(config, tokenizer, student.vocab_size, head, device, seed)
    return Attending(config, module, student, budget, lambda: trainer.state)


def _plain(numbers: Tensor) -> list[list[float]]:
    """As they stand in a record."""
    return [[round(x, 5) for x in row] for row in numbers.detach().tolist()]
