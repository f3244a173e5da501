"""Heat maps of attention and margins, and specialisation over time, as PNGs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from axolotl_dskd.commands.explain.shown import Shown
from axolotl_dskd.commands.pages import figure, png


def attention_maps(runs: Sequence[Shown]) -> bytes:
    """[K, n] attention of each run at its last step of full strength, on one scale."""
    top = max(float(run.whole.alpha.max()) for run in runs)
    return _maps(runs, [run.whole.alpha for run in runs], "viridis", (0.0, top), "attention α")


def margin_maps(runs: Sequence[Shown]) -> bytes | None:
    """[K, n] parts of the margin of each run, in logits; None where a run evaluated nothing."""
    found = [run.whole_margins for run in runs]
    shares = [margins.shares for margins in found if margins is not None]
    if len(shares) < len(runs):
        return None
    top = max(float(np.abs(share).max()) for share in shares) or 1.0
    return _maps(runs, shares, "RdBu", (-top, top), "part of the margin, in logits")


def over_time(runs: Sequence[Shown]) -> bytes:
    """Specialisation over steps; dashed where attention has begun to fade out."""
    drawn = figure(7.5, 3.6)
    axes = drawn.add_subplot()
    for number, run in enumerate(runs):
        steps = [m.step for m in run.moments]
        values = [1 - m.entropy for m in run.moments]
        full = sum(m.step <= run.whole.step for m in run.moments)
        axes.plot(steps[:full], values[:full], color=f"C{number}", label=run.label)
        axes.plot(steps[full - 1 :], values[full - 1 :], color=f"C{number}", linestyle="--")
    axes.set_title("Specialisation over training (dashed: the attention fades out)")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("1 − entropy")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return png(drawn)


def _maps(
    runs: Sequence[Shown],
    values: Sequence[np.ndarray],
    colours: str,
    scale: tuple[float, float],
    what: str,
) -> bytes:
    K, n = values[0].shape
    width = 3.2 + (0.45 * n + 0.6) * len(runs)
    drawn = figure(width, 1.2 + 0.34 * K)
    axes = drawn.subplots(1, len(runs), squeeze=False)[0]
    for number, (run, value) in enumerate(zip(runs, values, strict=True)):
        one = axes[number]
        image = one.imshow(value, cmap=colours, vmin=scale[0], vmax=scale[1], aspect="auto")
        one.set_title(run.label, fontsize=10)
        one.set_xlabel("virtual block")
        one.set_xticks(range(n), [str(j + 1) for j in range(n)])
        one.set_yticks(range(K), run.groups if not number else [""] * K)
    drawn.colorbar(image, ax=list(axes), label=what)
    return png(drawn)
