"""The `dskd:` block of an Axolotl YAML: fields, bounds, defaults, and what it refuses.

The only place where defaults are stated, with `cache_config` for the teacher's cache. Imports
nothing else of this package.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from axolotl_dskd.config.cache import CacheConfig

PLUGIN_NAME = "axolotl_dskd.DSKDPlugin"

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "js_divergence",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "tvd",
]


class _Block(BaseModel):
    """Unknown keys are refused, so a misspelt one cannot be silently ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TeacherConfig(_Block):
    """Which teacher, and how it is loaded. Names follow Axolotl's own for the student."""

    base_model: str = Field(description="Hub id or folder of the teacher.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the teacher. Off unless you trust it."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights' dtype. auto: bfloat16 on a GPU that has it, else float32.",
    )
    load_in_4bit: bool = Field(False, description="NF4 with double quantisation (bitsandbytes).")
    load_in_8bit: bool = Field(False, description="LLM.int8() (bitsandbytes).")
    adapter: str | None = Field(
        None, description="Hub id or folder of a LoRA of the teacher, merged into it at load."
    )
    chat_template: str | None = Field(
        None,
        description="Template for the teacher's side of chat_template datasets, as Axolotl's "
        "chat_template (a name, tokenizer_default, or jinja). Default: its tokenizer's own.",
    )
    chat_template_jinja: str | None = Field(
        None, description="The template, or a file with it, where chat_template is jinja."
    )
    eot_tokens: list[str] | None = Field(
        None,
        description="Tokens that end a turn in the teacher's template, as Axolotl's eot_tokens. "
        "Default: its eos token.",
    )
    tokenizer: str | None = Field(
        None, description="Hub id or folder of the teacher's tokenizer. Default: base_model."
    )
    sequence_len: Annotated[int, Field(ge=8)] | None = Field(
        None,
        description="Longest teacher side of a row, in teacher tokens. Default: as long as the "
        "row needs, up to the model's limit.",
    )
    device_map: str | dict[str, int | str] | None = Field(
        None, description="As in transformers. Default: the device of the training process."
    )
    max_memory: dict[int | str, int | str] | None = Field(
        None,
        description="As in transformers, with device_map: auto: what each device may hold, such "
        "as {0: 10GiB, cpu: 60GiB}; layers beyond are offloaded.",
    )
    shard: Literal["auto", "none", "full"] = Field(
        "auto",
        description="On several GPUs. none: each holds the whole teacher. full: each holds a part "
        "of every layer, gathered when it runs. auto: full where the student is sharded (FSDP, "
        "ZeRO-3) and the teacher is not quantised, placed by device_map, or cached.",
    )
    attn_implementation: str | None = Field(
        None, description="As in transformers. Default: the library's choice for the model."
    )
    cache: CacheConfig | None = Field(
        None, description="Keep the teacher's hidden states on disk. Default: run it every step."
    )

    @field_validator("base_model", "tokenizer", "adapter")
    @classmethod
    def _expand_home(cls, value: str | None) -> str | None:
        return str(Path(value).expanduser()) if value and value.startswith("~") else value

    @model_validator(mode="after")
    def _combinations(self) -> TeacherConfig:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(
                "dskd.teacher: load_in_4bit and load_in_8bit are both true. Set one of them."
            )
        if self.adapter and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError(
                "dskd.teacher.adapter cannot be merged into a teacher that is loaded in 4 or 8 "
                "bits without rounding it. Merge it once with `axolotl merge-lora` and name the "
                "merged folder as base_model."
            )
        if self.shard == "full" and not self.can_be_sharded:
            raise ValueError(
                "dskd.teacher.shard: full is for a teacher that is neither quantised nor placed by "
                "device_map nor cached. Use shard: none (4 bits are whole on every GPU), or fill "
                "the cache ahead with `axolotl-dskd cache`."
            )
        if self.max_memory and not self.device_map:
            raise ValueError(
                "dskd.teacher.max_memory does nothing without a device_map. Add device_map: auto."
            )
        if self.chat_template == "jinja" and not self.chat_template_jinja:
            raise ValueError(
                "dskd.teacher.chat_template is jinja, but chat_template_jinja is empty. "
                "Put the template or its file there."
            )
        if self.chat_template_jinja and self.chat_template not in (None, "jinja"):
            raise ValueError(
                f"dskd.teacher has chat_template_jinja and chat_template: {self.chat_template}. "
                "Remove one of them, or set chat_template: jinja."
            )
        return self

    @property
    def can_be_sharded(self) -> bool:
        """Whether nothing else decides where the teacher's weights are."""
        return not (self.load_in_4bit or self.load_in_8bit or self.device_map or self.cache)

    def check_paths(self) -> None:
        """Refuse what looks like a path and is not there.

        Not part of validation: merging or running the student needs no teacher.

        Raises:
            ValueError: a path does not exist.
        """
        for key in ("base_model", "tokenizer", "adapter"):
            value = getattr(self, key) or ""
            if value.startswith((".", "/")) and not Path(value).exists():
                raise ValueError(
                    f"dskd.teacher.{key}: there is no {value} (looked from {Path.cwd()}). "
                    "Correct the path, or name a model of the hub."
                )

    @property
    def tokenizer_name(self) -> str:
        """Where the teacher's tokenizer comes from."""
        return self.tokenizer or self.base_model


