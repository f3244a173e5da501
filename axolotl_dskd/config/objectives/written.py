"""Keys of the objectives that learn from answers which the student writes during training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from axolotl_dskd.config.objectives.base import ObjectiveConfig


class PolicyConfig(ObjectiveConfig):
    """Policy gradient on the student's own text (MiniLLM, arXiv 2306.08543)."""

    name: Literal["policy"] = "policy"
    gamma: float = Field(
        0.95, ge=0, le=1, description="What a reward counts for the token before it."
    )
    length_norm: bool = Field(
        True, description="Divide what is still to come by the number of tokens still to come."
    )
    whiten: Literal["running", "none"] = Field(
        "running",
        description="running: advantages less their mean, over their standard deviation, both of "
        "the steps before (so the first step has cross-entropy and the single-step term alone). "
        "none: as they are.",
    )
    reward_scale: float = Field(
        0.5, gt=0, le=1000, description="What a log-ratio is divided by to be a reward."
    )
    reward_clip: float = Field(
        10.0, gt=0, le=1e6, description="Rewards are kept between minus this and this."
    )
    ratio_clip: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="How far the student may move from the one that wrote before a token stops "
        "to teach.",
    )
    single_step: bool | Literal["auto"] = Field(
        "auto",
        description="Learn each token's own part of the reward exactly, as KL(student ‖ teacher) "
        "over the vocabulary. auto: where both have one vocabulary.",
    )
