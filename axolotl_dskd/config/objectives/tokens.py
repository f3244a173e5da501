"""Keys of the objectives that compare distributions at one token and another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from axolotl_dskd.config.base import Block
from axolotl_dskd.config.objectives.base import ObjectiveConfig
from axolotl_dskd.config.samples import SamplesConfig, StudentSamplesConfig

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "js_divergence",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "tvd",
]


class DivergenceKeys(Block):
    """Keys of the objectives that compare two distributions over one vocabulary."""

    divergence: DivergenceName = Field(
        "forward_kl", description="Of the student from what it learns from."
    )
    temperature: float = Field(
        2.0, gt=0, le=100, description="Of both distributions; cross-entropies are at 1."
    )
    skew_lambda: float = Field(
        0.1, gt=0, lt=1, description="Share mixed in by the skewed divergences."
    )
    adaptive_alpha: float = Field(
        0.5, gt=0, lt=1, description="Probability mass that adaptive_kl calls the tail."
    )
    js_beta: float = Field(0.5, gt=0, lt=1, description="Teacher's share in js_divergence.")


class WrittenDivergenceKeys(DivergenceKeys, ObjectiveConfig):
    """Keys of those that may compare them otherwise in answers that the student writes."""

    divergence_written: DivergenceName | Literal["same"] = Field(
        "same",
        description="In answers that the student writes, where it shall be another one. "
        "DistiLLM-2 (arXiv 2503.07067): skewed_reverse_kl there, skewed_forward_kl elsewhere.",
    )

    def refuses(self, samples: SamplesConfig) -> str | None:
        """A divergence for text that there is none of."""
        if self.divergence_written == "same" or samples.source == "student":
            return None
        return (
            "divergence_written is for answers that the student writes, but all rows are "
            "references. Set dskd.samples: {from: student}, or remove it"
        )


class ProjectorConfig(Block):
    """The linear maps between the two hidden spaces and their optimizer."""

    init: Literal["auto", "lstsq", "random"] = Field(
        "auto",
        description="How the projectors start. lstsq: in least squares over the tokens that both "
        "vocabularies share. auto: lstsq if these are enough to determine it, else random.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps at the start in which the projectors train alone, at their "
        "full learning rate; the student stays as it is.",
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="AdamW's, times the student's schedule factor. auto: 1e-4 where the projectors "
        "start in least squares, which a larger one unlearns; 1e-3, as published, from random.",
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, on the projectors.")


class DualSpaceConfig(WrittenDivergenceKeys):
    """Dual-space knowledge distillation (arXiv 2406.17328, 2504.11426)."""

    name: Literal["dual_space"] = "dual_space"
    divergence: DivergenceName = Field(
        "skewed_reverse_kl", description="Of the student from the projected teacher."
    )
    alignment: Literal["auto", "positions", "eta", "cma"] = Field(
        "auto",
        description="How tokens of the two models meet. positions: one by one (identical "
        "vocabularies). eta: exact token alignment, those that stand for the same bytes. cma: "
        "cross-model attention. auto: positions if the vocabularies are identical, eta if "
        "nearly all student tokens of the data are exactly aligned, else cma.",
    )
    causal: bool = Field(
        False,
        description="Cross-model attention sees only tokens whose bytes have been read by then.",
    )
    agreement_mask: bool | Literal["auto"] = Field(
        "auto",
        description="The student follows the projected teacher only where the projected teacher's "
        "first choice is what it was trained to say (the label; with eta the teacher's own first "
        "choice). auto: on for cma, as published, else off.",
    )
    student_space_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of the student-space terms; 0 switches them off."
    )
    teacher_space_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of the teacher-space term; 0 switches it off."
    )
    teacher_space_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Of the tokens, drawn anew in each step, that the teacher space is taken over "
        "in training. Less costs less and leaves the gradient's mean as it is; evaluations take "
        "all.",
    )
    projector: ProjectorConfig = Field(
        default_factory=ProjectorConfig, description="The projectors."
    )

    def nothing_to_learn(self) -> str | None:
        """Both spaces are off."""
        if self.student_space_weight or self.teacher_space_weight:
            return None
        return "student_space_weight and teacher_space_weight are both 0"

    @model_validator(mode="after")
    def _causal_attention(self) -> DualSpaceConfig:
        if self.causal and self.alignment in ("positions", "eta"):
            raise ValueError(
                "dskd.objective.causal is for cross-model attention; with alignment: "
                f"{self.alignment} a token meets one token only. Remove causal, or set alignment: "
                "cma."
            )
        return self


class TokenKDConfig(WrittenDivergenceKeys):
    """Token-level distillation over one vocabulary (arXiv 1503.02531)."""

    name: Literal["token_kd"] = "token_kd"


class ULDConfig(ObjectiveConfig):
    """Universal logit distillation (arXiv 2402.12030)."""

    name: Literal["uld"] = "uld"
    pairs: Literal["starts", "ordinal"] = Field(
        "starts",
        description="Which tokens are compared. starts: those that begin at the same byte. "
        "ordinal: the k-th supervised tokens of both sides, as published.",
    )
    top_k: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        4096,
        description="Compare the so many largest probabilities of both sides.",
    )
    temperature: float = Field(1.0, gt=0, le=100, description="Of both distributions.")


class MinEditConfig(ObjectiveConfig):
    """Distillation through a map of the vocabularies (MinED, arXiv 2401.10491)."""

    name: Literal["min_edit"] = "min_edit"
    map: Literal["edit_distance", "first_token"] = Field(
        "edit_distance",
        description="Where a teacher's token goes that the student has not. edit_distance: to the "
        "student's token at the least edit distance, as published. first_token: to the first of "
        "those that the student would write it with.",
    )
    pairs: Literal["starts", "dtw"] = Field(
        "starts",
        description="Which tokens are compared. starts: those that begin at the same byte, unless "
        "the student's label is longer. dtw: those that dynamic time warping over the input tokens "
        "pairs one to one, as published.",
    )
    one_hot: bool = Field(
        False,
        description="Tokens without partner learn their label at the temperature too, as "
        "published; else they have their cross-entropy alone.",
    )
    temperature: float = Field(2.0, gt=0, le=100, description="Of both distributions.")


class SinkhornConfig(ObjectiveConfig):
    """Sinkhorn distance between the tokens of a sample (SinKD, arXiv 2402.17110)."""

    name: Literal["sinkhorn"] = "sinkhorn"
    weight: float = Field(
        0.02,
        ge=0,
        le=100,
        description="Of the Sinkhorn distance, times kd_ratio. Beside a KL divergence about the "
        "published one; 1 where kl_weight is 0.",
    )
    kl_weight: float = Field(
        1.0, ge=0, le=100, description="Of KL(teacher ‖ student) token by token, times kd_ratio."
    )
    temperature: float = Field(2.0, gt=0, le=100, description="Of all distributions.")
    epsilon: float = Field(
        0.1, gt=0, le=10, description="Of the entropy: smaller, nearer to the optimal transport."
    )
    iterations: int = Field(
        20, ge=1, le=1000, description="Sinkhorn's, each over rows and columns."
    )
    max_tokens: int = Field(
        1024,
        ge=1,
        description="Supervised tokens of a sample at most; time and memory grow with the square.",
    )
    alignment: Literal["auto", "eta", "cma"] = Field(
        "auto",
        description="How tokens meet where the vocabularies differ: as in dual_space, whose "
        "projected teacher is then what is compared. With one vocabulary they meet one by one.",
    )
    projector: ProjectorConfig = Field(
        default_factory=ProjectorConfig,
        description="The projectors, where the vocabularies differ.",
    )

    def refuses(self, samples: SamplesConfig) -> str | None:
        """Answers that would be too long once they are written, maybe after hours."""
        if not isinstance(samples, StudentSamplesConfig):
            return None
        if samples.max_new_tokens <= self.max_tokens:
            return None
        return (
            f"sinkhorn compares each supervised token of a sample with each, {self.max_tokens} at "
            f"most, but the student may write {samples.max_new_tokens} (dskd.samples."
            "max_new_tokens). Lower that, or raise dskd.objective.max_tokens (time and memory grow "
            "with the square)"
        )

    def nothing_to_learn(self) -> str | None:
        """Both weights are 0."""
        return None if self.weight or self.kl_weight else "weight and kl_weight are both 0"