class ProjectorConfig(_Block):
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
    learning_rate: float = Field(
        1.0e-3, gt=0, le=1, description="AdamW's, times the student's schedule factor."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's, on the projectors.")


class DSKDConfig(_Block):
    """Dual-space knowledge distillation (arXiv 2406.17328, 2504.11426)."""

    teacher: TeacherConfig = Field(description="The teacher.")
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
    divergence: DivergenceName = Field(
        "forward_kl", description="Student-space divergence from the projected teacher."
    )
    temperature: float = Field(
        2.0, gt=0, le=100, description="Of both spaces' divergences; cross-entropies are at 1."
    )
    kd_ratio: float = Field(
        0.5, ge=0, le=1, description="0 is supervised fine-tuning only, 1 distillation only."
    )
    student_space_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of the student-space terms; 0 switches them off."
    )
    teacher_space_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of the teacher-space term; 0 switches it off."
    )
    skew_lambda: float = Field(
        0.1, gt=0, lt=1, description="Share mixed in by the skewed divergences."
    )
    adaptive_alpha: float = Field(
        0.5, gt=0, lt=1, description="Probability mass that adaptive_kl calls the tail."
    )
    js_beta: float = Field(0.5, gt=0, lt=1, description="Teacher's share in js_divergence.")
    projector: ProjectorConfig = Field(
        default_factory=ProjectorConfig, description="The projectors."
    )
    chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Tokens whose logits are held at once. Changes memory and speed, not results.",
    )

    @model_validator(mode="after")
    def _something_to_distil(self) -> DSKDConfig:
        if self.kd_ratio > 0 and not (self.student_space_weight or self.teacher_space_weight):
            raise ValueError(
                "dskd: student_space_weight and teacher_space_weight are both 0, so kd_ratio "
                f"{self.kd_ratio} weights nothing. Raise one, or set kd_ratio: 0 for plain SFT."
            )
        return self

    @model_validator(mode="after")
    def _causal_attention(self) -> DSKDConfig:
        if self.causal and self.alignment in ("positions", "eta"):
            raise ValueError(
                f"dskd.causal is for cross-model attention; with alignment: {self.alignment} a "
                "token meets one token only. Remove causal, or set alignment: cma."
            )
        return self

    @property
    def uses_teacher(self) -> bool:
        """False with `kd_ratio: 0`: then no teacher is loaded."""
        return self.kd_ratio > 0

    @classmethod
    def of(cls, cfg: Any) -> DSKDConfig | None:
        """The typed block of an Axolotl config, or None where there is none."""
        block = cfg.get("dskd") if hasattr(cfg, "get") else getattr(cfg, "dskd", None)
        if not block:
            return None
        return cls.model_validate(block.to_dict() if hasattr(block, "to_dict") else dict(block))


