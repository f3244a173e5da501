"""Answers that two models draw together, token by token, over one vocabulary.

    y_t ~ (1 - a) q(. | x, y_<t) + a p(. | x', y_<t)         w_t = q(y_t) / ((1 - a) q + a p)(y_t)

q is the writer, p its partner, each as it would draw alone: at the same temperature, over its own
top_k and top_p. Each reads the prompt of its own template (x, x'), then the same ids. MiniLLM's
teacher-mixed sampling (Gu et al. 2023, arXiv 2306.08543, section 2.2); there p, too, is cut to the
tokens that the writer's top_k and top_p leave. Knows models, prompts and answers as token ids;
nothing of who learns from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.generation.draw import Draw, at_number, likely, uniform
from axolotl_dskd.generation.transformers_writer import TransformersWriter, left_padded
from axolotl_dskd.generation.writer import Answer, Sampling


@dataclass(frozen=True)
class Partner:
    """A model that takes part in drawing what another one writes.

    Attributes:
        model: a context in which it can be run (`Teacher.running`). Entered for each forward: what
            the writer needs around its own, such as autocast, is not for this one.
        share: a, of the probability at which a token is drawn.
        ends: by id, tokens that end an answer in its template and not in the writer's, and the
            writer's own that stands for each.
        max_length: longest prompt of its own and answer together, in tokens; None: no limit.
    """

    model: Callable[[], AbstractContextManager[Any]]
    share: float
    ends: Mapping[int, int] = field(default_factory=dict)
    max_length: int | None = None

    def room(self, prompt: Sequence[int]) -> int | None:
        """How many tokens may follow a prompt of its own; None: any number."""
        return None if self.max_length is None else self.max_length - len(prompt)


class MixedWriter:
    """Writes with a model that is in memory, beside a partner.

    Args:
        writer: of the model that writes; `together` where a forward of either needs all ranks.
        partner: who draws along.
    """

    def __init__(self, writer: TransformersWriter, partner: Partner) -> None:
        self.writer = writer
        self.partner = partner

    @torch.no_grad()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        beside: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> list[Answer]:
        """See `Writer`; with `Answer.weights`. What a row draws depends on its two prompts and its
        seed alone. A prompt that leaves no room on either side is not run.

        Args:
            prompts, beside: each prompt's ids in the writer's and in the partner's template.
            sampling: of both models.
            seeds: of each answer.

        Raises:
            ValueError: a prompt without token; the partner keeps no cache.
        """
        if not all(beside):
            raise ValueError("there is nothing to answer: a partner's prompt has no token")
        rooms = [
            min(sampling.room(ours), sampling.max_new_tokens if room is None else room)
            for ours, room in zip(prompts, map(self.partner.room, beside), strict=True)
        ]
        lengths = [max(map(len, both)) for both in zip(prompts, beside, strict=True)]
        writer = self.writer

        def draw(rows: list[int]) -> DrawTogether:
            theirs = [beside[row] for row in rows] or [[writer.pad_id]]
            reader = ReadAlong(self.partner, theirs, writer.pad_id, writer.vocab_size)
            return DrawTogether(sampling, [seeds[row] for row in rows] or [0], reader)

        return writer.in_batches(prompts, lengths, rooms, draw)


class DrawTogether(Draw):
    """`Draw` of two models.

    Args:
        sampling, seeds: see `Draw`.
        reader: the partner, reading the same rows.

    Attributes:
        weights: of each step, [B] float64, see `Answer.weights`.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], reader: ReadAlong) -> None:
        super().__init__(sampling, seeds, reader.vocab_size)
        self.reader = reader
        self.weights: list[Tensor] = []
        self._numbers = uniform(seeds, sampling)  # who draws is by chance at temperature 0, too

    def drawn(self, logits: Tensor, plain: Tensor, number: Tensor | None) -> Tensor:
        """See `Draw`."""
        assert number is not None
        partner = self.reader.partner
        ours = probabilities(logits, plain, self.sampling)
        logits = self.reader.logits.to(logits.device)
        mixed = probabilities(logits, logits.log_softmax(-1), self.sampling)
        for end, stands_for_it in partner.ends.items():
            mixed[:, stands_for_it] += mixed[:, end]
            mixed[:, end] = 0.0
        mixed = mixed.mul_(partner.share).add_(ours, alpha=1 - partner.share)
        drawn = at_number(mixed, number)
        self.weights.append((ours.gather(1, drawn) / mixed.gather(1, drawn)).squeeze(1))
        return drawn

    def beside(self, model: Any) -> AbstractContextManager[Any]:
        """Let the partner read along."""
        return model.register_forward_hook(self.reader, with_kwargs=True)

    def answers(self) -> list[tuple[list[float], list[float] | None]]:
        """See `Draw`."""
        weights = torch.stack(self.weights, 1).tolist()
        return [(row, mine) for (row, _), mine in zip(super().answers(), weights, strict=True)]


def probabilities(logits: Tensor, plain: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] float64 how likely each token is to be drawn by one model alone.

    Args:
        logits, plain: [B, V] float32, and their log-softmax.
    """
    if sampling.temperature == 0:
        nothing = torch.zeros_like(plain, dtype=torch.float64)
        return nothing.scatter_(1, plain.argmax(-1, keepdim=True), 1.0)
    probability, order = likely(logits, plain, sampling)
    probability /= probability.sum(-1, keepdim=True)
    if order is None:
        return probability
    return torch.zeros_like(plain, dtype=torch.float64).scatter_(1, order, probability)


class ReadAlong:
    """A partner on the rows of a batch: their prompts in its own template, then what is drawn.

    A hook behind the writer's forward, since `generate` runs that as often on every rank (with
    `synced_gpus`), but calls a processor of logits no more where all rows have ended: a partner
    that is cut over the ranks would wait for the others then. Keeps a cache of its own.

    Args:
        partner: which.
        prompts: of its own, of the rows in order.
        pad_id: what these are padded with; masked.
        vocab_size: ids that may be drawn.

    Attributes:
        logits: [B, V] float32, of what comes next.
    """

    logits: Tensor

    def __init__(
        self, partner: Partner, prompts: Sequence[Sequence[int]], pad_id: int, vocab_size: int
    ) -> None:
        self.partner = partner
        self.vocab_size = vocab_size
        self._prompts, self._mask = left_padded(prompts, pad_id)
        self._cache: Any = None

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Read what the writer has just read.

        Raises:
            ValueError: the model keeps no cache.
        """
        # Finished rows go on with padding, which nobody listens to.
        ids = self._prompts if self._cache is None else kwargs["input_ids"][:, -1:]
        with self.partner.model() as model:
            device = model.get_input_embeddings().weight.device
            mask = self._mask.to(device)
            if self._cache is not None:
                mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            self._mask = mask
            positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            if self.partner.max_length is not None:  # a row with less room than others has ended
                positions = positions.clamp_max(self.partner.max_length - 1)
            known = inspect.signature(model.forward).parameters
            more = {"position_ids": positions, "logits_to_keep": 1}
            found = model(
                input_ids=ids.to(device),
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                **{name: value for name, value in more.items() if name in known},
            )
        self._cache = getattr(found, "past_key_values", None)
        if self._cache is None:
            raise ValueError(
                f"dskd.samples.teacher_mix: {type(model).__name__} gives no past_key_values, so it "
                "cannot read along what the student writes. Set teacher_mix: 0, or use another "
                "teacher."
            )
        self.logits = found.logits[:, -1, : self.vocab_size].float()
