"""Real texts through two tiny tokenizers, and random states and heads over them.

What objectives are tried on: several samples, in many languages, some of several turns. Matches
are found by looking at every two tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from axolotl_dskd.data.byte_spans import Spans, give_textless_tokens_room, tile
from axolotl_dskd.data.token_bytes import token_bytes
from axolotl_dskd.objectives import Facts
from axolotl_dskd.output_head import Gate, OutputHead
from axolotl_dskd.types import Logprobs, Matches, Side, View, Written
from tests.support import naive, tiny

#: Hidden sizes, student's first.
SIZES = 12, 20

#: The student's head: its parts, which of them train, and what it does to its logits.
HEADS: dict[str, dict[str, Any]] = {
    "trained": {"trains": ("weight",)},
    "frozen": {},
    "softcap and bias": {"bias": True, "softcap": 5.0, "trains": ("weight", "bias")},
    "lora": {"lora": True, "lora_scale": 0.5, "trains": ("lora_A", "lora_B")},
    "all": {
        "bias": True,
        "lora": True,
        "softcap": 6.0,
        "scale": 1.5,
        "lora_scale": 0.5,
        "padding": 3,
        "trains": ("weight", "bias", "lora_A", "lora_B"),
    },
}
HEADS["gate"] = HEADS["all"] | {"gate": True, "trains": (*HEADS["all"]["trains"], "gate")}


#: Of the samples, where answers are written during training: which are, and the pairs of them.
WRITTEN = (1, 3, 5, 6)
PAIRS = ((0, 1), (2, 3), (4, 5))


# ---- texts ---------------------------------------------------------------------------------

#: Each sample's answers, several turns in some of them.
SAMPLES: list[list[str]] = [
    [tiny.QUESTIONS[i][1], *([tiny.CORPUS[i]] if i % 4 == 1 else []), *(["Ok."] if i % 2 else [])]
    for i in range(len(tiny.QUESTIONS))
]


@dataclass(frozen=True)
class Text:
    """One side of a sample: its supervised tokens and the bytes that they stand for."""

    input_ids: list[int]
    labels: list[int]
    spans: Spans

    def pieces(self) -> list[tuple[int, int]]:
        """Begin and end of each token."""
        return list(zip(self.spans.starts.tolist(), self.spans.ends.tolist(), strict=True))


@lru_cache
def texts(one_vocabulary: bool) -> tuple[Any, Any, list[tuple[Text, Text]]]:
    """Both tokenizers, and the two sides of every sample."""
    student = tiny.byte_level_tokenizer()
    teacher = student if one_vocabulary else tiny.sentencepiece_tokenizer()
    tables = token_bytes(student), token_bytes(teacher)
    pairs = []
    for number, answers in enumerate(SAMPLES):
        # Templates may end a turn by different tokens of one vocabulary.
        other = student.convert_tokens_to_ids("<|system|>")
        their_end = other if one_vocabulary and number == 1 else teacher.eos_token_id
        sides = [
            _read(answers, tokenizer, table, end)
            for tokenizer, table, end in zip(
                (student, teacher), tables, (student.eos_token_id, their_end), strict=True
            )
        ]
        textless = [
            torch.tensor([not table[i] for i in side.labels]).numpy()
            for side, table in zip(sides, tables, strict=True)
        ]
        spans = give_textless_tokens_room(sides[0].spans, textless[0], sides[1].spans, textless[1])
        ours, theirs = (
            Text(side.input_ids, side.labels, s) for side, s in zip(sides, spans, strict=True)
        )
        pairs.append((ours, theirs))
    return student, teacher, pairs


def _read(answers: list[str], tokenizer: Any, table: list[bytes], end: int) -> Text:
    """Answers as one model reads them, each with its end token."""
    prompt = tokenizer("assistant:", add_special_tokens=False)["input_ids"][-1]
    input_ids, labels, lengths = [], [], []
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        counts = [len(table[i]) for i in ids]
        spelled = b"".join(table[i] for i in ids)
        if spelled == b" " + answer.encode():  # sentencepiece's own space
            counts[0] -= 1
        else:
            assert spelled == answer.encode(), answer
        input_ids += [prompt, *ids]
        labels += [*ids, end]
        lengths += [*counts, 0]
    return Text(input_ids, labels, tile(lengths))


def matches_of(pairs: Sequence[tuple[Text, Text]]) -> Matches:
    """By looking at every two tokens of each sample."""
    exact, starts, spans, groups = [], [], ([], []), ([], [])
    for sides in pairs:
        ours, theirs = (side.pieces() for side in sides)
        for i, (start, end) in enumerate(ours, len(spans[0])):
            for j, (their_start, their_end) in enumerate(theirs, len(spans[1])):
                if start == their_start and start < end and their_start < their_end:
                    starts.append((i, j))
                    if end == their_end:
                        exact.append((i, j))
        tokens = [*ours, *theirs]
        edges = {edge for token in tokens for edge in token}
        cuts = sorted(e for e in edges if not any(start < e < end for start, end in tokens))
        before = 1 + max(max(numbers, default=-1) for numbers in groups)
        used = sorted({max(c for c in cuts if c <= start) for start, _ in tokens})
        for side, pieces, numbers in zip(spans, (ours, theirs), groups, strict=True):
            side += pieces
            numbers += [before + max(k for k, c in enumerate(used) if c <= s) for s, _ in pieces]

    def index(rows: list[Any], *shape: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.long).reshape(-1, *shape)

    return Matches(*(index(s, 2) for s in (*spans, exact, starts)), *(index(g) for g in groups))


# ---- numbers -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What an objective is called with, and the samples that it is made of."""

    student: View
    teacher: View
    matches: Matches
    pairs: list[tuple[Text, Text]]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.student, self.teacher, self.matches))


