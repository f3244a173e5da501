"""What all parts of the `dskd:` block have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Block(BaseModel):
    """Unknown keys are refused, so a misspelt one cannot be silently ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
