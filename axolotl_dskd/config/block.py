"""The `dskd:` block as a whole, and how it joins Axolotl's own schema."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, model_validator

from axolotl_dskd.config.base import Block
from axolotl_dskd.config.compare import CompareConfig
from axolotl_dskd.config.evaluation import EvaluationConfig
from axolotl_dskd.config.objectives import DualSpaceConfig, ObjectiveConfig, objective_config
from axolotl_dskd.config.refusals import refusals, refuse_moved_keys
from axolotl_dskd.config.route import RouteConfig, TeacherName
from axolotl_dskd.config.samples import AnySamples, DatasetSamplesConfig, StudentSamplesConfig
from axolotl_dskd.config.teacher import TeacherConfig
from axolotl_dskd.config.virtual_attention import VirtualAttentionConfig

PLUGIN_NAME = "axolotl_dskd.DSKDPlugin"


def _on_or_off(value: Any) -> Any:
    """`true` for a block without keys, `false` for none."""
    return ({} if value else None) if isinstance(value, bool) else value


class DSKDConfig(Block):
    """Knowledge distillation from a larger teacher, also one with another tokenizer."""

    teacher: TeacherConfig | None = Field(None, description="The teacher.")
    teachers: Annotated[dict[TeacherName, TeacherConfig], Field(min_length=1)] | None = Field(
        None, description="Several teachers by name, of which each row asks one."
    )
    route: RouteConfig | None = Field(None, description="Which of the teachers a row asks.")
    objective: Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(objective_config)] = (
        Field(
            default_factory=DualSpaceConfig,
            description="What is learned: a name, or {name: …} with the objective's own keys.",
        )
    )
    samples: AnySamples = Field(
        default_factory=DatasetSamplesConfig, description="Where the rows come from."
    )
    kd_ratio: float = Field(
        0.5, ge=0, le=1, description="0 is supervised fine-tuning only, 1 distillation only."
    )
    virtual_attention: Annotated[VirtualAttentionConfig | None, BeforeValidator(_on_or_off)] = (
        Field(None, description="true, or a block: groups of tokens attend to blocks of a state.")
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="What evaluations measure and keep."
    )
    chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Tokens whose logits are held at once. Changes memory and speed, not results.",
    )

    @model_validator(mode="before")
    @classmethod
    def _moved_keys(cls, value: Any) -> Any:
        if isinstance(value, dict):
            refuse_moved_keys(value)
        return value

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> DSKDConfig:
        if (self.teacher is None) == (self.teachers is None):
            raise ValueError(
                "dskd needs either `teacher: {base_model: <hub id or folder>}` or `teachers:`, "
                f"several by name; found {'neither' if self.teacher is None else 'both'}."
            )
        if (self.teachers is None) != (self.route is None):
            raise ValueError(
                "dskd.teachers and dskd.route belong together: `route: {field: <column>}` or "
                "`route: {datasets: {<path>: <teacher>}}` says which teacher a row asks."
            )
        if self.teachers is not None and self.route is not None:
            if "virtual_attention" in self.teachers:
                raise ValueError(
                    "dskd.teachers: virtual_attention is what else checkpoints keep beside the "
                    "student. Give that teacher another name."
                )
            unknown = set((self.route.datasets or {}).values()) - self.teachers.keys()
            if unknown:
                raise ValueError(
                    f"dskd.route.datasets asks {', '.join(sorted(unknown))}, but dskd.teachers has "
                    f"{', '.join(self.teachers)}. Correct the name, or add the teacher."
                )
        return self

    @model_validator(mode="after")
    def _something_to_distil(self) -> DSKDConfig:
        if self.kd_ratio > 0 and (nothing := self.objective.nothing_to_learn()):
            raise ValueError(
                f"dskd.objective: {nothing}, so kd_ratio {self.kd_ratio} weights nothing. Raise "
                "one, or set kd_ratio: 0 for plain SFT."
            )
        if self.kd_ratio == 0 and self.samples.source == "student":
            raise ValueError(
                "dskd.samples.from: student with kd_ratio: 0, which learns from references alone, "
                "and what the student writes is none. Raise kd_ratio (0.1 is little), or write "
                "samples: dataset."
            )
        return self

    @model_validator(mode="after")
    def _rows_that_the_objective_can_learn_from(self) -> DSKDConfig:
        if self.uses_teacher and (why := self.objective.refuses(self.samples)):
            raise ValueError(f"dskd.objective: {why}.")
        return self

    @model_validator(mode="after")
    def _teachers_that_write_along(self) -> DSKDConfig:
        if not self.mixes:
            return self
        for name, one in self.each().items():
            if one.one_teacher.server is not None:
                where = f"dskd.teachers.{name}" if name else "dskd.teacher"
                raise ValueError(
                    "dskd.samples.teacher_mix runs student and teacher side by side, token by "
                    f"token, but the layers of {where} are a server's. Remove its server:, or set "
                    "teacher_mix: 0."
                )
        return self

    @model_validator(mode="after")
    def _states_to_compare(self) -> DSKDConfig:
        if self.evaluation.teacher is True:
            for name, one in self.each().items():
                if one.one_teacher.gives != "states":
                    of = f"s.{name}" if name else ""
                    raise ValueError(
                        "dskd.evaluation.teacher: true compares whole distributions, but "
                        f"dskd.teacher{of}.server gives log-probabilities of some tokens. Set its "
                        "gives: states, or evaluation.teacher: auto."
                    )
        return self

    @property
    def mixes(self) -> bool:
        """Whether teachers take part in drawing what the student writes."""
        return isinstance(self.samples, StudentSamplesConfig) and self.samples.teacher_mix > 0

    @property
    def opens_teacher(self) -> bool:
        """Whether training has a teacher open, be it for evaluations alone."""
        return self.uses_teacher or self.evaluation.teacher is True

    @property
    def uses_teacher(self) -> bool:
        """False with `kd_ratio: 0`: then no training step asks a teacher."""
        return self.kd_ratio > 0

    @property
    def one_teacher(self) -> TeacherConfig:
        """The teacher of a configuration with one, as `each` gives them."""
        assert self.teacher is not None, "of several teachers, one must be chosen"
        return self.teacher

    def each(self) -> dict[str, DSKDConfig]:
        """This configuration with one teacher at a time, by the teacher's name, in their order;
        the name is empty where there is only one."""
        if self.teachers is None:
            return {"": self}
        return {
            name: self.model_copy(update={"teacher": teacher, "teachers": None, "route": None})
            for name, teacher in self.teachers.items()
        }

    def without_caches(self) -> DSKDConfig:
        """This configuration with teachers that keep nothing of what they say."""

        def uncached(teacher: TeacherConfig) -> TeacherConfig:
            return teacher.model_copy(update={"cache": None})

        if self.teachers is None:
            return self.model_copy(update={"teacher": uncached(self.one_teacher)})
        several = {name: uncached(teacher) for name, teacher in self.teachers.items()}
        return self.model_copy(update={"teachers": several})

    def choose(self, name: str | None) -> tuple[int, str, DSKDConfig]:
        """The number, the name and the configuration of one teacher.

        Args:
            name: None where there is only one.

        Raises:
            ValueError: there is no such teacher, or there are several to choose from.
        """
        each = self.each()
        if len(each) == 1 and name is None:
            name = next(iter(each))
        if name is None or name not in each:
            found = f"no teacher {name!r}" if name else "several teachers"
            names = " or ".join(f"--teacher {other}" for other in each if other)
            raise ValueError(f"the configuration has {found}: say {names or 'no --teacher'}.")
        return list(each).index(name), name, each[name]

    @classmethod
    def of(cls, cfg: Any) -> DSKDConfig | None:
        """The typed block of an Axolotl config, or None where there is none."""
        block = cfg.get("dskd") if hasattr(cfg, "get") else getattr(cfg, "dskd", None)
        if not block:
            return None
        return cls.model_validate(block.to_dict() if hasattr(block, "to_dict") else dict(block))


class DSKDArgs(BaseModel):
    """What the plugin adds to Axolotl's schema (method names unique: the classes are merged)."""

    dskd: DSKDConfig | None = Field(None, description=DSKDConfig.__doc__)
    compare: CompareConfig | None = Field(None, description=CompareConfig.__doc__)

    @model_validator(mode="before")
    @classmethod
    def dskd_check_block(cls, data: Any) -> Any:
        """Refuse half a configuration and what does not combine, before anything is loaded."""
        if not isinstance(data, dict):
            return data
        named = any(
            str(p).replace(":", ".").endswith("DSKDPlugin") for p in data.get("plugins") or []
        )
        if not named:
            return data  # the plugin manager lives as long as the process; this run is not ours
        if not data.get("dskd"):
            close = difflib.get_close_matches("dskd", [k for k in data if k != "dskd"], n=1)
            hint = f" Did you mean it by `{close[0]}:`?" if close else ""
            raise ValueError(
                f"`plugins:` names {PLUGIN_NAME}, but there is no `dskd:` block.{hint} Add\n"
                "dskd:\n  teacher:\n    base_model: <hub id or folder>\n"
                "or remove the plugin to fine-tune without a teacher."
            )
        if not isinstance(data["dskd"], dict):
            raise ValueError(
                f"`dskd:` is {data['dskd']!r}, not a block of keys. Write\n"
                "dskd:\n  teacher:\n    base_model: <hub id or folder>"
            )
        if data.get("merge_lora") or data.get("inference"):
            return data
        typos = [
            k for k in data if k != "dskd" and k.startswith("dskd") and k not in cls.model_fields
        ]
        if typos:
            raise ValueError(f"unknown key {typos[0]!r}: its values belong under `dskd:`.")
        if problems := refusals(data):
            raise ValueError(
                "this configuration does not combine with `dskd:`:\n- " + "\n- ".join(problems)
            )
        if route := data["dskd"].get("route"):
            entries = [*(data.get("datasets") or []), *(data.get("test_datasets") or [])]
            RouteConfig.model_validate(dict(route)).check_datasets(
                # Axolotl may have read them already.
                [e.model_dump() if isinstance(e, BaseModel) else e for e in entries]
            )
        return data
