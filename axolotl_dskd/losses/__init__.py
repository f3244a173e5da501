"""Divergences per token, and the one chunk mechanism that every loss is computed by.

Knows heads, states and labels; nothing of models, batches or training.
"""

from axolotl_dskd.losses.chunks import Budget, Chunk, Part, Stream, Sums, TermSpec, Values, over
from axolotl_dskd.losses.coarse import coarse_divergence
from axolotl_dskd.losses.divergences import (
    DIVERGENCES,
    Distribution,
    Divergence,
    make_divergence,
)
from axolotl_dskd.losses.elementwise import Weights
from axolotl_dskd.losses.functions import by_autograd, by_rows, plain_with_ce, with_ce
from axolotl_dskd.losses.learn import Learn, runs_of
from axolotl_dskd.losses.logprobs import over_logprobs, set_logprobs, token_logprobs
from axolotl_dskd.losses.parts import even_parts, grouped_parts, paired_parts

__all__ = [
    "DIVERGENCES",
    "Budget",
    "Chunk",
    "Distribution",
    "Divergence",
    "Learn",
    "Part",
    "Stream",
    "Sums",
    "TermSpec",
    "Values",
    "Weights",
    "by_autograd",
    "by_rows",
    "coarse_divergence",
    "even_parts",
    "grouped_parts",
    "make_divergence",
    "over",
    "over_logprobs",
    "paired_parts",
    "plain_with_ce",
    "runs_of",
    "set_logprobs",
    "token_logprobs",
    "with_ce",
]
