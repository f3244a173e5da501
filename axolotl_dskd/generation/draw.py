"""Drawing the next tokens of a batch, each row by random numbers of its own.

`transformers` draws from one generator for the whole batch: what it writes depends on the other
rows. Here a row's numbers come from its own seed, so that its text depends on its prompt alone
(as far as products of other shapes round alike).
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._numbers = None if sampling.temperature == 0 else _uniform(seeds, sampling)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] 0 at the drawn token, -inf elsewhere.

        Args:
            input_ids: [B, L] what there is so far.
            scores: [B, V] logits.
        """
        temperature = self.sampling.temperature or 1.0
        logits = scores[:, : self.vocab_size].float()
        logprobs = plain = logits.log_softmax(-1)
        if temperature != 1.0:
            logprobs = (logits / temperature).log_softmax(-1)
        if self._numbers is None:
            drawn = logprobs.argmax(-1, keepdim=True)
        else:
            number = self._numbers[:, len(self.logprobs)].to(logprobs.device)
            drawn = self._draw(logprobs, number.unsqueeze(1))
        self.logprobs.append(plain.gather(1, drawn).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _draw(self, logprobs: Tensor, number: Tensor) -> Tensor:
        """[B, 1] the tokens at which the running sum of probabilities passes the numbers.

        Args:
            logprobs: [B, V] float32.
            number: [B, 1] float64 in [0, 1).
        """
        order = None
        if self.sampling.top_k or self.sampling.top_p < 1.0:
            kept = min(self.sampling.top_k or self.vocab_size, logprobs.shape[1])
            logprobs, order = logprobs.topk(kept, dim=-1)  # most likely first
        probability = logprobs.double().exp()
        if self.sampling.top_p < 1.0:
            probability /= probability.sum(-1, keepdim=True)
            before = probability.cumsum(-1) - probability
            probability *= before < self.sampling.top_p  # the first one always is
        total = probability.cumsum(-1)
        # Below the end, so that nothing without probability is found.
        place = (number * total[:, -1:]).minimum(torch.nextafter(total[:, -1:], number * 0))
        # NaN finds no place: any token will do, the loss of this step says what is wrong.
        found = torch.searchsorted(total, place, right=True).clamp_max(total.shape[1] - 1)
        return found if order is None else order.gather(1, found)


def _uniform(seeds: Sequence[int], sampling: Sampling) -> Tensor:
    """[B, max_new_tokens] float64 in [0, 1), row by row from its seed."""
    generator = torch.Generator()
    rows = []
    for seed in seeds:
        generator.manual_seed(seed)
        rows.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
