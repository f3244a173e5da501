"""Sinkhorn distance between the student's and the teacher's distributions in a sample.

    W_ij = Σ_v |q_iv − p_jv|;   P = exp(−W / ε), then 20 times: rows, then columns to sum 1
    Σ_ij P_ij W_ij              gradient through W and all iterations; q, p at temperature T

over the supervised tokens i, j of one sample (SinKD, arXiv 2402.17110). Published code takes the
rows of a whole batch, so that a token's loss depends on what else is in it; here nothing but the
sample counts. Both distributions must be over one vocabulary: the teacher's own, or that of
the projected teacher (`dual_space`), with KL(p ‖ q) token by token beside it.

A sample's logits are held, both sides' probabilities as float32 [n, V], and 40 n² numbers for the
iterations; of [n, n, V] a few columns. Products: those of `token_kd` or `dual_space` and three
more (four where the head trains), which cost little beside the n² V of W and as much again for its
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import DualSpaceConfig, SinkhornConfig, TokenKDConfig
from axolotl_dskd.losses import Chunk, Stream, TermSpec, Values, grouped_parts, over
from axolotl_dskd.losses.elementwise import wide
from axolotl_dskd.objectives.base import (
    Facts,
    Objective,
    Pair,
    Setting,
    equal_ids,
    student_stream,
    teacher_stream,
)
from axolotl_dskd.objectives.dual_space import DualSpace
from axolotl_dskd.objectives.token_kd import TokenKD
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Per, Term, View

#: Numbers of [n, n, columns of the vocabulary] that are held at once.
_NUMBERS = 1 << 24
#: Columns of the vocabulary whose distances are added at once.
_SLICE = 4096


class Sinkhorn(Objective[SinkhornConfig], config=SinkhornConfig):
    """See the module. What is learned token by token is `beside` it: `token_kd` over one
    vocabulary, else `dual_space` without its teacher space."""

    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "kl": "student_token",
        "sinkhorn": "student_token",
        "plan_diagonal": "value",
        "teacher_accuracy": "student_token",
        "projector_ce": "reference_token",
        "projector_accuracy": "reference_token",
        "teacher_nll": "value",
        "projected_nll": "value",
        "aligned": "student_token",
    }

    def __init__(self, config: SinkhornConfig, facts: Facts, setting: Setting) -> None:
        super().__init__(config, facts, setting)
        self._refuse_above(facts.longest or 0)  # before hours of training
        self._tokens: TokenKD | DualSpace
        if facts.one_vocabulary:
            keys = TokenKDConfig(temperature=config.temperature)
            self._tokens = TokenKD(keys, facts, setting)
            divergence = setting.kd_ratio * config.kl_weight
            self._tokens.weights = replace(self._tokens.weights, divergence=divergence)
        else:
            projected = DualSpaceConfig(
                divergence="forward_kl",
                temperature=config.temperature,
                alignment=config.alignment,
                teacher_space_weight=0.0,
                projector=config.projector,
            )
            self._tokens = DualSpace(projected, facts, setting)
            weights = replace(self._tokens.weights, divergence_weight=config.kl_weight)
            self._tokens.weights = weights
        self.needs, self.beside = self._tokens.needs, self._tokens.beside

    def _refuse_above(self, most: int) -> None:
        """Refuse samples that are too long to compare each token with each.

        Raises:
            ValueError: `most` supervised tokens are more than `max_tokens`.
        """
        if most > self.config.max_tokens:
            raise ValueError(
                f"dskd.objective: a sample has {most} supervised tokens, and sinkhorn compares "
                f"each with each, {self.config.max_tokens} at most. Raise "
                "dskd.objective.max_tokens (time and memory grow with the square), or shorten "
                "the samples."
            )

    def describe(self) -> str:
        """Between which distributions."""
        which = "the teacher's" if isinstance(self._tokens, TokenKD) else "the projected teacher's"
        return (
            f"sinkhorn: between {which} distributions and the student's in a sample, and KL of "
            f"{self.config.kl_weight:g}. {self._tokens.describe()}"
        )

    def begin(self, pair: Pair) -> None:
        """Build the projectors, where there are any."""
        self._tokens.begin(pair)
        self.module, self.beside = self._tokens.module, self._tokens.beside

    def follow(self, step: int, head: OutputHead) -> None:
        """What `dual_space` does."""
        self._tokens.follow(step, head)

    def remark(self, means: Mapping[str, float]) -> str | None:
        """What `dual_space` has to say."""
        return self._tokens.remark(means)

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch.

        Raises:
            ValueError: a sample with more supervised tokens than `max_tokens`.
        """
        ours = student_stream(student)
        if isinstance(self._tokens, TokenKD):
            out = self._tokens(student, teacher, matches)
            pairs = equal_ids(matches.exact, student.tokens, teacher.tokens)
            source, names = teacher_stream(teacher), {"kd": "kl"}
            rows, source = pairs[:, 0], replace(source, hidden=source.hidden[pairs[:, 1]])
        else:
            exchanged, targets = self._tokens.exchange(student, teacher, matches)
            out = self._tokens.losses(student, teacher, matches, exchanged, targets)
            names, projected = {"student_space": "kl"}, exchanged.t2s.detach()
            every = torch.arange(len(ours), device=student.tokens.labels.device)
            rows = every if exchanged.student_rows is None else exchanged.student_rows
            if targets is not None:  # where there is none, the projected teacher is not taught
                taught = (targets != IGNORE_INDEX).nonzero().flatten()
                projected, rows = projected[taught], rows[taught]
            source = Stream(projected, ours.head)
        out.terms = {names.get(name, name): term for name, term in out.terms.items()}
        ids = student.tokens.sample_ids[rows]
        loss, values = self._distances(replace(ours, hidden=ours.hidden[rows]), source, ids)
        out.loss = out.loss + loss
        out.terms |= {name: Term(value, ids) for name, value in values.items()}
        return out

    def _distances(self, ours: Stream, source: Stream, ids: Tensor) -> tuple[Tensor, Values]:
        """The weighted sum over all samples, and values per token.

        Args:
            ours, source: [K] states that meet one by one.
            ids: [K] their samples, ascending.
        """
        _, samples, counts = ids.unique_consecutive(return_inverse=True, return_counts=True)
        self._refuse_above(int(counts.max()) if len(counts) else 0)
        streams = {"student": ours, "source": source}
        # float32 copies of both sides beside the logits themselves.
        size = self.setting.budget.size(*streams.values(), copies=3)
        weight = self.setting.kd_ratio * self.config.weight

        def compute(chunk: Chunk) -> Values:
            rows = _samples(samples[chunk.rows["student"]])
            distances, diagonals = zip(*(self._sample(chunk, r, weight) for r in rows), strict=True)
            return {"sinkhorn": torch.cat(distances), "plan_diagonal": torch.cat(diagonals)}

        sums = over(
            streams,
            grouped_parts(dict.fromkeys(streams, samples), size),
            compute,
            {"sinkhorn": TermSpec("student", weight), "plan_diagonal": TermSpec("student")},
        )
        return sums.loss, sums.values

    def _sample(self, chunk: Chunk, rows: slice, weight: float) -> tuple[Tensor, Tensor]:
        """Both values [n] of one sample's rows; leaves the gradient in the student's logits."""
        config, T = self.config, self.config.temperature
        linear, head = chunk.linear["student"][rows], chunk.heads["student"]
        q, p = (
            (chunk.heads[name].activation(x.to(wide(x.dtype))) / T).softmax(-1)
            for name, x in ((name, chunk.linear[name][rows]) for name in ("student", "source"))
        )
        cost = l1_cost(q, p)
        plan, slope = transport(
            cost, config.epsilon, config.iterations, learns="student" in chunk.learns
        )
        if slope is not None:
            back = l1_cost_backward(q, p, slope)
            # From probabilities to logits: q (d − Σ q d) / T.
            back -= (back * q).sum(-1, keepdim=True)
            back *= q.mul_(weight * chunk.scale / T)
            logits = back if head.softcap is None else head.activation(linear.to(back.dtype))
            linear.copy_(head.activation_backward(logits, back))
        return (plan * cost).sum(1), plan.diagonal().clone()


