"""The dual-space objective: an exchange, what the projected teacher is taught, and both spaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.config import DualSpaceConfig
from axolotl_dskd.data.token_bytes import shared_tokens, translation
from axolotl_dskd.objectives.base import (
    Beside,
    Facts,
    Objective,
    Pair,
    Setting,
    equal_ids,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.dual_space.align import (
    Exchanged,
    exchange_by_attention,
    exchange_pairs,
)
from axolotl_dskd.objectives.dual_space.choice import choose_alignment
from axolotl_dskd.objectives.dual_space.follow import HeadFollower
from axolotl_dskd.objectives.dual_space.projectors import Projectors
from axolotl_dskd.objectives.dual_space.report import StartReport
from axolotl_dskd.objectives.dual_space.share import TokenShare
from axolotl_dskd.objectives.dual_space.spaces import Terms, student_space, teacher_space
from axolotl_dskd.objectives.dual_space.start import SharedIds, start_projectors
from axolotl_dskd.objectives.dual_space.targets import greedy_tokens, teacher_targets
from axolotl_dskd.objectives.dual_space.watch import RecitalWatch, label_losses, watched_pairs
from axolotl_dskd.objectives.written import both_divergences
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.supervision import indices_of
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Needs, Per, View

LOG = get_logger(__name__)

#: Learning rates of projectors by how they start: a published one, and one that keeps what least
#: squares found (RESULTS.md, "Defaults").
RATE_FROM_RANDOM, RATE_FROM_LEAST_SQUARES = 1e-3, 1e-4
#: Steps from one following of a head that trains to the next. A head hardly moves in so few, and
#: the product of both vocabularies' shared rows in float64 costs as much as several of the loss's.
FOLLOWS_EVERY = 16


@dataclass(frozen=True)
class _Kind:
    """What an `alignment:` stands for.

    Attributes:
        attention: states meet by attention; else as pairs.
        teachers_choice: the projected teacher is taught to say what the teacher would; else the
            student's label.
        mask_wrong: what `agreement_mask: auto` means.
    """

    attention: bool = False
    teachers_choice: bool = False
    mask_wrong: bool = False


_KINDS = {
    "positions": _Kind(),
    "eta": _Kind(teachers_choice=True),
    "cma": _Kind(attention=True, mask_wrong=True),
}


class DualSpace(Objective[DualSpaceConfig], config=DualSpaceConfig):
    """arXiv 2406.17328, extended in 2504.11426; the terms are in `spaces`."""

    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "student_space": "student_token",
        "projector_ce": "reference_token",
        "teacher_space": "student_token",
        "projector_accuracy": "reference_token",
        "teacher_accuracy": "value",
        "teacher_nll": "value",
        "projected_nll": "value",
        "aligned": "student_token",
    }
    module: Projectors

    def __init__(self, config: DualSpaceConfig, facts: Facts, setting: Setting) -> None:
        super().__init__(config, facts, setting)
        self.alignment, self._why = choose_alignment(config, facts)
        self._kind = _KINDS[self.alignment]
        self.needs = Needs(embeddings=self._kind.attention)
        mask = config.agreement_mask
        divergence, of_written = both_divergences(config)
        self.weights = Terms(
            divergence=divergence,
            divergence_written=of_written,
            temperature=config.temperature,
            kd_ratio=setting.kd_ratio,
            student_space_weight=config.student_space_weight,
            teacher_space_weight=config.teacher_space_weight,
            mask_wrong=self._kind.mask_wrong if mask == "auto" else mask,
        )
        self._share = TokenShare(config.teacher_space_share, setting.seed)
        self.beside = self._beside(started_in_least_squares=config.projector.init != "random")
        self._follower: HeadFollower | None = None
        self._report: StartReport | None = None
        self._watch = RecitalWatch()

    def describe(self) -> str:
        """How tokens meet, and why."""
        return f"dual_space with alignment {self.alignment}: {self._why}"

    def advice(self) -> str | None:
        """What `alignment: auto` would take, where that is another one."""
        automatic = self.config.model_copy(update={"alignment": "auto"})
        alignment, why = choose_alignment(automatic, self.facts)
        return None if alignment == self.alignment else f"alignment: {alignment}, {why}"

    def begin(self, pair: Pair) -> None:
        """Build the projectors and solve for their start."""
        facts, device = self.facts, pair.device
        shared = shared_tokens(facts.student, facts.teacher, facts.turn_ends)
        ids = SharedIds(*(torch.tensor(side, device=device) for side in shared))
        sizes = pair.heads[0].hidden_size, pair.heads[1].hidden_size
        self.module = Projectors(
            *sizes, with_query=self._kind.attention, seed=self.setting.seed
        ).to(device)
        started = start_projectors(
            self.module, self.config.projector.init, ids, pair.heads, pair.embeddings
        )
        self.beside = self._beside(started)
        if started and pair.heads[0].trainable:
            self._follower = HeadFollower(self.module, ids, pair.heads[1])
        table = []
        if self._kind.teachers_choice:
            turn_ends = facts.turn_ends and facts.turn_ends[::-1]
            table = translation(facts.teacher, facts.student, turn_ends=turn_ends)
        self._translation = torch.tensor(table, dtype=torch.long, device=device)
        self._report = StartReport(ids) if len(ids) else None
        if not self.setting.references:
            how = "from least squares" if started else "at random"
            LOG.warning(
                "Every step learns from what the student writes, and only the data's answers teach "
                f"the projector from teacher to student: it stays as it starts, {how}. Set "
                "dskd.samples.share below 1."
            )

    def _beside(self, started_in_least_squares: bool) -> Beside:
        """How the projectors are optimised; `auto` is known for good once they have started."""
        keys = self.config.projector
        rate = keys.learning_rate
        if rate == "auto":
            rate = RATE_FROM_LEAST_SQUARES if started_in_least_squares else RATE_FROM_RANDOM
        return Beside(rate, keys.weight_decay, keys.warmup_steps)

    def follow(self, step: int, head: OutputHead) -> None:
        """Draw the step's tokens; let s2t follow a head that trains; end the report of the
        start."""
        self._share.draw(step)
        warming_up = self.beside is not None and step < self.beside.warmup_steps
        due = step % FOLLOWS_EVERY == 1
        if self._follower is not None and due and not warming_up:
            self._follower.follow(head)
        if step and self._report is not None:
            # Projectors of a resumed run are past their start.
            if self._report.batches:
                self._report.say(LOG)
            self._report = None

    def remark(self, means: Mapping[str, float]) -> str | None:
        """Whether the projected teacher has learned the training answers by heart."""
        return self._watch.remark(means)

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """See the class."""
        return self.losses(student, teacher, matches, *self.exchange(student, teacher, matches))

    def losses(
        self,
        student: View,
        teacher: View,
        matches: Matches,
        exchanged: Exchanged,
        targets: Tensor | None,
    ) -> LossOutput:
        """Sums over a batch, given what `exchange` returned."""
        terms, budget = self.weights, self.setting.budget
        picked = self._picked(student, matches, exchanged, targets)
        stream = student_stream(student)
        out = student_space(
            stream,
            student.tokens,
            exchanged.t2s if terms.student_space_weight else None,
            exchanged.student_rows,
            targets if terms.student_space_weight else None,
            terms,
            budget,
            None if student.written is None else student.references,
            picked.get("taught"),
        )
        if terms.teacher_space_weight:
            s2t, rows, share = exchanged.s2t, exchanged.teacher_rows, 1.0
            if (drawn := picked.get("drawn")) is not None:
                s2t, share = s2t[drawn], self._share.share
                rows = drawn if rows is None else rows[drawn]
            loss, values = teacher_space(
                teacher_stream(teacher), teacher.tokens, s2t, rows, terms, budget, share
            )
            out.loss = out.loss + loss
            out.terms |= values
        if terms.student_space_weight:
            watched = matches.exact[picked["watched"]]
            out.terms |= label_losses(watched, exchanged, student, teacher)
        out.terms["aligned"] = participation(exchanged.student_rows, student.tokens)
        if self._report is not None and torch.is_grad_enabled():
            assert student.hidden is not None and teacher.hidden is not None
            assert student.head is not None and teacher.head is not None
            self._report.add(
                matches.exact,
                exchanged,
                (student.hidden, teacher.hidden),
                (student.head, teacher.head),
            )
            if self._report.complete:
                self._report.say(LOG)
                self._report = None
        return out

    def _picked(
        self, student: View, matches: Matches, exchanged: Exchanged, targets: Tensor | None
    ) -> dict[str, Tensor]:
        """Indices of what numbers decide, found together.

        Returns:
            Of those that there are: `watched`, pairs by which recital is seen; `taught`, projected
            states with a target; `drawn`, those that the step's teacher space is taken over, where
            these are not all.
        """
        masks = {}
        if self.weights.student_space_weight:
            masks["watched"] = watched_pairs(matches, exchanged, student)
            if targets is not None:
                masks["taught"] = targets != IGNORE_INDEX
        drawing = self._share.share < 1.0 and torch.is_grad_enabled()
        if self.weights.teacher_space_weight and drawing:
            begins, rows = matches.teacher_spans[:, 0], exchanged.teacher_rows
            masks["drawn"] = self._share.taken(begins if rows is None else begins[rows])
        return dict(zip(masks, indices_of(*masks.values()), strict=True)) if masks else {}

    def exchange(
        self, student: View, teacher: View, matches: Matches
    ) -> tuple[Exchanged, Tensor | None]:
        """The projected states, and the targets of the projected teacher where these are not the
        student's labels."""
        if self._kind.attention:
            causal = matches if self.config.causal else None
            return exchange_by_attention(student, teacher, self.module, causal=causal), None
        pairs = matches.exact
        if not self._kind.teachers_choice:
            pairs = equal_ids(pairs, student.tokens, teacher.tokens)
            return exchange_pairs(student, teacher, pairs, self.module), None
        exchanged = exchange_pairs(student, teacher, pairs, self.module)
        source = teacher_stream(teacher)
        states = source.hidden[pairs[:, 1]]
        size = self.setting.budget.size(source)
        greedy = greedy_tokens(source.head, states, size)
        targets = teacher_targets(greedy, pairs, student.tokens, teacher.tokens, self._translation)
        return exchanged, targets
