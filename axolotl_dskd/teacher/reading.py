"""What teachers that read each batch have in common, wherever their layers run."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.models.heads import check_output_head, head_module, output_head
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.types import DualBatch, Needs, Side, View


class ReadingTeacher(Teacher):
    """A teacher with a head and an embedding of its own, which is asked for states.

    Args:
        model: frozen, in eval mode; only its ends are used here.
        vocab_size: ids that its tokenizer can emit.
        device: where the loss is computed; the output head is copied there if it is elsewhere.
        max_tokens: positions, padding included, of one forward.

    Raises:
        ValueError: head or embedding are offloaded; the head does something unknown to its
            logits; the tokenizer can emit ids that the head has no row for.
    """

    def __init__(self, model: Any, vocab_size: int, device: torch.device, max_tokens: int) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self._embed = model.get_input_embeddings()
        for module, name in ((head_module(model), "output head"), (self._embed, "embedding")):
            if any(p.is_meta for p in module.parameters()):
                raise ValueError(
                    f"dskd.teacher.device_map offloads the teacher's {name}, which every step "
                    "needs. Give a device_map that keeps it on a device; layers may be offloaded."
                )
        check_output_head(model, "teacher")
        self.head = output_head(model, vocab_size).frozen().to(device)
        self.embedding = self._embed.weight.detach()
        check_sizes(self.head, self.embedding, vocab_size)

    @torch.no_grad()
    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        """The supervised teacher tokens with their final hidden states [M, D]."""
        hidden, side = self.states(batch)
        return View(side, self.head, hidden, self.embedded(side) if needs.embeddings else None)

    @torch.no_grad()
    def embedded(self, tokens: Side) -> tuple[Tensor, Tensor]:
        """See `Teacher`."""
        home, device = tokens.input_ids.device, self.embedding.device
        inputs, labels = (
            self._embed(ids.to(device)).to(home) for ids in (tokens.input_ids, tokens.labels)
        )
        return inputs, labels

    @abstractmethod
    def states(self, batch: DualBatch) -> tuple[Tensor, Side]:
        """Final hidden states [M, D] of the supervised teacher tokens, and these tokens.

        Raises:
            ValueError: they cannot be had.
        """

    def read_less(self, max_tokens: int) -> None:
        """From now on, read at most so many positions in one forward: memory has run out."""
        self.max_tokens = min(self.max_tokens, max_tokens)


def check_sizes(head: OutputHead, embedding: Tensor, vocab_size: int) -> None:
    """Refuse a teacher whose parts do not fit each other or its tokenizer.

    Raises:
        ValueError: with what does not fit.
    """
    rows = head.weight.shape[0]
    if rows < vocab_size:
        raise ValueError(
            f"the teacher's tokenizer has ids up to {vocab_size - 1}, but its output head only "
            f"{rows} rows. Set dskd.teacher.tokenizer to the model's own tokenizer."
        )
    if embedding.shape[1] != head.hidden_size:
        raise ValueError(
            f"the teacher embeds tokens in {embedding.shape[1]} numbers but its "
            f"head takes {head.hidden_size}; such models are not supported as teachers."
        )
