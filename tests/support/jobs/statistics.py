"""Statistics over ranks."""

from __future__ import annotations

from typing import Any

import torch

from axolotl_dskd.objectives.returns import Moments
from axolotl_dskd.samples.tally import Tally
from tests.support.jobs.common import process_group, this_rank
from tests.support.jobs.registry import job


@job
def running_moments(steps: list[list[list[float]]]) -> dict[str, Any]:
    """The statistics after some steps; of each, what each rank sees."""
    process_group()
    moments = Moments()
    for ranks in steps:
        moments.see(torch.tensor(ranks[this_rank()]))
        moments.end_step()
    return {"sums": moments.sums}


@job
def tally(ranks: list[dict[str, float]]) -> dict[str, Any]:
    """What is said of written answers, of which each rank has counted its own."""
    process_group()
    mine = Tally()
    for name, number in ranks[this_rank()].items():
        mine.count(name, number)
    return mine.metrics(torch.device("cpu"))
