"""From the configuration to a source of samples."""

from __future__ import annotations

from axolotl_dskd.config import SamplesConfig
from axolotl_dskd.samples.base import Samples
from axolotl_dskd.samples.dataset import DatasetSamples


def open_samples(config: SamplesConfig) -> Samples:
    """The configured source."""
    assert config.source == "dataset", config.source
    return DatasetSamples()
