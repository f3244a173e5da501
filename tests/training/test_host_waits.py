"""How often a micro-batch's forward and loss make the host wait for a GPU, counted on a CPU.

What is counted says `Waits`; the optimizer, the collator, logs and the report of the first steps
are not in it. The teacher is live. One wait asks whether the loss is finite, one which pairs are
watched for recital; eta has one more, since its targets are what the teacher itself would say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from axolotl_dskd.training.trainer import DSKDTrainer
from tests.support import tiny
from tests.support.runs import dskd
from tests.support.waits import Waits


@pytest.mark.parametrize(("alignment", "most"), [("cma", 2), ("eta", 3)])
def test_a_micro_batch_does_not_wait_more_often(
    pair_folder: Path,
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    alignment: str,
    most: int,
):
    counts: list[int] = []
    compute_loss = DSKDTrainer.compute_loss

    def counted(*args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            loss = compute_loss(*args, **kwargs)
        counts.append(waits.count)
        return loss

    monkeypatch.setattr(DSKDTrainer, "compute_loss", counted)
    config = tiny.base_config(pair_folder, dskd=dskd(pair_folder, alignment=alignment))
    train(config | {"max_steps": 3})
    assert len(counts) == 3
    assert counts[-1] <= most
