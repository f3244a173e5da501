"""The `dskd:` block of an Axolotl YAML: fields, bounds, defaults, and what it refuses.

The only place where defaults are stated. Imports nothing else of the package.
"""

from axolotl_dskd.config.block import (
    PLUGIN_NAME,
    DivergenceName,
    DSKDArgs,
    DSKDConfig,
    ProjectorConfig,
    TeacherConfig,
)
from axolotl_dskd.config.cache import CacheConfig

__all__ = [
    "PLUGIN_NAME",
    "CacheConfig",
    "DSKDArgs",
    "DSKDConfig",
    "DivergenceName",
    "ProjectorConfig",
    "TeacherConfig",
]
