"""Which tokens a step's teacher space is taken over, where it is not all of them.

The teacher's vocabulary is the larger one, so its products are most of what dual space costs. Over
a random share of the tokens, and divided by the share, loss and gradient are in the mean what they
are over all: the price is variance, no bias, and no column of the vocabulary is left out.
"""

from __future__ import annotations

import random

from torch import Tensor

#: Multiples of it modulo 1 are spread most evenly (the golden ratio's Kronecker sequence).
_GOLDEN = (5**0.5 - 1) / 2


class TokenShare:
    """Draws the tokens of each step.

    A token that begins at byte b is taken where (b · golden + shift) mod 1 < share, with a shift
    that is uniform and drawn anew for each step (a Cranley-Patterson rotation): so each token is
    taken with a probability of `share`, evenly along a text, and which they are depends neither on
    the batch that a sample is in, nor on its place there, nor on the rank.

    Args:
        share: above 0; 1 takes all.
        seed: of the shifts.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.seed = seed
        self.draw(0)

    def draw(self, step: int) -> None:
        """For the step with this number, the same in a run that was resumed."""
        self._shift = random.Random(f"{self.seed} {step}").random()

    def taken(self, begins: Tensor) -> Tensor:
        """[n] bool, which tokens are taken.

        Args:
            begins: [n] int64, the first byte of each in the text of its sample.
        """
        return (begins.double() * _GOLDEN + self._shift) % 1 < self.share
