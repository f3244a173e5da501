"""What is planned for: a GPU that is here, one that is named, or this machine's own memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError


@dataclass(frozen=True)
class Card:
    """What is planned for: a GPU's memory, or this machine's."""

    name: str
    memory: int
    gpu: bool


def find_card(gpu_memory: int | None) -> Card:
    """The card that the user names, else the first one here, else this machine's memory."""
    if gpu_memory is not None:
        return Card("the card of --gpu-memory", gpu_memory, True)
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "") != "true":
        found = torch.cuda.get_device_properties(0)
        return Card(found.name, found.total_memory, True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("this machine's main memory (there is no GPU)", memory, False)


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24GB", "24576MiB", …

    Raises:
        ValueError: it is no amount of memory, or less than any card has.
    """
    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ValueError(f"{text!r} is no amount of memory. Write it as 24GiB or 24GB.") from error
    if found < 1 << 28:
        raise ValueError(f"{text!r} are {found} bytes. Write it with its unit, as 24GiB or 24GB.")
    return found


@contextmanager
def configured_for(card: Card) -> Iterator[None]:
    """While open, Axolotl validates a configuration as on `card`, which need not be here."""
    if not card.gpu or torch.cuda.is_available():
        yield
        return
    import axolotl.cli.config
    import axolotl.utils.config

    version = str(torch.__version__).split("+")[0]
    capabilities = {
        "bf16": True,
        "fp8": False,
        "tf32": True,
        "n_gpu": 1,
        "compute_capability": "sm_86",
    }
    with ExitStack() as stack:
        for module, name, value in (
            (
                axolotl.cli.config,
                "gpu_capabilities",
                lambda: (capabilities, {"torch_version": version}),
            ),
            (axolotl.utils.config, "is_torch_bf16_gpu_available", lambda: True),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
