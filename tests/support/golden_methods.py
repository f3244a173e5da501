"""Golden files of methods across tokenizers, as objectives take them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from axolotl_dskd.data.byte_spans import Spans, aligned_groups, give_textless_tokens_room
from axolotl_dskd.output_head import OutputHead
from axolotl_dskd.types import IGNORE_INDEX, Side, View
from tests.support.groups import Problem, matches_of

FOLDER = Path(
    os.environ.get("DSKD_GOLDEN_METHODS_DIR")
    or Path(__file__).parents[1] / "data" / "golden" / "methods"
)


def files(method: str) -> list[Path]:
    """Those of a method, by seed."""
    return sorted(FOLDER.glob(f"{method}-s*.npz"))


@dataclass(frozen=True)
class Golden:
    """One file.

    Attributes:
        numbers: all arrays of the file.
        problem: its inputs; the student's hidden states are its logits, the head is the identity.
        places: [N], [M] where in [B * L] each supervised token stands.
    """

    numbers: dict[str, Tensor]
    problem: Problem
    places: tuple[Tensor, Tensor]

    def gradient(self, name: str) -> Tensor:
        """[N, V] of supervised tokens."""
        return self.numbers[f"grad_{name}"].flatten(0, 1)[self.places[0]].double()


def load(path: Path, *, end_tokens_meet: bool = True) -> Golden:
    """A file's inputs.

    Args:
        end_tokens_meet: whether end tokens are in one group, or have no counterpart.
    """
    arrays = dict(np.load(path))
    numbers = {n: torch.from_numpy(x) for n, x in arrays.items() if x.dtype.kind in "fib"}
    tokenizers, sides, places, spans, textless, views = [], [], [], [], [], []
    for name in ("student", "teacher"):
        vocabulary = arrays[f"{name}_vocab"].tolist()
        end = next(t for t in vocabulary if t in ("</s>", "<|end|>"))
        tokenizers.append(_tokenizer(vocabulary, end))
        labels = numbers[f"{name}_labels"]
        place = (labels.flatten() != IGNORE_INDEX).nonzero().flatten()
        samples = place // labels.shape[1]
        ids = numbers[f"{name}_input_ids"].flatten()
        sides.append(Side(ids[place], labels.flatten()[place], samples))
        places.append(place)
        spans.append(arrays[f"{name}_spans"].reshape(-1, 2)[place.numpy()])
        textless.append((sides[-1].labels == vocabulary.index(end)).numpy())
        logits = numbers[f"{name}_logits"].flatten(0, 1)[place].double()
        logits.requires_grad_(name == "student")
        head = OutputHead(torch.eye(len(vocabulary), dtype=torch.float64))
        views.append(View(sides[-1], head, logits))
    groups = [torch.full((len(s),), -1) for s in sides]
    count = 0
    for sample in sides[0].sample_ids.unique().tolist():
        rows = [(s.sample_ids == sample).nonzero().flatten() for s in sides]
        ours, theirs = (
            (Spans(*x[r.numpy()].T.astype(np.int64)), t[r.numpy()])
            for x, t, r in zip(spans, textless, rows, strict=True)
        )
        for group in aligned_groups(*give_textless_tokens_room(*ours, *theirs)):
            groups[0][rows[0][list(group.student)]] = count
            ended = textless[0][rows[0][group.student[0]]]
            count += bool(ended) and not end_tokens_meet
            groups[1][rows[1][list(group.teacher)]] = count
            count += 1
    both = (sides[0], sides[1])
    matches = matches_of(both, (groups[0], groups[1]))
    problem = Problem((tokenizers[0], tokenizers[1]), views[0], views[1], matches)
    return Golden(numbers, problem, (places[0], places[1]))


def _tokenizer(vocabulary: list[str], end: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these tokens, whose end token is no end to our package: the
    published code matches end tokens by their strings, so not at all."""
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(end, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)
