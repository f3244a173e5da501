"""From the configuration to a source of samples."""

from __future__ import annotations

from axolotl_dskd.config import SamplesConfig, StudentSamplesConfig, TeacherSamplesConfig
from axolotl_dskd.samples.base import Samples, SamplesRun
from axolotl_dskd.samples.dataset import DatasetSamples
from axolotl_dskd.samples.pairs import CountedPairs
from axolotl_dskd.samples.student import StudentSamples
from axolotl_dskd.samples.teacher import TeacherSamples


def open_samples(config: SamplesConfig, run: SamplesRun) -> Samples:
    """The configured source.

    Raises:
        ValueError: the run's rows give it nothing to do.
    """
    if isinstance(config, StudentSamplesConfig):
        written = StudentSamples(config, run)
        if not run.contrast:
            return written
        return CountedPairs(written, config.per_prompt + 1, run.device)
    if isinstance(config, TeacherSamplesConfig):
        return TeacherSamples(config, run)
    return DatasetSamples()
