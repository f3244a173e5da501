"""What `inspect` found, as plain data: `document` puts it into words, and `--json` is this.

Knows nothing of how it is found or shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from axolotl_dskd.commands.inspect.rows import Coverage, Example
from axolotl_dskd.commands.inspect.sides import SideFacts
from axolotl_dskd.planning.plan import Plan


@dataclass(frozen=True)
class Report:
    """Everything that `inspect` found."""

    config: str
    student: SideFacts
    teacher: SideFacts
    shared_tokens: int
    objective: str
    advice: str | None
    coverage: Coverage
    datasets: Sequence[Coverage]
    examples: Sequence[Example]
    memory: Plan
    remarks: Sequence[str]
    probe: str | None

    def as_json(self) -> str:
        """For `--json`, with the derived numbers."""
        return json.dumps(self, default=_with_derived, ensure_ascii=False, indent=1) + "\n"


def _with_derived(found: Any) -> dict[str, Any]:
    derived = (name for name, kind in vars(type(found)).items() if isinstance(kind, property))
    return {name: getattr(found, name) for name in (*vars(found), *derived)}