class Inputs:
    """Random states of every sample and heads of both models over real texts.

    Args:
        one_vocabulary: of both tokenizers.
        head: of `HEADS`, or such keys.
        dtype: of all numbers.
        rounded: a dtype whose numbers they shall be.
        copies: how often the samples are there.
        seed: of the numbers.
        written: some answers were written during training (`WRITTEN`, `PAIRS`).
        top: the teacher also says log-probabilities, of its so many likeliest tokens too.
    """

    def __init__(
        self,
        one_vocabulary: bool,
        head: str | dict[str, Any] = "all",
        dtype: torch.dtype = torch.float64,
        rounded: torch.dtype | None = None,
        copies: int = 1,
        seed: int = 17,
        written: bool = False,
        top: int | None = None,
    ) -> None:
        self.top = top
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            return x.to(rounded or dtype).to(dtype)

        student, teacher, pairs = texts(one_vocabulary)
        self.pairs = pairs * copies
        self.facts = Facts(student, teacher, (len(student), len(teacher)), 0.7)
        self.states = [
            tuple(randn(len(side.labels), k) for side, k in zip(pair, SIZES, strict=True))
            for pair in self.pairs
        ]
        for ours, _ in self.states:
            ours.requires_grad_()
        (d, D), (V, U) = SIZES, self.facts.vocab_sizes
        options = dict(HEADS[head] if isinstance(head, str) else head)
        rows = V + options.pop("padding", 0)
        parts = {"weight": randn(rows, d, scale=2 * d**-0.5)}
        if options.pop("bias", False):
            parts["bias"] = randn(rows)
        if options.pop("lora", False):
            parts |= {"lora_A": randn(3, d, scale=0.3), "lora_B": randn(rows, 3, scale=0.3)}
        if options.pop("gate", False):
            parts["gate"] = (1 + randn(5, 4, scale=0.4)).to(torch.promote_types(dtype, torch.float))
            options["groups"] = torch.arange(rows) * 7 % 5
        self.trained = {name: parts[name].requires_grad_() for name in options.pop("trains", ())}
        self.parts, self.options = parts, options | {"vocab_size": V}
        self.heads = (
            self._student_head(),
            OutputHead(randn(U, D, scale=2 * D**-0.5), bias=randn(U), softcap=8.0),
        )
        self.embeddings = randn(V, d), randn(U, D)
        self.written = [self._written(k, generator) for k in range(written * len(self.pairs))]

    def _student_head(self) -> OutputHead:
        tensors, options = dict(self.parts), dict(self.options)
        groups = options.pop("groups", None)
        if groups is not None:
            real = groups[: options["vocab_size"]]
            ids = tuple((real == k).nonzero().flatten() for k in range(len(tensors["gate"])))
            tensors["gate"] = Gate(tensors["gate"], ids)
        return OutputHead(**tensors, **options)

    def _written(self, k: int, generator: Any) -> tuple[Tensor, Tensor]:
        """Log-probabilities at which a student near to this one wrote a sample, and weights; the
        same in every dtype."""
        numbers = {name: tensor.detach().double() for name, tensor in self.parts.items()}
        logits = naive.head_logits(self.states[k][0].detach().double(), **numbers, **self.options)
        labels = torch.tensor(self.pairs[k][0].labels)[:, None]
        noise = torch.randn(len(labels), generator=generator, dtype=torch.float64)
        logprobs = logits.log_softmax(-1).gather(-1, labels)[:, 0] + 0.25 * noise
        weights = 0.4 + torch.rand(len(labels), generator=generator, dtype=torch.float64)
        return logprobs.float(), weights.float()

    def _what_was_written(self, order: Sequence[int]) -> Written | None:
        """Of the samples of a batch."""
        if not self.written:
            return None
        count = len(SAMPLES)
        samples = torch.tensor([k % count in WRITTEN for k in order], dtype=torch.bool)
        nothing = torch.zeros(0)
        logprobs, weights = (
            torch.cat(
                [nothing, *(self.written[k][which] * samples[i] for i, k in enumerate(order))]
            )
            for which in (0, 1)
        )
        place = {k: i for i, k in enumerate(order)}
        copies = range(0, len(self.pairs), count)
        pairs = [(a + c, b + c) for c in copies for a, b in PAIRS]
        here = [(place[a], place[b]) for a, b in pairs if a in place and b in place]
        return Written(samples, logprobs, weights, torch.tensor(here, dtype=torch.long).view(-1, 2))

    def batch(self, samples: Sequence[int] | None = None) -> Batch:
        """The samples of these numbers in this order; all of them by default."""
        order = range(len(self.pairs)) if samples is None else samples
        pairs = [self.pairs[i] for i in order]
        views = []
        for which in (0, 1):
            sides = [pair[which] for pair in pairs]
            ids = [torch.full((len(s.labels),), k) for k, s in enumerate(sides)]
            nothing = torch.zeros(0, dtype=torch.long)
            tokens = Side(
                torch.tensor([i for s in sides for i in s.input_ids], dtype=torch.long),
                torch.tensor([i for s in sides for i in s.labels], dtype=torch.long),
                torch.cat([nothing, *ids]),
            )
            table = self.embeddings[which]
            empty = table.new_zeros(0, SIZES[which]).requires_grad_(which == 0)
            hidden = torch.cat([self.states[i][which] for i in order]) if pairs else empty
            embedded = table[tokens.input_ids], table[tokens.labels]
            written = self._what_was_written(order) if which == 0 else None
            said = self.logprobs(hidden, tokens) if which == 1 and self.top is not None else None
            views.append(View(tokens, self.heads[which], hidden, embedded, written, said))
        return Batch(views[0], views[1], matches_of(pairs), pairs)

    def logprobs(self, hidden: Tensor, tokens: Side) -> Logprobs:
        """What the teacher says where it gives no states; in float64, whatever the states are."""
        head = self.heads[1]
        parts = head.weight.double(), None if head.bias is None else head.bias.double()
        logits = naive.head_logits(hidden.double(), *parts, softcap=head.softcap)
        log_p = logits.log_softmax(-1)
        top, ids = log_p.topk(self.top or 0, -1)
        return Logprobs(log_p.gather(-1, tokens.labels[:, None])[:, 0], ids, top)

    def logits(self, hidden: Tensor, side: int, frozen: bool = False) -> Tensor:
        """What the plain form of a head gives; `frozen`: no gradient goes to the head."""
        if side == 0:
            parts = {n: t.detach() if frozen else t for n, t in self.parts.items()}
            return naive.head_logits(hidden, **parts, **self.options)
        head = self.heads[1]
        return naive.head_logits(hidden, head.weight, head.bias, softcap=head.softcap)
