"""Token-level distillation between models of one vocabulary.

    loss = (1 - kd_ratio) · CE + kd_ratio · Σ_i D(softmax(t_i / T) ‖ softmax(z_i / T))

over the supervised tokens, with t the teacher's and z the student's logits (Hinton et al. 2015,
arXiv 1503.02531, without its T²; the divergences of MiniLLM, DistiLLM, GKD and AKL by name). The
two heads may do different things to their logits. Three products, four where the head trains.
"""

from __future__ import annotations

from typing import ClassVar

from axolotl_dskd.config import TokenKDConfig
from axolotl_dskd.losses import Learn, TermSpec, Weights, make_divergence, over
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
from axolotl_dskd.types import LossOutput, Matches, Needs, Per, Term, View


class TokenKD(Objective[TokenKDConfig], config=TokenKDConfig):
    """See the module. A token whose label differs on the two sides (an end token) has CE alone."""

    needs = Needs(one_vocabulary=True)
    terms: ClassVar[dict[str, Per]] = {
        "ce": "reference_token",
        "kd": "student_token",
        "teacher_accuracy": "student_token",
        "aligned": "student_token",
    }

    def __init__(self, config: TokenKDConfig, facts: Facts, setting: Setting) -> None:
        super().__init__(config, facts, setting)
        self.weights = Weights(
            ce=1.0 - setting.kd_ratio,
            source_ce=0.0,
            divergence=setting.kd_ratio,
            temperature=config.temperature,
        )

    def describe(self) -> str:
        """Which divergence, over which tokens."""
        return f"token_kd: {self.config.divergence}, token by token over one vocabulary"

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        """Sums over a batch; the tokens of an exact pair meet."""
        config, tokens = self.config, student.tokens
        pairs = equal_ids(matches.exact, tokens, teacher.tokens)
        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}
        weights = self.weights
        learn = Learn(
            "student",
            "teacher",
            make_divergence(
                config.divergence,
                skew_lambda=config.skew_lambda,
                adaptive_alpha=config.adaptive_alpha,
                js_beta=config.js_beta,
            ),
            weights,
            student.references,
            teacher.tokens.labels,
            {"ce": "ce", "divergence": "kd", "correct": "teacher_accuracy"},
        )
        sums = over(
            streams,
            pair_chunks(pairs, streams, self.setting.budget),
            learn,
            {
                "ce": TermSpec("student", weights.ce),
                "kd": TermSpec("student", weights.divergence),
                "teacher_accuracy": TermSpec("student"),
            },
        )
        terms = {name: Term(values, tokens.sample_ids) for name, values in sums.values.items()}
        terms["aligned"] = participation(pairs[:, 0], tokens)
        return LossOutput(sums.loss, len(tokens), terms)
