"""The packed states of one teacher: read from its cache, or computed by the teacher and written."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.cache import Codec, RowStore, sample_key
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.teacher.cached.tables import EmbeddingTable
from axolotl_dskd.teacher.part import unpadded, with_samples
from axolotl_dskd.teacher.reading import ReadingTeacher
from axolotl_dskd.types import DualBatch

LOG = get_logger(__name__)


class Body:
    """The teacher itself, in memory only while it is wanted.

    Args:
        load: loads it.
        loaded: the teacher where it had to be loaded already, else None.
    """

    def __init__(
        self, load: Callable[[], ReadingTeacher], loaded: ReadingTeacher | None = None
    ) -> None:
        self._load = load
        self._loaded = loaded

    @property
    def is_loaded(self) -> bool:
        """Whether its layers are in memory."""
        return self._loaded is not None

    def get(self) -> ReadingTeacher:
        """The teacher; loaded if it is not.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def free(self) -> None:
        """Give the memory of its layers back."""
        if self._loaded is None:
            return
        self._loaded.end()
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        LOG.info("Teacher cache is complete: the teacher's layers left memory")


class CachedStates:
    """An open cache: a teacher's states, its head and embedding, and the teacher for what is
    missing.

    What is computed goes through the same packing as what is read, so that a sample gives the same
    loss whether it was cached before the run or during it.

    Args:
        store: where packed states are read and written.
        codec: how they are packed.
        head, embedding: the teacher's, on the device where the loss is computed.
        body: the teacher itself.
    """

    def __init__(
        self,
        store: RowStore,
        codec: Codec,
        head: OutputHead,
        embedding: EmbeddingTable,
        body: Body,
    ) -> None:
        assert codec.hidden_size == head.hidden_size
        self.store = store
        self.codec = codec
        self.head = head
        self.embedding = embedding
        self.body = body

    @property
    def device(self) -> torch.device:
        """Where the loss is computed."""
        return self.head.weight.device

    @torch.no_grad()
    def packed(self, batch: DualBatch, sample_ids_M: Tensor) -> Tensor:
        """[M, bytes_per_token] uint8 of a batch. Samples that the data workers found cost nothing.

        Raises:
            ValueError: the teacher had to be loaded and could not be; its states are not finite.
        """
        packed, found = batch.cached_states, batch.sizes.cached
        if packed is None or found is None:  # no data worker has looked
            shape = len(sample_ids_M), self.codec.bytes_per_token
            packed = sample_ids_M.new_zeros(shape, dtype=torch.uint8)
            found = (False,) * len(batch.teacher_labels)
        packed = packed[:, : self.codec.bytes_per_token]
        if all(found):
            return packed
        sides = unpadded(batch)
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

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """Tell the teacher, if it is there, of what a call on these batches will lack."""
        if not self.body.is_loaded:
            return
        lacking = []
        for batch in batches:
            keys = [sample_key(ids, labels) for ids, labels in unpadded(batch)]
            if not keys:
                continue
            flat = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
            rows = np.flatnonzero(self.store.missing(flat)).tolist()
            if rows:
                lacking.append(with_samples(batch, rows))
        if lacking:
            self.body.get().expect(lacking)

    @torch.no_grad()
    def compute(self, batch: DualBatch, rows: list[int]) -> list[Tensor]:
        """Run the teacher on some samples of a batch and cache them: packed states per sample.
        Answers that were written during training are not seen again, so they are not cached.

        Raises:
            ValueError: the teacher cannot be loaded, or its states are not finite.
        """
        missing = with_samples(batch, rows)
        hidden, tokens = self.body.get().states(missing)
        finite = torch.isfinite(hidden).all(1)
        if not bool(finite.all()):
            first = int(tokens.sample_ids[~finite][0])
            ids = unpadded(missing)[first][0]
            raise ValueError(
                "the teacher's hidden states are not finite for the sample whose teacher ids "
                f"begin with {ids[:12].tolist()}. Its weights are damaged, or its dtype is too "
                "narrow: use dskd.teacher.dtype bfloat16 or float32."
            )
        packed = self.codec.encode(hidden).cpu()
        counts = torch.bincount(tokens.sample_ids, minlength=len(rows)).tolist()
        states = list(packed.split(counts))
        passing = [False] * len(rows)
        if batch.written is not None:
            passing = batch.written.samples[rows].tolist()
        for (ids, labels), sample, passes in zip(unpadded(missing), states, passing, strict=True):
            if not passes:
                self.store.add(sample_key(ids, labels), sample.numpy())
        return states
