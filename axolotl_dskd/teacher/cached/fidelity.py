"""What storing hidden states in fewer bits does to the distribution that comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from axolotl_dskd.cache import Codec
from axolotl_dskd.losses.agreement import agreement
from axolotl_dskd.output_head import OutputHead

STORAGES = ("float32", "bfloat16", "int8", "int4")
_TOKENS_AT_ONCE = 128


@dataclass(frozen=True)
class Fidelity:
    """One storage type, compared with bfloat16 on the same tokens.

    Attributes:
        storage: its name.
        bytes_per_token: what it takes on disk.
        kl_mean, kl_p99: KL(bfloat16 ‖ this) in nats per token, at temperature 1.
        agreement: share of tokens with the same first choice.
        tokens: how many were compared.
    """

    storage: str
    bytes_per_token: int
    kl_mean: float
    kl_p99: float
    agreement: float
    tokens: int

    def as_dict(self) -> dict[str, str | int | float]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def storage_fidelity(hidden_ND: Tensor, head: OutputHead) -> list[Fidelity]:
    """Every storage type on final hidden states as the teacher gave them."""
    reference = Codec("bfloat16", head.hidden_size)
    fidelity = []
    for storage in STORAGES:
        codec = Codec(storage, head.hidden_size)
        compared = []
        for states in hidden_ND.split(_TOKENS_AT_ONCE):
            log_p, log_q = (
                head.logits(c.decode(c.encode(states), head.weight.dtype)).float().log_softmax(-1)
                for c in (reference, codec)
            )
            compared.append(agreement(log_p, log_q))
        kl = torch.cat([part.kl for part in compared]).double()
        same_choice = torch.cat([part.same_choice for part in compared])
        fidelity.append(
            Fidelity(
                storage,
                codec.bytes_per_token,
                float(kl.mean()),
                float(kl.quantile(0.99)),
                float(same_choice.double().mean()),
                len(kl),
            )
        )
    return fidelity
