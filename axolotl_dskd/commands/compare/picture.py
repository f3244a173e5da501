"""Held-out bits per byte over epochs as a PNG: thin lines for seeds, a thick one for their mean."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from axolotl_dskd.commands.compare.outcome import Outcome
from axolotl_dskd.commands.pages import figure, png


def curves(outcomes: Sequence[Outcome]) -> bytes:
    """The picture; seeds that were evaluated at other steps have no mean."""
    from matplotlib.ticker import MaxNLocator

    drawn = figure(7.5, 4.5)
    axes = drawn.add_subplot()
    for number, method in enumerate(dict.fromkeys(o.method for o in outcomes)):
        color = "#7f7f7f" if method == "sft" else f"C{number}"
        lines = [
            [(point.epoch, point.bits_per_byte) for point in o.led_to]
            for o in outcomes
            if o.method == method
        ]
        epochs = [epoch for epoch, _ in lines[0]]
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, alpha=0.35, linewidth=1)
            if [epoch for epoch, _ in line] != epochs:
                epochs = []
        columns = zip(*([bits for _, bits in line] for line in lines), strict=False)
        mean = [fmean(bits) for bits in columns][: len(epochs)]
        axes.plot(epochs, mean, color=color, marker="o", linewidth=2, label=method)
    seeds = sorted({o.seed for o in outcomes})
    plural = "s" if len(seeds) > 1 else ""
    axes.set_title(f"Held-out bits per byte (seed{plural} {', '.join(map(str, seeds))})")
    axes.set_xlabel("epoch")
    axes.set_ylabel("bits per byte, lower is better")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return png(drawn)
