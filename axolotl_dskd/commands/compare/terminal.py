"""The table of a comparison on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from axolotl_dskd.commands.compare.summary import MOMENTS, Method, verdict
from axolotl_dskd.progress import quantity


def print_methods(methods: Sequence[Method], rows: int, console: Console) -> None:
    """Bits per byte at the best and last evaluation, against the first method, and the costs.

    Args:
        rows: held-out rows.
    """
    table = Table(
        title=f"Held-out bits per byte ({rows} rows), lower is better",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("run", no_wrap=True)
    for moment in MOMENTS:
        for head in (moment, "first\nright", f"against\n{methods[0].name}"):
            table.add_column(head, justify="right", no_wrap=True)
    answers = any(method.rouge_l is not None for method in methods)
    if answers:
        table.add_column("Rouge-L", justify="right")
    distances = any(method.teacher_kl is not None for method in methods)
    if distances:
        table.add_column("KL from\nteacher", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    for method in methods:
        cells = []
        for moment in MOMENTS:
            difference = method.against.get(moment)
            against = "" if difference is None else f"{difference.relative:+.1%}"
            if difference is not None and difference.verdict == "no difference":
                against += " ≈"
            cells += [f"{method.bits[moment]:.4f}", f"{method.accuracy[moment]:.1%}", against]
        if answers:
            cells.append("" if method.rouge_l is None else f"{method.rouge_l:.3f}")
        if distances:
            cells.append("" if method.teacher_kl is None else f"{method.teacher_kl:.3f}")
        memory = method.gpu_bytes or method.host_bytes
        table.add_row(
            method.name, *cells, f"{method.seconds / 60:.1f} min", quantity(memory, "bytes")
        )
    console.print(table)
    seeds = len(methods[0].seeds)
    console.print(
        f"Means of {seeds} seeds. "
        * (seeds > 1)
        + "≈: no difference (95% bootstrap interval over rows holds 0, or less than 0.1%). The "
        "best evaluation is picked on the same rows.",
        highlight=False,
    )
    for method in methods[1:]:
        console.print(verdict(method, methods[0]), markup=False, highlight=False, soft_wrap=True)
