"""`dskd.teacher`: which teacher, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from axolotl_dskd.config.base import Block
from axolotl_dskd.config.cache import CacheConfig
from axolotl_dskd.config.server import Gives, ServerConfig


class TeacherConfig(Block):
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
    server: ServerConfig | None = Field(
        None,
        description="A vLLM server that runs the teacher's layers; only head, embedding and "
        "tokenizer are read from base_model, and with gives: logprobs the tokenizer alone. "
        "Default: it runs in the training process.",
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
                "the cache ahead with `axolotl-dskd cache write`."
            )
        if self.max_memory and not self.device_map:
            raise ValueError(
                "dskd.teacher.max_memory does nothing without a device_map. Add device_map: auto."
            )
        if self.server is not None and (keys := self._of_a_loaded_teacher()):
            raise ValueError(
                f"dskd.teacher.server runs the teacher's layers, so {', '.join(keys)} can do "
                "nothing here. Remove them: quantisation and placement are the server's own; an "
                "adapter is merged with `axolotl merge-lora` before it is served."
            )
        if self.cache is not None and self.gives != "states":
            raise ValueError(
                "dskd.teacher.cache keeps hidden states, of which a server with gives: logprobs "
                "gives none. Set gives: states, or remove cache."
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

    def _of_a_loaded_teacher(self) -> list[str]:
        """The keys that are set and say how layers are loaded."""
        keys = ("load_in_4bit", "load_in_8bit", "adapter", "device_map", "max_memory")
        found = [key for key in (*keys, "attn_implementation") if getattr(self, key)]
        return found + (["shard: full"] if self.shard == "full" else [])

    @property
    def gives(self) -> Gives:
        """What it says of each token: hidden states, unless a server gives less."""
        return "states" if self.server is None else self.server.gives

    @property
    def layers_are_loaded(self) -> bool:
        """Whether training steps run the teacher in their own process."""
        return self.cache is None and self.server is None

    @property
    def can_be_sharded(self) -> bool:
        """Whether nothing else decides where the teacher's weights are."""
        quantised = self.load_in_4bit or self.load_in_8bit
        return not (quantised or self.device_map or self.cache or self.server)

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
