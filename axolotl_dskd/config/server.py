"""Servers that run a model for a training: the teacher's layers (`dskd.teacher.server`), or a vLLM
that writes (`dskd.samples.engine`). Imports nothing of this package."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

#: What a teacher says of each token: final hidden states, from which all follows, or
#: log-probabilities of the label and of the likeliest tokens.
Gives = Literal["states", "logprobs"]


def _hidden(value: Any) -> Any:
    """Without user and password, which errors would repeat."""
    if isinstance(value, list):
        return [_hidden(each) for each in value]
    return re.sub(r"^(\w+://)?.*@", r"\1***@", value) if isinstance(value, str) else value


def _plain(url: str) -> str:
    """The URL without a slash at its end.

    Raises:
        ValueError: it is no http address, or carries what does not belong there.
    """
    if "@" in url:
        raise ValueError(
            "the URL of a server holds a user or password. URLs are logged; put a key into an "
            "environment variable and name it in api_key_env."
        )
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_is_one = urlsplit(""), False
    strange = parts.query or parts.fragment or not port_is_one
    if parts.scheme not in ("http", "https") or not parts.netloc or strange:
        raise ValueError(f"{url!r} is no address of a server. Write it like http://127.0.0.1:8000.")
    return url.rstrip("/").removesuffix("/v1")


Address = Annotated[str, AfterValidator(_plain)]


class Endpoint(BaseModel, extra="forbid"):
    """How a server is asked, and with how much patience."""

    model: str | None = Field(
        None, description="The name by which the server knows the model. Default: its base_model."
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the server's key. Default: no key."
    )
    timeout: float = Field(120.0, gt=0, description="Seconds for one answer.")
    retries: int = Field(
        10,
        ge=0,
        description="How often a request is made again after a failure of the server, waiting "
        "1, 2, 4 … 30 seconds: 10 bridge a restart of three minutes.",
    )
    concurrency: int = Field(
        16, ge=1, description="Requests in flight at once, of each training process."
    )

    @property
    def addresses(self) -> list[str]:
        """All servers."""
        raise NotImplementedError

    @property
    def api_key(self) -> str | None:
        """The key, from the environment.

        Raises:
            ValueError: the variable is not set, or holds no key.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()  # files end in a line break
        if not key:
            raise ValueError(
                f"api_key_env of a server names {self.api_key_env}, which is not set. Export the "
                "server's key under this name."
            )
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{self.api_key_env} holds characters that no key has.")
        return key


class ServerConfig(Endpoint):
    """A stock vLLM that runs the teacher's layers."""

    url: Address | None = Field(None, description="Where the server listens: http://host:8000.")
    urls: Annotated[list[Address], Field(min_length=1)] | None = Field(
        None, description="Several servers of the same teacher, which share the load."
    )
    gives: Gives = Field(
        "states",
        description="states: a pooling server gives final hidden states, and so the whole "
        "distribution. logprobs: a server that writes gives log-probabilities of the labels and, "
        "where the objective takes them, of the likeliest tokens; nothing of the teacher but its "
        "tokenizer is loaded here.",
    )
    top_k: int = Field(
        64,
        ge=1,
        description="With gives: logprobs, how many of the likeliest tokens are asked for.",
    )

    @field_validator("url", "urls", mode="before")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        return _hidden(value)

    @model_validator(mode="after")
    def _somewhere(self) -> ServerConfig:
        if (self.url is None) == (self.urls is None):
            raise ValueError(
                "dskd.teacher.server needs either url: http://host:8000 or urls: [several of them]."
            )
        return self

    @property
    def addresses(self) -> list[str]:
        """All servers."""
        return [self.url] if self.url is not None else list(self.urls or ())


class WriterConfig(Endpoint):
    """A vLLM that writes answers."""

    url: Address = Field(description="Where it listens: http://host:8000.")
    timeout: float = Field(600.0, gt=0, description="Seconds for one answer.")
    concurrency: int = Field(64, ge=1, description="Answers that each process asks for at once.")

    @field_validator("url", mode="before")
    @classmethod
    def _without_secrets(cls, value: Any) -> Any:
        return _hidden(value)

    @property
    def addresses(self) -> list[str]:
        """The one server."""
        return [self.url]


class StudentWriterConfig(WriterConfig):
    """A vLLM that writes what the student would, kept up to date while it trains."""

    sync: Literal["auto", "weights", "adapter"] = Field(
        "auto",
        description="What the server is given: all weights, or the adapter. auto: the adapter of "
        "a student that has one.",
    )
    sync_every: int = Field(
        1,
        ge=1,
        description="Optimizer steps between two updates. Above 1 the student that writes is up to "
        "so many steps old, and a resumed run, which begins with an update, writes otherwise.",
    )
