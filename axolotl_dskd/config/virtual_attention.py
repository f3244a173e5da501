"""`dskd.virtual_attention`: what groups of tokens attend to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from axolotl_dskd.config.base import Block


class VirtualAttentionConfig(Block):
    """Virtual attention beside any objective, after KDExplainer (arXiv 2105.04181)."""

    blocks: int = Field(8, ge=2, le=1024, description="Equal parts of the student's final state.")
    groups: Literal["classes", "kmeans", "scrambled"] = Field(
        "classes",
        description="Which tokens attend alike: readable classes of tokens, clusters of the "
        "output head's rows, or, as a control, the classes with their tokens shuffled.",
    )
    group_count: int = Field(16, ge=2, le=1024, description="Clusters of `kmeans`.")
    temperature: float = Field(1.0, gt=0, description="Of the attention over blocks.")
    strength: float = Field(
        1.0, gt=0, le=1, description="How far attention scales blocks; at 0 it would not."
    )
    entropy_weight: float = Field(
        0.01, ge=0, le=100, description="γ, of the attention's mean entropy (0 to 1) in the loss."
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Of the attention; auto: ten times the student's."
    )
    leave: Literal["anneal", "merge"] = Field(
        "anneal",
        description="How the attention leaves the student: it fades out before training ends, or "
        "is multiplied into an output head that trains and is not tied; its checkpoints hold "
        "head and attention apart.",
    )
    anneal: float = Field(
        0.3, gt=0, le=1, description="Share of the steps, the last ones, in which it fades out."
    )
