"""Written rows that are kept for later steps. Knows rows as columns of numbers and bytes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

Row = dict[str, Any]


class Replay:
    """The last rows of all ranks, oldest out first; the same on every rank.

    Args:
        capacity: most rows; 0: none are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: deque[Row] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_full(self) -> bool:
        """Whether rows are to be taken from it."""
        return self.capacity > 0 and len(self.rows) == self.capacity

    def add(self, rows: Iterable[Row]) -> list[Row]:
        """Keep rows, in the order that all ranks agree on; those that are kept no more."""
        everything = [*self.rows, *rows]
        self.rows = deque(everything, maxlen=self.capacity)
        return everything[: len(everything) - len(self.rows)]

    def drawn(self, count: int, *seed: int) -> list[Row]:
        """Rows without repetition, as far as there are so many; then from the front again.

        Args:
            count: how many, on all ranks together.
            seed: the same on every rank.
        """
        order = list(range(len(self.rows)))
        # Other numbers than those of `Schedule.draw`, which has chosen the step.
        random.Random(" ".join(["rows", *map(str, seed)])).shuffle(order)
        return [self.rows[order[k % len(order)]] for k in range(count)]

    def save(self, path: Path) -> None:
        """Write all rows to a safetensors file: each column's values one behind the other, with
        their lengths where they have any. Of bytes that a row has not, there are none."""
        tensors: dict[str, torch.Tensor] = {}
        first = {name: value for row in reversed(self.rows) for name, value in row.items()}
        for name, kind in first.items():
            if isinstance(kind, int):
                tensors[name] = torch.tensor([row[name] for row in self.rows])
                continue
            values = [
                np.frombuffer(row.get(name, b""), np.uint8)
                if isinstance(kind, bytes)
                else np.array(row[name], np.int32)
                for row in self.rows
            ]
            tensors[name] = torch.from_numpy(np.concatenate(values).copy())
            tensors[f"{name} lengths"] = torch.tensor([len(value) for value in values])
        part = path.with_suffix(".part")
        save_file(tensors, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or damaged.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the kept answers in {path} cannot be read ({error}). The checkpoint was written "
                "without dskd.samples.replay, or is damaged: resume from another one."
            ) from error
        columns: dict[str, list[Any]] = {}
        for name in (n for n in tensors if not n.endswith(" lengths")):
            if f"{name} lengths" not in tensors:
                columns[name] = tensors[name].tolist()
                continue
            values = tensors[name].split(tensors[f"{name} lengths"].tolist())
            columns[name] = [
                v.numpy().tobytes() if v.dtype == torch.uint8 else v.tolist() for v in values
            ]
        self.rows.clear()
        for values in zip(*columns.values(), strict=True):
            row = zip(columns, values, strict=True)
            self.rows.append({name: value for name, value in row if value != b""})
