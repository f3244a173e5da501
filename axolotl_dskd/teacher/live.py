"""The teacher's signal from its own forward pass."""

from __future__ import annotations

from typing import Any

import torch

from axolotl_dskd.heads import captured_head_input, output_head, single
from axolotl_dskd.types import (
    DualBatch,
    OutputHead,
    Side,
    TeacherSignal,
    labels_ahead,
    supervised_mask,
)


class LiveTeacher:
    """Runs the teacher on each batch.

    Args:
        model: frozen, in eval mode.
        vocab_size: ids that its tokenizer can emit.

    Raises:
        ValueError: the tokenizer can emit ids that the model's head has no row for.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model = model
        self.head: OutputHead = output_head(model, vocab_size).frozen()
        rows = self.head.weight.shape[0]
        if rows < vocab_size:
            raise ValueError(
                f"the teacher's tokenizer has ids up to {vocab_size - 1}, but its output head only "
                f"{rows} rows. Set dskd.teacher.tokenizer to the model's own tokenizer."
            )
        embedding = model.get_input_embeddings()
        if embedding.weight.shape[1] != self.head.hidden_size:
            raise ValueError(
                f"the teacher embeds tokens in {embedding.weight.shape[1]} numbers but its head "
                f"takes {self.head.hidden_size}; such models are not supported as teachers."
            )
        self.embedding = embedding

    @torch.no_grad()
    def __call__(self, batch: DualBatch) -> TeacherSignal:
        """Final hidden states [M, D] at the supervised teacher positions, with embeddings."""
        device = self.embedding.weight.device
        ids = batch.teacher_input_ids.to(device)
        with captured_head_input(self.model) as captured:
            self.model(
                input_ids=ids,
                attention_mask=batch.teacher_attention_mask.to(device),
                use_cache=False,
            )
        hidden = single(captured, self.model)
        segments = batch.teacher_segment_ids()
        mask = supervised_mask(batch.teacher_labels, segments)
        side = Side(
            batch.teacher_input_ids[mask], labels_ahead(batch.teacher_labels)[mask], segments[mask]
        )
        home = batch.teacher_input_ids.device
        return TeacherSignal(
            hidden=hidden[mask.to(hidden.device)].to(home),
            tokens=side,
            embedded_inputs=self.embedding(side.input_ids.to(device)).to(home),
            embedded_labels=self.embedding(side.labels.to(device)).to(home),
        )
