"""`dskd.samples`: where the rows come from that are learned on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from axolotl_dskd.config.base import Block


class SamplesConfig(Block):
    """The data set's own rows, as Axolotl prepares them."""

    # Axolotl hands validated values on under the names of the fields.
    model_config = ConfigDict(populate_by_name=True)

    source: Literal["dataset"] = Field(
        "dataset", alias="from", description="dataset: the rows under `datasets:`."
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """`samples: dataset` stands for `samples: {from: dataset}`."""
        return {"from": value} if isinstance(value, str) else value
