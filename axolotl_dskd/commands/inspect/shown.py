"""The report as it is shown: in a terminal by rich (without one, as plain text), and as a page."""

from __future__ import annotations

from rich.columns import Columns
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from axolotl_dskd.commands.inspect.examples import Example, is_exact
from axolotl_dskd.commands.inspect.report import Line, Report, Table, sections
from axolotl_dskd.commands.pages import environment
from axolotl_dskd.commands.words import visible

#: Of an example, in a terminal.
_GROUPS = 24
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
                title = f"A row of {block.dataset}, · a space, | between tokens of one text:"
                console.print(title, markup=False, highlight=False)
                console.print(_example(block))
        console.print()


def _table(block: Table) -> RichTable:
    table = RichTable()
    for place, name in enumerate(block.columns):
        numeric = block.numeric and place > 0
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in block.rows:
        table.add_row(*map(Text, row))
    return table


def _example(example: Example) -> Columns:
    """Its first groups: an exact pair on one ground, others on another."""
    cells = (
        Text(
            "\n".join(visible("|".join(side)) for side in group),
            style="green" if is_exact(group) else "yellow",
        )
        for group in example.groups[:_GROUPS]
    )
    return Columns(cells, padding=(0, 1))
