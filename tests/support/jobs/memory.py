"""A training whose memory is planned and measured."""

from __future__ import annotations

from typing import Any

from tests.support import measured_memory
from tests.support.jobs.registry import job


@job
def plan_and_memory(path: str) -> dict[str, Any]:
    """See `measured_memory`."""
    return measured_memory.plan_and_memory(path)
