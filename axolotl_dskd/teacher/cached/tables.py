"""The two matrices that distillation needs of a teacher without its body: output head, embedding.

They are kept in the cache's folder instead of being picked out of the teacher's checkpoint: what
the loaded teacher computed with is written once, bit by bit, whatever its family, sharding, tied
weights, merged adapter or quantisation; reading it back needs none of the model's code, nor its
checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from axolotl_dskd.cache import Damaged, write_atomically
from axolotl_dskd.output_head import OutputHead


@dataclass(frozen=True)
class EmbeddingTable:
    """Input embedding without its module: `table(ids)` is `weight[ids] * scale`.

    Attributes:
        weight: [rows, D].
        scale: 1, or what Gemma multiplies by.
    """

    weight: Tensor
    scale: float = 1.0

    def __call__(self, ids: Tensor) -> Tensor:
        """[...] ids -> [..., D]."""
        embedded = F.embedding(ids, self.weight)
        if self.scale != 1.0:
            embedded = embedded * torch.tensor(self.scale, dtype=self.weight.dtype)
        return embedded

    @classmethod
    @torch.no_grad()
    def of(cls, module: torch.nn.Module) -> EmbeddingTable:
        """The table of an embedding module.

        Raises:
            ValueError: the module does something else to the rows.
        """
        weight = module.weight
        assert isinstance(weight, Tensor)
        scale = getattr(module, "embed_scale", None)
        scale = getattr(module, "scalar_embed_scale", scale)
        table = cls(weight.detach(), 1.0 if scale is None else float(scale))
        ids = torch.arange(0, len(weight), max(1, len(weight) // 256), device=weight.device)
        if not torch.equal(table(ids), module(ids)):
            raise ValueError(
                f"the teacher's input embedding ({type(module).__name__}) does something to its "
                "rows that axolotl-dskd does not know, so it cannot be cached. Remove "
                "dskd.teacher.cache, and please report this architecture."
            )
        return table


class Tables(NamedTuple):
    """What distillation needs of a teacher without its layers.

    Attributes:
        head: frozen.
        embedding: [rows, D].
    """

    head: OutputHead
    embedding: EmbeddingTable


def write_tables(path: Path, head: OutputHead, embedding: EmbeddingTable) -> None:
    """Write head and embedding; `read_tables` gives the same bits back.

    Raises:
        OSError: the disk is full, or the like; nothing is left behind.
    """
    assert head.lora_A is None, "a teacher's adapter is merged"
    tensors = {"head.weight": head.weight, "embedding.weight": embedding.weight}
    if head.bias is not None:
        tensors["head.bias"] = head.bias
    tied = embedding.weight.data_ptr() == head.weight.data_ptr()
    if tied and embedding.weight.shape == head.weight.shape:
        del tensors["embedding.weight"]
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    settings = {
        "scale": head.scale,
        "softcap": head.softcap,
        "embedding_scale": embedding.scale,
    }
    metadata = {"settings": json.dumps(settings), "checksum": _checksum(plain, settings)}
    write_atomically(path, [save(plain, metadata)])


def read_tables(path: Path, vocab_size: int, device: torch.device) -> Tables | None:
    """Head (its rows cut to `vocab_size`) and embedding on a device, or None if there is no file.

    Raises:
        Damaged: the file is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings = json.loads(metadata["settings"])
        if _checksum(tensors, settings) != metadata["checksum"]:
            raise Damaged(path, "its checksum does not match")
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(path, str(error)) from error
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    weight = tensors["head.weight"]
    head = OutputHead(
        weight=weight,
        bias=tensors.get("head.bias"),
        scale=settings["scale"],
        softcap=settings["softcap"],
        vocab_size=min(vocab_size, len(weight)),
    )
    table = EmbeddingTable(tensors.get("embedding.weight", weight), settings["embedding_scale"])
    return Tables(head.frozen(), table)


def _checksum(tensors: dict[str, Tensor], settings: dict[str, float | None]) -> str:
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.view(torch.uint8).numpy()).data)
    return digest.hexdigest()
