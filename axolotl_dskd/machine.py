"""What this machine has."""

from __future__ import annotations

import os

import torch


def total_memory(device: torch.device) -> int:
    """Bytes of a device's memory in total: a GPU's, or this machine's main memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
