"""Keys of the objectives that learn from answers which the student writes during training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from axolotl_dskd.config.objectives.base import ObjectiveConfig
from axolotl_dskd.config.samples import SamplesConfig, WritingConfig


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

    def refuses(self, samples: SamplesConfig) -> str | None:
        """Its gradient is that of the distribution that was drawn from, but for the teacher's part
        in drawing, which it weighs."""
        if not isinstance(samples, WritingConfig):
            return None
        if (samples.temperature, samples.top_p, samples.top_k) == (1.0, 1.0, 0):
            return None
        return (
            "policy needs answers that are drawn from the student's own distribution. Set "
            "temperature: 1.0, top_p: 1.0 and top_k: 0 in dskd.samples, or use another objective"
        )


class PreferenceConfig(ObjectiveConfig):
    """Preference distillation: the teacher is what DPO calls the reference (arXiv 2406.19774)."""

    name: Literal["preference"] = "preference"
    form: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: a preferred answer against one that the student writes. token: the "
        "teacher's first choice against the student's, token by token over one vocabulary on the "
        "rows as they are, as published.",
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="Of how much the preferred one is ahead. sigmoid: -log sigmoid(beta x - "
        "margin). ipo: (x - 1 / (2 beta)) squared.",
    )
    beta: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] = Field(
        "auto",
        description="auto: 2 with length_norm, 0.1 with sums and in the token form.",
    )
    length_norm: bool = Field(
        True,
        description="Divide an answer's log-ratio by its number of student tokens. false: sums.",
    )
    margin: float = Field(
        0.0, ge=0, le=1000, description="How far ahead is enough (SimPO's target margin)."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Probability that the preferred one is not the better one (sigmoid).",
    )
    reference_free: bool = Field(
        False, description="Leave the teacher's log-probabilities out (SimPO)."
    )

    @property
    def strength(self) -> float:
        """beta as a number."""
        if self.beta != "auto":
            return self.beta
        return 2.0 if self.length_norm and self.form == "sequence" else 0.1

    @model_validator(mode="after")
    def _what_goes_together(self) -> PreferenceConfig:
        if self.loss == "ipo" and (self.margin or self.label_smoothing):
            raise ValueError(
                "dskd.objective: margin and label_smoothing are for loss: sigmoid; ipo has a "
                "target of its own. Remove them, or set loss: sigmoid."
            )
        return self
