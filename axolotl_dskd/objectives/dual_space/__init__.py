"""How states of one model meet tokens of the other: same positions, exact pairs, attention.

An alignment takes both sides' compact states and the projectors and gives projected states: the
teacher's for every student token, the student's for every teacher token. It knows nothing of
heads, vocabularies' meaning or losses.
"""

from axolotl_dskd.objectives.dual_space.align import (
    Aligned,
    align_exact_pairs,
    align_positions,
    align_with_attention,
    sample_std,
)
from axolotl_dskd.objectives.dual_space.targets import greedy_tokens, teacher_targets

__all__ = [
    "Aligned",
    "align_exact_pairs",
    "align_positions",
    "align_with_attention",
    "greedy_tokens",
    "sample_std",
    "teacher_targets",
]
