"""The student on the supervised tokens of a batch: bits, first choices, and bytes of text.

Bits per byte are Σ -log2 p(token) over the supervised tokens, divided by the bytes of the text that
these stand for. Tokens without text (the end of a turn) count among the bits, since a model must
say where its answer ends, and not among the bytes. So the number needs no common tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from axolotl_dskd.losses import Budget, Stream, TermSpec, by_rows, even_parts, over
from axolotl_dskd.types import View


class Measured(NamedTuple):
    """What is found of each supervised student token, [N] each.

    Attributes:
        nats: float32, cross-entropy of the label at temperature 1.
        right: float32 0 or 1, whether the most likely token is the label.
    """

    nats: Tensor
    right: Tensor


class TextBytes:
    """How many bytes of the supervised text each token stands for.

    Args:
        tokens: bytes of each id of the student's tokenizer, b"" for those without text.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._has_text = torch.tensor([bool(token) for token in tokens])

    def __call__(self, spans: Tensor, labels: Tensor) -> Tensor:
        """[N] int64: a token's span is its share of the text, as tokens tile it; one without text
        has a span, too (`give_textless_tokens_room`), which is none of the text.

        Args:
            spans: [N, 2] `Matches.spans`.
            labels: [N] ids of the tokens.
        """
        self._has_text = self._has_text.to(labels.device)
        return (spans[:, 1] - spans[:, 0]) * self._has_text[labels]


@torch.no_grad()
def measure(student: View, budget: Budget) -> Measured:
    """The student's own supervised tokens, chunk by chunk:

        nats  = -logits.log_softmax(-1)[labels],  right = logits.argmax(-1) == labels

    Args:
        student: with states and head.
        budget: how many tokens' logits may be held at once.
    """
    assert student.hidden is not None and student.head is not None
    stream, labels = Stream(student.hidden, student.head), student.tokens.labels

    def of_block(
        rows: dict[str, slice], logits: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        z, targets = logits["student"], labels[rows["student"]]
        nats = z.logsumexp(-1) - z.gather(-1, targets[:, None]).squeeze(-1)
        return {"nats": nats, "right": (z.argmax(-1) == targets).to(z.dtype)}, {}

    found = over(
        {"student": stream},
        even_parts({"student": len(labels)}, budget.size(stream)),
        by_rows(of_block),  # type: ignore[arg-type]
        {"nats": TermSpec("student"), "right": TermSpec("student")},
    )
    return Measured(found.values["nats"], found.values["right"])
