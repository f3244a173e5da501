"""A writer that runs a model of this process with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from axolotl_dskd.generation.draw import Draw
from axolotl_dskd.generation.writer import Answer, Sampling
from axolotl_dskd.ranks import max_over_ranks

#: Positions, padding included, of the prompts and answers that are written at once.
BATCH_TOKENS = 16384


class TransformersWriter:
    """Writes with a model that is in memory.

    Args:
        model: a context in which the model can be run, in eval mode and whole (`Student.running`).
        end_ids: tokens that end an answer.
        pad_id: what prompts are padded with on the left; masked, so any id does.
        vocab_size: ids that the tokenizer can emit; no other is drawn.
        batch_tokens: positions, padding included, that are written at once. Changes memory and
            speed, not what is written.
        together: a forward of the model needs all ranks, which then run equally many.
    """

    def __init__(
        self,
        model: Callable[[], AbstractContextManager[Any]],
        *,
        end_ids: Sequence[int],
        pad_id: int,
        vocab_size: int,
        batch_tokens: int = BATCH_TOKENS,
        together: bool = False,
    ) -> None:
        self.model = model
        self.end_ids = list(end_ids)
        self.pad_id = pad_id
        self.vocab_size = vocab_size
        self.batch_tokens = batch_tokens
        self.together = together

    @torch.no_grad()
    def write(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Answer]:
        """See `Writer`. Needs a token of prompt each; a prompt that leaves no room is not run.

        Raises:
            ValueError: a prompt without token.
        """
        rooms = [sampling.room(prompt) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        return self.in_batches(
            prompts,
            lengths,
            rooms,
            lambda rows: Draw(sampling, [seeds[row] for row in rows] or [0], self.vocab_size),
        )

    def in_batches(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        rooms: Sequence[int],
        draw: Callable[[list[int]], Draw],
    ) -> list[Answer]:
        """An answer to each prompt, in order, rows of similar length together.

        Args:
            prompts: ids.
            lengths: of what is read of each before it is answered.
            rooms: how many tokens each answer may have; 0 or less: it is not run.
            draw: from the rows of a batch to what draws for them; of no rows for any one prompt,
                which is run for other ranks.

        Raises:
            ValueError: a prompt without token.
        """
        if not all(prompts):
            raise ValueError("there is nothing to answer: a prompt has no token")
        answers = [Answer([], [], ended=False) for _ in prompts]
        batches = self._batches(lengths, rooms)
        with self.model() as model:
            device = model.get_input_embeddings().weight.device
            if self.together:
                batches += [[]] * (max_over_ranks(len(batches), device) - len(batches))
            for rows in batches:
                asked = [prompts[row] for row in rows] or [[self.pad_id]]
                room = max((rooms[row] for row in rows), default=1)
                end = max((len(prompts[row]) + rooms[row] for row in rows), default=2)
                with _positions_before(model, end):
                    found = self._generate(model, device, asked, draw(rows), room)
                for row, (ids, logprobs, weights) in zip(rows, found, strict=False):
                    answers[row] = self._answer(ids[: rooms[row]], logprobs, weights)
        return answers

    def _batches(self, lengths: Sequence[int], rooms: Sequence[int]) -> list[list[int]]:
        """Rows of similar length together, each batch at most `batch_tokens` or one row."""
        batches: list[list[int]] = []
        longest = room = 0
        for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
            if rooms[row] <= 0:
                continue
            # The longest comes first, but a shorter prompt may have more room.
            room = max(room, rooms[row])
            if batches and (len(batches[-1]) + 1) * (longest + room) <= self.batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
                longest, room = lengths[row], rooms[row]
        return batches

    def _generate(
        self,
        model: Any,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        draw: Draw,
        room: int,
    ) -> list[tuple[list[int], list[float], list[float] | None]]:
        """Ids, log-probabilities and weights of each answer; what follows an end token means
        nothing."""
        ids, mask = left_padded(prompts, self.pad_id)
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.end_ids or None,
            pad_token_id=self.pad_id,
        )
        with _no_habits(model) as bare, draw.beside(bare):
            out = bare.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=self.together,
            )
        written = out[:, ids.shape[1] :].tolist()
        return [(row, *found) for row, found in zip(written, draw.answers(), strict=True)]

    def _answer(self, ids: list[int], logprobs: list[float], weights: list[float] | None) -> Answer:
        """An answer up to its end token."""
        ends = set(self.end_ids)
        end = next((k + 1 for k, token in enumerate(ids) if token in ends), None)
        stop = len(ids) if end is None else end
        kept = None if weights is None else weights[:stop]
        return Answer(ids[:stop], logprobs[:stop], ended=end is not None, weights=kept)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, L] ids of prompts, padded on the left, and [B, L] 1 where there is a token, else 0."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def _positions_before(model: Any, end: int) -> Iterator[None]:
    """Rows that have no more room are fed on for as long as others of the batch, or other ranks,
    write: where a model has learned a table of positions, not beyond its end."""

    def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs = {**kwargs, "position_ids": positions.clamp_max(end - 1)}
        return args, kwargs

    with _bare(model).register_forward_pre_hook(clamp, with_kwargs=True):
        yield


def _bare(model: Any) -> Any:
    """The model below any adapter's wrapper; LoRA stays active in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _no_habits(model: Any) -> Iterator[Any]:
    """The model below any adapter's wrapper, without the settings that were published with it: a
    repetition penalty or a top_k there would change what is drawn."""
    bare = _bare(model)
    habits = bare.generation_config
    bare.generation_config = GenerationConfig()
    try:
        yield bare
    finally:
        bare.generation_config = habits
