"""Where the rows of a step come from.

A source is asked for the batches of each optimizer step, behind the Trainer's own data loader: it
may pass them on, or put others in their place. It does not know what is learned from them.
"""

from axolotl_dskd.samples.base import Samples, SamplesRun
from axolotl_dskd.samples.dataset import DatasetSamples
from axolotl_dskd.samples.open import open_samples
from axolotl_dskd.samples.server import writing_server

__all__ = ["DatasetSamples", "Samples", "SamplesRun", "open_samples", "writing_server"]
