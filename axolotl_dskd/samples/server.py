"""What a server has to be that writes for a training, from its configuration."""

from __future__ import annotations

from typing import Any, Literal

from axolotl_dskd.config import DSKDConfig, StudentWriterConfig, WriterConfig
from axolotl_dskd.data.tokenizers import teacher_position_limit
from axolotl_dskd.generation import WritingServer


def writing_server(
    cfg: Any, config: DSKDConfig, server: WriterConfig, adapter_rank: int | None
) -> WritingServer:
    """What the server has to be.

    Args:
        cfg: Axolotl's configuration.
        config: the `dskd:` block.
        server: its part of it.
        adapter_rank: of the student's LoRA; None: it has none.

    Raises:
        ValueError: what it shall be given is not what the student has.
    """
    if not isinstance(server, StudentWriterConfig):
        teacher = config.one_teacher
        if teacher.adapter and server.model is None:
            raise ValueError(
                f"dskd.samples.engine: a vLLM of {teacher.base_model} would write without "
                "dskd.teacher.adapter. Merge it with `axolotl merge-lora` and name the merged "
                "folder as base_model; or serve it and name it as the engine's model."
            )
        return WritingServer(
            server.url,
            teacher.base_model,
            server.model or teacher.base_model,
            teacher_position_limit(config),
            revision=teacher.revision,
            tokenizer=teacher.tokenizer,
            trust_remote_code=teacher.trust_remote_code,
        )
    has: Literal["weights", "adapter"] = "weights" if adapter_rank is None else "adapter"
    if server.sync not in ("auto", has):
        raise ValueError(
            f"dskd.samples.engine.vllm.sync: {server.sync}, but what this student trains is its "
            f"{has}. Write sync: {has}, or leave it out."
        )
    return WritingServer(
        server.url,
        str(cfg.base_model),
        server.model or str(cfg.base_model),
        int(cfg.sequence_len),
        adapter_rank,
        takes_weights=has == "weights",
        revision=cfg.revision_of_model,
        tokenizer=None if cfg.tokenizer_config == cfg.base_model else cfg.tokenizer_config,
        trust_remote_code=bool(cfg.trust_remote_code),
    )
