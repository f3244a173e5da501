"""What a vLLM writes with: a model as it is, or a student that is brought up to date.

A server that was restarted has the weights that it was started with. So what it is given has a
version that no other training gives: an adapter in its name, weights in the server's own record of
them. What was not written by the version that was asked for is never taken for it.
"""

from __future__ import annotations

import json
import secrets
import shutil
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from axolotl_dskd.ranks import first_for_all, gather_objects
from axolotl_dskd.servers import Servers
from axolotl_dskd.vllm import models


class Served(Protocol):
    """What a server writes with. All is called on every rank alike.

    Attributes:
        name: by which the server knows it now.
        version: tells what it is now from what it was; part of no prefix cache of another one.
    """

    name: str
    version: str

    def bring_up(self) -> bool:
        """Give the server what it should write with, unless it has it already; whether it was
        given something.

        Raises:
            ValueError: it does not take it.
        """
        return False

    def is_current(self) -> bool:
        """Whether the server still has what it was given.

        Raises:
            ValueError: it does not answer.
        """
        return True


class FixedModel(Served):
    """A model that the server has by itself, such as a teacher."""

    def __init__(self, name: str) -> None:
        self.name, self.version = name, "fixed"


class _Student(Served):
    """A student that is being trained.

    Args:
        servers: the one that writes.
        name: by which it knows the student as it was.
        step: optimizer steps made so far.
        every: steps after which the server is given the student again.
        save: writes the student to a folder, on every rank alike.
        folder: where these folders go; the server must see it, too. The last one stays.
        device: of the ranks' tensors.
    """

    def __init__(
        self,
        servers: Servers,
        name: str,
        *,
        step: Callable[[], int],
        every: int,
        save: Callable[[Path], None],
        folder: Path,
        device: torch.device,
    ) -> None:
        self.servers = servers
        self.name = self.base = name
        self.step = step
        self.every = every
        self.save = save
        self.folder = folder
        self.device = device
        self.version = ""
        self.url = servers.config.addresses[0]
        self._run = gather_objects(secrets.token_hex(4))[0]

    def bring_up(self) -> bool:
        """See `Served`."""
        version = f"{self._run}-{self.step() // self.every}"
        if self.version == version and self.is_current():
            return False
        folder = self.folder / version
        self.save(folder)

        def hand_over() -> None:
            self._hand_over(folder.absolute(), version)
            for old in set(self.folder.iterdir()) - {folder}:
                shutil.rmtree(old, ignore_errors=True)

        first_for_all(hand_over, self.device)
        self.version, self.name = version, self._name(version)
        return True

    def is_current(self) -> bool:
        """See `Served`."""
        return first_for_all(self._is_there, self.device)

    def _name(self, version: str) -> str:
        return self.base

    @abstractmethod
    def _is_there(self) -> bool:
        """Whether the server has this version."""

    @abstractmethod
    def _hand_over(self, folder: Path, version: str) -> None:
        """Give the server what stands in a folder."""

    def _post(self, path: str, body: dict[str, Any]) -> None:
        # An error within it is its answer: asked again, it would say the same.
        self.servers.start(self.servers.ask("POST", path, body, final={500})).result()


class StudentAdapter(_Student):
    """A LoRA student: each version is an adapter with a name of its own."""

    def _name(self, version: str) -> str:
        return f"{self.base}-{version}"

    def _is_there(self) -> bool:
        return self.name in models(self.servers, self.url)

    def _hand_over(self, folder: Path, version: str) -> None:
        known = models(self.servers, self.url)
        name = self._name(version)
        for old in {self.name, name} & (known.keys() - {self.base}):
            self._post("/v1/unload_lora_adapter", {"lora_name": old})
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})


class StudentWeights(_Student):
    """A student that is trained whole: each version takes the place of the server's weights."""

    def _is_there(self) -> bool:
        answer = self.servers.start(self.servers.ask("GET", "/weight_info")).result()
        return bool(json.loads(answer.content).get("weight_version") == self.version)

    def _hand_over(self, folder: Path, version: str) -> None:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        # In this order: whoever asks in between sees the version of before.
        self._post("/collective_rpc", reload)
        self._post("/update_weight_version", {"new_version": version})
