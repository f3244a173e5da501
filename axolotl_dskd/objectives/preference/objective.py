"""Preference distillation: DPO whose reference is the teacher (DPKD, arXiv 2406.19774).

    x    = [log q(y_w) − log p(y_w)] / n_w − [log q(y_l) − log p(y_l)] / n_l
    loss = (1 - kd_ratio) · CE + kd_ratio · Σ_pairs (n_w + n_l) · −log σ(β x)

q is the student, p the teacher, each summed over its own tokens of an answer: none of them meet,
so any two tokenizers will do. y_w is the answer to prefer, of the data or of the teacher; y_l the
student's own, written anew as training goes: where q = p, the gradient vanishes on average over
fresh answers only. n are student tokens (1 with sums). A pair is counted by its student tokens, so
that it weighs as much beside cross-entropy as other terms do: where all rows are in pairs and all
pairs equally long, the loss is the paper's mean over pairs. Nothing in it keeps both answers from
getting less likely; the cross-entropy of data and preferred answers does.

Published code is another method (`form: token`), without answers of the student:

    a = argmax p_i,  b = argmax q_i;  x_i = [log q(a) − log q(b)] − [log p(a) − log p(b)]

It computes in bfloat16; here in float32. Where both choose alike, nothing is learned.

Four products, five where the head trains; by token three, and four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import PreferenceConfig
from axolotl_dskd.losses import Part, TermSpec, Values, by_rows, over, over_logprobs, with_ce
from axolotl_dskd.objectives.base import (
    Facts,
    Objective,
    Setting,
    equal_ids,
    pair_chunks,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.preference.ahead import cost, cost_and_slope
from axolotl_dskd.objectives.preference.sequence import Pairs, per_sample, teachers_sums
from axolotl_dskd.objectives.preference.watch import FallWatch
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Needs, Per, Term, View


class Preference(Objective[PreferenceConfig], config=PreferenceConfig):
    """See the module."""

    without_states = "form: sequence, which compares whole answers"
    terms: ClassVar[dict[str, Per]] = {
        "ce": "value",
        "preference": "student_token",
        "margin_preferred": "value",
        "margin_other": "value",
        "won": "value",
        "logprob_preferred": "value",
        "logprob_other": "value",
        "left_out": "value",
        "same_choice": "value",
        "aligned": "student_token",
    }

    def __init__(self, config: PreferenceConfig, facts: Facts, setting: Setting) -> None:
        by_token = config.form == "token"
        self.needs = Needs(
            "states" if by_token else "labels",
            one_vocabulary=by_token,
            written=not by_token,
            contrast=not by_token,
        )
        super().__init__(config, facts, setting)
        self._watch = FallWatch()

    def describe(self) -> str:
        """What is preferred to what."""
        config = self.config
        what = "the teacher's first choice to the student's, token by token"
        if config.form == "sequence":
            per = "per token" if config.length_norm else "summed"
            what = f"given answers to the student's own, log-ratios {per}"
        free = ", without the teacher's" if config.reference_free else ""
        return f"preference: {what}{free}, {config.loss} at beta {config.strength:g}"

    def remark(self, means: Mapping[str, float]) -> str | None:
        """Whether both answers are becoming less likely."""
        return self._watch.remark(means)

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch.

        Raises:
            ValueError: answers were written, but none to prefer stands beside them.
        """
        if self.config.form == "token":
            return self._by_token(student, teacher, matches)
        return self._by_sequence(student, teacher)

    def _by_sequence(self, student: View, teacher: View) -> LossOutput:
        written = student.written
        if written is not None and written.pairs is None and bool(written.samples.any()):
            raise ValueError(
                "dskd.objective: preference needs a preferred answer beside each that the student "
                "writes, in one batch, but these samples come without (dskd.samples)."
            )
        config, budget, ratio = self.config, self.setting.budget, self.setting.kd_ratio
        tokens, pairs = student.tokens, Pairs.of(student, teacher)
        sides = pairs.preferred, pairs.other
        samples = pairs.samples()
        theirs = torch.zeros_like(samples, dtype=torch.float64)
        if not config.reference_free and len(pairs):
            theirs = teachers_sums(teacher, samples, budget)
        taught = student.references != IGNORE_INDEX
        if written is not None and written.pairs is not None:
            taught |= torch.isin(tokens.sample_ids, written.pairs[:, 0])
        taught = taught.nonzero().flatten()
        found: Values = {}

        def loss(log_q: Tensor, _: Tensor) -> Tensor:
            ours = per_sample(log_q.double(), tokens, len(samples))
            margins = [ours[s] - theirs[s] for s in sides]
            counts = [pairs.lengths[s].to(ours) for s in sides]
            if config.length_norm:
                margins = [m / n for m, n in zip(margins, counts, strict=True)]
            ahead = margins[0] - margins[1]
            costs = pairs.spread(cost(ahead, config), tokens)
            found.update(zip(("margin_preferred", "margin_other"), margins, strict=True))
            found["won"] = (ahead > 0).to(ours)
            found["logprob_preferred"], found["logprob_other"] = (
                ours[s] / n for s, n in zip(sides, counts, strict=True)
            )
            found["preference"], found["ce"] = costs, -log_q[taught]
            return ((1.0 - ratio) * found["ce"].sum() + ratio * costs.sum()).to(log_q.dtype)

        total = over_logprobs(student_stream(student), tokens.labels, budget, None, loss)
        ids = {"preference": tokens.sample_ids, "ce": tokens.sample_ids[taught]}
        terms = {
            name: Term(values.detach(), ids.get(name, pairs.preferred))
            for name, values in found.items()
        }
        terms["left_out"] = Term(pairs.left_out.float(), pairs.first)
        terms["aligned"] = participation(samples[tokens.sample_ids].nonzero().flatten(), tokens)
        return LossOutput(total, len(tokens), terms)

    def _by_token(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        config, ratio, tokens = self.config, self.setting.kd_ratio, student.tokens
        pairs = equal_ids(matches.exact, tokens, teacher.tokens)
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}

        def function(rows: Part, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
            z, t = logits["student"], logits["teacher"]
            choices = t.argmax(-1, keepdim=True), z.argmax(-1, keepdim=True)
            ours, theirs = ((x.gather(-1, choices[0]) - x.gather(-1, choices[1])) for x in (z, t))
            ahead = ours if config.reference_free else ours - theirs
            value, slope = cost_and_slope(ahead, config)
            gradient = torch.zeros_like(z).scatter_(-1, choices[0], ratio * slope)
            gradient.scatter_add_(-1, choices[1], -ratio * slope)
            same = choices[0] == choices[1]
            values = {"preference": value, "same_choice": same.to(value)}
            return {n: x.squeeze(-1) for n, x in values.items()}, {"student": gradient}

        sums = over(
            streams,
            pair_chunks(pairs, streams, self.setting.budget),
            by_rows(with_ce(function, student.references, 1.0 - ratio)),
            {
                "ce": TermSpec("student", 1.0 - ratio),
                "preference": TermSpec("student", ratio),
                "same_choice": TermSpec("student"),
            },
        )
        ids, values = tokens.sample_ids, sums.values
        taught = (student.references != IGNORE_INDEX).nonzero().flatten()
        terms = {
            "ce": Term(values["ce"][taught], ids[taught]),
            "preference": Term(values["preference"], ids),
            "same_choice": Term(values["same_choice"][pairs[:, 0]], ids[pairs[:, 0]]),
            "aligned": participation(pairs[:, 0], tokens),
        }
        return LossOutput(sums.loss, len(tokens), terms)
