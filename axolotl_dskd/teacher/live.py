"""A teacher that reads each batch: its states come from its own forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.models.heads import (
    captured_head_input,
    check_output_head,
    head_module,
    output_head,
    single,
)
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.ranks import is_sharded, max_over_ranks
from axolotl_dskd.teacher.load import load_teacher
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.teacher.spec import TeacherSpec
from axolotl_dskd.types import DualBatch, Needs, Side, View

#: Positions, padding included, of one forward of the teacher: about 1 GB for a 7B model in bf16.
MAX_TOKENS_PER_FORWARD = 8192


class LiveTeacher(Teacher):
    """Runs the teacher on each batch.

    Args:
        model: frozen, in eval mode, on one device, spread over several, or cut over the ranks.
        vocab_size: ids that its tokenizer can emit.
        device: where the loss is computed; the output head is copied there if it is elsewhere.
        max_tokens: positions, padding included, of one forward; default `MAX_TOKENS_PER_FORWARD`.

    Raises:
        ValueError: head or embedding are offloaded; the head does something unknown to its
            logits; the tokenizer can emit ids that the head has no row for.
    """

    def __init__(
        self, model: Any, vocab_size: int, device: torch.device, max_tokens: int | None = None
    ) -> None:
        self.model = model
        self.max_tokens = max_tokens or MAX_TOKENS_PER_FORWARD
        #: A sharded model gathers its layers in each forward: all ranks must run equally many.
        self.is_sharded = any(is_sharded(parameter) for parameter in model.parameters())
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
        embedded = None
        if needs.embeddings:
            inputs, labels = (
                self._embed(ids.to(self.embedding.device)).to(hidden.device)
                for ids in (side.input_ids, side.labels)
            )
            embedded = inputs, labels
        return View(side, self.head, hidden, embedded)

    @torch.no_grad()
    def states(self, batch: DualBatch) -> tuple[Tensor, Side]:
        """Final hidden states [M, D] of the supervised teacher tokens, and these tokens."""
        home = batch.teacher_input_ids.device
        device = self.embedding.device
        mask, side = batch.teacher_side()
        hidden = self.head.weight.new_empty((len(side), self.head.hidden_size), device=home)
        order = (mask.flatten().cumsum(0) - 1).view_as(mask)  # where a position's state belongs
        lengths = batch.teacher_attention_mask.sum(1).tolist()
        groups = _groups(lengths, self.max_tokens)
        if self.is_sharded:
            groups += [[]] * (max_over_ranks(len(groups), home) - len(groups))
        for rows in groups:
            if not rows:
                self.model(input_ids=batch.teacher_input_ids[:1, :1].to(device), use_cache=False)
                continue
            cut = slice(None, max(lengths[row] for row in rows))
            # The teacher's dtype is its own, not that of the student's autocast.
            apart = torch.autocast(device.type, enabled=False)
            with apart, captured_head_input(self.model) as captured:
                self.model(
                    input_ids=batch.teacher_input_ids[rows, cut].to(device),
                    attention_mask=batch.teacher_attention_mask[rows, cut].to(device),
                    use_cache=False,
                )
            states = single(captured, self.model)
            wanted = mask[rows, cut]
            hidden[order[rows, cut][wanted]] = states[wanted.to(states.device)].to(hidden)
        return hidden, side

    def idle(self, batch: DualBatch) -> None:
        """Take part in gathering the layers for the other ranks' forwards."""
        if self.is_sharded:
            self.states(batch)

    def read_less(self, max_tokens: int) -> None:
        """From now on, read at most so many positions in one forward: memory has run out."""
        self.max_tokens = min(self.max_tokens, max_tokens)


def load_live(spec: TeacherSpec) -> LiveTeacher:
    """The whole teacher, loaded into this process.

    Raises:
        ValueError: it cannot be loaded, or cannot be used as a teacher.
    """
    model = load_teacher(spec.config, spec.device)
    return LiveTeacher(model, spec.vocab_size, spec.device)


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


def _groups(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Rows of similar length together, each group at most `max_tokens` with padding (or one row).

    A packed student row may hold one long sample and fifty short ones: padded together they would
    take many times the memory of the tokens that there are.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = lengths[row]
    return groups