def l1_cost(q: Tensor, p: Tensor) -> Tensor:
    """Σ_v |q_iv − p_jv|: [n, V], [m, V] -> [n, m], slice by slice of the vocabulary."""
    cost = q.new_zeros((len(q), len(p)))
    # In slices, whose sums in float32 err less; cdist itself holds no [n, m, columns].
    for ours, theirs in zip(q.split(_SLICE, dim=1), p.split(_SLICE, dim=1), strict=True):
        cost += torch.cdist(ours, theirs, p=1.0)
    return cost


def l1_cost_backward(q: Tensor, p: Tensor, slope: Tensor) -> Tensor:
    """Gradient of q, [n, V], given that of `l1_cost`'s result, [n, m]; lies in p's place."""
    for columns in _columns(q, p):
        sign = (q[:, None, columns] - p[None, :, columns]).sign_()
        part = torch.bmm(slope.unsqueeze(1), sign).squeeze(1)
        p[:, columns] = part
    return p


def transport(
    cost: Tensor, epsilon: float, iterations: int, learns: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The plan [n, n] whose columns sum to 1 and whose rows nearly do, and the gradient of
    Σ plan · cost with respect to the cost, through all iterations (None where nothing learns).

    In log space: exp(−cost / ε) underflows in float32 from a cost of 88 ε on.
    """
    with torch.set_grad_enabled(learns):
        leaf = cost.detach().requires_grad_(learns)
        log_plan = -leaf / epsilon
        for _ in range(iterations):
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
        plan = log_plan.exp()
        slope = torch.autograd.grad((plan * leaf).sum(), leaf)[0] if learns else None
    return plan.detach(), slope


def _columns(q: Tensor, p: Tensor) -> Iterator[slice]:
    width = max(1, _NUMBERS // (len(q) * len(p)))
    for start in range(0, q.shape[1], width):
        yield slice(start, start + width)


def _samples(ids: Tensor) -> Iterator[slice]:
    """Rows of each sample of a chunk."""
    start = 0
    for count in ids.unique_consecutive(return_counts=True)[1].tolist():
        yield slice(start, start + count)
        start += count
