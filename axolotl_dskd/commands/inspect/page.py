"""The report as one HTML page: no script, nothing loaded from elsewhere, light and dark.

Every text in it comes from models, data or paths; the template escapes all of it by itself.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from axolotl_dskd import __version__
from axolotl_dskd.commands.inspect import words
from axolotl_dskd.commands.inspect.report import Report
from axolotl_dskd.commands.inspect.sample import OUTCOMES


def marked(text: str) -> Markup:
    """Text in which what has no ink is seen, by signs that look like signs."""
    sign = Markup('<i class="sign">{}</i>')
    return Markup("").join(
        sign.format(shown) if is_sign else shown for shown, is_sign in words.signs(text)
    )


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "marked": marked,
    "gib": words.gib,
    "number": "{:,}".format,
    "percent": "{:.1%}".format,
}


def html_page(report: Report) -> str:
    """The whole page."""
    template = _ENVIRONMENT.get_template("page.html.jinja")
    return template.render(report=report, outcomes=OUTCOMES, version=__version__)
