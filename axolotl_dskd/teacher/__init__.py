"""The teacher: loading it apart from the student, and reading its signal from a batch.

Knows models, batches and the cache; nothing of alignment, losses or training.
"""

from axolotl_dskd.teacher.cached.fill import CacheableRows, describe, fill, missing_rows
from axolotl_dskd.teacher.cached.open import CacheRun, open_cached_teacher
from axolotl_dskd.teacher.cached.teacher import CachedTeacher
from axolotl_dskd.teacher.live import LiveTeacher
from axolotl_dskd.teacher.load import load_teacher
from axolotl_dskd.teacher.shard import is_to_be_sharded, load_sharded_teacher

__all__ = [
    "CacheRun",
    "CacheableRows",
    "CachedTeacher",
    "LiveTeacher",
    "describe",
    "fill",
    "is_to_be_sharded",
    "load_sharded_teacher",
    "load_teacher",
    "missing_rows",
    "open_cached_teacher",
]
