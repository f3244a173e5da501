"""Rows with two sides: Axolotl's own data pipeline, run for the student and for the teacher.

Knows tokenizers, rows and batches; nothing of models, heads or losses.
"""

from axolotl_dskd.data.collator import DualCollator, needed_columns
from axolotl_dskd.data.hooks import install_hooks
from axolotl_dskd.data.token_bytes import shared_tokens, translation
from axolotl_dskd.data.tokenizers import (
    exact_share,
    load_teacher_tokenizer,
    resolve_alignment,
    teacher_position_limit,
    vocabulary_size,
)

__all__ = [
    "DualCollator",
    "exact_share",
    "install_hooks",
    "load_teacher_tokenizer",
    "needed_columns",
    "resolve_alignment",
    "shared_tokens",
    "teacher_position_limit",
    "translation",
    "vocabulary_size",
]
