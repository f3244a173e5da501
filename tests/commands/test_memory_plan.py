"""The memory plan against real trainings, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.measured_memory import CASES, SIZES, large_run, measure

pytestmark = pytest.mark.slow

#: Of what was measured. On a CPU the interpreter and the libraries allocate besides tensors.
TOLERANCE = 0.15


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_near_what_a_training_holds(tmp_path: Path, case: str):
    found = measure(large_run(tmp_path, **SIZES, **CASES[case], max_steps=2))
    assert found["plan"] == pytest.approx(found["measured"], rel=TOLERANCE), found
