"""What is learned: an object for each method, all behind one interface (`base.Objective`)."""

from axolotl_dskd.objectives.base import Facts, Objective, Pair, Setting
from axolotl_dskd.objectives.build import (
    build_objective,
    check_pair,
    chunk_budget,
    fine_tuning,
)

__all__ = [
    "Facts",
    "Objective",
    "Pair",
    "Setting",
    "build_objective",
    "check_pair",
    "chunk_budget",
    "fine_tuning",
]
