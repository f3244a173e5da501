"""Trainings of Axolotl on an accelerator that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from accelerate.state import AcceleratorState, PartialState

from axolotl_dskd.teacher import live
from axolotl_dskd.teacher.load import load_teacher
from tests.support.pretend import CPU, accelerator


@contextmanager
def on_accelerator() -> Iterator[None]:
    """Where trainings are meanwhile; their models are not saved."""
    import axolotl.train

    with pytest.MonkeyPatch.context() as patch, accelerator() as device:
        patch.delenv("ACCELERATE_USE_CPU")
        patch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
        patch.setattr(axolotl.train, "save_trained_model", lambda *_: None)
        # transformers loads in threads of its own, where this device is unknown.
        patch.setattr(live, "load_teacher", lambda config, to: load_teacher(config, CPU).to(to))
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState()
