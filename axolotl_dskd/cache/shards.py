"""One shard: a safetensors file with the packed states of many samples and their index.

    states  U8  [T, bytes_per_token]   all samples' tokens, one sample after the other
    keys    U8  [n, 16]                the samples (`sample_key`)
    ends    I64 [n]                    where each sample's tokens end
    sums    U64 [n]                    xxh3 of each sample's key and states

Shards are never changed. The index is covered by a digest in the file's metadata and each sample
by its own sum, so one flipped bit costs one sample. States are read with `pread` instead of a
memory map: the same page cache, one copy less here (they go straight into the batch), and a file
that is cut or a disk that fails is an error that can be handled, not a SIGBUS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from safetensors.numpy import save

from axolotl_dskd.cache.files import Damaged, unique_name, write_atomically
from axolotl_dskd.cache.keys import KEY_BYTES

FORMAT = "1"
SUFFIX = ".safetensors"
_STEM = "states"
_INDEX = ("keys", "ends", "sums")


@dataclass(frozen=True)
class Shard:
    """The index of one file.

    Attributes:
        path: the file.
        keys: [n, 16] uint8. ends: [n] int64. sums: [n] uint64.
        start: where `states` begins in the file, in bytes.
        bytes_per_token: width of a row of `states`.
    """

    path: Path
    keys: np.ndarray
    ends: np.ndarray
    sums: np.ndarray
    start: int
    bytes_per_token: int

    def tokens(self, row: int) -> int:
        """Supervised tokens of a sample."""
        return int(self.ends[row] - (self.ends[row - 1] if row else 0))

    def read_into(self, descriptor: int, row: int, out: np.ndarray) -> None:
        """Fill `out` [tokens, bytes_per_token] uint8 with a sample's packed states.

        Raises:
            Damaged: the file is cut, or the states do not match their checksum.
            OSError: the file cannot be read.
        """
        first = int(self.ends[row - 1]) if row else 0
        if out.shape != (self.tokens(row), self.bytes_per_token):
            raise Damaged(
                self.path, f"sample {row} has {self.tokens(row)} tokens, expected {len(out)}"
            )
        at, view = self.start + first * self.bytes_per_token, out.data.cast("B")
        while len(view):
            count = os.preadv(descriptor, [view], at)
            if not count:
                raise Damaged(self.path, "it ends too early")
            at, view = at + count, view[count:]
        if _sum(self.keys[row], out) != self.sums[row]:
            raise Damaged(self.path, f"sample {row} does not match its checksum")


def is_shard(name: str) -> bool:
    """Whether a file of this name is a (complete) shard."""
    return name.startswith(f"{_STEM}-") and name.endswith(SUFFIX)


def write_shard(folder: Path, keys: Sequence[bytes], states: Sequence[np.ndarray]) -> Path:
    """Write samples to a new file of the folder.

    Raises:
        OSError: the disk is full, or the like; nothing is left behind.
    """
    tensors = {
        "states": np.concatenate(states),
        "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES),
        "ends": np.cumsum([len(s) for s in states], dtype=np.int64),
        "sums": np.array([_sum(k, s) for k, s in zip(keys, states, strict=True)], np.uint64),
    }
    width = tensors["states"].shape[1]
    metadata = {"format": FORMAT, "bytes_per_token": str(width)}
    metadata["digest"] = _digest(metadata, *(tensors[name] for name in _INDEX))
    path = folder / f"{unique_name(_STEM)}{SUFFIX}"
    write_atomically(path, [save(tensors, metadata)])
    return path


def open_shard(path: Path, bytes_per_token: int | None = None) -> Shard:
    """Read and check the index of a shard.

    Args:
        path: the file.
        bytes_per_token: what its states must have, if that is known.

    Raises:
        Damaged: the index is not what was written, or the file is cut.
        OSError: the file cannot be read (it may have been pruned just now).
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise Damaged(path, "its header is cut")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__")
            arrays = {}
            for name, kind in zip(_INDEX, (np.uint8, np.int64, np.uint64), strict=True):
                begin, end = header[name]["data_offsets"]
                file.seek(8 + length + begin)
                raw = file.read(end - begin)
                arrays[name] = np.frombuffer(raw, np.dtype(kind).newbyteorder("<"))
            begin, end = header["states"]["data_offsets"]
            digest = metadata.pop("digest")
            width = int(metadata["bytes_per_token"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise Damaged(path, f"its header cannot be read ({error})") from error
    if digest != _digest(metadata, *(arrays[name] for name in _INDEX)):
        raise Damaged(path, "its index does not match its checksum")
    if metadata["format"] != FORMAT:
        raise Damaged(path, f"it has format {metadata['format']}, this version reads {FORMAT}")
    tokens = int(arrays["ends"][-1]) if len(arrays["ends"]) else 0
    if width != (bytes_per_token or width) or end - begin != tokens * width:
        raise Damaged(path, f"it holds tokens of {width} bytes, expected {bytes_per_token}")
    if size < 8 + length + end:
        raise Damaged(path, f"it has {size} bytes, {8 + length + end} were written")
    keys = arrays["keys"].reshape(-1, KEY_BYTES)
    return Shard(path, keys, arrays["ends"], arrays["sums"], 8 + length + begin, width)


def _sum(key: bytes | np.ndarray, states: np.ndarray) -> int:
    digest = xxhash.xxh3_64(bytes(key))
    digest.update(np.ascontiguousarray(states).data.cast("B"))
    return digest.intdigest()


def _digest(metadata: dict[str, str], *arrays: np.ndarray) -> str:
    digest = xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
