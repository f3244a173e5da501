"""Drawing the next tokens of a batch, each row by random numbers of its own.

`transformers` draws from one generator for the whole batch: what it writes depends on the other
rows. Here a row's numbers come from its own seed, so that its text depends on its prompt alone
(as far as products of other shapes round alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from axolotl_dskd.generation.writer import Sampling


class Draw(LogitsProcessor):
    """Draws each row's next token and leaves it as the only one that is possible.

    For `generate` with `do_sample=False`, as the last of its processors. Holds logits of one
    step only.

    Args:
        sampling: see there.
        seeds: of each row.
        vocab_size: ids that may be drawn; rows of the head from there on are padding.

    Attributes:
        logprobs: of each step, [B] float32, see `Answer.logprobs`.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], vocab_size: int) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        self.logprobs: list[Tensor] = []
        self._numbers = None if sampling.temperature == 0 else uniform(seeds, sampling)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] 0 at the drawn token, -inf elsewhere.

        Args:
            input_ids: [B, L] what there is so far.
            scores: [B, V] logits.
        """
        logits = scores[:, : self.vocab_size].float()
        plain = logits.log_softmax(-1)
        number = None
        if self._numbers is not None:
            self._numbers = self._numbers.to(plain.device)
            number = self._numbers[:, len(self.logprobs)].unsqueeze(1)
        drawn = self.drawn(logits, plain, number)
        self.logprobs.append(plain.gather(1, drawn).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def drawn(self, logits: Tensor, plain: Tensor, number: Tensor | None) -> Tensor:
        """[B, 1] the tokens.

        Args:
            logits, plain: [B, V] float32, and their log-softmax.
            number: [B, 1] float64 in [0, 1), of each row; None at temperature 0.
        """
        if number is None:
            return plain.argmax(-1, keepdim=True)
        probability, order = likely(logits, plain, self.sampling)
        found = at_number(probability, number)
        return found if order is None else order.gather(1, found)

    def beside(self, model: Any) -> AbstractContextManager[Any]:
        """Open while `generate` runs the model, for what goes along with its forwards."""
        return nullcontext()

    def answers(self) -> list[tuple[list[float], list[float] | None]]:
        """Of each row the log-probabilities of what was drawn, and `Answer.weights`; what follows
        an end token means nothing."""
        return [(row, None) for row in torch.stack(self.logprobs, 1).tolist()]


def likely(logits: Tensor, plain: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """[B, k] float64 how likely what may be drawn is, not summed up to 1, and its ids, the most
    likely first; None: the tokens in their own order.

    Args:
        logits, plain: [B, V] float32, and their log-softmax.
        sampling: not of temperature 0.
    """
    logprobs, order = plain, None
    if sampling.temperature != 1.0:
        logprobs = (logits / sampling.temperature).log_softmax(-1)
    if sampling.top_k or sampling.top_p < 1.0:
        kept = min(sampling.top_k or logprobs.shape[1], logprobs.shape[1])
        logprobs, order = logprobs.topk(kept, dim=-1)
    probability = logprobs.double().exp()
    if sampling.top_p < 1.0:
        probability /= probability.sum(-1, keepdim=True)
        before = probability.cumsum(-1) - probability
        probability *= before < sampling.top_p  # the first one always is
    return probability, order


def at_number(probability: Tensor, number: Tensor) -> Tensor:
    """[B, 1] where the running sum of probabilities passes a number.

    Args:
        probability: [B, k] float64; their sum may be another than 1.
        number: [B, 1] float64 in [0, 1), as a part of that.
    """
    total = probability.cumsum(-1)
    # Below the end, so that nothing without probability is found.
    place = (number * total[:, -1:]).minimum(torch.nextafter(total[:, -1:], number * 0))
    # NaN finds no place: any token will do, the loss of this step says what is wrong.
    return torch.searchsorted(total, place, right=True).clamp_max(total.shape[1] - 1)


def uniform(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """[B, max_new_tokens] float64 in [0, 1), row by row from its seed."""
    generator = torch.Generator()
    rows = []
    for seed in seeds:
        generator.manual_seed(seed)
        rows.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
