"""`dskd.objective`: the keys of each objective, by its name.

A key of another objective is an unknown key. An objective of one's own brings a subclass of
`ObjectiveConfig` in its module, and is named by that module's dotted path.
"""

from axolotl_dskd.config.objectives.base import (
    ObjectiveConfig,
    objective_config,
)
from axolotl_dskd.config.objectives.chunks import (
    ChunkLikelihoodConfig,
    GOLDConfig,
    SpanSupportConfig,
)
from axolotl_dskd.config.objectives.tokens import (
    DivergenceKeys,
    DivergenceName,
    DualSpaceConfig,
    MinEditConfig,
    ProjectorConfig,
    SinkhornConfig,
    TokenKDConfig,
    ULDConfig,
    WrittenDivergenceKeys,
)
from axolotl_dskd.config.objectives.written import PolicyConfig, PreferenceConfig

__all__ = [
    "ChunkLikelihoodConfig",
    "DivergenceKeys",
    "DivergenceName",
    "DualSpaceConfig",
    "GOLDConfig",
    "MinEditConfig",
    "ObjectiveConfig",
    "PolicyConfig",
    "PreferenceConfig",
    "ProjectorConfig",
    "SinkhornConfig",
    "SpanSupportConfig",
    "TokenKDConfig",
    "ULDConfig",
    "WrittenDivergenceKeys",
    "objective_config",
]
