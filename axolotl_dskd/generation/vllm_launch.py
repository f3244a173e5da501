"""The command that starts a stock vLLM as a server that writes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from urllib.parse import urlsplit

#: Ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class WritingServer:
    """What a writing server has to be.

    Attributes:
        url: where it listens.
        base_model: what it serves before it is given anything.
        name: by which it shall know the model.
        longest: tokens of a prompt and its answer.
        adapter_rank: of the adapters that it is given; None: it is given none.
        takes_weights: it is given weights.
        revision: of the base model on the hub; None: its default.
        tokenizer: where it comes from; None: from the base model.
        trust_remote_code: the base model brings code of its own.
    """

    url: str
    base_model: str
    name: str
    longest: int
    adapter_rank: int | None = None
    takes_weights: bool = False
    revision: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """Variables without which it takes nothing from outside."""
        if self.takes_weights:
            return {"VLLM_SERVER_DEV_MODE": "1"}
        return {} if self.adapter_rank is None else {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    def command(self, python: str = "python") -> list[str]:
        """Program and arguments.

        Args:
            python: of the environment that has vLLM.
        """
        address = urlsplit(self.url)
        port = address.port or (443 if address.scheme == "https" else 80)
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        for flag, value in (
            ("--model", self.base_model),
            ("--served-model-name", self.name),
            ("--revision", self.revision),
            ("--tokenizer", self.tokenizer),
            ("--max-model-len", str(self.longest)),
            # Else its own habits (stop tokens among them) join what is asked for.
            ("--generation-config", "vllm"),
            ("--host", str(address.hostname)),
            ("--port", str(port)),
        ):
            if value is not None:
                command += [flag, value]
        if self.trust_remote_code:
            command.append("--trust-remote-code")
        if self.adapter_rank is not None:
            rank = next((r for r in _RANKS if r >= self.adapter_rank), self.adapter_rank)
            command += ["--enable-lora", "--max-lora-rank", str(rank)]
        return command

    def in_words(self, python: str = "python") -> str:
        """As a shell takes it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command(python))])
