"""Which tokens of a vocabulary attend alike: by class, by clusters of rows, or by chance.

Knows bytes of tokens and rows of a matrix; nothing of attention.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.ranks import share_first

#: Of `token_class`, in the order of groups.
CLASSES = (
    "word begins, lower case",
    "word begins, capital",
    "word goes on",
    "capital without space",
    "digits",
    "punctuation",
    "white space",
    "other scripts",
    "pieces of characters",
    "ends and special tokens",
)
_ROUNDS = 20
_ROWS_AT_ONCE = 16384


def token_class(token: bytes) -> str:
    """The one of `CLASSES` that a token belongs to.

    Args:
        token: its bytes; b"" where it stands for no text.
    """
    if not token:
        return "ends and special tokens"
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "pieces of characters"
    if text.isspace():
        return "white space"
    word = text.lstrip()
    first = word[0]
    if first.isdigit():
        return "digits"
    if not first.isalpha():
        return "punctuation"
    if not unicodedata.name(first, "").startswith("LATIN"):
        return "other scripts"
    if len(word) < len(text):
        return "word begins, capital" if first.isupper() else "word begins, lower case"
    return "capital without space" if first.isupper() else "word goes on"


def by_class(tokens: Sequence[bytes]) -> Tensor:
    """[V] int64, the class of each token."""
    return torch.tensor([CLASSES.index(token_class(token)) for token in tokens])


def scrambled(groups: Tensor, seed: int) -> Tensor:
    """Groups of the same sizes, their tokens drawn anew."""
    return groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]


@torch.no_grad()
def by_clusters(head: OutputHead, count: int, seed: int, device: torch.device) -> Tensor:
    """[V] int64 clusters of the head's rows by their directions: k-means, seeded. Every rank must
    call it; rank 0's head is looked at.

    Args:
        head: may hold no storage (device meta) on other ranks, or in a memory plan.
        count: of clusters; those that end empty are missing.
        device: of collectives.
    """
    groups = torch.arange(head.vocab_size) % count
    if not head.weight.is_meta:
        rows = F.normalize(head.weight[: head.vocab_size].to(device).float(), dim=1)
        drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        centres = rows[drawn[:count].to(device)]
        for _ in range(_ROUNDS):
            found = [(part @ centres.T).argmax(1) for part in rows.split(_ROWS_AT_ONCE)]
            groups = torch.cat(found)
            sums = torch.zeros_like(centres).index_add_(0, groups, rows)
            centres = F.normalize(torch.where(sums.any(1, keepdim=True), sums, centres), dim=1)
    if device.type != "meta":
        share_first([groups := groups.to(device)])
    return groups.cpu()
