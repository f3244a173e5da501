"""Random views of both sides and heads of every kind, as tests of objectives take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.objectives.base import Pair
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import Matches, Side, View
from tests.support import naive

#: Kinds of heads, by name: which tensors, and the rest of what `OutputHead` takes.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "lora": {"lora": True},
    "all": {"bias": True, "softcap": 5.0, "scale": 2.0, "lora": True, "padding": 7},
}


class RandomHead:
    """A head, with its logits in the plain form.

    Args:
        V: ids that it can emit.
    """

    def __init__(self, V: int, d: int, kind: str, dtype: torch.dtype, generator: Any) -> None:
        options = dict(HEADS[kind])
        bias, lora = options.pop("bias", False), options.pop("lora", False)
        rows = V + options.pop("padding", 0)

        def randn(*shape: int, scale: float) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (scale * values).to(dtype)

        self.tensors = [
            randn(rows, d, scale=d**-0.5 * 3),
            randn(rows, scale=1.0) if bias else None,
            randn(4, d, scale=0.3) if lora else None,
            randn(rows, 4, scale=0.3) if lora else None,
        ]
        self.options = options | {"vocab_size": V} | ({"lora_scale": 0.5} if lora else {})

    def trained(self) -> list[Tensor]:
        return [t.requires_grad_() for t in self.tensors if t is not None]

    def head(self) -> OutputHead:
        names = ("weight", "bias", "lora_A", "lora_B")
        return OutputHead(**dict(zip(names, self.tensors, strict=True)), **self.options)

    def logits(self, hidden: Tensor) -> Tensor:
        return naive.head_logits(hidden, *self.tensors, **self.options)


class RandomPair:
    """Student and teacher on two samples of 8 and 5, and 7 and 10 supervised tokens.

    Attributes:
        hidden: states, student's first. heads: of both. sides: their tokens.
        matches: with some tokens that begin alike, some of them exact.
    """

    def __init__(
        self,
        V: int,
        U: int,
        kind: str = "plain",
        dtype: torch.dtype = torch.float64,
        seed: int = 3,
        counts: tuple[tuple[int, ...], tuple[int, ...]] = ((8, 5), (7, 10)),
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = (12, 9)
        self.hidden, self.heads, self.sides = [], [], []
        for vocabulary, d, lengths in zip((V, U), sizes, counts, strict=True):
            n = sum(lengths)
            states = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
            self.hidden.append(states)
            self.heads.append(RandomHead(vocabulary, d, kind, dtype, generator))
            each = torch.tensor(lengths, dtype=torch.long)
            ids = torch.arange(len(lengths)).repeat_interleave(each)
            inputs, labels = torch.randint(vocabulary, (2, n), generator=generator)
            self.sides.append(Side(inputs, labels, ids))
        self.hidden[0].requires_grad_()
        self.leaves = [self.hidden[0], *self.heads[0].trained()]
        starts, ours, theirs = [], 0, 0
        for n, m in zip(*counts, strict=True):
            starts += [(ours + k, theirs + k) for k in range(0, min(n, m)) if k % 4 != 2]
            ours, theirs = ours + n, theirs + m
        pairs = torch.tensor(starts, dtype=torch.long).reshape(-1, 2)
        spans = []
        for side in self.sides:
            width = torch.randint(1, 4, (len(side),), generator=generator)
            begin = 4 * torch.arange(len(side))
            spans.append(torch.stack([begin, begin + width], 1))
        groups = [torch.zeros(len(side), dtype=torch.long) for side in self.sides]
        self.matches = Matches(*spans, pairs[::2], pairs, *groups)

    def views(self, embeddings: bool = False) -> tuple[View, View]:
        ours, theirs = (
            View(side, head.head(), hidden, self._embedded(side, head) if embeddings else None)
            for side, head, hidden in zip(self.sides, self.heads, self.hidden, strict=True)
        )
        return ours, theirs

    def _embedded(self, side: Side, head: RandomHead) -> tuple[Tensor, Tensor]:
        """Input embeddings that are the head's rows."""
        table = head.tensors[0].detach()
        return table[side.input_ids], table[side.labels]

    def begun(self) -> Pair:
        """What an objective's `begin` is given; embeddings of the sizes of the heads' rows."""
        heads = tuple(head.head() for head in self.heads)
        embeddings = tuple(head.weight.detach()[: head.vocab_size] for head in heads)
        return Pair(heads, embeddings, torch.device("cpu"))  # type: ignore[arg-type]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.leaves))


def no_tokens(V: int, U: int, **options: Any) -> RandomPair:
    """A batch without any supervised token."""
    return RandomPair(V, U, counts=((), ()), **options)
