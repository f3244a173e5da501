"""The memory plan against real trainings, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.measured_memory import ADAPTER, large_run, measure

pytestmark = pytest.mark.slow

#: Of what was measured. On a CPU the interpreter and the libraries allocate besides tensors.
TOLERANCE = 0.15

SIZES: dict[str, Any] = {"student": (16000, 512, 6), "teacher": (24000, 768, 6), "words": 150}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "qlora-checkpointed": {
        **ADAPTER,
        "adapter": "qlora",
        "load_in_4bit": True,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_near_what_a_training_holds(tmp_path: Path, case: str):
    found = measure(large_run(tmp_path, **SIZES, **CASES[case]))
    assert found["plan"] == pytest.approx(found["measured"], rel=TOLERANCE), found
