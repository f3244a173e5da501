"""The `dskd.teacher.cache:` block: its fields, defaults, and how a size is written.

Imports nothing of this package.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

_SIZE_UNITS = {
    "": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(["", "k", "M", "G", "T"])},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(["", "K", "M", "G", "T"])},
}


def _bytes(size: Any) -> int:
    """The number of bytes that `200GB` or `150GiB` stands for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", str(size).strip())
    factors = {name.lower(): factor for name, factor in _SIZE_UNITS.items()}
    if match is None or match[2].lower() not in factors:
        raise ValueError(
            f"dskd.teacher.cache.max_size: {size!r} is no size. Write it like 200GB or 150GiB."
        )
    return int(float(match[1]) * factors[match[2].lower()])


class CacheConfig(BaseModel, extra="forbid"):
    """Where the teacher's final hidden states are kept, and how."""

    path: str = Field(
        description="Folder; any number of runs and teachers may share one. Written by "
        "`axolotl-dskd cache` ahead of training, or during the first epoch."
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        "auto", description="Of the stored states; auto is bfloat16."
    )
    max_size: str | None = Field(
        None, description="The folder grows to this at most, such as 200GB or 150GiB."
    )

    @field_validator("path")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return str(Path(value).expanduser()) if value.startswith("~") else value

    @field_validator("max_size", mode="before")
    @classmethod
    def _readable_size(cls, value: Any) -> Any:
        if value is not None:
            _bytes(value)
        return None if value is None else str(value)

    @property
    def max_bytes(self) -> int | None:
        """`max_size` as a number of bytes."""
        return None if self.max_size is None else _bytes(self.max_size)

    @property
    def storage(self) -> str:
        """The dtype, resolved."""
        return "bfloat16" if self.dtype == "auto" else self.dtype
