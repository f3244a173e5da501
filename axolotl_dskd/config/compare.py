"""The `compare:` block beside `dskd:`: which runs `axolotl-dskd compare` makes of one YAML."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from axolotl_dskd.config.base import Block


class CompareConfig(Block):
    """What `axolotl-dskd compare` trains and compares; training reads nothing of it."""

    runs: dict[str, dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="Runs by name, with what each changes under `dskd:`. `sft` trains without a "
        "teacher, the name of an objective with that objective, `dskd` as configured. A list of "
        "such names does, too. The first is what the others are compared with.",
    )
    seeds: list[int] | None = Field(
        None, min_length=1, description="Every run is trained with each; default: the YAML's seed."
    )
    held_out: str | Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="JSON lines of the data set's own form, or a share or number of its rows as in "
        "val_set_size; default: the YAML's own test_datasets or val_set_size.",
    )

    @field_validator("runs", mode="before")
    @classmethod
    def _by_names(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {name: {} for name in value}
        if isinstance(value, dict):
            return {name: {} if keys is None else keys for name, keys in value.items()}
        return value
