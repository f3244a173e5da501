"""Rows of a step that belong together, as answers to one prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.samples.student import StudentSamples


@pytest.mark.parametrize(
    ("per_prompt", "contrast", "batch", "rows"), [(1, True, 1, 2), (4, False, 2, 4)]
)
def test_a_micro_batch_that_cannot_hold_what_belongs_together_is_refused(
    per_prompt: int, contrast: bool, batch: int, rows: int
):
    config = StudentSamplesConfig.model_validate({"from": "student", "per_prompt": per_prompt})
    answered = SimpleNamespace(prompts=1)
    run = SimpleNamespace(
        answered=lambda: answered, contrast=contrast, batch=batch, max_length=64, pack_length=64
    )
    with pytest.raises(ValueError, match=f"multiple of {rows}"):
        StudentSamples(config, cast(Any, run))
