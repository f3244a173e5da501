"""Virtual attention: groups of tokens attend to blocks of the student's final state, beside any
objective; what it shows is what `axolotl-dskd explain` draws."""

from axolotl_dskd.virtual_attention.attention import VirtualAttention
from axolotl_dskd.virtual_attention.margins import block_margins

__all__ = ["VirtualAttention", "block_margins"]
