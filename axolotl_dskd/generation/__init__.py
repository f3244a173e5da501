"""Answers that a model writes to prompts, many at a time.

Knows prompts and answers as token ids; nothing of rows, batches, teachers or what is learned.
"""

from axolotl_dskd.generation.transformers_writer import TransformersWriter
from axolotl_dskd.generation.writer import Answer, Sampling, Writer, prompt_seed

__all__ = ["Answer", "Sampling", "TransformersWriter", "Writer", "prompt_seed"]
