"""A teacher that reads each batch: its states come from its own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axolotl_dskd.models.heads import captured_head_input, single
from axolotl_dskd.ranks import is_sharded, max_over_ranks
from axolotl_dskd.teacher.load import load_teacher
from axolotl_dskd.teacher.part import indices
from axolotl_dskd.teacher.reading import ReadingTeacher
from axolotl_dskd.teacher.spec import TeacherSpec
from axolotl_dskd.types import DualBatch, Side

#: Positions, padding included, of one forward of the teacher: about 1 GB for a 7B model in bf16.
MAX_TOKENS_PER_FORWARD = 8192


class LiveTeacher(ReadingTeacher):
    """Runs the teacher on each batch.

    Args:
        model: frozen, in eval mode, on one device, spread over several, or cut over the ranks.
        vocab_size: ids that its tokenizer can emit.
        device: where the loss is computed; the output head is copied there if it is elsewhere.
        max_tokens: positions, padding included, of one forward; default `MAX_TOKENS_PER_FORWARD`.

    Raises:
        ValueError: see `ReadingTeacher`.
    """

    def __init__(
        self, model: Any, vocab_size: int, device: torch.device, max_tokens: int | None = None
    ) -> None:
        #: A sharded model gathers its layers in each forward: all ranks must run equally many.
        self.is_sharded = any(is_sharded(parameter) for parameter in model.parameters())
        super().__init__(model, vocab_size, device, max_tokens or MAX_TOKENS_PER_FORWARD)

    @torch.no_grad()
    def states(self, batch: DualBatch) -> tuple[Tensor, Side]:
        """Final hidden states [M, D] of the supervised teacher tokens, and these tokens."""
        home = batch.teacher_input_ids.device
        device = self.embedding.device
        side, (_, places) = batch.teacher_side(), batch.teacher_places
        hidden = self.head.weight.new_empty((len(side), self.head.hidden_size), device=home)
        lengths, counts = batch.sizes.lengths, np.array(batch.sizes.teacher)
        ends = counts.cumsum()
        groups = _groups(lengths, self.max_tokens)
        if self.is_sharded:
            groups += [[]] * (max_over_ranks(len(groups), home) - len(groups))
        for rows in groups:
            if not rows:
                any_token = torch.zeros((1, 1), dtype=torch.long, device=device)
                self.model(input_ids=any_token, use_cache=False)
                continue
            chosen = indices(rows, home), slice(None, max(lengths[row] for row in rows))
            # The teacher's dtype is its own, not that of the student's autocast.
            apart = torch.autocast(device.type, enabled=False)
            with apart, captured_head_input(self.model) as captured:
                self.model(
                    input_ids=batch.teacher_input_ids[chosen].to(device),
                    attention_mask=batch.teacher_attention_mask[chosen].to(device),
                    use_cache=False,
                )
            states = single(captured, self.model)
            # Which tokens of the batch these rows have, and in which of the rows each is: from
            # numbers that the host knows, so that it need not wait for the forward.
            tokens = [np.arange(ends[row] - counts[row], ends[row]) for row in rows]
            wanted = indices(np.concatenate(tokens), home)
            row_of = indices(np.arange(len(rows)).repeat(counts[rows]), states.device)
            hidden[wanted] = states[row_of, places[wanted].to(states.device)].to(hidden)
        return hidden, side

    def idle(self, batch: DualBatch) -> None:
        """Take part in gathering the layers for the other ranks' forwards."""
        if self.is_sharded:
            self.states(batch)

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The model, in its own dtype."""
        with torch.no_grad(), torch.autocast(self.embedding.device.type, enabled=False):
            yield self.model

    @property
    def runs_together(self) -> bool:
        """See `is_sharded`."""
        return self.is_sharded


def load_live(spec: TeacherSpec) -> LiveTeacher:
    """The whole teacher, loaded into this process.

    Raises:
        ValueError: it cannot be loaded, or cannot be used as a teacher.
    """
    model = load_teacher(spec.config, spec.device)
    return LiveTeacher(model, spec.vocab_size, spec.device)


def _groups(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
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
