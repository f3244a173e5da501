"""The command that starts a stock vLLM as the server of a teacher."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from axolotl_dskd.teacher.served.teacher import served_name
from axolotl_dskd.teacher.spec import TeacherSpec

#: Every token's state behind the final norm, as it is.
POOLER = {"task": "token_embed", "pooling_type": "ALL", "use_activation": False}


def server_command(spec: TeacherSpec, url: str, longest: int, python: str = "python") -> list[str]:
    """Program and arguments.

    Args:
        spec: the teacher, which names servers.
        url: where it shall listen: one of them.
        longest: teacher tokens of the longest row.
        python: of the environment that has vLLM.
    """
    config = spec.config
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", config.base_model]
    for flag, value in (
        ("--served-model-name", served_name(spec)),
        ("--revision", config.revision),
        ("--tokenizer", config.tokenizer),
        ("--dtype", str(spec.dtype).removeprefix("torch.")),
        ("--max-model-len", str(longest)),
        ("--runner", "pooling"),
        ("--convert", "embed"),
        ("--pooler-config", json.dumps(POOLER, separators=(",", ":"))),
        ("--host", address.hostname),
        ("--port", str(port)),
    ):
        if value is not None:
            command += [flag, value]
    return [*command, "--trust-remote-code"] if config.trust_remote_code else command
