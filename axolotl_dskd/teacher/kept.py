"""A teacher that is asked once about rows that come again: what it said of them stays in memory.

Whoever keeps rows says which (`keep`, `forget`); states of others pass through. Knows any teacher
behind its door, and samples by their keys; not where they come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_dskd.cache import sample_key
from axolotl_dskd.ranks import gather_objects, rank
from axolotl_dskd.teacher.part import unpadded, with_samples
from axolotl_dskd.teacher.protocol import CacheReader, Teacher
from axolotl_dskd.types import DualBatch, Logprobs, Needs, Side, View

LOG = get_logger(__name__)

#: What is said of the supervised tokens of one sample, on the CPU, as it was given: final hidden
#: states, or log-probabilities by the names of `Logprobs`.
Said = dict[str, Tensor]
_HIDDEN = "hidden"


class KeepingTeacher(Teacher):
    """Gives what another teacher gives, of kept rows without asking it again.

    On several ranks each holds what it has computed itself, and gives it to those that ask.

    Args:
        teacher: who is asked.
        max_bytes: what may be held on this rank; of rows beyond it is asked again.
    """

    def __init__(self, teacher: Teacher, max_bytes: int) -> None:
        self.teacher = teacher
        self.head, self.embedding = teacher.head, teacher.embedding
        self.max_bytes = max_bytes
        self.bytes = 0
        self._wanted: Counter[bytes] = Counter()
        self._held: dict[bytes, Said] = {}
        self._lent: dict[bytes, Said] = {}
        self._said_of_limit = False

    def keep(self, keys: Iterable[bytes]) -> None:
        """Samples that will come again, each as often as it is kept; on every rank alike."""
        self._wanted.update(keys)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Samples that were kept, and will come no more."""
        for key in keys:
            self._wanted[key] -= 1
            if self._wanted[key] <= 0:
                del self._wanted[key]
                self.bytes -= _size(self._held.pop(key, {}))

    def start_again(self) -> None:
        """See `Teacher`."""
        self.teacher.start_again()
        self._wanted.clear()
        self._held.clear()
        self._lent = {}
        self.bytes = 0

    def fetch(self, keys: Sequence[bytes]) -> None:
        """Get from other ranks what they hold of samples that come in this step; on every rank.

        Args:
            keys: of this rank's samples.
        """
        lacking = {key for key in keys if key not in self._held}
        asked = gather_objects(sorted(lacking))
        self._lent = {}
        if len(asked) == 1 or not any(asked):
            return
        others = {key for number, found in enumerate(asked) if number != rank() for key in found}
        mine = {key: self._held[key] for key in sorted(others & self._held.keys())}
        for found in gather_objects(mine):
            self._lent.update((key, said) for key, said in found.items() if key in lacking)

    @torch.no_grad()
    def __call__(self, batch: DualBatch, needs: Needs) -> View:
        """See `Teacher`. The teacher itself is called on every rank, with what is not held, maybe
        with nothing: another one's rows may need all of them."""
        if batch.written is None or not self._wanted:
            return self.teacher(batch, needs)
        side, keys = batch.teacher_side(), _keys(batch)
        counts, asked = batch.sizes.teacher, self._lacking(keys)
        view = self.teacher(with_samples(batch, asked), needs)
        said = _said(view)
        sizes = [counts[sample] for sample in asked]
        self._hold([keys[sample] for sample in asked], said, sizes)
        if len(asked) == len(keys):
            return view
        pieces: list[Said] = [self._found(key) or {} for key in keys]
        parts = {name: values.split(sizes) for name, values in said.items()}
        for number, sample in enumerate(asked):
            pieces[sample] = {name: values[number] for name, values in parts.items()}
        whole = {
            name: torch.cat([values[:0], *(p[name].to(values.device) for p in pieces)])
            for name, values in said.items()
        }
        hidden = whole.pop(_HIDDEN, None)
        return View(
            side,
            self.head,
            hidden,
            self.teacher.embedded(side) if needs.embeddings else None,
            logprobs=Logprobs(**whole) if whole else None,
        )

    def _found(self, key: bytes) -> Said | None:
        held = self._held.get(key)
        return self._lent.get(key) if held is None else held

    def _lacking(self, keys: Sequence[bytes]) -> list[int]:
        return [sample for sample, key in enumerate(keys) if self._found(key) is None]

    def _hold(self, keys: Sequence[bytes], said: Said, sizes: list[int]) -> None:
        """Hold what was said of samples, of those that are kept."""
        if not any(key in self._wanted for key in keys):
            return
        parts = {name: values.cpu().split(sizes) for name, values in said.items()}
        for number, key in enumerate(keys):
            if key not in self._wanted or key in self._held:
                continue
            mine = {name: values[number] for name, values in parts.items()}
            if self.bytes + _size(mine) > self.max_bytes:
                self._say_of_limit()
                return
            # Of its own, or the whole batch would stay with each sample.
            self._held[key] = {name: values.clone() for name, values in mine.items()}
            self.bytes += _size(mine)

    def _say_of_limit(self) -> None:
        if not self._said_of_limit:
            self._said_of_limit = True
            LOG.warning(
                f"What the teacher says of kept answers takes more than {self.max_bytes:,} bytes "
                "(dskd.samples.replay_memory): it is asked about some of them again."
            )

    # ---- the teacher's own ---------------------------------------------------------------------

    def nothing(self, tokens: Side) -> View:
        """See `Teacher`."""
        return self.teacher.nothing(tokens)

    def embedded(self, tokens: Side) -> tuple[Tensor, Tensor]:
        """See `Teacher`."""
        return self.teacher.embedded(tokens)

    def expect(self, batches: Sequence[DualBatch]) -> None:
        """Name the teacher what it will be asked about: nothing that is held."""
        self.teacher.expect(
            [
                batch if batch.written is None else with_samples(batch, self._lacking(_keys(batch)))
                for batch in batches
            ]
        )

    def idle(self, batch: DualBatch) -> None:
        """See `Teacher`."""
        self.teacher.idle(batch)

    def reader(self) -> CacheReader | None:
        """See `Teacher`."""
        return self.teacher.reader()

    def running(self) -> AbstractContextManager[Any]:
        """See `Teacher`."""
        return self.teacher.running()

    @property
    def runs_together(self) -> bool:
        """See `Teacher`."""
        return self.teacher.runs_together

    def begin(self) -> None:
        """See `Teacher`."""
        self.teacher.begin()

    def end_epoch(self, *, more: bool) -> None:
        """See `Teacher`."""
        self.teacher.end_epoch(more=more)

    def end(self) -> None:
        """See `Teacher`."""
        self.teacher.end()


def row_key(row: dict[str, Any]) -> bytes:
    """What a prepared row's samples are held under."""
    ids, labels = (np.array(row[c]) for c in ("teacher_input_ids", "teacher_labels"))
    return sample_key(ids, labels)


def _keys(batch: DualBatch) -> list[bytes]:
    return [sample_key(ids, labels) for ids, labels in unpadded(batch)]


def _size(said: Said) -> int:
    return sum(values.nbytes for values in said.values())


def _said(view: View) -> Said:
    """What a view has of its tokens, by name."""
    if view.hidden is not None:
        return {_HIDDEN: view.hidden}
    assert view.logprobs is not None
    found = {name: getattr(view.logprobs, name) for name in ("labels", "ids", "top")}
    return {name: values for name, values in found.items() if values is not None}
