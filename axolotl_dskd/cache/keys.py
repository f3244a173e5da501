"""What a sample's cached states are filed under: its token ids and which of them are supervised.

Not its place in the dataset, the batch, the packing or the student: those do not change what the
teacher says. What the teacher is decides the folder (`identity`), so it is no part of the key.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from axolotl_dskd.types import IGNORE_INDEX

KEY_BYTES = 16


def supervised_positions(labels: np.ndarray) -> np.ndarray:
    """Positions of one unpadded sample whose successor carries a label, ascending."""
    return np.flatnonzero(labels[1:] != IGNORE_INDEX)


def sample_key(ids: np.ndarray, labels: np.ndarray) -> bytes:
    """16 bytes that name the final hidden states of a sample at its supervised positions.

    Tokens behind the last supervised one do not count: a causal teacher has not read them there.

    Args:
        ids, labels: [L] integers, without padding.
    """
    positions = supervised_positions(labels).astype("<i4")
    end = int(positions[-1]) + 1 if len(positions) else 0
    digest = hashlib.blake2b(end.to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(ids[:end], dtype="<i4").data)
    digest.update(positions.data)
    return digest.digest()


def dataset_keys(dataset: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys [n, 16] uint8, supervised tokens [n] and lengths [n] of all rows of a dataset.

    Args:
        dataset: a prepared `datasets.Dataset` with `teacher_input_ids` and `teacher_labels`.
    """
    columns = ["teacher_input_ids", "teacher_labels"]
    keys, tokens, lengths = [], [], []
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        pairs = zip(*(table[column] for column in columns), strict=True)
        for ids, labels in ((a.values.to_numpy(), b.values.to_numpy()) for a, b in pairs):
            keys.append(sample_key(ids, labels))
            tokens.append(int((labels[1:] != IGNORE_INDEX).sum()))
            lengths.append(len(ids))
    flat = np.frombuffer(b"".join(keys), dtype=np.uint8)
    return flat.reshape(-1, KEY_BYTES), np.array(tokens, np.int64), np.array(lengths, np.int64)
