"""What held-out rows say of a student, in numbers that need no common tokenizer.

Knows views of a batch and byte spans; nothing of objectives, trainers or files of a run.
"""

from axolotl_dskd.evaluation.measure import Measured, TextBytes, measure
from axolotl_dskd.evaluation.record import RECORD, append_line, read_record, rows_digest
from axolotl_dskd.evaluation.rows import Row, RowScores, bits_per_byte, means, totals

__all__ = [
    "RECORD",
    "Measured",
    "Row",
    "RowScores",
    "TextBytes",
    "append_line",
    "bits_per_byte",
    "means",
    "measure",
    "read_record",
    "rows_digest",
    "totals",
]
