"""The report as one HTML page."""

from __future__ import annotations

from markupsafe import Markup

from axolotl_dskd.commands.inspect.document import sections
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.words import signs
from axolotl_dskd.commands.pages import environment

_SIGN = Markup('<i class="sign">{}</i>')


def marked(text: str) -> Markup:
    """Text in which what has no ink is seen, by signs that look like signs."""
    shown = (_SIGN.format(char) if is_sign else char for char, is_sign in signs(text))
    return Markup("").join(shown)


def html_page(report: Report) -> str:
    """The whole page."""
    template = environment(marked=marked).get_template("inspect/page.html.jinja")
    return template.render(report=report, sections=sections(report))
