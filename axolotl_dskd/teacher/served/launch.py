"""The command that starts a stock vLLM as the server of a teacher."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from axolotl_dskd.teacher.spec import TeacherSpec

#: Every token's state behind the final norm, as it is.
POOLER = json.dumps(
    {"task": "token_embed", "pooling_type": "ALL", "use_activation": False}, separators=(",", ":")
)
#: What to do about a server that is none of this teacher.
HINT = "`axolotl-dskd serve CONFIG` prints how the server has to be started."


def served_name(spec: TeacherSpec) -> str:
    """The name by which the servers know the teacher."""
    assert spec.config.server is not None
    return spec.config.server.model or spec.config.base_model


def server_command(spec: TeacherSpec, url: str, longest: int, python: str = "python") -> list[str]:
    """Program and arguments.

    Args:
        spec: the teacher, which names servers.
        url: where it shall listen: one of them.
        longest: tokens that it shall have room for.
        python: of the environment that has vLLM.
    """
    config = spec.config
    address = urlsplit(url)
    port = address.port or (443 if address.scheme == "https" else 80)
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", config.base_model]
    flags = [
        ("--served-model-name", served_name(spec)),
        ("--revision", config.revision),
        ("--tokenizer", config.tokenizer),
        ("--dtype", str(spec.dtype).removeprefix("torch.")),
        ("--max-model-len", str(longest)),
    ]
    if config.gives == "states":
        flags += [("--runner", "pooling"), ("--convert", "embed"), ("--pooler-config", POOLER)]
    else:
        assert config.server is not None
        flags += [("--max-logprobs", str(config.server.top_k))]
    for flag, value in (*flags, ("--host", address.hostname), ("--port", str(port))):
        if value is not None:
            command += [flag, value]
    return [*command, "--trust-remote-code"] if config.trust_remote_code else command
