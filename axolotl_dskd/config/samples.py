"""`dskd.samples`: where the rows come from that are learned on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from axolotl_dskd.config.base import Block
from axolotl_dskd.config.server import StudentWriterConfig, WriterConfig


class SamplesConfig(Block):
    """Where rows come from."""

    model_config = ConfigDict(populate_by_name=True)

    source: str = Field("dataset", alias="from", description="dataset, student or teacher.")

    @model_serializer(mode="wrap")
    def _as_users_write_it(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Axolotl hands validated values on under the names of the fields."""
        keys = dump(self)
        return {"from": keys.pop("source", self.source), **keys}


class DatasetSamplesConfig(SamplesConfig):
    """The data set's own rows, as Axolotl prepares them."""

    source: Literal["dataset"] = Field(
        "dataset", alias="from", description="dataset: the rows under `datasets:`."
    )


class VLLM(Block):
    """A vLLM that writes."""

    vllm: WriterConfig = Field(description="Where it is.")


class StudentVLLM(Block):
    """A vLLM that writes for the student."""

    vllm: StudentWriterConfig = Field(description="Where it is, and what it is given.")


class WritingConfig(SamplesConfig):
    """How answers to the rows' prompts are written, whoever writes them."""

    max_new_tokens: int = Field(256, ge=1, description="Longest answer, in the writer's tokens.")
    temperature: float = Field(
        1.0, ge=0, description="Of drawing; 0 takes the most likely token each time."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw among the fewest tokens that are together as likely."
    )
    top_k: int = Field(0, ge=0, description="Draw among so many most likely tokens; 0: all.")
    seed: int = Field(42, ge=0, description="Of all that is drawn. Same seed, same text.")
    batch_tokens: int = Field(
        16384,
        ge=1,
        description="Tokens, prompts and padding included, that are written at once. Changes "
        "memory and speed, not what is written.",
    )
    engine: Literal["transformers"] | VLLM = Field(
        "transformers",
        description="transformers: `generate` in the training's own process. vllm: a server.",
    )


class StudentSamplesConfig(WritingConfig):
    """On-policy: the student, as it is at each step, answers the rows' prompts."""

    source: Literal["student"] = Field(
        "student", alias="from", description="student: answers that the student writes."
    )
    engine: Literal["transformers"] | StudentVLLM = Field(  # type: ignore[assignment]
        "transformers",
        description="transformers: `generate` in the training's own process. vllm: a server that "
        "is kept up to date.",
    )
    share: Annotated[float, Field(gt=0, le=1)] | Literal["adaptive"] = Field(
        0.5,
        description="Of the steps, whose answers are written; the others take the data set's. "
        "adaptive: grows by 0.1 each time the validation loss has risen by `adaptive_margin` "
        "(DistiLLM).",
    )
    adaptive_start: float = Field(
        0.0, ge=0, le=1, description="Share of `adaptive` before the validation loss has risen."
    )
    adaptive_margin: float = Field(
        0.1, ge=0, description="Rise of the validation cross-entropy that counts, in nats."
    )
    replay: int = Field(
        0,
        ge=0,
        description="Written rows that are kept, over all ranks, oldest out first; once it is "
        "full, a part of the written steps takes rows from there. 0: none.",
    )
    replay_memory: Annotated[ByteSize, Field(ge=0)] = Field(
        ByteSize(4 << 30),
        description="Host memory of this process in which what teachers say of kept rows stays, "
        "such as 4GiB, so that they need not read these again; beyond it they are asked again.",
    )
    replay_schedule: Literal["decreasing", "increasing", "constant"] = Field(
        "decreasing",
        description="How the part of the written steps that writes anew goes with training: "
        "from all to none, from none to all, or half.",
    )
    turns: Literal["last", "all"] = Field(
        "last",
        description="Which answer of a conversation is written anew: its last one, or any that "
        "is supervised, drawn for each row and step; what follows it is left out of the row then.",
    )
    per_prompt: int = Field(
        1, ge=1, description="Answers to each prompt; of as many rows the first one's is taken."
    )
    teacher_mix: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability at which a token is drawn from the teacher's distribution instead "
        "of the student's, one token at a time (MiniLLM: 0.2); for one vocabulary. 0: the student "
        "draws alone.",
    )
    show_every: int = Field(
        100,
        ge=0,
        description="Steps between two times that answers are shown, in the log and in the "
        "trackers that are open; 0: none.",
    )
    show_count: int = Field(2, ge=1, description="Answers that are shown each time.")

    @model_validator(mode="after")
    def _who_draws(self) -> StudentSamplesConfig:
        if self.teacher_mix and self.engine != "transformers":
            raise ValueError(
                "dskd.samples.teacher_mix draws each token from both models in the training's own "
                "process, but engine is a vLLM, which has one. Set engine: transformers, or "
                "teacher_mix: 0."
            )
        return self


class TeacherSamplesConfig(WritingConfig):
    """Sequence-level distillation: the teacher answers all prompts once, before training."""

    source: Literal["teacher"] = Field(
        "teacher", alias="from", description="teacher: answers that the teacher writes, once."
    )


def _by_name(value: Any) -> Any:
    """`samples: student` stands for `samples: {from: student}`."""
    return {"from": value} if isinstance(value, str) else value


def _source(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("from", value.get("source", "dataset")))
    return str(getattr(value, "source", "dataset"))


#: The value of `dskd.samples`: keys of another kind are unknown keys.
AnySamples = Annotated[
    Annotated[DatasetSamplesConfig, Tag("dataset")]
    | Annotated[StudentSamplesConfig, Tag("student")]
    | Annotated[TeacherSamplesConfig, Tag("teacher")],
    Discriminator(_source),
    BeforeValidator(_by_name),
]