# Axolotl's key -> (when it is in the way, what to do instead). A value of None means "any truthy".
_REFUSED: dict[str, str] = {
    "rl": "preference and RL training have no supervised text to distil on; remove `rl:`",
    "reward_model": "a reward model gives no next-token distribution; remove `reward_model:`",
    "process_reward_model": "a reward model gives no next-token distribution; remove it",
    "orpo_alpha": "ORPO has a loss of its own; remove `orpo_alpha:`",
    "kd_trainer": "it is Axolotl's built-in distillation; keep one of the two",
    "trainer_cls": "distillation needs its own trainer; remove `trainer_cls:`",
    "use_eaft": "it replaces the loss, as dskd does; remove `use_eaft:`",
    "use_dft": "it replaces the loss, as dskd does; remove `use_dft:`",
    "label_smoothing_factor": "it replaces the loss, as dskd does; remove it",
    "streaming": "both sides of a row are prepared ahead; remove `streaming:`",
    "pretraining_dataset": "streamed pretraining data is not supported; list it under `datasets:` "
    "with `type: completion`",
    "skip_prepare_dataset": "both sides of a row must be prepared; remove it",
    "processor_type": "multimodal data is not supported; remove `processor_type:`",
    "batch_flattening": "use `sample_packing: true` instead",
    "relora": "it resets the optimizer that the projectors follow; use plain LoRA",
    "fsdp": "FSDP1 is not supported; remove `fsdp:` and write `fsdp_config:` with "
    "`fsdp_version: 2`",
    "ray_num_workers": "launching through ray is not supported; use the default launcher",
}
_OTHER_TRAINERS = ("axolotl.integrations.kd.", "axolotl.integrations.diffusion.")
_PARALLEL = ("tensor_parallel_size", "context_parallel_size", "expert_parallel_size")


def _refusals(data: dict[str, Any]) -> list[str]:
    found = [f"`{key}`: {why}" for key, why in _REFUSED.items() if data.get(key)]
    fsdp = data.get("fsdp_config") or {}
    if fsdp and str(data.get("fsdp_version") or fsdp.get("fsdp_version")) != "2":
        found.append("`fsdp_config` without `fsdp_version: 2`: FSDP1 is not supported; add it")
    found += [
        f"`{key}: {data[key]}`: parallelism inside a model is not supported; set it to 1"
        for key in _PARALLEL
        if (data.get(key) or 1) > 1
    ]
    block = data.get("dskd")
    projector = block.get("projector") if isinstance(block, dict) else None
    if data.get("deepspeed") and isinstance(projector, dict) and projector.get("warmup_steps"):
        found.append(
            "`deepspeed` with `dskd.projector.warmup_steps`: DeepSpeed updates the student within "
            "its backward, so it cannot wait for the projectors; remove warmup_steps"
        )
    if data.get("balance_labels") and not data.get("sample_packing"):
        found.append("`balance_labels` without `sample_packing`: set one, or remove the other")
    found += [
        f"plugin `{plugin}`: it brings a trainer of its own; remove it"
        for plugin in data.get("plugins") or []
        if str(plugin).startswith(_OTHER_TRAINERS)
    ]
    return found


class DSKDArgs(BaseModel):
    """What the plugin adds to Axolotl's schema (method names unique: the classes are merged)."""

    dskd: DSKDConfig | None = Field(None, description=DSKDConfig.__doc__)

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
        if data.get("merge_lora") or data.get("inference"):
            return data
        typos = [
            k for k in data if k != "dskd" and k.startswith("dskd") and k not in cls.model_fields
        ]
        if typos:
            raise ValueError(f"unknown key {typos[0]!r}: its values belong under `dskd:`.")
        if refusals := _refusals(data):
            raise ValueError(
                "this configuration does not combine with `dskd:`:\n- " + "\n- ".join(refusals)
            )
        return data
