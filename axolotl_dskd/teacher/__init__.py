"""The teacher: loading it apart from the student, and reading its signal from a batch.

Knows models and batches; nothing of alignment, losses or training.
"""

from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.teacher.load import load_teacher

__all__ = ["LiveTeacher", "load_teacher"]
