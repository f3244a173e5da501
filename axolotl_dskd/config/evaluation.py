"""`dskd.evaluation`: what is measured on held-out rows beside the loss."""

from __future__ import annotations

from pydantic import Field

from axolotl_dskd.config.base import Block


class EvaluationConfig(Block):
    """What evaluations measure and keep. Bits per byte are always measured."""

    record: bool = Field(
        False,
        description="Keep which rows the run sees, its log, and what every evaluation finds of "
        "each row, in <output_dir>/dskd-record.jsonl; `axolotl-dskd compare` reads it.",
    )
