"""The teacher: opened apart from the student, and asked about each batch.

Knows models, batches and the cache; nothing of alignment, losses or training.
"""

from axolotl_dskd.teacher.load import load_teacher
from axolotl_dskd.teacher.open import open_teacher
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun

__all__ = ["Teacher", "TeacherSpec", "TrainingRun", "load_teacher", "open_teacher"]
