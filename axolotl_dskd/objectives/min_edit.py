"""Distillation through a map of the vocabularies: each teacher token's probability goes to one
token of the student's.

    p'_v = Σ_{u → v} p_u;   Σ_(i,j) KL(p'_j ‖ q_i)    q, p at temperature T

over pairs of student and teacher tokens (MinED, FuseLLM, arXiv 2401.10491, in DSKD's comparison
arXiv 2406.17328). Published code takes the logit of one teacher token per student token and drops
the others' probability; here probabilities are summed, so that none is lost. It pairs tokens by
dynamic time warping of both sequences of *input* tokens; default here are tokens that begin at the
same byte, without those whose label is longer on the student's side: there the teacher speaks for a
beginning of the label, against the cross-entropy. Nor are ends of turns of another kind than most
of the data's, where the teacher's end goes to.

Teacher tokens without text, other than the end, go nowhere. A token counts with the probability
that goes somewhere: m KL(p' / m ‖ q) with m = Σ_v p'_v, which is 1 but for those. Three products.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.config import MinEditConfig
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.losses import Part, TermSpec, Values, by_rows, over, with_ce
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
from axolotl_dskd.objectives.edit_distance import warp
from axolotl_dskd.objectives.vocabulary_map import vocabulary_map
from axolotl_dskd.ranks import is_first, raise_together, share_first
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Per, Side, Term, View

LOG = get_logger(__name__)


class MinEdit(Objective[MinEditConfig], config=MinEditConfig):
    """See the module."""

    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "min_edit": "student_token",
        "translated": "value",
        "aligned": "student_token",
    }

    def __init__(self, config: MinEditConfig, facts: Facts, setting: Setting) -> None:
        super().__init__(config, facts, setting)
        tables = [token_bytes(tokenizer) for tokenizer in (facts.student, facts.teacher)]
        self._textless = torch.tensor([not spelled for spelled in tables[0]])
        # What warping compares: the tokens' bytes without spaces, as published.
        self._spelled = [[spelled.replace(b" ", b"") for spelled in table] for table in tables]

    def describe(self) -> str:
        """Which map, and which tokens are compared."""
        config = self.config
        maps = {
            "edit_distance": "to the student's at the least edit distance",
            "first_token": "to the first of those that the student writes them with",
        }
        pairs = {
            "starts": "that begin at the same byte",
            "dtw": "that dynamic time warping pairs one to one",
        }
        rest = "their label, one-hot" if config.one_hot else "cross-entropy alone"
        return (
            f"min_edit: the teacher's tokens go {maps[config.map]}; compared are tokens "
            f"{pairs[config.pairs]}, others have {rest}"
        )

    def begin(self, pair: Pair) -> None:
        """Map the vocabularies; on rank 0, which the others wait for."""
        V, U = (head.vocab_size for head in pair.heads)
        table = torch.full((2, U), -1, device=pair.device)
        problem = None
        if is_first():
            try:
                facts = self.facts
                made = vocabulary_map(
                    facts.student, facts.teacher, self.config.map, facts.turn_ends
                )
                rows = torch.tensor([made.targets, made.exact], device=pair.device)[:, :U]
                table[:, : rows.shape[1]] = rows
            except Exception as error:  # whatever it is, the other ranks wait
                problem = f"min_edit: no map of the vocabularies: {type(error).__name__}: {error}"
        raise_together(problem, pair.device)
        share_first([table])
        self._targets, self._exact = table[0], (table[1] > 0).float()
        self._kept = (self._targets >= 0).nonzero().flatten()
        self._textless = self._textless.to(pair.device)
        self._vocab_size = V
        exact, kept = int(self._exact.sum()), len(self._kept)
        LOG.info(
            f"min_edit: of the teacher's {U} tokens {exact} are the student's too, {kept - exact} "
            f"go to another, {U - kept} stand for no text and go nowhere"
        )

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch."""
        tokens, weight = student.tokens, self.setting.kd_ratio
        pairs = self._pairs(tokens, teacher.tokens, matches)
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}
        ce = with_ce(None, student.references, 1.0 - weight)

        def block(rows: Part, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
            values, gradients = ce(rows, logits)
            if "teacher" in logits:
                p = (logits["teacher"] / self.config.temperature).softmax(-1)
                target = self.carried(p)
                values["translated"] = p @ self._exact.to(p.dtype)
            elif self.config.one_hot:
                labels = student.references[rows["student"]].unsqueeze(-1)
                known = (labels != IGNORE_INDEX).to(logits["student"])
                target = torch.zeros_like(logits["student"])
                target.scatter_(-1, labels.clamp_min(0), known)
            else:
                return values, gradients
            values["min_edit"], gradient = self._divergence(target, logits["student"])
            gradients["student"] += gradient
            return values, gradients

        sums = over(
            streams,
            pair_chunks(pairs, streams, self.setting.budget),
            by_rows(block),
            {
                "ce": TermSpec("student", 1.0 - weight),
                "min_edit": TermSpec("student", weight),
                "translated": TermSpec("student"),
            },
        )
        terms = {name: Term(values, tokens.sample_ids) for name, values in sums.values.items()}
        rows = pairs[:, 0]
        terms["translated"] = Term(sums.values["translated"][rows], tokens.sample_ids[rows])
        terms["aligned"] = participation(rows, tokens)
        return LossOutput(sums.loss, len(tokens), terms)

    def carried(self, probabilities: Tensor) -> Tensor:
        """The teacher's probabilities [k, U] in the student's vocabulary, [k, V]."""
        target = probabilities.new_zeros((len(probabilities), self._vocab_size))
        kept = self._kept
        return target.index_add_(1, self._targets[kept], probabilities.index_select(1, kept))

    def _divergence(self, target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """m KL(target / m ‖ q) per token, [k], and its gradient (m q − target) / T times the
        weight, [k, V]."""
        T = self.config.temperature
        log_q = (logits / T).log_softmax(-1)
        mass = target.sum(-1, keepdim=True)
        own = torch.xlogy(target, target).sum(-1) - torch.xlogy(mass, mass).squeeze(-1)
        value = own - (target * log_q).sum(-1)
        gradient = log_q.exp_().mul_(mass).sub_(target).mul_(self.setting.kd_ratio / T)
        return value, gradient

    def _pairs(self, student: Side, teacher: Side, matches: Matches) -> Tensor:
        """[P, 2] the tokens that are compared."""
        if self.config.pairs == "dtw":
            return self._warped(student, teacher)
        i, j = matches.starts.unbind(1)
        ours, theirs = (s[:, 1] - s[:, 0] for s in (matches.spans[i], matches.teacher_spans[j]))
        label, carried = student.labels[i], self._targets[teacher.labels[j]]
        # Nor does a teacher's label that goes nowhere, or to another end token, speak for it.
        fitting = (carried >= 0) & ((carried == label) | ~self._textless[label])
        return matches.starts[(ours <= theirs) & fitting]

    def _warped(self, student: Side, teacher: Side) -> Tensor:
        """[P, 2] tokens that warping gives one partner, whose input token is theirs, mapped."""
        device = student.labels.device
        ids, other_ids = student.input_ids.tolist(), teacher.input_ids.tolist()
        mapped = self._targets[teacher.input_ids].tolist()
        samples = torch.cat([student.sample_ids, teacher.sample_ids]).unique()
        counts = [
            torch.bincount(torch.searchsorted(samples, side.sample_ids), minlength=len(samples))
            for side in (student, teacher)
        ]
        pairs: list[tuple[int, int]] = []
        n = m = 0
        for ours, theirs in zip(*(count.tolist() for count in counts), strict=True):
            if ours and theirs:
                inputs, others = ids[n : n + ours], other_ids[m : m + theirs]
                partners = warp(
                    [self._spelled[0][k] for k in inputs], [self._spelled[1][k] for k in others]
                )
                pairs += [
                    (n + i, m + first)
                    for i, (first, last) in enumerate(partners.tolist())
                    if first == last and inputs[i] == mapped[m + first]
                ]
            n, m = n + ours, m + theirs
        return torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2)
