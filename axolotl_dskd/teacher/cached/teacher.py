"""The teacher's signal from the cache; the teacher itself runs only for what is not in there."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.cache import Codec, RowStore, sample_key
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher.cached.tables import EmbeddingTable
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.types import DualBatch, Needs, View

LOG = get_logger(__name__)


class CachedTeacher:
    """Stands for a live teacher: the same call, `head` and `embedding`.

    Samples that the data workers found in the cache (`DualBatch.cached`) cost a copy. The others
    are computed by the teacher and written, and go through the same packing, so that a sample
    gives the same loss whether it was cached before the run or during it.

    Args:
        store: where packed states are read and written.
        codec: how they are packed.
        head, embedding: the teacher's, on the device where the loss is computed.
        load_body: loads the teacher; called when a sample has to be computed.
    """

    def __init__(
        self,
        store: RowStore,
        codec: Codec,
        head: OutputHead,
        embedding: EmbeddingTable,
        load_body: Callable[[], LiveTeacher],
    ) -> None:
        assert codec.hidden_size == head.hidden_size
        self.store = store
        self.codec = codec
        self.head = head
        self.embedding = embedding
        self.body: LiveTeacher | None = None
        self._load_body = load_body

    @torch.no_grad()
    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        """The supervised teacher tokens with their final hidden states [M, D].

        Raises:
            ValueError: the teacher had to be loaded and could not be; its states are not finite.
        """
        _, side = batch.teacher_side()
        packed = self._packed(batch, side.sample_ids)
        hidden = self.codec.decode(packed, self.head.weight.dtype)
        embedded = None
        if needs.embeddings:
            embedded = self.embedding(side.input_ids), self.embedding(side.labels)
        return View(side, self.head, hidden, embedded)

    def _packed(self, batch: DualBatch, sample_ids_M: Tensor) -> Tensor:
        """[M, bytes_per_token] of the batch, complete."""
        if batch.cached is not None and bool(batch.cached.all()):
            assert batch.cached_states is not None
            return batch.cached_states
        packed = batch.cached_states
        if packed is None:
            packed = sample_ids_M.new_zeros(
                (len(sample_ids_M), self.codec.bytes_per_token), dtype=torch.uint8
            )
        found = [False] * len(batch.teacher_labels) if batch.cached is None else batch.cached
        sides = _unpadded(batch)
        counts = torch.bincount(sample_ids_M, minlength=len(sides)).tolist()
        todo: list[int] = []
        for row, (ids, labels) in enumerate(sides):
            if found[row] or not counts[row]:
                continue
            # It may have been written since the data worker looked, or wait to be written here.
            out = np.empty((counts[row], self.codec.bytes_per_token), np.uint8)
            if self.store.read_into(sample_key(ids, labels), out):
                packed[sample_ids_M == row] = torch.from_numpy(out).to(packed.device)
            else:
                todo.append(row)
        if todo:
            for row, states in zip(todo, self.compute(batch, todo), strict=True):
                packed[sample_ids_M == row] = states.to(packed.device)
        return packed

    @torch.no_grad()
    def compute(self, batch: DualBatch, rows: list[int]) -> list[Tensor]:
        """Run the teacher on some samples of a batch and cache them: packed states per sample.

        Raises:
            ValueError: the teacher cannot be loaded, or its states are not finite.
        """
        body = self.load_body()
        some = replace(
            batch,
            teacher_input_ids=batch.teacher_input_ids[rows],
            teacher_labels=batch.teacher_labels[rows],
            teacher_attention_mask=batch.teacher_attention_mask[rows],
        )
        view = body(some, Needs())
        assert view.hidden is not None
        finite = torch.isfinite(view.hidden).all(1)
        if not bool(finite.all()):
            first = int(view.tokens.sample_ids[~finite][0])
            ids = _unpadded(some)[first][0]
            raise ValueError(
                "the teacher's hidden states are not finite for the sample whose teacher ids "
                f"begin with {ids[:12].tolist()}. Its weights are damaged, or its dtype is too "
                "narrow: use dskd.teacher.dtype bfloat16 or float32."
            )
        packed = self.codec.encode(view.hidden).cpu()
        counts = torch.bincount(view.tokens.sample_ids, minlength=len(rows)).tolist()
        states = list(packed.split(counts))
        for (ids, labels), one in zip(_unpadded(some), states, strict=True):
            self.store.add(sample_key(ids, labels), one.numpy())
        return states

    def load_body(self) -> LiveTeacher:
        """The teacher itself; loaded if it is not."""
        if self.body is None:
            self.body = self._load_body()
        return self.body

    def free_body(self) -> None:
        """Give the memory of the teacher's layers back; head and embedding stay."""
        if self.body is None:
            return
        self.body = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        LOG.info("Teacher cache is complete: the teacher's layers left memory")


def _unpadded(batch: DualBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of each sample, as they were before they were padded."""
    lengths = batch.teacher_attention_mask.sum(1).tolist()
    ids, labels = batch.teacher_input_ids.cpu().numpy(), batch.teacher_labels.cpu().numpy()
    return [(i[:n], y[:n]) for i, y, n in zip(ids, labels, lengths, strict=True)]
