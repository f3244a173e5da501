"""Hidden states to bytes and back, a fixed number of bytes per token.

Quantised states are rotated first: within blocks of the hidden size, by signs and a
Walsh-Hadamard matrix (orthogonal, so decoding rotates back exactly). Final hidden states have a
few channels far larger than the rest; a scale per row would spend its steps on those. Rotated,
every channel carries a bit of them and plain rounding errs about ten times less in KL.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

StorageName = Literal["float32", "bfloat16", "int8", "int4"]

_PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: (largest code, values that share one float16 scale, shares of the largest value tried as clip)
_QUANTISED = {
    "int8": (127, 64, (1.0,)),
    "int4": (7, 32, (0.8, 0.85, 0.9, 0.95, 1.0)),
}
_PAD_TO = 64
_MAX_BLOCK = 512


class Codec:
    """Packs hidden states of one size into one storage type.

    Args:
        storage: float32 and bfloat16 keep the numbers; int8 takes 8.25 bits and int4 4.5 bits per
            number.
        hidden_size: D.
    """

    def __init__(self, storage: str, hidden_size: int) -> None:
        assert storage in get_args(StorageName), storage
        self.storage = storage
        self.hidden_size = hidden_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one packed token."""
        if self.storage in _PLAIN:
            return self.hidden_size * _PLAIN[self.storage].itemsize
        _, group, _ = _QUANTISED[self.storage]
        padded = self._padded
        return padded // (2 if self.storage == "int4" else 1) + 2 * (padded // group)

    @property
    def _padded(self) -> int:
        return -(-self.hidden_size // _PAD_TO) * _PAD_TO

    def encode(self, hidden_ND: Tensor) -> Tensor:
        """[N, D] in any floating dtype -> [N, bytes_per_token] uint8, on the same device."""
        if self.storage in _PLAIN:
            plain = hidden_ND.to(_PLAIN[self.storage]).contiguous()
            return plain.view(torch.uint8).view(len(plain), -1)
        largest, group, clips = _QUANTISED[self.storage]
        padding = self._padded - self.hidden_size
        wide = torch.nn.functional.pad(hidden_ND.float(), (0, padding))
        groups_NGg = _rotate(wide).view(len(wide), -1, group)
        best_NG: Tensor | None = None
        for clip in clips:
            scale = (groups_NGg.abs().amax(-1) * (clip / largest)).half()
            codes = _round(groups_NGg, scale, largest)
            error = (groups_NGg - codes * scale.float()[..., None]).square().sum(-1)
            if best_NG is None:
                best_NG, best_scale, best_codes = error, scale, codes
                continue
            better = error < best_NG
            best_NG = torch.where(better, error, best_NG)
            best_scale = torch.where(better, scale, best_scale)
            best_codes = torch.where(better[..., None], codes, best_codes)
        codes_ND = best_codes.to(torch.int8).view(len(wide), -1)
        if self.storage == "int4":
            nibbles = (codes_ND + 8).to(torch.uint8)
            code_bytes = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
        else:
            code_bytes = codes_ND.view(torch.uint8)
        return torch.cat([code_bytes, best_scale.contiguous().view(torch.uint8)], 1)

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, bytes_per_token] uint8 -> [N, D] in `dtype`, on the same device."""
        assert packed.dtype == torch.uint8 and packed.shape[1] == self.bytes_per_token
        if self.storage in _PLAIN:
            return packed.contiguous().view(_PLAIN[self.storage]).to(dtype)
        _, group, _ = _QUANTISED[self.storage]
        cut = packed.shape[1] - 2 * (self._padded // group)
        codes, scales = packed[:, :cut], packed[:, cut:].contiguous().view(torch.float16)
        if self.storage == "int4":
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8) - 8
        else:
            codes = codes.contiguous().view(torch.int8)
        groups = codes.view(len(codes), -1, group).float() * scales.float()[..., None]
        return _rotate_back(groups.flatten(1))[:, : self.hidden_size].to(dtype)


def _round(groups_NGg: Tensor, scale_NG: Tensor, largest: int) -> Tensor:
    step = scale_NG.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
    return (groups_NGg / step).round().clamp(-largest, largest)


@lru_cache(maxsize=8)
def _rotation(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(signs [width], orthogonal symmetric matrix [b, b]) with b the block of this width."""
    block = math.gcd(width, _MAX_BLOCK)
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    # Part of the file format, so from a hash: a generator's numbers may change with its library.
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(b"signs").digest(width // 8), np.uint8))
    signs = torch.from_numpy(1.0 - 2.0 * bits.astype(np.float32))
    return signs.to(device), (matrix / math.sqrt(block)).to(device)


def _rotate(x_NW: Tensor) -> Tensor:
    signs, matrix = _rotation(x_NW.shape[1], x_NW.device)
    with torch.autocast(x_NW.device.type, enabled=False):
        return ((x_NW * signs).view(len(x_NW), -1, len(matrix)) @ matrix).view_as(x_NW)


def _rotate_back(x_NW: Tensor) -> Tensor:
    signs, matrix = _rotation(x_NW.shape[1], x_NW.device)
    with torch.autocast(x_NW.device.type, enabled=False):
        return (x_NW.view(len(x_NW), -1, len(matrix)) @ matrix).view_as(x_NW) * signs
