"""`<output_dir>/dskd-record.jsonl`: what a run saw and what its evaluations found, row by row.

One JSON object a line: `train`, which rows it trains on, when training begins; `log`, what the
trainer logs; `evaluation`, what one has found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

RECORD = "dskd-record.jsonl"


def append_line(folder: str | Path, line: dict[str, Any]) -> None:
    """Add a line; the first one makes the file."""
    path = Path(folder) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_record(folder: str | Path) -> list[dict[str, Any]]:
    """All lines, in order; none where there is no file."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_digest(dataset: Any) -> str:
    """A hash of a prepared data set's rows in their order: what the student reads and learns."""
    digest = xxhash.xxh3_128()
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for column in batch.columns:
            lists = column.combine_chunks()
            digest.update(lists.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(lists.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()
