"""Answers that a model writes to prompts, many at a time.

Knows prompts and answers as token ids; nothing of rows, batches, teachers or what is learned.
"""

from axolotl_dskd.generation.mixture import MixedWriter, Partner
from axolotl_dskd.generation.transformers_writer import TransformersWriter
from axolotl_dskd.generation.vllm_launch import WritingServer
from axolotl_dskd.generation.vllm_models import FixedModel, Served, StudentAdapter, StudentWeights
from axolotl_dskd.generation.vllm_writer import VLLMWriter
from axolotl_dskd.generation.writer import Answer, Sampling, Writer, prompt_seed

__all__ = [
    "Answer",
    "FixedModel",
    "MixedWriter",
    "Partner",
    "Sampling",
    "Served",
    "StudentAdapter",
    "StudentWeights",
    "TransformersWriter",
    "VLLMWriter",
    "Writer",
    "WritingServer",
    "prompt_seed",
]
