"""`axolotl-dskd serve`: how the servers of a configuration have to be started: the teacher's, and
the one that writes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch

from axolotl_dskd.commands.cache import rows_of
from axolotl_dskd.config import DSKDConfig, ServerConfig, WritingConfig
from axolotl_dskd.data.tokenizers import (
    load_teacher_tokenizer,
    teacher_position_limit,
    vocabulary_size,
)
from axolotl_dskd.samples import writing_server
from axolotl_dskd.teacher import TeacherSpec
from axolotl_dskd.teacher.served.launch import server_command

#: Where vLLM looks for the key that it shall ask for.
_VLLM_KEY = "VLLM_API_KEY"


def serve_commands(
    cfg: Any, config: DSKDConfig, python: str, more: tuple[str, ...], teacher: int = 0
) -> dict[str, list[str]]:
    """The command of each server, by its URL.

    Args:
        cfg: Axolotl's validated configuration; its data sets say how long rows are.
        config: its `dskd:` block with one teacher.
        python: of the environment that has vLLM.
        more: arguments for vLLM.
        teacher: its number.

    Raises:
        ValueError: the configuration names no server, or one that needs a certificate.
    """
    server = _server(config)
    vocab_size = vocabulary_size(load_teacher_tokenizer(config))
    # Who is asked for log-probabilities writes a token behind the row.
    behind = 1 if config.one_teacher.gives == "logprobs" else 0
    rows = rows_of(cfg, teacher)
    if not len(rows):
        raise ValueError("no row asks this teacher, so it needs no server.")
    longest = int(rows.lengths.max()) + behind
    # Room for rows that are added later, and a number that is easy to read.
    room = limit = teacher_position_limit(config) + behind
    if config.samples.source == "dataset":  # what is written may be as long as the limit
        room = min(-(-longest // 64) * 64, limit)
    for url in server.addresses:
        _check_encryption(url, more)
    specs = {
        url: TeacherSpec(config.one_teacher, vocab_size, _device(url)) for url in server.addresses
    }
    return {url: [*server_command(spec, url, room, python), *more] for url, spec in specs.items()}


def writer_in_words(cfg: Any, config: DSKDConfig, python: str) -> str | None:
    """The command of the server that writes, as a shell takes it; None where none does.

    Args:
        cfg: Axolotl's validated configuration.
        config: its `dskd:` block.
        python: of the environment that has vLLM.

    Raises:
        ValueError: it shall be given what the student has not.
    """
    if not isinstance(config.samples, WritingConfig) or config.samples.engine == "transformers":
        return None
    server = config.samples.engine.vllm
    rank = int(cfg.lora_r) if cfg.adapter in ("lora", "qlora") else None
    key = "" if server.api_key_env is None else f'{_VLLM_KEY}="${server.api_key_env}" '
    return key + writing_server(cfg, config, server, rank).in_words(python)


def in_words(config: DSKDConfig, command: list[str]) -> str:
    """The command as a shell takes it. The key is named, not shown."""
    named = _server(config).api_key_env
    key = "" if named is None else f'{_VLLM_KEY}="${named}" '
    return key + shlex.join(command)


def run_command(config: DSKDConfig, url: str, command: list[str]) -> None:
    """Become the server; returns only by an error.

    Raises:
        ValueError: the server is to run elsewhere, or its key is not in the environment.
        OSError: the program cannot be run.
    """
    if not _is_here(url):
        raise ValueError(f"{url} is not this machine. Run the printed command there.")
    key = _server(config).api_key
    environment: Mapping[str, str] = os.environ | ({} if key is None else {_VLLM_KEY: key})
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        raise ValueError(
            f"there is no program {command[0]!r}. Name the python of the environment that has "
            "vLLM: --python ~/vllm/bin/python"
        ) from None


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _device(url: str) -> torch.device:
    """What a server runs on, which decides its dtype: elsewhere that is a GPU, also where the
    command is printed on a machine without one."""
    gpu = torch.cuda.is_available() or not _is_here(url)
    return torch.device("cuda", 0) if gpu else torch.device("cpu")


def _check_encryption(url: str, more: tuple[str, ...]) -> None:
    """vLLM speaks plain HTTP unless it is told more.

    Raises:
        ValueError: the URL is https, and nothing says who encrypts.
    """
    if urlsplit(url).scheme == "https" and not any(
        flag.startswith(("--ssl-certfile", "--port")) for flag in more
    ):
        raise ValueError(
            f"{url} is https. Say who encrypts: vLLM, by `-- --ssl-certfile FILE --ssl-keyfile "
            "FILE` behind the command; or a proxy in front of it, by `-- --host 127.0.0.1 --port "
            "8000`, the address that it hands requests on to."
        )


def _server(config: DSKDConfig) -> ServerConfig:
    if config.one_teacher.server is None:
        raise ValueError(
            "there is no `server:` in dskd.teacher. Add\n"
            "dskd:\n  teacher:\n    server: {url: http://127.0.0.1:8000}"
        )
    return config.one_teacher.server
