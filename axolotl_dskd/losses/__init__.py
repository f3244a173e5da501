"""Divergences per token, and the elementwise part of the losses, fused where Triton is there.

Knows torch and `axolotl_dskd.types`; nothing of models, batches or training.
"""

from axolotl_dskd.losses.divergences import Distribution, Divergence, make_divergence

__all__ = ["Distribution", "Divergence", "make_divergence"]
