"""The report as one HTML page."""

from __future__ import annotations

from markupsafe import Markup

from axolotl_dskd.commands.inspect.document import sections
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.words import signs
from axolotl_dskd.commands.pages import environment


def marked(text: str) -> Markup:
    """Text in which what has no ink is seen, by signs that look like signs."""
    sign = Markup('<i class="sign">{}</i>')
    return Markup("").join(
        sign.format(shown) if is_sign else shown for shown, is_sign in signs(text)
    )


_ENVIRONMENT = environment(marked=marked)


def html_page(report: Report) -> str:
    """The whole page."""
    template = _ENVIRONMENT.get_template("inspect/page.html.jinja")
    return template.render(report=report, sections=sections(report))
