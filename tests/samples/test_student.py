"""What a student that writes says of a training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from axolotl_dskd.config import StudentSamplesConfig
from axolotl_dskd.samples import student
from axolotl_dskd.samples.student import StudentSamples
from tests.support.conversations import answered, prepared

PAIR = ("tiny byte-level", "tiny sentencepiece")


@pytest.mark.parametrize(
    ("share", "steps", "says"),
    [(0.5, 100, False), (0.5, 99, True), (1.0, 99, False), ("adaptive", 99, False)],
)
def test_a_buffer_that_no_training_of_this_length_fills_is_said_once(
    share: float | str, steps: int, says: bool, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    monkeypatch.setattr(student.LOG, "warning", said.append)
    keys = {"from": "student", "share": share, "replay": 100}
    run = SimpleNamespace(
        answered=lambda: answered(PAIR),
        contrast=False,
        evaluates=True,
        batch=None,
        max_length=64,
        pack_length=64,
        writer=lambda *_: None,
        decode=str,
        total_steps=lambda: steps,
        memory=None,
        rank=0,
    )
    samples = StudentSamples(StudentSamplesConfig.model_validate(keys), cast(Any, run))
    row = prepared(PAIR, [("Add.", "Five.")])
    samples._keep([[]])  # nothing could be used: that says nothing about the others
    for _ in range(3):
        samples._keep([[row], [row]])
    assert len(said) == says
    if says:
        assert "once there are 100, but this training of 99 steps writes about 99" in said[0]
