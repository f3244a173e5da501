"""What a writer is: something that answers prompts, in this process or elsewhere."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: longest answer, its end token included.
        temperature: 0 takes the most likely token.
        top_p: draws among the fewest tokens whose probabilities sum up to it.
        top_k: draws among so many most likely tokens; 0: all.
        max_length: longest prompt and answer together, in tokens; None: no limit beyond the
            model's own.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_length: int | None = None

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens an answer to a prompt may have; 0 or less: none fits."""
        if self.max_length is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.max_length - len(prompt))


@dataclass(frozen=True)
class Answer:
    """What was written to one prompt.

    Attributes:
        ids: the tokens, with the end token where there is one. Empty where none had room.
        logprobs: of each token when it was written, float32 accuracy: the model's own, over the
            whole vocabulary at temperature 1, whatever it was drawn with.
        ended: the last token is one that ends an answer; else it was cut.
        weights: of each token, the model's probability over that at which it was drawn, where
            another model took part in drawing; None: it drew alone.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool
    weights: list[float] | None = None


class Writer(Protocol):
    """Answers prompts. On several ranks all of them call it together, each with prompts of its
    own, also with none."""

    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Answer]:
        """An answer to each prompt, in order.

        Args:
            prompts: ids, the generation prompt of the template included; any lengths.
            sampling: of all of them.
            seeds: of each answer, see `prompt_seed`. Answers to one prompt with different seeds
                are independent of each other.

        Raises:
            ValueError: it cannot write, in words.
        """
        ...


def prompt_seed(prompt: Sequence[int], *numbers: int) -> int:
    """A seed for the answer to a prompt that depends on nothing but the prompt and some numbers.

    So neither the order of prompts, nor how they are spread over ranks, decides what is written.

    Args:
        prompt: ids.
        numbers: such as the run's seed, the step, the number of the answer.
    """
    state = xxhash.xxh64(array("q", [*numbers, len(numbers)]).tobytes())
    state.update(array("q", prompt).tobytes())
    return state.intdigest() >> 1  # a non-negative int64
