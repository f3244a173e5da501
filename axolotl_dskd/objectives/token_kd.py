"""Token-level distillation between models of one vocabulary.

    loss = (1 - kd_ratio) · CE + kd_ratio · Σ_i D(softmax(t_i / T) ‖ softmax(z_i / T))

over the supervised tokens, with t the teacher's and z the student's logits (Hinton et al. 2015,
arXiv 1503.02531, without its T²; the divergences of MiniLLM, DistiLLM, GKD and AKL by name). The
two heads may do different things to their logits. Three products, four where the head trains.

Of a teacher that gives no states its likeliest tokens will do, at temperature 1: D is then over
these and all others as one outcome, which for every divergence but adaptive_kl is at most the D
above (`losses.coarse`). `kept_mass` is the probability that these tokens have together. Two
products, three where the head trains.

In answers that the student writes D may be another one (`divergence_written`; DistiLLM-2, Ko et al.
2025, arXiv 2503.07067: skewed forward KL on references, skewed reverse KL on the student's own).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from axolotl_dskd.config import TokenKDConfig
from axolotl_dskd.losses import (
    Divergence,
    Learn,
    Part,
    Sums,
    TermSpec,
    Values,
    Weights,
    by_rows,
    coarse_divergence,
    even_parts,
    over,
    runs_of,
)
from axolotl_dskd.losses.elementwise import cross_entropy
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
from axolotl_dskd.objectives.written import both_divergences, named_divergences
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Needs, Per, Term, View


class TokenKD(Objective[TokenKDConfig], config=TokenKDConfig):
    """See the module. A token whose label differs on the two sides (an end token) has CE alone."""

    without_states = "temperature: 1.0"
    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "kd": "student_token",
        "teacher_accuracy": "student_token",
        "kept_mass": "value",
        "aligned": "student_token",
    }

    def __init__(self, config: TokenKDConfig, facts: Facts, setting: Setting) -> None:
        self.needs = Needs("top" if config.temperature == 1 else "states", one_vocabulary=True)
        super().__init__(config, facts, setting)
        self.divergence, self.of_written = both_divergences(config)
        self.weights = Weights(
            ce=1.0 - setting.kd_ratio,
            source_ce=0.0,
            divergence=setting.kd_ratio,
            temperature=config.temperature,
        )

    def describe(self) -> str:
        """Which divergence, over which tokens."""
        over = "the teacher's likeliest tokens and the rest as one"
        if self.setting.gives == "states":
            over = "one vocabulary"
        names = named_divergences(self.config)
        return f"token_kd: {names}, token by token over {over}"

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch; the tokens of an exact pair meet."""
        tokens = student.tokens
        pairs = equal_ids(matches.exact, tokens, teacher.tokens)
        if teacher.logprobs is None:
            sums = self._from_states(student, teacher, pairs)
        else:
            sums = self._from_top(student, teacher, pairs)
        terms = {name: Term(values, tokens.sample_ids) for name, values in sums.values.items()}
        if teacher.logprobs is not None:
            assert teacher.logprobs.top is not None
            kept = teacher.logprobs.top[pairs[:, 1]].exp().sum(-1)
            terms["kept_mass"] = Term(kept, tokens.sample_ids[pairs[:, 0]])
        terms["aligned"] = participation(pairs[:, 0], tokens)
        return LossOutput(sums.loss, len(tokens), terms)

    @property
    def _specs(self) -> dict[str, TermSpec]:
        return {
            "ce": TermSpec("student", self.weights.ce),
            "kd": TermSpec("student", self.weights.divergence),
            "teacher_accuracy": TermSpec("student"),
        }

    def _divergence_without(self, student: View) -> Divergence | None:
        """That of tokens without reference, where it is another one and there may be some."""
        return None if student.written is None else self.of_written

    def _from_states(self, student: View, teacher: View, pairs: Tensor) -> Sums:
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}
        learn = Learn(
            "student",
            "teacher",
            self.divergence,
            self.weights,
            student.references,
            teacher.tokens.labels,
            {"ce": "ce", "divergence": "kd", "correct": "teacher_accuracy"},
            self._divergence_without(student),
        )
        return over(streams, pair_chunks(pairs, streams, self.setting.budget), learn, self._specs)

    def _from_top(self, student: View, teacher: View, pairs: Tensor) -> Sums:
        said, stream = teacher.logprobs, student_stream(student)
        assert said is not None and said.ids is not None and said.top is not None
        ids, top, references = said.ids, said.top, student.references
        partner = torch.full_like(references, -1).index_copy(0, pairs[:, 0], pairs[:, 1])
        correct = (ids[:, 0] == teacher.tokens.labels).to(top)
        without = self._divergence_without(student)

        def compare(theirs: Tensor, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            """The divergence of tokens [k] from the teacher's, and its gradient."""
            if without is None or not len(labels):
                return coarse_divergence(self.divergence, ids[theirs], top[theirs], z)
            found = []
            for rows, has_label in runs_of(labels != IGNORE_INDEX):
                divergence = self.divergence if has_label else without
                at = theirs[rows]
                found.append(coarse_divergence(divergence, ids[at], top[at], z[rows]))
            value, gradient = map(torch.cat, zip(*found, strict=True))
            return value, gradient

        def function(rows: Part, logits: dict[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
            index, z = rows["student"], logits["student"]
            met = (partner[index] >= 0).nonzero().flatten()
            theirs = partner[index][met]
            value, towards = compare(theirs, z[met], references[index][met])
            ce, gradient = cross_entropy(z, references[index], self.weights.ce)
            values = {
                "ce": ce,
                "kd": torch.zeros_like(ce),
                "teacher_accuracy": torch.zeros_like(ce),
            }
            values["kd"][met] = value
            values["teacher_accuracy"][met] = correct[theirs].to(ce)
            return values, {
                "student": gradient.index_add_(0, met, towards, alpha=self.weights.divergence)
            }

        parts = even_parts({"student": len(stream)}, self.setting.budget.size(stream))
        return over({"student": stream}, parts, by_rows(function), self._specs)
