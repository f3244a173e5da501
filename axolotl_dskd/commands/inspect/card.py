"""What is planned for: a GPU that is here, one that is named, or this machine's own memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from axolotl_dskd.machine import total_memory
from axolotl_dskd.planning.run import Card


def find_card(gpu_memory: int | None) -> Card:
    """The card that the user names, else the first one here, else this machine's memory."""
    if gpu_memory is not None:
        return Card("the card of --gpu-memory", gpu_memory, True)
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "") != "true":
        gpu = torch.device("cuda", 0)
        return Card(torch.cuda.get_device_name(gpu), total_memory(gpu), True)
    memory = total_memory(torch.device("cpu"))
    return Card("this machine's main memory (there is no GPU)", memory, False)


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24GB", "24576MiB", …

    Raises:
        ValueError: it is no amount of memory, or less than any card has.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise ValueError(f"{text!r} is no amount of memory. Write it as 24GiB or 24GB.") from error
    if size < 1 << 28:
        raise ValueError(f"{text!r} are {size} bytes. Write it with its unit, as 24GiB or 24GB.")
    return size


@contextmanager
def configured_for(card: Card) -> Iterator[None]:
    """While open, Axolotl validates a configuration as on `card`, which need not be here."""
    if not card.gpu or torch.cuda.is_available():
        yield
        return
    version = str(torch.__version__).split("+")[0]
    able = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_86"}
    capabilities = able, {"torch_version": version}
    with (
        mock.patch("axolotl.cli.config.gpu_capabilities", lambda: capabilities),
        mock.patch("axolotl.utils.config.is_torch_bf16_gpu_available", lambda: True),
    ):
        yield
