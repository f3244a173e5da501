"""The report as it is shown: in a terminal by rich (without one, as plain text), and as a page."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from axolotl_dskd.commands.inspect.examples import Example
from axolotl_dskd.commands.inspect.report import Line, Report, Table, sections
from axolotl_dskd.commands.pages import environment
from axolotl_dskd.commands.words import visible

_STYLES = {"": "", "soft": "dim", "good": "bold green", "bad": "bold red"}


def html_page(report: Report) -> str:
    """All of it as one HTML page."""
    template = environment().get_template("inspect/page.html.jinja")
    return template.render(report=report, sections=sections(report))


def print_report(report: Report, console: Console) -> None:
    """All of it but for the examples after the first, which the page shows."""
    for title, blocks in sections(report).items():
        console.print(title, style="bold")
        for block in blocks[:1] if isinstance(blocks[0], Example) else blocks:
            # Texts come from models and data: what looks like markup is none.
            if isinstance(block, Line):
                console.print(block.words, style=_STYLES[block.tone], markup=False, highlight=False)
            elif isinstance(block, Table):
                console.print(_table(block), markup=False, highlight=False)
            else:
                console.print(_example(block, console.width))
        console.print()


def _table(block: Table) -> RichTable:
    table = RichTable()
    for place, name in enumerate(block.columns):
        numeric = block.numeric and place > 0
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in block.rows:
        table.add_row(*map(Text, row))
    return table


def _example(example: Example, width: int) -> Text:
    """The groups that fit one line: an exact pair on one ground, others on another."""
    title = f"A row of {example.dataset}, · a space, | between tokens of one text:\n"
    upper, lower = Text(), Text()
    for group in example.groups:
        ours, theirs = (visible("|".join(side)) for side in group)
        size = max(len(ours), len(theirs))
        if len(upper) + size + 1 > width:
            break
        style = "green" if list(map(len, group)) == [1, 1] else "yellow"
        upper.append(ours.ljust(size), style=style).append(" ")
        lower.append(theirs.ljust(size), style=style).append(" ")
    return Text(title).append(upper).append("\n").append(lower)
