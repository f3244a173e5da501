"""Bytes that a rank hands to collectives per optimizer step, counted on 1, 2 and 4 processes.

Counted at the calls of `torch.distributed` (and, for DDP, at its buckets): the size of what a rank
puts in. So plain fine-tuning of the same student stands beside distillation.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_ranks.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests import tiny
from tests.ranks import run
from tests.test_ranks import FORTY_ROWS, SHARDED, config

STEPS = 4


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench-ranks-"))
    tiny.save_pair(folder)
    tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(40))
    table = Table(title="KB per rank and optimizer step")
    for column in ("ranks", "student", "fine-tuning", "distilling", "projectors", "rest", "calls"):
        table.add_column(column, justify="right")
    for sharding, extra in (("DDP", {}), ("FSDP2", SHARDED)):
        for world_size in (1, 2, 4):
            if world_size == 1 and extra:
                continue
            common: dict[str, Any] = {
                "max_steps": STEPS,
                "micro_batch_size": 4 // world_size,
                "datasets": FORTY_ROWS,
                "save_strategy": "no",
                "logging_steps": 100,
                **extra,
            }
            name = f"{sharding}-{world_size}"
            distilled, plain = (
                run(world_size, {"do": "count_bytes", "config": made})[0]
                for made in (
                    config(folder, name, **common),
                    config(folder, f"{name}-plain", dskd=None, plugins=None, **common),
                )
            )
            projectors = 0 if world_size == 1 else distilled["projectors"]
            rest = distilled["bytes"] - plain["bytes"] - projectors
            numbers = plain["bytes"], distilled["bytes"], projectors, rest
            table.add_row(
                str(world_size),
                sharding,
                *(f"{number / 1e3:.2f}" for number in numbers),
                f"{plain['calls']:.0f} → {distilled['calls']:.0f}",
            )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
