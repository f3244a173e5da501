"""What pages of commands have in common: one file each, no script, nothing loaded from elsewhere.

Every text in them is escaped by the template.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from axolotl_dskd import __version__


def environment(folder: Path, **filters: Any) -> Environment:
    """For the templates of a command.

    Args:
        folder: where they are; `style.css.jinja` of all commands is found, too.
        filters: beside `number`, `percent` and `version`.
    """
    made = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent / "shared"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": "{:,}".format, "percent": "{:.1%}".format, **filters}
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
