"""A writer that runs a model of this process with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
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
        if not all(prompts):
            raise ValueError("there is nothing to answer: a prompt has no token")
        answers = [Answer([], [], ended=False) for _ in prompts]
        rooms = [sampling.room(prompt) for prompt in prompts]
        batches = self._batches([len(prompt) for prompt in prompts], rooms)
        with self.model() as model:
            device = model.get_input_embeddings().weight.device
            if self.together:
                batches += [[]] * (max_over_ranks(len(batches), device) - len(batches))
            for rows in batches:
                found = self._generate(
                    model,
                    device,
                    [prompts[row] for row in rows] or [[self.pad_id]],
                    sampling,
                    [seeds[row] for row in rows] or [0],
                    max((rooms[row] for row in rows), default=1),
                )
                for row, (ids, logprobs) in zip(rows, found, strict=False):
                    answers[row] = self._answer(ids[: rooms[row]], logprobs[: rooms[row]])
        return answers

    def _batches(self, lengths: Sequence[int], rooms: Sequence[int]) -> list[list[int]]:
        """Rows of similar length together, each batch at most `batch_tokens` or one row."""
        batches: list[list[int]] = []
        width = 0
        for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
            if rooms[row] <= 0:
                continue
            # The longest comes first, but a shorter prompt may have more room.
            wider = max(width, lengths[row] + rooms[row]) if batches else 0
            if batches and (len(batches[-1]) + 1) * wider <= self.batch_tokens:
                batches[-1].append(row)
                width = wider
            else:
                batches.append([row])
                width = lengths[row] + rooms[row]
        return batches

    def _generate(
        self,
        model: Any,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        room: int,
    ) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probabilities of each answer; what follows an end token means nothing."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        draw = Draw(sampling, seeds, self.vocab_size)
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.end_ids or None,
            pad_token_id=self.pad_id,
        )
        with _no_habits(model) as bare:
            out = bare.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
                synced_gpus=self.together,
            )
        written = out[:, width:].tolist()
        logprobs = torch.stack(draw.logprobs, 1).tolist()
        return list(zip(written, logprobs, strict=True))

    def _answer(self, ids: list[int], logprobs: list[float]) -> Answer:
        """An answer up to its end token."""
        ends = set(self.end_ids)
        stop = next((k + 1 for k, token in enumerate(ids) if token in ends), None)
        return Answer(ids[:stop], logprobs[:stop], ended=stop is not None)


@contextmanager
def _no_habits(model: Any) -> Iterator[Any]:
    """The model below any adapter's wrapper (LoRA stays active in it), without the settings that
    were published with it: a repetition penalty or a top_k there would change what is drawn."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    habits = bare.generation_config
    bare.generation_config = GenerationConfig()
    try:
        yield bare
    finally:
        bare.generation_config = habits
