"""The command itself: from one or two records to a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from axolotl_dskd.commands.explain.pictures import attention_maps, margin_maps, over_time
from axolotl_dskd.commands.explain.shown import (
    Shown,
    check_alike,
    read,
    specialisation,
    told_apart,
)
from axolotl_dskd.commands.pages import environment, in_page

PAGE = "dskd-explain.html"
#: Differences of mean entropies below this are called none.
SAME = 0.005

_ENVIRONMENT = environment(decimals="{:.3f}".format)


@dataclass(frozen=True)
class Row:
    """A group of tokens: its name, how many tokens of the vocabulary and of the held-out rows are
    in it, the block it attends to most with its attention, the block that most of its margin comes
    from (counted from 1, None without evaluation), its specialisation, and some of its tokens."""

    name: str
    size: int
    tokens: int
    block: int
    attention: float
    margin_block: int | None
    specialisation: float
    examples: list[str]


def run_explain(run: Path, *, against: Path | None = None, html: Path | None = None) -> list[str]:
    """Write the page of a run; see `axolotl-dskd explain --help`.

    Returns:
        What it says in words, and where the page is.

    Raises:
        click.ClickException: a run has no record of attention, or the two cannot be compared.
    """
    try:
        runs = [read(run)]
        if against is not None:
            runs.append(read(against))
            check_alike(*runs)
            runs = told_apart(runs, [run, against])
        path = html or run / PAGE
        path.write_text(html_page(runs), encoding="utf-8", errors="replace")
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    return [*findings(runs), f"Written: {path}"]


def html_page(runs: Sequence[Shown]) -> str:
    """The whole page."""
    margins = margin_maps(runs)
    return _ENVIRONMENT.get_template("explain/page.html.jinja").render(
        runs=runs,
        findings=findings(runs),
        attention=in_page(attention_maps(runs)),
        margins=None if margins is None else in_page(margins),
        over_time=in_page(over_time(runs)),
        tables=[(run, rows(run)) for run in runs],
    )


def rows(run: Shown) -> list[Row]:
    """Every group of a run, at its last step of full strength."""
    alpha, margins = run.whole.alpha, run.whole_margins
    special = specialisation(alpha)
    return [
        Row(
            name=name,
            size=run.settings["sizes"][k],
            tokens=0 if margins is None else int(margins.tokens[k]),
            block=int(alpha[k].argmax()) + 1,
            attention=float(alpha[k].max()),
            margin_block=_largest(run, k),
            specialisation=float(special[k]),
            examples=run.settings["examples"][k],
        )
        for k, name in enumerate(run.groups)
    ]


def _largest(run: Shown, group: int) -> int | None:
    margins = run.whole_margins
    if margins is None or not margins.tokens[group]:
        return None
    return int(margins.shares[group].argmax()) + 1


def findings(runs: Sequence[Shown]) -> list[str]:
    """What the numbers say, in words computed from them alone."""
    said = []
    for run in runs:
        moment, found = run.whole, [row for row in rows(run) if row.margin_block is not None]
        text = (
            f"{run.label}: after step {moment.step} of {run.steps}, at strength "
            f"{moment.strength:g}, the attention's entropy is {moment.entropy:.3f} "
            f"(1: all blocks alike, 0: one block for each group)"
        )
        if found:
            same = sum(row.block == row.margin_block for row in found)
            text += (
                f"; in {same} of {len(found)} groups of the held-out rows the block that is "
                "attended to most is the one that most of the margin comes from"
            )
        said.append(f"{text}.")
    if len(runs) == 2:
        one, other = runs
        difference = one.whole.entropy - other.whole.entropy
        verdict = "lower than" if difference < 0 else "higher than"
        if abs(difference) < SAME:
            verdict = f"no different (less than {SAME:g}) from"
        said.append(
            f"The entropy with {one.label} is {verdict} that with {other.label}: "
            f"{one.whole.entropy:.4f} and {other.whole.entropy:.4f}. The paper says of images that "
            "distillation lowers it. One pair of runs is no evidence: repeat it over seeds."
        )
    return said
