"""`dskd.evaluation`: what is measured on held-out rows beside the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from axolotl_dskd.config.base import Block


class EvaluationConfig(Block):
    """What evaluations measure and keep. Bits per byte are always measured."""

    answers: int = Field(
        0,
        ge=0,
        description="Held-out prompts that the student answers, greedily and sampled with fixed "
        "seeds, for rouge_l and rouge_l_sampled.",
    )
    answers_every: int = Field(1, ge=1, description="At the first and every so many evaluations.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer, in tokens.")
    temperature: float = Field(1.0, gt=0, le=10, description="Of the sampled answers.")
    teacher: StrictBool | Literal["auto"] = Field(
        "auto",
        description="Measure teacher_kl and teacher_agreement. auto: in trainings that learn from "
        "the teacher; true: also with kd_ratio: 0 and in `axolotl evaluate`, which then open it "
        "for evaluations alone; false: never.",
    )
    record: bool = Field(
        False,
        description="Keep which rows the run sees, its log, and what every evaluation finds of "
        "each row, in <output_dir>/dskd-record.jsonl; `axolotl-dskd compare` reads it. A run with "
        "virtual_attention always does, for `axolotl-dskd explain`.",
    )
