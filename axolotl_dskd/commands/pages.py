"""HTML pages of commands: no script, nothing loaded from elsewhere, light and dark.

Texts come from configurations, models, data and paths; templates escape all of them by themselves.
`page.html.jinja` is what all pages share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from axolotl_dskd import __version__


def environment(**filters: Callable[..., Any]) -> Environment:
    """That of a command's templates, which are named from this folder on.

    Args:
        filters: by name, beside `number` and `percent`.
    """
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": "{:,}".format, "percent": "{:.1%}".format, **filters}
    made.globals["version"] = __version__
    return made
