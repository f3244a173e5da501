"""An objective of one's own, in one file: exact pairs say their label with equal log-probability.

    loss = (1 - kd_ratio) · CE + kd_ratio · weight · Σ_(i,j) (log q_i(y_i) − log p_j(y_j))²

Named in a config by this module's dotted path.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from axolotl_dskd.config import ObjectiveConfig
from axolotl_dskd.losses import Part, TermSpec, Values, by_autograd, over
from axolotl_dskd.objectives.base import Objective, pair_chunks, student_stream, teacher_stream
from axolotl_dskd.types import IGNORE_INDEX, LossOutput, Matches, Per, Term, View


class ToyConfig(ObjectiveConfig):
    name: str = "tests.support.toy_objective"
    weight: float = Field(1.0, ge=0, description="Of the squared distance.")


class Toy(Objective[ToyConfig], config=ToyConfig):
    terms: ClassVar[dict[str, Per]] = {"ce": "reference_token", "distance": "student_token"}

    def __call__(self, student: View, teacher: View, matches: Matches) -> LossOutput:
        labels = {"student": student.tokens.labels, "teacher": teacher.tokens.labels}
        weights = {
            "ce": 1.0 - self.setting.kd_ratio,
            "distance": self.setting.kd_ratio * self.config.weight,
        }

        def function(rows: Part, logits: dict[str, Tensor]) -> tuple[Tensor, Values]:
            said = {
                side: -torch.nn.functional.cross_entropy(
                    x, labels[side][rows[side]], reduction="none"
                )
                for side, x in logits.items()
            }
            known = student.references[rows["student"]] != IGNORE_INDEX
            values = {"ce": -said["student"] * known}
            if "teacher" in said:
                values["distance"] = (said["student"] - said["teacher"]).square()
            return sum(weights[name] * value.sum() for name, value in values.items()), values

        streams = {"student": student_stream(student), "teacher": teacher_stream(teacher)}
        parts = pair_chunks(matches.exact, streams, self.setting.budget, copies=4)
        specs = {name: TermSpec("student", weight) for name, weight in weights.items()}
        sums = over(streams, parts, by_autograd(function), specs)
        ids = student.tokens.sample_ids
        terms = {name: Term(values, ids) for name, values in sums.values.items()}
        return LossOutput(sums.loss, len(student), terms)
