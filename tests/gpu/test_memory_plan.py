"""The memory plan against PyTorch's own count on a CUDA device. Run by hand: `pytest -m gpu`.

Sizes are such that weights, activations and logits each matter, and nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.measured_memory import ADAPTER, large_run, measure

pytestmark = pytest.mark.gpu

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full-checkpointed": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "lora": ADAPTER,
    "qlora": {**ADAPTER, "adapter": "qlora", "load_in_4bit": True, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_15_percent_of_what_cuda_held(tmp_path: Path, case: str):
    path = large_run(
        tmp_path,
        student=(32000, 1024, 16),
        teacher=(64000, 2048, 16),
        words=600,
        bf16=True,
        sequence_len=2048,
        optimizer="adamw_torch_fused",
        **CASES[case],
    )
    found = measure(path, gpu=True)
    # PyTorch counts neither the context nor what its allocator keeps in pieces.
    allowances = sum(found["at_peak"].get(k, 0) for k in ("CUDA context", "fragmentation"))
    assert found["plan"] - allowances == pytest.approx(found["measured"], rel=0.15), found
