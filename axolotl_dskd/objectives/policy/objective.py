"""Policy gradient on text that the student wrote: MiniLLM (Gu et al. 2023, arXiv 2306.08543).

    r_i = clip((log p − log q_old) / s, ±c)   of a chunk, at its last token i;   0 elsewhere
    R_i = r_i + γ R_{i+1},  L_i = tokens from i on,  A_i = whitened R_i / L_i
    policy      = Σ_i −w_i min(A_i ρ_i, A_i clip(ρ_i, 1 ± ε)),   ρ_i = q(y_i) / q_old(y_i)
    single_step = Σ_i KL(q_i ‖ p_i)
    loss = (1 - kd_ratio) · CE of the data set's rows + kd_ratio · (policy + single_step)

q is the student, q_old as it was when it wrote, p the teacher, all at temperature 1. A chunk lies
between byte boundaries that both sides have (`Matches.groups`); of one vocabulary it is a token.
Text behind the last such boundary takes no part. w is the student's probability over that of
whoever drew the token, where the teacher took part in drawing. The single-step term needs p over
the student's vocabulary, so it is for one vocabulary.

This is the paper's method, not its published code, which departs from it:

- it counts a token's own reward twice, in A_i and, exactly, in the single-step term. Here a token
  with that term has R_{i+1} / L_{i+1}, what comes after it;
- it clips w ρ, which stops a token from teaching though the student has not moved. Here ρ alone;
- it whitens over a whole batch, padding included. Here over the supervised tokens of the steps
  before (see `returns.Moments`): that a token's loss does not depend on its batch is this project's
  rule. The first step has no statistics yet, and so no policy term.

Rewards over chunks and all of it across tokenizers are this project's; one-token chunks give back
the paper's. Three products, four where the head trains, and one more with the single-step term.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import PolicyConfig
from axolotl_dskd.losses import Distribution, Part, TermSpec, Values, by_rows, even_parts, over
from axolotl_dskd.losses.divergences import reverse_kl
from axolotl_dskd.losses.functions import BlockFunction
from axolotl_dskd.objectives.base import (
    Facts,
    Objective,
    Pair,
    Setting,
    pair_chunks,
    participation,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.policy.rollout import Rollout
from axolotl_dskd.objectives.returns import Moments
from axolotl_dskd.types import LossOutput, Matches, Needs, Per, Term, View


class Policy(Objective[PolicyConfig], config=PolicyConfig):
    """See the module."""

    without_states = "single_step: false"
    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "policy": "student_token",
        "single_step": "student_token",
        "reverse_kl": "value",
        "clipped": "value",
        "aligned": "student_token",
    }

    def __init__(self, config: PolicyConfig, facts: Facts, setting: Setting) -> None:
        self.single_step = facts.one_vocabulary and setting.gives == "states"
        if config.single_step != "auto":
            self.single_step = config.single_step
        self.needs = Needs("states" if self.single_step else "labels", written=True)
        super().__init__(config, facts, setting)
        if self.single_step and not facts.one_vocabulary:
            raise ValueError(
                "dskd.objective: single_step of policy compares distributions over one vocabulary, "
                f"but student and teacher have different ones: {facts.differing()}. Set "
                "single_step: auto, or remove it."
            )

    def describe(self) -> str:
        """Which rewards, and which terms."""
        config = self.config
        whitened = ", whitened by the steps before" if config.whiten == "running" else ""
        exact = ", each token's own exactly" if self.single_step else ""
        return f"policy: rewards of equal bytes at gamma {config.gamma:g}{whitened}{exact}"

    def begin(self, pair: Pair) -> None:
        """Make room for the statistics that advantages are whitened by."""
        if self.config.whiten == "running":
            self.module = Moments().to(pair.device)

    def end_step(self) -> None:
        """Statistics of this step count from the next one on."""
        if isinstance(self.module, Moments):
            self.module.end_step()

    def forget_step(self) -> None:
        """Drop what an interrupted step has seen."""
        if isinstance(self.module, Moments):
            self.module.forget_step()

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch."""
        ratio, budget, tokens = self.setting.kd_ratio, self.setting.budget, student.tokens
        rollout = Rollout.of(
            student,
            teacher,
            matches,
            config=self.config,
            single_step=self.single_step,
            budget=budget,
            whiten=self._whitened,
        )
        streams = {"student": student_stream(student)}
        weights = {"ce": 1.0 - ratio, "policy": ratio, "clipped": 0.0}
        if self.single_step:
            streams["teacher"] = teacher_stream(teacher)
            weights["single_step"] = ratio
            parts = pair_chunks(rollout.pairs, streams, budget)
        else:
            parts = even_parts({"student": len(tokens)}, budget.size(*streams.values()))
        sums = over(
            streams,
            parts,
            by_rows(self._function(rollout, tokens.labels)),
            {name: TermSpec("student", weight) for name, weight in weights.items()},
        )
        acting = rollout.acts.nonzero().flatten()
        among = {"reverse_kl": acting, "clipped": acting}
        terms = {}
        for name, values in {**sums.values, "reverse_kl": rollout.gap}.items():
            counted = among.get(name, slice(None))
            terms[name] = Term(values[counted], tokens.sample_ids[counted])
        terms["aligned"] = participation(acting, tokens)
        return LossOutput(sums.loss, len(tokens), terms)

    def _whitened(self, advantage: Tensor, acts: Tensor) -> Tensor:
        """By the steps before; those that act count for the steps to come."""
        if not isinstance(self.module, Moments):
            return advantage
        if torch.is_grad_enabled():
            self.module.see(advantage[acts])
        return self.module.whiten(advantage)

    def _function(self, rollout: Rollout, labels: Tensor) -> BlockFunction:
        """The block function of `by_rows`."""
        ratio, clip = self.setting.kd_ratio, self.config.ratio_clip

        def function(rows: Part, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
            index = rows["student"]
            advantage, weight = rollout.advantage[index], rollout.weight[index]
            q = Distribution.of(logits["student"])
            label = labels[index].unsqueeze(-1)
            log_q = q.log.gather(-1, label).squeeze(-1)
            data = rollout.data[index].to(log_q)
            moved = (log_q - rollout.old[index]).exp()
            free, bound = advantage * moved, advantage * moved.clamp(1 - clip, 1 + clip)
            inside = free <= bound
            values = {
                "ce": -data * log_q,
                "policy": -weight * torch.minimum(free, bound),
                "clipped": (~inside).to(log_q),
            }
            slope = -ratio * weight * free * inside - (1 - ratio) * data
            gradient = q.prob * -slope.unsqueeze(-1)
            gradient.scatter_add_(-1, label, slope.unsqueeze(-1))
            if "teacher" in logits:
                values["single_step"], towards = reverse_kl(Distribution.of(logits["teacher"]), q)
                gradient.add_(towards, alpha=ratio)
            return values, {"student": gradient}

        return function
