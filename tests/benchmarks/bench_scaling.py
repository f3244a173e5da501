"""Bytes that a training step sends between ranks, with and without distillation.

Run as root: `python -m tests.benchmarks.bench_scaling [--ranks 1 2 4]`; some minutes. The ranks
are processes over gloo in a network namespace of their own, whose loopback device counts what they
send. Two run lengths are compared, so what starting and ending a run takes drops out. Says nothing
of speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support import tiny
from tests.support.ranks import launch

SHORT, LONG = 4, 24
ROWS = 160
HIDDEN_SIZES = (128, 192)
GLOBAL_BATCH = 4
_INSIDE = "DSKD_BENCH_NAMESPACE"


def config(folder: Path, name: str, ranks: int, steps: int, distil: bool) -> dict[str, Any]:
    """A full fine-tuning on padded rows; the same YAML without the plugin's two blocks."""
    block = {"teacher": {"base_model": str(folder / "teacher")}, "objective": {"alignment": "cma"}}
    ours = {"dskd": block} if distil else {"dskd": None, "plugins": None}
    return tiny.base_config(
        folder,
        micro_batch_size=GLOBAL_BATCH // ranks,
        max_steps=steps,
        num_epochs=100,
        dataloader_num_workers=0,
        logging_steps=1000,  # gathering logged values is no part of a step
        output_dir=str(folder / name),
        **ours,
    )


def per_step(folder: Path, ranks: int) -> dict[str, dict[str, float]]:
    """Of plain fine-tuning and of distillation: what `traffic` counts, bytes per step."""
    plan = [(distil, steps) for distil in (False, True) for steps in (SHORT, LONG)]
    jobs = [
        {"do": "traffic", "config": config(folder, f"{ranks}-{n}", ranks, steps, distil)}
        for n, (distil, steps) in enumerate([plan[0], *plan])  # the first connects the ranks
    ]
    found = [each[0] for each in launch(ranks, jobs, timeout=500)][1:]
    for each in found:
        if "bytes" not in each:
            raise SystemExit(f"a run on {ranks} ranks failed: {each}")
    return {
        name: long | {"bytes": (long["bytes"] - short["bytes"]) / (LONG - SHORT)}
        for name, short, long in (("plain", *found[:2]), ("dskd", *found[2:]))
    }


def main() -> None:
    """Count and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    ranks = parser.parse_args().ranks
    if os.environ.get(_INSIDE) is None:
        inside = f"ip link set lo up && exec {sys.executable} -m tests.benchmarks.bench_scaling"
        inside += "".join([" --ranks", *(f" {n}" for n in ranks)])
        command = ["unshare", "--net", "sh", "-c", inside]
        raise SystemExit(subprocess.run(command, env=os.environ | {_INSIDE: "1"}).returncode)
    table = Table(
        "ranks", "plain, bytes/step", "dskd", "added", "added, computed", "plain, computed"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_pair(folder, hidden_sizes=HIDDEN_SIZES)
        tiny.write_rows(folder / "rows.jsonl", tiny.chat_rows(ROWS))
        for n in ranks:
            found = per_step(folder, n)
            plain, dskd = found["plain"], found["dskd"]
            # A ring all-reduce sends 2(n-1)/n of its bytes from each of n ranks: float32 gradients,
            # and with dskd an 8-byte count and a 4-byte flag.
            ring = 2 * (n - 1)
            cells = (
                plain["bytes"],
                dskd["bytes"],
                dskd["bytes"] - plain["bytes"],
                ring * (4 * dskd["projectors"] + 12),
                ring * 4 * plain["student"],
            )
            table.add_row(str(n), *(f"{cell:,.0f}" for cell in cells))
            Console().print(
                f"{n} ranks: student {plain['student']:,} parameters, projectors "
                f"{dskd['projectors']:,}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
