"""Dual-space knowledge distillation (arXiv 2406.17328, 2504.11426).

Both models' states are mapped into each other's space, so that each space has two distributions
over one vocabulary to compare: `align` lets states meet, `projectors` map them, `spaces` are the
losses, `objective` joins these.
"""

from axolotl_dskd.objectives.dual_space.objective import DualSpace

__all__ = ["DualSpace"]
