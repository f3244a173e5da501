"""Keys of the objectives that compare pieces of text which both sides divide alike."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from axolotl_dskd.config.objectives.base import ObjectiveConfig, Weight


class ChunkLikelihoodConfig(ObjectiveConfig):
    """Approximate likelihood matching (arXiv 2503.20083)."""

    name: Literal["chunk_likelihood"] = "chunk_likelihood"
    divergence: Literal["binary_ce", "reverse_binary_kl", "abs_exp", "abs", "renyi"] = Field(
        "binary_ce",
        description="Of the student's likelihood of a chunk from the teacher's. binary_ce: "
        "cross-entropy of chunk or not chunk. reverse_binary_kl: the same from the student's side. "
        "abs_exp: distance of the probabilities. abs: distance of the log-likelihoods, without "
        "temperature. renyi: Rényi's divergence of chunk or not chunk.",
    )
    temperature: float = Field(
        100.0,
        gt=0,
        le=10_000,
        description="What log-likelihoods are divided by. Gradients keep the size of "
        "cross-entropy's, whatever it is.",
    )
    renyi_order: float = Field(0.5, gt=0, lt=1, description="Order of renyi.")
    merge: bool = Field(
        True,
        description="Join chunks until the teacher sees a word's boundary behind them.",
    )
    merge_threshold: float = Field(
        0.1, ge=0, lt=1, description="The teacher's probability of a boundary that ends a chunk."
    )
    debias: bool = Field(
        True,
        description="Multiply a chunk's likelihood by that of a word's boundary behind it, which "
        "tells the chunk from the beginning of a longer word.",
    )


class GOLDConfig(ObjectiveConfig):
    """General on-policy logit distillation's loss across tokenizers."""

    name: Literal["gold"] = "gold"
    hybrid: bool = Field(
        True,
        description="Compare tokens that both vocabularies have one by one, and only the others by "
        "rank. false: all by rank.",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Of the Jensen-Shannon divergence of shared tokens. 0: forward KL, 1: reverse.",
    )
    weights: Literal["share"] | tuple[Weight, Weight] = Field(
        "share",
        description="Of shared and of other tokens. share: a and 1 - a, with a the share of the "
        "teacher's vocabulary that is shared, as published; or two numbers.",
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Of both distributions.")

    def nothing_to_learn(self) -> str | None:
        """Neither shared nor other tokens have a weight."""
        if self.weights == "share" or any(self.weights):
            return None
        return "weights are both 0"

    @model_validator(mode="after")
    def _weights_of_one_term(self) -> GOLDConfig:
        if not self.hybrid and self.weights != "share":
            raise ValueError(
                "dskd.objective.weights is for hybrid: true; without it all tokens are compared by "
                "rank, and kd_ratio is the weight. Remove weights, or set hybrid: true."
            )
        return self


class SpanSupportConfig(ObjectiveConfig):
    """Reverse KL over the shared tokens and each aligned span (arXiv 2605.07711)."""

    name: Literal["span_support"] = "span_support"
