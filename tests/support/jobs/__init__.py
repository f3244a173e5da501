"""What the ranks of `tests.support.ranks` run. Importing this is what takes half a minute.

The fork server imports it once, and every rank is forked from there. A job is a function with
`@job`, found by its name; what it patches it puts back when it ends. What holds for the whole
process instead is in `tests.support.process`.
"""

from __future__ import annotations

import os

import tests.support.on_cpu  # noqa: F401

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from tests.support import process
from tests.support.jobs import (  # noqa: F401
    cache,
    memory,
    precision,
    resume,
    sharding,
    statistics,
    tasks,
    training,
    writing,
)

process.prepare_ranks()
