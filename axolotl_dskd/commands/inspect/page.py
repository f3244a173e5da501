"""The report as one HTML page."""

from __future__ import annotations

from axolotl_dskd.commands.inspect.document import sections
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.pages import environment


def html_page(report: Report) -> str:
    """The whole page."""
    template = environment().get_template("inspect/page.html.jinja")
    return template.render(report=report, sections=sections(report))
