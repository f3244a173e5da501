"""The `dskd.teacher.cache:` block: its fields and defaults. Imports nothing of this package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)


class CacheConfig(BaseModel, extra="forbid"):
    """Where the teacher's final hidden states are kept, and how."""

    path: str = Field(
        description="Folder; any number of runs and teachers may share one. Written by "
        "`axolotl-dskd cache write` ahead of training, or during the first epoch."
    )
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        "auto", description="Of the stored states; auto is bfloat16."
    )
    max_size: Annotated[ByteSize, Field(ge=1)] | None = Field(
        None, description="The folder grows to this at most, such as 200GB or 150GiB."
    )

    @field_validator("path")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        return str(Path(value).expanduser()) if value.startswith("~") else value

    @field_validator("max_size", mode="wrap")
    @classmethod
    def _size_in_words(cls, value: Any, parse: ValidatorFunctionWrapHandler) -> ByteSize | None:
        try:
            # ByteSize reads the beginning and lets any text follow.
            whole = value is None or re.fullmatch(r"\s*[\d.]+\s*\w*\s*", str(value))
            size = parse(value if whole else "")
        except ValidationError:
            raise ValueError(
                f"dskd.teacher.cache.max_size: {value!r} is no size. Write it like 200GB or 150GiB."
            ) from None
        return size

    @property
    def storage(self) -> str:
        """The dtype, resolved."""
        return "bfloat16" if self.dtype == "auto" else self.dtype
