"""HTML pages of commands: one file each, no script, nothing loaded from elsewhere, light and dark.

Texts come from configurations, models, data and paths; templates escape all of them by themselves.
`page.html.jinja` is what all pages share.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from axolotl_dskd import __version__
from axolotl_dskd.commands.words import signs

_SIGN = Markup('<i class="sign">{}</i>')


def marked(text: str) -> Markup:
    """Text in which what has no ink is seen, by signs that look like signs."""
    shown = (_SIGN.format(char) if is_sign else char for char, is_sign in signs(text))
    return Markup("").join(shown)


def environment(**filters: Callable[..., Any]) -> Environment:
    """That of a command's templates, which are named from this folder on.

    Args:
        filters: by name, beside `marked`, `number` and `percent`.
    """
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": "{:,}".format, "percent": "{:.1%}".format, "marked": marked}
    made.filters |= filters
    made.globals["version"] = __version__
    return made


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure that needs no display, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def png(drawn: Any) -> bytes:
    """A figure as a PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def in_page(picture: bytes) -> str:
    """A PNG as the page holds it, for `src="data:image/png;base64,…"`."""
    return base64.b64encode(picture).decode()
