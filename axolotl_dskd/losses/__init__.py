"""The losses: divergences per token, and the chunked dual-space loss over two vocabularies.

Knows torch and `axolotl_dskd.types`; nothing of models, batches or training.
"""

from axolotl_dskd.losses.divergences import Distribution, Divergence, make_divergence
from axolotl_dskd.losses.dual_space import LossSettings, auto_chunk_tokens, dual_space_loss

__all__ = [
    "Distribution",
    "Divergence",
    "LossSettings",
    "auto_chunk_tokens",
    "dual_space_loss",
    "make_divergence",
]
