"""The memory plan of `axolotl-dskd inspect` over what trainings held, as ratios.

Run: `python -m tests.benchmarks.bench_memory_plan [--gpu]`; about a minute a case on a CPU. The
trainings are those of tests/commands/test_memory_plan.py: random models, rows of one length.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.support.measured_memory import CASES, SIZES, large_run, measure


def main() -> None:
    """Measure every case and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="on CUDA in bfloat16, not on the CPU")
    gpu = parser.parse_args().gpu
    table = Table("training", "plan (MB)", "held (MB)", "plan / held", "fullest in")
    for name, overrides in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            extra = {"bf16": True} if gpu else {}
            path = large_run(Path(folder), **SIZES, **overrides, **extra)
            found = measure(path, gpu=gpu)
        plan = found["plan"]
        if gpu:  # PyTorch counts neither the context nor what its allocator keeps in pieces
            plan -= sum(found["at_peak"].get(k, 0) for k in ("CUDA context", "fragmentation"))
        table.add_row(
            name,
            f"{plan / 1e6:.0f}",
            f"{found['measured'] / 1e6:.0f}",
            f"{plan / found['measured']:.3f}",
            found["phase"],
        )
    Console().print(table)


if __name__ == "__main__":
    main()
