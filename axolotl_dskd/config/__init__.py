"""The `dskd:` block of an Axolotl YAML: fields, bounds, defaults, and what it refuses.

The only place where defaults are stated. Imports nothing else of the package.
"""

from axolotl_dskd.config.block import PLUGIN_NAME, DSKDArgs, DSKDConfig
from axolotl_dskd.config.cache import CacheConfig
from axolotl_dskd.config.compare import CompareConfig
from axolotl_dskd.config.evaluation import EvaluationConfig
from axolotl_dskd.config.loading import loading
from axolotl_dskd.config.objectives import (
    ChunkLikelihoodConfig,
    DivergenceKeys,
    DivergenceName,
    DualSpaceConfig,
    GOLDConfig,
    MinEditConfig,
    ObjectiveConfig,
    PolicyConfig,
    PreferenceConfig,
    ProjectorConfig,
    SinkhornConfig,
    SpanSupportConfig,
    TokenKDConfig,
    ULDConfig,
    WrittenDivergenceKeys,
)
from axolotl_dskd.config.route import RouteConfig, about_teacher
from axolotl_dskd.config.samples import (
    DatasetSamplesConfig,
    SamplesConfig,
    StudentSamplesConfig,
    TeacherSamplesConfig,
    WritingConfig,
)
from axolotl_dskd.config.server import (
    Endpoint,
    Gives,
    ServerConfig,
    StudentWriterConfig,
    WriterConfig,
)
from axolotl_dskd.config.teacher import TeacherConfig
from axolotl_dskd.config.virtual_attention import VirtualAttentionConfig

__all__ = [
    "PLUGIN_NAME",
    "CacheConfig",
    "ChunkLikelihoodConfig",
    "CompareConfig",
    "DSKDArgs",
    "DSKDConfig",
    "DatasetSamplesConfig",
    "DivergenceKeys",
    "DivergenceName",
    "DualSpaceConfig",
    "Endpoint",
    "EvaluationConfig",
    "GOLDConfig",
    "Gives",
    "MinEditConfig",
    "ObjectiveConfig",
    "PolicyConfig",
    "PreferenceConfig",
    "ProjectorConfig",
    "RouteConfig",
    "SamplesConfig",
    "ServerConfig",
    "SinkhornConfig",
    "SpanSupportConfig",
    "StudentSamplesConfig",
    "StudentWriterConfig",
    "TeacherConfig",
    "TeacherSamplesConfig",
    "TokenKDConfig",
    "ULDConfig",
    "VirtualAttentionConfig",
    "WriterConfig",
    "WritingConfig",
    "WrittenDivergenceKeys",
    "about_teacher",
    "loading",
]
