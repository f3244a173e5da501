"""The one door to any teacher: the only place that chooses between its kinds."""

from __future__ import annotations

from axolotl_dskd.teacher.cached.open import open_cache
from axolotl_dskd.teacher.cached.teacher import CachedTeacher
from axolotl_dskd.teacher.live import LiveTeacher, load_live
from axolotl_dskd.teacher.protocol import Teacher
from axolotl_dskd.teacher.served.logprob_teacher import open_logprobs
from axolotl_dskd.teacher.served.teacher import open_served
from axolotl_dskd.teacher.shard import is_to_be_sharded, load_sharded_teacher
from axolotl_dskd.teacher.spec import TeacherSpec, TrainingRun


def open_teacher(spec: TeacherSpec, run: TrainingRun) -> Teacher:
    """The teacher of a run: live, cut over the ranks, served, or behind its cache.

    Raises:
        ValueError: there is no such teacher, or it cannot be used as one.
    """
    if spec.config.cache is not None:
        with run.local_main_first():  # the others find the weights hashed
            cache = open_cache(spec, run)
        return CachedTeacher(cache, run)
    if spec.config.gives == "logprobs":
        return run.together(lambda: open_logprobs(spec, run))
    if spec.config.server is not None:
        return run.together(lambda: open_served(spec, run))
    if is_to_be_sharded(spec.config, student_is_sharded=run.student_is_sharded):
        model = load_sharded_teacher(spec.config, spec.device)
        return LiveTeacher(model, spec.vocab_size, spec.device)
    return load_live(spec)
