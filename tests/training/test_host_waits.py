"""How often a micro-batch's forward and loss make the host wait for a GPU, counted on one that is
not there.

What is counted says `Waits`; the optimizer, the collator, logs and the report of the first steps
are not in it. One wait asks whether the loss is finite, one which tokens the
batch's numbers choose: pairs that are watched for recital, pairs that eta has a target for (what
the teacher itself would say), tokens that the teacher space is taken over.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axolotl_dskd.training.trainer import DSKDTrainer
from tests.support import tiny
from tests.support.on_accelerator import on_accelerator
from tests.support.runs import dskd
from tests.support.waits import Waits


@pytest.mark.parametrize("alignment", ["cma", "eta"])
@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("is_cached", [False, True], ids=["live", "cached"])
def test_a_micro_batch_does_not_wait_more_often(
    pair_folder: Path,
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    alignment: str,
    share: float,
    is_cached: bool,
):
    counts: list[int] = []
    compute_loss = DSKDTrainer.compute_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            loss = compute_loss(*args, **kwargs)
        counts.append(waits.count)
        return loss

    monkeypatch.setattr(DSKDTrainer, "compute_loss", counted)
    block = dskd(pair_folder, alignment=alignment, teacher_space_share=share)
    if is_cached:
        block["teacher"]["cache"] = {"path": str(pair_folder / "cache")}
    steps = 6 if is_cached else 3  # of the second epoch all is in it
    with on_accelerator():
        train(tiny.base_config(pair_folder, dskd=block, max_steps=steps))
    assert len(counts) == steps
    assert counts[-1] <= 2
