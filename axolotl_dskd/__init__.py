"""Dual-space knowledge distillation (arXiv 2406.17328, 2504.11426) as an Axolotl plugin.

Name `axolotl_dskd.DSKDPlugin` under `plugins:` of an Axolotl YAML and add a `dskd:` block.
Importing this package loads nothing heavy: the plugin class resolves on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_dskd.plugin import DSKDPlugin

__all__ = ["DSKDPlugin"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "DSKDPlugin":
        from axolotl_dskd.plugin import DSKDPlugin

        return DSKDPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
